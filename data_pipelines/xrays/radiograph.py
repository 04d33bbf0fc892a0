"""A measured X-ray from a hospital's or a laboratory's file: line integrals, which pixels count, and the camera.

DICOM (XA, RF, DX, CR), PNG and TIFF of 16 bits or more, NPY and NIfTI. What the stored numbers mean is read from DICOM tags or
said by the caller, never guessed; display settings (window, presentation LUT, MONOCHROME1) never touch them.

Images are (height, width), u the column, v the row, integers at pixel centres, as in the case format.
"""

import dataclasses
import os

import numpy as np
import scipy

from data_pipelines.io import files
from data_pipelines.xrays import collimator
from data_pipelines.xrays import stored_images
from data_pipelines.xrays import view_geometry
from radgs_jax import errors
from radgs_jax.geometry.xray import XRay

VALUES = ("line_integrals", "intensity", "log")
BITS_RANGE = (6, 32)
"""Of a stored number; DICOM's detectors have 6 bits or more, and no file here has more than 32."""
LINE_INTEGRAL_RANGE = (-1.0, 12.0)
"""Where line integrals are clamped: 16 bits hold 11.1, and a wrong air value rarely makes less than -1."""
AIR_QUANTILE = 0.995
"""The air value, where none is given: this quantile of the pixels inside the collimator. It is air only if air is in sight."""
PENUMBRA_PX = 2
"""Pixels inside the collimator's border that do not count: its shadow is not sharp."""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What the caller knows and the file may not say.

    values: what the stored numbers are. 'line_integrals': -ln(I / I0). 'intensity': proportional to the X-rays that arrived, on
      top of `dark`. 'log': log_scale * ln(I) + constant. None takes it from DICOM tags.
    sign: +1 where larger stored numbers are more X-rays, -1 where fewer; None takes the DICOM tag, else +1.
    bits: bits of a stored number, which runs from 0 to 2**bits - 1; None takes DICOM's BitsStored. Inverted intensities
      (sign -1) are counted from 2**bits - 1, so other files need it with them: neither the largest number of an image nor the
      type that it is kept in says how many bits its detector has.
    log_scale: units per unit of the natural logarithm, with values='log', on the scale of `air`.
    air: number of the unattenuated beam, after the file's own rescaling, and turned round where an intensity is inverted: the
      scale on which no X-rays are 0. With `flat`, the ratio of this exposure to the flat field's. None: 1 with `flat`, else
      AIR_QUANTILE of the pixels inside the collimator.
    flat, dark: files of the same pixels as the X-ray: the beam without a patient, the detector without a beam.
    saturation: stored number from which on a pixel is saturated, that number included: upwards, or with sign -1 downwards.
      None: the end of the range of `bits` where the most X-rays are. Of integers without `bits`, 0 with sign -1; else a largest
      number of 2**n - 1, n 10 or more, and none if the image does not reach one.
    frame: which frame of several, from 0.
    collimator: look for a border where the file names none.
    mirrored: the file shows the mirror image of what the source sees; image and calibration are mirrored together.
    view: which entry of a calibration with several, by number or name.
    """

    values: str | None = None
    sign: int | None = None
    bits: int | None = None
    log_scale: float | None = None
    air: float | None = None
    flat: str | os.PathLike | None = None
    dark: str | os.PathLike | None = None
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
      valid: (H, W) bool, inside the collimator, neither saturated nor without signal.
      camera: None where neither a calibration nor the file's tags give one.
      pixel_mm: (u, v) on the detector, or None.
      source_detector_mm, source_isocentre_mm: as the file says, or None.
      file_from_image: (3, 3), homogeneous pixel (u, v, 1) here to that in the file.
      origin: how each of these was found, plain values for a log or a JSON file.
    """

    pixel_mm: tuple | None
    source_detector_mm: float | None
    source_isocentre_mm: float | None
    file_from_image: np.ndarray
    origin: dict


def read(path, calibration=None, options=None):
    """Reads one X-ray.

    Without a flat field a line integral is -ln((I - dark) / (air - dark)); with one, -ln((I - dark) / (flat - dark) / air).
    Pixels without signal are clamped (LINE_INTEGRAL_RANGE) and not valid. An inverted intensity is I = 2**bits - 1 - stored.

    Args:
      path: the file; its content decides its kind, not its name (NIfTI: .nii, .nii.gz).
      calibration: None or a file for `read_calibration`, in the pixels of the file. It goes before DICOM's geometry tags, which
        give the machine's nominal geometry, good to some millimetres and degrees only.
      options: `Options`.
    Returns:
      `Radiograph`.
    Raises:
      InputError: a damaged or unsuitable file, numbers of unknown meaning, several frames and none chosen, colours, 8 bits
        (DICOM aside), fields of the wrong size, a calibration that does not fit, or inverted intensities of unknown bits, with
        signs, or rescaled so that nothing says where no X-rays are.
    """
    options = options or ReadOptions()
    _check_options(path, options)
    stored = stored_images.load_stored(path, options.frame)
    shape = stored.pixels.shape
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
        # Where the most X-rays are: beyond it the detector no longer tells how many there were.
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
    if valid.mean() < 0.01:
        errors.fail(path, "pixels", f"{int(valid.sum())} usable of {valid.size}", "one in a hundred or more")

    camera, moves, said = view_geometry.nominal_view(path, stored, shape, calibration, options)
    line, valid = (np.ascontiguousarray(view_geometry.move_camera(image, moves)) for image in (line, valid))
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
        view_geometry.file_from_image(shape, moves),
        origin,
    )


def read_stored(path, frame=None):
    """The numbers of an X-ray's file as they are stored, (height, width): nothing is rescaled, inverted, turned or left out.

    Args:
      frame: which frame of several, from 0.
    Raises:
      InputError: a damaged or unsuitable file, as `read`.
    """
    return stored_images.load_stored(path, frame).pixels


def read_views(paths, calibration=None, options=None, flats=None):
    """The X-rays of one acquisition, each with its camera: a list of `Radiograph`.

    Files other than DICOM hold line integrals unless `options.values` says otherwise, and these are not searched for a border.

    Args:
      paths: one file per view; calibration: a JSON file with an entry per view, or None for DICOM's nominal geometry.
      options: `Options` for all of them; flats: one flat field per view, or None.
    Raises:
      InputError: as `read`; another number of cameras or flat fields than of X-rays; no camera.
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
    """Stored number at which the detector is saturated, None where nothing tells."""
    if options.saturation is not None:
        return options.saturation
    if stored.bits is not None:
        return stored_images.stored_range(stored.bits, stored.signed)[sign > 0]
    if stored.pixels.dtype.kind == "f":
        return None
    if sign < 0:
        return 0 if stored.pixels.min() >= 0 else None
    # A picture that ends short of a full scale may be of any depth, but then nothing in it is cut off.
    largest = int(stored.pixels.max())
    return largest if largest >= 1023 and largest & (largest + 1) == 0 else None


def _grows(path, stored, values, sign):
    """1 if numbers after the file's rescaling grow with the X-rays, else -1. `sign` is of stored ones (PS3.3 C.8.11.3.1.2)."""
    if stored.rescale is None or values == "line_integrals":
        return sign
    if stored.rescale.rises == 0:
        errors.fail(path, *stored.rescale.shown, "a table that rises or falls from its first entry to its last")
    return sign * stored.rescale.rises


def _numbers(path, stored, values, sign):
    """Stored pixels as float32 on their physical scale: rescaled as the file says, turned round where intensity is inverted.

    The tags' sign is about stored numbers, so these are turned round, before the file's rescaling, within the bits that they
    have. A rescaling that falls has turned them round itself, and its 0 is no X-rays, as without inversion.
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
    """Something that grows with the X-rays and is positive where there are any: for finding borders and dead pixels."""
    if values == "intensity":
        return numbers if dark is None else numbers - dark
    # Only differences of a logarithm mean anything; the brightest pixels become about 1.
    log = -numbers if values == "line_integrals" else grows * numbers / options.log_scale
    finite = log[np.isfinite(log)]
    reference = np.quantile(finite[:: max(1, finite.size // 100_000)], AIR_QUANTILE)
    return np.exp(np.clip(np.nan_to_num(log - reference, nan=-60.0), -60.0, 60.0))


def _field(stored, signal, usable, options):
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
    """Line integrals before clamping, and the air value that they refer to with its source."""
    if values == "line_integrals":
        typical = np.median(numbers[usable]) if usable.any() else np.nan
        if not -5 < typical < 20:
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
            # The bright end is the low end where larger numbers are fewer X-rays.
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
