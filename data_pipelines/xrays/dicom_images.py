"""Reads X-ray images in DICOM to stored numbers (PS3.3: C.7.6.3 pixels, C.8.7 XA and RF, C.8.11 DX)."""

import pathlib
import warnings

import numpy as np

from data_pipelines.xrays import dicom_pixels
from data_pipelines.xrays import dicom_tags
from data_pipelines.xrays import same_acquisition
from data_pipelines.xrays import shutters
from data_pipelines.xrays import stored_images
from data_pipelines.xrays.stored_images import Geometry
from data_pipelines.xrays.stored_images import Rescale
from data_pipelines.xrays.stored_images import Stored
from radgs_jax import errors

MODALITIES = ("XA", "RF", "DX", "CR", "RG")
"""DICOM modalities that are projection X-rays."""
MAX_FRAMES = 100_000
"""Largest number of frames of a DICOM file. Chosen by hand to catch damaged headers; not sensitive."""
PIXEL_PITCH_MM = (1e-3, 10)
"""Smallest and largest pixel pitch on the panel in mm. Chosen by hand to catch wrong units; not sensitive."""
MAX_DISTANCE_MM = 1e4
"""Largest distance from the source in mm. Chosen by hand to catch wrong units; not sensitive."""
ASPECT_TOLERANCE = 0.01
"""Largest relative difference between PixelAspectRatio and ImagerPixelSpacing. Chosen by hand: half may refuse whole-number aspect
ratios, twice hides contradictions."""
MAX_ANGLES_DEG = (180.0, 90.0)
"""Largest primary and secondary positioner angle, degrees (PS3.3 C.8.7.5.1.2)."""


def load_dicom(path: pathlib.Path, frame: int | None) -> Stored:
    """Reads an X-ray image, or one frame of it; the others stay in the file.

    Args:
      path: the file.
      frame: number of the frame, from 0, or None for the only one.

    Raises:
      InputError: the file is damaged or not an X-ray, or one of several frames was not chosen.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            header, element = dicom_pixels.read_header(path)
        except errors.InputError:
            raise
        except Exception as error:  # pydicom raises various exceptions on damaged files
            errors.fail(path, "content", f"{type(error).__name__}: {error}"[:200], "a complete DICOM file")
        try:
            return _image(path, header, element, frame)
        except errors.InputError:
            raise
        except Exception as error:
            errors.fail(path, "data set", f"{type(error).__name__}: {error}"[:200], "a readable X-ray image")


def _image(path, header, element, frame):
    modality = dicom_tags.word(path, header, "Modality", "nothing")
    if modality not in MODALITIES:
        errors.fail(path, "Modality", repr(modality), f"an X-ray image: one of {MODALITIES}")
    rows, columns = (
        dicom_tags.whole(path, header, name, stored_images.MIN_SIDE_PX, 65535) for name in ("Rows", "Columns")
    )
    if rows * columns > stored_images.MAX_PIXELS:
        errors.fail(path, "Rows, Columns", (rows, columns), f"{stored_images.MAX_PIXELS} pixels at most")
    dicom_tags.whole(path, header, "SamplesPerPixel", 1, 1)
    photometric = dicom_tags.word(path, header, "PhotometricInterpretation", "nothing")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        errors.fail(path, "PhotometricInterpretation", repr(photometric), "MONOCHROME1 or MONOCHROME2")
    allocated = dicom_tags.whole(path, header, "BitsAllocated", 8, 16)
    if allocated not in (8, 16):
        errors.fail(path, "BitsAllocated", allocated, "8 or 16")
    bits = dicom_tags.whole(path, header, "BitsStored", 6, allocated)
    if dicom_tags.whole(path, header, "HighBit", 0, 15, bits - 1) != bits - 1:
        errors.fail(path, "HighBit", header.HighBit, f"{bits - 1}, one less than BitsStored")
    signed = bool(dicom_tags.whole(path, header, "PixelRepresentation", 0, 1))
    count = dicom_tags.whole(path, header, "NumberOfFrames", 1, MAX_FRAMES, 1)
    number = stored_images.frame_number(path, frame, count)
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    if element is None:
        errors.fail(path, "PixelData", "nothing", "an image")
    pixels = dicom_pixels.read_frame(header, element, (rows, columns), kind, count, number)
    stored_images.check_pixels(path, pixels)
    padding = _padding(path, header, pixels)
    stored_images.check_range(path, "BitsStored", Stored(pixels, bits, signed, padding=padding))
    rescale = _rescale(path, header, stored_images.stored_range(bits, signed))
    values, sign = _meaning(path, header, modality, rescale)
    field = shutters.from_tags(path, header, (rows, columns))
    return Stored(
        pixels,
        bits,
        signed,
        values,
        sign,
        padding,
        field,
        rescale,
        _geometry(path, header),
        same_acquisition.facts(header, number),
    )


def _geometry(path, header):
    """What the tags say about the geometry. Nothing is refused here, since a calibration may replace them all."""
    problems = []

    def given(read, *arguments, **options):
        try:
            return read(path, header, *arguments, **options)
        except errors.InputError as error:
            problems.append(error)
            return None

    def distance(keyword):
        value = given(
            dicom_tags.measures, keyword, 1, 0, MAX_DISTANCE_MM, f"a distance in mm, below {MAX_DISTANCE_MM:g}"
        )
        return value and value[0]

    angles = tuple(given(dicom_tags.read, f"Positioner{name}Angle", 1) for name in ("Primary", "Secondary"))
    angles = None if None in angles else (angles[0][0], angles[1][0])
    if angles is not None and any(abs(angle) > most for angle, most in zip(angles, MAX_ANGLES_DEG)):
        problems.append(_problem(path, "positioner angles", angles, "primary within 180, secondary within 90 degrees"))
        angles = None
    if given(dicom_tags.word, "PositionerMotion", "STATIC") == "DYNAMIC":
        angles = None
    spacing = given(dicom_tags.measures, "ImagerPixelSpacing", 2, *PIXEL_PITCH_MM, "two spacings in mm, above 0")
    aspect = given(dicom_tags.measures, "PixelAspectRatio", 2, 0, np.inf, "two numbers above 0")
    aspect = None if aspect is None else aspect[0] / aspect[1]
    if spacing is not None:
        own = spacing[0] / spacing[1]
        if aspect is not None and abs(own / aspect - 1) > ASPECT_TOLERANCE:
            problems.append(_problem(path, "PixelAspectRatio", aspect, f"that of ImagerPixelSpacing, {own:.4g}"))
            spacing = aspect = None
        else:
            aspect = aspect or own
    detector = distance("DistanceSourceToDetector")
    isocentre = distance("DistanceSourceToIsocenter") or distance("DistanceSourceToPatient")
    if detector is not None and isocentre is not None and isocentre >= detector:
        wanted = f"less than DistanceSourceToDetector, {detector:g}"
        problems.append(_problem(path, "DistanceSourceToPatient", isocentre, wanted))
        detector = isocentre = None
    turned = (given(dicom_tags.read, "FieldOfViewRotation", 1) or (0,))[0] != 0
    turned |= given(dicom_tags.word, "FieldOfViewHorizontalFlip", "NO") not in ("NO", None)
    return Geometry(
        spacing and (spacing[1], spacing[0]),
        aspect,
        detector,
        isocentre,
        angles,
        given(dicom_tags.read, "PatientOrientation", 2, str),
        turned,
        tuple(problems),
    )


def _problem(path, field, found, wanted):
    try:
        errors.fail(path, field, found, wanted)
    except errors.InputError as error:
        return error


def _padding(path, header, pixels):
    first = dicom_tags.read(path, header, "PixelPaddingValue", 1)
    if first is None:
        return None
    last = dicom_tags.read(path, header, "PixelPaddingRangeLimit", 1) or first
    low, high = sorted((first[0], last[0]))
    return (pixels >= low) & (pixels <= high)


def _meaning(path, header, modality, rescale):
    """`values` and `sign` as the tags state them, or None.

    LIN and LOG describe how pixels depend on the beam (C.8.7.1.1.2, C.8.11.3.1.2). A LOG image of XA or RF has a modality LUT
    that makes it linear, so its sign is that of the LUT if no tag states one. Images FOR PRESENTATION were processed for
    display, so their tag is not used.
    """
    relationship = dicom_tags.word(path, header, "PixelIntensityRelationship")
    sign = dicom_tags.read(path, header, "PixelIntensityRelationshipSign", 1)
    if sign is not None and sign[0] not in (1, -1):
        errors.fail(path, "PixelIntensityRelationshipSign", sign[0], "1 or -1")
    sign = int(sign[0]) if sign else None
    if dicom_tags.word(path, header, "PresentationIntentType") == "FOR PRESENTATION":
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
        table = dicom_tags.read(path, header.ModalityLUTSequence[0], "LUTDescriptor", 3)
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
    slope, intercept = (dicom_tags.read(path, header, f"Rescale{name}", 1) for name in ("Slope", "Intercept"))
    if slope is None and intercept is None:
        return None
    if slope is None or intercept is None or slope[0] == 0:
        errors.fail(path, "RescaleSlope, RescaleIntercept", (slope, intercept), "both, the slope not 0")
    slope, intercept = slope[0], intercept[0]
    shown = "RescaleSlope, RescaleIntercept", (slope, intercept)
    factor = slope > 0 and intercept == 0
    return Rescale(lambda pixels: pixels * slope + intercept, int(np.sign(slope)), factor, shown)
