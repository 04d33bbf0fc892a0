"""A measured X-ray from a hospital's or a laboratory's file: line integrals, which pixels count, and the camera.

DICOM (XA, RF, DX, CR), PNG and TIFF of 16 bits or more, NPY and NIfTI. What the stored numbers mean is read from DICOM tags or
said by the caller, never guessed; display settings (window, presentation LUT, MONOCHROME1) never touch them.

Images are (height, width), u the column, v the row, integers at pixel centres, as in the case format.
"""

import dataclasses
import os
import pathlib
import struct
import warnings
import zlib

import numpy as np
import scipy
from PIL import Image

from data_pipelines import carm
from data_pipelines import cases
from data_pipelines import codestream
from data_pipelines import collimator
from data_pipelines import files
from radgs_jax import camera

VALUES = ("line_integrals", "intensity", "log")
MAX_PIXELS = 2**25
"""Larger than any detector (5792 x 5792); a bound on what a lying header can make us allocate."""
MAX_FILE_BYTES = 2**31
MAX_MATRIX_BYTES = 2**20
BITS_RANGE = (6, 32)
"""Of a stored number; DICOM's detectors have 6 bits or more, and no file here has more than 32."""
LINE_INTEGRAL_RANGE = (-1.0, 12.0)
"""Where line integrals are clamped: 16 bits hold 11.1, and a wrong air value rarely makes less than -1."""
AIR_QUANTILE = 0.995
"""The air value, where none is given: this quantile of the pixels inside the collimator. It is air only if air is in sight."""
PENUMBRA_PX = 2
"""Pixels inside the collimator's border that do not count: its shadow is not sharp."""
MODALITIES = ("XA", "RF", "DX", "CR", "RG")


@dataclasses.dataclass(frozen=True)
class Options:
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
class Radiograph:
    """One X-ray, as its source sees it.

    line_integrals: (H, W) float32, finite everywhere; valid: (H, W) bool, inside the collimator, neither saturated nor without
    signal; view: its camera or None; pixel_mm: (u, v) on the detector or None; source_detector_mm, source_isocentre_mm: as the
    file says or None; file_from_image: (3, 3), homogeneous pixel (u, v, 1) here -> in the file; origin: how each of these was
    found, plain values for a log or a JSON file.
    """

    line_integrals: np.ndarray
    valid: np.ndarray
    view: cases.View | None
    pixel_mm: tuple | None
    source_detector_mm: float | None
    source_isocentre_mm: float | None
    file_from_image: np.ndarray
    origin: dict


@dataclasses.dataclass(frozen=True)
class _Rescale:
    """DICOM's modality transform. rises: 1 or -1, whether its numbers grow with the stored ones, 0 if neither; factor: it does
    no more than multiply by a positive number; shown: its name and value, for an error line.
    """

    apply: object
    rises: int
    factor: bool
    shown: tuple


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Pixels as stored and what the file says about them; a field is None where it says nothing."""

    pixels: np.ndarray
    bits: int | None = None
    signed: bool = False
    values: str | None = None
    sign: int | None = None
    padding: np.ndarray | None = None
    field: np.ndarray | None = None
    rescale: "_Rescale | None" = None
    pixel_mm: tuple | None = None
    aspect: float | None = None
    source_detector_mm: float | None = None
    source_isocentre_mm: float | None = None
    angles_deg: tuple | None = None
    orientation: tuple | None = None
    turned: bool = False


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
    options = options or Options()
    _check_options(path, options)
    stored = _load(path, options.frame)
    shape = stored.pixels.shape
    values, sign = options.values or stored.values, options.sign or stored.sign or 1
    if values is None:
        files.fail(path, "values", "nothing that says what the pixels mean", f"option values= one of {VALUES}")
    if values == "log" and options.log_scale is None:
        files.fail(path, "log_scale", "nothing", "stored units per unit of ln(I), with values='log'")
    if values != "intensity" and options.dark is not None:
        files.fail(path, "dark", f"a dark image with values='{values}'", "one with values='intensity' only")
    if values == "line_integrals" and (options.flat is not None or options.air is not None):
        files.fail(path, "air, flat", "a reference for line integrals", "none: they have it in them")
    if values == "line_integrals" and options.bits is not None:
        files.fail(
            path, "option bits", f"{options.bits} with values='line_integrals'", "none: these are no stored numbers"
        )
    if options.bits is not None:
        stored = dataclasses.replace(stored, bits=options.bits, signed=False)
        _check_range(path, "option bits", stored)

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
        files.fail(path, "pixels", f"{int(valid.sum())} usable of {valid.size}", "one in a hundred or more")

    view, moves, said = _view(path, stored, shape, calibration, options)
    line, valid = (np.ascontiguousarray(_move(image, moves)) for image in (line, valid))
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
        view,
        pixel_mm,
        stored.source_detector_mm,
        stored.source_isocentre_mm,
        _file_from_image(shape, moves),
        origin,
    )


def read_stored(path, frame=None):
    """The numbers of an X-ray's file as they are stored, (height, width): nothing is rescaled, inverted, turned or left out.

    Args:
      frame: which frame of several, from 0.
    Raises:
      InputError: a damaged or unsuitable file, as `read`.
    """
    return _load(path, frame).pixels


def read_views(paths, calibration=None, options=None, flats=None):
    """The X-rays of one acquisition, each with its camera: a list of `Radiograph`.

    Files other than DICOM hold line integrals unless `options.values` says otherwise, and these are not searched for a border.

    Args:
      paths: one file per view; calibration: a JSON file with an entry per view, or None for DICOM's nominal geometry.
      options: `Options` for all of them; flats: one flat field per view, or None.
    Raises:
      InputError: as `read`; another number of cameras or flat fields than of X-rays; no camera.
    """
    options = options or Options()
    listed = files.read_json(calibration) if calibration else None
    if isinstance(listed, list) and len(listed) != len(paths):
        files.fail(calibration, "views", len(listed), f"a list of {len(paths)}, one per X-ray")
    if flats and len(flats) != len(paths):
        files.fail(flats[0], "flat fields", len(flats), f"{len(paths)}, one per X-ray")
    views = []
    for index, path in enumerate(paths):
        values = options.values or (None if files.is_dicom(path) else "line_integrals")
        bordered = options.collimator and values != "line_integrals"
        flat = flats[index] if flats else None
        own = dataclasses.replace(options, values=values, flat=flat, collimator=bordered, view=index)
        views.append(read(path, calibration, own))
        if views[-1].view is None:
            files.fail(path, "camera", views[-1].origin["camera"], "geometry tags, or a calibration")
    return views


def _bin_view(view, factor):
    small = camera.bin(camera.Camera(view.intrinsics, view.camera_from_world, view.height, view.width), factor)
    return cases.View(small.intrinsics, small.camera_from_world, small.height, small.width)


def _check_options(path, options):
    if options.values not in (None, *VALUES):
        files.fail(path, "option values", repr(options.values), f"one of {VALUES}")
    if options.sign not in (None, 1, -1):
        files.fail(path, "option sign", options.sign, "1 or -1")
    bits, (low, high) = options.bits, BITS_RANGE
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high):
        files.fail(path, "option bits", repr(bits), f"a whole number from {low} to {high}")
    for name in ("log_scale", "air", "saturation"):
        number = getattr(options, name)
        if number is not None and not (np.isfinite(number) and (name == "saturation" or number > 0)):
            files.fail(path, f"option {name}", number, "a finite number" + (" above 0" if name != "saturation" else ""))


def _check_pixels(path, pixels):
    if pixels.ndim != 2 or min(pixels.shape) < 8 or pixels.size > MAX_PIXELS:
        files.fail(path, "shape", pixels.shape, f"(height, width), each 8 or more, {MAX_PIXELS} pixels at most")
    if pixels.dtype.kind not in "iuf":
        files.fail(path, "pixel type", pixels.dtype, "real numbers")
    finite = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels
    if finite.size == 0 or finite.min() == finite.max():
        files.fail(path, "pixels", "one value everywhere" if finite.size else "no finite value", "an image")


# ---- what the numbers mean


def _range(bits, signed):
    """Smallest and largest stored number."""
    half = 2 ** (bits - 1)
    return (-half, half - 1) if signed else (0, 2 * half - 1)


def _check_range(path, field, stored):
    low, high = _range(stored.bits, stored.signed)
    real = np.isfinite(stored.pixels) if stored.padding is None else ~stored.padding
    real = stored.pixels[real]
    if real.size and (real.min() < low or real.max() > high):
        files.fail(path, field, f"{stored.bits} with pixels from {real.min()} to {real.max()}", f"{low} to {high}")


def _saturation(stored, sign, options):
    """Stored number at which the detector is saturated, None where nothing tells."""
    if options.saturation is not None:
        return options.saturation
    if stored.bits is not None:
        return _range(stored.bits, stored.signed)[sign > 0]
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
        files.fail(path, *stored.rescale.shown, "a table that rises or falls from its first entry to its last")
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
            files.fail(path, "bits", "nothing, with inverted intensities (sign -1)", wanted)
        if rescale is not None and not rescale.factor:
            wanted = "a rescaling that rises, or sign -1" if sign > 0 else "one that falls, or a positive factor alone"
            name, found = rescale.shown
            files.fail(path, name, f"{found} with sign {sign:+d}", f"{wanted}: it says not which number is no X-rays")
        if stored.signed:
            wanted = "0: of signed numbers nothing says which is no X-rays"
            files.fail(path, "PixelRepresentation", "1 with inverted intensities (sign -1)", wanted)
        _check_range(path, "bits", stored)
        pixels = np.subtract(_range(stored.bits, False)[1], pixels, dtype=np.float64)
    return (rescale.apply(pixels) if rescale else pixels).astype(np.float32)


def _reference(name, options, stored, values, sign):
    source = getattr(options, name)
    if source is None:
        return None
    other = _load(source, options.frame if options.frame else 0)
    if other.pixels.shape != stored.pixels.shape:
        files.fail(source, f"{name}: shape", other.pixels.shape, f"the X-ray's {stored.pixels.shape}")
    if values == "intensity" and sign < 0 and options.bits is None and other.bits not in (None, stored.bits):
        files.fail(source, f"{name}: BitsStored", other.bits, f"the X-ray's {stored.bits}, with sign -1")
    other = dataclasses.replace(other, bits=stored.bits, signed=stored.signed)
    numbers = _numbers(source, other, values, sign)
    if not np.isfinite(numbers).all():
        files.fail(source, name, "pixels that are not finite", "finite numbers")
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
            files.fail(path, "pixels", f"a median of {typical:.6g}", "line integrals -ln(I / I0), between -5 and 20")
        return numbers, {"air": None, "air_from": "in the line integrals"}
    seen = field & (signal > 0)
    if not seen.any():
        files.fail(path, "pixels", "none with signal", "an X-ray")
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
            files.fail(path, "option air", air, "more than the dark image")
    else:
        air = reference = float(np.quantile(signal[seen], AIR_QUANTILE))
        source = f"{AIR_QUANTILE:g} quantile inside the collimator"
    with np.errstate(divide="ignore", invalid="ignore"):
        line = -np.log(np.maximum(signal, 0) / reference)
    return line, {"air": float(air), "air_from": source}


# ---- files


def _load(path, frame):
    """`_Stored` of a file, whose first bytes decide how it is read."""
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(132)
    except OSError as error:
        files.fail(path, "file", error.strerror or error, "a readable file")
    if size > MAX_FILE_BYTES:
        files.fail(path, "size", f"{size} bytes", f"{MAX_FILE_BYTES} at most")
    if head[128:] == b"DICM":
        return _load_dicom(path, frame)
    if head.startswith(b"\x93NUMPY"):
        kept = _frame_of(path, files.read_npy(path), frame)
    elif head.startswith((b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        kept = _load_picture(path)
    elif path.name.lower().endswith((".nii", ".nii.gz")):
        # A calibration speaks of pixels as stored, the first axis along u.
        kept = files.read_nifti_image(path, MAX_PIXELS).T
    else:
        files.fail(path, "content", f"{head[:8]!r}", "DICOM, PNG, TIFF, NPY or NIfTI (.nii, .nii.gz)")
    _check_pixels(path, kept)
    if kept.dtype.itemsize == 1:
        files.fail(path, "pixel type", kept.dtype, "16 bits or more: 8 are a picture made for display")
    return _Stored(kept)


def _frame_of(path, array, frame):
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    elif array.ndim == 3 and array.shape[2] > 4:
        array = array[_frame_number(path, frame, len(array))]
    return array


def _frame_number(path, frame, count):
    if count == 1 and frame in (None, 0):
        return 0
    if not isinstance(frame, int) or not 0 <= frame < count:
        files.fail(path, "option frame", frame, f"a frame from 0 to {count - 1}: there are {count}")
    return frame


def _load_picture(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "TIFF")) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    files.fail(path, "size", f"{picture.width} x {picture.height}", f"{MAX_PIXELS} pixels at most")
                if picture.mode not in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
                    files.fail(
                        path, "pixels", f"mode {picture.mode}", "one grey channel of 16 bits or more, not for display"
                    )
                _check_complete(path, picture)
                try:
                    picture.seek(1)
                except EOFError:
                    picture.seek(0)
                else:
                    files.fail(path, "pages", "several", "one")
                return np.array(picture)
    except files.InputError:
        raise
    except Exception as error:  # Pillow raises SyntaxError, OSError, struct.error and more on damaged files
        files.fail(path, "content", f"{type(error).__name__}: {error}"[:200], "a complete PNG or TIFF")


def _check_complete(path, picture):
    """Refuses a picture whose data are not the size that its header says: Pillow fills up with zeros."""
    samples = 2 if picture.mode.startswith("I;16") else 4
    if picture.format == "PNG":
        found = _png_bytes(path)
        wanted = picture.height * (1 + samples * picture.width)
        if found < wanted if picture.info.get("interlace") else found != wanted:
            files.fail(path, "image data", f"{found} bytes", f"{wanted} for {picture.width} x {picture.height}")
        return
    counts = picture.tag_v2.get(279) or picture.tag_v2.get(325) or ()
    counts = counts if isinstance(counts, tuple) else (counts,)
    found, wanted = sum(counts), picture.height * picture.width * samples
    if picture.tag_v2.get(259, 1) == 1 and 279 in picture.tag_v2 and found != wanted:
        files.fail(path, "StripByteCounts", f"{found} bytes", f"{wanted} for {picture.width} x {picture.height}")
    rows = picture.tag_v2.get(278, picture.height)
    if 279 in picture.tag_v2 and len(counts) != -(-picture.height // max(1, rows)):
        files.fail(path, "StripByteCounts", f"{len(counts)} strips", f"{picture.height} rows, {rows} a strip")


def _png_bytes(path):
    """Inflated size of a PNG's image data, counted up to a little more than MAX_PIXELS need (PNG 3rd edition, 10.1)."""
    limit, total, inflater = 5 * MAX_PIXELS, 0, zlib.decompressobj()
    with open(path, "rb") as stream:
        stream.seek(8)
        while total < limit:
            length, kind = struct.unpack(">I4s", stream.read(8))
            if kind == b"IEND":
                break
            if kind != b"IDAT":
                stream.seek(length + 4, os.SEEK_CUR)
                continue
            rest = stream.read(length)
            while rest and total < limit:
                total += len(inflater.decompress(rest, 2**22))
                rest = inflater.unconsumed_tail
            stream.seek(4, os.SEEK_CUR)
    return total


# ---- DICOM (PS3.3: C.7.6.3 pixels, C.8.7 XA and RF, C.8.11 DX, C.7.6.11 shutters)


def _tag(path, header, keyword, count=None, kind=float):
    """Numbers or words of an element as a tuple, or None where it is absent or empty."""
    try:
        value = header.get(keyword)
        if value is None or value == "" or (hasattr(value, "__len__") and len(value) == 0):
            return None
        many = value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
        numbers = tuple(kind(v) for v in many)
    except Exception as error:  # pydicom converts when asked, and each value representation fails in its own way
        files.fail(path, keyword, f"{type(error).__name__}: {error}"[:120], f"a readable {kind.__name__}")
    if kind is float and not np.isfinite(numbers).all() or count is not None and len(numbers) != count:
        files.fail(path, keyword, numbers[:8], f"{count or 'finite'} number(s)")
    return numbers


def _whole(path, header, keyword, low, high, default=None):
    value = _tag(path, header, keyword, 1)
    if value is None and default is not None:
        return default
    if value is None or value[0] != int(value[0]) or not low <= value[0] <= high:
        files.fail(path, keyword, "nothing" if value is None else value[0], f"a whole number from {low} to {high}")
    return int(value[0])


def _load_dicom(path, frame):
    import pydicom  # half a second, for one kind of file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            syntax = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
            if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
                # Its whole data set is inflated at once, without a bound.
                files.fail(path, "TransferSyntaxUID", "a deflated data set", "one of the others: dcmconv +te")
            header = pydicom.dcmread(path, defer_size=2**16)
        except files.InputError:
            raise
        except Exception as error:
            files.fail(path, "content", f"{type(error).__name__}: {error}"[:200], "a complete DICOM file")
        try:
            return _dicom_image(path, header, syntax, frame)
        except files.InputError:
            raise
        except Exception as error:
            files.fail(path, "data set", f"{type(error).__name__}: {error}"[:200], "a readable X-ray image")


def _dicom_image(path, header, syntax, frame):
    modality = (_tag(path, header, "Modality", kind=str) or ("nothing",))[0]
    if modality not in MODALITIES:
        files.fail(path, "Modality", repr(modality), f"an X-ray image: one of {MODALITIES}")
    rows, columns = (_whole(path, header, name, 8, 65535) for name in ("Rows", "Columns"))
    if rows * columns > MAX_PIXELS:
        files.fail(path, "Rows, Columns", (rows, columns), f"{MAX_PIXELS} pixels at most")
    _whole(path, header, "SamplesPerPixel", 1, 1)
    photometric = (_tag(path, header, "PhotometricInterpretation", kind=str) or ("nothing",))[0]
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        files.fail(path, "PhotometricInterpretation", repr(photometric), "MONOCHROME1 or MONOCHROME2")
    allocated = _whole(path, header, "BitsAllocated", 8, 16)
    if allocated not in (8, 16):
        files.fail(path, "BitsAllocated", allocated, "8 or 16")
    bits = _whole(path, header, "BitsStored", 6, allocated)
    if _whole(path, header, "HighBit", 0, 15, bits - 1) != bits - 1:
        files.fail(path, "HighBit", header.HighBit, f"{bits - 1}, one less than BitsStored")
    signed = bool(_whole(path, header, "PixelRepresentation", 0, 1))
    count = _whole(path, header, "NumberOfFrames", 1, 100_000, 1)
    number = _frame_number(path, frame, count)
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    pixels = _dicom_pixels(path, header, syntax, (rows, columns), kind, count, number)
    _check_pixels(path, pixels)
    padding = _padding(path, header, pixels)
    _check_range(path, "BitsStored", _Stored(pixels, bits, signed, padding=padding))
    rescale = _rescale(path, header, _range(bits, signed))
    values, sign = _meaning(path, header, modality, rescale)
    angles = [_tag(path, header, f"Positioner{name}Angle", 1) for name in ("Primary", "Secondary")]
    moving = (_tag(path, header, "PositionerMotion", kind=str) or ("STATIC",))[0] == "DYNAMIC"
    spacing = _tag(path, header, "ImagerPixelSpacing", 2)
    if spacing is not None and not all(1e-3 < mm < 10 for mm in spacing):
        files.fail(path, "ImagerPixelSpacing", spacing, "two spacings in mm, above 0")
    aspect = _tag(path, header, "PixelAspectRatio", 2)
    if aspect is not None:
        if min(aspect) <= 0:
            files.fail(path, "PixelAspectRatio", aspect, "two numbers above 0")
        aspect = aspect[0] / aspect[1]
        if spacing is not None and abs(spacing[0] / spacing[1] / aspect - 1) > 0.01:
            files.fail(path, "PixelAspectRatio", aspect, f"that of ImagerPixelSpacing, {spacing[0] / spacing[1]:.4g}")
    elif spacing is not None:
        aspect = spacing[0] / spacing[1]
    turned = (_tag(path, header, "FieldOfViewRotation", 1) or (0,))[0] != 0
    turned |= (_tag(path, header, "FieldOfViewHorizontalFlip", kind=str) or ("NO",))[0] != "NO"
    return _Stored(
        pixels,
        bits,
        signed,
        values,
        sign,
        padding,
        _shutters(path, header, (rows, columns)),
        rescale,
        spacing and (spacing[1], spacing[0]),
        aspect,
        _distance(path, header, "DistanceSourceToDetector"),
        _distance(path, header, "DistanceSourceToIsocenter") or _distance(path, header, "DistanceSourceToPatient"),
        None if None in angles or moving else (angles[0][0], angles[1][0]),
        _tag(path, header, "PatientOrientation", 2, str),
        turned,
    )


def _distance(path, header, keyword):
    value = _tag(path, header, keyword, 1)
    if value is not None and not 0 <= value[0] < 1e4:
        files.fail(path, keyword, value[0], "a distance in mm")
    # Many machines write 0 where they do not know.
    return value[0] if value and value[0] > 0 else None


def _dicom_pixels(path, header, syntax, shape, kind, count, number):
    import pydicom

    if "PixelData" not in header:
        files.fail(path, "PixelData", "nothing", "an image")
    size = shape[0] * shape[1]
    wanted = size * kind.itemsize
    if not syntax.is_encapsulated:
        # Read here, since pydicom takes too many bytes for a warning and masks what BitsStored denies.
        element = header.get_item("PixelData")
        if not wanted * count <= element.length <= wanted * count + 1:
            files.fail(
                path, "PixelData", f"{element.length} bytes", f"{wanted * count} for {count} frame(s) of {shape}"
            )
        kind = kind.newbyteorder("<" if syntax.is_little_endian else ">")
        pixels = np.fromfile(path, kind, size, offset=element.value_tell + wanted * number)
        if pixels.size != size:
            files.fail(path, "PixelData", f"{pixels.size} pixels", f"{size}: a complete file")
        return pixels.reshape(shape).astype(kind.newbyteorder("="))
    _check_codestream(path, header.PixelData, syntax, shape, count, number, 4 * wanted + 4096)
    try:
        with codestream.silent():
            pixels = pydicom.pixels.pixel_array(path, index=number, raw=True)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"[:200]
        files.fail(path, "PixelData", found, f"an image that '{syntax.name}' decodes to")
    if pixels.shape != shape:
        files.fail(path, "PixelData", f"an image of shape {pixels.shape}", f"{shape} as Rows and Columns say")
    return pixels


def _check_codestream(path, data, syntax, shape, count, number, limit):
    """Refuses a frame whose own header asks for another size: decoders allocate by that one."""
    import pydicom

    frame = pydicom.encaps.get_frame(data, number, number_of_frames=count)
    if len(frame) > limit:
        files.fail(path, "PixelData", f"{len(frame)} bytes of one frame", f"{limit} at most for {shape}")
    if syntax != pydicom.uid.RLELossless:
        codestream.check(path, frame, shape)


def _padding(path, header, pixels):
    first = _tag(path, header, "PixelPaddingValue", 1)
    if first is None:
        return None
    last = _tag(path, header, "PixelPaddingRangeLimit", 1) or first
    low, high = sorted((first[0], last[0]))
    return (pixels >= low) & (pixels <= high)


def _meaning(path, header, modality, rescale):
    """values and sign that the tags state, None where they do not.

    LIN and LOG say how pixels follow the beam (C.8.7.1.1.2, C.8.11.3.1.2). A LOG image of XA or RF carries a modality LUT that
    makes it linear again, so it runs the way its stored numbers do. Images FOR PRESENTATION were processed for the eye, so their
    word is not taken.
    """
    relationship = (_tag(path, header, "PixelIntensityRelationship", kind=str) or (None,))[0]
    sign = _tag(path, header, "PixelIntensityRelationshipSign", 1)
    if sign is not None and sign[0] not in (1, -1):
        files.fail(path, "PixelIntensityRelationshipSign", sign[0], "1 or -1")
    sign = int(sign[0]) if sign else None
    if (_tag(path, header, "PresentationIntentType", kind=str) or ("",))[0] == "FOR PRESENTATION":
        return None, sign
    if relationship == "LOG" and modality in ("XA", "RF") and "ModalityLUTSequence" in header:
        return "intensity", sign or rescale.rises or None
    needs_sign = modality not in ("XA", "RF")
    if relationship not in ("LIN", "LOG") or needs_sign and sign is None:
        return None, sign
    return {"LIN": "intensity", "LOG": "log"}[relationship], sign


def _rescale(path, header, ends):
    """`_Rescale` of the file: its modality LUT, or slope and intercept; None where it has neither. ends: of stored numbers."""
    import pydicom

    if "ModalityLUTSequence" in header:
        if len(header.ModalityLUTSequence) != 1:
            files.fail(path, "ModalityLUTSequence", f"{len(header.ModalityLUTSequence)} items", "one")
        table = _tag(path, header.ModalityLUTSequence[0], "LUTDescriptor", 3)
        if table is None:
            files.fail(path, "LUTDescriptor", "nothing", "three numbers")
        entries = int(table[0]) or 2**16
        if "LUTData" not in header.ModalityLUTSequence[0]:
            files.fail(path, "LUTData", "nothing", f"{entries} entries")
        data = header.ModalityLUTSequence[0].LUTData
        length = len(data) if not isinstance(data, bytes) else len(data) // 2
        if length < entries:
            files.fail(path, "LUTData", f"{length} entries", f"{entries} as LUTDescriptor says")

        def look_up(pixels):
            return pydicom.pixels.apply_modality_lut(pixels.astype(np.int32), header)

        first, last = look_up(np.array(ends)).astype(np.float64)
        return _Rescale(look_up, int(np.sign(last - first)), False, ("LUTData", f"entries from {first:g} to {last:g}"))
    slope, intercept = (_tag(path, header, f"Rescale{name}", 1) for name in ("Slope", "Intercept"))
    if slope is None and intercept is None:
        return None
    if slope is None or intercept is None or slope[0] == 0:
        files.fail(path, "RescaleSlope, RescaleIntercept", (slope, intercept), "both, the slope not 0")
    slope, intercept = slope[0], intercept[0]
    shown = "RescaleSlope, RescaleIntercept", (slope, intercept)
    factor = slope > 0 and intercept == 0
    return _Rescale(lambda pixels: pixels * slope + intercept, int(np.sign(slope)), factor, shown)


def _shutters(path, header, shape):
    """What the collimator's and the display shutter's tags leave open, (H, W) bool, or None without such tags.

    Their pixels are counted from 1, points are row \\ column (C.7.6.11, C.8.7.3).
    """
    masks = []
    v, u = np.ogrid[1 : shape[0] + 1, 1 : shape[1] + 1]
    for noun in ("Collimator", "Shutter"):
        for form in _tag(path, header, f"{noun}Shape", kind=str) or ():
            if form == "RECTANGULAR":
                left, right, upper, lower = (
                    _tag(path, header, f"{noun}{side}Edge", 1)
                    for side in ("LeftVertical", "RightVertical", "UpperHorizontal", "LowerHorizontal")
                )
                if None in (left, right, upper, lower) or left >= right or upper >= lower:
                    files.fail(path, f"{noun} edges", (left, right, upper, lower), "left < right and upper < lower")
                masks.append((u >= left[0]) & (u <= right[0]) & (v >= upper[0]) & (v <= lower[0]))
            elif form == "CIRCULAR":
                centre = _tag(path, header, f"CenterOfCircular{noun}", 2)
                radius = _tag(path, header, f"RadiusOfCircular{noun}", 1)
                if centre is None or radius is None or radius[0] <= 0:
                    files.fail(path, f"circular {noun}", (centre, radius), "a centre and a radius above 0")
                masks.append((v - centre[0]) ** 2 + (u - centre[1]) ** 2 <= radius[0] ** 2)
            elif form == "POLYGONAL":
                points = _tag(path, header, f"VerticesOfThePolygonal{noun}")
                if points is None or len(points) < 6 or len(points) % 2 or len(points) > 2000:
                    files.fail(path, f"polygonal {noun}", points and points[:6], "three vertices or more")
                masks.append(_inside_polygon(np.reshape(points, (-1, 2)), v, u))
            else:
                files.fail(path, f"{noun}Shape", repr(form), "RECTANGULAR, CIRCULAR or POLYGONAL")
    return np.logical_and.reduce(masks) if masks else None


def _inside_polygon(vertices, v, u):
    """Even-odd rule for a polygon of (row, column) vertices."""
    inside = np.zeros(np.broadcast_shapes(v.shape, u.shape), bool)
    for (v0, u0), (v1, u1) in zip(vertices, np.roll(vertices, -1, 0)):
        if v0 != v1:
            inside ^= ((v0 > v) != (v1 > v)) & (u < u0 + (v - v0) * (u1 - u0) / (v1 - v0))
    return inside


# ---- cameras


def read_calibration(path, shape, view=None, mirrored=False, aspect=None):
    """The camera of an X-ray of `shape` (height, width), world mm to pixels of the file, from a calibration file.

    JSON: {'P': 3x4} or {'K': 3x3, 'E': 4x4}, each with 'height' and 'width' if they are another image's, of which the X-ray is a
    whole-number binning (followed exactly); a plain 3x4 list; or several of these as a list, by name, or under 'views'.
    TXT, NPY: a 3x4 matrix. P may have any scale and sign; the world's origin, the isocentre, must lie before the source.

    Args:
      view: which entry of several, by number or name.
      mirrored: True mirrors the columns of P, for an image that is mirrored with it.
      aspect: height over width of a detector pixel, None if unknown; it must be that of the focal lengths within 2 %.
    Returns:
      `cases.View`.
    Raises:
      InputError: missing or mistyped entries, a singular, skewed or mirrored projection, another image size or aspect.
    """
    path = pathlib.Path(path)
    where, value = _calibration_entry(path, view)
    if not isinstance(value, dict):
        value = {"P": value}
    size = tuple(value.get(name, n) for name, n in zip(("height", "width"), shape))
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= 10**6 for n in size):
        files.fail(path, f"{where}.height, width", size, "positive whole numbers")
    factor = max(1, round(size[0] / shape[0]))
    if (size[0] // factor, size[1] // factor) != tuple(shape):
        files.fail(path, f"{where}.height, width", size, f"those of the X-ray, {tuple(shape)}, or a multiple of them")
    if "P" in value and not ("K" in value and "E" in value):
        value = {"P": cases.check_matrix(path, f"{where}.P", value["P"], (3, 4))}
    elif mirrored:
        whole = cases.read_view(path, where, value, size)
        value = cases.view_json(whole, "")
        value = {"P": np.asarray(value["P"])}
    if mirrored:
        value = {"P": np.array([[-1, 0, size[1] - 1], [0, 1, 0], [0, 0, 1.0]]) @ value["P"]}
    found = cases.read_view(path, where, {**value, "height": size[0], "width": size[1]})
    ratio = found.intrinsics[0] / found.intrinsics[1]
    if not 0.1 < ratio < 10 or aspect is not None and abs(ratio / aspect - 1) > 0.02:
        files.fail(path, f"{where}: fx / fy", f"{ratio:.4g}", f"{aspect or 1:.4g}, the pixel's height over its width")
    return _bin_view(found, factor)


def _calibration_entry(path, view):
    """Where and what: one entry of a calibration file."""
    kind = path.suffix.lower()
    if kind == ".npy":
        return "matrix", files.read_npy(path)
    if kind == ".txt":
        return "matrix", _read_matrix(path)
    if kind != ".json":
        files.fail(path, "name", repr(path.name), "a calibration .json, .txt or .npy")
    value = files.read_json(path)
    if isinstance(value, dict) and isinstance(value.get("views"), (list, dict)):
        value = value["views"]
    if isinstance(value, dict) and not {"P", "K", "E"} & set(value):
        names = list(value)
    elif isinstance(value, list) and value and not (isinstance(value[0], list) and _is_row(value[0])):
        names = list(range(len(value)))
    else:
        return "view", value
    if view is None and len(names) == 1:
        view = names[0]
    if view not in names or isinstance(view, bool):
        shown = f"a whole number from 0 to {len(names) - 1}" if isinstance(value, list) else f"one of {names[:20]}"
        files.fail(path, "option view", repr(view), shown)
    return f"views[{view!r}]", value[view]


def _is_row(value):
    return all(not isinstance(v, (list, dict)) for v in value)


def _read_matrix(path):
    try:
        if path.stat().st_size > MAX_MATRIX_BYTES:
            files.fail(path, "size", f"{path.stat().st_size} bytes", "a 3x4 matrix")
        lines = [line.replace(",", " ").split() for line in path.read_text().splitlines()]
        return [[float(word) for word in line] for line in lines if line and not line[0].startswith("#")]
    except files.InputError:
        raise
    except (OSError, ValueError) as error:
        files.fail(path, "content", f"{error}"[:120], "three lines of four numbers")


def view_from_carm(shape, pixel_mm, source_detector_mm, source_isocentre_mm, primary_deg, secondary_deg):
    """The nominal camera of a C-arm by DICOM's angles (PS3.3 C.8.7.5.1.2), the principal point in the image's centre.

    DICOM's angles tell where the detector is: 0, 0 before the chest, primary +90 on the patient's left (LAO), secondary +90 at
    the head. `carm.extrinsics` tells where the source is, which is opposite: its primary angle is DICOM's + 180, its secondary
    minus DICOM's. So DICOM 180 is AP, and -90 is the lateral of `carm.VIEWS`. The world's axes are the patient's to which the
    angles refer: +x right, +y anterior, +z to the head.

    Args:
      shape: (height, width) as the source sees it; pixel_mm: (u, v) on the detector; distances in mm, angles in degrees.
    Returns:
      `cases.View`, camera_from_world in mm.
    """
    focal = source_detector_mm / np.asarray(pixel_mm, np.float64)
    centre = 0.5 * (np.array(shape[::-1]) - 1)
    E = carm.extrinsics(primary_deg + 180.0, -secondary_deg, source_isocentre_mm)
    return cases.View(np.concatenate([focal, centre]), E, *shape)


_DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}


def _view(path, stored, shape, calibration, options):
    """Camera, moves (transpose, mirror columns, mirror rows) from the file's pixels to the source's view, and a word on both."""
    as_stored = (False, options.mirrored, False)
    if calibration is not None:
        view = read_calibration(calibration, shape, options.view, options.mirrored, stored.aspect)
        return view, as_stored, f"calibration {calibration}"
    missing = [
        name
        for name, value in (
            ("ImagerPixelSpacing", stored.pixel_mm),
            ("DistanceSourceToDetector", stored.source_detector_mm),
            ("DistanceSourceToPatient", stored.source_isocentre_mm),
            ("positioner angles of a still C-arm", stored.angles_deg),
        )
        if value is None
    ]
    if missing:
        return None, as_stored, f"none: no {', '.join(missing)}"
    if stored.orientation is None and stored.turned:
        return None, as_stored, "none: FieldOfViewRotation or flip without PatientOrientation"
    if stored.source_isocentre_mm >= stored.source_detector_mm:
        files.fail(path, "DistanceSourceToPatient", stored.source_isocentre_mm, "less than DistanceSourceToDetector")
    if abs(stored.angles_deg[0]) > 180 or abs(stored.angles_deg[1]) > 90:
        files.fail(path, "positioner angles", stored.angles_deg, "primary within 180, secondary within 90 degrees")
    distances = (stored.source_detector_mm, stored.source_isocentre_mm)
    upright = view_from_carm(shape, stored.pixel_mm, *distances, *stored.angles_deg)
    moves = _moves(path, stored.orientation, upright.camera_from_world)
    if moves[0]:
        upright = view_from_carm(shape[::-1], stored.pixel_mm[::-1], *distances, *stored.angles_deg)
    return upright, moves, "DICOM tags, nominal"


def _moves(path, orientation, camera_from_world):
    """Moves that turn an image with DICOM's PatientOrientation (along u, along v) into the camera's axes.

    Without it the image is taken as XA images are shown, by an observer who faces the patient: the mirror image of the source's.
    """
    if orientation is None:
        return False, True, False
    directions = []
    for word in orientation:
        # Letters come in order of weight, as 'LF' for left and somewhat to the feet.
        if not word or not set(word) <= set(_DIRECTIONS):
            files.fail(path, "PatientOrientation", orientation, "two directions of the letters L, R, A, P, H, F")
        total = sum(np.array(_DIRECTIONS[letter]) * 0.5**k for k, letter in enumerate(word))
        directions.append(total / max(np.linalg.norm(total), 1e-9))
    along = np.array(directions) @ camera_from_world[:2, :3].T  # stored u, v by camera x, y
    swap = abs(along[0, 1]) + abs(along[1, 0]) > abs(along[0, 0]) + abs(along[1, 1])
    if swap:
        along = along[::-1]
    if min(abs(along[0, 0]), abs(along[1, 1])) < 0.5:
        files.fail(path, "PatientOrientation", orientation, "axes of the detector at the positioner's angles")
    return bool(swap), bool(along[0, 0] < 0), bool(along[1, 1] < 0)


def _move(image, moves):
    swap, mirror_u, mirror_v = moves
    image = image.T if swap else image
    return image[:: -1 if mirror_v else 1, :: -1 if mirror_u else 1]


def _file_from_image(shape, moves):
    swap, mirror_u, mirror_v = moves
    height, width = shape[::-1] if swap else shape
    matrix = np.eye(3)
    if mirror_u:
        matrix[0] = [-1, 0, width - 1]
    if mirror_v:
        matrix[1] = [0, -1, height - 1]
    return matrix[[1, 0, 2]] if swap else matrix
