"""Ordered alpha blending: the formula in float64, what may not matter, and the drawing by tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radgs_jax.baselines import blending
from radgs_jax.geometry import rigid

HEIGHT, WIDTH = 21, 26
INTRINSICS = np.array([[180.0, 170.0, 11.3, 8.2], [150.0, 150.0, 14.0, 11.0]])


def _scene(count=40, seed=0):
    """Rotated, needle-like and off-centre Gaussians under two oblique cameras; some are opaque, some outside the image."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(count, 3)) * [4.0, 3.0, 5.0] + [1.0, -0.5, 2.0]
    scale = np.exp(rng.uniform(np.log(0.2), np.log(3.0), (count, 3)))
    quaternion = rng.normal(size=(count, 4))
    quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
    opacity, colour = rng.uniform(0.05, 0.95, count), rng.uniform(size=(2, count))
    twists = np.array([[0.3, -0.2, 0.1, 1.0, 2.0, 80.0], [-0.4, 1.1, 0.6, -1.0, 1.0, 60.0]])
    cameras = np.asarray(rigid.motion_about(jnp.zeros(3), jnp.asarray(twists, jnp.float32)), np.float64)
    return mean, scale, quaternion, opacity, INTRINSICS, cameras, colour


def _rotation(q):
    w, v = q[0], q[1:]
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def _as_it_reads(mean, scale, quaternion, opacity, intrinsics, cameras, colour):
    """sum_j c_j s_j prod_{l<j} (1 - s_l) of every pixel, one Gaussian after another, float64."""
    images = []
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    for (fx, fy, cx, cy), camera, c in zip(intrinsics, cameras, colour):
        seen = mean @ camera[:3, :3].T + camera[:3, 3]
        total, passed = np.zeros((HEIGHT, WIDTH)), np.ones((HEIGHT, WIDTH))
        for j in np.argsort(seen[:, 2]):
            x, y, z = seen[j]
            if z < blending.NEAR_MM:
                continue
            J = np.array([[fx / z, 0, -fx * x / z**2], [0, fy / z, -fy * y / z**2]]) @ camera[:3, :3]
            axes = _rotation(quaternion[j]) @ np.diag(scale[j])
            K = np.linalg.inv(J @ axes @ axes.T @ J.T + 0.3 * np.eye(2))
            d = np.stack([u - fx * x / z - cx, v - fy * y / z - cy], -1)
            s = np.minimum(opacity[j] * np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", d, K, d)), 0.99)
            total += c[j] * s * passed
            passed *= 1 - s
        images.append(total)
    return np.stack(images)


def _dense(mean, scale, quaternion, opacity, intrinsics, cameras, colour):
    seen = blending.footprints(mean, scale, quaternion, opacity, intrinsics, cameras)
    return blending.blend(seen, colour, HEIGHT, WIDTH)


def _listed(mean, scale, quaternion, opacity, intrinsics, cameras, colour, count=None, tile_px=8):
    seen = blending.footprints(mean, scale, quaternion, opacity, intrinsics, cameras)
    listed = blending.lists(seen, HEIGHT, WIDTH, tile_px, len(mean) if count is None else count)
    return blending.blend_listed(seen, colour, listed, HEIGHT, WIDTH, tile_px)


def _single(arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize("draw", [_dense, _listed])
def test_images_are_the_formula_in_float64(draw):
    scene = _scene()
    expected = _as_it_reads(*scene)
    assert expected.max() > 0.5 and expected.min() < 0.02
    np.testing.assert_allclose(jax.jit(draw)(*_single(scene)), expected, atol=2e-5)


@pytest.mark.parametrize("draw", [_dense, _listed])
def test_the_order_of_arrays_changes_nothing_and_the_order_of_depth_does(draw):
    mean, scale, quaternion, opacity, intrinsics, cameras, colour = _single(_scene())
    draw = jax.jit(draw)
    image = draw(mean, scale, quaternion, opacity, intrinsics, cameras, colour)
    order = np.random.default_rng(1).permutation(len(mean))
    moved = draw(mean[order], scale[order], quaternion[order], opacity[order], intrinsics, cameras, colour[:, order])
    np.testing.assert_allclose(moved, image, atol=1e-6)
    from_behind = rigid.matmul(jnp.asarray(np.diag([-1.0, 1.0, -1.0, 1.0]), jnp.float32), cameras)
    from_behind = from_behind.at[:, 2, 3].set(cameras[:, 2, 3])
    mirrored = draw(mean, scale, quaternion, opacity, intrinsics, from_behind, colour)
    assert np.abs(mirrored - image).max() > 0.05


def test_what_is_opaque_hides_what_is_behind_it_up_to_the_limit():
    mean = np.array([[0.0, 0.0, 5.0], [0.0, 0.0, -5.0], [0.0, 0.0, -99.0]])
    arrays = _single((mean, np.full((3, 3), 2.0), np.tile([1.0, 0, 0, 0], (3, 1)), [1.0, 1.0, 1.0]))
    camera = np.eye(4)[None].copy()
    camera[0, 2, 3] = 80.0
    cameras = _single((INTRINSICS[1:], camera))
    colour = np.array([[1.0, 0.25, 7.0]])
    for draw in (_dense, _listed):
        image = jax.jit(draw)(*arrays, *cameras, *_single((colour,)))
        # The near one is dark, the far one bright, and the third lies behind the source.
        np.testing.assert_allclose(image[0, 11, 14], 0.99 * 0.25 + 0.01 * 0.99, rtol=1e-5)


@pytest.mark.parametrize("draw", [_dense, _listed])
def test_gradients_are_those_of_finite_differences(draw, x64):
    """In float64, for every argument; strengths at the limit have none."""
    scene = [jnp.asarray(a) for a in _scene(12)]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, HEIGHT, WIDTH)))
    cost = jax.jit(lambda *arrays: jnp.sum(weights * draw(*arrays) ** 2))
    gradients = jax.jit(jax.grad(cost, argnums=tuple(range(7))))(*scene)
    rng = np.random.default_rng(3)
    for place, gradient in enumerate(gradients):
        direction = jnp.asarray(rng.normal(size=gradient.shape))
        step = 1e-6
        ends = [cost(*(a + t * direction if i == place else a for i, a in enumerate(scene))) for t in (-step, step)]
        slope = (ends[1] - ends[0]) / (2 * step)
        np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-4, atol=1e-5)


def test_gradients_by_tiles_are_those_of_the_formula_in_float32():
    scene = _single(_scene())
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, HEIGHT, WIDTH)), jnp.float32)
    found, expected = (
        jax.jit(jax.grad(lambda *arrays: jnp.sum(weights * draw(*arrays)), argnums=tuple(range(7))))(*scene)
        for draw in (_listed, _dense)
    )
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=3e-4 * np.abs(b).max())


def test_lists_hold_what_reaches_a_tile():
    """Far from complete, they lose nothing that shows; and none that is stronger in a tile is left out for a weaker one."""
    scene = list(_scene(60))
    scene[1] = 0.4 * scene[1]
    whole, short, shorter = (
        jax.jit(functools.partial(_listed, count=count))(*_single(scene)) for count in (None, 30, 12)
    )
    assert np.abs(short - whole).max() < 2e-3
    shorter = np.abs(shorter - whole)
    assert 0.01 < shorter.max() and np.median(shorter) < 2e-3
    seen = blending.footprints(*_single(scene[:6]))
    strength = []
    v, u = np.mgrid[8:16, 16:24]
    for j in range(60):
        du, dv = u - float(seen.centre[0, j, 0]), v - float(seen.centre[0, j, 1])
        xx, xy, yy = (float(k) for k in seen.conic[0, j])
        strength.append(float(seen.opacity[0, j]) * np.exp(-0.5 * (xx * du**2 + 2 * xy * du * dv + yy * dv**2)).max())
    listed = set(np.asarray(blending.lists(seen, HEIGHT, WIDTH, 8, 30))[0, 4 + 2].tolist())
    assert all(j in listed for j in range(60) if strength[j] > 0.01)
