"""The case and result files: `biplanar-vertebra-cases/1` and `biplanar-vertebra-results/1`, read with checks and written."""

import dataclasses
import math
import pathlib

import numpy as np

from data_pipelines import files

CASES_FORMAT = "biplanar-vertebra-cases/1"
RESULTS_FORMAT = "biplanar-vertebra-results/1"
VARIANTS = ("easy", "full", "artic", "real")
MAX_SIDE_PX = 2**16


@dataclasses.dataclass(frozen=True)
class View:
    """intrinsics (4,) fx, fy, cx, cy; camera_from_world (4, 4); height, width in pixels."""

    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Volume:
    """What preparing may use: the scan, its labels, the VerSe number, and the patient's identifier."""

    name: str
    patient: str
    full_ct: pathlib.Path
    full_mask: pathlib.Path
    full_label: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """One acquisition. world_from_ct: the truth where the file has it (None elsewhere); registration never reads it."""

    name: str
    volume: str
    views: tuple
    xrays: pathlib.Path
    world_from_ct: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One start pose of a scene."""

    name: str
    scene: str
    world_from_ct: np.ndarray


@dataclasses.dataclass(frozen=True)
class CaseFile:
    """volumes, scenes: by name; cases: in file order; raw: the JSON as read, for scoring only."""

    path: pathlib.Path
    volumes: dict
    scenes: dict
    cases: list
    raw: dict


def _get(path, where, mapping, key, kind):
    if not isinstance(mapping, dict):
        files.fail(path, where, type(mapping).__name__, "an object")
    if key not in mapping:
        files.fail(path, f"{where}.{key}", "nothing", f"a {kind.__name__}")
    value = mapping[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        files.fail(path, f"{where}.{key}", repr(value)[:60], f"a {kind.__name__}")
    return value


def check_matrix(path, where, value, shape):
    """`value` as a finite float64 array of `shape`.

    Raises:
      InputError: anything else.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        files.fail(path, where, repr(value)[:60], f"a {shape} matrix of numbers")
    if array.shape != shape or not np.isfinite(array).all():
        files.fail(
            path,
            where,
            f"shape {array.shape}" if array.shape != shape else "values that are not finite",
            f"a finite {shape} matrix",
        )
    return array


def check_rigid(path, where, value):
    """`value` as a rigid 4x4 transform.

    Raises:
      InputError: not 4x4, not finite, or not a rotation and a translation within 1e-3.
    """
    T = check_matrix(path, where, value, (4, 4))
    error = np.abs(T[:3, :3] @ T[:3, :3].T - np.eye(3)).max()
    if error > 1e-3 or np.linalg.det(T[:3, :3]) < 0 or np.abs(T[3] - [0, 0, 0, 1]).max() > 1e-6:
        files.fail(
            path,
            where,
            f"a matrix {error:.3g} away from a rotation (det {np.linalg.det(T[:3, :3]):.3f})",
            "a rigid transform",
        )
    return T


def decompose(path, where, P):
    """K as fx, fy, cx, cy (4,), pixels, and E (4, 4), mm, of a projection (3, 4), with P = K E[:3] up to scale and sign.

    The world's origin, the isocentre, lies before the source: that settles the sign.

    Raises:
      InputError: a singular, skewed or mirrored projection, or one with the isocentre in the source's plane.
    """
    size = np.linalg.norm(P[2, :3])
    if size < 1e-30 or np.linalg.cond(P[:, :3] / size) > 1e12:
        files.fail(path, where, "a singular left 3x3 block", "a projection of a finite camera")
    P = P / size
    if abs(P[2, 3]) < 1e-6:
        files.fail(path, where, "the world's origin in the source's plane", "the isocentre before the source")
    P = P * np.sign(P[2, 3])
    if np.linalg.det(P[:, :3]) < 0:
        files.fail(path, where, "a mirrored camera", "+x along +u, +y along +v, +z to the detector")
    # RQ by QR of the reversed matrix; signs chosen so that K has a positive diagonal.
    q, r = np.linalg.qr(P[::-1, :3].T)
    K, R = r.T[::-1, ::-1], q.T[::-1]
    signs = np.sign(np.diag(K))
    K, R = K * signs, signs[:, None] * R
    t = np.linalg.solve(K, P[:, 3])
    K = K / K[2, 2]
    # As a slope: 500 rows from the middle it moves a pixel by a twentieth.
    if abs(K[0, 1]) > 1e-4 * K[1, 1]:
        files.fail(path, where, f"a skew of {K[0, 1]:.4g} px", "square axes")
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = R, t
    return np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2]]), E


def read_view(path, where, value, shape=None):
    """A `View` from {'P': 3x4} or {'K', 'E'}; image size from 'height' and 'width', or from `shape`.

    Raises:
      InputError: missing or malformed fields, or a size that disagrees with `shape`.
    """
    if not isinstance(value, dict) or not ("P" in value or ("K" in value and "E" in value)):
        files.fail(path, where, repr(value)[:60], "an object with P (3x4), or K (3x3) and E (4x4)")
    if "K" in value and "E" in value:
        K, E = check_matrix(path, f"{where}.K", value["K"], (3, 3)), check_rigid(path, f"{where}.E", value["E"])
        if (
            abs(K[0, 1]) > 1e-6 * abs(K[0, 0])
            or np.abs(K[[1, 2, 2], [0, 0, 1]]).max() > 1e-9
            or abs(K[2, 2] - 1) > 1e-9
            or (K[0, 0] <= 0 or K[1, 1] <= 0)
        ):
            files.fail(path, f"{where}.K", K.tolist(), "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0")
        intrinsics = K[[0, 1, 0, 1], [0, 1, 2, 2]]
        if not E[2, 3] > 0:
            files.fail(path, f"{where}.E", f"the isocentre at depth {E[2, 3]:.4g} mm", "it before the source")
    else:
        intrinsics, E = decompose(path, f"{where}.P", check_matrix(path, f"{where}.P", value["P"], (3, 4)))
    size = (value.get("height", shape and shape[0]), value.get("width", shape and shape[1]))
    if not all(type(n) is int and 0 < n <= MAX_SIDE_PX for n in size):
        files.fail(path, f"{where}.height, width", size, f"whole numbers from 1 to {MAX_SIDE_PX}")
    if shape is not None and tuple(size) != tuple(shape):
        files.fail(path, f"{where}.height, width", size, f"the X-ray's {tuple(shape)}")
    return View(intrinsics, E, *size)


def read(path):
    """The `CaseFile` of a JSON file; the files that it names are read later, true poses checked by `truth`.

    Raises:
      InputError: unreadable JSON, an unknown format, missing or mistyped fields, a volume or scene that is not there, an
        id given twice, a malformed camera, a start pose that is not rigid.
    """
    path = pathlib.Path(path)
    raw = files.read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != CASES_FORMAT:
        files.fail(
            path, "format", repr(raw.get("format") if isinstance(raw, dict) else type(raw).__name__), repr(CASES_FORMAT)
        )
    volumes, scenes, cases = {}, {}, []
    for name, value in _get(path, "file", raw, "volumes", dict).items():
        where = f"volumes.{name}"
        full_ct = path.parent / _get(path, where, value, "full_ct", str)
        volumes[name] = Volume(
            name,
            _get(path, where, value, "patient", str) if "patient" in value else full_ct.name,
            full_ct,
            path.parent / _get(path, where, value, "full_mask", str),
            _get(path, where, value, "full_label", int),
        )
    for index, value in enumerate(_get(path, "file", raw, "scenes", list)):
        where = f"scenes[{index}]"
        name, volume = _get(path, where, value, "id", str), _get(path, where, value, "volume", str)
        if name in scenes:
            files.fail(path, f"{where}.id", f"{name!r} a second time", "each id once")
        if volume not in volumes:
            files.fail(path, f"{where}.volume", repr(volume), f"one of {sorted(volumes)}")
        views = tuple(
            read_view(path, f"{where}.views[{i}]", v) for i, v in enumerate(_get(path, where, value, "views", list))
        )
        if not views:
            files.fail(path, f"{where}.views", "none", "one view or more")
        scenes[name] = Scene(
            name, volume, views, path.parent / _get(path, where, value, "xrays", str), value.get("T_gt")
        )
    names = set()
    for index, value in enumerate(_get(path, "file", raw, "cases", list)):
        where = f"cases[{index}]"
        name, scene = _get(path, where, value, "id", str), _get(path, where, value, "scene", str)
        if name in names:
            files.fail(path, f"{where}.id", f"{name!r} a second time", "each id once")
        names.add(name)
        if scene not in scenes:
            files.fail(path, f"{where}.scene", repr(scene), "the id of a scene")
        cases.append(Case(name, scene, check_rigid(path, f"{where}.T_init", value.get("T_init"))))
    return CaseFile(path, volumes, scenes, cases, raw)


def truth(case_file, scene):
    """world_from_ct (4, 4) of a scene, for training on real cases and for scoring.

    Raises:
      InputError: absent or not rigid.
    """
    return check_rigid(case_file.path, f"scene {scene.name}: T_gt", scene.world_from_ct)


def points(case_file, name):
    """Surface points (N, 3) of the volume `name`, CT mm, for scoring.

    Raises:
      InputError: absent, or not a list of points.
    """
    value, where = case_file.raw["volumes"][name].get("points"), f"volumes.{name}.points"
    if not isinstance(value, list) or not value:
        files.fail(case_file.path, where, repr(value)[:60], "a list of points [x, y, z]")
    return check_matrix(case_file.path, where, value, (len(value), 3))


def check_image(path, where, image, view):
    """A float32 line-integral image that fits its view.

    Raises:
      InputError: wrong shape, not numeric, or values that are not finite.
    """
    if image.dtype.kind not in "iuf":
        files.fail(path, where, image.dtype, "real numbers")
    if image.shape != (view.height, view.width):
        files.fail(path, f"{where}: shape", image.shape, f"{(view.height, view.width)} as its view says")
    bad = np.count_nonzero(~np.isfinite(image))
    if bad:
        files.fail(path, where, f"{bad} pixels that are not finite", "finite line integrals")
    return image.astype(np.float32)


def read_xrays(scene, variant):
    """Line integrals of one scene: a list of (H_v, W_v) float32 arrays.

    Raises:
      InputError: missing file or array, wrong number of views, wrong shapes, non-finite pixels.
    """
    stack = files.read_npz(scene.xrays, variant)[variant]
    if stack.ndim != 3 or len(stack) != len(scene.views):
        files.fail(scene.xrays, f"'{variant}': shape", stack.shape, f"({len(scene.views)}, height, width)")
    return [
        check_image(scene.xrays, f"'{variant}'[{i}]", image, view)
        for i, (image, view) in enumerate(zip(stack, scene.views))
    ]


def binning(view, pixel_mm):
    """Whole factor that brings a view's pixel, at the isocentre, nearest to `pixel_mm`."""
    return max(1, round(pixel_mm * view.intrinsics[0] / view.camera_from_world[2, 3]))


def view_json(view, name):
    """A `View` as the case format writes it: a dict of plain values, P (3x4), K (3x3) and E (4x4) as lists."""
    fx, fy, cx, cy = view.intrinsics.tolist()
    K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    return {
        "name": name,
        "P": (K @ view.camera_from_world[:3]).tolist(),
        "K": K.tolist(),
        "E": view.camera_from_world.tolist(),
        "height": view.height,
        "width": view.width,
    }


def write_results(path, program, variant, results):
    """Writes a result file, atomically.

    Args:
      program, variant: names; results: dicts with id, T (world_from_ct, 4x4 lists), runtime_s, cpu_s and optionally
        accepted, uncertainty_mm, covariance.
    Raises:
      ValueError: a pose, or another number, that is not finite; nothing is written then.
    """
    for result in results:
        if not all(math.isfinite(v) for row in result["T"] for v in row):
            raise ValueError(f"{result['id']}: the pose is not finite")
    files.write_json(path, {"format": RESULTS_FORMAT, "program": program, "variant": variant, "results": results})
