"""3DGR-CAR: its windows, its starts, its fit, and the centre predictor's geometry, targets and training."""

import dataclasses

import jax
import jax.numpy as jnp
import lumps
import numpy as np
import pytest
import tiny

from radgs_jax import gaussians
from radgs_jax.baselines import box
from radgs_jax.baselines import gr_car
from radgs_jax.baselines import gr_centres
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.geometry import rigid_host
from radgs_jax.training import batches
from radgs_jax.training import examples

SMALL = gr_car.Config(
    gaussians=80, capacity=100, side=24, steps=60, interval=20, densify=0, crop_px=32, pixel_mm=3.0, widths=(8, 16)
)
PX = 48
loss = jax.jit(gr_car.loss, static_argnums=(3, 4, 5))


def _views(count, turn=None):
    """Views all around of a box that may be turned, upright, with pixels of 2.24 mm, off the middle."""
    poses = []
    for i in range(count):
        about = rigid_host.matrix([0.0, np.pi * i / count, 0.0], 0.0)
        pose = rigid_host.matrix([0.0, 0.0, 0.0], [3.0, -2.0, 700.0]) @ about
        poses.append(pose if turn is None else pose @ np.linalg.inv(turn))
    intrinsics = jnp.tile(jnp.asarray([312.5, 312.5, 22.3, 24.9]), (count, 1))
    blank = jnp.zeros((count, PX, PX))
    return box.BoxViews(blank, jnp.ones(blank.shape, bool), intrinsics, jnp.asarray(np.stack(poses), jnp.float32))


def _drawn(cloud, views, size=PX):
    count = len(views.intrinsics)
    return gaussians.project(gaussians.views(cloud, count), views.camera_from_box, views.intrinsics, size, size)


@pytest.fixture(scope="module")
def bone():
    return lumps.gaussian_lump((10.0, 7.0, 5.0), (4.0, 6.0))


@pytest.fixture(scope="module")
def views(bone):
    empty = _views(6)
    return dataclasses.replace(empty, images=_drawn(bone, empty))


@pytest.fixture(scope="module")
def batch(bone):
    """Two pairs of the bone, in windows wider than the crop, the box of one of them turned in the world."""
    turns = np.stack([np.eye(4), rigid_host.matrix([0.3, -0.5, 1.0], [4.0, 0.0, -3.0])])
    seen = _views(2)
    k = seen.intrinsics * 0.75 + jnp.asarray([0, 0, 12.0, 9.0])
    moved = [gaussians.move(bone, jnp.asarray(turn, jnp.float32)) for turn in turns]
    images = jnp.stack([_drawn(m, dataclasses.replace(seen, intrinsics=k), 56) for m in moved])
    clouds = jax.tree.map(lambda a: jnp.stack([a, a]), bone)
    twice = lambda a: jnp.stack([a, a])
    poses, simulated = jnp.asarray(turns, jnp.float32), jnp.asarray([True, True])
    cameras = twice(k), twice(seen.camera_from_box)
    valid = jnp.ones(images.shape, bool)
    return batches.PairBatch(0.3 + 0 * images, images, images, images, valid, *cameras, poses, simulated, clouds)


def test_windows_are_resized_with_their_exact_cameras(bone, views):
    """A smooth image at new pixels is its projection by the new camera, and the box's origin is at a known pixel."""
    found = gr_car.resized(views, 32, 3.0)
    np.testing.assert_allclose(found.intrinsics[:, 0], 700.0 / 3.0, rtol=1e-6)
    origin = jax.vmap(camera.project_camera)(found.intrinsics, views.camera_from_box[:, None, :3, 3])[:, 0]
    np.testing.assert_allclose(origin, 16.0, atol=1e-4)
    expected = _drawn(bone, found, 32)
    assert np.abs(np.asarray(found.images - expected)).max() < 0.05 * float(expected.max())
    for axis in (1, 2):
        places = jnp.arange(32.0).reshape(-1, *(1,) * (2 - axis))
        middles = [jnp.sum(a * places, (1, 2)) / jnp.sum(a, (1, 2)) for a in (found.images, expected)]
        np.testing.assert_allclose(*middles, atol=0.02)
    # The views reach 2.24 times 22 mm on one side; the windows reach 48 mm.
    rows, columns = np.asarray(found.valid).any((0, 2)), np.asarray(found.valid).any((0, 1))
    assert rows.all() and columns.all()
    wide = gr_car.resized(dataclasses.replace(views, valid=views.valid.at[0, 20, 20].set(False)), 48, 3.0)
    valid = np.asarray(wide.valid)
    assert not valid[:, 0].any() and not valid[:, :, 0].any() and not valid[:, -1].any()
    assert 1 <= valid[1].sum() - valid[0].sum() <= 9


def test_a_unit_of_error_is_a_published_voxel():
    np.testing.assert_allclose(gr_car.UNIT_INTEGRAL, 0.06 * 0.75, rtol=1e-6)
    cloud = Gaussians(jnp.asarray([0.5]), jnp.asarray([[0.5, 0.25, 1.0]]), jnp.full((1, 3), 0.1), jnp.eye(1, 4))
    mm = gr_car.in_mm(cloud)
    np.testing.assert_allclose(mm.mean, [[0.0, -24.0, 48.0]], atol=1e-6)
    np.testing.assert_allclose((mm.density[0], mm.scale[0, 0]), (0.03, 9.6), rtol=1e-6)
    again = gr_car.activate(gr_car.deactivate(cloud), jnp.asarray([True]))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(cloud)):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_ramp_filters_rows_by_their_frequency():
    x = np.arange(PX)
    rows = np.sin(2 * np.pi * x / 8)
    found = np.asarray(gr_car.ramp(jnp.asarray(np.tile(rows, (1, PX, 1)) + 3.0, jnp.float32)))[0]
    np.testing.assert_allclose(found[5, 8:-8], rows[8:-8] / 8, atol=0.01)
    flat = gr_car.ramp(jnp.full((1, PX, PX), 2.0) + jnp.arange(PX)[:, None])
    np.testing.assert_allclose(flat, 0.0, atol=1e-4)


def test_backprojection_is_where_the_bone_is_and_fits_the_images(views, bone):
    volume = gr_car.backprojection(SMALL, views) * box.UNIT_DENSITY
    truth = np.asarray(gaussians.voxelize(bone, box.box_grid(24)))
    assert np.corrcoef(np.asarray(volume).ravel(), truth.ravel())[0, 1] > 0.7
    drawn = box.render(volume, box.box_grid(24), views, 4.0)
    np.testing.assert_allclose(jnp.sum(drawn * (views.images - drawn)), 0.0, atol=1e-2 * float(jnp.sum(drawn**2)))
    # Pixels that are not valid do not count.
    spoilt = dataclasses.replace(views, valid=views.valid.at[:, :6].set(False))
    a, b = (
        gr_car.backprojection(SMALL, dataclasses.replace(spoilt, images=views.images.at[:, :6].set(value)))
        for value in (0.0, 5.0)
    )
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_without_a_network_a_fit_starts_at_steep_voxels_and_improves(views, bone):
    truth = np.asarray(gaussians.voxelize(bone, box.box_grid(box.SIDE)))
    key = jax.random.key(0)
    found = np.asarray(gr_car.fit(SMALL, views, key))
    none = np.asarray(gr_car.fit(dataclasses.replace(SMALL, steps=0), views, key))
    assert found.shape == (96, 96, 96)
    assert np.square(found - truth).mean() < 0.8 * np.square(none - truth).mean()
    np.testing.assert_array_equal(found, gr_car.fit(SMALL, views, key))
    coarse = gr_car.resized(views, 32, 3.0)
    raw, alive = gr_car.start(SMALL, coarse, key)
    cloud = gr_car.activate(raw, alive)
    live = np.asarray(alive)
    volume = np.asarray(gr_car.backprojection(SMALL, coarse))
    index = np.rint(np.asarray(cloud.mean)[live] * 24 - 0.5).astype(int)
    np.testing.assert_allclose(cloud.mean[live], (index + 0.5) / 24, rtol=1e-5)
    np.testing.assert_allclose(cloud.density[live], 0.04 * np.clip(volume[tuple(index.T)], 0, 1), rtol=1e-3)
    assert 0.05 <= volume[tuple(index.T)].min() and 20 < live.sum() <= 80


def test_invalid_pixels_and_a_body_leave_the_fit_finite(views):
    config = dataclasses.replace(SMALL, steps=20, body=box.BodyConfig(side=16, voxel_mm=24.0, step_mm=24.0, air=True))
    valid = views.valid.at[:, :, :10].set(False)
    bodies = dataclasses.replace(views, images=views.images + 1.0, valid=valid)
    found = [
        gr_car.fit(
            config, dataclasses.replace(bodies, images=jnp.where(valid, bodies.images, value)), jax.random.key(0)
        )
        for value in (1.0,)
    ]
    assert all(np.isfinite(a).all() for a in found)
    nothing = dataclasses.replace(views, images=0 * views.images)
    np.testing.assert_array_equal(gr_car.fit(dataclasses.replace(SMALL, steps=20), nothing, jax.random.key(0)), 0.0)


def test_a_fit_ends_when_its_error_no_longer_falls(views, monkeypatch):
    calls = []

    def descend(config, views, params, opt_state, alive):
        calls.append(len(calls))
        return params, opt_state, jnp.asarray([1.0 + (len(calls) == 3) * -0.5])

    monkeypatch.setattr(gr_car, "descend", descend)
    monkeypatch.setattr(gr_car, "densify", lambda *args: args[2:5])
    gr_car.fit(dataclasses.replace(SMALL, steps=1000), views, jax.random.key(0))
    assert len(calls) == 3 + gr_car.PATIENCE + 1


def test_centres_lie_on_their_rays_and_turn_with_the_box():
    views, turn = _views(2), rigid_host.matrix([0.7, -0.4, 0.2], 0.0)
    answers = jnp.asarray(np.random.default_rng(0).normal(size=(2, PX // 2, PX // 2, 5)), jnp.float32)
    bare = answers.at[..., 1:4].set(0.0)
    found = gr_centres.lift(bare, views.intrinsics, views.camera_from_box)
    pixel = jax.vmap(
        lambda k, E, x: camera.project_camera(k, rigid.apply(E, x.reshape(-1, 3))).reshape(*x.shape[:-1], 2)
    )(views.intrinsics, views.camera_from_box, found.place)
    wanted = np.stack(np.meshgrid(*[2 * np.arange(PX // 2) + 0.5] * 2, indexing="xy"), -1)
    np.testing.assert_allclose(pixel, np.tile(wanted, (2, 1, 1, 1)), atol=2e-3)
    # At half of the depth a centre is at the point of its ray that is nearest to the box's origin.
    middle = gr_centres.lift(0 * bare, views.intrinsics, views.camera_from_box).place
    source = np.asarray(rigid.inverse(views.camera_from_box))[:, None, None, :3, 3]
    np.testing.assert_allclose(np.sum(np.asarray(middle) * (np.asarray(middle) - source), -1), 0.0, atol=0.5)
    along = np.linalg.norm(np.asarray(found.place) - np.asarray(middle), axis=-1)
    np.testing.assert_allclose(along, 96.0 * np.abs(np.asarray(found.depth) - 0.5), atol=1e-3)
    whole = gr_centres.lift(answers, views.intrinsics, views.camera_from_box)
    offset = np.linalg.norm(np.asarray(whole.place - found.place), axis=-1)
    np.testing.assert_allclose(offset, 9.6 * np.linalg.norm(np.tanh(np.asarray(answers[..., 1:4])), axis=-1), atol=1e-3)
    other = gr_centres.lift(answers, views.intrinsics, _views(2, turn).camera_from_box)
    np.testing.assert_allclose(other.place, np.asarray(whole.place) @ turn[:3, :3].T, atol=1e-3)


def test_first_hits_are_those_of_a_ball():
    """A wide Gaussian reaches the surface's density on a sphere, which a ray meets where the quadratic says."""
    views, radius = _views(2), 15.0
    sigma, middle = 10.0, np.array([6.0, -4.0, 8.0])
    peak = gr_centres.SURFACE * np.exp(0.5 * (radius / sigma) ** 2)
    ball = Gaussians(jnp.asarray([peak]), jnp.asarray([middle]), jnp.full((1, 3), sigma), jnp.eye(1, 4))
    ball = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32)[None], ball)
    hit, depth = gr_centres.first_hits(ball, views.intrinsics[None], views.camera_from_box[None], PX // 2)
    flat = gr_centres.lift(jnp.zeros((2, PX // 2, PX // 2, 5)), views.intrinsics, views.camera_from_box).place
    source = np.asarray(rigid.inverse(views.camera_from_box))[:, None, None, :3, 3]
    nearest = np.asarray(flat, np.float64)
    along = (nearest - source) / np.linalg.norm(nearest - source, axis=-1, keepdims=True)
    b = np.sum(along * (nearest - middle), -1)
    gap = b**2 - np.sum((nearest - middle) ** 2, -1) + radius**2
    expected = 0.5 + (-b - np.sqrt(np.maximum(gap, 0.0))) / 96.0
    clear = gap > 40.0
    assert clear.sum() > 50 and (np.asarray(hit[0]) == (gap > 0))[np.abs(gap) > 40.0].all()
    assert np.abs(np.asarray(depth[0]) - expected)[clear].max() * 96.0 < 2.0


def test_distances_of_points_and_errors_of_depths_are_their_formulas():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(3, n, 3)) * 20 for n in (30, 20))
    p, q = rng.uniform(size=(3, 30)) > 0.3, rng.uniform(size=(3, 20)) > 0.3
    there, back = [], []
    for i in range(3):
        away = np.linalg.norm(a[i][p[i]][:, None] - b[i][q[i]][None], axis=-1)
        there, back = there + [*away.min(1)], back + [*away.min(0)]
    arrays = (jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else bool) for x in (a, p, b, q))
    np.testing.assert_allclose(gr_centres.chamfer(*arrays), np.mean(there) + np.mean(back), rtol=1e-4)
    found, wanted = rng.uniform(0.1, 0.9, (2, 3, 6, 7))
    hit = rng.uniform(size=(3, 6, 7)) > 0.3
    log = np.log(found / wanted)[hit]
    expected = np.sqrt(np.mean(log**2) - 0.85 * np.mean(log) ** 2 + 1e-6) + np.abs(found - wanted)[hit].mean()
    for axis in (1, 2):
        slope = np.abs(np.diff(found - wanted, axis=axis))
        both = np.take(hit, range(1, hit.shape[axis]), axis) & np.take(hit, range(hit.shape[axis] - 1), axis)
        expected += slope[both].mean()
    arrays = jnp.asarray(found, jnp.float32), jnp.asarray(wanted, jnp.float32), jnp.asarray(hit)
    np.testing.assert_allclose(gr_centres.depth_error(*arrays), expected, rtol=1e-4)


def test_targets_are_the_vertebra_at_its_true_place(batch, bone):
    """At whatever start, the moved cloud lies where the views show it, and patches that are hit are those that show it."""
    example = examples.make_example(jax.random.key(3), batch, tiny.MODEL, 0.0)
    moved = gaussians.move(example.cloud, example.motion)
    rows = tiny.MODEL.crop_px // 2
    hit, _ = gr_centres.first_hits(moved, example.intrinsics, example.camera_from_box, rows)
    shown = example.target.reshape(2, 2, rows, 2, rows, 2).max((3, 5))
    assert np.asarray(hit).mean() > 0.03
    assert np.asarray(shown)[np.asarray(hit)].min() > 0.01 and not np.asarray(hit)[np.asarray(shown) < 0.01].any()


def test_the_centre_predictor_learns_all_its_weights(batch):
    params = gr_car.init(SMALL, jax.random.key(0))
    step = jax.jit(jax.value_and_grad(lambda p, key: gr_car.loss(p, key, batch, SMALL, tiny.MODEL, 0.0), has_aux=True))
    (first, parts), gradient = step(params, jax.random.key(0))
    assert set(parts) == {"centres_mm", "presence_dice", "depth"}
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    for i in range(60):
        _, gradient = step(params, jax.random.key(i))
        params = jax.tree.map(lambda p, g: p - 3e-2 * g / (1e-3 + jnp.sqrt(jnp.mean(g**2))), params, gradient)
    last, better = step(params, jax.random.key(0))[0]
    assert float(last) < 0.7 * float(first)
    assert float(better["centres_mm"]) < float(parts["centres_mm"])
    assert float(better["presence_dice"]) > float(parts["presence_dice"])


def test_a_networks_centres_start_the_fit(views, monkeypatch):
    """All views' or the first's alone, those present, as dense as the backprojection there."""
    coarse = gr_car.resized(jax.tree.map(lambda a: a[:2], views), 32, 3.0)
    params = gr_car.init(SMALL, jax.random.key(1))
    found = gr_centres.predict(params, SMALL.widths, coarse)
    median = float(jnp.median(found.presence))
    shifted = dataclasses.replace(found, presence=found.presence - median + 0.5)
    monkeypatch.setattr(gr_centres, "predict", lambda *args: shifted)
    config = dataclasses.replace(SMALL, gaussians=300, capacity=320)
    for pooled, count in ((True, 2), (False, 1)):
        raw, alive = gr_car.start(dataclasses.replace(config, pooled=pooled), coarse, jax.random.key(0), params)
        live = np.asarray(alive)
        there = np.asarray(shifted.presence)[:count] > 0.5
        assert live.sum() == min(there.sum(), 300)
        places = np.asarray(shifted.place)[:count][there] / 96.0 + 0.5
        mean = np.asarray(raw["mean"])[live]
        assert np.linalg.norm(mean[:, None] - places[None], axis=-1).min(1).max() < 1e-5
    monkeypatch.undo()
    result = gr_car.fit(dataclasses.replace(SMALL, steps=20), views, jax.random.key(0), params)
    assert np.isfinite(result).all()
