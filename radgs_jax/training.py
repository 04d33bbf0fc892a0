"""Training as pure functions: examples from pairs, the loss of each module stage, and the sharded update.

Module stages: 'rec' trains RecM with Eq. 2, 'reg' trains RegM with Eq. 3, 'joint' trains both with Eq. 4, gradients
flowing from the registration through the voxeliser into RecM.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from radgs_jax import augment
from radgs_jax import camera
from radgs_jax import gaussians
from radgs_jax import losses
from radgs_jax import rigid
from radgs_jax.models import matching
from radgs_jax.models import recm
from radgs_jax.models import regm
from radgs_jax.models.config import ModelConfig

MODULES = ("rec", "reg", "joint")
TRAINED = {"rec": ("recm",), "reg": ("regm",), "joint": ("recm", "regm")}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights. The first three are the paper's (Eq. 2 and 3).

    points (1/mm): mean distance of every Gaussian from where the true pose puts it. It stands where the authors' code has
    a Chamfer distance to a fitted cloud; here the correspondence is known. volume (mm): L1 of the voxelised densities.
    matches: negative log-likelihood (Laplace) of where each view sees each anchor, which makes its precision true.
    pose (1/mm): geodesic distance of the matches' motion in closed form, less where the start is far.
    attention: minus log share of the attention that lies on the vertebra.
    """

    ssim: float = 0.2
    tv: float = 0.05
    geodesic: float = 0.02
    points: float = 0.05
    volume: float = 30.0
    matches: float = 0.3
    pose: float = 0.3
    attention: float = 0.05


@flax.struct.dataclass
class PairBatch:
    """Simulated or real X-ray pairs, B of them.

    rest, excess, vertebra: (B, V, S, S) line integrals of everything but the vertebra, of what the vertebra adds, and of
    the vertebra alone, in a window wider than the network's crop; measured: (B, V, S, S) as a detector gives them, up to a
    scale and an offset; valid: (B, V, S, S) bool, where `measured` counts; intrinsics (B, V, 4); camera_from_world
    (B, V, 4, 4); world_from_box (B, 4, 4) the true pose; simulated: (B,) bool, False where rest and excess are unknown;
    cloud: Gaussians (B, N), box frame.
    """

    rest: jax.Array
    excess: jax.Array
    vertebra: jax.Array
    measured: jax.Array
    valid: jax.Array
    intrinsics: jax.Array
    camera_from_world: jax.Array
    world_from_box: jax.Array
    simulated: jax.Array
    cloud: gaussians.Gaussians


@flax.struct.dataclass
class CtBatch:
    """CT pairs: motions (B, 4, 4), which carry the CT's Gaussians `cloud` (B, N) to where they are to be found; box frame."""

    motion: jax.Array
    cloud: gaussians.Gaussians


@flax.struct.dataclass
class Example:
    """What a network sees (xrays, valid, intrinsics, camera_from_box at the start pose, cloud) and the truth.

    motion: (B, 4, 4) from the start box to the true one: the truth is motion applied to the CT; target: (B, V, H, W) the
    vertebra alone at the true pose.
    """

    xrays: jax.Array
    valid: jax.Array
    intrinsics: jax.Array
    camera_from_box: jax.Array
    cloud: gaussians.Gaussians
    motion: jax.Array
    target: jax.Array


MEASURED_SHARE = 0.5
"""Of simulated pairs, how many show what the simulated detector measured; the others get a detector drawn at each step."""
CLEAN_SHARE = 0.3
"""Of X-rays, how many no detector is drawn for."""


def make_example(key, batch, config, strength=1.0):
    """Draws a start pose and a detector for each pair, and crops at the start; `strength` 0 shows simulated pairs' clean sums."""
    keys = jax.random.split(key, 5)
    count = batch.rest.shape[0]
    offset = rigid.motion_about(jnp.zeros(3), augment.start_twist(keys[0], count))
    world_from_start = rigid.matmul(batch.world_from_box, offset)
    camera_from_box = rigid.matmul(batch.camera_from_world, world_from_start[:, None])

    def crop(image, valid, k, E):
        return camera.window(image, valid, k, E, config.crop_px)

    crop = jax.vmap(jax.vmap(crop))
    measured, valid, intrinsics = crop(batch.measured, batch.valid, batch.intrinsics, camera_from_box)
    rest, everywhere, _ = crop(batch.rest, jnp.ones_like(batch.valid), batch.intrinsics, camera_from_box)
    excess, target = (
        crop(image, batch.valid, batch.intrinsics, camera_from_box)[0] for image in (batch.excess, batch.vertebra)
    )
    each = (count, 1, 1, 1)
    seen = ~batch.simulated.reshape(each) | (jax.random.uniform(keys[1], each) < MEASURED_SHARE * strength)
    dirty = strength * (jax.random.uniform(keys[2], each) > CLEAN_SHARE)
    # A measured X-ray has had its detector: a little more of the same widens what the simulator knows.
    xrays = jnp.where(seen, measured, augment.contrast(keys[3], rest, excess, dirty))
    xrays = augment.detector(keys[4], xrays, jnp.where(seen, 0.3, 1.0) * dirty)
    return Example(
        xrays,
        jnp.where(seen, valid, everywhere),
        intrinsics,
        camera_from_box,
        batch.cloud,
        rigid.inverse(offset),
        target,
    )


def reconstruct(params, config, example, key=None):
    """RecM's `Reconstruction` of an `Example`; deterministic without a key."""
    return recm.RecM(config).apply(
        params, example.xrays, example.valid, example.intrinsics, example.camera_from_box, example.cloud, key
    )


def project(cloud, example):
    """Line integrals (B, V, H, W) of Gaussians (B, N), box frame, in an example's views."""
    views, (height, width) = example.xrays.shape[1], example.xrays.shape[2:]
    return gaussians.project(gaussians.views(cloud, views), example.camera_from_box, example.intrinsics, height, width)


def reconstruction_loss(reconstruction, example, config, weights):
    """Eq. 2 with both branches where pixels are valid, plus the two 3D terms of `LossConfig`; scalar and a dict of its parts."""
    truth = gaussians.move(example.cloud, example.motion)
    effect, factual = reconstruction.effect, reconstruction.factual
    volume, true_volume = regm.volume(effect, config), regm.volume(truth, config)
    # A collimated pixel says nothing, so that there every image is 0.
    image, factual_image, target = (
        jnp.where(example.valid, i, 0.0) for i in (project(effect, example), project(factual, example), example.target)
    )
    eq2 = losses.cal_reconstruction(
        image, volume, factual_image, regm.volume(factual, config), target, weights.ssim, weights.tv
    )
    # Weighted by mass: Gaussians that only pad the cloud have no place to be.
    share = truth.density * jnp.prod(truth.scale, -1)
    share = share / jnp.sum(share, -1, keepdims=True)

    def points(cloud):
        miss = jnp.sqrt(jnp.sum((cloud.mean - truth.mean) ** 2, -1) + 1e-6)
        return jnp.mean(jnp.sum(share * miss, -1))

    effect_points, volume_l1 = points(effect), losses.l1(volume, true_volume)
    loss = eq2 + weights.points * (effect_points + points(factual)) + weights.volume * volume_l1
    parts = {"eq2": eq2, "image_l1": losses.l1(image, target), "points_mm": effect_points, "volume_l1": volume_l1}
    inside = attention_inside(reconstruction.attention, example)
    loss, parts["attention_inside"] = loss - weights.attention * jnp.mean(jnp.log(inside + 1e-3)), jnp.mean(inside)
    if reconstruction.matches is not None:
        likelihood, pose, parts["match_mm"] = _match_losses(reconstruction, example)
        loss = loss + weights.matches * likelihood + weights.pose * pose
    return loss, parts


def attention_inside(maps, example):
    """Share (B, V) of the attention (B, V, h, w, M) that lies on the vertebra where it truly is, by its projection."""
    level = jnp.mean(maps, -1)
    silhouette = jax.image.resize((example.valid & (example.target > 0.02)).astype(level.dtype), level.shape, "linear")
    return jnp.sum(level * silhouette, (-2, -1)) / (jnp.sum(level, (-2, -1)) + 1e-6)


def _match_losses(reconstruction, example):
    """Likelihood of the views' shifts, distance of the motion that follows from them, mean error of the shifts in mm."""
    source = reconstruction.matches.source
    moved = rigid.apply(example.motion, source) - source
    true_shift = rigid.apply_rotation(reconstruction.rotation[:, :, None], moved[:, None])[..., :2]
    miss = jnp.sqrt((reconstruction.shift - true_shift) ** 2 + 1e-3)
    scale = jnp.exp(-0.5 * reconstruction.log_precision)
    likelihood = jnp.mean(jnp.sum(miss / scale + jnp.log(scale), -1))
    motion, _ = matching.align(reconstruction.matches)
    return likelihood, losses.pose_from_start(motion, example.motion), jnp.mean(miss)


def registration_loss(motion, true_motion, cloud, reconstruction, config, weights):
    """Eq. 3 for estimated and true motions (B, 4, 4) of the CT's Gaussians `cloud` (B, N) to a `reconstruction` (B, N).

    Returns:
      scalar and a dict of its parts; all in the box frame.
    """
    moved_ct = regm.volume(gaussians.move(cloud, motion), config)
    loss = losses.registration(moved_ct, regm.volume(reconstruction, config), motion, true_motion, weights.geodesic)
    error = rigid.distance(motion, true_motion, jnp.zeros(3))
    start = rigid.distance(jnp.eye(4), true_motion, jnp.zeros(3))
    angle = rigid.rotation_angle(motion[:, :3, :3], true_motion[:, :3, :3])
    centre = jnp.sqrt(jnp.sum((motion - true_motion)[:, :3, 3] ** 2, -1))
    return loss, {
        "pose_mm": jnp.mean(error),
        "start_mm": jnp.mean(start),
        "rotation_deg": jnp.degrees(jnp.mean(angle)),
        "centre_mm": jnp.mean(centre),
    }


def loss(params, key, batch, module, config, weights, strength):
    """Loss of one module stage on a `PairBatch`, or on a `CtBatch` for 'reg': scalar and a dict of scalars."""
    key_example, key_draws = jax.random.split(key)
    if module == "reg":
        imperfect = augment.imperfect(key_draws, gaussians.move(batch.cloud, batch.motion))
        matches = regm.matches_of(imperfect, batch.cloud, config) if config.head == "anchored" else None
        estimate, _ = regm.estimate(params["regm"], config, imperfect, matches, batch.cloud)
        return registration_loss(estimate, batch.motion, batch.cloud, imperfect, config, weights)
    example = make_example(key_example, batch, config, strength)
    reconstruction = reconstruct(params["recm"], config, example, key_draws)
    value, parts = reconstruction_loss(reconstruction, example, config, weights)
    if module == "joint":
        seen = reconstruction.effect, reconstruction.matches
        estimate, _ = regm.estimate(params["regm"], config, *seen, example.cloud)
        registration, more = registration_loss(
            estimate, example.motion, example.cloud, reconstruction.effect, config, weights
        )
        value, parts = losses.total(registration, value), {**parts, **more}
    return value, parts


def optimizer(weight_decay=1e-4):
    """AdamW without its learning rate, which `update` takes as an argument so that schedules never recompile."""
    import optax  # a tenth of a second, for training alone

    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(weight_decay))


def cosine(step, steps, peak, warmup=50):
    """Learning rate: linear warm-up, then half a cosine to zero. Plain floats: a device would answer after all its steps."""
    progress = min(1.0, step / max(1, steps))
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))


def state_of(params, trained):
    """{'params', 'opt_state'} of a dict of parameter trees; only those named in `trained` get optimiser moments."""
    return {"params": params, "opt_state": optimizer().init({name: params[name] for name in trained})}


def init_state(params, module):
    """`state_of` one module stage."""
    return state_of(params, TRAINED[module])


def update_of(mesh, objective, trained):
    """The jitted update (state, key, learning_rate, batch) -> (state, metrics) on a mesh with an axis 'data'.

    The batch is split over 'data'; parameters are replicated; gradients are averaged across the mesh. Each shard draws its
    own random numbers from (key, shard). The state is donated. A batch whose gradient is not finite leaves it as it was;
    beside the loss, the norm of the gradient and the objective's scalars, the metrics say so: `skipped` is 1, else 0.

    Args:
      objective: (params, key, batch) -> scalar and a dict of scalars; trained: names in `params` that it is minimised over.
    """
    import optax

    tx = optimizer()

    def shard_step(state, key, learning_rate, batch):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        free = {name: state["params"][name] for name in trained}

        def of_free(free):
            return objective({**state["params"], **free}, key, batch)

        (value, parts), gradient = jax.value_and_grad(of_free, has_aux=True)(free)
        gradient, value, parts = jax.lax.pmean((gradient, value, parts), "data")
        norm = optax.global_norm(gradient)
        direction, opt_state = tx.update(gradient, state["opt_state"], free)
        # One such batch must not poison the parameters.
        good = jnp.isfinite(norm)
        stepped = jax.tree.map(lambda p, d: jnp.where(good, p - learning_rate * d, p), free, direction)
        opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), opt_state, state["opt_state"])
        new_state = {"params": {**state["params"], **stepped}, "opt_state": opt_state}
        return new_state, {"loss": value, "gradient_norm": norm, **parts, "skipped": (~good).astype(jnp.int32)}

    replicated, split = PartitionSpec(), PartitionSpec("data")
    step = jax.shard_map(
        shard_step,
        mesh=mesh,
        in_specs=(replicated, replicated, replicated, split),
        out_specs=(replicated, replicated),
        check_vma=False,
    )
    whole, parts = NamedSharding(mesh, replicated), NamedSharding(mesh, split)
    return jax.jit(step, in_shardings=(whole, whole, whole, parts), out_shardings=(whole, whole), donate_argnums=0)


@functools.cache
def make_update(mesh, module, config: ModelConfig, weights: LossConfig, strength):
    """`update_of` one module stage's `loss`."""
    objective = functools.partial(loss, module=module, config=config, weights=weights, strength=strength)
    return update_of(mesh, objective, TRAINED[module])
