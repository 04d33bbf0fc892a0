"""Cameras as JSON: projection matrices, or intrinsics and extrinsics, checked when read."""

import numpy as np

from radgs_jax import errors
from radgs_jax.geometry import camera

MAX_SIDE_PX = 2**16


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
        errors.fail(path, where, repr(value)[:60], f"a {shape} matrix of numbers")
    if array.shape != shape or not np.isfinite(array).all():
        errors.fail(
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
        errors.fail(
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
        errors.fail(path, where, "a singular left 3x3 block", "a projection of a finite camera")
    P = P / size
    if abs(P[2, 3]) < 1e-6:
        errors.fail(path, where, "the world's origin in the source's plane", "the isocentre before the source")
    P = P * np.sign(P[2, 3])
    if np.linalg.det(P[:, :3]) < 0:
        errors.fail(path, where, "a mirrored camera", "+x along +u, +y along +v, +z to the detector")
    # RQ by QR of the reversed matrix; signs chosen so that K has a positive diagonal.
    q, r = np.linalg.qr(P[::-1, :3].T)
    K, R = r.T[::-1, ::-1], q.T[::-1]
    signs = np.sign(np.diag(K))
    K, R = K * signs, signs[:, None] * R
    t = np.linalg.solve(K, P[:, 3])
    K = K / K[2, 2]
    # As a slope: 500 rows from the middle it moves a pixel by a twentieth.
    if abs(K[0, 1]) > 1e-4 * K[1, 1]:
        errors.fail(path, where, f"a skew of {K[0, 1]:.4g} px", "square axes")
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = R, t
    return np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2]]), E


def read_view(path, where, value, shape=None):
    """A `View` from {'P': 3x4} or {'K', 'E'}; image size from 'height' and 'width', or from `shape`.

    Raises:
      InputError: missing or malformed fields, or a size that disagrees with `shape`.
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
