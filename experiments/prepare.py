"""Prepares patients: `python -m experiments.prepare --cases=C.json --workdir=W`, or `--ct --mask --label`.

Extracts each vertebra from its CT. With --train or --minutes also trains data stage P3 on the CT, starting from the base model. Of
a case file only `volumes` is read. The function behind this command is `experiments.patients.preparing.prepare`.
"""

import dataclasses
import pathlib

from absl import flags

from data_pipelines import cases
from experiments import configs
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients import workdir
from experiments.runtime import cli
from experiments.runtime import input_flags
from experiments.runtime import shards
from radgs_jax import errors
from radgs_jax.registration.gauss_newton import levels_of
from radgs_jax.registration.gauss_newton import RefineConfig


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("cases", None, "Case file; the vertebrae of all its volumes are prepared.")
    input_flags.define_scan()
    flags.DEFINE_string("workdir", None, "Folder for the prepared patients.", required=True)
    flags.DEFINE_string(
        "base", None, "Folder of the model to start from, trained in P1 and P2; default: the shipped one."
    )
    flags.DEFINE_float(
        "minutes",
        None,
        "Training time per scan in minutes, without the time to make the pairs; default: none.",
        lower_bound=0.0,
    )
    flags.DEFINE_bool("train", False, "Train for the preset's steps, where --minutes does not say how long.")
    flags.DEFINE_list(
        "levels_mm",
        None,
        "Pixels of the refinement's levels in mm, from coarse to fine, such as 1.5,0.75,0.4; poses are then not judged.",
    )
    flags.DEFINE_enum("preset", "base", sorted(configs.PRESETS), "Training configuration.")
    flags.DEFINE_bool(
        "detector",
        False,
        "Adapt the localizer BASE/detector.npz to each scan, with which `register` then finds start poses; ten minutes.",
    )
    shards.define()


def targets() -> list[workdir.Target]:
    """The vertebrae that the flags name.

    Raises:
      InputError: flags that do not go together, labels that are not numbers, or an unreadable case file.
    """
    given = flags.FLAGS
    if not given.cases:
        return input_flags.targets()
    if given.ct or given.mask or given.label or given.labels or given.bone:
        errors.fail(
            "flags", "--cases", "also --ct, --mask, --label, --labels or --bone", "either a case file or one scan"
        )
    return [workdir.target_of(volume) for volume in cases.read(given.cases).volumes.values()]


def main() -> None:
    """Prepares what the flags name; raises as `targets` and `preparing.prepare`."""
    given = flags.FLAGS
    chosen, base = targets(), given.base or models.base_folder()
    config = configs.PRESETS[given.preset]
    if given.levels_mm:
        config = dataclasses.replace(config, refine=RefineConfig(levels=levels_of(_levels_mm(given.levels_mm))))
    if given.train and given.minutes == 0:
        errors.fail("flags", "--train, --minutes", "--minutes=0 with --train", "one of the two")
    minutes = given.minutes if given.train or given.minutes else 0.0
    localizer = pathlib.Path(base) / "detector.npz" if given.detector else None
    preparing.prepare(config, given.workdir, chosen, base, minutes, localizer=localizer, shard=shards.given())
    print(f"prepared{'' if minutes is None or minutes else ', without training'}: {given.workdir}")


def _levels_mm(texts):
    wanted = "2 to 5 numbers from 3 to 0.1, each smaller than the one before"
    found = cli.numbers("--levels_mm", texts, wanted)
    falling = all(a > b for a, b in zip(found, found[1:]))
    if not (2 <= len(found) <= 5 and falling and found[0] <= 3 and found[-1] >= 0.1):
        errors.fail("flags", "--levels_mm", ",".join(texts), wanted)
    return found


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags, log_in="workdir")


if __name__ == "__main__":
    command()
