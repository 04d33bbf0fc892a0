"""Files of other programs' cameras as records, and the K and E of each in our convention.

A file holds the cameras of one acquisition, or each view has a file of its own. JSON: an object for a view, a list of them, or
such a list under "views". NPZ: the same names, stacked along a first axis where there are several views. What an object holds
depends on the convention; docs/cameras.md has the tables.
"""

import math
import pathlib
import typing
import zipfile
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.cameras import conventions
from data_pipelines.cameras import gantry_conventions
from data_pipelines.cameras import gantry_files
from data_pipelines.cameras.conventions import Options
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.xrays import image_files
from data_pipelines.xrays import view_geometry
from radgs_jax import errors

MAX_NAMES = 64
"""Arrays in an npz file of cameras: a bound on files of another kind. Chosen by hand; not sensitive."""


LARGEST, SMALLEST = 1e9, 1e-6
"""Largest number of a camera, and smallest distance, mm, so that products stay finite: bounds on damaged files; not sensitive."""
_MATRICES = ("P", "K", "E", "R", "pose", "direction", "final_pose", "init_pose")
_VECTORS = (
    "t",
    "rvec",
    "rotation",
    "translation",
    "origin",
    "spacing",
    "isocenter",
    "size",
    "pixel_mm",
    "ImagerPixelSpacing",
)
RANKS = dict.fromkeys(_MATRICES, 2) | dict.fromkeys(_VECTORS, 1)
"""Axes of a view's array by name; other names are numbers. An array with one more axis is a stack of views."""


class Record(typing.NamedTuple):
    """One view as it is in a file: the file, the place in it, and the values by name."""

    path: pathlib.Path
    where: str
    value: Mapping[str, Any]


def read(convention: str, paths: Sequence[pathlib.Path | str]) -> list[Record]:
    """The views in files of one convention, in order.

    Raises:
      InputError: a file is unreadable or of another kind.
    """
    found = []
    for path in map(pathlib.Path, paths):
        if convention == "rtk":
            found += [Record(path, f"Projection {i}", p) for i, p in enumerate(gantry_files.read_rtk(path), 1)]
        elif convention == "plastimatch":
            found.append(Record(path, "file", gantry_files.read_plastimatch(path)))
        elif convention == "dicom" and image_files.is_dicom(path):
            # A C-arm that stands still has one camera in all frames.
            found.append(Record(path, "file", {"file": image_files.load_stored(path, 0)}))
        else:
            found += _records(path)
    return found


def _records(path):
    """The views in a JSON, NPY or NPZ file."""
    kind = path.suffix.lower()
    if kind == ".npy":
        P = files.read_npy(path)
        stack = P[None] if P.ndim == 2 else P
        return [Record(path, f"[{i}]", {"P": one}) for i, one in enumerate(stack)]
    if kind == ".npz":
        return _stacked(path)
    if kind != ".json":
        wanted = "a .json, .npy or .npz file; other files hold code or another format: docs/cameras.md"
        errors.fail(path, "name", repr(path.name), wanted)
    value = files.read_json(path)
    if isinstance(value, dict) and isinstance(value.get("views"), list):
        value = value["views"]
    if isinstance(value, dict):
        return [Record(path, "view", value)]
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        errors.fail(path, "content", repr(value)[:60], "an object for each view, or a list of them")
    return [Record(path, f"views[{i}]", one) for i, one in enumerate(value)]


def _stacked(path):
    """The views in an NPZ file: arrays of matrices may have a first axis for the views."""
    files.file_size(path, "an npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename.removesuffix(".npy") for info in archive.infolist()[: MAX_NAMES + 1]]
    except (OSError, zipfile.BadZipFile) as error:
        errors.fail(path, "content", error, "an npz file")
    if len(names) > MAX_NAMES:
        errors.fail(path, "arrays", f"more than {MAX_NAMES}", "those of cameras")
    arrays = files.read_npz(path, *names)
    counts = {len(a) for name, a in arrays.items() if a.ndim > RANKS.get(name, 0)}
    if len(counts) > 1 or not names:
        found = f"stacks of {sorted(counts)} views" if names else "none"
        errors.fail(path, "arrays", found, "those of cameras, for one number of views")
    views = []
    for i in range(counts.pop() if counts else 1):
        value = {name: a[i] if a.ndim > RANKS.get(name, 0) else a for name, a in arrays.items()}
        views.append(Record(path, f"[{i}]", {n: a.item() if np.ndim(a) == 0 else a for n, a in value.items()}))
    return views


def _is_number(value):
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _number(record: Record, name: str, default: float | None = None) -> float:
    """A finite number of a record; without a default it must be there."""
    value = record.value.get(name)
    if value is None:
        if default is None:
            errors.fail(record.path, f"{record.where}.{name}", "nothing", "a number")
        return default
    if not _is_number(value) or not abs(value) <= LARGEST:
        errors.fail(record.path, f"{record.where}.{name}", repr(value)[:60], f"a number, {LARGEST:g} at most")
    return float(value)


def _positive(record: Record, name: str, default: float | None = None) -> float:
    value = _number(record, name, default)
    if not value >= SMALLEST:
        errors.fail(record.path, f"{record.where}.{name}", value, f"a number above 0, {SMALLEST:g} at least")
    return value


def _matrix(record, name, *shapes):
    """A matrix of a record, of one of `shapes`; a leading axis of one view, as torch's batches have, is dropped."""
    value, where = record.value[name], f"{record.where}.{name}"
    shape = camera_files.nested_shape(value)
    if len(shape) == len(shapes[0]) + 1 and shape[0] == 1:
        value, shape = value[0], shape[1:]
    found = camera_files.check_matrix(record.path, where, value, shape if shape in shapes else shapes[0])
    # P may have any scale.
    if name != "P" and np.abs(found).max() > LARGEST:
        errors.fail(record.path, where, f"numbers up to {np.abs(found).max():.3g}", f"{LARGEST:g} at most")
    return found


def size_of(record: Record, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the image, pixels: the record's, or else `size`.

    Raises:
      InputError: neither, or no whole numbers.
    """
    value, found = record.value, size
    for names in (("height", "width"), ("Rows", "Columns")):
        if all(value.get(name) is not None for name in names):
            found = tuple(value[name] for name in names)
    if value.get("size") is not None and camera_files.nested_shape(value["size"]) in ((2,), (3,)):
        found = tuple(value["size"])[1::-1]  # ITK's order is width, height
    if found is None:
        errors.fail(record.path, f"{record.where}: image size", "nothing", "height and width, or --size=HEIGHTxWIDTH")
    whole = all(_is_number(n) and 0 < n <= camera_files.MAX_SIDE_PX and n == int(n) for n in found)
    if not whole:
        wanted = f"whole numbers from 1 to {camera_files.MAX_SIDE_PX}"
        errors.fail(record.path, f"{record.where}: height, width", found, wanted)
    return int(found[0]), int(found[1])


def pitch_of(record: Record, options: Options) -> tuple[float, float] | None:
    """The pixel pitch (u, v), mm, of a record or else of the options, or None.

    Raises:
      InputError: no numbers above 0.
    """
    if record.value.get("pixel_mm") is None:
        return options.pixel_mm
    value = record.value["pixel_mm"]
    values = [value] if _is_number(value) else list(value) if camera_files.nested_shape(value) in ((1,), (2,)) else []
    if not values or not all(_is_number(v) and SMALLEST <= v <= LARGEST for v in values):
        errors.fail(record.path, f"{record.where}.pixel_mm", repr(value)[:60], "one or two numbers above 0")
    return float(values[0]), float(values[-1])


def _column(value):
    """A vector of OpenCV's, which are matrices of one column, as a row."""
    return np.reshape(value, 3) if camera_files.nested_shape(value) in ((3, 1), (1, 3)) else value


def _from_matrices(record, size, options):
    names = {
        "P": ((3, 4), (4, 3)),
        "K": ((3, 3),),
        "E": ((4, 4), (3, 4)),
        "R": ((3, 3),),
        "t": ((3,),),
        "rvec": ((3,),),
    }
    value = {name: _column(v) if name in ("t", "rvec") else v for name, v in record.value.items()}
    record = record._replace(value=value)
    given = {name: _matrix(record, name, *shapes) for name, shapes in names.items() if value.get(name) is not None}
    pose = "E" in given or ("t" in given and ("R" in given or "rvec" in given))
    if not ("K" in given and pose) and "P" not in given:
        wanted = "P, or K and one of: E, R and t, rvec and t"
        errors.fail(record.path, record.where, f"the keys {list(value)}", wanted)
    if not ("K" in given and pose):
        given = {"P": given["P"]}
    if "E" in given and given["E"].shape == (3, 4):
        given["E"] = np.concatenate([given["E"], [[0.0, 0.0, 0.0, 1.0]]])
    if "K" in given:
        _check_rotation(record, "E" if "E" in given else "R", given, options)
    if "K" in given and (min(abs(given["K"][0, 0]), abs(given["K"][1, 1])) < SMALLEST):
        errors.fail(record.path, f"{record.where}.K", given["K"].tolist(), "two focal lengths that are not 0")
    found = conventions.from_matrices(record.path, given, size, options)
    if "P" in given and "K" in given:
        both = conventions.from_matrices(record.path, {"P": given["P"]}, size, options)
        _check_same(record, found, both)
    return found


def _check_rotation(record, name, given, options):
    """Refuses a pose that is not rigid, but for a mirroring, which the checks name."""
    if name not in given:
        return
    T = np.eye(4)
    T[:3, :3] = given[name][:3, :3]
    if name == "E":
        T = given["E"].T if options.row_vectors and np.abs(given["E"][3, :3]).max() > 0 else given["E"]
    if np.linalg.det(T[:3, :3]) < 0:
        T = np.diag([-1.0, 1.0, 1.0, 1.0]) @ T
    camera_files.check_rigid(record.path, f"{record.where}.{name}", T)


def _check_same(record, found, other):
    """Refuses P that contradicts K and E."""
    (K, E), P = found, other[0] @ other[1][:3]
    camera_files.check_agreement(record.path, record.where, P, K, E)


def _diffdrr(record, size, options, orientation, pose, detector):
    """K and E of DiffDRR's numbers: `detector` is the record of the detector's."""
    sdd, delx = _positive(detector, "sdd"), _positive(detector, "delx")
    dely, x0, y0 = _positive(detector, "dely", delx), _number(detector, "x0", 0.0), _number(detector, "y0", 0.0)
    reverse = detector.value.get("reverse_x_axis", True)
    if not isinstance(reverse, (bool, np.bool_, int)):
        errors.fail(record.path, f"{detector.where}.reverse_x_axis", repr(reverse), "true or false")
    name = options.orientation or ("none" if orientation is None else orientation)
    if not isinstance(name, str) or name not in conventions.REORIENT:
        wanted = f"one of {', '.join(conventions.REORIENT)}"
        errors.fail(record.path, f"{record.where}.orientation", repr(name), wanted)
    pose = camera_files.check_rigid(record.path, f"{record.where}: pose", pose)
    pose = pose.copy()
    pose[:3, 3] *= conventions.UNIT_MM[options.unit]
    if options.E == "camera_from_world":  # DiffDRR's own is the other one
        pose = np.linalg.inv(pose)
    return conventions.from_diffdrr(pose, sdd, (delx, dely), (x0, y0), size, bool(reverse), name)


def _from_diffdrr(record, size, options):
    if record.value.get("pose") is not None:
        pose = _matrix(record, "pose", (4, 4))
    else:
        for name in ("rotation", "translation", "parameterization"):
            if record.value.get(name) is None:
                wanted = "pose (4x4), or rotation, translation, parameterization and convention"
                errors.fail(record.path, f"{record.where}.{name}", "nothing", wanted)
        turn = _matrix(record, "rotation", (3,), (4,))
        shift = _matrix(record, "translation", (3,))
        kind, letters = str(record.value["parameterization"]), record.value.get("convention")
        degrees = bool(record.value.get("degrees", False))
        pose = conventions.diffdrr_pose(record.path, turn, shift, kind, letters and str(letters), degrees)
    return _diffdrr(record, size, options, record.value.get("orientation", "AP"), pose, record)


def xvr_detector(record: Record) -> Record:
    """The record of an xvr result's detector, which xvr names `drr` or `detector`.

    Raises:
      InputError: there is none.
    """
    for name in ("drr", "detector"):
        if isinstance(record.value.get(name), dict):
            return Record(record.path, f"{record.where}.{name}", record.value[name])
    return errors.fail(record.path, f"{record.where}.detector", "nothing", "xvr's detector, or drr of older versions")


def _from_xvr(record, size, options):
    detector = xvr_detector(record)
    for name in ("x0", "y0"):
        if name not in detector.value:
            wanted = "the principal point, mm, which xvr took from the X-ray's DetectorActiveOrigin: 0 without that tag"
            errors.fail(record.path, f"{detector.where}.{name}", "nothing", wanted)
    orientation = detector.value.get("orientation", record.value.get("orientation"))
    if orientation is None and options.orientation is None:
        errors.fail(record.path, f"{record.where}.orientation", "nothing", "--orientation=AP or PA, as xvr was run")
    name = "final_pose" if record.value.get("final_pose") is not None else "init_pose"
    if record.value.get(name) is None:
        errors.fail(record.path, f"{record.where}.final_pose", "nothing", "a 4x4 matrix")
    return _diffdrr(record, size, options, orientation, _matrix(record, name, (4, 4)), detector)


def _from_itk(record, size, options):
    direction = _matrix(record, "direction", (3, 3)) if record.value.get("direction") is not None else np.eye(3)
    for name in ("origin", "spacing"):
        if record.value.get(name) is None:
            errors.fail(record.path, f"{record.where}.{name}", "nothing", "the image's, in mm in its source's frame")
    angle, distance = _number(record, "projection_angle_deg"), _positive(record, "focal_point_to_isocenter_mm")
    origin, spacing = _matrix(record, "origin", (3,)), _matrix(record, "spacing", (3,), (2,))
    place = math.radians(angle), distance, origin, spacing, direction, size, options
    return gantry_conventions.from_itk(record.path, *place)


def _from_rtk(record, size, options):
    return gantry_conventions.from_rtk(record.path, record.value["geometry"], size, options)


def _from_plastimatch(record, size, options):
    return gantry_conventions.from_plastimatch(
        record.path, record.value["centre"], record.value["matrix"], size, options
    )


def _from_dicom(record, size, options):
    if "file" in record.value:
        stored = record.value["file"]
        found, moves, said = view_geometry.find_camera(record.path, stored, None, None, False)
        if found is None:
            errors.fail(record.path, "geometry", said, "the tags of a still C-arm")
        # The camera is of the turned image, and ours is of the file's pixels.
        pixels = view_geometry.file_from_image(size, moves) @ camera_files.matrix_of(found)
        return conventions.split(record.path, "geometry", pixels @ np.asarray(found.camera_from_world)[:3])
    tags: dict[str, Any] = {
        f"DistanceSourceTo{n}": _positive(record, f"DistanceSourceTo{n}") for n in ("Detector", "Patient")
    }
    tags |= {f"Positioner{n}Angle": _number(record, f"Positioner{n}Angle") for n in ("Primary", "Secondary")}
    if record.value.get("ImagerPixelSpacing") is None:
        errors.fail(record.path, f"{record.where}.ImagerPixelSpacing", "nothing", "mm between rows, between columns")
    tags["ImagerPixelSpacing"] = _matrix(record, "ImagerPixelSpacing", (2,)).tolist()
    if not min(tags["ImagerPixelSpacing"]) >= SMALLEST:
        errors.fail(record.path, f"{record.where}.ImagerPixelSpacing", tags["ImagerPixelSpacing"], "numbers above 0")
    return gantry_conventions.from_dicom(record.path, tags, size)


READERS: Mapping[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "matrices": _from_matrices,
    "diffdrr": _from_diffdrr,
    "xvr": _from_xvr,
    "itk": _from_itk,
    "rtk": _from_rtk,
    "plastimatch": _from_plastimatch,
    "dicom": _from_dicom,
}
"""By convention: our K and E of a record, the image's (height, width), and options."""
