"""Cameras in JSON: projection matrices, or intrinsics and extrinsics, checked when read.

`path` and `where` in the functions below name the file and the field in errors.
"""

import pathlib
import typing

import numpy as np

from radgs_jax import errors
from radgs_jax.geometry import camera

MAX_SIDE_PX = 2**16
"""Largest height or width of an image in pixels: a bound on damaged files, above any panel. Chosen by hand; not sensitive."""
RIGID_TOLERANCE = 1e-3
"""Largest entry of R R^T - 1 of a rotation. Chosen by hand: half refuses matrices rounded to three decimals, twice lets a
calibration stretch the body by 0.1 %."""
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
    return array


def check_rigid(path: pathlib.Path | str, where: str, value: typing.Any) -> np.ndarray:
    """`value` as a rigid transform (4, 4), float64.

    Raises:
      InputError: `value` is not 4x4, not finite, or further than RIGID_TOLERANCE from a rotation and a translation.
    """
    T = check_matrix(path, where, value, (4, 4))
    error = np.abs(T[:3, :3] @ T[:3, :3].T - np.eye(3)).max()
    if error > RIGID_TOLERANCE or np.linalg.det(T[:3, :3]) < 0 or np.abs(T[3] - [0, 0, 0, 1]).max() > 1e-6:
        errors.fail(
            path,
            where,
            f"a matrix {error:.3g} away from a rotation (det {np.linalg.det(T[:3, :3]):.3f})",
            "a rigid transform",
        )
    return T


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
        errors.fail(path, where, "a mirrored camera", "+x along +u, +y along +v, +z to the detector")
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


def read_view(
    path: pathlib.Path | str, where: str, value: typing.Any, shape: tuple[int, int] | None = None
) -> camera.Camera:
    """The camera of one view from {'P': 3x4} or {'K': 3x3, 'E': 4x4}.

    Args:
      path, where: the file and field named in errors.
      value: the JSON value; 'height' and 'width' in it are the image size.
      shape: (height, width) of the X-ray, which is the image size where the value has none.

    Raises:
      InputError: a field is missing or malformed, or the image size is not `shape`.
    """
    if not isinstance(value, dict) or not ("P" in value or ("K" in value and "E" in value)):
        errors.fail(path, where, repr(value)[:60], "an object with P (3x4), or K (3x3) and E (4x4)")
    if "K" in value and "E" in value:
        K, E = check_matrix(path, f"{where}.K", value["K"], (3, 3)), check_rigid(path, f"{where}.E", value["E"])
        if (
            abs(K[0, 1]) > 1e-6 * abs(K[0, 0])
            or np.abs(K[[1, 2, 2], [0, 0, 1]]).max() > 1e-9
            or abs(K[2, 2] - 1) > 1e-9
            or (K[0, 0] <= 0 or K[1, 1] <= 0)
        ):
            errors.fail(path, f"{where}.K", K.tolist(), "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0")
        intrinsics = K[[0, 1, 0, 1], [0, 1, 2, 2]]
        if not E[2, 3] > 0:
            errors.fail(path, f"{where}.E", f"the isocentre at depth {E[2, 3]:.4g} mm", "it before the source")
    else:
        intrinsics, E = decompose(path, f"{where}.P", check_matrix(path, f"{where}.P", value["P"], (3, 4)))
    size = (value.get("height", shape and shape[0]), value.get("width", shape and shape[1]))
    if not all(type(n) is int and 0 < n <= MAX_SIDE_PX for n in size):
        errors.fail(path, f"{where}.height, width", size, f"whole numbers from 1 to {MAX_SIDE_PX}")
    if shape is not None and tuple(size) != tuple(shape):
        errors.fail(path, f"{where}.height, width", size, f"the X-ray's {tuple(shape)}")
    return camera.Camera(intrinsics, E, *size)


def view_json(view: camera.Camera, name: str) -> dict:
    """A camera as the case format stores it: `name`, P (3x4), K (3x3) and E (4x4) as lists, height and width."""
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
