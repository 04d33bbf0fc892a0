"""What the method is measured against: the plain network's fusion of views, and refinements that know the vertebra alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from radgs_jax import gaussians
from radgs_jax.baselines import plain
from radgs_jax.baselines import refiners
from radgs_jax.geometry import camera
from radgs_jax.geometry import grid
from radgs_jax.geometry import rigid
from radgs_jax.models import recm
from radgs_jax.registration import gauss_newton
from radgs_jax.registration.parts import Parts

SHAPE = plain.PlainConfig(widths=(4, 8), blocks=(1, 1), hidden=8)
CAMERA_FROM_WORLD = np.zeros((2, 4, 4), np.float32)
CAMERA_FROM_WORLD[0, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
CAMERA_FROM_WORLD[1, :3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
CAMERA_FROM_WORLD[:, 2, 3], CAMERA_FROM_WORLD[:, 3, 3] = 700.0, 1.0
INTRINSICS = np.array([[350.0, 350.0, 20.0, 23.0]] * 2, np.float32)


@pytest.fixture(scope="module")
def bone():
    """Gaussians of an anisotropic, tilted, off-centre lump, and the same in voxels of 2 mm."""
    rng = np.random.default_rng(3)
    mean = rng.normal(size=(60, 3)) @ np.diag([14.0, 9.0, 6.0]) + [2.0, -3.0, 1.0]
    quaternion = rng.normal(size=(60, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    scale = rng.uniform(2.5, 5.0, (60, 3))
    parameters = (rng.uniform(0.005, 0.02, 60), mean, scale, quaternion)
    cloud = gaussians.Gaussians(*(jnp.asarray(a, jnp.float32) for a in parameters))
    cells = grid.centred((48, 40, 32), 2.0)
    density = gaussians.voxelize(cloud, cells)
    parts = Parts(density, cells.frame_from_index, jnp.zeros_like(density), cells.frame_from_index)
    return cloud, parts


def _images(cloud, pose, size=48):
    moved = gaussians.views(gaussians.move(cloud, jnp.asarray(pose)), 2)
    return gaussians.project(moved, jnp.asarray(CAMERA_FROM_WORLD), jnp.asarray(INTRINSICS), size, size)


def _pose(scale):
    twist = scale * np.array([0.06, -0.09, 0.05, 2.0, -3.0, 2.5])
    return np.asarray(rigid.motion_about(jnp.asarray([2.0, -3.0, 1.0]), jnp.asarray(twist, jnp.float32)))


def _off(pose, truth):
    return float(rigid.distance(jnp.asarray(pose), jnp.asarray(truth), jnp.zeros(3)))


def test_views_fuse_to_the_twist_that_each_says_in_its_own_axes():
    """float64 oracle: stacked, weighted least squares; and a view that says it knows nothing has no say."""
    rng = np.random.default_rng(0)
    R = np.linalg.qr(rng.normal(size=(1, 2, 3, 3)))[0]
    R *= np.sign(np.linalg.det(R))[..., None, None]
    twists, log_precision = rng.normal(size=(1, 2, 6)), rng.uniform(-1, 1, (1, 2, 6))
    rows = [np.kron(np.eye(2), R[0, v]) * np.exp(0.5 * log_precision[0, v])[:, None] for v in range(2)]
    right = [np.exp(0.5 * log_precision[0, v]) * twists[0, v] for v in range(2)]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(right), rcond=None)[0]
    found = plain.fuse(*(jnp.asarray(a, jnp.float32) for a in (twists, log_precision, R)))[0]
    expected[:3] /= rigid.LEVER_MM
    np.testing.assert_allclose(rigid.twist_about(jnp.zeros(3), found), expected, atol=3e-3)
    one = log_precision + np.array([[0.0], [-14.0]])
    found = plain.fuse(*(jnp.asarray(a, jnp.float32) for a in (twists, one, R)))[0]
    alone = np.kron(np.eye(2), R[0, 0].T) @ twists[0, 0]
    alone[:3] /= rigid.LEVER_MM
    np.testing.assert_allclose(rigid.twist_about(jnp.zeros(3), found), alone, atol=1e-2)


def test_the_plain_network_trains_all_its_weights_and_registers(bone):
    cloud, _ = bone
    params = plain.init(SHAPE, tiny.MODEL, jax.random.key(0))
    cameras = jnp.asarray(CAMERA_FROM_WORLD)
    images = _images(cloud, _pose(1.0))
    crops = camera.windows(list(images), list(jnp.ones_like(images, bool)), jnp.asarray(INTRINSICS), cameras, 32)
    inputs = *(a[None] for a in crops), cameras[None], jax.tree.map(lambda a: a[None], cloud)

    truth = jnp.asarray(_pose(1.0))[None]

    def cost(params):
        motion, alone = plain.Plain(SHAPE).apply(params["plain"], *inputs)
        return jnp.sum(rigid.distance(motion, truth, jnp.zeros(3))) + jnp.mean(jnp.abs(alone))

    # Residual blocks start as the identity, which passes nothing to their first layer.
    rng = np.random.default_rng(0)
    shaken = jax.tree.map(lambda a: a + 0.05 * jnp.asarray(rng.normal(size=a.shape), a.dtype), params)
    gradient = jax.jit(jax.grad(cost))(shaken)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    seen = gauss_newton.LevelViews(list(images), list(jnp.ones_like(images, bool)), jnp.asarray(INTRINSICS))
    poses = plain.register_plain(params, SHAPE, tiny.MODEL, seen, cameras, jnp.eye(4), cloud, 2)
    assert poses.shape == (3, 4, 4)
    np.testing.assert_allclose(poses[0], np.eye(4))
    R = np.asarray(poses[:, :3, :3])
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.tile(np.eye(3), (3, 1, 1)), atol=1e-5)
    with pytest.raises(ValueError, match="found 1 views, wanted 2"):
        plain.Plain(SHAPE).init(jax.random.key(0), *(a[:, :1] for a in inputs[:4]), inputs[4])


def test_a_clean_image_and_its_gradients_give_the_pose(bone):
    cloud, parts = bone
    truth, start = _pose(1.0), jnp.eye(4)
    images, cameras = _images(cloud, truth), jnp.asarray(CAMERA_FROM_WORLD)
    assert _off(start, truth) > 4.0
    found = refiners.to_clean_image(parts, 1.3 * images, jnp.asarray(INTRINSICS), cameras, start)
    assert _off(found, truth) < 0.1
    everywhere = list(jnp.ones_like(images, bool))
    tilted = images + jnp.linspace(0.0, 0.3, images.shape[-1])
    seen = gauss_newton.LevelViews(list(0.7 * tilted), everywhere, jnp.asarray(INTRINSICS))
    found = refiners.to_raw_gradients(parts, seen, cameras, start, 40)
    assert _off(found, truth) < 0.3


def test_overlap_is_the_integral_of_the_product_and_finds_a_motion(bone):
    cloud, _ = bone
    few = jax.tree.map(lambda a: a[:5], cloud)
    other = gaussians.move(jax.tree.map(lambda a: a[5:9], cloud), jnp.asarray(_pose(2.0)))
    axis = np.arange(-75.0, 75.0, 1.5)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)

    def density(g):
        total = np.zeros(len(points))
        for d, m, s, q in zip(*(np.asarray(a, np.float64) for a in (g.density, g.mean, g.scale, g.quaternion))):
            R = np.asarray(rigid.matrix_from_quaternion(jnp.asarray(q)), np.float64)
            total += d * np.exp(-0.5 * (((points - m) @ R / s) ** 2).sum(1))
        return total

    expected = (density(few) * density(other)).sum() * 1.5**3
    np.testing.assert_allclose(refiners.overlap(few, other), expected, rtol=1e-3)
    truth = _pose(1.0)
    moved = gaussians.move(cloud, jnp.asarray(truth))
    assert _off(refiners.to_gaussians(cloud, moved, jnp.eye(4)), truth) < 0.05


def test_the_plain_network_sees_the_channels_of_the_other():
    """The comparison is one of heads: both have the same six channels of each view."""
    shapes = jax.eval_shape(lambda: plain.init(SHAPE, tiny.MODEL, jax.random.key(0)))
    first = shapes["plain"]["params"]["View_0"]["Conv_0"]["kernel"].shape
    images = jnp.zeros((1, 2, 32, 32))
    cameras = jnp.asarray(CAMERA_FROM_WORLD)[None]
    channels = recm.image_channels(images, images == 0, images, jnp.asarray(INTRINSICS)[None], cameras)
    assert first[2] == 4 * channels.shape[-1]
