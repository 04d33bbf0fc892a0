"""Rigid transforms: rotations and SE(3) by exp and log, motions about a point, distances.

A transform is a (..., 4, 4) matrix named `target_from_source`; points are mm. A twist is (..., 6): a rotation vector in
radians, then a translation in mm. Everything is differentiable, also at the identity.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

LEVER_MM = 25.0
"""Length that turns a rotation into mm where a pose distance is one number: about a vertebra's radius."""
START_RAD = math.radians(25.0)
"""Largest rotation of a simulated start pose: more than a surgeon's patient is turned on the table against the CT."""
TWIST_SCALE = np.array([1.0 / LEVER_MM] * 3 + [1.0] * 3)
"""A twist (6,), rad and mm, of which every part moves the lever's end by 1 mm."""


def matmul(a, b):
    """Product (..., i, k) of (..., i, j) and (..., j, k) at full float32 precision on every device, which coordinates need."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def skew(w):
    """(..., 3) -> (..., 3, 3) with skew(w) x = w x x."""
    x, y, z = w[..., 0], w[..., 1], w[..., 2]
    o = jnp.zeros_like(x)
    return jnp.stack([jnp.stack([o, -z, y], -1), jnp.stack([z, o, -x], -1), jnp.stack([-y, x, o], -1)], -2)


def _safe_norm(v):
    square = jnp.sum(v * v, -1, keepdims=True)
    small = square < 1e-24
    return jnp.where(small, 0.0, jnp.sqrt(jnp.where(small, 1.0, square))), square


def _coefficients(square):
    """sin(t)/t, (1-cos t)/t^2 and (t-sin t)/t^3 for t^2 = square, by Taylor series where the quotients lose digits."""
    small = square < 1e-2
    s = jnp.where(small, square, 0.0)
    t2 = jnp.where(small, 1.0, square)
    t = jnp.sqrt(t2)
    a = jnp.where(small, 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72))), jnp.sin(t) / t)
    # (1 - cos t) = 2 sin^2(t/2) keeps its digits for every t.
    b = jnp.where(small, 0.5 * (1 - s / 12 * (1 - s / 30 * (1 - s / 56))), 2 * jnp.sin(0.5 * t) ** 2 / t2)
    c = jnp.where(small, (1 - s / 20 * (1 - s / 42 * (1 - s / 72))) / 6, (t - jnp.sin(t)) / (t2 * t))
    return a[..., None], b[..., None], c[..., None]


def exp_so3(rotation_vector):
    """Rotation matrix (..., 3, 3) of a rotation vector (..., 3) in radians (Rodrigues)."""
    W = skew(rotation_vector)
    a, b, _ = _coefficients(jnp.sum(rotation_vector**2, -1, keepdims=True))
    return jnp.eye(3, dtype=rotation_vector.dtype) + a * W + b * matmul(W, W)


def quaternion_from_matrix(R):
    """Unit quaternion (w, x, y, z), w >= 0, of a rotation matrix (..., 3, 3); well conditioned at every angle.

    The rows of 4 q q' are linear in R; the row with the largest diagonal, normalised, is q.
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


def matrix_from_quaternion(q):
    """Rotation matrix (..., 3, 3) of a unit quaternion (..., 4), order (w, x, y, z)."""
    w, x, y, z = (q[..., i] for i in range(4))
    return jnp.stack(
        [
            jnp.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
            jnp.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
            jnp.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
        ],
        -2,
    )


def multiply_quaternions(a, b):
    """Hamilton product (..., 4), order (w, x, y, z): the rotation b followed by a."""
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


def log_so3(R):
    """Rotation vector (..., 3) in radians of a rotation matrix (..., 3, 3), angle in [0, pi]; stable near 0 and near pi."""
    q = quaternion_from_matrix(R)
    w, v = q[..., :1], q[..., 1:]
    norm, square = _safe_norm(v)
    small = square < 1e-6
    angle = 2 * jnp.arctan2(jnp.where(small, 1.0, norm), w)
    # Near 0: angle / |v| = 2 / w * (1 - |v|^2 / (3 w^2) + ...).
    safe_w = jnp.where(small, w, 1.0)
    ratio = jnp.where(small, 2.0 / safe_w * (1 - square / (3 * safe_w**2)), angle / jnp.where(small, 1.0, norm))
    return ratio * v


def transform(R, t):
    """The transform x -> R x + t: (..., 3, 3), (..., 3) -> (..., 4, 4)."""
    top = jnp.concatenate([R, t[..., None]], -1)
    bottom = jnp.broadcast_to(jnp.asarray([0, 0, 0, 1], top.dtype), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], -2)


def inverse(target_from_source):
    """Inverse of a rigid transform (..., 4, 4), by transposition."""
    Rt = jnp.swapaxes(target_from_source[..., :3, :3], -1, -2)
    return transform(Rt, -apply_rotation(Rt, target_from_source[..., :3, 3]))


def apply_rotation(R, vectors):
    """R (..., 3, 3) times vectors (..., 3)."""
    return jnp.sum(R * vectors[..., None, :], -1)


def apply(target_from_source, points):
    """Points (..., N, 3) moved by one transform (..., 4, 4) each batch."""
    return apply_rotation(target_from_source[..., None, :3, :3], points) + target_from_source[..., None, :3, 3]


def exp_se3(twist):
    """The transform (..., 4, 4) of a twist (..., 6), by the group's exponential."""
    w, v = twist[..., :3], twist[..., 3:]
    W = skew(w)
    a, b, c = _coefficients(jnp.sum(w**2, -1, keepdims=True))
    W2, eye = matmul(W, W), jnp.eye(3, dtype=twist.dtype)
    return transform(eye + a * W + b * W2, apply_rotation(eye + b * W + c * W2, v))


def log_se3(T):
    """The twist (..., 6) of a transform (..., 4, 4), by the group's logarithm: inverse of `exp_se3` for angles below pi."""
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


def motion_about(centre, twist):
    """The motion x -> R (x - centre) + centre + t of a twist (rotation vector, t): (..., 3), (..., 6) -> (..., 4, 4).

    Applied on the left of a pose with `centre` the vertebra's centre in world axes, this is the small motion in which loss,
    optimiser and covariance are expressed.
    """
    R = exp_so3(twist[..., :3])
    return transform(R, centre + twist[..., 3:] - apply_rotation(R, centre))


def twist_about(centre, motion):
    """Inverse of `motion_about`: the twist (..., 6) of a motion (..., 4, 4) about `centre` (..., 3)."""
    R = motion[..., :3, :3]
    return jnp.concatenate([log_so3(R), motion[..., :3, 3] - centre + apply_rotation(R, centre)], -1)


def rotation_angle(R_a, R_b):
    """Geodesic distance on SO(3) in radians between (..., 3, 3) rotations, in [0, pi]."""
    vector = log_so3(matmul(jnp.swapaxes(R_a, -1, -2), R_b))
    return _safe_norm(vector)[0][..., 0]


def distance(T_a, T_b, centre, lever_mm=LEVER_MM):
    """Geodesic distance in mm between poses (..., 4, 4): sqrt(|dt|^2 + (lever * angle)^2), dt taken at `centre` (..., 3).

    `centre` is in the source frame of both poses. The product metric of SO(3) x R^3, with a lever that gives both parts mm.
    """
    shift = apply_rotation(T_a[..., :3, :3] - T_b[..., :3, :3], centre) + T_a[..., :3, 3] - T_b[..., :3, 3]
    angle = rotation_angle(T_a[..., :3, :3], T_b[..., :3, :3])
    return _safe_norm(jnp.concatenate([shift, lever_mm * angle[..., None]], -1))[0][..., 0]
