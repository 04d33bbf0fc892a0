"""Rigid transforms: rotations and SE(3) by exp and log, motions about a point, distances.

A transform is a 4x4 matrix named `target_from_source`; points are in mm. A twist is a rotation vector in radians, then a
translation in mm. Every function is differentiable, also at the identity.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array

LEVER_MM = 25.0
"""Lever arm that converts a rotation in rad to mm, mm: about a vertebra's radius. At half, rotations count half as much in pose
distances, losses and step limits; at twice, twice as much."""
START_RAD = math.radians(25.0)
"""Largest rotation of a simulated start pose, rad. Chosen by hand, to be larger than a patient is turned on the table against the
CT. At half, the network is not trained for patients who lie that obliquely; at twice, fewer examples are near the usual starts."""
TWIST_SCALE = np.array([1.0 / LEVER_MM] * 3 + [1.0] * 3)
"""Unit of each part of a twist (6,), rad and mm: each moves the end of the lever by 1 mm."""


def matmul(a: Real[Array, "*#batch i j"], b: Real[Array, "*#batch j k"]) -> Real[jax.Array, "... i k"]:
    """Matrix product at full float32 precision on every device, which coordinates need."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def skew(w: Float[Array, "*batch 3"]) -> Float[jax.Array, "*batch 3 3"]:
    """The matrix of the cross product: skew(w) x = w x x."""
    x, y, z = w[..., 0], w[..., 1], w[..., 2]
    o = jnp.zeros_like(x)
    return jnp.stack([jnp.stack([o, -z, y], -1), jnp.stack([z, o, -x], -1), jnp.stack([-y, x, o], -1)], -2)


def _safe_norm(v):
    square = jnp.sum(v * v, -1, keepdims=True)
    small = square < 1e-24
    return jnp.where(small, 0.0, jnp.sqrt(jnp.where(small, 1.0, square))), square


def _coefficients(square):
    """sin(t)/t, (1-cos t)/t^2 and (t-sin t)/t^3 for t^2 = square, by Taylor series where the quotients lose precision."""
    small = square < 1e-2
    s = jnp.where(small, square, 0.0)
    t2 = jnp.where(small, 1.0, square)
    t = jnp.sqrt(t2)
    a = jnp.where(small, 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72))), jnp.sin(t) / t)
    # 1 - cos t = 2 sin^2(t/2), which keeps full precision for every t.
    b = jnp.where(small, 0.5 * (1 - s / 12 * (1 - s / 30 * (1 - s / 56))), 2 * jnp.sin(0.5 * t) ** 2 / t2)
    c = jnp.where(small, (1 - s / 20 * (1 - s / 42 * (1 - s / 72))) / 6, (t - jnp.sin(t)) / (t2 * t))
    return a[..., None], b[..., None], c[..., None]


def exp_so3(rotation_vector: Float[Array, "*batch 3"]) -> Float[jax.Array, "*batch 3 3"]:
    """Rotation matrix of a rotation vector in radians (Rodrigues)."""
    W = skew(rotation_vector)
    a, b, _ = _coefficients(jnp.sum(rotation_vector**2, -1, keepdims=True))
    return jnp.eye(3, dtype=rotation_vector.dtype) + a * W + b * matmul(W, W)


def quaternion_from_matrix(R: Float[Array, "*batch 3 3"]) -> Float[jax.Array, "*batch 4"]:
    """Unit quaternion (w, x, y, z), w >= 0, of a rotation matrix; well conditioned at every angle.

    The rows of 4 q q' are linear in R; the row with the largest diagonal entry, normalised, is q.
    """
    r = [[R[..., i, j] for j in range(3)] for i in range(3)]
    wx, wy, wz = r[2][1] - r[1][2], r[0][2] - r[2][0], r[1][0] - r[0][1]
    xy, xz, yz = r[0][1] + r[1][0], r[0][2] + r[2][0], r[1][2] + r[2][1]
    diagonal = [
        1 + r[0][0] + r[1][1] + r[2][2],
        1 + r[0][0] - r[1][1] - r[2][2],
        1 - r[0][0] + r[1][1] - r[2][2],
        1 - r[0][0] - r[1][1] + r[2][2],
    ]
    rows = jnp.stack(
        [
            jnp.stack([diagonal[0], wx, wy, wz], -1),
            jnp.stack([wx, diagonal[1], xy, xz], -1),
            jnp.stack([wy, xy, diagonal[2], yz], -1),
            jnp.stack([wz, xz, yz, diagonal[3]], -1),
        ],
        -2,
    )
    best = jnp.argmax(jnp.stack(diagonal, -1), -1)
    q = jnp.take_along_axis(rows, best[..., None, None], -2)[..., 0, :]
    q = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    return jnp.where(q[..., :1] < 0, -q, q)


def matrix_from_quaternion(q: Float[Array, "*batch 4"]) -> Float[jax.Array, "*batch 3 3"]:
    """Rotation matrix of a unit quaternion, order (w, x, y, z)."""
    w, x, y, z = (q[..., i] for i in range(4))
    return jnp.stack(
        [
            jnp.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
            jnp.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
            jnp.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
        ],
        -2,
    )


def multiply_quaternions(a: Float[Array, "*#batch 4"], b: Float[Array, "*#batch 4"]) -> Float[jax.Array, "... 4"]:
    """Hamilton product, order (w, x, y, z): the rotation b followed by a."""
    aw, ax, ay, az = (a[..., i] for i in range(4))
    bw, bx, by, bz = (b[..., i] for i in range(4))
    return jnp.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


def log_so3(R: Float[Array, "*batch 3 3"]) -> Float[jax.Array, "*batch 3"]:
    """Rotation vector in radians of a rotation matrix, angle in [0, pi]; stable near 0 and near pi."""
    q = quaternion_from_matrix(R)
    w, v = q[..., :1], q[..., 1:]
    norm, square = _safe_norm(v)
    small = square < 1e-6
    angle = 2 * jnp.arctan2(jnp.where(small, 1.0, norm), w)
    # Near 0: angle / |v| = 2 / w * (1 - |v|^2 / (3 w^2) + ...).
    safe_w = jnp.where(small, w, 1.0)
    ratio = jnp.where(small, 2.0 / safe_w * (1 - square / (3 * safe_w**2)), angle / jnp.where(small, 1.0, norm))
    return ratio * v


def transform(R: Float[Array, "*batch 3 3"], t: Float[Array, "*batch 3"]) -> Float[jax.Array, "*batch 4 4"]:
    """The transform x -> R x + t."""
    top = jnp.concatenate([R, t[..., None]], -1)
    bottom = jnp.broadcast_to(jnp.asarray([0, 0, 0, 1], top.dtype), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], -2)


def inverse(target_from_source: Float[Array, "*batch 4 4"]) -> Float[jax.Array, "*batch 4 4"]:
    """Inverse of a rigid transform, by transposition."""
    Rt = jnp.swapaxes(target_from_source[..., :3, :3], -1, -2)
    return transform(Rt, -apply_rotation(Rt, target_from_source[..., :3, 3]))


def apply_rotation(R: Float[Array, "*#batch 3 3"], vectors: Real[Array, "*#batch 3"]) -> Float[jax.Array, "... 3"]:
    """R times vectors; batch axes are broadcast."""
    return jnp.sum(R * vectors[..., None, :], -1)


def apply(
    target_from_source: Float[Array, "*#batch 4 4"], points: Real[Array, "*#batch n 3"]
) -> Float[Array, "... n 3"]:
    """Points moved by one transform for each element of the batch; batch axes are broadcast."""
    return apply_rotation(target_from_source[..., None, :3, :3], points) + target_from_source[..., None, :3, 3]


def exp_se3(twist: Float[Array, "*batch 6"]) -> Float[jax.Array, "*batch 4 4"]:
    """The transform of a twist, by the group's exponential."""
    w, v = twist[..., :3], twist[..., 3:]
    W = skew(w)
    a, b, c = _coefficients(jnp.sum(w**2, -1, keepdims=True))
    W2, eye = matmul(W, W), jnp.eye(3, dtype=twist.dtype)
    return transform(eye + a * W + b * W2, apply_rotation(eye + b * W + c * W2, v))


def log_se3(T: Float[Array, "*batch 4 4"]) -> Float[jax.Array, "*batch 6"]:
    """The twist of a transform, by the group's logarithm: the inverse of `exp_se3` for angles below pi."""
    w = log_so3(T[..., :3, :3])
    square = jnp.sum(w**2, -1, keepdims=True)
    a, b, _ = _coefficients(square)
    small = square < 1e-2
    s = jnp.where(small, 1.0, square)[..., None]
    series = (1 / 12 + square / 720 + square**2 / 30240)[..., None]
    ratio = jnp.where(small[..., None], series, (1 - 0.5 * a / b) / s)
    W = skew(w)
    V_inverse = jnp.eye(3, dtype=T.dtype) - 0.5 * W + ratio * matmul(W, W)
    return jnp.concatenate([w, apply_rotation(V_inverse, T[..., :3, 3])], -1)


def motion_about(centre: Float[Array, "*#batch 3"], twist: Float[Array, "*#batch 6"]) -> Float[jax.Array, "... 4 4"]:
    """The motion x -> R (x - centre) + centre + t of a twist (rotation vector, t).

    Losses, refinement and covariances express a small motion of a vertebra this way, applied on the left of its pose, with `centre`
    its centre in the world.
    """
    R = exp_so3(twist[..., :3])
    return transform(R, centre + twist[..., 3:] - apply_rotation(R, centre))


def twist_about(centre: Float[Array, "*#batch 3"], motion: Float[Array, "*#batch 4 4"]) -> Float[jax.Array, "... 6"]:
    """Inverse of `motion_about`: the twist of a motion about `centre`."""
    R = motion[..., :3, :3]
    return jnp.concatenate([log_so3(R), motion[..., :3, 3] - centre + apply_rotation(R, centre)], -1)


def rotation_angle(R_a: Float[Array, "*#batch 3 3"], R_b: Float[Array, "*#batch 3 3"]) -> Float[jax.Array, "..."]:
    """Geodesic distance on SO(3) between rotations, radians, in [0, pi]."""
    vector = log_so3(matmul(jnp.swapaxes(R_a, -1, -2), R_b))
    return _safe_norm(vector)[0][..., 0]


def distance(
    T_a: Float[Array, "*#batch 4 4"],
    T_b: Float[Array, "*#batch 4 4"],
    centre: Float[Array, "*#batch 3"],
    lever_mm: float | Float[Array, ""] = LEVER_MM,
) -> Float[jax.Array, "..."]:
    """Geodesic distance between poses, mm: sqrt(|dt|^2 + (lever * angle)^2), with dt the distance that `centre` moves.

    This is the product metric of SO(3) x R^3. `centre` is in the source frame of both poses.
    """
    shift = apply_rotation(T_a[..., :3, :3] - T_b[..., :3, :3], centre) + T_a[..., :3, 3] - T_b[..., :3, 3]
    angle = rotation_angle(T_a[..., :3, :3], T_b[..., :3, :3])
    return _safe_norm(jnp.concatenate([shift, lever_mm * angle[..., None]], -1))[0][..., 0]
