"""The camera of a measured X-ray, from a calibration file or from DICOM's nominal geometry, and the image's orientation."""

import pathlib

import numpy as np

from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.simulation import carm
from data_pipelines.xrays import stored_images
from radgs_jax import errors
from radgs_jax.geometry import camera

MAX_MATRIX_BYTES = 2**20
"""Bytes of a text file with a matrix: a bound on files of another kind. Chosen by hand; not sensitive."""
MAX_CALIBRATION_PX = 10**6
"""Largest height or width in pixels that a calibration may name. Chosen by hand to catch damaged files; not sensitive."""
ASPECT_TOLERANCE = 0.02
"""Largest relative difference between the focal lengths' ratio and the pixel's. Chosen by hand: half may refuse real calibrations,
twice misses more swapped axes."""
ASPECT_RANGE = (0.1, 10)
"""Ratio of the focal lengths where the pixel's is unknown. Chosen by hand to catch damaged files; not sensitive."""
LETTER_WEIGHT = 0.5
"""Weight of each letter of PatientOrientation relative to the one before it, since DICOM gives no angles. Chosen by hand: half or
twice still gives the same axis, as the letters come in order of weight."""
NOMINAL = "DICOM tags, nominal"
"""Where a camera comes from that no calibration has corrected."""
NOMINAL_SD = (5.0, 1.0)
"""Root mean square error of nominal cameras about the isocentre, mm and degrees. Chosen by hand: tags are rounded, and a C-arm
sags by some millimetres as it turns. Half understates what old machines do; twice leaves poses in the world less certain."""
MIN_ALONG = 0.5
"""Smallest cosine between an image axis and the camera axis that it is assigned to: 60 degrees. Chosen by hand: half accepts tags
that contradict the angles, twice refuses everything but exact tags."""


def read_calibration(
    path: pathlib.Path | str,
    shape: tuple[int, int],
    view: int | str | None = None,
    mirrored: bool = False,
    aspect: float | None = None,
) -> camera.Camera:
    """The camera of an X-ray, from world mm to pixels of its file, from a calibration file.

    JSON: {'P': 3x4} or {'K': 3x3, 'E': 4x4}; a plain 3x4 list; or several of these in a list, by name, or under 'views'.
    'height' and 'width' may give the size of a larger image, of which the X-ray is a whole-number binning; the camera is
    then binned exactly. TXT, NPY: a 3x4 matrix. P may have any scale and sign. The isocentre, which is the world's origin,
    must be in front of the source.

    Args:
      path: the calibration file.
      shape: (height, width) of the X-ray.
      view: number or name of the entry, in a file with several.
      mirrored: mirror the columns of P, for an image that is mirrored as well.
      aspect: height over width of a panel pixel, or None if unknown.

    Raises:
      InputError: an entry is missing or mistyped, the projection is singular, skewed or mirrored, the image size is another, or
        the ratio of the focal lengths differs from `aspect` by more than ASPECT_TOLERANCE.
    """
    path = pathlib.Path(path)
    names, value = _calibration_entries(path)
    where = "matrix" if path.suffix.lower() in (".npy", ".txt") else "view"
    if names is not None:
        if view is None and len(names) == 1:
            view = names[0]
        if view not in names or isinstance(view, bool):
            shown = f"a whole number from 0 to {len(names) - 1}" if isinstance(value, list) else f"one of {names[:20]}"
            errors.fail(path, "ReadOptions.view", repr(view), shown)
        where, value = f"views[{view!r}]", value[view]
    if not isinstance(value, dict):
        value = {"P": value}
    size = tuple(value.get(name, n) for name, n in zip(("height", "width"), shape))
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= MAX_CALIBRATION_PX for n in size):
        errors.fail(path, f"{where}.height, width", size, "positive whole numbers")
    factor = max(1, round(size[0] / shape[0]))
    if (size[0] // factor, size[1] // factor) != tuple(shape):
        errors.fail(path, f"{where}.height, width", size, f"those of the X-ray, {tuple(shape)}, or a multiple of them")
    value = {**value, "height": size[0], "width": size[1]}
    found = camera_files.read_camera(path, where, value, mirrored=mirrored)
    ratio = found.intrinsics[0] / found.intrinsics[1]
    low, high = ASPECT_RANGE
    if not low < ratio < high or aspect is not None and abs(ratio / aspect - 1) > ASPECT_TOLERANCE:
        errors.fail(path, f"{where}: fx / fy", f"{ratio:.4g}", f"{aspect or 1:.4g}, the pixel's height over its width")
    return camera.bin(found, factor)


def check_count(path: pathlib.Path | str, count: int) -> None:
    """Checks that a calibration file has one entry for each of `count` X-rays, in their order.

    Raises:
      InputError: it has fewer or more, or names in place of an order, or is not readable.
    """
    path = pathlib.Path(path)
    names, value = _calibration_entries(path)
    if isinstance(value, dict) and names is not None and count > 1:
        found = f"cameras with names: {', '.join(map(str, names[:5]))}"
        errors.fail(path, "cameras", found, f"a list of {count}, in the order of the X-rays")
    if names is None and count > 1:
        errors.fail(path, "cameras", f"one camera for {count} X-rays", f"a list of {count}, one per X-ray")
    if names is not None and len(names) != count:
        errors.fail(path, "views", len(names), f"a list of {count}, one per X-ray")


def _calibration_entries(path):
    """Names or numbers of the entries in a calibration file, and its value; no names if it is a single entry."""
    kind = path.suffix.lower()
    if kind == ".npy":
        return None, files.read_npy(path)
    if kind == ".txt":
        return None, _read_matrix(path)
    if kind != ".json":
        errors.fail(path, "name", repr(path.name), "a calibration .json, .txt or .npy")
    value = files.read_json(path)
    if isinstance(value, dict) and isinstance(value.get("views"), (list, dict)):
        value = value["views"]
    if isinstance(value, dict) and not {"P", "K", "E"} & set(value):
        return list(value), value
    if isinstance(value, list) and value and not (isinstance(value[0], list) and _is_row(value[0])):
        return list(range(len(value))), value
    return None, value


def _is_row(value):
    return all(not isinstance(v, (list, dict)) for v in value)


def _read_matrix(path):
    try:
        if path.stat().st_size > MAX_MATRIX_BYTES:
            errors.fail(path, "size", f"{path.stat().st_size} bytes", "a 3x4 matrix")
        lines = [line.replace(",", " ").split() for line in path.read_text().splitlines()]
        return [[float(word) for word in line] for line in lines if line and not line[0].startswith("#")]
    except errors.InputError:
        raise
    except (OSError, ValueError) as error:
        errors.fail(path, "content", f"{error}"[:120], "three lines of four numbers")


def carm_camera(
    shape: tuple[int, int],
    pixel_mm: tuple[float, float],
    source_detector_mm: float,
    source_isocentre_mm: float,
    primary_deg: float,
    secondary_deg: float,
) -> camera.Camera:
    """The nominal camera of a C-arm from DICOM's angles (PS3.3 C.8.7.5.1.2). The principal point is the image's centre.

    DICOM's angles give the place of the panel: 0, 0 in front of the chest, primary +90 on the patient's left (LAO), secondary
    +90 at the head. The angles of `carm.extrinsics` give the place of the source, which is opposite: the primary one is
    DICOM's + 180, the secondary one is minus DICOM's. So DICOM's primary 180 is AP, and -90 is the lateral of `carm.VIEWS`.
    The axes of the world are the patient's: +x right, +y anterior, +z to the head.

    Args:
      shape: (height, width) as the source sees the image.
      pixel_mm: (u, v) pixel pitch on the panel.
      source_detector_mm, source_isocentre_mm: distances from the source.
      primary_deg, secondary_deg: DICOM's positioner angles.
    """
    focal = source_detector_mm / np.asarray(pixel_mm, np.float64)
    centre = 0.5 * (np.array(shape[::-1]) - 1)
    E = carm.extrinsics(primary_deg + 180.0, -secondary_deg, source_isocentre_mm)
    return camera.Camera(np.concatenate([focal, centre]), E, *shape)


_DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}


Moves = tuple[bool, bool, bool]
"""How an image is turned from the file's pixels to the source's view: transpose, then mirror columns, then mirror rows."""


def find_camera(
    path: pathlib.Path | str,
    stored: stored_images.Stored,
    calibration: pathlib.Path | str | None,
    view: int | str | None,
    mirrored: bool,
) -> tuple[camera.Camera | None, Moves, str]:
    """The camera of an X-ray, from its calibration file, or else from the DICOM tags.

    Args:
      path: the X-ray's file, named in errors.
      stored: its content.
      calibration, view, mirrored: as `path`, `view` and `mirrored` of `read_calibration`; no calibration file if None.

    Returns:
      The camera, or None if the tags give none; the moves of the image; where the camera is from, or why there is none.

    Raises:
      InputError: as `read_calibration`, or tags contradict each other.
    """
    shape = stored.pixels.shape
    as_stored = (False, mirrored, False)
    if calibration is not None:
        found = read_calibration(calibration, shape, view, mirrored, stored.geometry.aspect)
        return found, as_stored, f"calibration {calibration}"
    geometry = stored.geometry
    if geometry.problems:
        raise geometry.problems[0]
    missing = [
        name
        for name, value in (
            ("ImagerPixelSpacing", geometry.pixel_mm),
            ("DistanceSourceToDetector", geometry.source_detector_mm),
            ("DistanceSourceToPatient", geometry.source_isocentre_mm),
            ("positioner angles of a still C-arm", geometry.angles_deg),
        )
        if value is None
    ]
    if missing:
        return None, as_stored, f"none: no {', '.join(missing)}"
    if geometry.orientation is None and geometry.turned:
        return None, as_stored, "none: FieldOfViewRotation or flip without PatientOrientation"
    distances = (geometry.source_detector_mm, geometry.source_isocentre_mm)
    upright = carm_camera(shape, geometry.pixel_mm, *distances, *geometry.angles_deg)
    moves = _moves(path, geometry.orientation, upright.camera_from_world)
    if moves[0]:
        upright = carm_camera(shape[::-1], geometry.pixel_mm[::-1], *distances, *geometry.angles_deg)
    return upright, moves, NOMINAL


def _moves(path, orientation, camera_from_world):
    """Moves that turn an image into the camera's axes.

    orientation: DICOM's PatientOrientation, directions along u and along v. None takes the image as XA images are displayed, seen
      by an observer who faces the patient, which mirrors the source's view.
    """
    if orientation is None:
        return False, True, False
    directions = []
    for word in orientation:
        # The first letter has the largest weight: 'LF' is left and slightly towards the feet.
        if not word or not set(word) <= set(_DIRECTIONS):
            errors.fail(path, "PatientOrientation", orientation, "two directions of the letters L, R, A, P, H, F")
        total = sum(np.array(_DIRECTIONS[letter]) * LETTER_WEIGHT**k for k, letter in enumerate(word))
        directions.append(total / max(np.linalg.norm(total), 1e-9))
    along = np.array(directions) @ camera_from_world[:2, :3].T  # [stored u or v, camera x or y]
    swap = abs(along[0, 1]) + abs(along[1, 0]) > abs(along[0, 0]) + abs(along[1, 1])
    if swap:
        along = along[::-1]
    if min(abs(along[0, 0]), abs(along[1, 1])) < MIN_ALONG:
        errors.fail(path, "PatientOrientation", orientation, "axes of the detector at the positioner's angles")
    return bool(swap), bool(along[0, 0] < 0), bool(along[1, 1] < 0)


def apply_moves(image: np.ndarray, moves: Moves) -> np.ndarray:
    """An image (H, W) of the file, turned to the source's view."""
    swap, mirror_u, mirror_v = moves
    image = image.T if swap else image
    return image[:: -1 if mirror_v else 1, :: -1 if mirror_u else 1]


def file_from_image(shape: tuple[int, int], moves: Moves) -> np.ndarray:
    """(3, 3) from homogeneous pixels (u, v, 1) of the turned image to those of the file; `shape` is the file's."""
    swap, mirror_u, mirror_v = moves
    height, width = shape[::-1] if swap else shape
    matrix = np.eye(3)
    if mirror_u:
        matrix[0] = [-1, 0, width - 1]
    if mirror_v:
        matrix[1] = [0, -1, height - 1]
    return matrix[[1, 0, 2]] if swap else matrix
