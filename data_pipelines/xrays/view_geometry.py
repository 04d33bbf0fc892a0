"""Cameras of measured X-rays: calibration files, DICOM's nominal geometry, image orientation."""

import pathlib

import numpy as np

from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.simulation import carm
from radgs_jax import errors
from radgs_jax.geometry import camera

MAX_MATRIX_BYTES = 2**20


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
      `camera.Camera`.
    Raises:
      InputError: missing or mistyped entries, a singular, skewed or mirrored projection, another image size or aspect.
    """
    path = pathlib.Path(path)
    where, value = _calibration_entry(path, view)
    if not isinstance(value, dict):
        value = {"P": value}
    size = tuple(value.get(name, n) for name, n in zip(("height", "width"), shape))
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= 10**6 for n in size):
        errors.fail(path, f"{where}.height, width", size, "positive whole numbers")
    factor = max(1, round(size[0] / shape[0]))
    if (size[0] // factor, size[1] // factor) != tuple(shape):
        errors.fail(path, f"{where}.height, width", size, f"those of the X-ray, {tuple(shape)}, or a multiple of them")
    if "P" in value and not ("K" in value and "E" in value):
        value = {"P": camera_files.check_matrix(path, f"{where}.P", value["P"], (3, 4))}
    elif mirrored:
        whole = camera_files.read_view(path, where, value, size)
        value = camera_files.view_json(whole, "")
        value = {"P": np.asarray(value["P"])}
    if mirrored:
        value = {"P": np.array([[-1, 0, size[1] - 1], [0, 1, 0], [0, 0, 1.0]]) @ value["P"]}
    found = camera_files.read_view(path, where, {**value, "height": size[0], "width": size[1]})
    ratio = found.intrinsics[0] / found.intrinsics[1]
    if not 0.1 < ratio < 10 or aspect is not None and abs(ratio / aspect - 1) > 0.02:
        errors.fail(path, f"{where}: fx / fy", f"{ratio:.4g}", f"{aspect or 1:.4g}, the pixel's height over its width")
    return camera.bin(found, factor)


def _calibration_entry(path, view):
    """Where and what: one entry of a calibration file."""
    kind = path.suffix.lower()
    if kind == ".npy":
        return "matrix", files.read_npy(path)
    if kind == ".txt":
        return "matrix", _read_matrix(path)
    if kind != ".json":
        errors.fail(path, "name", repr(path.name), "a calibration .json, .txt or .npy")
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
        errors.fail(path, "option view", repr(view), shown)
    return f"views[{view!r}]", value[view]


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


def view_from_carm(shape, pixel_mm, source_detector_mm, source_isocentre_mm, primary_deg, secondary_deg):
    """The nominal camera of a C-arm by DICOM's angles (PS3.3 C.8.7.5.1.2), the principal point in the image's centre.

    DICOM's angles tell where the detector is: 0, 0 before the chest, primary +90 on the patient's left (LAO), secondary +90 at
    the head. `carm.extrinsics` tells where the source is, which is opposite: its primary angle is DICOM's + 180, its secondary
    minus DICOM's. So DICOM 180 is AP, and -90 is the lateral of `carm.VIEWS`. The world's axes are the patient's to which the
    angles refer: +x right, +y anterior, +z to the head.

    Args:
      shape: (height, width) as the source sees it; pixel_mm: (u, v) on the detector; distances in mm, angles in degrees.
    Returns:
      `camera.Camera`, camera_from_world in mm.
    """
    focal = source_detector_mm / np.asarray(pixel_mm, np.float64)
    centre = 0.5 * (np.array(shape[::-1]) - 1)
    E = carm.extrinsics(primary_deg + 180.0, -secondary_deg, source_isocentre_mm)
    return camera.Camera(np.concatenate([focal, centre]), E, *shape)


_DIRECTIONS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}


def nominal_view(path, stored, shape, calibration, options):
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
        errors.fail(path, "DistanceSourceToPatient", stored.source_isocentre_mm, "less than DistanceSourceToDetector")
    if abs(stored.angles_deg[0]) > 180 or abs(stored.angles_deg[1]) > 90:
        errors.fail(path, "positioner angles", stored.angles_deg, "primary within 180, secondary within 90 degrees")
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
            errors.fail(path, "PatientOrientation", orientation, "two directions of the letters L, R, A, P, H, F")
        total = sum(np.array(_DIRECTIONS[letter]) * 0.5**k for k, letter in enumerate(word))
        directions.append(total / max(np.linalg.norm(total), 1e-9))
    along = np.array(directions) @ camera_from_world[:2, :3].T  # stored u, v by camera x, y
    swap = abs(along[0, 1]) + abs(along[1, 0]) > abs(along[0, 0]) + abs(along[1, 1])
    if swap:
        along = along[::-1]
    if min(abs(along[0, 0]), abs(along[1, 1])) < 0.5:
        errors.fail(path, "PatientOrientation", orientation, "axes of the detector at the positioner's angles")
    return bool(swap), bool(along[0, 0] < 0), bool(along[1, 1] < 0)


def move_camera(image, moves):
    swap, mirror_u, mirror_v = moves
    image = image.T if swap else image
    return image[:: -1 if mirror_v else 1, :: -1 if mirror_u else 1]


def file_from_image(shape, moves):
    swap, mirror_u, mirror_v = moves
    height, width = shape[::-1] if swap else shape
    matrix = np.eye(3)
    if mirror_u:
        matrix[0] = [-1, 0, width - 1]
    if mirror_v:
        matrix[1] = [0, -1, height - 1]
    return matrix[[1, 0, 2]] if swap else matrix
