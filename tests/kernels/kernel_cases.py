"""Inputs, references and comparisons that the tests of the kernels share.

Inputs are anisotropic, off-centre and rotated: symmetric ones would hide swapped axes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

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


def random_cloud(seed, batch, n, centre, spread, scales, density):
    rng = np.random.default_rng(seed)
    R = Rotation.random(batch * n, rng).as_matrix()
    K = np.einsum("nij,nj,nkj->nik", R, rng.uniform(*scales, (batch * n, 3)) ** -2.0, R)
    packed = np.stack([K[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))], -1)
    mean = rng.normal(size=(batch, n, 3)) * spread + centre
    return rng.uniform(*density, (batch, n)), mean, packed.reshape(batch, n, 6)


def splat_cloud(seed=0, batch=3, n=30):
    """Gaussians before cameras, mm; the cloud is wider than the images, so that some are cut by the borders."""
    return random_cloud(seed, batch, n, [14.0, 6.0, 690.0], [22.0, 15.0, 30.0], (1.5, 9.0), (0.002, 0.02))


def voxel_cloud(seed=1, batch=2, n=30):
    """Gaussians in voxel indices of a grid of SHAPE, some reaching over its faces."""
    return random_cloud(seed, batch, n, [9.0, 14.0, 7.0], [5.0, 7.0, 3.0], (0.8, 3.5), (0.002, 0.02))


def smooth_volume(shape=(12, 15, 10)):
    axes = np.meshgrid(*[np.arange(n, dtype=float) for n in shape], indexing="ij")
    r = [(a - c) / s for a, c, s in zip(axes, (4.7, 8.2, 5.5), (2.6, 3.7, 3.1))]
    return 0.03 * np.exp(-0.5 * (r[0] ** 2 + r[1] ** 2 + r[2] ** 2 + 0.5 * r[0] * r[1] - 0.4 * r[1] * r[2]))


def voxel_from_camera(shape=(12, 15, 10), depth_mm=690.0):
    """Two rotated poses of an anisotropic grid (0.7, 0.9, 2.1 mm) before the source, off the optical axis."""
    matrices = []
    for vector, shift in (([0.5, -0.9, 0.3], [2.0, -1.0, 0.0]), ([-0.2, 0.4, 1.6], [-1.0, 2.0, 9.0])):
        A = np.diag([1 / 0.7, 1 / 0.9, 1 / 2.1]) @ Rotation.from_rotvec(vector).as_matrix()
        middle = (np.array(shape) - 1) / 2
        matrices.append(np.concatenate([A, (middle - A @ (np.array([0.0, 0.0, depth_mm]) + shift))[:, None]], 1))
    return np.stack(matrices)


DRR_CAMERAS = np.array([[700.0, 640.0, 7.2, 5.9], [560.0, 610.0, 9.4, 6.8]])
DRR_SIZE = (14, 18)


def to_single(*arrays):
    return tuple(np.asarray(a, np.float32) for a in arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def oracle_value_and_gradients(operator, size, cotangent, *arrays):
    value, pullback = jax.vjp(lambda *a: ORACLES[operator](*a, size), *arrays)
    return value, pullback(cotangent)


def exact_value_and_gradients(operator, size, cotangent, *arrays):
    """Value and gradients by the oracle in float64, as numpy."""
    with jax.enable_x64(True):
        cotangent, *arrays = (jnp.asarray(a, jnp.float64) for a in (cotangent, *arrays))
        return jax.tree.map(np.asarray, oracle_value_and_gradients(operator, size, cotangent, *arrays))


def relative_error(actual, wanted):
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
def value_and_gradients(operator, implementation, size, cotangent, *arrays):
    value, pullback = jax.vjp(functools.partial(OPERATORS[operator], size=size, implementation=implementation), *arrays)
    return value, pullback(cotangent)


def run_single(operator, implementation, size, cotangent, *arrays):
    """Value and gradients in float32, or a skip with the backend's own reason."""
    try:
        return value_and_gradients(operator, implementation, size, *to_single(cotangent, *arrays))
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def random_cotangent(shape, seed=9):
    return np.random.default_rng(seed).normal(size=shape) + 0.3


def over_backends(backends):
    return pytest.mark.parametrize("implementation", sorted(backends))


@functools.lru_cache
def splat_case(seed):
    arrays = to_single(*splat_cloud(seed), CAMERAS)
    cotangent = random_cotangent((3, HEIGHT, WIDTH), seed)
    return arrays, cotangent, exact_value_and_gradients("splat", (HEIGHT, WIDTH), cotangent, *arrays)


@functools.lru_cache
def voxelize_case(seed):
    arrays = to_single(*voxel_cloud(seed))
    cotangent = random_cotangent((2, *SHAPE), seed)
    return arrays, cotangent, exact_value_and_gradients("voxelize", SHAPE, cotangent, *arrays)


def camera_from_frame(depth_mm=690.0):
    """A turned frame for each of those poses, its origin some centimetres from the volume."""
    frames = np.tile(np.eye(4), (2, 1, 1))
    frames[:, :3, :3] = Rotation.from_rotvec([[0.3, 1.1, -0.4], [-0.8, 0.2, 0.9]]).as_matrix()
    frames[:, :3, 3] = [[20.0, -35.0, depth_mm + 15.0], [-12.0, 30.0, depth_mm - 40.0]]
    return frames


def drr_rays(arrays, size):
    """Origins and directions (float32) of the rays of `drr`'s arrays, as its backends take them."""
    return to_single(*geometry.voxel_rays(*to_single(*arrays[1:]), *size))


def drr_backend(implementation, volume, origin, direction, step_mm, cotangent):
    """Image and gradients to volume, origins and directions by one backend alone, or a skip with its own reason."""

    @jax.jit
    def run(volume, origin, direction, cotangent):
        rays = origin, direction
        image = drr_api.FORWARD[implementation](volume, *rays, step_mm)
        to_volume = drr_api.TO_VOLUME[implementation](volume.shape, *rays, cotangent, step_mm)
        slopes = drr_api.PER_RAY[implementation](volume, *rays, step_mm)[1:]
        by_origin, by_direction = (cotangent[..., None] * slope for slope in slopes)
        return image, (to_volume, jnp.sum(by_origin, (1, 2)), by_direction)

    try:
        return jax.tree.map(np.asarray, run(volume, origin, direction, cotangent))
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def run_with_ones(operator, implementation, *arrays, size):
    return run_single(operator, implementation, size, np.ones(size), *arrays)


def all_finite(tree):
    return all(bool(np.all(np.isfinite(x))) for x in jax.tree.leaves(tree))
