"""Rotations, translations and affine maps of points, (4, 4) in numpy float64; lengths in mm."""

import numpy as np
import numpy.typing as npt


def rotation(axis: int, degrees: float) -> np.ndarray:
    """(4, 4) right-handed rotation about coordinate axis 0, 1 or 2."""
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    out = np.eye(4)
    out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def translation(x: float, y: float, z: float) -> np.ndarray:
    """(4, 4) translation."""
    out = np.eye(4)
    out[:3, 3] = x, y, z
    return out


def apply_affine(a_from_b: np.ndarray, point: npt.ArrayLike) -> np.ndarray:
    """Maps one point (3,) from frame b to frame a by `a_from_b` (4, 4)."""
    return a_from_b[:3, :3] @ np.asarray(point, np.float64) + a_from_b[:3, 3]
