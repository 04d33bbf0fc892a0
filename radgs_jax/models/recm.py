"""RecM: X-rays to radiative Gaussians of one vertebra, with counterfactual attention before the Gaussian head."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax import gaussians
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.models import activation
from radgs_jax.models import attention
from radgs_jax.models import backbones
from radgs_jax.models import heads
from radgs_jax.models import matching
from radgs_jax.models.config import ModelConfig

# Parameters are trained with the constants below; other values need new training.
HIGH_PASS_PX = 4
"""Radius in pixels of the box mean that the high pass subtracts, 6 mm. Chosen by hand: at half, only edges are left; at twice, soft
tissue stays in."""
MATCHING_CELL_MM = 6.0
"""Side, at the isocentre, of the cells in which a Gaussian is looked for, mm; features locate it within a cell. Chosen by hand: at
half, there are four times as many cells, and as much more work; at twice, a cell holds several anchors."""
EFFECT_SCALE = 0.5
"""Factor on matched shifts. Attention starts near 3 and the intervention near 1 (`attention.START_LEVEL`), so the effect of Eq. 1
starts near twice the answer; 0.5 restores the scale. At half and twice, matched shifts start at half and twice their size."""
PRIOR_UNIT = 0.5
"""Line integral of the prior's projection per unit of its channel. Chosen by hand to give inputs near 1; half and twice double and
halve the input, which the first layer can undo."""
MIN_POWER = 1e-6
"""Smallest mean square of an X-ray when it is standardised, no unit. It keeps flat windows finite; half or twice changes only
those."""
MIN_COVER = 1e-3
"""Smallest fraction of valid pixels in the high pass's box. It only avoids division by zero; half or twice makes no difference."""
MAX_LOG_PRECISION = 6.0
"""Largest magnitude of the network's log precision, no unit. With `LOG_PRECISION_OFFSET`, a view's standard deviations are from
0.14 to 55 mm. Chosen by hand: at half they are from 0.6 to 12 mm; at twice, a single view can drown all others."""
LOG_PRECISION_OFFSET = 2.0
"""Subtracted from the log precision: it starts at a standard deviation of e = 2.7 mm. Chosen by hand; at half 1.6, at twice 7.4
mm."""
START_SPACING_MM = 8.0
"""Spacing of the cloud that the paper's head starts from, mm; its single Gaussian has half of it as standard deviation. Chosen by
hand; at half, Gaussians start too small to overlap; at twice, as large as the body."""


@flax.struct.dataclass
class Reconstruction:
    """A reconstruction in the box frame, with the views' answers.

    The fields from `matches` on are about A of the prior's Gaussians, and are None for a head without a prior.

    Attributes:
      factual, effect: Gaussians (B, N), the two branches of Eq. 1.
      attention: (B, V, h, w, M) factual maps.
      activity: (B, V, h, w) mean magnitude of the features that the head reads, after the factual attention.
      matches: where the views together see the Gaussians.
      shift: (B, V, A, 2) shift that each view gives them along its own axes, mm.
      log_precision: (B, V, A, 2) of the shift, log 1/mm^2.
      rotation: (B, V, 3, 3) `heads.view_from_box`.
    """

    factual: Gaussians
    effect: Gaussians
    attention: Leaf
    activity: Leaf
    matches: matching.Matches | None = None
    shift: Leaf | None = None
    log_precision: Leaf | None = None
    rotation: Leaf | None = None


def image_channels(
    xrays: Float[Array, "batch views height width"],
    valid: Bool[Array, "batch views height width"],
    prior: Float[Array, "batch views height width"],
    intrinsics: Float[Array, "batch views 4"],
    camera_from_box: Float[Array, "batch views 4 4"],
) -> Float[jax.Array, "batch views height width 6"]:
    """The encoder's input: X-ray, its high pass, the prior's projection, two coordinates and the valid pixels.

    The X-ray channels are standardised per view over the valid pixels, because a real panel's gain and air value are unknown, and
    are 0 elsewhere. Coordinates are relative to the projection of the box's origin, in half widths and half heights.
    """
    height, width = xrays.shape[-2:]
    counts = valid.astype(xrays.dtype)
    share = 1.0 / jnp.maximum(jnp.sum(counts, (-2, -1), keepdims=True), 1.0)

    def centred(image):
        return counts * (image - share * jnp.sum(counts * image, (-2, -1), keepdims=True))

    def standardised(image):
        image = centred(image)
        return image * jax.lax.rsqrt(share * jnp.sum(image**2, (-2, -1), keepdims=True) + MIN_POWER)

    level = centred(xrays)
    smooth = camera.box_blur(level, HIGH_PASS_PX) / jnp.maximum(camera.box_blur(counts, HIGH_PASS_PX), MIN_COVER)
    origin = camera.project_camera(intrinsics, camera_from_box[..., None, :3, 3])[..., 0, :]
    u = (jnp.arange(width) - origin[..., None, None, 0]) / (0.5 * width)
    v = (jnp.arange(height)[:, None] - origin[..., None, None, 1]) / (0.5 * height)
    u, v = (jnp.broadcast_to(a, xrays.shape) for a in (u, v))
    return jnp.stack([standardised(level), standardised(level - smooth), (1.0 / PRIOR_UNIT) * prior, u, v, counts], -1)


class RecM(nn.Module):
    """The reconstruction module (Fig. 1e)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        xrays: Float[Array, "batch views height width"],
        valid: Bool[Array, "batch views height width"],
        intrinsics: Float[Array, "batch views 4"],
        camera_from_box: Float[Array, "batch views 4 4"],
        cloud: Gaussians,
        key: jax.Array | None = None,
    ) -> Reconstruction:
        """Reconstructs the vertebra in the box frame. The difference of Eq. 1 is taken on the head's logits.

        Args:
          xrays: line integrals.
          valid: pixels that may be used.
          camera_from_box: at the current pose.
          cloud: Gaussians (B, N), box frame: the CT's vertebra (the prior), or a uniform cloud if there is none.
          key: PRNG key of the counterfactual draws; None for the deterministic mean map.

        Raises:
          ValueError: an unknown head.
        """
        c = self.config
        b, v, height, width = xrays.shape
        prior = gaussians.project(gaussians.views(cloud, v), camera_from_box, intrinsics, height, width)
        prior = jax.lax.stop_gradient(prior)
        channels = image_channels(xrays, valid, prior, intrinsics, camera_from_box)
        name, options = c.backbone_2d
        features = backbones.make_backbone(name, **dict(options))(channels.reshape(b * v, height, width, -1))
        features = features.reshape(b, v, *features.shape[1:])
        if c.counterfactual_draws:
            factual_maps = attention.AttentionMaps(c.attention_maps)(features)
            intervened = attention.counterfactual_maps(key, factual_maps.shape, c.counterfactual_draws)
            maps = jnp.concatenate([factual_maps[None], intervened])
        else:
            factual_maps = jnp.ones((*features.shape[:-1], c.attention_maps))
            maps = factual_maps[None]
        gated, pooled = attention.attend(features[None], maps)
        activity = jnp.mean(jnp.abs(gated[0]), -1)
        if c.head == "paper":
            answers = heads.effect(heads.PaperHead(c.hidden, c.gaussians)(pooled))
            base = gaussians.uniform_cloud(1, START_SPACING_MM, activation.DENSITY_UNIT * math.log(2.0))
            base = jax.tree.map(lambda a: jnp.broadcast_to(a, (b, c.gaussians, *a.shape[1:])), base)
            factual, effect = (activation.activate(a, base, activation.PAPER_STEP_MM) for a in answers)
            return Reconstruction(factual, effect, factual_maps, activity)
        if c.head != "anchored":
            raise ValueError(f"head: found {c.head!r}, wanted 'anchored' or 'paper'")
        anchors = matching.subset(cloud, c.anchors)
        rotation = heads.view_from_box(camera_from_box)
        query = heads.query(anchors, rotation)
        means = rigid.apply(camera_from_box, gaussians.views(anchors, v).mean)
        uv = camera.project_camera(intrinsics, means)
        cell = max(1, round(MATCHING_CELL_MM / c.pixel_mm))
        unit = 1.0 / PRIOR_UNIT
        templates = jnp.stack([unit * prior, unit * (prior - camera.box_blur(prior, HIGH_PASS_PX))], -1)
        xray = jnp.concatenate([channels[..., :2], channels[..., 5:]], -1)
        found, code, shift = heads.Matching(c.matching_heads, c.matching_width, cell)(xray, templates, uv, query)
        share = self.param("share", nn.initializers.constant(0.5 / c.matching_heads), (c.matching_heads,))
        mm_per_px = (camera_from_box[..., 2, 3] / intrinsics[..., 0])[:, :, None, None]
        direct = mm_per_px * jnp.sum(share[:, None] * shift, -2)
        level = (EFFECT_SCALE if c.counterfactual_draws else 1.0) * jnp.mean(maps, (-3, -2, -1))[..., None, None]
        local = [self._read(gated, uv, (height, width)), self._read(found[None], uv, (height, width))]
        local = [jnp.broadcast_to(a, (len(maps), *a.shape[1:])) for a in local]
        answers = heads.AnchoredHead(c.hidden, c.context)(
            jnp.concatenate(local, -1), pooled, code, query, level * direct
        )
        # Precision is no property of the Gaussians, so it comes from the factual branch alone.
        log_precision = jnp.clip(answers[0, ..., 2:4], -MAX_LOG_PRECISION, MAX_LOG_PRECISION) - LOG_PRECISION_OFFSET
        answers = heads.effect(answers)
        shift, information = heads.fuse_views(answers[..., :2], log_precision, rotation)
        branches = [
            activation.activate(a, anchors, activation.ANCHORED_STEP_MM) for a in heads.logits(answers, shift, rotation)
        ]
        matches = matching.Matches(anchors.mean, branches[1].mean, information)
        factual, effect = (jax.vmap(activation.carry_detail)(branch, anchors, cloud) for branch in branches)
        return Reconstruction(
            factual, effect, factual_maps, activity, matches, answers[1, ..., :2], log_precision, rotation
        )

    @staticmethod
    def _read(features, uv, image_size):
        """Features (K, B, V, h, w, C) at pixels uv (B, V, A, 2): (K, B, V, A, C)."""
        weights = heads.sampling_weights(uv, image_size, features.shape[3:5])
        return jnp.einsum("bvap,kbvpc->kbvac", weights, features.reshape(*features.shape[:3], -1, features.shape[-1]))
