"""DiffPose: its pose, losses and clipping as published, its network's inputs, and that it trains, estimates and refines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
import tiny
from scipy.spatial.transform import Rotation

from radgs_jax import gaussians
from radgs_jax.baselines import box
from radgs_jax.baselines import diffpose
from radgs_jax.baselines import similarity
from radgs_jax.geometry import rigid
from radgs_jax.geometry.grid import VoxelGrid
from radgs_jax.registration.gauss_newton import LevelViews
from radgs_jax.training import batches
from radgs_jax.training import examples
from radgs_jax.training import sharding
from radgs_jax.training.update import state_of

CONFIG = diffpose.Config(width=4, crop_px=32, refine_px=28, step_mm=2.0, refine_steps=150, patch_px=7)
SIZE = 48
PAIRS = 2
CAMERA_FROM_WORLD = np.zeros((2, 4, 4), np.float32)
CAMERA_FROM_WORLD[0, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
CAMERA_FROM_WORLD[1, :3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
CAMERA_FROM_WORLD[:, 2, 3], CAMERA_FROM_WORLD[:, 3, 3] = 700.0, 1.0
INTRINSICS = np.array([[233.0, 233.0, 22.0, 25.0]] * 2, np.float32)


def _pose(twist, centre=(0.0, 0.0, 0.0)):
    return rigid.motion_about(jnp.asarray(centre), jnp.asarray(twist, jnp.float32))


@pytest.fixture(scope="module")
def lump():
    """An off-centre lump with processes on tilted, anisotropic voxels: densities, and their affine in the box's frame."""
    box_from_index = np.eye(4)
    box_from_index[:3, :3] = Rotation.from_rotvec([0.3, -0.2, 0.1]).as_matrix() @ np.diag([2.0, 2.5, 3.0])
    box_from_index[:3, 3] = -box_from_index[:3, :3] @ [15.5, 11.5, 9.5]
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (32, 24, 20)), indexing="ij"), -1)
    places = index @ box_from_index[:3, :3].T + box_from_index[:3, 3]
    balls = [((3, -2, 2), (16, 12, 9), 0.03), ((-14, 10, 6), (5, 9, 4), 0.03), ((12, 12, -8), (6, 4, 8), 0.04)]
    density = sum(d * np.exp(-0.5 * (((places - c) / s) ** 2).sum(-1)) for c, s, d in balls)
    return jnp.asarray(density, jnp.float32), jnp.asarray(box_from_index, jnp.float32)


def _images(lump, world_from_box):
    """Line integrals of the lump in both views."""
    blank = jnp.zeros((2, SIZE, SIZE))
    views = box.BoxViews(blank, blank == 0, jnp.asarray(INTRINSICS), rigid.matmul(CAMERA_FROM_WORLD, world_from_box))
    return box.render(lump[0], VoxelGrid(lump[1], lump[0].shape), views, 1.0)


def _seen(images):
    return LevelViews(list(images), list(jnp.ones_like(images, bool)), jnp.asarray(INTRINSICS))


@pytest.fixture(scope="module")
def batch(lump):
    """Pairs of the lump in a smooth body, at two poses."""
    poses = jnp.stack([_pose([0.1, -0.05, 0.08, 3, -4, 5]), _pose([-0.1, 0.1, 0.0, -5, 2, -3])])
    bone = jnp.stack([_images(lump, pose) for pose in poses])
    rest = jnp.broadcast_to(2.0 + jnp.linspace(0.0, 0.5, SIZE), bone.shape)
    cameras = (jnp.broadcast_to(a, (PAIRS, *a.shape)) for a in (INTRINSICS, CAMERA_FROM_WORLD))
    cloud = jax.tree.map(lambda a: jnp.stack([a] * PAIRS), gaussians.uniform_cloud(2, 8.0, 0.02))
    everywhere = jnp.ones_like(bone, bool).at[0, 0, :, :14].set(False)
    return batches.PairBatch(
        rest, bone, bone, rest + bone, everywhere, *cameras, poses, jnp.asarray([True, True]), cloud
    )


@pytest.fixture(scope="module")
def first():
    """Initial parameters."""
    return jax.jit(functools.partial(diffpose.init, CONFIG, tiny.MODEL))(jax.random.key(0))


def _answering(first, twist):
    """Parameters of a network that gives one twist for every image."""
    unit = diffpose.OUTPUT_MM * rigid.TWIST_SCALE
    parts = zip(("Dense_0", "Dense_1"), np.split(np.asarray(twist) / unit, 2))
    last = {
        name: {"kernel": jnp.zeros((8 * CONFIG.width, 3)), "bias": jnp.asarray(part, jnp.float32)}
        for name, part in parts
    }
    return {"diffpose": {"params": {**first["diffpose"]["params"], **last}}}


def _generator(twist):
    found = np.zeros((4, 4))
    found[:3, :3] = np.cross(np.eye(3), np.asarray(twist[:3]))
    found[:3, 3] = twist[3:]
    return found


def _log(motion):
    found = scipy.linalg.logm(motion).real
    return np.array([found[2, 1], found[0, 2], found[1, 0], *found[:3, 3]])


def test_a_pose_moves_by_the_exponential_about_the_box_in_the_cameras_axes(x64):
    rng = np.random.default_rng(0)
    start = np.eye(4)
    start[:3, :3], start[:3, 3] = Rotation.random(random_state=1).as_matrix(), [30.0, -20.0, 700.0]
    twist = rng.normal(size=6) * [0.3, 0.3, 0.3, 9, 9, 9]
    to_centre = np.eye(4)
    to_centre[:3, 3] = start[:3, 3]
    expected = to_centre @ scipy.linalg.expm(_generator(twist)) @ np.linalg.inv(to_centre) @ start
    np.testing.assert_allclose(diffpose.moved(start, twist), expected, atol=1e-10)
    along = diffpose.moved(start, np.array([0.0, 0, 0, 1, 2, 3]))
    np.testing.assert_allclose(along[:3, 3] - start[:3, 3], [1, 2, 3], atol=1e-12)
    turned = diffpose.moved(start, np.array([0.2, -0.3, 0.1, 0, 0, 0]))
    np.testing.assert_allclose(turned[:3, 3], start[:3, 3], atol=1e-9)


def test_geodesics_are_the_published_ones(x64):
    true = np.asarray(rigid.exp_se3(jnp.asarray([0.5, -1.2, 0.3, 20.0, -10, 700])))
    found = np.asarray(diffpose.moved(true, np.array([0.1, 0.05, -0.2, 4.0, -3, 6])))
    log, double = diffpose.geodesics(found, true)
    # The published difference is found o true^-1; its origin is moved from the isocentre to the vertebra's true place.
    to_centre = np.eye(4)
    to_centre[:3, 3] = true[:3, 3]
    difference = np.linalg.inv(to_centre) @ found @ np.linalg.inv(true) @ to_centre
    np.testing.assert_allclose(log, np.sqrt((_log(difference) ** 2).sum() + 1e-4), rtol=1e-9)
    angle = Rotation.from_matrix(difference[:3, :3]).magnitude()
    shift = found[:3, 3] - true[:3, 3]
    np.testing.assert_allclose(double, np.sqrt((562.0 * angle) ** 2 + (shift**2).sum() + 1e-4), rtol=1e-9)
    slope = jax.grad(lambda twist: sum(diffpose.geodesics(diffpose.moved(true, twist), true)))(jnp.zeros(6))
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


def test_the_loss_is_the_correlation_of_whole_images_and_both_geodesics(lump, batch, first):
    twist = np.array([0.05, -0.04, 0.03, 1.5, -2.0, 2.5])
    key = jax.random.key(3)
    run = jax.jit(functools.partial(diffpose.loss, config=CONFIG, model_config=tiny.MODEL))
    value, parts = run(_answering(first, twist), key, batch, *lump)
    sizes = dataclasses.replace(tiny.MODEL, crop_px=CONFIG.crop_px)
    example = jax.jit(functools.partial(examples.make_example, config=sizes))(key, batch)
    truth = jnp.asarray(example.camera_from_box) @ jnp.asarray(example.motion)[:, None]
    correlations, distances = [], []
    for pair in range(PAIRS):
        found = diffpose.moved(example.camera_from_box[pair], jnp.tile(jnp.asarray(twist, jnp.float32), (2, 1)))
        at = box.BoxViews(example.target[pair], example.valid[pair], example.intrinsics[pair], found)
        drawn = np.asarray(box.render(lump[0], VoxelGrid(lump[1], lump[0].shape), at, CONFIG.step_mm), np.float64)
        for view in range(2):
            shown = np.asarray(example.valid[pair, view])
            pixels = drawn[view][shown], np.asarray(example.target[pair, view], np.float64)[shown]
            correlations.append(np.corrcoef(*pixels)[0, 1])
            distances.append(np.sum(diffpose.geodesics(found[view], truth[pair, view])))
    assert not np.asarray(example.valid).all()
    np.testing.assert_allclose(parts["ncc"], np.mean(correlations), atol=1e-3)
    np.testing.assert_allclose(value, 1 - np.mean(correlations) + 0.01 * np.mean(distances), atol=2e-3)


def test_the_network_sees_the_views_number_and_no_invalid_pixel():
    rng = np.random.default_rng(0)
    net = diffpose.PoseNet(CONFIG.width)
    one, other = 2.0 + scipy.ndimage.gaussian_filter(rng.normal(size=(2, 32, 32)), (0, 2, 2))
    images = jnp.asarray(np.stack([one, one, other]), jnp.float32)
    valid = jnp.ones_like(images, bool).at[:, :, :5].set(False)
    number = jnp.asarray([0.0, 1.0, 0.0])
    shapes = jax.eval_shape(net.init, jax.random.key(0), images, valid, number)
    params = jax.tree.map(lambda p: rng.normal(0.0, (p.shape[-1] / p.size) ** 0.5, p.shape).astype(p.dtype), shapes)
    apply = jax.jit(net.apply)
    answers = apply(params, images, valid, number)
    by_view, by_image = (np.linalg.norm(answers[0] - answers[i]) for i in (1, 2))
    assert by_view > 0.03 * by_image > 0.0
    spoilt = jnp.where(valid, images, -50.0)
    np.testing.assert_allclose(apply(params, spoilt, valid, number), answers, rtol=1e-4, atol=1e-4)
    # X-rays are scaled to their range, so that a gain and an offset of the panel are not seen.
    np.testing.assert_allclose(apply(params, 1.7 * images + 0.5, valid, number), answers, rtol=2e-2, atol=1e-2)


def test_gradients_are_clipped_unit_by_unit():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}
    params["kernel"][:, 1] *= 100.0
    slope = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)

    def cost(params):
        return sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(diffpose.clipped(params)), jax.tree.leaves(slope)))

    found = jax.grad(cost)(params)
    for unit in range(3):
        g, w = slope["kernel"][:, unit].astype(np.float64), params["kernel"][:, unit].astype(np.float64)
        expected = g * min(1.0, 0.01 * np.linalg.norm(w) / np.linalg.norm(g))
        np.testing.assert_allclose(found["kernel"][:, unit], expected, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found["bias"]), 0.01 * 1e-3, rtol=1e-5)
    np.testing.assert_array_equal(diffpose.clipped(params)["kernel"], params["kernel"])


def test_training_changes_all_weights_and_lowers_the_loss(lump, batch, first):
    mesh = sharding.make_mesh()
    step = diffpose.make_update(mesh, *lump, CONFIG, tiny.MODEL)
    state = sharding.made(mesh, lambda params: state_of(params, ("diffpose",)), first)
    # One start and one panel, so that a few steps fit it.
    values = []
    for _ in range(40):
        state, metrics = step(state, jax.random.key(5), np.float32(3e-3), batch)
        values.append(float(metrics["loss"]))
    assert np.isfinite(values).all() and metrics["skipped"] == 0
    assert np.mean(values[-5:]) < 0.7 * values[0]
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(state["params"]), jax.tree.leaves(first)):
        assert np.abs(np.asarray(new) - np.asarray(old)).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("right", [0, 1])
def test_the_best_of_the_start_and_each_views_answer_is_kept(lump, first, right):
    """A network that gives both views one twist is right in one of them at most."""
    start = _pose([0.05, 0.1, -0.1, 4.0, -3, 2])
    twist = np.array([0.1, -0.08, 0.12, 3.0, -5.0, 6.0])
    from_start = diffpose.moved(rigid.matmul(CAMERA_FROM_WORLD[right], start), jnp.asarray(twist, jnp.float32))
    truth = rigid.matmul(rigid.inverse(CAMERA_FROM_WORLD[right]), from_start)
    seen = _seen(1.5 * _images(lump, truth) + 0.7)
    run = functools.partial(diffpose.estimate, config=CONFIG, model_config=tiny.MODEL, seen=seen)
    run = functools.partial(run, volume=lump[0], box_from_index=lump[1], camera_from_world=CAMERA_FROM_WORLD)
    np.testing.assert_allclose(run(_answering(first, twist), world_from_box=start), truth, atol=1e-3)
    # The same answers from the true pose lead away from it.
    np.testing.assert_allclose(run(_answering(first, twist), world_from_box=truth), truth, atol=1e-6)


def test_refinement_finds_the_pose_whatever_the_gain_and_keeps_the_best(lump):
    truth = _pose([0.1, -0.05, 0.15, 5.0, -3, 4])
    start = rigid.matmul(_pose([0.05, -0.07, 0.06, 2.5, -2, 3], truth[:3, 3]), truth)
    images = 0.6 * _images(lump, truth) + jnp.asarray([0.5, 1.0])[:, None, None]
    seen = _seen(images)
    seen = seen.replace(images=[images[0].at[:, :9].set(9.0), images[1]])
    seen = seen.replace(valid=[seen.valid[0].at[:, :9].set(False), seen.valid[1]])
    arguments = *lump, seen, CAMERA_FROM_WORLD
    found = diffpose.refine(CONFIG, *arguments, start)
    R = np.asarray(found[:3, :3])
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-5)
    off = [float(rigid.distance(pose, truth, jnp.zeros(3))) for pose in (start, found)]
    assert off[0] > 4.0 and off[1] < 0.1 * off[0]
    # Steps of 200 mm lead nowhere, so the start stays.
    wild = dataclasses.replace(CONFIG, refine_mm=200.0, refine_steps=3)
    np.testing.assert_allclose(diffpose.refine(wild, *arguments, start), start, atol=1e-6)


def test_a_score_is_half_the_whole_image_and_half_its_patches(lump):
    pose = rigid.matmul(CAMERA_FROM_WORLD, _pose([0.1, 0, 0, 2, 0, 0]))
    images = _images(lump, jnp.eye(4))
    views = box.BoxViews(images, jnp.ones_like(images, bool), jnp.asarray(INTRINSICS), pose)
    drawn = box.render(lump[0], VoxelGrid(lump[1], lump[0].shape), views, CONFIG.step_mm)
    parts = similarity.ncc(drawn, images, views.valid), similarity.patch_ncc(drawn, images, views.valid, 7)
    expected = 0.5 * sum(float(part.sum()) for part in parts)
    np.testing.assert_allclose(diffpose.score(CONFIG, *lump, views, pose), expected, rtol=1e-4)


def test_the_presets_are_the_published_and_the_cheaper_ones():
    c = diffpose.Config()
    assert (c.width, c.crop_px, c.batch, c.steps, c.refine_steps, c.patch_px) == (32, 64, 8, 3000, 200, 13)
    assert (c.refine_px, c.refine_rad, c.refine_mm, c.decay, c.decay_steps) == (48, 7.5e-3, 1.0, 0.9, 25)
    assert (diffpose.QUICK.steps, diffpose.QUICK.refine_steps) == (1500, 100)
    o = diffpose.ORIGINAL
    assert (o.width, o.crop_px, o.batch, o.steps, o.refine_steps, o.refine_mm) == (64, 256, 8, 100_000, 500, 7.5)
