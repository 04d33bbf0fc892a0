"""Writes a CT's vertebra labels in VerSe numbers: `python -m experiments.segment --ct=CT --output=MASK.nii.gz`.

A mask that is given is used, and brought to VerSe numbers; otherwise TotalSegmentator is run, where it is installed.
"""

from absl import flags

from data_pipelines import segmentation
from experiments import cli

CT = flags.DEFINE_string("ct", None, "NIfTI file, or folder of one DICOM series.", required=True)
OUTPUT = flags.DEFINE_string(
    "output", None, "NIfTI file to write; a JSON beside it says how it was made.", required=True
)
MASK = flags.DEFINE_string("mask", None, "Label map to use; default: TotalSegmentator.")
LABELS = flags.DEFINE_enum(
    "labels", None, sorted(segmentation.LABEL_MAPS), "What numbers --mask holds; default: recognised, or refused."
)
FAST = flags.DEFINE_bool("fast", False, "TotalSegmentator's 3 mm model.")
DEVICE = flags.DEFINE_string("device", None, "TotalSegmentator's device, such as cpu.")


def main():
    """Runs `segmentation.segment` on what the flags name, and raises as it does."""
    options = segmentation.Options(FAST.value, DEVICE.value)
    made = segmentation.segment(CT.value, OUTPUT.value, MASK.value, LABELS.value, options)
    print(f"{OUTPUT.value}: labels {made['vertebrae']}")


if __name__ == "__main__":
    cli.run(main)
