"""Writes a CT's vertebra labels in VerSe numbers: `python -m experiments.segment --ct=CT --output=MASK.nii.gz`.

A given mask is converted to VerSe numbers; otherwise TotalSegmentator is run, where it is installed. The function behind this
command is `data_pipelines.ct.segmentation.segment`.
"""

from absl import flags

from data_pipelines.ct import segmentation
from experiments.runtime import cli
from experiments.runtime import input_flags


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("ct", None, "NIfTI file, or folder of one DICOM series.", required=True)
    flags.DEFINE_string("output", None, "NIfTI file to write; a JSON next to it says how it was made.", required=True)
    flags.DEFINE_string("mask", None, "Label map to use; default: TotalSegmentator.")
    input_flags.define_numbering()
    flags.DEFINE_bool("fast", False, "TotalSegmentator's 3 mm model.")
    flags.DEFINE_string("device", None, "TotalSegmentator's device, such as cpu.")


def main() -> None:
    """Runs `segmentation.segment` with the flags, and raises as it does."""
    options = segmentation.SegmentOptions(flags.FLAGS.fast, flags.FLAGS.device)
    made = segmentation.segment(flags.FLAGS.ct, flags.FLAGS.output, flags.FLAGS.mask, flags.FLAGS.labels, options)
    print(f"{flags.FLAGS.output}: labels {made['vertebrae']}")


if __name__ == "__main__":
    cli.run(main, define_flags)
