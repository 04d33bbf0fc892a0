"""Reads a measured X-ray from a hospital's or laboratory's file: line integrals, valid pixels and the camera.

Formats: DICOM (XA, RF, DX, CR), PNG and TIFF of 16 bits or more, NPY and NIfTI. The meaning of the stored numbers is taken
from DICOM tags or from the caller, never guessed. Display settings (window, presentation LUT, MONOCHROME1) are ignored.

Images are (height, width), with u the column, v the row, and integers at pixel centres, as in the case format.
"""

import collections.abc
import dataclasses
import pathlib

import numpy as np
import scipy

from data_pipelines.io import files
from data_pipelines.xrays import collimator
from data_pipelines.xrays import stored_images
from data_pipelines.xrays import view_geometry
from radgs_jax import errors
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay

VALUES = ("line_integrals", "intensity", "log")
BITS_RANGE = (6, 32)
"""Fewest and most bits of a stored number: DICOM's tag BitsStored is 6 or more, and no supported file has more than 32."""
LINE_INTEGRAL_RANGE = (-1.0, 12.0)
"""Line integrals are clamped to this range: ln(2^16) is 11.1, and a wrong air value rarely gives less than -1. Chosen by hand:
half of 12 would clamp dense laterals, twice changes nothing."""
AIR_QUANTILE = 0.995
"""Quantile of the pixels inside the collimator that is taken as the air value if none is given. It is air only if the field shows
air. Chosen by hand: a lower one needs more air in the field, and one nearer to 1 follows noise and hot pixels."""
PENUMBRA_PX = 2
"""Width in pixels along the collimator's border that is not valid, since its shadow is not sharp. Chosen by hand: half may keep
shadow, twice loses image."""
TYPICAL_LINE_INTEGRALS = (-5, 20)
"""The median of line integrals must be inside this range. Chosen by hand to catch intensities and wrong signs; not sensitive."""
MIN_VALID = 0.01
"""Smallest fraction of valid pixels of an X-ray. Chosen by hand to catch wrong options; not sensitive."""
MIN_FULL_SCALE = 1023
"""Smallest largest number, 2^10 - 1, that is taken as a saturated full scale where the bits are unknown. Chosen by hand: half would
also take 9-bit maxima, twice would miss saturation of 10-bit panels."""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What the caller knows about an X-ray and its file may not say.

    Attributes:
      values: meaning of the stored numbers. 'line_integrals': -ln(I / I0). 'intensity': proportional to the X-rays that
        arrived, plus `dark`. 'log': log_scale * ln(I) + constant. None: from DICOM tags.
      sign: +1 if more X-rays give larger stored numbers, -1 if smaller. None: from the DICOM tag, else +1.
      bits: number of bits of a stored number, which is from 0 to 2**bits - 1. None: DICOM's BitsStored. Inverted intensities
        (sign -1) are counted from 2**bits - 1, so it is required for them in other files: neither the image's largest number
        nor its data type shows how many bits the panel has.
      log_scale: stored units per unit of ln(I), with values='log', on the scale of `air`.
      air: number of the unattenuated beam, after the file's own rescaling, and after inversion if intensity is inverted (so
        that 0 is no X-rays). With `flat`, the ratio of this exposure to that of the flat field. None: 1 with `flat`, else
        AIR_QUANTILE of the pixels inside the collimator.
      flat, dark: files of the same size as the X-ray: the beam without a patient, and the panel without a beam.
      saturation: stored number of a saturated pixel. Larger numbers (with sign -1: smaller ones) are saturated as well. None:
        the end of the range of `bits` with most X-rays; for integers without `bits`, 0 with sign -1, else the image's largest
        number if it is 2**n - 1 with n at least 10, else none.
      frame: number of the frame in a file with several, from 0.
      collimator: search for a border if the file gives none.
      mirrored: the file shows the mirror image of the source's view. Image and calibration are mirrored together.
      view: number or name of the entry in a calibration with several.
    """

    values: str | None = None
    sign: int | None = None
    bits: int | None = None
    log_scale: float | None = None
    air: float | None = None
    flat: pathlib.Path | str | None = None
    dark: pathlib.Path | str | None = None
    saturation: float | None = None
    frame: int | None = None
    collimator: bool = True
    mirrored: bool = False
    view: int | str | None = None


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
    _check_options(path, options)
    stored = stored_images.load_stored(path, options.frame)
    values, sign = options.values or stored.values, options.sign or stored.sign or 1
    if values is None:
        errors.fail(path, "values", "nothing that says what the pixels mean", f"option values= one of {VALUES}")
    if values == "log" and options.log_scale is None:
        errors.fail(path, "log_scale", "nothing", "stored units per unit of ln(I), with values='log'")
    if values != "intensity" and options.dark is not None:
        errors.fail(path, "dark", f"a dark image with values='{values}'", "one with values='intensity' only")
    if values == "line_integrals" and (options.flat is not None or options.air is not None):
        errors.fail(path, "air, flat", "a reference for line integrals", "none: they have it in them")
    if values == "line_integrals" and options.bits is not None:
        errors.fail(
            path, "option bits", f"{options.bits} with values='line_integrals'", "none: these are no stored numbers"
        )
    if options.bits is not None:
        stored = dataclasses.replace(stored, bits=options.bits, signed=False)
        stored_images.check_range(path, "option bits", stored)

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
    field, found = _field(stored, signal, usable, options)
    line, air = _line_integrals(path, numbers, signal, values, grows, options, references, usable, field)
    low, high = LINE_INTEGRAL_RANGE
    usable &= np.isfinite(line)
    line = np.clip(np.nan_to_num(line, nan=high, posinf=high, neginf=low), low, high).astype(np.float32)
    line[~(signal > 0)] = high
    valid = usable & field
    if valid.mean() < MIN_VALID:
        errors.fail(path, "pixels", f"{int(valid.sum())} usable of {valid.size}", "one in a hundred or more")

    camera, moves, said = view_geometry.find_camera(path, stored, calibration, options.view, options.mirrored)
    line, valid = (np.ascontiguousarray(view_geometry.apply_moves(image, moves)) for image in (line, valid))
    pixel_mm = stored.pixel_mm
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
        "camera": said,
        "frame": options.frame,
    }
    return Radiograph(
        line,
        valid,
        camera,
        pixel_mm,
        stored.source_detector_mm,
        stored.source_isocentre_mm,
        view_geometry.file_from_image(stored.pixels.shape, moves),
        origin,
    )


def read_stored(path: pathlib.Path | str, frame: int | None = None) -> np.ndarray:
    """The numbers (height, width) in an X-ray's file as stored: not rescaled, inverted or turned.

    Args:
      path: the file.
      frame: number of the frame in a file with several, from 0.

    Raises:
      InputError: the file is damaged or unsuitable, as for `read`.
    """
    return stored_images.load_stored(path, frame).pixels


def read_views(
    paths: collections.abc.Sequence[pathlib.Path | str],
    calibration: pathlib.Path | str | None = None,
    options: ReadOptions | None = None,
    flats: collections.abc.Sequence[pathlib.Path | str] | None = None,
) -> list[Radiograph]:
    """The X-rays of one acquisition, each with its camera.

    Files other than DICOM hold line integrals unless `options.values` is set. Line integrals are not searched for a border.

    Args:
      paths: one file per view.
      calibration: a JSON file with one entry per view, or None for DICOM's nominal geometry.
      options: options of all views.
      flats: one flat field per view.

    Raises:
      InputError: as `read`; or the number of cameras or flat fields is not that of X-rays, or a view has no camera.
    """
    options = options or ReadOptions()
    listed = files.read_json(calibration) if calibration else None
    if isinstance(listed, list) and len(listed) != len(paths):
        errors.fail(calibration, "views", len(listed), f"a list of {len(paths)}, one per X-ray")
    if flats and len(flats) != len(paths):
        errors.fail(flats[0], "flat fields", len(flats), f"{len(paths)}, one per X-ray")
    views = []
    for index, path in enumerate(paths):
        values = options.values or (None if files.is_dicom(path) else "line_integrals")
        bordered = options.collimator and values != "line_integrals"
        flat = flats[index] if flats else None
        own = dataclasses.replace(options, values=values, flat=flat, collimator=bordered, view=index)
        views.append(read(path, calibration, own))
        if views[-1].camera is None:
            errors.fail(path, "camera", views[-1].origin["camera"], "geometry tags, or a calibration")
    return views


def _check_options(path, options):
    if options.values not in (None, *VALUES):
        errors.fail(path, "option values", repr(options.values), f"one of {VALUES}")
    if options.sign not in (None, 1, -1):
        errors.fail(path, "option sign", options.sign, "1 or -1")
    bits, (low, high) = options.bits, BITS_RANGE
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high):
        errors.fail(path, "option bits", repr(bits), f"a whole number from {low} to {high}")
    for name in ("log_scale", "air", "saturation"):
        number = getattr(options, name)
        if number is not None and not (np.isfinite(number) and (name == "saturation" or number > 0)):
            errors.fail(
                path, f"option {name}", number, "a finite number" + (" above 0" if name != "saturation" else "")
            )


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
            wanted = "option bits=, how many a stored number has: 2**bits - 1 is no X-rays"
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
    return (rescale.apply(pixels) if rescale else pixels).astype(np.float32)


def _reference(name, options, stored, values, sign):
    source = getattr(options, name)
    if source is None:
        return None
    other = stored_images.load_stored(source, options.frame if options.frame else 0)
    if other.pixels.shape != stored.pixels.shape:
        errors.fail(source, f"{name}: shape", other.pixels.shape, f"the X-ray's {stored.pixels.shape}")
    if values == "intensity" and sign < 0 and options.bits is None and other.bits not in (None, stored.bits):
        errors.fail(source, f"{name}: BitsStored", other.bits, f"the X-ray's {stored.bits}, with sign -1")
    other = dataclasses.replace(other, bits=stored.bits, signed=stored.signed)
    numbers = _numbers(source, other, values, sign)
    if not np.isfinite(numbers).all():
        errors.fail(source, name, "pixels that are not finite", "finite numbers")
    return numbers


def _signal(numbers, values, grows, options, dark):
    """A number that grows with the X-rays and is positive if there are any, to find borders and dead pixels."""
    if values == "intensity":
        return numbers if dark is None else numbers - dark
    # A logarithm has an unknown offset, so the signal is scaled to be about 1 in the brightest pixels.
    log = -numbers if values == "line_integrals" else grows * numbers / options.log_scale
    finite = log[np.isfinite(log)]
    reference = np.quantile(finite[:: max(1, finite.size // 100_000)], AIR_QUANTILE)
    return np.exp(np.clip(np.nan_to_num(log - reference, nan=-60.0), -60.0, 60.0))


def _field(stored, signal, usable, options):
    """The exposed field, (H, W) bool, and how it was found."""
    if stored.field is not None:
        return stored.field, "DICOM tags"
    if not options.collimator:
        return np.ones(signal.shape, bool), "not looked for"
    border = collimator.find(np.where(usable | (signal > 0), signal, 0.0))
    if border.kind == "none":
        return border.mask, "none found"
    shrunk = scipy.ndimage.binary_erosion(border.mask, iterations=PENUMBRA_PX, border_value=1)
    return shrunk, f"{border.kind} found"


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
            errors.fail(path, "option air", air, "more than the dark image")
    else:
        air = reference = float(np.quantile(signal[seen], AIR_QUANTILE))
        source = f"{AIR_QUANTILE:g} quantile inside the collimator"
    with np.errstate(divide="ignore", invalid="ignore"):
        line = -np.log(np.maximum(signal, 0) / reference)
    return line, {"air": float(air), "air_from": source}
