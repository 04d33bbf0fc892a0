"""Reads X-ray files to stored numbers: DICOM, PNG, TIFF, NPY and NIfTI."""

import collections.abc
import dataclasses
import pathlib
import warnings

import numpy as np

from data_pipelines.io import codestream
from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.xrays import picture_files
from radgs_jax import errors

MAX_PIXELS = 2**25
"""Pixels of an image (5792 x 5792 is the largest square): a bound on the memory that a damaged header can claim. Chosen by hand:
half refuses some stitched images, twice doubles that memory."""
MIN_SIDE_PX = 8
"""Smallest height and width of an image in pixels. Chosen by hand to catch wrong axes; not sensitive."""
MAX_FILE_BYTES = 2**31
"""Bytes of a file: a bound like MAX_PIXELS, for cine runs of many frames. Chosen by hand: half refuses long runs."""
MODALITIES = ("XA", "RF", "DX", "CR", "RG")
"""DICOM modalities that are projection X-rays."""
MAX_FRAMES = 100_000
"""Largest number of frames of a DICOM file. Chosen by hand to catch damaged headers; not sensitive."""
MAX_CODED_RATIO = 4
"""Largest size of a compressed frame relative to its pixels. Chosen by hand: incompressible frames are slightly above 1, so half is
still enough, and twice lets a damaged file take more memory."""
PIXEL_PITCH_MM = (1e-3, 10)
"""Smallest and largest pixel pitch on the panel in mm. Chosen by hand to catch wrong units; not sensitive."""
MAX_DISTANCE_MM = 1e4
"""Largest distance from the source in mm. Chosen by hand to catch wrong units; not sensitive."""
ASPECT_TOLERANCE = 0.01
"""Largest relative difference between PixelAspectRatio and ImagerPixelSpacing. Chosen by hand: half may refuse whole-number aspect
ratios, twice hides contradictions."""
MAX_VERTEX_NUMBERS = 2000
"""Largest count of numbers in the vertices of a polygonal shutter. Chosen by hand: the mask's time grows with it."""


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
class Stored:
    """Pixels as stored, and what the file says about them. An attribute is None if the file does not say.

    Attributes:
      pixels: (H, W) numbers.
      bits, signed: number of bits of a stored number, and whether it is signed.
      values, sign: as in `radiograph.ReadOptions`.
      padding: (H, W) bool, True where pixels are padding.
      field: (H, W) bool, True inside the collimator.
      rescale: the modality transform.
      pixel_mm: (u, v) pixel pitch on the panel.
      aspect: height over width of a pixel.
      source_detector_mm, source_isocentre_mm: distances from the source.
      angles_deg: DICOM's primary and secondary positioner angle.
      orientation: DICOM's PatientOrientation, directions along u and along v.
      turned: the file says that its field of view was rotated or flipped.
    """

    pixels: np.ndarray
    bits: int | None = None
    signed: bool = False
    values: str | None = None
    sign: int | None = None
    padding: np.ndarray | None = None
    field: np.ndarray | None = None
    rescale: Rescale | None = None
    pixel_mm: tuple[float, float] | None = None
    aspect: float | None = None
    source_detector_mm: float | None = None
    source_isocentre_mm: float | None = None
    angles_deg: tuple[float, float] | None = None
    orientation: tuple[str, str] | None = None
    turned: bool = False


def _check_pixels(path, pixels):
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
    low, high = stored_range(stored.bits, stored.signed)
    real = np.isfinite(stored.pixels) if stored.padding is None else ~stored.padding
    real = stored.pixels[real]
    if real.size and (real.min() < low or real.max() > high):
        errors.fail(path, field, f"{stored.bits} with pixels from {real.min()} to {real.max()}", f"{low} to {high}")


# ---- files


def load_stored(path: pathlib.Path | str, frame: int | None) -> Stored:
    """Reads an X-ray file; `frame` is the number of the frame, from 0, or None for the only one.

    The format is recognised by the first bytes, except that of NIfTI, which is recognised by the name.

    Raises:
      InputError: the file is damaged or not an X-ray, or one of several frames was not chosen.
    """
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(132)
    except OSError as error:
        errors.fail(path, "file", error.strerror or error, "a readable file")
    if size > MAX_FILE_BYTES:
        errors.fail(path, "size", f"{size} bytes", f"{MAX_FILE_BYTES} at most")
    if head[128:] == b"DICM":
        return _load_dicom(path, frame)
    if head.startswith(b"\x93NUMPY"):
        kept = _frame_of(path, files.read_npy(path), frame)
    elif head.startswith((b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        kept = picture_files.read_picture(path, MAX_PIXELS)
    elif path.name.lower().endswith((".nii", ".nii.gz")):
        # A calibration refers to pixels as stored, with the first axis along u.
        kept = nifti.read_nifti_image(path, MAX_PIXELS).T
    else:
        errors.fail(path, "content", f"{head[:8]!r}", "DICOM, PNG, TIFF, NPY or NIfTI (.nii, .nii.gz)")
    _check_pixels(path, kept)
    if kept.dtype.itemsize == 1:
        errors.fail(path, "pixel type", kept.dtype, "16 bits or more: 8 are a picture made for display")
    return Stored(kept)


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
        errors.fail(path, "option frame", frame, f"a frame from 0 to {count - 1}: there are {count}")
    return frame


# ---- DICOM (PS3.3: C.7.6.3 pixels, C.8.7 XA and RF, C.8.11 DX, C.7.6.11 shutters)


def _tag(path, header, keyword, count=None, kind=float):
    """Numbers or words of a data element as a tuple, or None if it is absent or empty."""
    try:
        value = header.get(keyword)
        if value is None or value == "" or (hasattr(value, "__len__") and len(value) == 0):
            return None
        many = value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
        numbers = tuple(kind(v) for v in many)
    except Exception as error:  # pydicom converts on access, with various exceptions
        errors.fail(path, keyword, f"{type(error).__name__}: {error}"[:120], f"a readable {kind.__name__}")
    if kind is float and not np.isfinite(numbers).all() or count is not None and len(numbers) != count:
        errors.fail(path, keyword, numbers[:8], f"{count or 'finite'} number(s)")
    return numbers


def _whole(path, header, keyword, low, high, default=None):
    """A whole number from `low` to `high` in a data element; `default` if it is absent, unless that is None."""
    value = _tag(path, header, keyword, 1)
    if value is None and default is not None:
        return default
    if value is None or value[0] != int(value[0]) or not low <= value[0] <= high:
        errors.fail(path, keyword, "nothing" if value is None else value[0], f"a whole number from {low} to {high}")
    return int(value[0])


def _load_dicom(path, frame):
    import pydicom  # here, since importing it takes half a second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            syntax = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
            if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
                # pydicom inflates the whole data set without a limit.
                errors.fail(path, "TransferSyntaxUID", "a deflated data set", "one of the others: dcmconv +te")
            header = pydicom.dcmread(path, defer_size=2**16)
        except errors.InputError:
            raise
        except Exception as error:
            errors.fail(path, "content", f"{type(error).__name__}: {error}"[:200], "a complete DICOM file")
        try:
            return _dicom_image(path, header, syntax, frame)
        except errors.InputError:
            raise
        except Exception as error:
            errors.fail(path, "data set", f"{type(error).__name__}: {error}"[:200], "a readable X-ray image")


def _dicom_image(path, header, syntax, frame):
    modality = (_tag(path, header, "Modality", kind=str) or ("nothing",))[0]
    if modality not in MODALITIES:
        errors.fail(path, "Modality", repr(modality), f"an X-ray image: one of {MODALITIES}")
    rows, columns = (_whole(path, header, name, MIN_SIDE_PX, 65535) for name in ("Rows", "Columns"))
    if rows * columns > MAX_PIXELS:
        errors.fail(path, "Rows, Columns", (rows, columns), f"{MAX_PIXELS} pixels at most")
    _whole(path, header, "SamplesPerPixel", 1, 1)
    photometric = (_tag(path, header, "PhotometricInterpretation", kind=str) or ("nothing",))[0]
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        errors.fail(path, "PhotometricInterpretation", repr(photometric), "MONOCHROME1 or MONOCHROME2")
    allocated = _whole(path, header, "BitsAllocated", 8, 16)
    if allocated not in (8, 16):
        errors.fail(path, "BitsAllocated", allocated, "8 or 16")
    bits = _whole(path, header, "BitsStored", 6, allocated)
    if _whole(path, header, "HighBit", 0, 15, bits - 1) != bits - 1:
        errors.fail(path, "HighBit", header.HighBit, f"{bits - 1}, one less than BitsStored")
    signed = bool(_whole(path, header, "PixelRepresentation", 0, 1))
    count = _whole(path, header, "NumberOfFrames", 1, MAX_FRAMES, 1)
    number = _frame_number(path, frame, count)
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    pixels = _dicom_pixels(path, header, syntax, (rows, columns), kind, count, number)
    _check_pixels(path, pixels)
    padding = _padding(path, header, pixels)
    check_range(path, "BitsStored", Stored(pixels, bits, signed, padding=padding))
    rescale = _rescale(path, header, stored_range(bits, signed))
    values, sign = _meaning(path, header, modality, rescale)
    angles = [_tag(path, header, f"Positioner{name}Angle", 1) for name in ("Primary", "Secondary")]
    moving = (_tag(path, header, "PositionerMotion", kind=str) or ("STATIC",))[0] == "DYNAMIC"
    spacing = _tag(path, header, "ImagerPixelSpacing", 2)
    if spacing is not None and not all(PIXEL_PITCH_MM[0] < mm < PIXEL_PITCH_MM[1] for mm in spacing):
        errors.fail(path, "ImagerPixelSpacing", spacing, "two spacings in mm, above 0")
    aspect = _tag(path, header, "PixelAspectRatio", 2)
    if aspect is not None:
        if min(aspect) <= 0:
            errors.fail(path, "PixelAspectRatio", aspect, "two numbers above 0")
        aspect = aspect[0] / aspect[1]
        if spacing is not None and abs(spacing[0] / spacing[1] / aspect - 1) > ASPECT_TOLERANCE:
            errors.fail(path, "PixelAspectRatio", aspect, f"that of ImagerPixelSpacing, {spacing[0] / spacing[1]:.4g}")
    elif spacing is not None:
        aspect = spacing[0] / spacing[1]
    turned = (_tag(path, header, "FieldOfViewRotation", 1) or (0,))[0] != 0
    turned |= (_tag(path, header, "FieldOfViewHorizontalFlip", kind=str) or ("NO",))[0] != "NO"
    return Stored(
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
    if value is not None and not 0 <= value[0] < MAX_DISTANCE_MM:
        errors.fail(path, keyword, value[0], "a distance in mm")
    # Many machines write 0 for an unknown distance.
    return value[0] if value and value[0] > 0 else None


def _dicom_pixels(path, header, syntax, shape, kind, count, number):
    import pydicom

    if "PixelData" not in header:
        errors.fail(path, "PixelData", "nothing", "an image")
    size = shape[0] * shape[1]
    wanted = size * kind.itemsize
    if not syntax.is_encapsulated:
        # Not by pydicom, which only warns about surplus bytes and masks bits above BitsStored.
        element = header.get_item("PixelData")
        if not wanted * count <= element.length <= wanted * count + 1:
            errors.fail(
                path, "PixelData", f"{element.length} bytes", f"{wanted * count} for {count} frame(s) of {shape}"
            )
        kind = kind.newbyteorder("<" if syntax.is_little_endian else ">")
        pixels = np.fromfile(path, kind, size, offset=element.value_tell + wanted * number)
        if pixels.size != size:
            errors.fail(path, "PixelData", f"{pixels.size} pixels", f"{size}: a complete file")
        return pixels.reshape(shape).astype(kind.newbyteorder("="))
    _check_codestream(path, header.PixelData, syntax, shape, count, number, MAX_CODED_RATIO * wanted + 4096)
    try:
        with codestream.silent():
            pixels = pydicom.pixels.pixel_array(path, index=number, raw=True)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"[:200]
        errors.fail(path, "PixelData", found, f"an image that '{syntax.name}' decodes to")
    if pixels.shape != shape:
        errors.fail(path, "PixelData", f"an image of shape {pixels.shape}", f"{shape} as Rows and Columns say")
    return pixels


def _check_codestream(path, data, syntax, shape, count, number, limit):
    """Refuses a frame whose own header asks for another size: decoders allocate by that one."""
    import pydicom

    frame = pydicom.encaps.get_frame(data, number, number_of_frames=count)
    if len(frame) > limit:
        errors.fail(path, "PixelData", f"{len(frame)} bytes of one frame", f"{limit} at most for {shape}")
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
    """`values` and `sign` as the tags state them, or None.

    LIN and LOG describe how pixels depend on the beam (C.8.7.1.1.2, C.8.11.3.1.2). A LOG image of XA or RF has a modality LUT
    that makes it linear, so its sign is that of the LUT if no tag states one. Images FOR PRESENTATION were processed for
    display, so their tag is not used.
    """
    relationship = (_tag(path, header, "PixelIntensityRelationship", kind=str) or (None,))[0]
    sign = _tag(path, header, "PixelIntensityRelationshipSign", 1)
    if sign is not None and sign[0] not in (1, -1):
        errors.fail(path, "PixelIntensityRelationshipSign", sign[0], "1 or -1")
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
    """The file's modality LUT, or its slope and intercept, or None. ends: smallest and largest stored number."""
    import pydicom

    if "ModalityLUTSequence" in header:
        if len(header.ModalityLUTSequence) != 1:
            errors.fail(path, "ModalityLUTSequence", f"{len(header.ModalityLUTSequence)} items", "one")
        table = _tag(path, header.ModalityLUTSequence[0], "LUTDescriptor", 3)
        if table is None:
            errors.fail(path, "LUTDescriptor", "nothing", "three numbers")
        entries = int(table[0]) or 2**16
        if "LUTData" not in header.ModalityLUTSequence[0]:
            errors.fail(path, "LUTData", "nothing", f"{entries} entries")
        data = header.ModalityLUTSequence[0].LUTData
        length = len(data) if not isinstance(data, bytes) else len(data) // 2
        if length < entries:
            errors.fail(path, "LUTData", f"{length} entries", f"{entries} as LUTDescriptor says")

        def look_up(pixels):
            return pydicom.pixels.apply_modality_lut(pixels.astype(np.int32), header)

        first, last = look_up(np.array(ends)).astype(np.float64)
        return Rescale(look_up, int(np.sign(last - first)), False, ("LUTData", f"entries from {first:g} to {last:g}"))
    slope, intercept = (_tag(path, header, f"Rescale{name}", 1) for name in ("Slope", "Intercept"))
    if slope is None and intercept is None:
        return None
    if slope is None or intercept is None or slope[0] == 0:
        errors.fail(path, "RescaleSlope, RescaleIntercept", (slope, intercept), "both, the slope not 0")
    slope, intercept = slope[0], intercept[0]
    shown = "RescaleSlope, RescaleIntercept", (slope, intercept)
    factor = slope > 0 and intercept == 0
    return Rescale(lambda pixels: pixels * slope + intercept, int(np.sign(slope)), factor, shown)


def _shutters(path, header, shape):
    """The area that the tags of collimator and display shutter leave open, (H, W) bool, or None without such tags.

    These tags count pixels from 1, and points are row \\ column (C.7.6.11, C.8.7.3).
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
                    errors.fail(path, f"{noun} edges", (left, right, upper, lower), "left < right and upper < lower")
                masks.append((u >= left[0]) & (u <= right[0]) & (v >= upper[0]) & (v <= lower[0]))
            elif form == "CIRCULAR":
                centre = _tag(path, header, f"CenterOfCircular{noun}", 2)
                radius = _tag(path, header, f"RadiusOfCircular{noun}", 1)
                if centre is None or radius is None or radius[0] <= 0:
                    errors.fail(path, f"circular {noun}", (centre, radius), "a centre and a radius above 0")
                masks.append((v - centre[0]) ** 2 + (u - centre[1]) ** 2 <= radius[0] ** 2)
            elif form == "POLYGONAL":
                points = _tag(path, header, f"VerticesOfThePolygonal{noun}")
                if points is None or len(points) < 6 or len(points) % 2 or len(points) > MAX_VERTEX_NUMBERS:
                    errors.fail(path, f"polygonal {noun}", points and points[:6], "three vertices or more")
                masks.append(_inside_polygon(np.reshape(points, (-1, 2)), v, u))
            else:
                errors.fail(path, f"{noun}Shape", repr(form), "RECTANGULAR, CIRCULAR or POLYGONAL")
    return np.logical_and.reduce(masks) if masks else None


def _inside_polygon(vertices, v, u):
    """Mask of a polygon with (row, column) vertices, by the even-odd rule."""
    inside = np.zeros(np.broadcast_shapes(v.shape, u.shape), bool)
    for (v0, u0), (v1, u1) in zip(vertices, np.roll(vertices, -1, 0)):
        if v0 != v1:
            inside ^= ((v0 > v) != (v1 > v)) & (u < u0 + (v - v0) * (u1 - u0) / (v1 - v0))
    return inside
