"""RecM, RegM and RadGS-Reg: shapes, the counterfactual difference, camera awareness, and the passes."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments import configs
from radgs_jax import gaussians
from radgs_jax import losses
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.models import activation
from radgs_jax.models import attention
from radgs_jax.models import backbones
from radgs_jax.models import heads
from radgs_jax.models import matching
from radgs_jax.models import radgs_reg
from radgs_jax.models import recm
from radgs_jax.models import regm
from radgs_jax.training import augment
from radgs_jax.training import batches
from radgs_jax.training import examples
from radgs_jax.training import objectives
from radgs_jax.training import sharding
from radgs_jax.training.update import init_state
from radgs_jax.training.update import make_update
from radgs_jax.training.update import TRAINED
from radgs_jax.training.update import UpdateConfig

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
CONFIG = dataclasses.replace(tiny.MODEL, gaussians=60)


def _cloud(count, seed=0, batch=()):
    """An anisotropic, off-centre, rotated cloud of a vertebra's size."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(*batch, count, 4))
    arrays = (
        rng.uniform(0.005, 0.03, (*batch, count)),
        rng.normal(size=(*batch, count, 3)) * [17, 12, 8] + [3, -5, 2],
        rng.uniform(2.0, 5.0, (*batch, count, 3)),
        q / np.linalg.norm(q, axis=-1, keepdims=True),
    )
    return gaussians.Gaussians(*(jnp.asarray(a, jnp.float32) for a in arrays))


def _views(batch):
    """An AP-like and a lateral-like view of the origin, with their intrinsics for a 32 px crop, (batch, 2, ...)."""
    E = np.zeros((2, 4, 4))
    E[0, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
    E[1, :3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    E[:, 2, 3], E[:, 3, 3] = 700.0, 1.0
    tilt = np.asarray(rigid.exp_so3(jnp.asarray([[0.1, 0.2, 0.05], [-0.15, 0.1, 0.1]])))
    E[:, :3, :3] = tilt @ E[:, :3, :3]
    k = np.array([[234.0, 234.0, 15.5, 16.5], [230.0, 231.0, 17.0, 15.0]])
    return (
        jnp.asarray(np.broadcast_to(E, (batch, 2, 4, 4)), jnp.float32),
        jnp.asarray(np.broadcast_to(k, (batch, 2, 4)), jnp.float32),
    )


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: radgs_reg.init(CONFIG, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def inputs():
    camera_from_box, intrinsics = _views(2)
    cloud = _cloud(CONFIG.gaussians, batch=(2,))
    images = jnp.asarray(np.random.default_rng(1).uniform(0.5, 3.0, (2, 2, 32, 32)), jnp.float32)
    return images, jnp.ones(images.shape, bool), intrinsics, camera_from_box, cloud


@pytest.fixture(scope="module")
def batch(inputs):
    *_, intrinsics, camera_from_world, cloud = inputs
    rng = np.random.default_rng(2)
    wide = [jnp.asarray(rng.uniform(0, 2, (2, 2, 56, 56)), jnp.float32) for _ in range(4)]
    cameras = intrinsics + jnp.asarray([0, 0, 12.0, 12.0]), camera_from_world
    poses = jnp.tile(jnp.eye(4), (2, 1, 1))
    return batches.PairBatch(*wide, jnp.ones(wide[0].shape, bool), *cameras, poses, jnp.asarray([True, False]), cloud)


@pytest.fixture(scope="module")
def ct_batch(inputs):
    motion = rigid.motion_about(jnp.zeros(3), jnp.asarray([[0.2, -0.1, 0.15, 3.0, -4.0, 5.0], [0.0] * 6]))
    return batches.CtBatch(motion, inputs[-1])


@pytest.mark.parametrize("head", ["anchored", "paper"])
def test_recm_shapes_for_both_heads(inputs, head):
    config = dataclasses.replace(CONFIG, head=head)
    model = recm.RecM(config)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    out = jax.jit(model.apply)(variables, *inputs)
    for branch in (out.factual, out.effect):
        chex.assert_shape((branch.density, branch.mean), [(2, 60), (2, 60, 3)])
        assert (np.asarray(branch.density) > 0).all() and (np.asarray(branch.scale) >= activation.SCALE_RANGE[0]).all()
        np.testing.assert_allclose(np.linalg.norm(branch.quaternion, axis=-1), 1.0, atol=1e-5)
    assert out.attention.shape[:2] == (2, 2) and out.attention.shape[-1] == 4


def test_unknown_head_is_named(inputs):
    with pytest.raises(ValueError, match="head: found 'x'"):
        jax.eval_shape(recm.RecM(dataclasses.replace(CONFIG, head="x")).init, jax.random.key(0), *inputs)


def test_a_backbone_may_be_a_class(params):
    """The same parameters, names included, as the family that it is, in 2D and 3D, and the same with the options of training."""
    by_class = dataclasses.replace(
        CONFIG,
        backbone_2d=(backbones.SmallCNN, CONFIG.backbone_2d[1]),
        backbone_3d=(backbones.SmallCNN, CONFIG.backbone_3d[1]),
    )
    assert by_class.own_backbones == (backbones.SmallCNN,) * 2 and CONFIG.own_backbones == ()
    for config in (by_class, UpdateConfig(bfloat16=True, remat=True).in_training(by_class)):
        shapes = jax.eval_shape(lambda config=config: radgs_reg.init(config, jax.random.key(0)))
        assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_zero_logits_give_the_anchors_back():
    cloud = _cloud(40)
    out = activation.activate(jnp.zeros((40, 11)), cloud, 10.0)
    chex.assert_trees_all_close(out, cloud, rtol=2e-4, atol=1e-6)


def test_matching_finds_where_a_gaussian_went():
    """With the same features on both sides, and sharp ones: the cell that shows what the prior projects there."""
    prior = np.zeros((1, 2, 32, 32, 2), np.float32)
    prior[:, :, 14:18, 12:16] = np.random.default_rng(0).uniform(1.0, 2.0, (1, 2, 4, 4, 2))
    model = heads.Matching(1, 32, 2)
    uv, query = jnp.full((1, 2, 1, 2), 14.5).at[..., 1].set(16.5), jnp.zeros((1, 2, 1, 7))
    params = model.init(jax.random.key(0), jnp.asarray(prior), jnp.asarray(prior), uv, query)
    weights = params["params"]
    weights |= {f"Conv_{i + 3}": weights[f"Conv_{i}"] for i in range(3)} | {"near": jnp.full(1, -20.0)}
    # A descriptor that is the feature itself, made sharp.
    weights["Dense_0"] |= {"kernel": jnp.eye(39, 64), "bias": jnp.zeros(64)}
    weights["Dense_1"] |= {"kernel": 1e3 * jnp.eye(64, 16), "bias": jnp.zeros(16)}
    weights["Dense_2"] |= {"kernel": jnp.eye(32, 16), "bias": jnp.zeros(16)}
    xray = jnp.asarray(np.roll(prior, (-4, 6), (2, 3)))
    _, _, still = model.apply(params, jnp.asarray(prior), jnp.asarray(prior), uv, query)
    _, _, shift = model.apply(params, xray, jnp.asarray(prior), uv, query)
    # The brightest cell may be the anchor's neighbour; it moves by what the image moved by.
    np.testing.assert_allclose(shift - still, np.broadcast_to([6.0, -4.0], shift.shape), atol=0.2)


def test_alignment_finds_a_motion_and_weighs_by_information():
    """Exact for true matches; wrong ones without information do not matter; information is that of central differences."""
    rng = np.random.default_rng(1)
    source = jnp.asarray(rng.normal(size=(2, 40, 3)) * [17, 12, 8] + [3, -5, 2], jnp.float32)
    motion = rigid.motion_about(
        jnp.zeros(3), jnp.asarray([[0.3, -0.2, 0.25, 9.0, -7.0, 4.0], [-0.1, 0.2, 0.1, 1.0, 2.0, 3.0]])
    )
    target = rigid.apply(motion, source)
    root = rng.normal(size=(2, 40, 3, 3))
    information = jnp.asarray(root @ np.swapaxes(root, -1, -2) + 0.5 * np.eye(3), jnp.float32)
    spoilt = target.at[:, :10].add(20.0)
    found, normal = matching.align(matching.Matches(source, spoilt, information.at[:, :10].set(0.0)), steps=5)
    np.testing.assert_allclose(found, motion, atol=5e-3)

    def cost(twist, b):
        moved = np.asarray(
            rigid.apply(rigid.matmul(rigid.motion_about(jnp.zeros(3), twist), found), source)[b, 10:], np.float64
        )
        miss = moved - np.asarray(target[b, 10:])
        return 0.5 * np.einsum("ni,nij,nj->", miss, np.asarray(information[b, 10:], np.float64), miss)

    for axis, h in ((0, 0.02), (4, 0.5)):
        e = jnp.zeros(6).at[axis].set(h)
        second = (cost(e, 0) - 2 * cost(0 * e, 0) + cost(-e, 0)) / h**2
        np.testing.assert_allclose(second, float(normal[0, axis, axis]), rtol=0.05)


def test_counterfactual_draws_have_the_mean_that_inference_uses():
    draws = attention.counterfactual_maps(jax.random.key(0), (40, 40, 3), 8)
    chex.assert_shape(draws, (8, 40, 40, 3))
    assert draws.min() >= 0 and draws.max() < 2
    assert abs(float(draws.mean()) - 1.0) < 0.01
    fixed = attention.counterfactual_maps(None, (4, 4, 3), 8)
    assert fixed.shape == (1, 4, 4, 3) and (fixed == 1).all()


def test_effect_vanishes_where_attention_is_the_intervention(params, inputs):
    """Eq. 1: when the factual maps equal the counterfactual ones the effect's logits are zero, and the anchors come back."""
    flat = jax.tree.map(lambda a: a, params["recm"])
    maps = flat["params"]["AttentionMaps_0"]
    maps["scale"], maps["bias"] = jnp.zeros_like(maps["scale"]), jnp.ones_like(maps["bias"])
    out = jax.jit(recm.RecM(CONFIG).apply)(flat, *inputs)
    np.testing.assert_allclose(out.effect.mean, inputs[-1].mean, atol=1e-4)
    assert np.abs(np.asarray(out.factual.mean - inputs[-1].mean)).max() > 1e-3


def test_inference_is_deterministic_and_training_draws_differ(params, inputs):
    apply = jax.jit(recm.RecM(CONFIG).apply)
    a, b = apply(params["recm"], *inputs), apply(params["recm"], *inputs)
    np.testing.assert_array_equal(a.effect.mean, b.effect.mean)
    c, d = (apply(params["recm"], *inputs, jax.random.key(i)) for i in (0, 1))
    assert np.abs(np.asarray(c.effect.mean - d.effect.mean)).max() > 0


def test_views_are_fused_by_precision_and_camera():
    """What both views see of a shift in their own axes comes back in the box frame; the surer view counts more."""
    camera_from_box, _ = _views(1)
    rotation = heads.view_from_box(camera_from_box)
    truth = np.array([3.0, -2.0, 1.5], np.float32)
    seen = np.einsum("vij,j->vi", np.asarray(rotation[0]), truth)[None, :, None, :2]
    shift = jnp.asarray(np.broadcast_to(seen, (1, 2, 5, 2)), jnp.float32)
    sure = jnp.full(shift.shape, 5.0)
    fused, information = heads.fuse_views(shift, sure, rotation)
    np.testing.assert_allclose(fused[0], np.tile(truth, (5, 1)), atol=1e-3)
    assert np.linalg.eigvalsh(np.asarray(information))[..., 0].min() > 50.0
    # Both views see the body's axis. One of them is wrong about it, and says so.
    wrong = shift.at[0, 1].add(8.0)
    fused, _ = heads.fuse_views(wrong, sure.at[0, 1].set(-3.0), rotation)
    along = np.asarray(rotation[0, 0, :2])
    np.testing.assert_allclose(fused[0] @ along.T, np.tile(along @ truth, (5, 1)), atol=0.2)


def test_view_axes_look_at_the_box():
    camera_from_box, _ = _views(1)
    camera_from_box = camera_from_box.at[..., :2, 3].set(40.0)
    z = rigid.apply_rotation(heads.view_from_box(camera_from_box)[0], jnp.eye(3)[2])
    R = np.asarray(heads.view_from_box(camera_from_box)[0])
    np.testing.assert_allclose(np.linalg.det(R), 1.0, atol=1e-5)
    to_box = np.asarray(camera_from_box[0, :, :3, 3])
    ray_in_box = np.einsum("vji,vj->vi", np.asarray(camera_from_box[0, :, :3, :3]), to_box)
    along = np.einsum("vij,vj->vi", R, ray_in_box)
    np.testing.assert_allclose(along[:, :2], 0.0, atol=1e-3)
    assert (along[:, 2] > 0).all() and z.shape == (2, 3)


def test_sampling_weights_read_a_linear_image_exactly():
    rows, columns = np.mgrid[0:8, 0:16].astype(np.float32)
    cell_centre = 4 * (columns + 0.5) - 0.5 + 3.0 * (4 * (rows + 0.5) - 0.5)
    uv = jnp.asarray([[10.3, 20.7], [33.0, 5.5]])
    weights = heads.sampling_weights(uv, (32, 64), (8, 16))
    np.testing.assert_allclose(weights @ cell_centre.reshape(-1), uv[:, 0] + 3 * uv[:, 1], rtol=1e-5)


def test_registration_moves_the_start_and_keeps_it_rigid(params):
    camera_from_world, intrinsics = _views(1)
    images = [jnp.asarray(np.random.default_rng(3).uniform(0, 3, shape), jnp.float32) for shape in ((60, 64), (72, 50))]
    start = rigid.motion_about(jnp.zeros(3), jnp.asarray([0.1, -0.05, 0.2, 4.0, -3.0, 2.0]))
    valid = [jnp.ones(image.shape, bool) for image in images]
    cameras = intrinsics[0], camera_from_world[0]
    register = jax.jit(radgs_reg.iterate, static_argnames=("config", "passes"))
    result = register(params, CONFIG, images, valid, *cameras, start, _cloud(60), passes=3)
    assert result.trajectory.shape == (4, 4, 4)
    np.testing.assert_allclose(result.trajectory[0], start, atol=1e-6)
    R = np.asarray(result.world_from_box[:3, :3])
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-5)
    assert result.xrays.shape == (2, 32, 32)


def test_crop_keeps_the_camera_exact():
    """A world point lands on the same image content before and after the crop, also where the window hangs over the border."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.uniform(size=(50, 70)), jnp.float32)
    E = jnp.eye(4).at[:3, 3].set(jnp.asarray([20.0, -50.0, 700.0]))
    k = jnp.asarray([300.0, 310.0, 33.0, 26.0])
    valid = jnp.asarray(rng.uniform(size=(50, 70)) > 0.2)
    window, inside, moved = camera.window(image, valid, k, E, 24)
    shift = np.asarray(k - moved)[2:].astype(int)
    assert window.shape == inside.shape == (24, 24)
    beyond = 0
    for v, u in ((0, 0), (11, 7), (12, 20), (23, 23)):
        row, column = np.clip(v + shift[1], 0, 49), np.clip(u + shift[0], 0, 69)
        assert float(window[v, u]) == float(image[row, column])
        there = (row, column) == (v + shift[1], u + shift[0])
        beyond += not there
        assert bool(inside[v, u]) == (there and bool(valid[row, column]))
    assert 0 < beyond < 4


@pytest.mark.parametrize("phase", objectives.PHASES)
def test_every_phase_lowers_its_loss_on_one_batch(params, batch, ct_batch, phase):
    batch = ct_batch if phase == "reg" else batch
    update = make_update(sharding.make_mesh(jax.devices()[:1]), phase, CONFIG, objectives.LossConfig(), 0.0)
    mesh = sharding.make_mesh(jax.devices()[:1])
    state = sharding.made(mesh, lambda params: init_state(params, phase), params)
    values = []
    for _ in range(12):
        state, metrics = update(state, jax.random.key(0), np.float32(2e-3), batch)
        values.append(float(metrics["loss"]))
    assert np.isfinite(values).all() and min(values[-3:]) < values[0]
    for name in ("recm", "regm"):
        moved = any(
            np.abs(np.asarray(a) - np.asarray(b)).max() > 0
            for a, b in zip(jax.tree.leaves(state["params"][name]), jax.tree.leaves(params[name]))
        )
        assert moved == (name in TRAINED[phase])


def test_joint_gradient_reaches_recm_through_the_voxeliser(params, batch):
    """Eq. 4: the registration loss alone has a gradient in RecM's parameters."""
    example = examples.make_example(jax.random.key(0), batch, CONFIG)

    def registration_only(recm_params):
        seen = objectives.reconstruct(recm_params, CONFIG, example)
        effect = seen.effect
        motion, _ = regm.estimate(params["regm"], CONFIG, effect, seen.matches, example.cloud)
        truth = example.motion, example.cloud
        return objectives.registration_loss(motion, *truth, effect, CONFIG, objectives.LossConfig())[0]

    gradient = jax.jit(jax.grad(registration_only))(params["recm"])
    norms = [float(jnp.linalg.norm(g)) for g in jax.tree.leaves(gradient)]
    assert np.isfinite(norms).all() and sum(n > 0 for n in norms) > 0.8 * len(norms)


def test_example_truth_is_consistent(batch):
    """The CT cloud moved by `motion` and projected in the start's cameras is the cloud at the true pose in the true cameras."""
    example = examples.make_example(jax.random.key(5), batch, CONFIG)
    moved = objectives.project(gaussians.move(example.cloud, example.motion), example)
    true_cameras = rigid.matmul(batch.camera_from_world, batch.world_from_box[:, None])
    direct = gaussians.project(gaussians.views(batch.cloud, 2), true_cameras, example.intrinsics, 32, 32)
    np.testing.assert_allclose(moved, direct, atol=2e-3 * float(direct.max()))


def test_clean_augmentation_is_the_sum_and_starts_have_their_sizes():
    rest, excess = (jnp.asarray(np.random.default_rng(i).uniform(0, 2, (3, 2, 20, 24)), jnp.float32) for i in (0, 1))
    nothing = jnp.zeros((3, 1, 1, 1))
    both = augment.contrast(jax.random.key(0), rest, excess, nothing)
    np.testing.assert_allclose(both, rest + excess, rtol=1e-6)
    np.testing.assert_allclose(augment.random_panel(jax.random.key(1), both, nothing), both, rtol=1e-4, atol=1e-5)
    assert np.abs(augment.random_panel(jax.random.key(1), both, 1.0 + nothing) - both).mean() > 0.05
    twist = augment.start_twist(jax.random.key(1), 4000)
    size = np.sqrt(
        np.sum(np.asarray(twist[:, 3:]) ** 2, -1) + (rigid.LEVER_MM * np.linalg.norm(twist[:, :3], axis=-1)) ** 2
    )
    assert size.max() < 25.01 and 0.3 < (size < 6).mean() < 0.6 and (size > 15).mean() > 0.1


def test_a_real_pair_shows_its_measured_xray_and_a_simulated_one_either(batch):
    """Of two pairs the second is real. Without a detector: the measured image, or the clean sum, at the same places."""
    at = lambda image, E, k: camera.window(image, jnp.ones(image.shape, bool), k, E, CONFIG.crop_px)[0]
    kinds = set()
    for seed in range(8):
        example = examples.make_example(jax.random.key(seed), batch, CONFIG, 0.0)
        E = example.camera_from_box
        for pair, sources in ((0, (batch.rest + batch.excess, batch.measured)), (1, (batch.measured,))):
            crops = [at(source[pair, 1], E[pair, 1], batch.intrinsics[pair, 1]) for source in sources]
            same = [np.allclose(crop, example.xrays[pair, 1], atol=1e-4) for crop in crops]
            assert any(same)
            kinds.add((pair, same.index(True)))
    assert kinds == {(0, 0), (1, 0)}  # strength 0 leaves simulated pairs clean


def test_without_counterfactuals_there_is_no_attention_and_the_effect_is_the_answer(inputs):
    config = dataclasses.replace(CONFIG, counterfactual_draws=0)
    images, valid, *cameras, cloud = inputs
    params = jax.jit(recm.RecM(config).init)(jax.random.key(0), images, valid, *cameras, cloud)
    assert not any("Attention" in name for name in params["params"])
    found = jax.jit(recm.RecM(config).apply)(params, images, valid, *cameras, cloud)
    chex.assert_trees_all_equal(found.effect, found.factual)
    assert np.ptp(found.attention) == 0


def test_what_lies_outside_the_collimator_does_not_count(params, inputs, batch):
    """Neither the reconstruction nor its image loss knows what an X-ray holds where it is not valid."""
    images, valid, *cameras, cloud = inputs
    valid = valid.at[:, 0, :, 20:].set(False).at[1, 1, :9].set(False)
    rubbish = jnp.where(valid, images, 1e3)
    apply = jax.jit(recm.RecM(CONFIG).apply)
    clean, dirty = (apply(params["recm"], i, valid, *cameras, cloud).effect for i in (images, rubbish))
    np.testing.assert_allclose(clean.mean, dirty.mean, atol=1e-4)
    np.testing.assert_allclose(clean.density, dirty.density, rtol=1e-4)
    whole = apply(params["recm"], images, jnp.ones_like(valid), *cameras, cloud).effect
    assert np.abs(np.asarray(whole.mean - clean.mean)).max() > 1e-3
    example = examples.make_example(jax.random.key(2), batch, CONFIG).replace(valid=valid)
    spoilt = example.replace(target=jnp.where(valid, example.target, 1e3))
    reconstruction = objectives.reconstruct(params["recm"], CONFIG, example)
    one, other = (
        objectives.reconstruction_loss(reconstruction, e, CONFIG, objectives.LossConfig())[0] for e in (example, spoilt)
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_regm_starts_at_rest_and_the_mesh_does_not_matter(params):
    cloud = _cloud(60, batch=(2,))
    matches = regm.matches_of(cloud, cloud, CONFIG)
    motion, _ = regm.estimate(params["regm"], CONFIG, cloud, matches, cloud, passes=2)
    assert float(losses.geodesic(motion, jnp.eye(4))) < 2.0


def test_parameter_counts_are_those_of_the_config(params):
    assert 1e4 < backbones.count_parameters(params["recm"]) < 2e5


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vit12"])
def test_the_papers_families_fit_the_paper_preset(name):
    """Shapes only: RecM and RegM with each backbone of the paper's Table 2 at the sizes of the `paper` preset."""
    config = dataclasses.replace(configs.PAPER.model, backbone_2d=(name, ()), backbone_3d=(name, ()))
    shapes = jax.eval_shape(lambda: radgs_reg.init(config, jax.random.key(0)))
    count = {k: sum(int(np.prod(a.shape)) for a in jax.tree.leaves(v)) for k, v in shapes.items()}
    # The largest: ViT-B is 86 M, and RegM flattens its 8^3 tokens of 768 into 128 features, 50 M more.
    assert 5e6 < count["recm"] < 1.2e8 and 8e6 < count["regm"] < 1.5e8


@pytest.mark.multiprocess
def test_every_mesh_trains_alike(tmp_path):
    """One to eight devices, parameters whole and split: the same losses, random numbers included, from one compilation each."""
    code = (
        "import sys; sys.path[:0] = ['tests/support', '.']\n"
        "import jax, numpy as np, jax.numpy as jnp, tiny\n"
        "from radgs_jax import gaussians\n"
        "from radgs_jax.geometry import rigid\n"
        "from radgs_jax.models import radgs_reg\n"
        "from radgs_jax.training import batches, objectives, sharding\n"
        "from radgs_jax.training import update as updates\n"
        "cloud = jax.tree.map(lambda a: np.tile(a[None, :64], (8,) + (1,) * a.ndim), gaussians.uniform_cloud(4, 15.0, 0.02))\n"
        "twists = np.random.default_rng(0).normal(size=(8, 6)) * [0.1, 0.1, 0.1, 4.0, 4.0, 4.0]\n"
        "batch = batches.CtBatch(np.asarray(rigid.motion_about(jnp.zeros(3), jnp.asarray(twists))), cloud)\n"
        "params = jax.device_get(jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(0)))\n"
        "for count, fsdp in ((1, 1), (2, 1), (4, 2), (8, 1)):\n"
        "    mesh = sharding.make_mesh(jax.devices()[:count], {'fsdp': fsdp})\n"
        "    update = updates.make_update(mesh, 'reg', tiny.MODEL, objectives.LossConfig(), 0.0)\n"
        "    state = sharding.made(mesh, lambda params: updates.init_state(params, 'reg'), params)\n"
        "    part = jax.device_put(batch, sharding.of_batch(mesh))\n"
        "    losses = []\n"
        "    for step in range(4):\n"
        "        place = lambda value: jax.device_put(value, sharding.whole(mesh))\n"
        "        state, metrics = update(state, place(jax.random.key(step)), place(np.float32(1e-3)), part)\n"
        "        losses.append(float(metrics['loss']))\n"
        "    assert update._cache_size() == 1\n"
        "    leaves = jax.tree.leaves(state)\n"
        "    most = max(leaves, key=lambda leaf: leaf.size)\n"
        "    assert most.addressable_shards[0].data.size * fsdp == most.size\n"
        "    whole = sharding.gathered(state, mesh)\n"
        "    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(whole))\n"
        "    print(*losses)\n"
    )
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.array([list(map(float, line.split())) for line in done.stdout.splitlines()])
    assert found.shape == (4, 4) and np.isfinite(found).all()
    np.testing.assert_allclose(found, np.tile(found[:1], (4, 1)), rtol=1e-4)
