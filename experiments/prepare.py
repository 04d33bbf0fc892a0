"""Prepares patients: `python -m experiments.prepare --cases=C.json --workdir=W`, or `--ct --mask --label`.

Trains data stage P3 on each patient's CT, starting from the base model, and adapts the base's vertebra localizer, with which
`register` finds a start pose. Of a case file only `volumes` is read. The function behind this command is
`experiments.patients.preparing.prepare`.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines import cases
from data_pipelines.ct import segmentation
from experiments import configs
from experiments.localizers import localizer_files
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients import workdir
from experiments.runtime import cli
from radgs_jax import errors
from radgs_jax.levels import level_name


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("cases", None, "Case file whose `volumes` are prepared.")
    flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder), instead of --cases.")
    flags.DEFINE_string("mask", None, "Label map on the CT's grid, with --ct.")
    flags.DEFINE_enum(
        "labels", None, sorted(segmentation.LABEL_MAPS), "What numbers --mask holds; default: recognised, or refused."
    )
    flags.DEFINE_list("label", None, "VerSe number of the vertebra, or several, with --ct.")
    flags.DEFINE_string("workdir", None, "Folder for the prepared patients.", required=True)
    flags.DEFINE_string("base", None, "Model of P1+P2 to start from; default: the shipped one.")
    flags.DEFINE_float(
        "minutes", None, "Training time per scan, without its data; default: the preset's steps.", lower_bound=0.05
    )
    flags.DEFINE_enum("preset", "demo", sorted(configs.PRESETS), "Configuration.")
    flags.DEFINE_bool(
        "detector",
        None,
        "Adapt the localizer BASE/detector.npz to each scan, in ten minutes; default: with --ct, where it exists.",
    )


def targets() -> list[workdir.Target]:
    """The vertebrae that the flags name.

    Raises:
      InputError: flags that do not go together, labels that are not numbers, or an unreadable case file.
    """
    if flags.FLAGS.cases:
        if flags.FLAGS.ct or flags.FLAGS.mask or flags.FLAGS.label or flags.FLAGS.labels:
            errors.fail("flags", "--cases", "also --ct, --mask, --label or --labels", "either a case file or one scan")
        return [
            workdir.Target(v.patient, v.full_ct, v.full_mask, v.full_label)
            for v in cases.read(flags.FLAGS.cases).volumes.values()
        ]
    if not (flags.FLAGS.ct and flags.FLAGS.mask and flags.FLAGS.label):
        errors.fail("flags", "input", "neither --cases nor all of --ct, --mask, --label", "one of the two")
    ct, mask = pathlib.Path(flags.FLAGS.ct), pathlib.Path(flags.FLAGS.mask)
    numbers = cli.label_numbers(flags.FLAGS.label)
    return [workdir.Target(ct.name, ct, mask, number, flags.FLAGS.labels) for number in numbers]


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
    if flags.FLAGS.cases:
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
    chosen, base = targets(), flags.FLAGS.base or models.base_folder()
    preparing.prepare(
        configs.PRESETS[flags.FLAGS.preset],
        flags.FLAGS.workdir,
        chosen,
        base,
        flags.FLAGS.minutes,
        localizer=generic_localizer(chosen, base),
        rule=workdir.read_rule(pathlib.Path(base) / workdir.CALIBRATION),
    )
    print(f"prepared: {flags.FLAGS.workdir}")


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags)


if __name__ == "__main__":
    command()
