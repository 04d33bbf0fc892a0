"""Prepares patients: `python -m experiments.prepare --cases=C.json --workdir=W`, or `--ct --mask --label`.

Trains data stage P3 on each patient's CT, from the base model, and adapts the vertebra detector that lies beside it, with
which `register` finds its own start pose. Of a case file it reads `volumes` only.
"""

import pathlib

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


def define_flags():
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("cases", None, "Case file whose `volumes` are prepared.")
    flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder), instead of --cases.")
    flags.DEFINE_string("mask", None, "Label map on the CT's grid, with --ct.")
    flags.DEFINE_enum(
        "labels", None, sorted(segmentation.LABEL_MAPS), "What numbers --mask holds; default: recognised, or refused."
    )
    flags.DEFINE_list("label", None, "VerSe number of the vertebra, or several, with --ct.")
    flags.DEFINE_string("workdir", None, "Folder for what is prepared.", required=True)
    flags.DEFINE_string("base", None, "Model of P1+P2 to start from; default: the shipped one.")
    flags.DEFINE_float(
        "minutes", None, "Training time per scan, without its data; default: the preset's steps.", lower_bound=0.05
    )
    flags.DEFINE_enum("preset", "demo", sorted(configs.PRESETS), "Configuration.")
    flags.DEFINE_bool(
        "detector", None, "Adapt BASE/detector.npz to each scan, in ten minutes; default: with --ct, where it is there."
    )


def targets():
    """What the flags name, as a list of `workdir.Target`.

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


def generic_detector(chosen, base):
    """Path of the detector to adapt to the scans of the targets `chosen`, or None for none.

    Raises:
      InputError: a file that is not a detector.
    """
    path = pathlib.Path(base) / "detector.npz"
    if flags.FLAGS.detector is not None:
        return path if flags.FLAGS.detector else None
    if flags.FLAGS.cases:
        return None
    why = None if path.exists() else f"{path} is not there"
    if why is None:
        levels = localizer_files.load(path).config.levels
        beyond = sorted({level_name(t.label) for t in chosen if t.label not in levels})
        why = f"{path} does not know {', '.join(beyond)}" if beyond else None
    if why is None:
        return path
    print(f"no vertebra detector is adapted: {why}")
    return None


def main():
    """Prepares what the flags name; raises as `targets`, `generic_detector` and `preparing.prepare`."""
    chosen, base = targets(), flags.FLAGS.base or models.base_folder()
    preparing.prepare(
        configs.PRESETS[flags.FLAGS.preset],
        flags.FLAGS.workdir,
        chosen,
        base,
        flags.FLAGS.minutes,
        detector=generic_detector(chosen, base),
        rule=workdir.read_rule(pathlib.Path(base) / workdir.CALIBRATION),
    )
    print(f"prepared: {flags.FLAGS.workdir}")


def command():
    """Runs the command; what the console script calls."""
    cli.run(main, define_flags)


if __name__ == "__main__":
    command()
