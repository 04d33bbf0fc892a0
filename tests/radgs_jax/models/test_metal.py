"""Metal in X-rays: the network, what is left out, and what fills it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radgs_jax.geometry import fill
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.models import metal

CONFIG = metal.MetalConfig(1.0, (2, 3))


def xray(image, valid=None):
    E = np.eye(4)
    E[2, 3] = 700.0
    # Two pixels a mm at the isocentre, so that the network sees blocks of 2 x 2.
    return XRay(image, valid, Camera(np.array([1400.0, 1400.0, 40.0, 30.0]), E, *image.shape))


def bright(params, images, valid, config):
    """Stands in for the network: pixels above 5 are metal."""
    return (images > 5.0).astype(jnp.float32)


@pytest.fixture
def finder(monkeypatch):
    monkeypatch.setattr(metal, "probability", bright)
    metal._program.cache_clear()
    yield metal.MetalFinder({}, CONFIG)
    metal._program.cache_clear()


def test_metal_is_widened_and_left_out_and_clear_images_stay(finder):
    image = np.ones((61, 83), np.float32)
    image[20:32, 30:40] = 9.0
    views = [xray(image), xray(np.ones((61, 83), np.float32))]
    first, second = metal.leave_out(finder, views)
    assert second is views[1] and not first.valid[20:32, 30:40].any()
    # Widened by WIDEN_PX of the network's pixels, which are 2 of the image's, and no further.
    reach = 2 * metal.WIDEN_PX
    assert not first.valid[20 - reach : 32 + reach, 34].any() and first.valid[: 20 - reach - 2].all()
    assert metal.leave_out(None, views) == views


def test_invalid_pixels_are_no_metal(finder):
    image = np.full((60, 80), 9.0, np.float32)
    valid = np.zeros((60, 80), bool)
    valid[:, 40:] = True
    image[:, 40:] = 1.0
    (found,) = metal.find(finder, [xray(image, valid)])
    assert not found.any()


def test_the_network_is_blind_to_gain_and_offset_and_takes_any_multiple():
    params = metal.init(CONFIG, jax.random.key(0))
    image = np.random.default_rng(0).normal(size=(1, 16, 32)).astype(np.float32)
    valid = np.ones(image.shape, bool)
    p = metal.probability(params, image, valid, CONFIG)
    assert p.shape == image.shape and float(p.min()) >= 0 and float(p.max()) <= 1
    np.testing.assert_allclose(metal.probability(params, 3.0 * image + 7.0, valid, CONFIG), p, atol=1e-4)


def test_the_loss_prefers_the_truth_and_ignores_invalid_pixels():
    truth = np.zeros((1, 8, 8), bool)
    truth[0, 2:4, 3:6] = True
    valid = np.ones(truth.shape, bool)
    right, wrong = np.where(truth, 8.0, -8.0), np.where(truth, -8.0, 8.0)
    assert metal.loss(right, truth, valid) < 0.1 < 1.0 < metal.loss(wrong, truth, valid)
    valid[0, 2:4, 3:6] = False
    valid[0, 5] = False
    np.testing.assert_allclose(metal.loss(wrong, truth, valid), metal.loss(np.where(valid, wrong, 3.0), truth, valid))
    gradient = jax.grad(lambda z: metal.loss(z, truth, valid))(jnp.asarray(right))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~valid].any()


def test_what_is_filled_continues_a_plane_and_keeps_valid_pixels():
    v, u = np.indices((70, 91))
    image = (0.03 * u - 0.02 * v).astype(np.float32)
    valid = np.hypot(u - 50, v - 30) > 12
    spoilt = np.where(valid, image, 99.0)
    filled = fill.fill(spoilt, valid)
    np.testing.assert_array_equal(filled[valid], image[valid])
    # Between its border's values, without an edge: far below the 99 that was there, and below the plane's rise across the hole.
    assert np.abs(filled - image).max() < 0.15 and np.abs(np.diff(filled, axis=1)).max() < 0.1
    assert not fill.fill(spoilt, np.zeros_like(valid)).any()
    nan = fill.fill(np.where(valid, image, np.nan), valid)
    np.testing.assert_array_equal(nan, filled)


def test_sizes_that_are_no_powers_of_two_are_filled():
    for shape in ((1, 1), (1, 7), (5, 3), (17, 31)):
        valid = np.zeros(shape, bool)
        valid[0, 0] = True
        np.testing.assert_allclose(fill.fill(np.full(shape, 4.0, np.float32), valid), 4.0, rtol=1e-6)
