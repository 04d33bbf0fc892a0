"""The definitions of splat and voxelize against quadrature, the support rule, and the comparison itself."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from kernels.common import support
from kernels.common import symmetric
from kernels.splat import api as splat_api
from kernels.splat import oracle as splat_oracle
from kernels.voxelize import oracle as voxelize_oracle


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
    cloud = kernel_cases.random_cloud(2, 1, 8, [14.0, 6.0, 690.0], [12.0, 8.0, 30.0], (1.5, 9.0), (0.002, 0.02))
    density, mean, packed = (a[0] for a in cloud)
    K = np.asarray(symmetric.to_matrix(jnp.asarray(packed)))
    rows, columns = np.arange(0, kernel_cases.HEIGHT, 6), np.arange(0, kernel_cases.WIDTH, 7)
    directions = _pixel_directions(kernel_cases.CAMERAS[0], rows, columns)
    for i in range(len(density)):
        cloud = (jnp.asarray(a[i : i + 1]) for a in (density, mean, packed))
        image = splat_oracle.splat(
            *cloud, jnp.asarray(kernel_cases.CAMERAS[0]), kernel_cases.HEIGHT, kernel_cases.WIDTH, use_support=False
        )
        wanted = _quadrature(density[i], mean[i], K[i], directions)
        seen = wanted > 1e-12 * wanted.max()
        np.testing.assert_allclose(np.asarray(image)[np.ix_(rows, columns)][seen], wanted[seen], rtol=1e-10)


def test_float32_splat_without_the_rule(monkeypatch):
    """The shifted form in float32: with the rule's limits moved out of the way it is the unlimited line integral."""
    arrays = kernel_cases.to_single(*(a[0] for a in kernel_cases.splat_cloud()), kernel_cases.CAMERAS[0])
    with jax.enable_x64(True):
        exact = (jnp.asarray(a, jnp.float64) for a in arrays)
        wanted = np.asarray(splat_oracle.splat(*exact, kernel_cases.HEIGHT, kernel_cases.WIDTH, use_support=False))
    for name, value in (("Q_FADE", 150.0), ("Q_MAX", 160.0)):
        monkeypatch.setattr(support, name, value)
    image = splat_api.splat(*map(jnp.asarray, arrays), kernel_cases.HEIGHT, kernel_cases.WIDTH, implementation="xla")
    assert np.max(np.abs(image - wanted)) < 1e-4 * wanted.max()


def test_support_rule_loses_little(x64):
    """0.3 % (L2) in the image, 0.6 % in the volume; and it does cut: the difference is not zero."""
    splat = jax.jit(
        functools.partial(splat_oracle.splat, height=kernel_cases.HEIGHT, width=kernel_cases.WIDTH),
        static_argnames="use_support",
    )
    voxelize = jax.jit(
        functools.partial(voxelize_oracle.voxelize, shape=kernel_cases.SHAPE), static_argnames="use_support"
    )
    for seed in range(3):
        cases = (
            (splat, (*kernel_cases.splat_cloud(seed), kernel_cases.CAMERAS), 0.003),
            (voxelize, kernel_cases.voxel_cloud(seed), 0.006),
        )
        for function, cloud, limit in cases:
            ruled, full = (function(*map(jnp.asarray, cloud), use_support=use) for use in (True, False))
            assert 0 < kernel_cases.relative_error(ruled, full) < limit


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


# The comparison catches planted errors.


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
    wanted = kernel_cases.splat_case(10)[2][1]
    kernel_cases.assert_gradients_close(wanted, wanted)
    with pytest.raises((AssertionError, ValueError)):
        kernel_cases.assert_gradients_close(plant(list(wanted)), wanted)
