"""Rigid transforms on the host, in float64 numpy."""

import numpy as np
import scipy


def matrix(rotation_vector, translation):
    """(4, 4) rigid matrix of a rotation vector (3,) in radians and a translation (3,) in mm."""
    T = np.eye(4)
    T[:3, :3] = scipy.spatial.transform.Rotation.from_rotvec(rotation_vector).as_matrix()
    T[:3, 3] = translation
    return T


def nearest_rigid(T):
    """The matrix (4, 4) nearest to T whose rotation is one: what float32 has left is 1e-6 off."""
    u, _, vt = np.linalg.svd(T[:3, :3])
    T = T.copy()
    T[:3, :3] = u @ vt
    return T


def motion_about(centre, twist):
    """The motion (4, 4) of `radgs_jax.rigid.motion_about`, in float64 numpy: centre (3,) mm, twist (6,) rad, then mm."""
    T = matrix(twist[:3], 0.0)
    T[:3, 3] = np.asarray(centre) + twist[3:] - T[:3, :3] @ centre
    return T
