"""Whether X-rays can be of one acquisition: other pixels, one patient, one study, one table position, one time."""

import collections.abc
import datetime
import itertools
import pathlib
import typing

import numpy as np

from data_pipelines.xrays import remarks
from data_pipelines.xrays.stored_images import Stored
from radgs_jax import errors
from radgs_jax.geometry.camera import Camera

if typing.TYPE_CHECKING:
    import pydicom

SAME_CORRELATION = 0.9995
"""Correlation of the pixels of two files above which they are one image, brighter or in another format. Chosen by hand: two views a
degree apart stay below 0.99, and an image of 8 bits has more with its original; the distance from 1 could be half or twice."""
COMPARED_PX = 128
"""Pixels along a side, at most, at which they are compared. Chosen by hand: half still tells two views apart."""
TABLE_MM, TABLE_DEG = 3.0, 1.0
"""Movement of the table between X-rays, in mm and degrees, that is remarked on, or refused where the geometry is the machine's own.
Chosen by hand: tables are read to about 1 mm, and twice would be a wrong pose by 6 mm."""
LONG_S = 3600.0
"""Time between X-rays that is remarked on, in seconds. Chosen by hand: an operation's pair is minutes apart; half or twice asks the
same question a little earlier or later."""
SAME_CAMERA = 1e-6
"""Relative difference of two projections below which they are one camera. Chosen by hand: rounding in files is smaller; not
sensitive."""
_PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
"""Elements that are the same in all X-rays of a patient."""
_PART = ("BodyPartExamined", "Laterality", "ImageLaterality")
"""Elements that say which part of the body is seen."""
_TABLE_POSITIONS = (
    ("TableHeight", "TableTopVerticalPosition", "TableTopLongitudinalPosition", "TableTopLateralPosition")
    + ("TableXPositionToIsocenter", "TableYPositionToIsocenter", "TableZPositionToIsocenter")
    + ("TableVerticalIncrement", "TableLateralIncrement", "TableLongitudinalIncrement")
)
"""Elements that say where the table is, in mm (PS3.3 C.8.7.4, C.8.19.6.11, C.8.8.14)."""
_TABLE_ANGLES = ("TableAngle", "TableHorizontalRotationAngle", "TableHeadTiltAngle", "TableCradleTiltAngle")
"""Elements that say how it is turned, in degrees."""


def facts(header: "pydicom.Dataset", frame: int) -> dict[str, typing.Any]:
    """What a DICOM header says about patient, study, time and table, by keyword. What cannot be read is left out.

    Args:
      header: the data set.
      frame: number of the frame. Increments of a moving table have a number for each.
    """
    found: dict[str, typing.Any] = {}
    for keyword in (*_PATIENT, *_PART, "StudyInstanceUID"):
        text = _text(header, keyword)
        if text:
            found[keyword] = text
    for keyword in (*_TABLE_POSITIONS, *_TABLE_ANGLES):
        try:
            value = header.get(keyword)
            many = value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
            number = float(many[frame if len(many) > 1 else 0])
        except Exception:  # pydicom converts on access, with various exceptions
            continue
        if np.isfinite(number):
            found[keyword] = number
    time = _time(header)
    if time is not None:
        found["time"] = time
    return found


def _text(header, keyword):
    """A text in the form that two files are compared in: without case, padding and empty parts of a name."""
    try:
        text = str(header.get(keyword) or "")
    except Exception:  # as above
        return ""
    return " ".join(text.replace("^", " ").replace("=", " ").split()).casefold()


def _time(header):
    for name in ("AcquisitionDateTime", "AcquisitionDate", "ContentDate", "SeriesDate", "StudyDate"):
        text = _text(header, name)
        if name != "AcquisitionDateTime":
            text = text.replace(".", "")[:8] + _text(header, name.replace("Date", "Time")).replace(":", "")
        try:
            return datetime.datetime.strptime(text[:14], "%Y%m%d%H%M%S")
        except ValueError:
            continue
    return None


def compare(
    paths: collections.abc.Sequence[pathlib.Path | str], views: collections.abc.Sequence[Stored], calibrated: bool
) -> None:
    """Checks that X-rays can be of one acquisition.

    Names and numbers of patients are compared, and never shown.

    Args:
      paths: their files.
      views: their content.
      calibrated: whether a calibration says where the cameras are. Without one the geometry is that of the C-arm, in which a
        table that has moved carries the patient with it; with one that may be known.

    Raises:
      InputError: two are the same image, or of different patients, or the table has moved.
    """
    for (first, a), (second, b) in itertools.combinations(list(zip(paths, views)), 2):
        _compare_pixels(first, second, a.pixels, b.pixels)
        _compare_facts(first, second, a.facts, b.facts, calibrated)


def _compare_pixels(first, second, a, b):
    for turned, form in _symmetries(b):
        if turned.shape != a.shape:
            continue
        if np.array_equal(a, turned):
            found = f"the same pixels as in {first}{form}"
        elif abs(_correlation(a, turned)) > SAME_CORRELATION:
            found = f"the same image as in {first}{form}, with other numbers"
        else:
            continue
        errors.fail(second, "pixels", found, "two X-rays from different sides: the same image twice shows no depth")


def _symmetries(image):
    for transposed, name in ((image, ""), (image.T, "transposed")):
        for step_v, step_u in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            mirrored = {(1, -1): "mirrored", (-1, 1): "upside down", (-1, -1): "turned by 180 degrees"}.get(
                (step_v, step_u), ""
            )
            words = [word for word in (name, mirrored) if word]
            yield transposed[::step_v, ::step_u], f" ({', '.join(words)})" if words else ""


def _correlation(a, b):
    """Correlation of two images of one shape, at every few pixels: no means, which could not be mirrored exactly."""
    step = max(1, max(a.shape) // COMPARED_PX)
    a, b = (np.nan_to_num(x[step // 2 :: step, step // 2 :: step].astype(np.float64)).ravel() for x in (a, b))
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a**2).sum() * (b**2).sum())
    return (a * b).sum() / size if size > 0 else 0.0


def _compare_facts(first, second, a, b, calibrated):
    both = set(a) & set(b)
    for keyword in _PATIENT:
        if keyword in both and a[keyword] != b[keyword]:
            errors.fail(second, keyword, f"another than in {first}: different patients", "X-rays of one patient")
    if "StudyInstanceUID" in both and a["StudyInstanceUID"] != b["StudyInstanceUID"]:
        remarks.remark(second, "StudyInstanceUID", f"another study than in {first}", "taken as one acquisition")
    for keyword in _PART:
        if keyword in both and a[keyword] != b[keyword]:
            found = f"{b[keyword].upper()!r}, and {a[keyword].upper()!r} in {first}"
            remarks.remark(second, keyword, found, "taken as one acquisition")
    if "time" in both:
        apart = abs((a["time"] - b["time"]).total_seconds())
        if apart > LONG_S:
            remarks.remark(
                second, "acquisition time", f"{apart / 3600:.1f} hours from {first}", "taken as one acquisition"
            )
    for keyword in (*_TABLE_POSITIONS, *_TABLE_ANGLES):
        unit, most = ("mm", TABLE_MM) if keyword in _TABLE_POSITIONS else ("degrees", TABLE_DEG)
        moved = abs(a[keyword] - b[keyword]) if keyword in both else 0.0
        if moved > most:
            found = f"a table {moved:.1f} {unit} from where it is in {first}"
            if not calibrated:
                wanted = (
                    f"{most:g} {unit} at most: the patient has moved with it; or --cameras that hold for the patient"
                )
                errors.fail(second, keyword, found, wanted)
            remarks.remark(second, keyword, found, "the cameras are taken to hold for the patient, not for the room")


def compare_cameras(
    paths: collections.abc.Sequence[pathlib.Path | str], cameras: collections.abc.Sequence[Camera], source: object
) -> None:
    """Checks that no two X-rays have the same camera.

    Args:
      paths: the X-rays.
      cameras: their cameras.
      source: the file that the cameras are from, or a word, named in errors.

    Raises:
      InputError: two are the same.
    """
    for (i, a), (j, b) in itertools.combinations(enumerate(cameras), 2):
        same = np.allclose(a.intrinsics, b.intrinsics, rtol=SAME_CAMERA, atol=0)
        distance = np.linalg.norm(a.camera_from_world[:3, 3])
        apart = np.abs(a.camera_from_world - b.camera_from_world)[:3] / [1.0, 1.0, 1.0, distance]
        if same and apart.max() < SAME_CAMERA:
            found = f"one camera for {paths[i]} and {paths[j]}"
            errors.fail(source, "cameras", found, "one camera for each X-ray: they are from different sides")
