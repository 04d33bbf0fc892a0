"""Rotations, rigid motions and distances against scipy, at the angles where formulas lose digits."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.spatial.transform import Rotation

from radgs_jax.geometry import rigid as eager

NAMES = [
    "exp_so3",
    "log_so3",
    "exp_se3",
    "log_se3",
    "motion_about",
    "twist_about",
    "apply",
    "inverse",
    "matmul",
    "distance",
    "rotation_angle",
    "quaternion_from_matrix",
    "matrix_from_quaternion",
    "multiply_quaternions",
]
rigid = types.SimpleNamespace(**{name: jax.jit(getattr(eager, name)) for name in NAMES})

ANGLES = [0.0, 1e-9, 1e-4, 1.0, np.pi - 1e-6]
TOLERANCE = {"float64": 1e-9, "float32": 2e-6}


def _rotation_vectors(angle):
    axes = np.random.default_rng(3).normal(size=(5, 3))
    return angle * axes / np.linalg.norm(axes, axis=1, keepdims=True)


def _twists(angle):
    translations = np.random.default_rng(4).normal(size=(5, 3)) * [40.0, 90.0, 15.0]
    return np.concatenate([_rotation_vectors(angle), translations], 1)


def _poses(seed, n=4):
    rng = np.random.default_rng(seed)
    T = np.tile(np.eye(4), (n, 1, 1))
    T[:, :3, :3] = Rotation.random(n, rng).as_matrix()
    T[:, :3, 3] = rng.normal(size=(n, 3)) * [120.0, 60.0, 300.0]
    return T


def _twist_matrix(twist):
    x, y, z = twist[:3]
    W = np.zeros((4, 4))
    W[:3, :3] = [[0, -z, y], [z, 0, -x], [-y, x, 0]]
    W[:3, 3] = twist[3:]
    return W


@jax.jit
@jax.vmap
@jax.jacrev
def _round_trip_jacobian(twist):
    return rigid.log_se3(rigid.exp_se3(twist))


@jax.jit
@jax.grad
def _distance_gradient(motion, pose, centre):
    return rigid.distance(rigid.matmul(rigid.exp_se3(motion), pose), pose, centre)


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.mark.parametrize("angle", ANGLES)
def test_exp_and_log_so3(dtype, angle):
    w = _rotation_vectors(angle).astype(dtype)
    R = rigid.exp_so3(jnp.asarray(w))
    assert R.dtype == dtype
    np.testing.assert_allclose(R, Rotation.from_rotvec(w).as_matrix(), rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(rigid.log_so3(R), w, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("angle", ANGLES)
def test_exp_and_log_se3(dtype, angle):
    twist = _twists(angle).astype(dtype)
    T = rigid.exp_se3(jnp.asarray(twist))
    # Translations are up to about 100 mm, so their tolerance is relative to that.
    wanted = np.stack([expm(_twist_matrix(t)) for t in twist.astype(np.float64)])
    np.testing.assert_allclose(T[:, :3, :3], wanted[:, :3, :3], rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(T[:, :3, 3], wanted[:, :3, 3], rtol=0, atol=100 * TOLERANCE[dtype])
    back = rigid.log_se3(T)
    np.testing.assert_allclose(back[:, :3], twist[:, :3], rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(back[:, 3:], twist[:, 3:], rtol=0, atol=100 * TOLERANCE[dtype])


def test_small_angles_keep_their_digits(dtype):
    w = _rotation_vectors(1e-4).astype(dtype)
    np.testing.assert_allclose(rigid.log_so3(rigid.exp_so3(jnp.asarray(w))), w, rtol=0, atol=1e-3 * TOLERANCE[dtype])


@pytest.mark.parametrize("angle", ANGLES)
def test_gradients_are_right_at_every_angle(dtype, angle):
    """The Jacobian of log(exp(.)) is the identity; at the identity a naive norm gives nan."""
    twist = jnp.asarray(_twists(angle)[:2].astype(dtype)).at[:, 3:].multiply(0.01)
    jacobian = _round_trip_jacobian(twist)
    assert np.all(np.isfinite(jacobian))
    if dtype == "float64":
        np.testing.assert_allclose(jacobian, np.tile(np.eye(6), (2, 1, 1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("angle", ANGLES)
def test_gradient_of_distance_is_finite(dtype, angle):
    T = jnp.asarray(_poses(1, 1)[0].astype(dtype))
    centre = jnp.asarray([30.0, -250.0, 410.0], dtype)
    motion = jnp.asarray(_twists(angle)[0].astype(dtype)).at[3:].multiply(0.0)
    assert np.all(np.isfinite(_distance_gradient(motion, T, centre)))


def test_motion_about_moves_the_centre_by_the_translation(x64):
    centre = np.array([[31.0, -250.0, 412.0]])
    for angle in ANGLES:
        twist = _twists(angle)
        motion = rigid.motion_about(jnp.asarray(centre), jnp.asarray(twist))
        moved = rigid.apply(motion, jnp.asarray(centre)[:, None])
        np.testing.assert_allclose(moved[:, 0], centre + twist[:, 3:], rtol=0, atol=1e-9)
        np.testing.assert_allclose(motion[:, :3, :3], Rotation.from_rotvec(twist[:, :3]).as_matrix(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(rigid.twist_about(jnp.asarray(centre), motion), twist, rtol=0, atol=1e-9)


def test_inverse_and_apply(x64):
    T, points = _poses(2), np.random.default_rng(5).normal(size=(4, 6, 3)) * [10.0, 200.0, 50.0]
    moved = rigid.apply(jnp.asarray(T), jnp.asarray(points))
    np.testing.assert_allclose(moved, np.einsum("bij,bnj->bni", T[:, :3, :3], points) + T[:, None, :3, 3], atol=1e-9)
    np.testing.assert_allclose(rigid.inverse(jnp.asarray(T)), np.linalg.inv(T), rtol=0, atol=1e-9)
    np.testing.assert_allclose(rigid.apply(rigid.inverse(jnp.asarray(T)), moved), points, rtol=0, atol=1e-9)


def test_quaternions(x64):
    """Random rotations, and half turns about each axis, where every row of the quaternion's matrix must serve."""
    half_turns = Rotation.from_rotvec(np.pi * np.concatenate([np.eye(3), [[0.6, 0.0, 0.8]]]))
    matrices = np.concatenate([Rotation.random(20, np.random.default_rng(6)).as_matrix(), half_turns.as_matrix()])
    q = rigid.quaternion_from_matrix(jnp.asarray(matrices))
    scipy_q = Rotation.from_matrix(matrices).as_quat(scalar_first=True)
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(q) * scipy_q, -1)), 1.0, rtol=0, atol=1e-12)
    assert np.all(q[:, 0] >= 0)
    np.testing.assert_allclose(rigid.matrix_from_quaternion(q), matrices, rtol=0, atol=1e-12)
    product = rigid.matrix_from_quaternion(rigid.multiply_quaternions(q[:10], q[10:20]))
    np.testing.assert_allclose(product, matrices[:10] @ matrices[10:20], rtol=0, atol=1e-12)


def test_distance(x64):
    a, b, centre = jnp.asarray(_poses(7)), jnp.asarray(_poses(8)), jnp.asarray([30.0, -250.0, 410.0])
    np.testing.assert_array_equal(rigid.distance(a, a, centre), 0.0)
    np.testing.assert_allclose(rigid.distance(a, b, centre), rigid.distance(b, a, centre), rtol=1e-12)
    angles = rigid.rotation_angle(a[:, :3, :3], b[:, :3, :3])
    np.testing.assert_allclose(angles, rigid.rotation_angle(b[:, :3, :3], a[:, :3, :3]), rtol=1e-12)
    relative = Rotation.from_matrix(np.swapaxes(a[:, :3, :3], 1, 2) @ b[:, :3, :3])
    np.testing.assert_allclose(angles, relative.magnitude(), rtol=1e-9)
    assert np.all(rigid.distance(a, b, centre) > 25.0 * angles - 1e-9)


def test_distance_of_a_known_motion(x64):
    """0.2 rad about the centre itself is 25 mm * 0.2 = 5 mm; 12 mm of shift on top make sqrt(5^2 + 12^2) = 13 mm."""
    pose, centre = jnp.asarray(_poses(9, 1)[0]), jnp.asarray([30.0, -250.0, 410.0])
    centre_world = rigid.apply(pose, centre[None])[0]
    turn = 0.2 * jnp.asarray([0.48, -0.6, 0.64])
    for shift, wanted in (([0.0, 0.0, 0.0], 5.0), ([12.0, 0.0, 0.0], 13.0), ([0.0, -7.2, 9.6], 13.0)):
        motion = rigid.motion_about(centre_world, jnp.concatenate([turn, jnp.asarray(shift)]))
        assert float(rigid.distance(motion @ pose, pose, centre)) == pytest.approx(wanted, abs=1e-9)
        assert float(rigid.distance(motion @ pose, pose, centre, lever_mm=0.0)) == pytest.approx(
            np.linalg.norm(shift), abs=1e-9
        )
