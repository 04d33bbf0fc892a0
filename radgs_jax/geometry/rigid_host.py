"""Rigid transforms on the host, in float64 numpy."""

from collections.abc import Sequence

import numpy as np
import scipy
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array
from radgs_jax.geometry.rigid import LEVER_MM

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From RAS+ to the axes of DICOM and ITK, left, posterior and up; it is its own inverse."""


def between_lps(T: Real[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """The transform, mm, between the LPS axes of its two frames, where T is between their RAS axes; or the other way round."""
    return LPS_FROM_RAS @ T @ LPS_FROM_RAS


def matrix(
    rotation_vector: Real[Array, "3"] | Sequence[float | int],
    translation: Real[Array, "3"] | Sequence[float | int] | float | int,
) -> Float[np.ndarray, "4 4"]:
    """Rigid transform of a rotation vector, radians, and a translation, mm (one number for all three axes)."""
    T = np.eye(4)
    T[:3, :3] = scipy.spatial.transform.Rotation.from_rotvec(rotation_vector).as_matrix()
    T[:3, 3] = translation
    return T


def nearest_rigid(T: Real[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """T with its upper left block replaced by the nearest orthogonal matrix, which removes float32's rounding error of 1e-6."""
    u, _, vt = np.linalg.svd(T[:3, :3])
    T = T.copy()
    T[:3, :3] = u @ vt
    return T


def motion_about(
    centre: Real[Array, "3"] | Sequence[float | int], twist: Real[Array, "6"] | Sequence[float | int]
) -> Float[np.ndarray, "4 4"]:
    """The motion of `rigid.motion_about` for one centre, mm, and one twist, radians and mm."""
    T = matrix(twist[:3], 0.0)
    T[:3, 3] = np.asarray(centre) + twist[3:] - T[:3, :3] @ centre
    return T


def twist_about(
    centre: Real[Array, "3"] | Sequence[float | int], motion: Real[np.ndarray, "4 4"]
) -> Float[np.ndarray, "6"]:
    """Inverse of `motion_about`: the twist, radians and mm, of a motion about `centre`, mm."""
    turn = scipy.spatial.transform.Rotation.from_matrix(motion[:3, :3]).as_rotvec()
    return np.concatenate([turn, motion[:3, 3] - np.asarray(centre) + motion[:3, :3] @ centre])


def distance(
    T_a: Real[np.ndarray, "*batch 4 4"], T_b: Real[np.ndarray, "4 4"], lever_mm: float = LEVER_MM
) -> Float[np.ndarray, "*batch"]:
    """Geodesic distance between poses about their frame's origin, mm: `rigid.distance` with a centre of 0."""
    turn = np.swapaxes(T_a[..., :3, :3], -1, -2) @ T_b[:3, :3]
    angle = np.arccos(np.clip(0.5 * (np.trace(turn, axis1=-2, axis2=-1) - 1.0), -1.0, 1.0))
    return np.asarray(np.hypot(np.linalg.norm(T_a[..., :3, 3] - T_b[:3, 3], axis=-1), lever_mm * angle))
