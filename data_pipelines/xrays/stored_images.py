"""The numbers in an X-ray's file, as stored, and what the file says about them."""

import collections.abc
import dataclasses
import pathlib
import typing

import numpy as np

from data_pipelines.xrays import read_options
from radgs_jax import errors

MAX_PIXELS = 2**25
"""Pixels of an image (5792 x 5792 is the largest square): a bound on the memory that a damaged header can claim. Chosen by hand:
half refuses some stitched images, twice doubles that memory."""
MIN_SIDE_PX = 8
"""Smallest height and width of an image in pixels. Chosen by hand to catch wrong axes; not sensitive."""


@dataclasses.dataclass(frozen=True)
class Rescale:
    """DICOM's modality transform.

    Attributes:
      apply: function from stored to rescaled numbers.
      rises: 1 if rescaled numbers grow with the stored ones, -1 if they fall, 0 if neither.
      factor: True if it only multiplies by a positive number.
      shown: name and value, for errors.
    """

    apply: collections.abc.Callable[[np.ndarray], np.ndarray]
    rises: int
    factor: bool
    shown: tuple[str, object]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a file says about the X-ray's geometry. An attribute is None if the file does not say, or says it with a placeholder.

    Attributes:
      pixel_mm: (u, v) pixel pitch on the panel.
      aspect: height over width of a pixel.
      source_detector_mm, source_isocentre_mm: distances from the source.
      angles_deg: DICOM's primary and secondary positioner angle.
      orientation: DICOM's PatientOrientation, directions along u and along v.
      turned: the file says that its field of view was rotated or flipped.
      problems: errors of tags that cannot be true. They matter only where no calibration replaces the tags.
    """

    pixel_mm: tuple[float, float] | None = None
    aspect: float | None = None
    source_detector_mm: float | None = None
    source_isocentre_mm: float | None = None
    angles_deg: tuple[float, float] | None = None
    orientation: tuple[str, str] | None = None
    turned: bool = False
    problems: tuple[errors.InputError, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stored:
    """Pixels as stored, and what the file says about them. An attribute is None if the file does not say.

    Attributes:
      pixels: (H, W) numbers.
      bits, signed: number of bits of a stored number, and whether it is signed.
      values, sign: as in `read_options.ReadOptions`.
      padding: (H, W) bool, True where pixels are padding.
      field: (H, W) bool, True inside the collimator.
      rescale: the modality transform.
      geometry: what the file says about it.
      facts: patient, study, time and table of a DICOM file, by keyword, to compare X-rays of one acquisition. Never to be shown.
    """

    pixels: np.ndarray
    bits: int | None = None
    signed: bool = False
    values: str | None = None
    sign: int | None = None
    padding: np.ndarray | None = None
    field: np.ndarray | None = None
    rescale: Rescale | None = None
    geometry: Geometry = Geometry()
    facts: collections.abc.Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)


def check_pixels(path: pathlib.Path | str, pixels: np.ndarray) -> None:
    """Checks that an array can be an X-ray. `path` is named in errors.

    Raises:
      InputError: it is not two-dimensional, too small or too large, not of real numbers, or one value everywhere.
    """
    if pixels.ndim != 2 or min(pixels.shape) < MIN_SIDE_PX or pixels.size > MAX_PIXELS:
        errors.fail(
            path, "shape", pixels.shape, f"(height, width), each {MIN_SIDE_PX} or more, {MAX_PIXELS} pixels at most"
        )
    if pixels.dtype.kind not in "iuf":
        errors.fail(path, "pixel type", pixels.dtype, "real numbers")
    finite = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels
    if finite.size == 0 or finite.min() == finite.max():
        errors.fail(path, "pixels", "one value everywhere" if finite.size else "no finite value", "an image")


def stored_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest number of `bits` bits."""
    half = 2 ** (bits - 1)
    return (-half, half - 1) if signed else (0, 2 * half - 1)


def check_range(path: pathlib.Path | str, field: str, stored: Stored) -> None:
    """Checks that pixels outside the padding fit into the stated bits. `path` and `field` are named in errors.

    Raises:
      InputError: a pixel does not.
    """
    assert stored.bits is not None
    low, high = stored_range(stored.bits, stored.signed)
    real = np.isfinite(stored.pixels) if stored.padding is None else ~stored.padding
    real = stored.pixels[real]
    if real.size and (real.min() < low or real.max() > high):
        errors.fail(path, field, f"{stored.bits} with pixels from {real.min()} to {real.max()}", f"{low} to {high}")


def frame_number(path: pathlib.Path | str, frame: int | None, count: int) -> int:
    """The number of the frame to read, from 0, in a file with `count`; `frame` is what the caller asked for.

    Raises:
      InputError: there are several and none was asked for, or there is none with that number.
    """
    if count == 1 and frame is None:
        return 0
    if frame is None or not 0 <= frame < count:
        found = "nothing" if frame is None else f"--frame={frame}"
        wanted = f"--frame=0 to {read_options.named('frame', count - 1)}: there are {count}"
        if count == 1:
            wanted = "--frame=0, or none: there is 1; several X-rays take a number each, such as --frame=3,0"
        errors.fail(path, read_options.named("frame"), found, wanted)
    return frame
