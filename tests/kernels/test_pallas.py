"""The Pallas-Triton backends of `splat` and `voxelize`, interpreted on the CPU against the float64 oracles, and their
lowering for a GPU, which needs none.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from kernels.common import triton_tiles
from kernels.splat import api as splat_api
from kernels.splat import pallas_triton as splat_triton
from kernels.voxelize import api as voxelize_api
from kernels.voxelize import pallas_triton as voxelize_triton

MODULES = {"splat": splat_triton, "voxelize": voxelize_triton}
APIS = {"splat": splat_api, "voxelize": voxelize_api}
# No side is a multiple of a tile's or a brick's.
SIZES = {"splat": (37, 50), "voxelize": (21, 26, 17)}
N = 24


def _arrays(operator, seed):
    """Two clouds of N Gaussians, for `splat` before two cameras; some reach over the borders."""
    if operator == "splat":
        return kernel_cases.to_single(*kernel_cases.splat_cloud(seed, 2, N), kernel_cases.CAMERAS[:2])
    return kernel_cases.to_single(*kernel_cases.voxel_cloud(seed, 2, N))


def _cotangent(operator, batch=(2,)):
    return np.float32(np.random.default_rng(9).normal(size=(*batch, *SIZES[operator])) + 0.3)


def _draw(operator):
    size = SIZES[operator]
    if operator == "splat":
        return lambda *arrays: splat_api.splat(*arrays, *size, implementation="pallas_triton")
    return lambda *arrays: voxelize_api.voxelize(*arrays, size, implementation="pallas_triton")


def _eager(operator, cotangent, *arrays):
    value, pullback = jax.vjp(_draw(operator), *arrays)
    return value, pullback(cotangent)


# Traced under `interpreted` only; the trace is kept.
_value_and_gradients = jax.jit(_eager, static_argnums=0)


_both = pytest.mark.parametrize("operator", sorted(MODULES))


@pytest.fixture
def interpreted(monkeypatch):
    """The backends behind the public functions, run by the interpreter."""
    for operator, module in MODULES.items():
        pair = tuple(functools.partial(f, interpret=True) for f in (module.forward, module.backward))
        monkeypatch.setitem(APIS[operator].BACKENDS, "pallas_triton", pair)


def _assert_exact(operator, result, cotangent, arrays):
    value, gradients = result
    wanted, wanted_gradients = kernel_cases.exact_value_and_gradients(operator, SIZES[operator], cotangent, *arrays)
    assert value.dtype == np.float32 and value.shape == wanted.shape
    assert kernel_cases.relative_error(value, wanted) < kernel_cases.IMAGE_TOLERANCE
    kernel_cases.assert_gradients_close(gradients, wanted_gradients)


@_both
@pytest.mark.parametrize("seed", [30, 31])
def test_random_clouds(operator, seed, interpreted):
    arrays, cotangent = _arrays(operator, seed), _cotangent(operator)
    _assert_exact(operator, _value_and_gradients(operator, cotangent, *arrays), cotangent, arrays)


@_both
def test_extreme_shapes(operator, interpreted):
    """Needles, flakes, Gaussians below a sample and larger than the output, each judged by its own gradients."""
    rng = np.random.default_rng(32)
    density, mean, precision, *rest = (np.array(a, np.float64) for a in _arrays(operator, 32))
    sigma = np.array([[0.7, 0.9, 14.0], [6.0, 8.0, 0.3], [0.3, 0.2, 0.25], [60.0, 90.0, 40.0]])
    sigma = np.resize(sigma * (1.0 if operator == "splat" else 0.6), (2, N, 3))
    R = np.linalg.qr(rng.normal(size=(2, N, 3, 3)))[0]
    K = np.einsum("...ij,...j,...kj->...ik", R, sigma**-2.0, R)
    precision = K[..., [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    # Means close to a sample, so that those that fall between samples are seen as well.
    if operator == "splat":
        fx, fy, cx, cy = (k[:, None] for k in rest[0].T)
        u, v = rng.uniform(6, 40, (2, N)), rng.uniform(5, 32, (2, N))
        u, v = np.round(u) + 0.1, np.round(v) - 0.05
        mean[..., 0], mean[..., 1] = (u - cx) / fx * mean[..., 2], (v - cy) / fy * mean[..., 2]
    else:
        mean = np.round(np.clip(mean, 1, np.array(SIZES[operator]) - 2)) + np.array([0.1, -0.05, 0.15])
    arrays, cotangent = kernel_cases.to_single(density, mean, precision, *rest), _cotangent(operator)
    value, gradients = _value_and_gradients(operator, cotangent, *arrays)
    wanted, wanted_gradients = kernel_cases.exact_value_and_gradients(operator, SIZES[operator], cotangent, *arrays)
    assert kernel_cases.relative_error(value, wanted) < kernel_cases.IMAGE_TOLERANCE
    for actual, exact in zip(gradients[:3], wanted_gradients[:3]):
        for i in range(N):
            assert kernel_cases.relative_error(actual[:, i], exact[:, i]) < kernel_cases.GRADIENT_TOLERANCE


@_both
def test_hostile_gaussians_draw_nothing(operator, interpreted):
    arrays, cotangent = _arrays(operator, 33), _cotangent(operator)
    bad = [a.copy() for a in arrays]
    bad[1][:, 0], bad[1][:, 1, 2], bad[2][:, 2, 3], bad[2][:, 3] = np.nan, np.inf, np.inf, np.nan
    bad[2][:, 4] *= -1.0  # negative definite
    bad[2][:, 5] = 0.0
    bad[1][:, 6] = 4000.0, -3000.0, 700.0  # outside
    hostile = [0, 1, 2, 3, 4, 5, 6, N - 1]
    if operator == "splat":
        bad[1][:, 7], bad[1][:, 8], bad[1][:, 9] = (1.0, 2.0, -690.0), (0.5, 0.0, 0.01), 0.0
        hostile += [7, 8, 9]
    bad[1][0, N - 1], bad[2][1, N - 1] = np.nan, np.inf  # the last one
    bad[0][:, 2] = np.nan
    good = [a.copy() for a in arrays]
    good[0][:, hostile] = 0.0
    value, gradients = _value_and_gradients(operator, cotangent, *bad)
    wanted, wanted_gradients = kernel_cases.exact_value_and_gradients(operator, SIZES[operator], cotangent, *good)
    assert kernel_cases.relative_error(value, wanted) < kernel_cases.IMAGE_TOLERANCE
    assert all(not np.any(g[:, hostile]) for g in gradients[:3])
    without = lambda parts: [np.delete(np.asarray(g), hostile, 1) for g in parts[:3]] + [*parts[3:]]
    kernel_cases.assert_gradients_close(without(gradients), without(wanted_gradients))


@_both
@pytest.mark.parametrize("n", [0, 1])
def test_few_gaussians(operator, n, interpreted):
    """None at all give zeros; one is shared out over several backward programs."""
    density, mean, precision, *rest = (a[0] for a in _arrays(operator, 34))
    precision = precision / 9  # three times as large
    arrays, cotangent = (density[:n], mean[:n], precision[:n], *rest), _cotangent(operator, ())
    result = _value_and_gradients(operator, cotangent, *arrays)
    if n:
        _assert_exact(operator, result, cotangent, arrays)
    else:
        assert result[0].shape == SIZES[operator] and [g.shape for g in result[1]] == [a.shape for a in arrays]
        assert not any(np.any(x) for x in jax.tree.leaves(result))


@_both
def test_many_chunks(operator, interpreted, monkeypatch):
    """Instances are drawn in as many launches as they need, also where int32 could not count them all at once."""
    counted = []
    launch = triton_tiles.draw_tiles

    def count(kernel, name, starts, *rest):
        jax.debug.callback(lambda number: counted.append(int(number)), starts[-1])
        return launch(kernel, name, starts, *rest)

    tiles = {"splat": 3 * 4, "voxelize": 3 * 4 * 5}[operator]
    monkeypatch.setattr(triton_tiles, "CHUNK", 32)
    monkeypatch.setattr(triton_tiles, "COUNTABLE", 32 + 30 * tiles)  # 30 of the 48 Gaussians, then 18
    monkeypatch.setattr(triton_tiles, "draw_tiles", count)
    arrays = _arrays(operator, 35)
    value = jax.jit(_draw(operator))(*arrays)
    jax.effects_barrier()
    assert len(counted) > 4 and sorted(counted)[2:] == [32] * (len(counted) - 2)
    wanted, _ = kernel_cases.exact_value_and_gradients(operator, SIZES[operator], _cotangent(operator), *arrays)
    assert kernel_cases.relative_error(value, wanted) < kernel_cases.IMAGE_TOLERANCE


@_both
def test_vmap(operator, interpreted):
    """vmap over clouds, with the other arguments shared, equals the batch."""
    arrays, cotangent = _arrays(operator, 36), _cotangent(operator)
    arrays = [*arrays[:3], *(np.broadcast_to(a[:1], a.shape) for a in arrays[3:])]
    shared = [a[0] for a in arrays[3:]]
    axes = (0, 0, 0, 0, *[None] * len(shared))
    mapped = jax.jit(jax.vmap(functools.partial(_eager, operator), axes))(cotangent, *arrays[:3], *shared)
    _assert_exact(operator, mapped, cotangent, arrays)


@_both
def test_only_where_it_can_run(operator):
    arrays = _arrays(operator, 37)
    size = SIZES[operator] if operator == "splat" else (SIZES[operator],)
    module, cotangent = MODULES[operator], _cotangent(operator)
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="not gpu"):
            module.forward(*arrays, *size)
        with pytest.raises(NotImplementedError, match="not gpu"):
            module.backward(*arrays, cotangent)
    with jax.enable_x64(True):
        double = [jnp.asarray(a, jnp.float64) for a in arrays]
        with pytest.raises(NotImplementedError, match="float32 only"):
            module.forward(*double, *size, interpret=True)


@_both
@pytest.mark.parametrize("wide", [False, True], ids=["", "x64"])
def test_lowers_for_a_gpu(operator, wide, monkeypatch):
    """Both kernels become Triton calls, and nothing adds atomically; also where plain Python numbers are 64 bits wide."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (_cotangent(operator), *_arrays(operator, 38))]
    with jax.enable_x64(wide):
        traced = jax.jit(functools.partial(_eager, operator)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 2
    assert f"{operator}_forward" in text and f"{operator}_backward" in text
    assert "scatter" not in text and "atomic" not in text
