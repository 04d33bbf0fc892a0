"""Flags that several commands share: a scan with its label map, and X-rays with their cameras."""

import functools
import pathlib
from typing import TYPE_CHECKING

from absl import flags

from data_pipelines.ct import numbering
from experiments.runtime import cli
from radgs_jax import errors

if TYPE_CHECKING:
    from experiments.patients.workdir import Target

ALL = "all"
"""Value of --label that means every whole vertebra."""

# `--help` of a command lists these flags as its own.
flags.disclaim_key_flags()


def define_numbering() -> None:
    """Defines --labels, which says what the numbers of a label map mean."""
    flags.DEFINE_string(
        "labels", None, f"Numbering of the label map --mask: {numbering.GRAMMAR}; default: recognised, or refused."
    )
    flags.register_validator("labels", lambda text: text is None or bool(numbering.parse_labels(text)))


@functools.cache
def _complete(mask, label_map):
    """Read once, since several parts of a command ask for the targets."""
    from data_pipelines.ct import segmentation  # here, so that --help need not wait for it

    return segmentation.whole_vertebrae(mask, label_map)


def define_scan(of: str = "instead of --cases") -> None:
    """Defines --ct, --mask, --labels, --label and --bone: a scan and its bones; of: what it is, for --help."""
    flags.DEFINE_string("ct", None, f"CT (NIfTI file or DICOM folder), {of}.")
    flags.DEFINE_string("mask", None, "Label map on the CT's grid, or TotalSegmentator's folder of masks, with --ct.")
    define_numbering()
    flags.DEFINE_list("label", None, "Name (L1) or VerSe number (20) of the vertebra, several, or `all`; with --ct.")
    flags.DEFINE_list("bone", None, "Instead of --label, a bone beyond the spine: its value in the mask, or several.")


def targets() -> "list[Target]":
    """The vertebrae or bones that --ct, --mask and the other flags of `define_scan` name.

    Raises:
      InputError: a flag is missing, or they do not go together.
    """
    from experiments.patients.workdir import Target  # here, so that --help need not wait for jax

    given = flags.FLAGS
    for name in ("ct", "mask"):
        if not getattr(given, name):
            errors.fail("flags", f"--{name}", "nothing", "a file")
    if bool(given.label) == bool(given.bone):
        errors.fail("flags", "--label, --bone", "both" if given.bone else "neither", "one of the two")
    if given.bone and given.labels:
        errors.fail("flags", "--labels", f"{given.labels!r} with --bone", "no numbering: --bone is a value of the mask")
    ct, mask = pathlib.Path(given.ct), pathlib.Path(given.mask)
    label_map = numbering.BONES if given.bone else given.labels
    if given.bone:
        labels = cli.bone_labels(given.bone)
    else:
        labels = _complete(mask, label_map) if given.label == [ALL] else cli.label_numbers(given.label)
    return [Target(ct.name, ct, mask, label, label_map) for label in labels]


def define_xrays(used_with: str) -> None:
    """Defines --xrays and --cameras; used_with: the flag that they go with, for --help."""
    flags.DEFINE_list("xrays", None, f"One DICOM, PNG, TIFF, NPY or NIfTI image per view, with {used_with}.")
    flags.DEFINE_string(
        "cameras",
        None,
        'JSON list with {"P": 3x4} or {"K": 3x3, "E": 4x4} per view; default: DICOM\'s nominal geometry.',
    )
