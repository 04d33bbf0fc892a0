"""A CT from DICOM: one series with its slices in order, in Hounsfield units.

pydicom parses and decodes (compressed slices through GDCM). Which slices form one straight volume without gaps is decided
here, from the position and orientation of each (DICOM PS3.3, C.7.6.2.1.1), never from instance numbers or file names. Series
that would give a distorted volume are refused.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
import warnings

import numpy as np
import pydicom
import pydicom.encaps
import pydicom.errors
import pydicom.pixels
import pydicom.uid

from data_pipelines.io import codestream
from data_pipelines.io import files
from radgs_jax import errors
from radgs_jax.geometry import rigid_host

CT_CLASSES = (
    pydicom.uid.CTImageStorage,
    pydicom.uid.EnhancedCTImageStorage,
    pydicom.uid.LegacyConvertedEnhancedCTImageStorage,
)
_COMPRESSED = (
    *pydicom.uid.JPEGTransferSyntaxes,
    *pydicom.uid.JPEGLSTransferSyntaxes,
    *pydicom.uid.JPEG2000TransferSyntaxes,
)
TILT_DEGREES = 0.1
"""Largest gantry tilt in degrees. It shears a body of 1.5 m by less than 3 mm. Chosen by hand: half may refuse rounded positions,
twice doubles that shear."""
UNEVEN_MM = 0.1
"""Largest distance in mm of a slice from its place in an evenly spaced stack. Chosen by hand: half may refuse rounded positions,
twice doubles the error of a bone's place."""
SAME_MM = 0.01
"""Slices that are nearer than this distance in mm are taken to be duplicates. Chosen by hand, far below any slice spacing; not
sensitive."""
MAX_GAP_STEPS = 1.5
"""Distance between slices, in medians, above which a slice is missing. Half way between one step and two."""
SAME_ORIENTATION = 1e-3
"""Largest difference of direction cosines that count as equal, or as perpendicular unit vectors. Chosen by hand for rounding: half
refuses cosines of three decimals, twice moves a pixel 250 mm away by half a millimetre."""
SAME_SPACING_MM = 1e-4
"""Largest difference in mm of pixel spacings that count as equal. Chosen by hand: at twice, a row of 512 is 0.1 mm off."""
MAX_SLICE_PIXELS = 2**26
"""Pixels of one slice: a bound on damaged headers. Chosen by hand; not sensitive."""
DEFERRED_BYTES = 2**20
"""Elements above this number of bytes are not read with the header. Chosen by hand; not sensitive."""
_EXTRA_BYTES = 2**26
"""Bytes of a file in addition to its pixels: private elements, overlays, padding. Chosen by hand: half may refuse files with large
private elements, twice lets a damaged file take more memory."""


@dataclasses.dataclass(frozen=True)
class _Slice:
    """One image of a series.

    Attributes:
      path, frame: its file, and its number in the file from 0.
      header: the header of the file.
      position: (3,) ImagePositionPatient, LPS mm.
      orientation: (2, 3) ImageOrientationPatient.
      spacing: (2,) PixelSpacing in mm, between rows and between columns.
      slope, intercept: HU = slope * stored + intercept.
    """

    path: pathlib.Path
    frame: int
    header: pydicom.Dataset
    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray
    slope: float
    intercept: float


def read_series(path: pathlib.Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one CT series.

    Files that are not DICOM, and DICOM objects that are not CT images (reports, presentation states), are ignored.

    Args:
      path: a folder of one series, searched with its subfolders, or a file that holds a multi-frame CT.

    Returns:
      HU (columns, rows, slices) float32, and the affine (4, 4) from these indices to RAS+ mm (DICOM's patient axes are LPS).

    Raises:
      InputError: there is no CT image, or several series; an image is a localizer; slices differ in size, orientation or
        spacing; the gantry is tilted; slices are missing, duplicate or unevenly spaced; pixel data is missing or damaged;
        values are not Hounsfield units.
    """
    path = pathlib.Path(path)
    # pydicom warns about every deviation from the standard, and logs it as well. Those that matter are checked below.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headers = _one_series(path, _headers(path))
        slices = [piece for file, header in headers for piece in _slices(file, header)]
        ordered, lps_from_index = _stack(path, slices)
        hu = _decode(ordered)
    return hu, rigid_host.LPS_FROM_RAS @ lps_from_index


def read_headers(path: pathlib.Path | str) -> list[pydicom.Dataset]:
    """The headers of the files of a CT series, without their pixels.

    Args:
      path: as for `read_series`.

    Raises:
      InputError: there is no CT image, or several series.
    """
    path = pathlib.Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [header for _, header in _one_series(path, _headers(path))]


@contextlib.contextmanager
def _readable(path, wanted):
    """Turns any exception of pydicom and its decoders into an InputError that names the file."""
    try:
        yield
    except errors.InputError:
        raise
    except MemoryError:
        errors.fail(path, "content", "more than fits into memory", wanted)
    except Exception as error:
        errors.fail(path, "content", f"{type(error).__name__}: {error}", wanted)


def _headers(path):
    """(file, header without pixels) of all CT images in a folder, or of one file."""
    found, other, odd = [], set(), []
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if not files.is_dicom(file):
            odd.append(file)
            continue
        with _readable(file, "a complete DICOM file"):
            syntax = pydicom.filereader.read_file_meta_info(file).get("TransferSyntaxUID")
            # pydicom inflates the whole dataset without a limit.
            if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
                errors.fail(file, "TransferSyntaxUID", "a deflated dataset", "any other transfer syntax")
            header = pydicom.dcmread(file, stop_before_pixels=True, defer_size=DEFERRED_BYTES)
            kind, modality = header.get("SOPClassUID"), header.get("Modality")
            if kind in CT_CLASSES or (kind is None and modality == "CT"):
                found.append((file, header))
            else:
                other.add(f"{modality} {pydicom.uid.UID(kind or '').name}".strip())
    # Ignoring a file whose name is that of a slice would lose a slice silently.
    damaged = [file for file in odd if file.suffix.lower() in (".dcm", ".ima") or file == path]
    if damaged:
        errors.fail(damaged[0], "content", "no DICOM mark at byte 128", "a complete DICOM file")
    if not found:
        errors.fail(path, "DICOM images", sorted(other) or "none", "the slices of a CT series")
    return found


def _one_series(path, headers):
    series = {}
    for file, header in headers:
        with _readable(file, "a complete DICOM file"):
            series.setdefault(str(header.get("SeriesInstanceUID")), []).append((file, header))
    if len(series) > 1:
        listed = "; ".join(
            f"{uid} ({len(members)} files, {str(members[0][1].get('SeriesDescription', 'no description'))!r},"
            f" {members[0][0].name})"
            for uid, members in sorted(series.items())
        )
        errors.fail(
            path, "SeriesInstanceUID", f"{len(series)} series: {listed}", "one series; name a folder with only it"
        )
    return headers


def _numbers(path, dataset, name, count):
    """`count` finite numbers in a data element."""
    value = None if dataset is None else dataset.get(name)
    if value is None or value == "":
        errors.fail(path, name, "nothing", f"{count} numbers" if count > 1 else "a number")
    try:
        numbers = np.array([float(v) for v in (value if count > 1 else [value])])
    except (TypeError, ValueError):
        numbers = np.array([np.nan])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        errors.fail(path, name, value, f"{count} finite numbers" if count > 1 else "a finite number")
    return numbers


def _item(dataset, sequence):
    items = dataset.get(sequence)
    return items[0] if items else None


def _slices(path, header):
    """The images in one file: one, or all frames of a multi-frame object."""
    with _readable(path, "a complete DICOM file"):
        _check_image(path, header)
        if header.get("SOPClassUID") not in CT_CLASSES[1:]:
            if header.get("NumberOfFrames") not in (None, "", 1):
                errors.fail(
                    path, "NumberOfFrames", header.NumberOfFrames, "1, or an Enhanced CT, whose frames have positions"
                )
            groups = [lambda sequence: header]
        else:
            count = int(_numbers(path, header, "NumberOfFrames", 1)[0])
            frames, shared = (
                header.get("PerFrameFunctionalGroupsSequence"),
                _item(header, "SharedFunctionalGroupsSequence"),
            )
            if not frames or len(frames) != count:
                found = f"{len(frames or [])} items for {count} frames"
                errors.fail(path, "PerFrameFunctionalGroupsSequence", found, "one for each frame")
            groups = [
                lambda sequence, own=own: _item(own, sequence) or (_item(shared, sequence) if shared else None)
                for own in frames
            ]
        return [_slice(path, number, header, group) for number, group in enumerate(groups)]


def _slice(path, number, header, group):
    """One image. `group(sequence)` returns the dataset with the elements of a functional group (PS3.3, C.7.6.16)."""
    kind = group("CTImageFrameTypeSequence")
    kinds = [*(header.get("ImageType") or []), *((kind.get("FrameType") if kind else None) or [])]
    if "LOCALIZER" in kinds:
        errors.fail(
            path, "ImageType", "a localizer (a scout view, no slice)", "axial slices; remove it from the folder"
        )
    values = group("PixelValueTransformationSequence")
    unit = values.get("RescaleType") if values is not None else None
    if unit not in (None, "", "HU", "HU_MOD"):
        errors.fail(path, "RescaleType", repr(unit), "HU")
    slope, intercept = (_numbers(path, values, f"Rescale{n}", 1)[0] for n in ("Slope", "Intercept"))
    if slope == 0:
        errors.fail(path, "RescaleSlope", 0, "a slope other than 0")
    orientation = _numbers(path, group("PlaneOrientationSequence"), "ImageOrientationPatient", 6).reshape(2, 3)
    if np.abs(orientation @ orientation.T - np.eye(2)).max() > SAME_ORIENTATION:
        errors.fail(path, "ImageOrientationPatient", orientation.ravel().tolist(), "two unit vectors at a right angle")
    spacing = _numbers(path, group("PixelMeasuresSequence"), "PixelSpacing", 2)
    if spacing.min() < 1e-3 or spacing.max() > 100:
        errors.fail(path, "PixelSpacing", spacing.tolist(), "two spacings from 0.001 to 100 mm")
    position = _numbers(path, group("PlanePositionSequence"), "ImagePositionPatient", 3)
    if np.abs(position).max() > 1e6:
        errors.fail(path, "ImagePositionPatient", position.tolist(), "a place within a kilometre")
    return _Slice(path, number, header, position, orientation, spacing, slope, intercept)


def _check_image(path, header):
    for name, wanted in (("SamplesPerPixel", (1,)), ("BitsAllocated", (8, 16, 32)), ("PixelRepresentation", (0, 1))):
        if header.get(name) not in wanted:
            errors.fail(path, name, header.get(name, "nothing"), " or ".join(map(str, wanted)))
    if header.get("PhotometricInterpretation") != "MONOCHROME2":
        errors.fail(
            path, "PhotometricInterpretation", header.get("PhotometricInterpretation", "nothing"), "MONOCHROME2"
        )
    size = [int(_numbers(path, header, name, 1)[0]) for name in ("Rows", "Columns")]
    if min(size) < 1 or math.prod(size) > MAX_SLICE_PIXELS:
        errors.fail(path, "Rows, Columns", size, "an image of 1 to 2^26 pixels")
    tilt = header.get("GantryDetectorTilt")
    if tilt not in (None, "") and abs(float(tilt)) > TILT_DEGREES:
        _fail_tilt(path, float(tilt), "GantryDetectorTilt")


def _fail_tilt(path, degrees, field):
    errors.fail(
        path,
        field,
        f"a gantry tilted by {degrees:.2f} degrees (its slices are sheared against each other, so shapes measured in them"
        " bend)",
        "slices stacked at right angles; resample the series on its scanner or workstation first",
    )


def _stack(path, slices):
    """Slices sorted along their normal, and lps_from_index (4, 4) for (column, row, slice)."""
    first = slices[0]
    for piece in slices[1:]:
        for name in ("Rows", "Columns"):
            if piece.header.get(name) != first.header.get(name):
                found = f"{piece.header.get(name)}, but {first.header.get(name)} in {first.path.name}"
                errors.fail(piece.path, name, found, "slices of one size")
        for name, a, b, tolerance in (
            ("ImageOrientationPatient", piece.orientation, first.orientation, SAME_ORIENTATION),
            ("PixelSpacing", piece.spacing, first.spacing, SAME_SPACING_MM),
        ):
            if np.abs(a - b).max() > tolerance:
                found = f"{a.ravel().tolist()}, but {b.ravel().tolist()} in {first.path.name}"
                errors.fail(piece.path, name, found, "the same in all slices")
    if len(slices) < 2:
        errors.fail(path, "slices", 1, "two or more: one slice is no volume")
    if len(slices) * first.header.Rows * first.header.Columns > files.MAX_VOXELS:
        found = f"{len(slices)} of {first.header.Columns} x {first.header.Rows}"
        errors.fail(path, "slices", found, f"{files.MAX_VOXELS} voxels at most")
    normal = np.cross(*first.orientation)
    slices = sorted(slices, key=lambda piece: piece.position @ normal)
    heights = np.array([piece.position @ normal for piece in slices])
    _check_heights(path, slices, heights)
    along = slices[-1].position - slices[0].position
    tilt = math.degrees(math.atan2(np.linalg.norm(along - normal * (along @ normal)), along @ normal))
    # Over few slices, rounded positions alone can give a large angle, so the displacement must be large as well.
    if tilt > TILT_DEGREES and np.linalg.norm(along - normal * (along @ normal)) > UNEVEN_MM:
        _fail_tilt(path, tilt, "ImagePositionPatient")
    step = along / (len(slices) - 1)
    off = np.linalg.norm([p.position - slices[0].position - i * step for i, p in enumerate(slices)], axis=1)
    if off.max() > max(UNEVEN_MM, 1e-3 * np.linalg.norm(step)):
        worst = int(off.argmax())
        found = f"a slice {off.max():.2f} mm from its place in an even stack of {np.linalg.norm(step):.3f} mm steps"
        errors.fail(slices[worst].path, "ImagePositionPatient", found, f"even spacing within {UNEVEN_MM} mm")
    lps_from_index = np.eye(4)
    # The column index runs along the first direction cosine, with the second PixelSpacing, and the row index vice versa.
    lps_from_index[:3, 0] = first.orientation[0] * first.spacing[1]
    lps_from_index[:3, 1] = first.orientation[1] * first.spacing[0]
    lps_from_index[:3, 2] = step
    lps_from_index[:3, 3] = slices[0].position
    return slices, lps_from_index


def _check_heights(path, slices, heights):
    gaps = np.diff(heights)
    for below, above, gap, height in zip(slices, slices[1:], gaps, heights):
        if gap < SAME_MM:
            found = f"one position ({height:.2f} mm along the normal) in {_name(below)} and {_name(above)}"
            errors.fail(path, "ImagePositionPatient", found, "every position once")
    step = float(np.median(gaps))
    for below, above, gap, height in zip(slices, slices[1:], gaps, heights):
        if gap > MAX_GAP_STEPS * step:
            missing = max(1, round(gap / step) - 1)
            found = (
                f"{missing} missing slice{'s' * (missing > 1)} between {height:.2f} and {height + gap:.2f} mm along the"
                f" normal, between {_name(below)} and {_name(above)}"
            )
            errors.fail(path, "slices", found, f"one every {step:.3f} mm")


def _name(piece):
    return piece.path.name + (f" (frame {piece.frame + 1})" if "NumberOfFrames" in piece.header else "")


def _decode(slices):
    """HU (columns, rows, slices) float32. Each file is opened once, and its frames are decoded one at a time."""
    rows, columns = int(slices[0].header.Rows), int(slices[0].header.Columns)
    hu = np.empty((columns, rows, len(slices)), np.float32, order="F")
    places = {}
    for place, piece in enumerate(slices):
        places.setdefault(piece.path, []).append((piece.frame, place, piece))
    for path, frames in places.items():
        with _readable(path, "pixel data that decodes"):
            frames.sort(key=lambda entry: entry[0])
            header = frames[0][2].header
            most = rows * columns * header.BitsAllocated // 8 * len(frames) + _EXTRA_BYTES
            if files.file_size(path, "a DICOM file") > most:
                errors.fail(
                    path, "size", f"{files.file_size(path, 'a DICOM file')} bytes", f"{most} at most for its pixels"
                )
            dataset = pydicom.dcmread(path)
            _check_pixels(path, dataset, len(frames))
            with codestream.silent():
                for image, (_, place, piece) in zip(pydicom.pixels.iter_pixels(dataset), frames, strict=True):
                    if image.shape != (rows, columns):
                        found = f"an image of {image.shape}"
                        errors.fail(path, "PixelData", found, f"{(rows, columns)} as its header says")
                    hu[:, :, place] = image.T
                    hu[:, :, place] *= np.float32(piece.slope)
                    hu[:, :, place] += np.float32(piece.intercept)
    return hu


def _check_pixels(path, dataset, count):
    """Checks the size of pixel data against the header before it is decoded."""
    if not dataset.get("PixelData"):
        errors.fail(path, "PixelData", "nothing", "the pixels of a slice")
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        size = dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8 * count
        held = len(dataset.PixelData)
        if held not in (size, size + size % 2):
            errors.fail(path, "PixelData", f"{held} bytes", f"the {size} of {dataset.Rows} x {dataset.Columns} pixels")
        return
    if syntax == pydicom.uid.RLELossless:
        return
    if syntax not in _COMPRESSED:
        wanted = "uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000"
        errors.fail(path, "TransferSyntaxUID", f"{syntax} ({syntax.name})", wanted)
    for frame in pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=count):
        codestream.check(path, frame, (dataset.Rows, dataset.Columns))
