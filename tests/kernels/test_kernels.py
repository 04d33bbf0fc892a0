"""splat, voxelize and drr: the definitions against quadrature, every backend against the definitions, hostile inputs.

Test data is anisotropic, off-centre and rotated throughout: symmetric data would hide swapped axes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from kernels.common import dispatch
from kernels.common import support
from kernels.common import symmetric
from kernels.drr import api as drr_api
from kernels.drr import geometry
from kernels.drr import oracle as drr_oracle
from kernels.splat import api as splat_api
from kernels.splat import oracle as splat_oracle
from kernels.voxelize import api as voxelize_api
from kernels.voxelize import oracle as voxelize_oracle

HEIGHT, WIDTH = 37, 50
SHAPE = (21, 26, 17)
CAMERAS = np.array([[420.0, 450.0, 17.3, 20.6], [610.0, 560.0, 12.1, 25.7], [300.0, 345.0, 30.2, 9.9]])
IMAGE_TOLERANCE, GRADIENT_TOLERANCE, BIAS_TOLERANCE = 1e-5, 1e-4, 2e-5


def _cloud(seed, batch, n, centre, spread, scales, density):
    rng = np.random.default_rng(seed)
    R = Rotation.random(batch * n, rng).as_matrix()
    K = np.einsum("nij,nj,nkj->nik", R, rng.uniform(*scales, (batch * n, 3)) ** -2.0, R)
    packed = np.stack([K[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))], -1)
    mean = rng.normal(size=(batch, n, 3)) * spread + centre
    return rng.uniform(*density, (batch, n)), mean, packed.reshape(batch, n, 6)


def _splat_cloud(seed=0, batch=3, n=30):
    """Gaussians before cameras, mm; the cloud is wider than the images, so that some are cut by the borders."""
    return _cloud(seed, batch, n, [14.0, 6.0, 690.0], [22.0, 15.0, 30.0], (1.5, 9.0), (0.002, 0.02))


def _voxel_cloud(seed=1, batch=2, n=30):
    """Gaussians in voxel indices of a grid of SHAPE, some reaching over its faces."""
    return _cloud(seed, batch, n, [9.0, 14.0, 7.0], [5.0, 7.0, 3.0], (0.8, 3.5), (0.002, 0.02))


def _smooth_volume(shape=(12, 15, 10)):
    axes = np.meshgrid(*[np.arange(n, dtype=float) for n in shape], indexing="ij")
    r = [(a - c) / s for a, c, s in zip(axes, (4.7, 8.2, 5.5), (2.6, 3.7, 3.1))]
    return 0.03 * np.exp(-0.5 * (r[0] ** 2 + r[1] ** 2 + r[2] ** 2 + 0.5 * r[0] * r[1] - 0.4 * r[1] * r[2]))


def _voxel_from_camera(shape=(12, 15, 10), depth_mm=690.0):
    """Two rotated poses of an anisotropic grid (0.7, 0.9, 2.1 mm) before the source, off the optical axis."""
    matrices = []
    for vector, shift in (([0.5, -0.9, 0.3], [2.0, -1.0, 0.0]), ([-0.2, 0.4, 1.6], [-1.0, 2.0, 9.0])):
        A = np.diag([1 / 0.7, 1 / 0.9, 1 / 2.1]) @ Rotation.from_rotvec(vector).as_matrix()
        middle = (np.array(shape) - 1) / 2
        matrices.append(np.concatenate([A, (middle - A @ (np.array([0.0, 0.0, depth_mm]) + shift))[:, None]], 1))
    return np.stack(matrices)


DRR_CAMERAS = np.array([[700.0, 640.0, 7.2, 5.9], [560.0, 610.0, 9.4, 6.8]])
DRR_SIZE = (14, 18)


def _single(*arrays):
    return tuple(np.asarray(a, np.float32) for a in arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _oracle_value_and_gradients(operator, size, cotangent, *arrays):
    value, pullback = jax.vjp(lambda *a: ORACLES[operator](*a, size), *arrays)
    return value, pullback(cotangent)


def _exact(operator, size, cotangent, *arrays):
    """Value and gradients by the oracle in float64, as numpy."""
    with jax.enable_x64(True):
        cotangent, *arrays = (jnp.asarray(a, jnp.float64) for a in (cotangent, *arrays))
        return jax.tree.map(np.asarray, _oracle_value_and_gradients(operator, size, cotangent, *arrays))


def _relative(actual, wanted):
    return np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)


def assert_gradients_close(actual, wanted, tolerance=GRADIENT_TOLERANCE, bias=BIAS_TOLERANCE):
    """Relative L2 of every array and of each of its components, and the signed bias of its scale.

    Components (the last axis of gradients to vectors and matrices) are judged alone, so that a wrong small one cannot
    hide behind a large one. The bias <actual - wanted, wanted> / |wanted|^2 is what a gradient scaled by 1 + bias has:
    rounding averages out in it, a wrong factor does not.
    """
    for a, w in zip(actual, wanted, strict=True):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert a.shape == w.shape
        assert np.all(np.isfinite(a))
        parts = [(a, w)] + ([(a[..., i], w[..., i]) for i in range(w.shape[-1])] if w.shape[-1] in (3, 4, 6) else [])
        for part, (x, y) in enumerate(parts):
            assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), part
            assert abs(np.sum((x - y) * y)) <= bias * np.sum(y * y), part


OPERATORS = {
    "splat": lambda *arrays, size, **kwargs: splat_api.splat(*arrays, *size, **kwargs),
    "voxelize": lambda *arrays, size, **kwargs: voxelize_api.voxelize(*arrays, size, **kwargs),
    "drr": lambda *arrays, size, **kwargs: drr_api.drr(*arrays, *size, **kwargs),
}
ORACLES = {
    "splat": lambda density, mean, precision, k, size: splat_oracle.splat(density, mean, precision, k, *size),
    "voxelize": voxelize_oracle.voxelize,
    "drr": lambda volume, affine, k, size: drr_oracle.drr(volume, affine, k, *size, 1.0, 730.0),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _value_and_gradients(operator, implementation, size, cotangent, *arrays):
    value, pullback = jax.vjp(functools.partial(OPERATORS[operator], size=size, implementation=implementation), *arrays)
    return value, pullback(cotangent)


def _run_single(operator, implementation, size, cotangent, *arrays):
    """Value and gradients in float32, or a skip with the backend's own reason."""
    try:
        return _value_and_gradients(operator, implementation, size, *_single(cotangent, *arrays))
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def _cotangent(shape, seed=9):
    return np.random.default_rng(seed).normal(size=shape) + 0.3


# The definitions.


def _quadrature(density, mean, K, direction, step_mm=0.1, reach_mm=130.0):
    """Trapezoidal line integral of one 3D density along rays from 0; converges faster than any power of the step."""
    unit = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    t = np.linalg.norm(mean) + np.arange(-reach_mm, reach_mm, step_mm)
    r = unit[..., None, :] * t[:, None] - mean
    return density * step_mm * np.exp(-0.5 * np.einsum("...i,ij,...j", r, K, r)).sum(-1)


def _pixel_directions(intrinsics, rows, columns):
    v, u = np.meshgrid(rows, columns, indexing="ij")
    fx, fy, cx, cy = intrinsics
    return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones(u.shape)], -1)


def test_splat_is_the_line_integral(x64):
    """The closed form without the support rule against quadrature of the density, Gaussian by Gaussian."""
    cloud = _cloud(2, 1, 8, [14.0, 6.0, 690.0], [12.0, 8.0, 30.0], (1.5, 9.0), (0.002, 0.02))
    density, mean, packed = (a[0] for a in cloud)
    K = np.asarray(symmetric.to_matrix(jnp.asarray(packed)))
    rows, columns = np.arange(0, HEIGHT, 6), np.arange(0, WIDTH, 7)
    directions = _pixel_directions(CAMERAS[0], rows, columns)
    for i in range(len(density)):
        cloud = (jnp.asarray(a[i : i + 1]) for a in (density, mean, packed))
        image = splat_oracle.splat(*cloud, jnp.asarray(CAMERAS[0]), HEIGHT, WIDTH, use_support=False)
        wanted = _quadrature(density[i], mean[i], K[i], directions)
        seen = wanted > 1e-12 * wanted.max()
        np.testing.assert_allclose(np.asarray(image)[np.ix_(rows, columns)][seen], wanted[seen], rtol=1e-10)


def test_float32_splat_without_the_rule(monkeypatch):
    """The shifted form in float32: with the rule's limits moved out of the way it is the unlimited line integral."""
    arrays = _single(*(a[0] for a in _splat_cloud()), CAMERAS[0])
    with jax.enable_x64(True):
        exact = (jnp.asarray(a, jnp.float64) for a in arrays)
        wanted = np.asarray(splat_oracle.splat(*exact, HEIGHT, WIDTH, use_support=False))
    for name, value in (("Q_FADE", 150.0), ("Q_MAX", 160.0)):
        monkeypatch.setattr(support, name, value)
    image = splat_api.splat(*map(jnp.asarray, arrays), HEIGHT, WIDTH, implementation="xla")
    assert np.max(np.abs(image - wanted)) < 1e-4 * wanted.max()


def test_support_rule_loses_little(x64):
    """0.3 % (L2) in the image, 0.6 % in the volume; and it does cut: the difference is not zero."""
    splat = jax.jit(functools.partial(splat_oracle.splat, height=HEIGHT, width=WIDTH), static_argnames="use_support")
    voxelize = jax.jit(functools.partial(voxelize_oracle.voxelize, shape=SHAPE), static_argnames="use_support")
    for seed in range(3):
        cases = ((splat, (*_splat_cloud(seed), CAMERAS), 0.003), (voxelize, _voxel_cloud(seed), 0.006))
        for function, cloud, limit in cases:
            ruled, full = (function(*map(jnp.asarray, cloud), use_support=use) for use in (True, False))
            assert 0 < _relative(ruled, full) < limit


def test_support_weight_is_c1_and_its_slope_right(x64):
    q = jnp.asarray([0.0, 1.0, 9.0, 12.249, 12.251, 14.0, 15.999, 16.001, 40.0, 1e30])
    weight, slope = support.weight_and_slope(q)
    np.testing.assert_allclose(weight, support.weight(q), rtol=1e-14)
    np.testing.assert_allclose(slope[1:], jax.vmap(jax.grad(support.weight))(q[1:]), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(weight[:4], np.exp(-0.5 * q[:4]), rtol=1e-14)
    assert np.all(np.asarray(weight)[7:] == 0) and np.all(np.asarray(slope)[7:] == 0)
    for edge in (support.Q_FADE, support.Q_MAX):
        below, above = (np.array(support.weight_and_slope(jnp.asarray(edge + e))) for e in (-1e-9, 1e-9))
        np.testing.assert_allclose(below, above, rtol=0, atol=1e-10)


# One suite over all backends.


def _over(backends):
    return pytest.mark.parametrize("implementation", sorted(backends))


@functools.lru_cache
def _splat_case(seed):
    arrays = _single(*_splat_cloud(seed), CAMERAS)
    cotangent = _cotangent((3, HEIGHT, WIDTH), seed)
    return arrays, cotangent, _exact("splat", (HEIGHT, WIDTH), cotangent, *arrays)


@functools.lru_cache
def _voxelize_case(seed):
    arrays = _single(*_voxel_cloud(seed))
    cotangent = _cotangent((2, *SHAPE), seed)
    return arrays, cotangent, _exact("voxelize", SHAPE, cotangent, *arrays)


@pytest.mark.parametrize("seed", [10, 11])
@_over(splat_api.BACKENDS)
def test_splat(implementation, seed):
    arrays, cotangent, (wanted, wanted_gradients) = _splat_case(seed)
    image, gradients = _run_single("splat", implementation, (HEIGHT, WIDTH), cotangent, *arrays)
    assert image.dtype == np.float32
    assert all(_relative(a, w) < IMAGE_TOLERANCE for a, w in zip(image, wanted))
    assert_gradients_close(gradients, wanted_gradients)


@_over(splat_api.BACKENDS)
def test_splat_of_a_camera_that_is_not_learned(implementation):
    arrays, cotangent, (_, wanted_gradients) = _splat_case(10)
    *cloud, camera = _single(*arrays)
    run = lambda *cloud: splat_api.splat(*cloud, camera, HEIGHT, WIDTH, implementation=implementation)
    try:
        gradients = jax.vjp(run, *cloud)[1](jnp.asarray(cotangent, jnp.float32))
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert_gradients_close(gradients, wanted_gradients[:3])


@pytest.mark.parametrize("seed", [12, 13])
@_over(voxelize_api.BACKENDS)
def test_voxelize(implementation, seed):
    arrays, cotangent, (wanted, wanted_gradients) = _voxelize_case(seed)
    volume, gradients = _run_single("voxelize", implementation, SHAPE, cotangent, *arrays)
    assert volume.dtype == np.float32
    assert all(_relative(a, w) < IMAGE_TOLERANCE for a, w in zip(volume, wanted))
    assert_gradients_close(gradients, wanted_gradients)


@_over(splat_api.BACKENDS)
def test_splat_batches_are_independent(implementation):
    """Leading axes (3, 1) and no leading axes give what (3,) gives."""
    arrays, cotangent, (wanted, _) = _splat_case(10)
    images, _ = _run_single("splat", implementation, (HEIGHT, WIDTH), cotangent[:, None], *(a[:, None] for a in arrays))
    assert images.shape == (3, 1, HEIGHT, WIDTH) and _relative(images[:, 0], wanted) < IMAGE_TOLERANCE
    alone, _ = _run_single("splat", implementation, (HEIGHT, WIDTH), cotangent[1], *(a[1] for a in arrays))
    assert alone.shape == (HEIGHT, WIDTH) and _relative(alone, wanted[1]) < IMAGE_TOLERANCE


@_over(drr_api.FORWARD)
def test_drr(implementation):
    arrays, cotangent = _single(_smooth_volume(), _voxel_from_camera(), DRR_CAMERAS), _cotangent((2, *DRR_SIZE))
    wanted, wanted_gradients = _exact("drr", DRR_SIZE, cotangent, *arrays)
    image, gradients = _run_single("drr", implementation, DRR_SIZE, cotangent, *arrays)
    assert image.dtype == np.float32
    assert all(_relative(a, w) < IMAGE_TOLERANCE for a, w in zip(image, wanted))
    assert_gradients_close([g.ravel() for g in gradients], [w.ravel() for w in wanted_gradients])


def test_drr_gradients_of_a_rough_volume():
    """To volume, pose and intrinsics in float64: in float32 samples beside a voxel face land in the next cell, where a
    random volume has another slope."""
    volume = np.random.default_rng(3).uniform(size=(12, 15, 10))
    arrays, cotangent = (volume, _voxel_from_camera(), DRR_CAMERAS), _cotangent((2, *DRR_SIZE))
    wanted, wanted_gradients = _exact("drr", DRR_SIZE, cotangent, *arrays)
    with jax.enable_x64(True):
        image, gradients = _value_and_gradients("drr", "xla", DRR_SIZE, *map(jnp.asarray, (cotangent, *arrays)))
    np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-10 * wanted.max())
    assert_gradients_close([g.ravel() for g in gradients], [g.ravel() for g in wanted_gradients], 1e-8, 1e-8)


def _drr_rays(arrays, size):
    """Origins and directions (float32) of the rays of `drr`'s arrays, as its backends take them."""
    return _single(*geometry.voxel_rays(*_single(*arrays[1:]), *size))


def _drr_backend(implementation, volume, origin, direction, step_mm, cotangent):
    """Image and gradients to volume, origins and directions by one backend alone, or a skip with its own reason."""

    @jax.jit
    def run(volume, origin, direction, cotangent):
        rays = origin, direction, cotangent
        image = drr_api.FORWARD[implementation](volume, origin, direction, step_mm)
        to_volume = drr_api.TO_VOLUME[implementation](volume.shape, *rays, step_mm)
        return image, (to_volume, *drr_api.TO_RAYS[implementation](volume, *rays, step_mm))

    try:
        return jax.tree.map(np.asarray, run(volume, origin, direction, cotangent))
    except NotImplementedError as reason:
        pytest.skip(str(reason))


@_over(drr_api.TO_RAYS)
@pytest.mark.parametrize("step_mm", [0.3, 2.7])
def test_drr_gradients_of_every_ray(implementation, step_mm):
    """Ray by ray, not summed into a pose; a larger volume and image, which backends cut into parts. The truth is XLA's
    backward in float64, which `test_drr_gradients_of_a_rough_volume` holds to the oracle."""
    size, shape = (21, 37), (31, 22, 27)
    volume, *view = _single(2.0 * _smooth_volume(shape), _voxel_from_camera(shape), 1.7 * DRR_CAMERAS)
    origin, direction = _drr_rays((volume, *view), size)
    cotangent = np.float32(_cotangent((2, *size), 4))
    cotangent[:, 5:8, 9:30] = 0.0
    with jax.enable_x64(True):
        exact = (jnp.asarray(a, jnp.float64) for a in (volume, origin, direction, cotangent))
        wanted_image, wanted = _drr_backend("xla", *(a for a in list(exact)[:3]), step_mm, np.float64(cotangent))
    image, gradients = _drr_backend(implementation, volume, origin, direction, step_mm, cotangent)
    assert _relative(image, wanted_image) < IMAGE_TOLERANCE
    assert [g.shape for g in gradients] == [(31, 22, 27), (2, 3), (2, *size, 3)]
    assert not np.any(gradients[2][cotangent == 0])
    assert_gradients_close(gradients, wanted)


@_over(drr_api.PER_RAY)
def test_drr_and_motion(implementation):
    """Every pixel's derivative to a turn about the source and a shift of the volume, by the oracle in float64."""
    arrays = _single(_smooth_volume(), _voxel_from_camera(), DRR_CAMERAS)
    with jax.enable_x64(True):
        volume, affine, k = (jnp.asarray(a, jnp.float64) for a in arrays)

        def moved(twist):
            w, t = twist[:3], twist[3:]
            inverse = jnp.eye(3) + jnp.cross(jnp.eye(3), w[None]).T  # of a small turn: x + x x w
            linear = affine[:, :, :3] @ inverse
            shifted = affine[:, :, 3] - jnp.einsum("bij,j->bi", linear, t)
            return ORACLES["drr"](volume, jnp.concatenate([linear, shifted[..., None]], -1), k, DRR_SIZE)

        wanted_image, wanted = moved(jnp.zeros(6)), np.asarray(jax.jacfwd(moved)(jnp.zeros(6)))
    try:
        run = functools.partial(drr_api.drr_and_motion, height=14, width=18, implementation=implementation)
        image, motion = jax.jit(run)(*arrays)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert _relative(image, np.asarray(wanted_image)) < IMAGE_TOLERANCE
    assert_gradients_close([motion], [wanted], 1e-4, 1e-4)
    gradient = jax.grad(lambda volume: jnp.sum(drr_api.drr_and_motion(volume, *arrays[1:], 14, 18)[1]))(arrays[0])
    assert not np.any(gradient)  # said not to be differentiable, and quiet about it


@_over(drr_api.FORWARD)
def test_drr_follows_its_step(implementation):
    arrays = _single(_smooth_volume(), _voxel_from_camera(), DRR_CAMERAS)
    with jax.enable_x64(True):
        wanted = np.asarray(drr_oracle.drr(*(jnp.asarray(a, jnp.float64) for a in arrays), *DRR_SIZE, 2.7, 730.0))
    try:
        image = jax.jit(
            functools.partial(
                drr_api.drr, height=DRR_SIZE[0], width=DRR_SIZE[1], step_mm=2.7, implementation=implementation
            )
        )(*arrays)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert _relative(image, wanted) < IMAGE_TOLERANCE


# A test of the test.


def _scaled(index):
    return lambda gradients: [g * 1.02 if i == index else g for i, g in enumerate(gradients)]


def _swapped(index, a, b):
    def plant(gradients):
        order = list(range(gradients[index].shape[-1]))
        order[a], order[b] = b, a
        return [g[..., order] if i == index else g for i, g in enumerate(gradients)]

    return plant


def _biased(gradients):
    return [g * (1 + 5e-5) for g in gradients]


def _half_an_axis(gradients):
    return [gradients[0], gradients[1] * np.array([1.0, 1.0, 1.0 - 2e-4]), *gradients[2:]]


@pytest.mark.parametrize(
    "plant",
    [
        _scaled(0),
        _scaled(1),
        _scaled(2),
        _scaled(3),
        _swapped(1, 0, 1),
        _swapped(2, 1, 2),
        _swapped(3, 0, 1),
        _swapped(3, 2, 3),
        _biased,
        _half_an_axis,
        lambda g: [*g[:3], -g[3]],
        lambda g: [g[0] * np.nan, *g[1:]],
        lambda g: [g[0], g[1][:, :1], *g[2:]],
        lambda g: g[:3],
    ],
)
def test_comparison_catches_planted_errors(plant):
    wanted = _splat_case(10)[2][1]
    assert_gradients_close(wanted, wanted)
    with pytest.raises((AssertionError, ValueError)):
        assert_gradients_close(plant(list(wanted)), wanted)


# Hostile inputs.


def _try(operator, implementation, *arrays, size):
    return _run_single(operator, implementation, size, np.ones(size), *arrays)


SMALL = (9, 12)
SMALL_CAMERA = np.array([500.0, 450.0, 5.2, 4.6])
SMALL_SHAPE = (6, 9, 5)


def _finite(tree):
    return all(bool(np.all(np.isfinite(x))) for x in jax.tree.leaves(tree))


def _ellipsoid(means, sigma=(2.0, 4.0, 3.0), density=0.02):
    """Equal rotated Gaussians at `means`."""
    R = Rotation.from_rotvec([0.4, -0.7, 0.2]).as_matrix()
    K = R @ np.diag(np.array(sigma) ** -2.0) @ R.T
    packed = [K[0, 0], K[0, 1], K[0, 2], K[1, 1], K[1, 2], K[2, 2]]
    n = len(means)
    return np.full(n, density), np.array(means, float).reshape(n, 3), np.tile(packed, (n, 1))


@_over(splat_api.BACKENDS)
def test_splat_of_nothing(implementation):
    image, gradients = _try("splat", implementation, *_ellipsoid([]), SMALL_CAMERA, size=SMALL)
    np.testing.assert_array_equal(image, np.zeros(SMALL))
    assert [g.shape for g in gradients] == [(0,), (0, 3), (0, 6), (4,)] and _finite(gradients)


@_over(splat_api.BACKENDS)
def test_splat_of_zero_density(implementation):
    cloud = _ellipsoid([[1.0, 2.0, 700.0], [-3.0, 0.0, 690.0]], density=0.0)
    image, gradients = _try("splat", implementation, *cloud, SMALL_CAMERA, size=SMALL)
    np.testing.assert_array_equal(image, np.zeros(SMALL))
    assert _finite(gradients) and np.all(gradients[0] > 0)


@_over(splat_api.BACKENDS)
@pytest.mark.parametrize("mean", [[1.0, 2.0, -700.0], [0.0, 0.0, 0.0], [0.5, 0.0, 5.0], [1.0, 0.0, -5.0]])
def test_splat_behind_or_across_the_source(implementation, mean):
    image, gradients = _try("splat", implementation, *_ellipsoid([mean, mean]), SMALL_CAMERA, size=SMALL)
    np.testing.assert_array_equal(image, np.zeros(SMALL))
    assert all(not np.any(g) for g in gradients)


@_over(splat_api.BACKENDS)
@pytest.mark.parametrize(
    "cloud",
    [
        _ellipsoid([[3.0, -2.0, 700.0], [40.0, 9.0, 650.0]], (90.0, 160.0, 60.0)),
        _ellipsoid([[0.3, 0.5, 700.0], [-3.1, 1.2, 700.0]], (0.3, 0.2, 0.5)),
        _ellipsoid([[-7.28, -6.2, 700.0], [40.0, 3.0, 700.0]], (0.02, 0.03, 0.01)),
    ],
    ids=["larger than the image", "sub-pixel", "a hundredth of a pixel, outside"],
)
def test_splat_of_extreme_sizes(implementation, cloud):
    image, gradients = _try("splat", implementation, *cloud, SMALL_CAMERA, size=SMALL)
    wanted, _ = _exact("splat", SMALL, np.ones(SMALL), *_single(*cloud, SMALL_CAMERA))
    np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-4 * max(wanted.max(), 1e-3))
    assert _finite((image, gradients))


def _poisoned(cloud, argument, value, position):
    """A cloud with one bad Gaussian, and the same without its density; unused lanes of a backend may read the last."""
    good = [a[0].copy() for a in cloud]
    good[0][position] = 0.0
    bad = [a[0].copy() for a in cloud]
    bad[argument][position, 1] = value
    return bad, good


def _assert_ignored(result, wanted, position):
    """The bad Gaussian adds nothing and gets zero gradients; the others (and the camera) have theirs."""
    (value, gradients), (wanted_value, wanted_gradients) = result, wanted
    np.testing.assert_allclose(value, wanted_value, rtol=0, atol=1e-6 * float(wanted_value.max()))
    assert all(not np.any(g[position]) for g in gradients[:3])
    assert_gradients_close(
        [np.delete(g, position, 0) for g in gradients[:3]] + [*gradients[3:]],
        [np.delete(g, position, 0) for g in wanted_gradients[:3]] + [*wanted_gradients[3:]],
    )


_bad_values = pytest.mark.parametrize(
    "argument,value,position",
    [
        (1, np.nan, 0),
        (1, np.nan, -1),
        (1, np.inf, 14),
        (1, np.inf, -1),
        (2, np.nan, 14),
        (2, np.nan, -1),
        (2, np.inf, -1),
    ],
)


@_bad_values
@_over(splat_api.BACKENDS)
def test_splat_ignores_what_is_not_finite(implementation, argument, value, position):
    bad, good = _poisoned(_splat_cloud(20), argument, value, position)
    results = (_try("splat", implementation, *a, CAMERAS[0], size=(HEIGHT, WIDTH)) for a in (bad, good))
    _assert_ignored(*results, position)


@_bad_values
@_over(voxelize_api.BACKENDS)
def test_voxelize_ignores_what_is_not_finite(implementation, argument, value, position):
    bad, good = _poisoned(_voxel_cloud(21), argument, value, position)
    _assert_ignored(*(_try("voxelize", implementation, *a, size=SHAPE) for a in (bad, good)), position)


@_over(voxelize_api.BACKENDS)
@pytest.mark.parametrize(
    "cloud",
    [
        _ellipsoid([]),
        _ellipsoid([[2.0, 3.0, 1.0], [3.0, 4.0, 2.5]], density=0.0),
        _ellipsoid([[-40.0, 3.0, 2.0], [2.0, 3.0, 900.0]]),
        _ellipsoid([[2.0, 5.0, 1.0], [-9.0, 3.0, 4.0]], (60.0, 90.0, 40.0)),
        _ellipsoid([[2.1, 4.9, 1.0], [3.5, 3.5, 2.5]], (0.2, 0.1, 0.15)),
    ],
    ids=["nothing", "zero density", "outside", "larger than the grid", "sub-voxel"],
)
def test_voxelize_of_hostile_clouds(implementation, cloud):
    volume, gradients = _try("voxelize", implementation, *cloud, size=SMALL_SHAPE)
    wanted, _ = _exact("voxelize", SMALL_SHAPE, np.ones(SMALL_SHAPE), *_single(*cloud))
    np.testing.assert_allclose(volume, wanted, rtol=0, atol=1e-4 * max(wanted.max(), 1e-3))
    assert [g.shape for g in gradients] == [a.shape for a in cloud] and _finite(gradients)


@_over(drr_api.FORWARD)
@pytest.mark.parametrize("depth_mm", [3.0, -400.0], ids=["source inside", "behind the source"])
def test_drr_near_and_behind_the_source(implementation, depth_mm):
    arrays = _single(_smooth_volume(), _voxel_from_camera(depth_mm=depth_mm), DRR_CAMERAS)
    wanted, _ = _exact("drr", DRR_SIZE, np.ones((2, *DRR_SIZE)), *arrays)
    image, gradients = _run_single("drr", implementation, DRR_SIZE, np.ones((2, *DRR_SIZE)), *arrays)
    np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-5 * max(wanted.max(), 1e-3))
    assert _finite(gradients) and (np.any(wanted) if depth_mm > 0 else not np.any(image))


@_over(drr_api.TO_RAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_drr_ignores_rays_that_are_not_finite(implementation, value):
    """Bad directions in view 0 and a bad origin of view 1: no image, no gradients; the other rays keep theirs."""
    volume, *view = _single(_smooth_volume(), _voxel_from_camera(), DRR_CAMERAS)
    origin, direction = _drr_rays((volume, *view), DRR_SIZE)
    cotangent = np.float32(_cotangent((2, *DRR_SIZE)))
    bad = np.zeros((2, *DRR_SIZE), bool)
    bad[0, [5, 7, 9], [6, 8, 10]], bad[1] = True, True
    wanted_image, wanted = _drr_backend(implementation, volume, origin, direction, 1.0, np.where(bad, 0, cotangent))
    origin, direction = origin.copy(), direction.copy()
    direction[0, [5, 7, 9], [6, 8, 10], [0, 1, 2]] = value
    origin[1, 2] = value
    image, gradients = _drr_backend(implementation, volume, origin, direction, 1.0, cotangent)
    np.testing.assert_array_equal(image, np.where(bad, 0, wanted_image))
    assert np.all(wanted_image[0][bad[0]] > 0) and np.any(wanted_image[1])
    for gradient, truth in zip(gradients, wanted):
        np.testing.assert_array_equal(gradient, truth)


@_over(drr_api.TO_RAYS)
@pytest.mark.parametrize(
    "shape,batch,size",
    [
        ((4, 5, 6), 0, (3, 4)),
        ((4, 5, 6), 2, (0, 4)),
        ((4, 5, 6), 2, (3, 0)),
        ((4, 0, 6), 2, (3, 4)),
        ((1, 1, 1), 2, (3, 4)),
    ],
    ids=["no views", "no rows", "no columns", "no voxels", "one voxel"],
)
def test_drr_of_nothing(implementation, shape, batch, size):
    """Shapes without elements, and one voxel that no ray meets: zeros."""
    affine = np.zeros((batch, 3, 4)) + np.concatenate([np.eye(3), [[90.0], [70.0], [-600.0]]], 1)
    arrays = np.ones(shape), affine, np.zeros((batch, 4)) + [500.0, 450.0, 1.5, 1.0]
    image, gradients = _run_single("drr", implementation, size, np.ones((batch, *size)), *arrays)
    assert image.shape == (batch, *size) and not np.any(image)
    assert [g.shape for g in gradients] == [a.shape for a in arrays] and not any(np.any(g) for g in gradients)


# Arguments and dispatch.


def test_unknown_implementations_are_named():
    cloud = [jnp.ones(shape) for shape in ((5,), (5, 3), (5, 6), (4,))]
    ray, affine = jnp.ones((1, 4)), jnp.ones((1, 3, 4))
    for call in (
        lambda: splat_api.splat(*cloud, 9, 12, implementation="cuda"),
        lambda: splat_api.splat(*cloud, 9, 12, implementation=("xla", "cuda")),
        lambda: voxelize_api.voxelize(*cloud[:3], (5, 6, 7), implementation="cuda"),
        lambda: drr_api.drr(jnp.ones((4, 5, 6)), affine, ray, 5, 6, implementation="cuda"),
    ):
        with pytest.raises(ValueError, match=r"'cuda'.*'xla'"):
            call()


@pytest.mark.parametrize("index,shape", [(1, (4, 3)), (1, (5, 2)), (2, (5, 9)), (2, (2, 5, 6)), (3, (3,)), (3, (2, 4))])
def test_wrong_shapes_are_refused(index, shape):
    arrays = [jnp.ones(s) for s in ((5,), (5, 3), (5, 6), (4,))]
    arrays[index] = jnp.ones(shape)
    with pytest.raises(ValueError, match="shape"):
        splat_api.splat(*arrays, 9, 12)
    if index < 3:
        with pytest.raises(ValueError, match="shape"):
            voxelize_api.voxelize(*arrays[:3], (5, 6, 7))


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 6), (2, 3, 4), (2, 4)),
        ((5, 6, 7), (2, 4, 4), (2, 4)),
        ((5, 6, 7), (2, 3, 4), (3, 4)),
        ((5, 6, 7), (3, 4), (4,)),
    ],
)
def test_drr_refuses_wrong_shapes(shapes):
    with pytest.raises(ValueError, match="drr"):
        drr_api.drr(*(jnp.ones(s) for s in shapes), 5, 6)


@pytest.mark.parametrize("step_mm", [0.0, -1.0, np.nan])
def test_drr_refuses_steps_that_are_not_positive(step_mm):
    with pytest.raises(ValueError, match="step_mm"):
        drr_api.drr(jnp.ones((4, 5, 6)), jnp.ones((1, 3, 4)), jnp.ones((1, 4)), 5, 6, step_mm=step_mm)


def test_drr_honours_its_implementation_backward(monkeypatch):
    def unable(*_):
        raise NotImplementedError("no such device")

    for name, backward in (("ffi_cpu", unable), ("xla", lambda shape, *_: jnp.full(shape, 2.0, jnp.float32))):
        monkeypatch.setitem(drr_api.FORWARD, name, lambda volume, origin, direction, step_mm: direction[..., 0])
        monkeypatch.setitem(drr_api.TO_VOLUME, name, backward)
    arrays = _single(_smooth_volume(), _voxel_from_camera(), DRR_CAMERAS)
    to_volume = lambda implementation: jax.grad(
        lambda volume: jnp.sum(drr_api.drr(volume, *arrays[1:], *DRR_SIZE, implementation=implementation))
    )(arrays[0])
    with pytest.raises(NotImplementedError, match="no such device"):
        to_volume("ffi_cpu")
    for implementation in ("xla", None, ["ffi_cpu", "xla"]):
        assert np.all(to_volume(implementation) == 2.0)


def test_dispatch_falls_back_in_order():
    def unable(x):
        raise NotImplementedError("no such device")

    def run(backends, implementation):
        (found,) = dispatch.run("op", backends, implementation, lambda backend, x: backend(x), jnp.float32(1.0))
        return found

    backends = {"best": unable, "plain": lambda x: x + 1, "other": lambda x: x + 2}
    for call in (run, lambda *choice: jax.jit(lambda: run(*choice))()):
        assert call(backends, None) == 2
        assert call(backends, ("best", "other")) == 3
        with pytest.raises(NotImplementedError, match="no such device"):
            call(backends, "best")
        with pytest.raises(ExceptionGroup) as failure:
            call({"best": unable, "next": unable}, None)
        assert len(failure.value.exceptions) == 2
