"""Prepares patients: `python -m experiments.prepare --cases=C.json --workdir=W`, or `--ct --mask --label`.

Trains data stage P3 on each patient's CT, starting from the base model, and adapts the base's vertebra localizer, with which
`register` finds a start pose. Of a case file only `volumes` is read. The function behind this command is
`experiments.patients.preparing.prepare`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines import cases
from experiments import configs
from experiments.localizers import localizer_files
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients import workdir
from experiments.runtime import cli
from experiments.runtime import input_flags
from radgs_jax import errors
from radgs_jax.levels import level_name
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
        "Training time per scan in minutes, without the time to make the pairs; 0, the default with --bone: none; default: "
        "the preset's steps.",
        lower_bound=0.0,
    )
    flags.DEFINE_list(
        "levels_mm",
        None,
        "Pixels of the refinement's levels in mm, from coarse to fine, such as 1.5,0.75,0.4; poses are then not judged.",
    )
    flags.DEFINE_enum("preset", "demo", sorted(configs.PRESETS), "Training configuration.")
    flags.DEFINE_bool(
        "detector",
        None,
        "Adapt the localizer BASE/detector.npz to each scan, which takes ten minutes; default: with --ct, if that file exists.",
    )


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


def generic_localizer(chosen: Sequence[workdir.Target], base: pathlib.Path | str) -> pathlib.Path | None:
    """Path of the localizer to adapt to the scans of the targets, or None where none is to be adapted.

    With --ct and without --[no]detector that is the base's localizer, where it exists and knows all levels of the targets.

    Args:
      chosen: the targets; base: folder of the base model.
    Raises:
      InputError: a file that is not a localizer.
    """
    path = pathlib.Path(base) / "detector.npz"
    if flags.FLAGS.detector is not None:
        return path if flags.FLAGS.detector else None
    if flags.FLAGS.cases or flags.FLAGS.bone:
        return None
    why = None if path.exists() else f"{path} is not there"
    if why is None:
        levels = localizer_files.read_localizer(path).config.levels
        beyond = sorted({level_name(t.label) for t in chosen if t.label not in levels})
        why = f"{path} does not know {', '.join(beyond)}" if beyond else None
    if why is None:
        return path
    print(f"no vertebra localizer is adapted: {why}")
    return None


def main() -> None:
    """Prepares what the flags name; raises as `targets`, `generic_localizer` and `preparing.prepare`."""
    given = flags.FLAGS
    chosen, base = targets(), given.base or models.base_folder()
    config = configs.PRESETS[given.preset]
    if given.levels_mm:
        config = dataclasses.replace(config, refine=RefineConfig(levels=levels_of(_levels_mm(given.levels_mm))))
    minutes = 0.0 if given.bone and given.minutes is None else given.minutes
    preparing.prepare(config, given.workdir, chosen, base, minutes, localizer=generic_localizer(chosen, base))
    print(f"prepared: {given.workdir}")


def _levels_mm(texts):
    wanted = "2 to 5 numbers from 3 to 0.1, each smaller than the one before"
    found = cli.numbers("--levels_mm", texts, wanted)
    falling = all(a > b for a, b in zip(found, found[1:]))
    if not (2 <= len(found) <= 5 and falling and found[0] <= 3 and found[-1] >= 0.1):
        errors.fail("flags", "--levels_mm", ",".join(texts), wanted)
    return found


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags)


if __name__ == "__main__":
    command()
