"""Cameras in JSON: projection matrices, or intrinsics and extrinsics, checked when read. Rigid transforms.

`path` and `where` in the functions below name the file and the field in errors.
"""

import pathlib
import typing

import numpy as np

from radgs_jax import errors
from radgs_jax.geometry import camera

MAX_SIDE_PX = 2**16
"""Largest height or width of an image in pixels: a bound on damaged files, above any panel. Chosen by hand; not sensitive."""
LARGEST_NUMBER = 1e30
"""Largest number in a matrix: its squares and cubes stay finite. A bound on damaged files; not sensitive."""
RIGID_TOLERANCE = 1e-3
"""Largest entry of R R^T - 1 of a rotation. Chosen by hand: half refuses matrices rounded to three decimals, twice lets a
calibration stretch the body by 0.1 %."""
ROW_TOLERANCE = 1e-6
"""Largest deviation of a transform's last row from 0 0 0 1, and of a zero translation. Chosen by hand, above rounding errors of
stored numbers; not sensitive."""
MAX_CONTRADICTION_PX = 0.25
"""Largest distance, px, of where P and K E show a point of the volume round the isocentre. Matrices rounded to four decimals differ
by 0.1; at half, such ones are refused, and at twice, half a pixel between two conventions for the principal point passes."""
VOLUME_PER_DEPTH = 1 / 7
"""Half the side of that volume over the isocentre's distance from the source: 100 mm of 700, as much as an image shows. Half or
twice scales what rounded rotations may differ by."""
MIRRORED = "register takes --mirrored where X-rays and cameras show the mirror image of what the source sees"
"""What errors say of a mirrored camera."""
MAX_SKEW = 1e-4
"""Largest skew of a projection, as a slope: 500 rows from the middle it moves a pixel by a twentieth. Chosen by hand: half refuses
rounded calibrations, twice doubles that error."""


def check_matrix(path: pathlib.Path | str, where: str, value: typing.Any, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as a finite float64 array of `shape`.

    Raises:
      InputError: `value` is not of that shape, not finite, or not of numbers.
    """
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        errors.fail(path, where, repr(value)[:60], f"a {shape} matrix of numbers")
    if array.shape != shape or not np.isfinite(array).all():
        errors.fail(
            path,
            where,
            f"shape {array.shape}" if array.shape != shape else "values that are not finite",
            f"a finite {shape} matrix",
        )
    if np.abs(array).max() > LARGEST_NUMBER:
        errors.fail(path, where, f"numbers up to {np.abs(array).max():.3g}", f"{LARGEST_NUMBER:g} at most")
    return array


def nested_shape(value: typing.Any) -> tuple[int, ...]:
    """The shape of nested lists; empty where they are ragged or no lists."""
    try:
        return np.shape(value)
    except (TypeError, ValueError):
        return ()


def check_rigid(path: pathlib.Path | str, where: str, value: typing.Any) -> np.ndarray:
    """`value` as a rigid transform (4, 4), float64.

    Raises:
      InputError: `value` is not 4x4, not finite, or further than RIGID_TOLERANCE from a rotation and a translation. The message
        names the test that failed: shape, last row, scale, columns, angles or handedness.
    """
    if nested_shape(value) == (16,):
        errors.fail(path, where, "16 numbers in one list", "4 lists of 4 numbers, one for each row")
    if nested_shape(value) == (3, 4):
        errors.fail(path, where, "3 rows of 4 numbers", "a 4x4 matrix: add the row 0 0 0 1")
    T = check_matrix(path, where, value, (4, 4))
    if (wrong := _not_rigid(T)) is not None:
        errors.fail(path, where, *wrong)
    return T


def _not_rigid(T):
    """Why (4, 4) is not rigid: what was found, and what is wanted; None if it is rigid."""
    rotation, wanted = T[:3, :3], "a rigid transform"
    if np.abs(T[3] - [0, 0, 0, 1]).max() > ROW_TOLERANCE:
        row = ", ".join(f"{v:.6g}" for v in T[3])
        transposed = np.abs(T[:, 3] - [0, 0, 0, 1]).max() <= ROW_TOLERANCE
        mend = (
            "it transposed: the translation belongs in the last column" if transposed else f"{wanted}: 0, 0, 0, 1 there"
        )
        return f"a matrix with the last row {row}", mend
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error <= RIGID_TOLERANCE and np.linalg.det(rotation) > 0:
        return None
    lengths, determinant = np.linalg.norm(rotation, axis=0), np.linalg.det(rotation)
    scale = np.cbrt(abs(determinant))
    if scale > 0 and np.abs((rotation / scale) @ (rotation / scale).T - np.eye(3)).max() <= RIGID_TOLERANCE < error:
        units = {1000: ": metres for mm?", 0.001: ": mm for metres?", 10: ": cm for mm?", 0.1: ": mm for cm?"}
        unit = next((text for factor, text in units.items() if abs(scale / factor - 1) < 0.01), "")
        return f"a matrix with a scale of {scale:.5g} instead of 1{unit}", f"{wanted}, without a scale"
    if np.abs(lengths - 1).max() > RIGID_TOLERANCE:
        found = ", ".join(f"{v:.4g}" for v in lengths)
        return f"a matrix {error:.3g} away from a rotation: columns {found} long instead of 1", wanted
    if error > RIGID_TOLERANCE:
        return f"a matrix {error:.3g} away from a rotation: columns that are not at right angles", wanted
    return "a matrix that mirrors (determinant -1)", f"{wanted}, of determinant +1"


def decompose(path: pathlib.Path | str, where: str, P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics and extrinsics of a projection (3, 4), with P = K E[:3] up to scale and sign.

    The isocentre, which is the world's origin, is in front of the source; this determines the sign.

    Returns:
      fx, fy, cx, cy (4,) in pixels; camera_from_world (4, 4) in mm.

    Raises:
      InputError: the projection is singular, skewed or mirrored, or has the isocentre in the source's plane.
    """
    size = np.linalg.norm(P[2, :3])
    if size < 1e-30 or np.linalg.cond(P[:, :3] / size) > 1e12:
        errors.fail(path, where, "a singular left 3x3 block", "a projection of a finite camera")
    P = P / size
    if abs(P[2, 3]) < 1e-6:
        errors.fail(path, where, "the world's origin in the source's plane", "the isocentre before the source")
    P = P * np.sign(P[2, 3])
    if np.linalg.det(P[:, :3]) < 0:
        errors.fail(path, where, "a mirrored camera", f"+x along +u, +y along +v, +z to the detector; {MIRRORED}")
    # RQ decomposition by QR of the reversed matrix. The signs make the diagonal of K positive.
    q, r = np.linalg.qr(P[::-1, :3].T)
    K, R = r.T[::-1, ::-1], q.T[::-1]
    signs = np.sign(np.diag(K))
    K, R = K * signs, signs[:, None] * R
    t = np.linalg.solve(K, P[:, 3])
    K = K / K[2, 2]
    if abs(K[0, 1]) > MAX_SKEW * K[1, 1]:
        errors.fail(path, where, f"a skew of {K[0, 1]:.4g} px", "square axes")
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = R, t
    return np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2]]), E


def read_camera(
    path: pathlib.Path | str,
    where: str,
    value: typing.Any,
    shape: tuple[int, int] | None = None,
    mirrored: bool = False,
) -> camera.Camera:
    """The camera of one view from {'P': 3x4} or {'K': 3x3, 'E': 4x4}. Where all three are given, they must agree.

    Args:
      path, where: the file and field named in errors.
      value: the JSON value; 'height' and 'width' in it are the image size.
      shape: (height, width) of the X-ray, which is the image size where the value has none.
      mirrored: the camera shows the mirror image of what the source sees: K with a negative fx, E that mirrors, or P of both. Its
        columns are mirrored back, as those of the X-ray must be.

    Raises:
      InputError: a field is missing or malformed, the matrices contradict each other, or the image size is not `shape`.
    """
    if not isinstance(value, dict) or not ("P" in value or ("K" in value and "E" in value)):
        found = f"the keys {list(value)}" if isinstance(value, dict) and value else repr(value)[:60]
        errors.fail(path, where, found, "an object with P (3x4), or K (3x3) and E (4x4)")
    size = (value.get("height", shape and shape[0]), value.get("width", shape and shape[1]))
    P = check_matrix(path, f"{where}.P", value["P"], (3, 4)) if "P" in value else None
    if "K" in value and "E" in value:
        K, E = _matrices(path, where, value, mirrored)
        if P is not None:
            check_agreement(path, where, P, K, E)
        intrinsics, P = K[[0, 1, 0, 1], [0, 1, 2, 2]], K @ E[:3]
    elif not mirrored:
        intrinsics, E = decompose(path, f"{where}.P", P)
    if not all(type(n) is int and 0 < n <= MAX_SIDE_PX for n in size):
        errors.fail(path, f"{where}.height, width", size, f"whole numbers from 1 to {MAX_SIDE_PX}")
    if shape is not None and tuple(size) != tuple(shape):
        errors.fail(path, f"{where}.height, width", size, f"the X-ray's {tuple(shape)}")
    if mirrored:
        P = np.array([[-1, 0, size[1] - 1], [0, 1, 0], [0, 0, 1.0]]) @ P
        if np.linalg.det(P[:, :3]) * P[2, 3] < 0:
            errors.fail(
                path, where, "a camera that does not mirror, with --mirrored", "a mirrored one, or no --mirrored"
            )
        intrinsics, E = decompose(path, f"{where}.P", P)
    return camera.Camera(intrinsics, E, *size)


def _matrices(path, where, value, mirrored):
    """K (3, 3) and E (4, 4) of one view. mirrored: K @ E[:3] must mirror; otherwise it must not."""
    K, E = check_matrix(path, f"{where}.K", value["K"], (3, 3)), value["E"]
    form = "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0"
    if (
        abs(K[0, 1]) > 1e-6 * abs(K[0, 0])
        or np.abs(K[[1, 2, 2], [0, 0, 1]]).max() > 1e-9
        or abs(K[2, 2] - 1) > 1e-9
        or K[0, 0] * K[1, 1] == 0
    ):
        errors.fail(path, f"{where}.K", K.tolist(), form)
    one_sided = K[0, 0] * K[1, 1] < 0
    if not mirrored and (K[0, 0] < 0 or K[1, 1] < 0):
        mend = MIRRORED if one_sided else "two signs turn the image by 180 degrees: turn E about its z axis instead"
        errors.fail(path, f"{where}.K", f"fx {K[0, 0]:.6g} and fy {K[1, 1]:.6g}", f"{form}; {mend}")
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirrors = nested_shape(E) == (4, 4) and _not_rigid(flip @ check_matrix(path, f"{where}.E", E, (4, 4))) is None
    if mirrors and not mirrored:
        errors.fail(path, f"{where}.E", "a matrix that mirrors (determinant -1)", f"a rigid transform; {MIRRORED}")
    E = np.asarray(E, np.float64) if mirrors else check_rigid(path, f"{where}.E", E)
    if not E[2, 3] > 0:
        errors.fail(
            path, f"{where}.E", f"the isocentre at depth {E[2, 3]:.4g} mm", f"it before the source{_mend_of_depth(E)}"
        )
    return K, E


def _mend_of_depth(E):
    """What would bring the isocentre before the source, for an error; E (4, 4) is rigid."""
    inverse = np.linalg.inv(E)
    # Of camera_from_world the isocentre is near the optical axis: x and y are small beside z.
    beside = {
        "; the inverse of E would fit: E is camera_from_world": inverse[:3, 3],
        "; with rows 2 and 3 of E negated it would: +y is down and +z to the detector": E[:3, 3] * [1, -1, -1],
    }
    fits = {text: np.hypot(*t[:2]) / t[2] for text, t in beside.items() if t[2] > 0}
    return min(fits, key=fits.get) if fits else ""


def check_agreement(path: pathlib.Path | str, where: str, P: np.ndarray, K: np.ndarray, E: np.ndarray) -> None:
    """Refuses P (3, 4), up to scale, and K (3, 3), E (4, 4) that show points round the isocentre at different pixels.

    Raises:
      InputError: they differ by more than MAX_CONTRADICTION_PX.
    """
    half = VOLUME_PER_DEPTH * abs(E[2, 3])
    corners = np.array([[x, y, z, 1.0] for x in (-half, 0, half) for y in (-half, 0, half) for z in (-half, 0, half)])
    with np.errstate(all="ignore"):
        seen = [(M / M[2:]).T[:, :2] for M in (P @ corners.T, K @ E[:3] @ corners.T)]
        apart = np.linalg.norm(seen[0] - seen[1], axis=1).max()
    if not apart <= MAX_CONTRADICTION_PX:
        errors.fail(
            path,
            f"{where}: P, K and E",
            f"points within {half:.4g} mm of the isocentre up to {apart:.4g} px apart in P and in K E",
            f"{MAX_CONTRADICTION_PX} px at most: one camera, or P alone, or K and E alone",
        )


def matrix_of(view: camera.Camera) -> np.ndarray:
    """K (3, 3) of a camera, pixels, float64."""
    fx, fy, cx, cy = np.asarray(view.intrinsics, np.float64)
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def camera_json(view: camera.Camera, name: str) -> dict:
    """A camera as the case format stores it: `name`, P (3x4), K (3x3) and E (4x4) as lists, height and width."""
    K = matrix_of(view)
    return {
        "name": name,
        "P": (K @ view.camera_from_world[:3]).tolist(),
        "K": K.tolist(),
        "E": view.camera_from_world.tolist(),
        "height": view.height,
        "width": view.width,
    }
