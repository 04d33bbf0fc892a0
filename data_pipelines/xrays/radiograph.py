"""Reads a measured X-ray from a hospital's or laboratory's file: line integrals, valid pixels and the camera.

Formats: DICOM (XA, RF, DX, CR), PNG and TIFF of 16 bits or more, NPY and NIfTI; pictures of 8 bits (also JPEG) only where the
caller says so. The meaning of the stored numbers is taken from DICOM tags or from the caller, never guessed. Display settings
(window, presentation LUT, MONOCHROME1) are ignored.

Images are (height, width), with u the column, v the row, and integers at pixel centres, as in the case format.
"""

import collections.abc
import dataclasses
import pathlib

import numpy as np

from data_pipelines.xrays import collimator
from data_pipelines.xrays import image_files
from data_pipelines.xrays import read_options
from data_pipelines.xrays import remarks
from data_pipelines.xrays import same_acquisition
from data_pipelines.xrays import shutters
from data_pipelines.xrays import stored_images
from data_pipelines.xrays import view_geometry
from data_pipelines.xrays.read_options import BITS_RANGE as BITS_RANGE
from data_pipelines.xrays.read_options import ReadOptions as ReadOptions
from data_pipelines.xrays.read_options import VALUES as VALUES
from radgs_jax import errors
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import view_checks

LINE_INTEGRAL_RANGE = (-1.0, 12.0)
"""Line integrals are clamped to this range: ln(2^16) is 11.1, and a wrong air value rarely gives less than -1. Chosen by hand:
half of 12 would clamp dense laterals, twice changes nothing."""
AIR_QUANTILE = 0.995
"""Quantile of the pixels inside the collimator that is taken as the air value if none is given. It is air only if the field shows
air. Chosen by hand: a lower one needs more air in the field, and one nearer to 1 follows noise and hot pixels."""
TYPICAL_LINE_INTEGRALS = (-5, 20)
"""The median of line integrals must be inside this range. Chosen by hand to catch intensities and wrong signs; not sensitive."""
MIN_VALID = 0.01
"""Smallest fraction of valid pixels of an X-ray. Chosen by hand to catch wrong options; not sensitive."""
FEW_VALID = 0.25
"""Fraction of valid pixels below which an X-ray is remarked on. Chosen by hand: half misses X-rays that are mostly saturated, twice
remarks on usual collimators."""
MIN_FULL_SCALE = 1023
"""Smallest largest number, 2^10 - 1, that is taken as a saturated full scale where the bits are unknown. Chosen by hand: half would
also take 9-bit maxima, twice would miss saturation of 10-bit panels."""


@dataclasses.dataclass(frozen=True)
class Radiograph(XRay):
    """A measured X-ray, as its source sees it.

    Attributes:
      line_integrals: (H, W) float32, finite everywhere.
      valid: (H, W) bool, True inside the collimator where a pixel has signal and is not saturated.
      camera: None if neither a calibration nor the file's tags give one.
      pixel_mm: (u, v) pixel pitch on the panel, or None.
      source_detector_mm, source_isocentre_mm: distances from the file's tags, or None.
      file_from_image: (3, 3) from homogeneous pixels (u, v, 1) of this image to those of the file.
      origin: how each of these was found, as plain values for a log or JSON.
    """

    camera: Camera | None
    pixel_mm: tuple[float, float] | None
    source_detector_mm: float | None
    source_isocentre_mm: float | None
    file_from_image: np.ndarray
    origin: dict

    def __post_init__(self):
        # `XRay` compares shapes with the camera's, so it needs one.
        if self.camera is not None:
            super().__post_init__()


def read(
    path: pathlib.Path | str,
    calibration: pathlib.Path | str | None = None,
    options: ReadOptions | None = None,
) -> Radiograph:
    """Reads one X-ray.

    A line integral is -ln((I - dark) / (air - dark)), or with a flat field -ln((I - dark) / (flat - dark) / air). Pixels
    without signal are clamped to LINE_INTEGRAL_RANGE and not valid. An inverted intensity is I = 2**bits - 1 - stored.

    Args:
      path: the file. Its format is recognised by its content (NIfTI: by its name).
      calibration: a file for `view_geometry.read_calibration`, in pixels of the X-ray's file. It replaces DICOM's geometry
        tags, which give the machine's nominal geometry, accurate to some millimetres and degrees.
      options: what the file does not say.

    Raises:
      InputError: the file is damaged or unsuitable (colours, 8 bits except in DICOM, one of several frames not chosen), the
        meaning of its numbers is unknown, a field or calibration does not fit, or the number that means no X-rays cannot be
        derived for inverted intensities (unknown bits, signed numbers, or a rescaling with an offset).
    """
    options = options or ReadOptions()
    read_options.check(path, options)
    return _measured(path, image_files.load_stored(path, options.frame, options.bits), calibration, options)


def _measured(path, stored, calibration, options):
    values, sign = options.values or stored.values, options.sign or stored.sign or 1
    read_options.check_meaning(path, options, values)
    if options.bits is not None:
        stored = dataclasses.replace(stored, bits=options.bits, signed=False)
        stored_images.check_range(path, read_options.named("bits"), stored)

    usable = np.isfinite(stored.pixels)
    if stored.padding is not None:
        usable &= ~stored.padding
    saturation = None if values == "line_integrals" else _saturation(stored, sign, options)
    if saturation is not None:
        # At the end of the range with most X-rays, the panel no longer shows their number.
        usable &= stored.pixels < saturation if sign > 0 else stored.pixels > saturation
    numbers = _numbers(path, stored, values, sign)
    references = {name: _reference(name, options, stored, values, sign) for name in ("flat", "dark")}

    grows = _grows(path, stored, values, sign)
    signal = _signal(numbers, values, grows, options, references["dark"])
    usable &= signal > 0
    field, found = _field(path, stored, values, numbers, signal, usable, options)
    line, air = _line_integrals(path, numbers, signal, values, grows, options, references, usable, field)
    low, high = LINE_INTEGRAL_RANGE
    usable &= np.isfinite(line)
    line = np.clip(np.nan_to_num(line, nan=high, posinf=high, neginf=low), low, high).astype(np.float32)
    line[~(signal > 0)] = high
    valid = usable & field
    if valid.mean() < MIN_VALID:
        errors.fail(path, "pixels", f"{int(valid.sum())} usable of {valid.size}", "one in a hundred or more")
    if valid.mean() < FEW_VALID:
        found_share = f"{valid.mean():.1%} usable: inside the collimator ({found}), with signal and not saturated"
        remarks.remark(path, "pixels", found_share, "only these count")
    view_checks.refuse_noise(line, valid, path, "pixels")

    camera, moves, said = view_geometry.find_camera(path, stored, calibration, options.view, options.mirrored)
    line, valid = (np.ascontiguousarray(view_geometry.apply_moves(image, moves)) for image in (line, valid))
    pixel_mm = stored.geometry.pixel_mm
    if moves[0] and pixel_mm is not None:
        pixel_mm = pixel_mm[::-1]
    origin = {
        "file": str(path),
        "values": values,
        "values_from": "option" if options.values else "DICOM tags",
        "sign": sign,
        "bits": stored.bits,
        **air,
        "saturation": None if saturation is None else float(saturation),
        "collimator": found,
        "valid_share": float(valid.mean()),
        "camera": said,
        "frame": options.frame,
    }
    return Radiograph(
        line,
        valid,
        camera,
        pixel_mm,
        stored.geometry.source_detector_mm,
        stored.geometry.source_isocentre_mm,
        view_geometry.file_from_image(stored.pixels.shape, moves),
        origin,
    )


def read_stored(path: pathlib.Path | str, frame: int | None = None, bits: int | None = None) -> np.ndarray:
    """The numbers (height, width) in an X-ray's file as stored: not rescaled, inverted or turned.

    Args:
      path: the file.
      frame: number of the frame in a file with several, from 0.
      bits: 8 for a picture of 8 bits.

    Raises:
      InputError: the file is damaged or unsuitable, as for `read`.
    """
    return image_files.load_stored(path, frame, bits).pixels


def read_views(
    paths: collections.abc.Sequence[pathlib.Path | str],
    calibration: pathlib.Path | str | None = None,
    options: ReadOptions | None = None,
    flats: collections.abc.Sequence[pathlib.Path | str] | None = None,
    darks: collections.abc.Sequence[pathlib.Path | str] | None = None,
    frames: collections.abc.Sequence[int | None] | None = None,
) -> list[Radiograph]:
    """The X-rays of one acquisition, each with its camera.

    Files other than DICOM hold line integrals unless `options.values` is set. What contradicts one acquisition is refused, and
    what makes it doubtful is remarked on: `same_acquisition`.

    Args:
      paths: one file per view.
      calibration: a JSON file with one entry per view, or None for DICOM's nominal geometry.
      options: options of all views.
      flats, darks: one flat field and one dark image per view, or one for all, in place of those of `options`.
      frames: one frame number per view, or one for all, in place of that of `options`.

    Raises:
      InputError: as `read`; or the number of cameras, references or frames is not that of X-rays; two X-rays are the same
        image, of different patients or from one camera; a view has no camera.
    """
    options = options or ReadOptions()
    if calibration is not None:
        view_geometry.check_count(calibration, len(paths))
    own = []
    for index, path in enumerate(paths):
        flat, dark, frame = (
            getattr(options, name) if given is None else _for_view(path, name, given, index, len(paths))
            for name, given in (("flat", flats), ("dark", darks), ("frame", frames))
        )
        values = assumed_values(path, options)
        own.append(dataclasses.replace(options, values=values, flat=flat, dark=dark, frame=frame, view=index))
        read_options.check(path, own[-1])
    stored = [image_files.load_stored(path, each.frame, each.bits) for path, each in zip(paths, own)]
    same_acquisition.compare(paths, stored, calibration is not None)
    views = []
    for path, numbers, each in zip(paths, stored, own):
        views.append(_measured(path, numbers, calibration, each))
        if views[-1].camera is None:
            errors.fail(path, "camera", views[-1].origin["camera"], "geometry tags, or a calibration: --cameras")
    source = calibration if calibration is not None else "geometry tags"
    same_acquisition.compare_cameras(paths, [view.camera for view in views], source)
    return views


def assumed_values(path: pathlib.Path | str, options: ReadOptions) -> str | None:
    """What an X-ray's numbers are where the options do not say it: line integrals, or None in DICOM, whose tags say it."""
    return options.values or (None if image_files.is_dicom(path) else "line_integrals")


def _for_view(path, name, given, index, count):
    """The value of an option that has one for each view, or one for all."""
    if len(given) not in (1, count):
        errors.fail(
            path, read_options.named(name), f"{len(given)} values", f"one for each of {count} X-rays, or one for all"
        )
    return given[index if len(given) > 1 else 0]


def _saturation(stored, sign, options):
    """Stored number of a saturated pixel, or None if unknown."""
    if options.saturation is not None:
        return options.saturation
    if stored.bits is not None:
        return stored_images.stored_range(stored.bits, stored.signed)[sign > 0]
    if stored.pixels.dtype.kind == "f":
        return None
    if sign < 0:
        return 0 if stored.pixels.min() >= 0 else None
    # An image whose largest number is below the full scale is not saturated, whatever its number of bits.
    largest = int(stored.pixels.max())
    return largest if largest >= MIN_FULL_SCALE and largest & (largest + 1) == 0 else None


def _grows(path, stored, values, sign):
    """1 if rescaled numbers grow with the X-rays, else -1; `sign` is the same for stored numbers (PS3.3 C.8.11.3.1.2)."""
    if stored.rescale is None or values == "line_integrals":
        return sign
    if stored.rescale.rises == 0:
        errors.fail(path, *stored.rescale.shown, "a table that rises or falls from its first entry to its last")
    return sign * stored.rescale.rises


def _numbers(path, stored, values, sign):
    """Pixels as float32 on their physical scale: rescaled as the file says, and with inverted intensities made upright.

    The sign in the tags is about stored numbers, so these are inverted, within their bits, before the file's rescaling. A
    rescaling with a negative slope inverts them itself; then its 0 is no X-rays.
    """
    pixels, rescale = stored.pixels, stored.rescale
    if values == "intensity" and _grows(path, stored, values, sign) < 0:
        if stored.bits is None:
            wanted = f"{read_options.named('bits', 'N')}, how many a stored number has: 2**N - 1 is no X-rays"
            errors.fail(path, "bits", "nothing, with inverted intensities (sign -1)", wanted)
        if rescale is not None and not rescale.factor:
            wanted = "a rescaling that rises, or sign -1" if sign > 0 else "one that falls, or a positive factor alone"
            name, found = rescale.shown
            errors.fail(path, name, f"{found} with sign {sign:+d}", f"{wanted}: it says not which number is no X-rays")
        if stored.signed:
            wanted = "0: of signed numbers nothing says which is no X-rays"
            errors.fail(path, "PixelRepresentation", "1 with inverted intensities (sign -1)", wanted)
        stored_images.check_range(path, "bits", stored)
        pixels = np.subtract(stored_images.stored_range(stored.bits, False)[1], pixels, dtype=np.float64)
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and does not count
        return (rescale.apply(pixels) if rescale else pixels).astype(np.float32)


def _reference(name, options, stored, values, sign):
    source = getattr(options, name)
    if source is None:
        return None
    other = _load_reference(source, options)
    if other.pixels.shape != stored.pixels.shape:
        errors.fail(source, f"{name}: shape", other.pixels.shape, f"the X-ray's {stored.pixels.shape}")
    if values == "intensity" and sign < 0 and options.bits is None and other.bits not in (None, stored.bits):
        errors.fail(source, f"{name}: BitsStored", other.bits, f"the X-ray's {stored.bits}, with sign -1")
    other = dataclasses.replace(other, bits=stored.bits, signed=stored.signed)
    numbers = _numbers(source, other, values, sign)
    if not np.isfinite(numbers).all():
        errors.fail(source, name, "pixels that are not finite", "finite numbers")
    return numbers


def _load_reference(source, options):
    try:
        return image_files.load_stored(source, None, options.bits)
    except errors.InputError:
        # One of several frames is that of the X-ray's number. What else is wrong is wrong again.
        return image_files.load_stored(source, options.frame or 0, options.bits)


def _signal(numbers, values, grows, options, dark):
    """A number that grows with the X-rays and is positive if there are any, to find borders and dead pixels."""
    if values == "intensity":
        return numbers if dark is None else numbers - dark
    # A logarithm has an unknown offset, so the signal is scaled to be about 1 in the brightest pixels.
    log = -numbers if values == "line_integrals" else grows * numbers / options.log_scale
    finite = log[np.isfinite(log)]
    reference = np.quantile(finite[:: max(1, finite.size // 100_000)], AIR_QUANTILE)
    return np.exp(np.clip(np.nan_to_num(log - reference, nan=-60.0), -60.0, 60.0))


def _field(path, stored, values, numbers, signal, usable, options):
    """The exposed field, (H, W) bool, and how it was found."""
    if stored.field is not None:
        shutters.compare(path, stored.field, signal)
        return stored.field, "DICOM tags"
    if not options.collimator:
        return np.ones(signal.shape, bool), "not looked for"
    if values == "line_integrals":
        border = collimator.find_in_line_integrals(np.where(usable | np.isfinite(numbers), numbers, np.inf))
    else:
        border = collimator.find(np.where(usable | (signal > 0), signal, 0.0))
    return collimator.without_penumbra(border), f"{border.kind} found"


def _line_integrals(path, numbers, signal, values, grows, options, references, usable, field):
    """Line integrals before clamping, and the air value with its source."""
    if values == "line_integrals":
        typical = np.median(numbers[usable]) if usable.any() else np.nan
        if not TYPICAL_LINE_INTEGRALS[0] < typical < TYPICAL_LINE_INTEGRALS[1]:
            errors.fail(path, "pixels", f"a median of {typical:.6g}", "line integrals -ln(I / I0), between -5 and 20")
        return numbers, {"air": None, "air_from": "in the line integrals"}
    seen = field & (signal > 0)
    if not seen.any():
        errors.fail(path, "pixels", "none with signal", "an X-ray")
    flat, dark = references["flat"], references["dark"]
    if values == "log":
        scale = grows * options.log_scale
        air, source = options.air, "option"
        if flat is not None:
            air, source = (0.0, "flat") if air is None else (scale * np.log(air), "flat and option")
            return (flat + air - numbers) / scale, {"air": float(np.exp(air / scale)), "air_from": source}
        if air is None:
            # If larger numbers are fewer X-rays, the bright end is the low one.
            air = np.quantile(numbers[seen], AIR_QUANTILE if grows > 0 else 1 - AIR_QUANTILE)
            source = f"{AIR_QUANTILE:g} quantile inside the collimator"
        return (air - numbers) / scale, {"air": float(air), "air_from": source}
    if flat is not None:
        beam = flat if dark is None else flat - dark
        usable &= beam > 0
        signal = signal / np.where(beam > 0, beam, np.inf)
        air, source = (1.0, "flat") if options.air is None else (options.air, "flat and option")
        reference = air
    elif options.air is not None:
        air, source = options.air, "option"
        reference = air if dark is None else air - dark
        if np.min(reference) <= 0:
            errors.fail(path, read_options.named("air"), air, "more than the dark image")
    else:
        air = reference = float(np.quantile(signal[seen], AIR_QUANTILE))
        source = f"{AIR_QUANTILE:g} quantile inside the collimator"
    with np.errstate(divide="ignore", invalid="ignore"):
        line = -np.log(np.maximum(signal, 0) / reference)
    return line, {"air": float(air), "air_from": source}
