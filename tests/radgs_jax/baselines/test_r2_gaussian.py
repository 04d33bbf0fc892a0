"""R2-Gaussian: its units, the gradient that its threshold is for, its loss, and a small reconstruction."""

import dataclasses

import jax
import jax.numpy as jnp
import lumps
import numpy as np
import pytest

from radgs_jax import gaussians
from radgs_jax.baselines import box
from radgs_jax.baselines import r2_gaussian
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid_host

SMALL = r2_gaussian.Config(gaussians=60, capacity=80, steps=60, interval=20, densify=(0, 60))
PX = 32
loss = jax.jit(r2_gaussian.loss, static_argnames="config")
gradient = jax.jit(jax.grad(r2_gaussian.loss, (0, 1)), static_argnames="config")


def _views(count):
    """Cameras all around that look at the box from different heights, with pixels that are not square, off the middle."""
    poses = []
    for i in range(count):
        about = rigid_host.matrix([0.0, np.pi * i / count, 0.0], 0.0)
        tilt = rigid_host.matrix([0.2 - 0.1 * i, 0.0, 0.1], [2.0, -1.0, 700.0])
        poses.append(tilt @ about)
    intrinsics = jnp.tile(jnp.asarray([200.0, 220.0, 14.0, 17.5]), (count, 1))
    blank = jnp.zeros((count, PX, PX))
    return box.BoxViews(blank, jnp.ones(blank.shape, bool), intrinsics, jnp.asarray(np.stack(poses), jnp.float32))


@pytest.fixture(scope="module")
def bone():
    return lumps.gaussian_lump((12.0, 8.0, 5.0), (3.0, 6.0))


@pytest.fixture(scope="module")
def views(bone):
    empty = _views(6)
    images = gaussians.project(gaussians.views(bone, 6), empty.camera_from_box, empty.intrinsics, PX, PX)
    return dataclasses.replace(empty, images=images)


@pytest.fixture(scope="module")
def state(views):
    return r2_gaussian.start(SMALL, views, jax.random.key(0))


def test_start_is_uniform_with_scales_of_neighbours_and_units_are_the_scenes(state):
    cloud = r2_gaussian.activate(state.params["box"], state.alive)
    assert int(state.alive.sum()) == 60
    density, mean, scale = (np.asarray(a)[:60] for a in (cloud.density, cloud.mean, cloud.scale))
    assert 0 < density.min() and 0.045 < density.max() <= 0.05
    assert np.abs(mean).max() <= 1 and np.abs(mean.mean(0)).max() < 0.3
    away = np.sort(np.linalg.norm(mean[:, None] - mean[None], axis=-1), -1)[:, 1:4]
    np.testing.assert_allclose(scale[:, 0], np.sqrt((away**2).mean(-1)), rtol=1e-4)
    again = r2_gaussian.activate(r2_gaussian.deactivate(cloud), state.alive)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(cloud)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    mm = r2_gaussian.in_mm(cloud)
    np.testing.assert_allclose(mm.mean[0], 48.0 * cloud.mean[0], rtol=1e-6)
    np.testing.assert_allclose(mm.density[0], 0.06 * cloud.density[0], rtol=1e-6)
    extreme = dataclasses.replace(cloud, scale=cloud.scale.at[0].set(jnp.asarray([5.0, 1e-9, 0.5])))
    raw = r2_gaussian.deactivate(extreme)
    assert all(np.isfinite(a[:60]).all() for a in raw.values())
    np.testing.assert_allclose(r2_gaussian.activate(raw, state.alive).scale[0], [1.0, 0.001, 0.5], rtol=0.02)


def test_screen_gradient_is_that_in_an_image_from_minus_one_to_one(views, bone):
    """Against the chain rule by way of pixels: means are moved along the panel at their depth."""
    E, k = views.camera_from_box[1], views.intrinsics[1]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(PX, PX + 8)), jnp.float32)
    moved = gaussians.move(bone, E)
    scene = bone.mean / box.UNIT_MM

    def value(cloud, pose):
        return jnp.sum(weights * gaussians.project(cloud, pose, k, PX, PX + 8))

    def of_screen(ndc):
        u, v = 0.5 * ((ndc[:, 0] + 1) * (PX + 8) - 1), 0.5 * ((ndc[:, 1] + 1) * PX - 1)
        z = moved.mean[:, 2]
        mean = jnp.stack([(u - k[2]) / k[0] * z, (v - k[3]) / k[1] * z, z], -1)
        return value(dataclasses.replace(moved, mean=mean), jnp.eye(4))

    pixel = moved.mean[:, :2] / moved.mean[:, 2:] * k[:2] + k[2:]
    ndc = (2 * pixel + 1) / jnp.asarray([PX + 8, PX]) - 1
    expected = jnp.linalg.norm(jax.grad(of_screen)(ndc), axis=-1)
    push = jax.grad(lambda mean: value(dataclasses.replace(bone, mean=mean * box.UNIT_MM), E))(scene)
    found = r2_gaussian.screen_gradient(push, scene, E, k, PX, PX + 8)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_loss_is_the_formula_over_valid_pixels(views, state, bone):
    """float64: L1, SSIM of whole windows of valid pixels, and the total variation of the sub-box that the key draws."""
    rng = np.random.default_rng(1)
    valid = np.ones(views.images.shape, bool)
    valid[2, :9, 3:20], valid[2, 25, 25] = False, False
    seen = dataclasses.replace(views, valid=jnp.asarray(valid))
    key, nudge = jax.random.key(5), jnp.asarray(0.1 * rng.normal(size=(80, 3)), jnp.float32)
    found = loss(state.params, nudge, 2, key, SMALL, seen, state.alive)

    cloud = r2_gaussian.in_mm(r2_gaussian.activate(state.params["box"], state.alive))
    shown = dataclasses.replace(cloud, mean=cloud.mean + 48.0 * nudge)
    drawn = gaussians.project(shown, views.camera_from_box[2], views.intrinsics[2], PX, PX)
    a, b = np.asarray(drawn, np.float64) / 2.88, np.asarray(views.images[2], np.float64) / 2.88
    l1 = np.abs(a - b)[valid[2]].mean()
    g = np.exp(-0.5 * (np.arange(11) - 5) ** 2 / 1.5**2)
    g = np.outer(g, g) / g.sum() ** 2
    scores = []
    for i, j in np.ndindex(PX - 10, PX - 10):
        x, y, v = (c[i : i + 11, j : j + 11] for c in (a, b, valid[2]))
        if v.all():
            mx, my = (g * x).sum(), (g * y).sum()
            vx, vy, c = (g * x * x).sum() - mx**2, (g * y * y).sum() - my**2, (g * x * y).sum() - mx * my
            top, bottom = (2 * mx * my + 1e-4) * (2 * c + 9e-4), (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
            scores.append(1 - top / bottom)
    corner = np.asarray(jax.random.uniform(key, (3,), minval=-48.0, maxval=16.0), np.float64)
    axes = [c + 0.5 + np.arange(32) for c in corner]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    K = np.asarray(gaussians.precision(cloud), np.float64)
    volume = np.zeros((32, 32, 32))
    for density, mean, precision in zip(np.asarray(cloud.density), np.asarray(cloud.mean, np.float64), K):
        r = points - mean
        volume += density * np.exp(-0.5 * np.einsum("...i,ij,...j->...", r, precision, r))
    tv = sum(np.abs(np.diff(volume / 0.06, axis=axis)).mean() for axis in range(3)) / 3
    np.testing.assert_allclose(found, l1 + 0.25 * np.mean(scores) + 0.05 * tv, rtol=2e-3)

    spoilt = dataclasses.replace(seen, images=jnp.where(seen.valid, seen.images, 7.0))
    same = loss(state.params, nudge, 2, key, SMALL, spoilt, state.alive)
    np.testing.assert_allclose(same, found, rtol=1e-6)


def test_published_variation_moves_means_too_little_and_nothing_else(bone):
    """The public code's gradient with respect to means is too small by the square of a voxel's side, 1 / 48 of half a box."""
    scene = Gaussians(bone.density / 0.06, bone.mean / 48.0, bone.scale / 48.0, bone.quaternion)
    raw, key = r2_gaussian.deactivate(scene), jax.random.key(1)

    def value(raw, published):
        return r2_gaussian.sub_box_variation(r2_gaussian.activate(raw, jnp.ones(40, bool)), key, published)

    right, wrong = (jax.value_and_grad(value)(raw, published) for published in (False, True))
    assert float(right[0]) == float(wrong[0])
    for name in raw:
        scale = 1 / 48**2 if name == "mean" else 1.0
        assert np.abs(right[1][name]).max() > 0
        np.testing.assert_allclose(wrong[1][name], scale * np.asarray(right[1][name]), rtol=1e-4, atol=1e-9)
    # And right means right: a finite difference.
    step = 1e-2 * right[1]["mean"] / jnp.abs(right[1]["mean"]).max()
    ends = [float(value({**raw, "mean": raw["mean"] + sign * step}, False)) for sign in (1, -1)]
    np.testing.assert_allclose(ends[0] - ends[1], 2 * float(jnp.sum(step * right[1]["mean"])), rtol=0.05)


def test_the_image_alone_pushes_the_nudge_and_a_view_has_its_own_air(views, state):
    config = dataclasses.replace(SMALL, body=box.BodyConfig(side=16, voxel_mm=24.0, step_mm=24.0, air=True))
    params = {**state.params, "body": box.init_body(config.body, views)}
    to_params, push = gradient(params, jnp.zeros((80, 3)), 4, jax.random.key(0), config, views, state.alive)
    assert np.abs(np.asarray(push)[:60]).max() > 0 and not np.asarray(push)[60:].any()
    air = np.asarray(to_params["body"]["air"])
    assert air[4] != 0 and not np.delete(air, 4).any()
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(to_params))
    assert not np.asarray(to_params["box"]["mean"])[60:].any()
    # The sub-box moves means as well, so that their whole gradient is another one.
    assert np.abs(np.asarray(to_params["box"]["mean"] - push)).max() > 0


def test_all_views_are_seen_before_one_is_seen_again():
    order = np.asarray(r2_gaussian.view_order(jax.random.key(0), 33, 6))
    assert order.shape == (33,)
    assert all(sorted(order[i : i + 6]) == list(range(6)) for i in range(0, 30, 6))
    assert len({tuple(order[i : i + 6]) for i in range(0, 30, 6)}) > 1
    assert sorted(np.asarray(r2_gaussian.view_order(jax.random.key(0), 2, 2))) == [0, 1]


def test_a_small_reconstruction_improves_and_is_deterministic(views, bone):
    key = jax.random.key(2)
    truth = np.asarray(gaussians.voxelize(bone, box.box_grid(box.SIDE)))
    found = np.asarray(r2_gaussian.fit(SMALL, views, key))
    none = np.asarray(r2_gaussian.density_of(r2_gaussian.start(SMALL, _views(6), key)))
    error = [np.square(a - truth).mean() for a in (found, none)]
    assert found.shape == (96, 96, 96) and found.min() >= 0
    assert error[0] < 0.6 * error[1]
    np.testing.assert_array_equal(found, r2_gaussian.fit(SMALL, views, key))


def test_a_round_fills_dead_slots_and_starts_counting_anew(views, state):
    keys = jax.random.split(jax.random.key(0), 20)
    moved, _ = r2_gaussian.descend(SMALL, views, state, r2_gaussian.view_order(keys[0], 20, 6), keys)
    assert np.asarray(moved.seen)[:60].max() > 3 and not np.asarray(moved.seen)[60:].any()
    grown = r2_gaussian.densify(SMALL, moved, jax.random.key(1))
    assert np.asarray(grown.alive)[60:].any() and not np.asarray(grown.alive).all()  # some are drawn outside
    assert not np.asarray(grown.steepness).any() and not np.asarray(grown.seen).any()
    same = np.asarray(grown.params["box"]["density"] == moved.params["box"]["density"])
    assert 0 < same[:60].sum() < 60
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(grown.params))
