"""Prepares patients: `python -m experiments.prepare --cases=C.json --workdir=W`, or `--ct --mask --label`.

Trains data stage P3 on each patient's CT, from the base model, and adapts the vertebra detector that lies beside it, with
which `register` finds its own start pose. Of a case file it reads `volumes` only.
"""

import pathlib

from absl import flags

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import scan as scans
from data_pipelines import segmentation
from experiments import cli
from experiments import configs
from experiments import detectors
from experiments import patients

CASES = flags.DEFINE_string("cases", None, "Case file whose `volumes` are prepared.")
CT = flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder), instead of --cases.")
MASK = flags.DEFINE_string("mask", None, "Label map on the CT's grid, with --ct.")
LABELS = flags.DEFINE_enum(
    "labels", None, sorted(segmentation.LABEL_MAPS), "What numbers --mask holds; default: recognised, or refused."
)
LABEL = flags.DEFINE_list("label", None, "VerSe number of the vertebra, or several, with --ct.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for what is prepared.", required=True)
BASE = flags.DEFINE_string("base", str(cli.REPOSITORY / "base"), "Model of P1+P2 to start from.")
MINUTES = flags.DEFINE_float(
    "minutes", None, "Training time per scan, without its data; default: the preset's steps.", lower_bound=0.05
)
PRESET = flags.DEFINE_enum("preset", "demo", sorted(configs.PRESETS), "Configuration.")
DETECTOR = flags.DEFINE_bool(
    "detector", None, "Adapt BASE/detector.npz to each scan, in ten minutes; default: with --ct, where it is there."
)


def targets():
    """What the flags name, as a list of `patients.Target`.

    Raises:
      InputError: flags that do not go together, labels that are not numbers, or an unreadable case file.
    """
    if CASES.value:
        if CT.value or MASK.value or LABEL.value or LABELS.value:
            files.fail("flags", "--cases", "also --ct, --mask, --label or --labels", "either a case file or one scan")
        return [
            patients.Target(v.patient, v.full_ct, v.full_mask, v.full_label)
            for v in cases.read(CASES.value).volumes.values()
        ]
    if not (CT.value and MASK.value and LABEL.value):
        files.fail("flags", "input", "neither --cases nor all of --ct, --mask, --label", "one of the two")
    return [
        patients.Target(
            pathlib.Path(CT.value).name, pathlib.Path(CT.value), pathlib.Path(MASK.value), number, LABELS.value
        )
        for number in cli.label_numbers(LABEL.value)
    ]


def generic_detector(chosen):
    """Path of the detector to adapt to the scans of the targets `chosen`, or None for none.

    Raises:
      InputError: a file that is not a detector.
    """
    path = pathlib.Path(BASE.value) / "detector.npz"
    if DETECTOR.value is not None:
        return path if DETECTOR.value else None
    if CASES.value:
        return None
    why = None if path.exists() else f"{path} is not there"
    if why is None:
        levels = detectors.load(path).config.levels
        beyond = sorted({scans.level_name(t.label) for t in chosen if t.label not in levels})
        why = f"{path} does not know {', '.join(beyond)}" if beyond else None
    if why is None:
        return path
    print(f"no vertebra detector is adapted: {why}")
    return None


def main():
    """Prepares what the flags name; raises as `targets`, `generic_detector` and `patients.prepare`."""
    chosen = targets()
    patients.prepare(
        configs.PRESETS[PRESET.value],
        WORKDIR.value,
        chosen,
        BASE.value,
        MINUTES.value,
        detector=generic_detector(chosen),
        calibration=patients.read_calibration(pathlib.Path(BASE.value) / patients.CALIBRATION),
    )
    print(f"prepared: {WORKDIR.value}")


if __name__ == "__main__":
    cli.run(main)
