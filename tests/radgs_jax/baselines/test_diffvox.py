"""DiffVox: densities, loss and schedule as the formulas read, masks, and small fits."""

import dataclasses

import jax
import jax.numpy as jnp
import lumps
import numpy as np
import optax
import pytest

from radgs_jax.baselines import box
from radgs_jax.baselines import diffvox

TINY = diffvox.Config(side=16, cluttered_side=16, step_mm=3.0, steps=60, rate=0.03)
KEY = jax.random.key(0)


def _seen(volume, views):
    return views.replace(images=box.render(volume, box.box_grid(volume.shape[0]), views, 1.0))


def _psnr(found):
    truth = lumps.voxel_lump()
    near = truth > 0.005
    return -10.0 * np.log10(np.mean((found - truth)[near] ** 2) / box.UNIT_DENSITY**2)


def test_a_voxel_is_the_softplus_of_its_parameter_less_a_shift():
    x = np.linspace(-1.0, 2.0, 31)
    expected = np.log1p(np.exp(20.0 * (x - 0.3))) / 20.0
    np.testing.assert_allclose(diffvox.density(jnp.asarray(x, jnp.float32)), expected, rtol=2e-4)
    slope = jax.vmap(jax.grad(diffvox.density))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(slope, 1.0 / (1.0 + np.exp(-20.0 * (x - 0.3))), rtol=2e-4)
    np.testing.assert_allclose(diffvox.density(jnp.zeros(())), 1.2e-4, rtol=0.05)


def test_the_loss_is_the_l1_of_valid_pixels_and_five_times_the_total_variation():
    rng = np.random.default_rng(0)
    views, x = lumps.oblique_views(2), rng.uniform(0.0, 0.5, (8, 8, 8))
    target = rng.uniform(0.0, 2.0, views.images.shape)
    valid = rng.uniform(size=target.shape) < 0.6
    volume = np.log1p(np.exp(20.0 * (x - 0.3))) / 20.0
    drawn = box.render(jnp.asarray(volume, jnp.float32), box.box_grid(8), views, TINY.step_mm)
    image = np.abs(np.asarray(drawn, np.float64) - target)[valid].mean()
    variation = 15.0 * np.mean([np.abs(np.diff(volume, axis=axis)).mean() for axis in range(3)])
    seen = views.replace(images=jnp.asarray(target, jnp.float32), valid=jnp.asarray(valid))
    found = diffvox.loss({"box": jnp.asarray(x, jnp.float32)}, TINY, seen)
    np.testing.assert_allclose(found, image + variation, rtol=1e-4)


def test_the_rate_follows_one_cycle_and_the_moment_goes_against_it():
    """float64 oracle: Adam with bias corrections of the current decay, in the published schedule of 50."""
    config = diffvox.Config(steps=50)
    places = [0, 5, 50]
    rate = np.interp(np.arange(50), places, [0.01 / 25, 0.01, 0.01 / 25e4])
    decay = np.interp(np.arange(50), places, [0.95, 0.85, 0.95])
    rng = np.random.default_rng(1)
    slopes, x, m, v = rng.normal(size=50) + 0.5, 0.0, 0.0, 0.0
    tx = diffvox.optimiser(config)
    value = jnp.zeros(())
    state = tx.init(value)
    for i, slope in enumerate(slopes):
        m, v = decay[i] * m + (1 - decay[i]) * slope, 0.999 * v + 0.001 * slope**2
        x -= rate[i] * m / (1 - decay[i] ** (i + 1)) / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + 1e-8)
        update, state = tx.update(jnp.asarray(slope, jnp.float32), state, value)
        value = optax.apply_updates(value, update)
        np.testing.assert_allclose(value, x, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_an_invalid_pixel_never_changes_the_result(value):
    views = _seen(lumps.voxel_lump(16), lumps.oblique_views(2))
    valid = jnp.asarray(np.random.default_rng(2).uniform(size=views.images.shape) < 0.7)
    config = dataclasses.replace(TINY, steps=5)
    clean = diffvox.fit(config, views.replace(valid=valid), KEY)
    spoilt = views.replace(valid=valid, images=jnp.where(valid, views.images, value))
    np.testing.assert_array_equal(diffvox.fit(config, spoilt, KEY), clean)


def test_without_a_valid_pixel_the_box_stays_empty():
    views = _seen(lumps.voxel_lump(16), lumps.oblique_views(2))
    found = diffvox.fit(dataclasses.replace(TINY, steps=5), views.replace(valid=jnp.zeros_like(views.valid)), KEY)
    assert found.shape == (box.SIDE,) * 3
    assert 0.0 <= np.min(found) and np.max(found) < 5e-4


def test_more_views_show_more_of_an_oblique_lump():
    config = dataclasses.replace(TINY, steps=150)
    scores = [
        _psnr(diffvox.fit(config, _seen(lumps.voxel_lump(48), lumps.oblique_views(count)), KEY)) for count in (1, 4)
    ]
    assert scores[0] > _psnr(0.0 * lumps.voxel_lump())
    assert scores[1] > max(scores[0] + 3.0, 22.0)


def test_what_is_outside_the_box_goes_to_the_body():
    """A trunk of water around the box: a fit of the box alone has to take it in."""
    views = lumps.oblique_views(3)
    body = box.BodyConfig(side=12, voxel_mm=24.0)
    voxels = jnp.full((body.side,) * 3, jnp.log(jnp.expm1(box.SHARPNESS * 0.02)) / box.SHARPNESS)
    trunk = {"voxels": voxels, "air": jnp.zeros(3)}
    around = box.body_image(trunk, body, views)
    # Without a lump, a fit begins with what is there.
    alone = box.init_body(body, _seen(lumps.voxel_lump(48), views).replace(images=around))
    np.testing.assert_allclose(alone["voxels"], voxels, rtol=0.02)
    cluttered = _seen(lumps.voxel_lump(48), views)
    cluttered = cluttered.replace(images=cluttered.images + around)
    config = dataclasses.replace(TINY, steps=150)
    alone = _psnr(diffvox.fit(config, cluttered, KEY))
    both = _psnr(diffvox.fit(dataclasses.replace(config, body=body), cluttered, KEY))
    assert both > alone + 3.0
