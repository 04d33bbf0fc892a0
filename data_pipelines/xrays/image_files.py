"""Reads X-ray files to stored numbers: DICOM, PNG, TIFF, JPEG, NPY and NIfTI, each recognised by its content."""

import pathlib

import numpy as np

from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.xrays import dicom_images
from data_pipelines.xrays import dicom_pixels
from data_pipelines.xrays import picture_files
from data_pipelines.xrays import stored_images
from data_pipelines.xrays.stored_images import MAX_PIXELS
from data_pipelines.xrays.stored_images import Stored
from radgs_jax import errors

MAX_FILE_BYTES = 2**31
"""Bytes of a file that may be read whole: PNG, TIFF, JPEG and NIfTI. Chosen by hand: a bound like MAX_PIXELS."""
MAPPED_BYTES = 2**26
"""Bytes above which an NPY file is mapped, so that one frame of a long run is read, and not the run. Chosen by hand: half or twice
only moves where the faster way of small files ends."""
DISPLAY_BITS = 8
"""Bits of pictures that are made for display as a rule, and are read only where the caller says that they hold measured numbers."""


def is_dicom(path: pathlib.Path | str) -> bool:
    """Whether a file is DICOM by its first bytes, with or without the preamble. False if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return dicom_pixels.looks_like_dicom(stream.read(dicom_pixels.HEAD_BYTES))
    except OSError:
        return False


def load_stored(path: pathlib.Path | str, frame: int | None = None, bits: int | None = None) -> Stored:
    """Reads an X-ray file, or one frame of it.

    The format is recognised by the first bytes, except that of NIfTI, which is recognised by the name.

    Args:
      path: the file.
      frame: number of the frame, from 0, or None for the only one.
      bits: bits of a stored number, as the caller says; 8 is required for pictures of 8 bits in other files than DICOM.

    Raises:
      InputError: the file is damaged or not an X-ray, one of several frames was not chosen, or a picture has 8 bits and the
        caller does not say so.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(dicom_pixels.HEAD_BYTES)
    except OSError as error:
        errors.fail(path, "file", error.strerror or error, "a readable file")
    if dicom_pixels.looks_like_dicom(head):
        return dicom_images.load_dicom(path, frame)
    if head.startswith(b"\x93NUMPY"):
        kept = _npy_frame(path, frame, size, bits)
    elif size > MAX_FILE_BYTES:
        errors.fail(path, "size", f"{size} bytes", f"{MAX_FILE_BYTES} at most")
    elif head.startswith(picture_files.FIRST_BYTES):
        kept = picture_files.read_picture(path, MAX_PIXELS, frame, bits == DISPLAY_BITS)
    elif path.name.lower().endswith((".nii", ".nii.gz")):
        stored_images.frame_number(path, frame, 1)
        # A calibration refers to pixels as stored, with the first axis along u.
        kept = nifti.read_nifti_image(path, MAX_PIXELS).T
    else:
        errors.fail(path, "content", f"{head[:8]!r}", "DICOM, PNG, TIFF, JPEG, NPY or NIfTI (.nii, .nii.gz)")
    stored_images.check_pixels(path, kept)
    if kept.dtype.itemsize == 1:
        check_eight_bits(path, f"pixels of {kept.dtype}", bits)
    return Stored(kept)


def check_eight_bits(path: pathlib.Path | str, found: str, bits: int | None) -> None:
    """Refuses a picture of 8 bits unless the caller says `bits` 8. `path` and `found` are named in errors.

    Raises:
      InputError: `bits` is not 8.
    """
    if bits != DISPLAY_BITS:
        picture_files.refuse_display(path, found if bits is None else f"{found} with --bits={bits}")


def _npy_frame(path, frame, size, bits):
    if size <= MAPPED_BYTES:
        return np.ascontiguousarray(_frame_of(path, files.read_npy(path), frame, bits))
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises ValueError, EOFError, SyntaxError and others on damaged headers
        errors.fail(path, "content", f"{type(error).__name__}: {error}"[:200], "a complete npy file of numbers")
    if mapped.dtype.kind not in "iuf" or mapped.offset + mapped.nbytes != size:
        found = f"{mapped.shape} of {mapped.dtype} in {size} bytes"
        errors.fail(path, "array: shape", found, "numbers of the size that the header declares")
    chosen = _frame_of(path, mapped, frame, bits)
    stored_images.check_pixels(path, chosen[:2, :2]) if chosen.ndim != 2 or chosen.size > MAX_PIXELS else None
    return np.array(chosen)


def _frame_of(path, array, frame, bits):
    """One frame (H, W) of an array (H, W), (N, H, W), (H, W, 1), or (H, W, 3 or 4) of equal channels of 8 bits."""
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        stored_images.frame_number(path, frame, 1)
        return array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim == 3 and array.shape[2] > 4:
        return array[stored_images.frame_number(path, frame, len(array))]
    if array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8 and bits == DISPLAY_BITS:
        stored_images.frame_number(path, frame, 1)
        return picture_files.grey(path, array)
    if array.ndim == 2:
        stored_images.frame_number(path, frame, 1)
    return array
