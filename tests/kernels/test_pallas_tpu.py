"""The Pallas TPU backend of `splat`, interpreted on the CPU against the float64 oracle, its lowering for a TPU, which needs
none, and its compilation for one by libtpu, where the environment variable RADGS_LIBTPU names a folder that has it.
"""

import functools
import os

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
import test_pallas

from kernels.splat import api
from kernels.splat import pallas_tpu
from kernels.tools import compilers
from kernels.tools import lowering

SIZE = test_pallas.SIZES["splat"]  # no side is a multiple of a tile's
N = test_pallas.N
_arrays = functools.partial(test_pallas._arrays, "splat")


def _cotangent(size=SIZE, batch=(2,)):
    return np.float32(np.random.default_rng(9).normal(size=(*batch, *size)) + 0.3)


def _eager(cotangent, *arrays):
    draw = lambda *arrays: api.splat(*arrays, *cotangent.shape[-2:], implementation="pallas_tpu")
    image, pullback = jax.vjp(draw, *arrays)
    return image, pullback(cotangent)


# Traced under `interpreted` only; the trace is kept.
# As XLA compiles for users: the tests' quick emitters round more.
_image_and_gradients = jax.jit(_eager, compiler_options={"xla_cpu_use_fusion_emitters": True})


@pytest.fixture
def interpreted(monkeypatch):
    """The backend behind the public function, run by the interpreter."""
    pair = tuple(functools.partial(f, interpret=True) for f in (pallas_tpu.forward, pallas_tpu.backward))
    monkeypatch.setitem(api.BACKENDS, "pallas_tpu", pair)


def _assert_exact(result, cotangent, arrays):
    image, gradients = result
    wanted, wanted_gradients = kernel_cases.exact_value_and_gradients("splat", cotangent.shape[-2:], cotangent, *arrays)
    assert image.dtype == np.float32 and image.shape == wanted.shape
    assert kernel_cases.relative_error(image, wanted) < kernel_cases.IMAGE_TOLERANCE
    kernel_cases.assert_gradients_close(gradients, wanted_gradients)


@pytest.mark.parametrize("seed", [40, 41])
def test_random_clouds(seed, interpreted):
    arrays, cotangent = _arrays(seed), _cotangent()
    _assert_exact(_image_and_gradients(cotangent, *arrays), cotangent, arrays)


def test_bands_and_blocks(interpreted, monkeypatch):
    """An image of two bands, the last half empty, and more Gaussians than a block has."""
    size, n = (3 * 32 - 3, 32 + 8), pallas_tpu.BLOCK + 2
    monkeypatch.setattr(pallas_tpu, "BAND", 5)
    assert pallas_tpu._bands(*size) == (2, 2, 2)
    density, mean, precision = kernel_cases.splat_cloud(42, 1, n)
    mean[..., 1] = mean[..., 1] * 2.0 + 40.0  # tall
    arrays = kernel_cases.to_single(density, mean, precision, kernel_cases.CAMERAS[:1])
    cotangent = _cotangent(size, (1,))
    image, gradients = jax.jit(lambda *a: _eager(*a))(cotangent, *arrays)
    assert all(np.any(image[:, rows]) for rows in (slice(0, 64), slice(64, None)))
    _assert_exact((image, gradients), cotangent, arrays)


def test_extreme_shapes(interpreted):
    """Needles, flakes, Gaussians below a pixel and larger than the image, each judged by its own gradients."""
    rng = np.random.default_rng(43)
    density, mean, _, k = (np.array(a, np.float64) for a in _arrays(43))
    sigma = np.resize([[0.7, 0.9, 14.0], [6.0, 8.0, 0.3], [0.3, 0.2, 0.25], [60.0, 90.0, 40.0]], (2, N, 3))
    R = np.linalg.qr(rng.normal(size=(2, N, 3, 3)))[0]
    K = np.einsum("...ij,...j,...kj->...ik", R, sigma**-2.0, R)
    precision = K[..., [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    # Means close to a pixel's centre, so that those that fall between pixels are seen as well.
    fx, fy, cx, cy = (part[:, None] for part in k.T)
    u, v = np.round(rng.uniform(6, 40, (2, N))) + 0.1, np.round(rng.uniform(5, 32, (2, N))) - 0.05
    mean[..., 0], mean[..., 1] = (u - cx) / fx * mean[..., 2], (v - cy) / fy * mean[..., 2]
    arrays, cotangent = kernel_cases.to_single(density, mean, precision, k), _cotangent()
    image, gradients = _image_and_gradients(cotangent, *arrays)
    wanted, wanted_gradients = kernel_cases.exact_value_and_gradients("splat", SIZE, cotangent, *arrays)
    assert kernel_cases.relative_error(image, wanted) < kernel_cases.IMAGE_TOLERANCE
    for actual, exact in zip(gradients[:3], wanted_gradients[:3]):
        for i in range(N):
            assert kernel_cases.relative_error(actual[:, i], exact[:, i]) < kernel_cases.GRADIENT_TOLERANCE


def test_hostile_gaussians_draw_nothing(interpreted):
    arrays, cotangent = _arrays(44), _cotangent()
    bad = [a.copy() for a in arrays]
    density, mean, precision, _ = bad
    density[:, 0] = np.nan
    precision[:, 0, 0] = np.inf
    mean[:, 1], mean[:, 2, 2], precision[:, 3] = np.nan, np.inf, np.nan
    precision[:, 4] *= -1.0  # negative definite
    precision[:, 5], precision[:, 6] = 0.0, 1e38
    mean[:, 7] = 4000.0, -3000.0, 700.0  # outside
    mean[:, 8], mean[:, 9], mean[:, 10] = (1.0, 2.0, -690.0), (0.5, 0.0, 0.01), 0.0
    mean[0, N - 1], precision[1, N - 1] = np.nan, np.inf  # the last one
    hostile = [*range(11), N - 1]
    good = [a.copy() for a in arrays]
    good[0][:, hostile] = 0.0
    image, gradients = _image_and_gradients(cotangent, *bad)
    wanted, wanted_gradients = kernel_cases.exact_value_and_gradients("splat", SIZE, cotangent, *good)
    assert kernel_cases.relative_error(image, wanted) < kernel_cases.IMAGE_TOLERANCE
    assert all(not np.any(g[:, hostile]) for g in gradients[:3])
    without = lambda parts: [np.delete(np.asarray(g), hostile, 1) for g in parts[:3]] + [*parts[3:]]
    kernel_cases.assert_gradients_close(without(gradients), without(wanted_gradients))


@pytest.mark.parametrize("n", [0, 1])
def test_few_gaussians(n, interpreted):
    density, mean, precision, k = (a[0] for a in _arrays(45))
    arrays, cotangent = (density[:n], mean[:n], precision[:n] / 9, k), _cotangent(batch=())
    result = _image_and_gradients(cotangent, *arrays)
    if n:
        _assert_exact(result, cotangent, arrays)
    else:
        assert result[0].shape == SIZE and [g.shape for g in result[1]] == [a.shape for a in arrays]
        assert not any(np.any(x) for x in jax.tree.leaves(result))


def test_no_density(interpreted):
    """Draws nothing, and still has the gradient to density."""
    arrays, cotangent = _arrays(46), _cotangent()
    arrays = (np.zeros_like(arrays[0]), *arrays[1:])
    image, gradients = _image_and_gradients(cotangent, *arrays)
    assert not np.any(image) and not any(np.any(g) for g in gradients[1:])
    _, wanted = kernel_cases.exact_value_and_gradients("splat", SIZE, cotangent, *arrays)
    assert kernel_cases.relative_error(gradients[0], wanted[0]) < kernel_cases.GRADIENT_TOLERANCE


def test_vmap(interpreted):
    """vmap over clouds before one camera is the batch."""
    *cloud, k = _arrays(47)
    cotangent = _cotangent()
    result = jax.jit(jax.vmap(_eager, (0, 0, 0, 0, None)))(cotangent, *cloud, k[0])
    _assert_exact(result, cotangent, (*cloud, np.broadcast_to(k[:1], k.shape)))


def test_only_where_it_can_run():
    arrays, cotangent = _arrays(48), _cotangent()
    if jax.default_backend() != "tpu":
        with pytest.raises(NotImplementedError, match="not tpu"):
            pallas_tpu.forward(*arrays, *SIZE)
        with pytest.raises(NotImplementedError, match="not tpu"):
            pallas_tpu.backward(*arrays, cotangent)
    with jax.enable_x64(True):
        double = [jnp.asarray(a, jnp.float64) for a in arrays]
        with pytest.raises(NotImplementedError, match="float32 only"):
            pallas_tpu.forward(*double, *SIZE, interpret=True)


@pytest.mark.parametrize("wide", [False, True], ids=["", "x64"])
def test_lowers_for_a_tpu(wide, monkeypatch):
    """Both kernels become Mosaic calls, and nothing scatters; also where plain Python numbers are 64 bits wide."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (_cotangent(), *_arrays(49))]
    with jax.enable_x64(wide):
        text = jax.jit(lambda *a: _eager(*a)).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2
    assert "splat_forward" in text and "splat_backward" in text
    assert "scatter" not in text


def test_compiles_for_v5e(tmp_path):
    """With a cloud for each of 8 chips, which exchange nothing."""
    folder = os.environ.get("RADGS_LIBTPU")
    if reason := compilers.missing_libtpu(folder):
        pytest.skip(f"{reason}; here RADGS_LIBTPU names DIR")
    wanted = [("splat", "tiny", what) for what in ("forward", "backward")]
    results = lowering.compile_target("v5e:2x4", wanted, [folder] if folder else [], tmp_path)
    for (_, _, what), result in zip(wanted, results, strict=True):
        assert "error" not in result, result
        assert [call["name"] for call in result["calls"]] == [f"splat_{what}"]
        assert not result["collectives"]
