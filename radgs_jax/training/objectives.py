"""Training as pure functions: examples from pairs, the loss of each module stage, and the sharded update.

Module stages: 'rec' trains RecM with Eq. 2, 'reg' trains RegM with Eq. 3, 'joint' trains both with Eq. 4, gradients
flowing from the registration through the voxeliser into RecM.
"""

import dataclasses

import jax
import jax.numpy as jnp

from radgs_jax import gaussians
from radgs_jax import losses
from radgs_jax.geometry import rigid
from radgs_jax.models import matching
from radgs_jax.models import recm
from radgs_jax.models import regm
from radgs_jax.training import augment
from radgs_jax.training import examples

MODULES = ("rec", "reg", "joint")


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
    example = examples.make_example(key_example, batch, config, strength)
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
