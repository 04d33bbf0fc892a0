"""TS-SAR: what its tokens say of which place, what its attention and losses are, and that each of its steps lowers the error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

from radgs_jax import gaussians
from radgs_jax.baselines import ts_sar
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.training import batches
from radgs_jax.training import examples
from radgs_jax.training import sharding
from radgs_jax.training import update

CONFIG = ts_sar.Config(side=4, levels=(8, 8, 16), blocks=(0, 0, 1), channels=12, width=24, heads=2, layers=1)
WIDE_PX = 56
SHORT, RATE, WARMUP, LAST = 100, 3e-3, 20, 25
"""Of a short training: number of steps, peak of the learning rate, steps to it, and last steps whose errors are judged."""


def _cameras():
    """Two tilted views with unequal focal lengths and principal points off the middle of a wide window."""
    E = np.zeros((2, 4, 4))
    E[0, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
    E[1, :3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    E[:, 2, 3], E[:, 3, 3] = 700.0, 1.0
    tilt = Rotation.from_rotvec([[0.1, 0.2, 0.05], [-0.15, 0.1, 0.1]]).as_matrix()
    E[:, :3, :3] = tilt @ E[:, :3, :3]
    k = np.array([[234.0, 229.0, 27.0, 29.0], [230.0, 235.0, 29.0, 27.0]])
    return E.astype(np.float32), k.astype(np.float32)


@pytest.fixture(scope="module")
def bone():
    """Gaussians (N,) of an anisotropic, tilted, off-centre lump."""
    rng = np.random.default_rng(3)
    mean = rng.normal(size=(60, 3)) @ np.diag([14.0, 9.0, 6.0]) + [2.0, -3.0, 1.0]
    quaternion = rng.normal(size=(60, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    parameters = (rng.uniform(0.005, 0.02, 60), mean, rng.uniform(2.5, 5.0, (60, 3)), quaternion)
    return gaussians.Gaussians(*(jnp.asarray(a, jnp.float32) for a in parameters))


@pytest.fixture(scope="module")
def batch(bone):
    """Pairs of the lump in air at random poses; some pixels of the measured X-rays do not count."""
    count, rng = 8, np.random.default_rng(5)
    E, k = _cameras()
    twists = rng.normal(size=(count, 6)) * [0.1, 0.1, 0.1, 3.0, 3.0, 3.0]
    poses = rigid.motion_about(jnp.zeros(3), jnp.asarray(twists, jnp.float32))
    clouds = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), bone)
    cameras, intrinsics = jnp.tile(E, (count, 1, 1, 1)), jnp.tile(k, (count, 1, 1))
    moved = gaussians.views(gaussians.move(clouds, poses), 2)
    alone = gaussians.project(moved, cameras, intrinsics, WIDE_PX, WIDE_PX)
    rest = jnp.full_like(alone, 1.0)
    valid = jnp.ones(alone.shape, bool).at[:, 0, :, :12].set(False)
    return batches.PairBatch(
        rest, alone, alone, rest + alone, valid, intrinsics, cameras, poses, jnp.ones(count, bool), clouds
    )


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: ts_sar.init(CONFIG, tiny.MODEL, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def shaken(params):
    """Parameters none of which is at a start that hides others."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + 0.05 * jnp.asarray(rng.normal(size=a.shape), a.dtype), params)


def test_tokens_are_read_where_the_points_of_the_grid_project():
    """Maps that hold their own pixel coordinates give back the pixels of each point, by float64 matrices."""
    E, k = _cameras()
    k = (k - np.float32([0, 0, 12, 12])) * np.float32([1.4, 1.4, 1, 1])
    points = ts_sar.points_of(CONFIG, 0)
    index = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), -1)
    wanted = (index - 1.5) * 24.0
    np.testing.assert_allclose(ts_sar.places(points), wanted, atol=1e-4)
    K = np.zeros((2, 3, 3))
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2], K[:, 2, 2] = *k.T.astype(np.float64), 1.0
    homogeneous = np.einsum("vij,vjk,nk->vni", K, E[:, :3].astype(np.float64), np.c_[wanted, np.ones(64)])
    pixels = homogeneous[..., :2] / homogeneous[..., 2:]
    uv = camera.project_camera(jnp.asarray(k), rigid.apply(jnp.asarray(E), ts_sar.places(points)))
    np.testing.assert_allclose(uv, pixels, atol=1e-3)

    centre = 4.0 * (np.arange(8) + 0.5) - 0.5
    maps = np.stack([*np.meshgrid(centre, centre), np.ones((8, 8))], -1)
    maps = np.broadcast_to(maps, (1, 2, 8, 8, 3)).astype(np.float32)
    valid = np.ones((1, 2, 32, 32), bool)
    read = np.asarray(ts_sar.lift(maps, uv[None], valid))[0]
    inside = ((pixels > 1.6) & (pixels < 29.4)).all(-1)
    outside = ((pixels < -0.6) | (pixels > 31.6)).any(-1)
    assert inside.sum() > 30 and outside.sum() > 2
    np.testing.assert_allclose(read[inside][:, :2], pixels[inside], atol=2e-3)
    np.testing.assert_allclose(read[inside][:, 2], 1.0, atol=1e-5)
    assert (read[outside] == 0).all()
    valid[:, 0, :, :16] = False
    hidden = inside & (pixels[..., 0] < 13.0) & (np.arange(2)[:, None] == 0)
    shown = inside & ~((pixels[..., 0] < 18.0) & (np.arange(2)[:, None] == 0))
    read = np.asarray(ts_sar.lift(maps, uv[None], valid))[0]
    assert hidden.sum() > 4 and (read[hidden] == 0).all()
    np.testing.assert_allclose(read[shown][:, :2], pixels[shown], atol=2e-3)


def test_density_tokens_lie_at_the_places_of_the_points(bone):
    places = np.asarray(ts_sar.places(ts_sar.points_of(CONFIG, 1)), np.float64)
    expected = np.zeros(len(places))
    sigma = ts_sar.GRID_BLUR * 12.0
    for d, m, s, q in zip(*(np.asarray(a, np.float64) for a in (bone.density, bone.mean, bone.scale, bone.quaternion))):
        R, wide = Rotation.from_quat(q, scalar_first=True).as_matrix(), np.sqrt(s**2 + sigma**2)
        expected += d * np.prod(s / wide) * np.exp(-0.5 * np.sum(((places - m) @ R / wide) ** 2, -1))
    found = ts_sar.density(jax.tree.map(lambda a: a[None], bone), CONFIG, 1)
    # The Gaussians' support ends where they are small.
    np.testing.assert_allclose(np.ravel(found), expected, atol=2e-2 * expected.max())


def test_positions_differ_between_all_points():
    for side, width in ((4, 24), (6, 64), (12, 384)):
        found = np.asarray(ts_sar.sine_positions(side, width))
        assert found.shape == (side**3, width) and np.abs(found).max() <= 1.0
        assert pdist(found).min() > 0.2 * np.sqrt(width // 6)


def test_semantic_attention_leaves_out_what_a_view_does_not_see():
    rng = np.random.default_rng(1)
    p = np.array([[[1.0, 0.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 1.0, 0.5]]], np.float32)
    bias = ts_sar.semantic_bias(jnp.asarray(p))
    np.testing.assert_allclose(bias, np.log(p[:, 0] * p[:, 1] + 1e-3), rtol=1e-5)
    x, others, new = (jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32) for _ in range(3))
    at = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    layer, shut = ts_sar.CrossLayer(2, 16), jnp.asarray([[0.0, -1e9, 0.0, 0.0, 0.0]])
    variables = layer.init(jax.random.key(0), x, others, bias, at)
    replaced = others.at[:, 1].set(new[:, 1])
    for one, other in zip(layer.apply(variables, x, others, shut, at), layer.apply(variables, x, replaced, shut, at)):
        np.testing.assert_allclose(one, other, atol=1e-5)
    opened, changed = (layer.apply(variables, x, tokens, bias, at)[0] for tokens in (others, replaced))
    assert np.abs(opened - changed).max() > 1e-4


def test_attention_begins_near_a_token_on_what_the_views_see():
    """Where all tokens are alike, it is the probability times a Gaussian, and the shift is to the mean of both."""
    rng = np.random.default_rng(6)
    at, p = 1.5 * rng.normal(size=(7, 3)), rng.uniform(size=(1, 2, 7))
    layer, tokens = ts_sar.CrossLayer(2, 16), jnp.ones((1, 7, 8))
    bias = ts_sar.semantic_bias(jnp.asarray(p, jnp.float32))
    variables = layer.init(jax.random.key(0), tokens, tokens, bias, jnp.asarray(at, jnp.float32))
    variables["params"]["log_reach"] = jnp.log(jnp.asarray([0.7, 2.0]))
    _, shift = layer.apply(variables, tokens, tokens, bias, jnp.asarray(at, jnp.float32))
    apart = ((at[:, None] - at) ** 2).sum(-1)
    for head, reach in enumerate((0.7, 2.0)):
        weight = (p[0].prod(0) + 1e-3) * np.exp(-0.5 * apart / reach**2)
        wanted = weight @ at / weight.sum(1, keepdims=True) - at
        np.testing.assert_allclose(shift[0, :, head], wanted, atol=1e-4)


def test_the_weights_of_the_loss_settle_at_the_size_of_its_terms():
    terms, s = jnp.asarray([4.0, 0.1, 2.0]), jnp.asarray([0.3, -1.0, 0.0])
    expected = np.sum(np.exp(-np.asarray(s, np.float64)) * np.asarray(terms) + np.asarray(s))
    np.testing.assert_allclose(ts_sar.adaptive(terms, s), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ts_sar.adaptive)(terms, s), np.exp(-np.asarray(s)), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ts_sar.adaptive, 1)(terms, jnp.log(terms)), 0.0, atol=1e-5)


def _wide(batch, strength=0.0):
    config = dataclasses.replace(tiny.MODEL, crop_px=WIDE_PX)
    return examples.make_example(jax.random.key(1), batch, config, strength)


def test_the_second_step_sees_windows_at_the_pose_of_the_first(batch):
    wide = _wide(batch)
    motion = rigid.motion_about(jnp.zeros(3), jnp.asarray([[0.1, -0.2, 0.1, 9.0, -12.0, 7.0]] * 8))
    carried = examples.carry(wide, motion)
    np.testing.assert_allclose(
        rigid.matmul(carried.camera_from_box, carried.motion[:, None]),
        rigid.matmul(wide.camera_from_box, wide.motion[:, None]),
        atol=2e-3,
    )
    carried = examples.carry(wide, wide.motion)
    np.testing.assert_allclose(carried.motion, jnp.tile(jnp.eye(4), (8, 1, 1)), atol=1e-5)
    seen = examples.crop(carried, 32)
    assert seen.xrays.shape == seen.target.shape == seen.valid.shape == (8, 2, 32, 32)
    # At the true pose the vertebra is drawn where the CT's projection is, also in windows cut from windows.
    drawn = gaussians.project(gaussians.views(seen.cloud, 2), seen.camera_from_box, seen.intrinsics, 32, 32)
    np.testing.assert_allclose(np.where(seen.valid, drawn - seen.target, 0.0), 0.0, atol=2e-3)
    origin = camera.project_camera(seen.intrinsics, seen.camera_from_box[..., None, :3, 3])
    assert np.abs(np.asarray(origin) - 16.0).max() <= 0.5 + 1e-3


def test_pixels_that_do_not_count_change_nothing(batch, shaken):
    seen = examples.crop(_wide(batch, 1.0), 32)
    hidden = seen.valid.at[:, :, :, :9].set(False)
    rng = np.random.default_rng(4)
    apply = jax.jit(ts_sar.Step(CONFIG, 0).apply)
    found = [
        apply(
            shaken["ts_sar"]["coarse"],
            jnp.where(hidden, seen.xrays, jnp.asarray(rng.uniform(0, 5, hidden.shape), jnp.float32)),
            hidden,
            seen.intrinsics,
            seen.camera_from_box,
            seen.cloud,
        )
        for _ in range(2)
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)
    assert float(jnp.std(found[0][1])) > 1e-3


@pytest.mark.long
def test_both_steps_train_all_their_weights_and_none_of_the_other(batch, shaken):
    few = jax.tree.map(lambda a: a[:2], batch)

    def part(params, name):
        value, parts = ts_sar.loss(params, jax.random.key(0), few, CONFIG, tiny.MODEL)
        return value if name == "loss" else parts[name]

    gradients = jax.jit(lambda p: [jax.grad(part)(p, name)["ts_sar"] for name in ("loss", "coarse_mm", "fine_mm")])
    whole, coarse, fine = gradients(shaken)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(whole))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves((coarse["fine"], fine["coarse"])))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(fine["fine"]))


def test_the_number_of_views_is_checked(batch, params):
    seen = examples.crop(_wide(batch), 32)
    one = [a[:, :1] for a in (seen.xrays, seen.valid, seen.intrinsics, seen.camera_from_box)]
    with pytest.raises(ValueError, match="found 1 views of 32 x 32, wanted 2"):
        ts_sar.Step(CONFIG, 0).apply(params["ts_sar"]["coarse"], *one, seen.cloud)


@pytest.mark.slow
def test_each_step_lowers_the_error(batch, params):
    """After a short training, each step's error is below that before it, from starts and panels that are new at every step."""
    train = ts_sar.make_update(sharding.make_mesh(), CONFIG, tiny.MODEL)
    state, found = update.state_of(jax.tree.map(jnp.array, params), ("ts_sar",)), []
    for step in range(SHORT):
        rate = update.cosine(step, SHORT, RATE, WARMUP)
        state, metrics = train(state, jax.random.fold_in(jax.random.key(2), step), np.float32(rate), batch)
        found.append([metrics[f"{name}_mm"] for name in ("start", *ts_sar.STEPS)])
    start, coarse, fine = np.median(found[-LAST:], 0)
    assert coarse < 0.8 * start and fine < 0.9 * coarse, (start, coarse, fine)
