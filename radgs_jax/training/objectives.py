"""The loss of each phase of training.

Phases: 'rec' trains RecM with Eq. 2, 'reg' trains RegM with Eq. 3, and 'joint' trains both with Eq. 4, with gradients from the
registration through the voxeliser into RecM.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax import losses
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid
from radgs_jax.models import matching
from radgs_jax.models import recm
from radgs_jax.models import regm
from radgs_jax.models.config import ModelConfig
from radgs_jax.models.recm import Reconstruction
from radgs_jax.training import augment
from radgs_jax.training import examples
from radgs_jax.training.batches import CtBatch
from radgs_jax.training.batches import Example
from radgs_jax.training.batches import PairBatch

PHASES = ("rec", "reg", "joint")
"""The phases, in the order in which they run."""
SILHOUETTE = 0.02
"""Line integral above which a pixel shows the vertebra, no unit: about that of a millimetre of soft bone. Chosen by hand; half adds
the faintest edges to the silhouette, twice removes them."""

_Scalar = Float[Array, ""]
_Terms = Mapping[str, _Scalar]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses' terms.

    The first three are the paper's (Eq. 2 and 3). The others were chosen by hand so that no term dominates; half or twice a weight
    shifts the balance to the other terms or to its own.

    Attributes:
      ssim: of 1 - SSIM of the images.
      tv: of the total variation of the volumes.
      geodesic: 1/mm, of the geodesic distance of the poses.
      points: 1/mm, of the mean distance of Gaussians from where the true pose puts them. The authors' code has a Chamfer distance
        to a fitted cloud instead; here the correspondence is known.
      volume: mm, of the L1 of the voxelised densities.
      matches: of the negative log-likelihood (Laplace) of where each view sees each anchor, which calibrates its precision.
      pose: 1/mm, of the geodesic distance of the matches' motion in closed form, less where the start is far.
      attention: of minus the log of the share of the attention that lies on the vertebra.
    """

    ssim: float = 0.2
    tv: float = 0.05
    geodesic: float = 0.02
    points: float = 0.05
    volume: float = 30.0
    matches: float = 0.3
    pose: float = 0.3
    attention: float = 0.05


def reconstruct(
    params: dict[str, Any], config: ModelConfig, example: Example, key: jax.Array | None = None
) -> Reconstruction:
    """RecM's reconstruction of an example; deterministic without a key."""
    reconstruction = recm.RecM(config).apply(
        params, example.xrays, example.valid, example.intrinsics, example.camera_from_box, example.cloud, key
    )
    return cast(Reconstruction, reconstruction)


def project(cloud: Gaussians, example: Example) -> Float[jax.Array, "batch views height width"]:
    """Line integrals of Gaussians (B, N), box frame, in an example's views."""
    views, (height, width) = example.xrays.shape[1], example.xrays.shape[2:]
    image = gaussians.project(gaussians.views(cloud, views), example.camera_from_box, example.intrinsics, height, width)
    return cast(jax.Array, image)


def reconstruction_loss(
    reconstruction: Reconstruction, example: Example, config: ModelConfig, weights: LossConfig
) -> tuple[_Scalar, _Terms]:
    """Eq. 2 with both branches where pixels are valid, plus the other terms of `LossConfig`; the loss and its terms by name."""
    truth = gaussians.move(example.cloud, example.motion)
    effect, factual = reconstruction.effect, reconstruction.factual
    volume, true_volume = regm.volume(effect, config), regm.volume(truth, config)
    # All images are 0 where the X-ray is invalid, so that such pixels add nothing to the loss.
    image, factual_image, target = (
        jnp.where(example.valid, i, 0.0) for i in (project(effect, example), project(factual, example), example.target)
    )
    eq2 = losses.cal_reconstruction(
        image, volume, factual_image, regm.volume(factual, config), target, weights.ssim, weights.tv
    )
    # Weighted by mass, since Gaussians that only pad the cloud have no true place.
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


def attention_inside(
    maps: Float[Array, "batch views cells_v cells_u maps"], example: Example
) -> Float[jax.Array, "batch views"]:
    """Share of the attention that lies on the projection of the vertebra at its true pose."""
    level = jnp.mean(maps, -1)
    silhouette = jax.image.resize(
        (example.valid & (example.target > SILHOUETTE)).astype(level.dtype), level.shape, "linear"
    )
    return jnp.sum(level * silhouette, (-2, -1)) / (jnp.sum(level, (-2, -1)) + 1e-6)


def _match_losses(reconstruction, example):
    """Negative log-likelihood of the views' shifts, the pose loss of the motion that follows from them, mean error in mm."""
    source = reconstruction.matches.source
    moved = rigid.apply(example.motion, source) - source
    true_shift = rigid.apply_rotation(reconstruction.rotation[:, :, None], moved[:, None])[..., :2]
    miss = jnp.sqrt((reconstruction.shift - true_shift) ** 2 + 1e-3)
    scale = jnp.exp(-0.5 * reconstruction.log_precision)
    likelihood = jnp.mean(jnp.sum(miss / scale + jnp.log(scale), -1))
    motion, _ = matching.align(reconstruction.matches)
    return likelihood, losses.pose_from_start(motion, example.motion), jnp.mean(miss)


def registration_loss(
    motion: Float[Array, "batch 4 4"],
    true_motion: Float[Array, "batch 4 4"],
    cloud: Gaussians,
    reconstruction: Gaussians,
    config: ModelConfig,
    weights: LossConfig,
) -> tuple[_Scalar, _Terms]:
    """Eq. 3, in the box frame; the loss and errors by name.

    Args:
      motion, true_motion: estimated and true motion of the CT's Gaussians `cloud` (B, N) to the `reconstruction` (B, N).
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


def loss(
    params: dict[str, Any],
    key: jax.Array,
    batch: PairBatch | CtBatch,
    phase: str,
    config: ModelConfig,
    weights: LossConfig,
    strength: float,
) -> tuple[_Scalar, _Terms]:
    """Loss of one phase, and its terms by name.

    Args:
      batch: a `CtBatch` for 'reg', else a `PairBatch`; phase: one of PHASES; strength: as in `examples.make_example`.
    """
    key_example, key_draws = jax.random.split(key)
    if phase == "reg":
        assert isinstance(batch, CtBatch)
        imperfect = augment.imperfect(key_draws, gaussians.move(batch.cloud, batch.motion))
        matches = regm.matches_of(imperfect, batch.cloud, config) if config.head == "anchored" else None
        estimate, _ = regm.estimate(params["regm"], config, imperfect, matches, batch.cloud)
        return registration_loss(estimate, batch.motion, batch.cloud, imperfect, config, weights)
    assert isinstance(batch, PairBatch)
    example = examples.make_example(key_example, batch, config, strength)
    reconstruction = reconstruct(params["recm"], config, example, key_draws)
    value, parts = reconstruction_loss(reconstruction, example, config, weights)
    if phase == "joint":
        seen = reconstruction.effect, reconstruction.matches
        estimate, _ = regm.estimate(params["regm"], config, *seen, example.cloud)
        registration, more = registration_loss(
            estimate, example.motion, example.cloud, reconstruction.effect, config, weights
        )
        value, parts = losses.total(registration, value), {**parts, **more}
    return value, parts
