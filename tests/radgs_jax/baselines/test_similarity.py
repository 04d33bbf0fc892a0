"""Similarities of images against their formulas in float64 numpy, patch by patch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import ndimage

from radgs_jax.baselines import similarity

PATCH = 5


def _correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).mean() / np.sqrt(((a * a).mean() + similarity.EPS) * ((b * b).mean() + similarity.EPS))


def _ncc(a, b, valid):
    return np.array([_correlation(x[v], y[v]) for x, y, v in zip(a, b, valid)])


def _patch_ncc(a, b, valid, size=PATCH):
    found = []
    for image in zip(a, b, valid):
        rows, columns = (n - size + 1 for n in image[0].shape)
        patches = [[p[i : i + size, j : j + size] for p in image] for i in range(rows) for j in range(columns)]
        found.append(np.mean([_correlation(x, y) for x, y, v in patches if v.all()]))
    return np.array(found)


def _gradient_ncc(a, b, valid):
    inside = np.stack([ndimage.binary_erosion(v, np.ones((3, 3))) for v in valid])

    def slopes(images, axis):
        return np.stack([ndimage.sobel(image, axis) for image in images])

    return np.mean([_ncc(slopes(a, axis), slopes(b, axis), inside) for axis in (0, 1)], 0)


NAMED = {
    "ncc": (similarity.ncc, _ncc),
    "patch_ncc": (lambda a, b, valid: similarity.patch_ncc(a, b, valid, PATCH), _patch_ncc),
    "gradient_ncc": (similarity.gradient_ncc, _gradient_ncc),
}


@pytest.fixture(params=NAMED)
def both(request):
    """A similarity and its oracle."""
    return NAMED[request.param]


def _images(seed=0, shape=(2, 19, 26)):
    """Related images like line integrals, of unequal sides, and valid pixels: a border, a hole and a corner are missing."""
    rng = np.random.default_rng(seed)
    a, other = (ndimage.gaussian_filter(rng.normal(size=shape), (0, 1.5, 2.5)) for _ in range(2))
    a, b = 4.0 + 2.0 * a, 3.0 + 1.5 * a + 1.0 * other
    valid = np.ones(shape, bool)
    valid[0, :, :3] = valid[0, 8:10, 20] = valid[1, :6, -7:] = False
    return a, b, valid


def test_values_are_the_formulas(x64, both):
    function, oracle = both
    a, b, valid = _images()
    np.testing.assert_allclose(function(a, b, valid), oracle(a, b, valid), atol=1e-12)
    assert np.abs(oracle(a, b, valid) - oracle(a, b, np.ones_like(valid))).min() > 1e-3


def test_float32_is_close_to_float64_on_a_bright_image(both):
    """Line integrals of a trunk are 5, and its contrasts in a patch a tenth of that and less."""
    function, oracle = both
    a, b, valid = _images(1)
    a, b = 5.0 + 0.5 * (a - 4.0), 5.0 + 0.5 * (b - 3.0)
    low = [jnp.asarray(x, jnp.float32) for x in (a, b)]
    np.testing.assert_allclose(function(*low, valid), oracle(a, b, valid), atol=1e-3)


def test_invalid_pixels_do_not_count(both):
    """Nor do patches and derivatives that touch one."""
    function, _ = both
    a, b, valid = _images()
    spoilt = [jnp.asarray(np.where(valid, x, wild), jnp.float32) for x, wild in ((a, 300.0), (b, -40.0))]
    clean = [jnp.asarray(x, jnp.float32) for x in (a, b)]
    np.testing.assert_allclose(function(*spoilt, valid), function(*clean, valid), atol=1e-5)
    slopes = jax.grad(lambda a: jnp.sum(function(a, spoilt[1], valid)))(spoilt[0])
    assert np.isfinite(slopes).all()
    np.testing.assert_array_equal(np.asarray(slopes)[~valid], 0.0)
    np.testing.assert_array_equal(function(*clean, np.zeros_like(valid)), 0.0)


def test_a_gain_and_an_offset_change_nothing(both):
    function, _ = both
    a, b, valid = _images()
    a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
    np.testing.assert_allclose(function(a, 1.7 * b + 0.8, valid), function(a, b, valid), atol=2e-3)
    np.testing.assert_allclose(function(a, -b, valid), -function(a, b, valid), atol=1e-5)
    np.testing.assert_allclose(function(a, a, valid), 1.0, atol=2e-3)
    assert np.abs(function(a, jnp.ones_like(b), valid)).max() < 1e-2


def test_gradients_are_those_of_the_values(x64, both):
    function, _ = both
    a, b, valid = (x[:, :9, :11] for x in _images(2))
    valid[0, :, :3] = False
    check_grads(lambda a, b: function(a, b, valid), (jnp.asarray(a), jnp.asarray(b)), 1, ["rev"], rtol=1e-6)


def test_float32_gradients_are_those_of_float64_on_bright_flat_images():
    """Squares of 5 with contrasts of 0.05 are rounded by more than the contrasts' own squares differ."""
    a, b, valid = _images(3)
    a, b = 5.0 + 0.05 * (a - 4.0), 5.0 + 0.05 * (b - 3.0)

    def slopes(a, b):
        return jax.grad(lambda a, b: jnp.sum(similarity.patch_ncc(a, b, valid, PATCH)), (0, 1))(a, b)

    found = slopes(*(jnp.asarray(x, jnp.float32) for x in (a, b)))
    with jax.enable_x64(True):
        expected = slopes(jnp.asarray(a), jnp.asarray(b))
    for low, high in zip(found, expected):
        np.testing.assert_allclose(low, high, atol=1e-3 * np.abs(high).max())
