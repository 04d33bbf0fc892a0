"""RecM: two X-rays to radiative Gaussians of one vertebra, with counterfactual attention before the Gaussian head."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from radgs_jax import gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.models import activation
from radgs_jax.models import attention
from radgs_jax.models import backbones
from radgs_jax.models import heads
from radgs_jax.models import matching
from radgs_jax.models.config import ModelConfig

HIGH_PASS_PX = 4
"""Radius of the box that a high pass takes off."""
MATCHING_CELL_MM = 6.0
"""Cells, at the isocentre, among which a Gaussian is looked for in the X-ray; features say where within one."""
LEVELS = 0.5
"""An attention level of 3 against the intervention's 1 makes an effect of twice an answer; this makes it one again."""


@flax.struct.dataclass
class Reconstruction:
    """factual, effect: Gaussians (B, N) in the box frame (Eq. 1); attention: (B, V, h, w, M).

    matches: where the views see A of the prior's Gaussians; None for a head without a prior. shift: (B, V, A, 2) what each
    view says of them, mm along its own axes; log_precision: (B, V, A, 2) of that, log 1/mm^2; rotation: (B, V, 3, 3)
    `view_from_box`.
    """

    factual: gaussians.Gaussians
    effect: gaussians.Gaussians
    attention: jax.Array
    matches: matching.Matches | None = None
    shift: jax.Array | None = None
    log_precision: jax.Array | None = None
    rotation: jax.Array | None = None


def image_channels(xrays, valid, prior, intrinsics, camera_from_box):
    """What the encoder sees of each view, (B, V, H, W, 6): X-ray, its high pass, the prior's projection, coordinates, validity.

    The X-ray channels are standardised per view over the valid pixels, since a real detector's gain and air value are unknown,
    and 0 elsewhere; coordinates are pixels from the projection of the box's origin, over half a width and half a height.

    Args:
      xrays, valid, prior: (B, V, H, W); intrinsics: (B, V, 4); camera_from_box: (B, V, 4, 4).
    """
    height, width = xrays.shape[-2:]
    counts = valid.astype(xrays.dtype)
    share = 1.0 / jnp.maximum(jnp.sum(counts, (-2, -1), keepdims=True), 1.0)

    def centred(image):
        return counts * (image - share * jnp.sum(counts * image, (-2, -1), keepdims=True))

    def standardised(image):
        image = centred(image)
        return image * jax.lax.rsqrt(share * jnp.sum(image**2, (-2, -1), keepdims=True) + 1e-6)

    level = centred(xrays)
    smooth = camera.box_blur(level, HIGH_PASS_PX) / jnp.maximum(camera.box_blur(counts, HIGH_PASS_PX), 1e-3)
    origin = camera.project_camera(intrinsics, camera_from_box[..., None, :3, 3])[..., 0, :]
    u = (jnp.arange(width) - origin[..., None, None, 0]) / (0.5 * width)
    v = (jnp.arange(height)[:, None] - origin[..., None, None, 1]) / (0.5 * height)
    u, v = (jnp.broadcast_to(a, xrays.shape) for a in (u, v))
    return jnp.stack([standardised(level), standardised(level - smooth), 2.0 * prior, u, v, counts], -1)


class RecM(nn.Module):
    """The reconstruction module (Fig. 1e)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, xrays, valid, intrinsics, camera_from_box, cloud, key=None):
        """Reconstructs the vertebra in the box frame.

        Args:
          xrays: (B, V, H, W) line integrals; valid: (B, V, H, W) bool, the pixels that count; intrinsics: (B, V, 4);
            camera_from_box: (B, V, 4, 4) at the current pose.
          cloud: Gaussians (B, N), box frame: the CT's vertebra (the prior), or a uniform cloud where there is none.
          key: PRNG key of the counterfactual draws; None for the deterministic mean map.
        Returns:
          `Reconstruction`; effect = activate(Y(A) - E[Y(do(A))]), the difference taken on the head's logits.
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
        if c.head == "paper":
            answers = heads.effect(heads.PaperHead(c.hidden, c.gaussians)(pooled))
            base = gaussians.uniform_cloud(1, 8.0, activation.DENSITY_UNIT * math.log(2.0))
            base = jax.tree.map(lambda a: jnp.broadcast_to(a, (b, c.gaussians, *a.shape[1:])), base)
            return Reconstruction(
                *(activation.activate(a, base, activation.PAPER_STEP_MM) for a in answers), factual_maps
            )
        if c.head != "anchored":
            raise ValueError(f"head: found {c.head!r}, wanted 'anchored' or 'paper'")
        anchors = matching.subset(cloud, c.anchors)
        rotation = heads.view_from_box(camera_from_box)
        query = heads.query(anchors, rotation)
        means = rigid.apply(camera_from_box, gaussians.views(anchors, v).mean)
        uv = camera.project_camera(intrinsics, means)
        cell = max(1, round(MATCHING_CELL_MM / c.pixel_mm))
        templates = jnp.stack([2.0 * prior, 2.0 * (prior - camera.box_blur(prior, HIGH_PASS_PX))], -1)
        xray = jnp.concatenate([channels[..., :2], channels[..., 5:]], -1)
        found, code, shift = heads.Matching(c.matching_heads, c.matching_width, cell)(xray, templates, uv, query)
        share = self.param("share", nn.initializers.constant(0.5 / c.matching_heads), (c.matching_heads,))
        mm_per_px = (camera_from_box[..., 2, 3] / intrinsics[..., 0])[:, :, None, None]
        direct = mm_per_px * jnp.sum(share[:, None] * shift, -2)
        level = (LEVELS if c.counterfactual_draws else 1.0) * jnp.mean(maps, (-3, -2, -1))[..., None, None]
        local = [self._read(gated, uv, (height, width)), self._read(found[None], uv, (height, width))]
        local = [jnp.broadcast_to(a, (len(maps), *a.shape[1:])) for a in local]
        answers = heads.AnchoredHead(c.hidden, c.context)(
            jnp.concatenate(local, -1), pooled, code, query, level * direct
        )
        # How far to trust a view is no part of the Gaussians: the factual branch alone says it.
        log_precision = jnp.clip(answers[0, ..., 2:4], -6.0, 6.0) - 2.0
        answers = heads.effect(answers)
        shift, information = heads.fuse_views(answers[..., :2], log_precision, rotation)
        branches = [
            activation.activate(a, anchors, activation.ANCHORED_STEP_MM) for a in heads.logits(answers, shift, rotation)
        ]
        matches = matching.Matches(anchors.mean, branches[1].mean, information)
        carried = [jax.vmap(activation.carry_detail)(branch, anchors, cloud) for branch in branches]
        return Reconstruction(*carried, factual_maps, matches, answers[1, ..., :2], log_precision, rotation)

    @staticmethod
    def _read(features, uv, image_size):
        """Features (K, B, V, h, w, C) at pixels uv (B, V, A, 2): (K, B, V, A, C)."""
        weights = heads.sampling_weights(uv, image_size, features.shape[3:5])
        return jnp.einsum("bvap,kbvpc->kbvac", weights, features.reshape(*features.shape[:3], -1, features.shape[-1]))
