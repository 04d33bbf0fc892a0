"""RecM: two X-rays to radiative Gaussians of one vertebra, with counterfactual attention before the Gaussian head."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kernels import symmetric
from radgs_jax import camera
from radgs_jax import gaussians
from radgs_jax import rigid
from radgs_jax.models import attention
from radgs_jax.models import backbones
from radgs_jax.models.config import ModelConfig

DENSITY_UNIT = 0.02
"""1/mm; raw density 0 means softplus(0) of it."""
SCALE_RANGE = (0.4, 20.0)
"""Smallest and largest standard deviation of a Gaussian, mm."""
HIGH_PASS_PX = 4
"""Radius of the box that a high pass takes off."""
MATCHING_CELL_MM = 3.0
MATCHING_REACH_MM = 27.0
"""Resolution and reach, at the isocentre, of the correlation between X-ray and prior."""
TURN_RAD = 0.22
"""Angle by which the prior is turned to see which way it fits better."""
ANCHORED_STEP_MM = 10.0
PAPER_STEP_MM = 30.0
"""What a mean's logit of 1 moves a Gaussian by."""


@flax.struct.dataclass
class Reconstruction:
    """factual, effect: Gaussians (B, N) in the box frame (Eq. 1); attention: (B, V, h, w, M)."""

    factual: gaussians.Gaussians
    effect: gaussians.Gaussians
    attention: jax.Array


def _softplus_inverse(y):
    return y + jnp.log(-jnp.expm1(-y))


def _logit(p):
    return jnp.log(p) - jnp.log1p(-p)


def activate(logits, base, step_mm):
    """Gaussians (B, N) from logits (B, N, 11) = mean 3, scale 3, quaternion 4, density 1, added to those of `base`.

    Density by softplus, scale by a sigmoid between its bounds, quaternion normalised, mean linear (the forms of R2-Gaussian);
    zero logits give `base` back.
    """
    low, high = SCALE_RANGE
    fraction = jnp.clip((base.scale - low) / (high - low), 1e-3, 1.0 - 1e-3)
    raw_density = _softplus_inverse(jnp.clip(base.density / DENSITY_UNIT, 1e-4, 1e2))
    mean, scale, quaternion, density = jnp.split(logits, (3, 6, 10), -1)
    identity = jnp.asarray([1.0, 0, 0, 0], logits.dtype)
    turn = identity + 0.1 * quaternion
    turn = turn * jax.lax.rsqrt(jnp.sum(turn**2, -1, keepdims=True) + 1e-12)
    return gaussians.Gaussians(
        density=DENSITY_UNIT * jax.nn.softplus(raw_density + density[..., 0]),
        mean=base.mean + step_mm * mean,
        scale=low + (high - low) * jax.nn.sigmoid(_logit(fraction) + 0.5 * scale),
        quaternion=rigid.multiply_quaternions(turn, base.quaternion),
    )


def view_from_box(camera_from_box):
    """Rotation (..., 3, 3) from the box to a view's own axes: the camera's, turned so that +z passes through the box's origin.

    Args:
      camera_from_box: (..., 4, 4).
    """
    R, origin = camera_from_box[..., :3, :3], camera_from_box[..., :3, 3]
    z = origin / jnp.linalg.norm(origin, axis=-1, keepdims=True)
    x = jnp.asarray([1.0, 0, 0]) - z[..., :1] * z
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return rigid.matmul(jnp.stack([x, jnp.cross(z, x), z], -2), R)


def sampling_weights(uv, image_size, feature_size):
    """Bilinear weights (..., N, h * w) that read a feature map at image pixels uv (..., N, 2); clamped to its border.

    Feature cell i covers image pixels [i s, (i + 1) s), s = image_size / feature_size, so its centre is s (i + 1/2) - 1/2.

    Args:
      image_size, feature_size: (height, width); the latter (h, w).
    """
    hats = []
    for axis in (1, 0):  # v picks the row, u the column
        stride = image_size[1 - axis] / feature_size[1 - axis]
        count = feature_size[1 - axis]
        position = jnp.clip((uv[..., axis] + 0.5) / stride - 0.5, 0.0, count - 1.0)
        hats.append(jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(count))))
    rows, columns = hats
    return (rows[..., :, None] * columns[..., None, :]).reshape(*uv.shape[:-1], -1)


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


def turned_priors(anchors, intrinsics, camera_from_box, height, width):
    """Projections (B, V, 6, height, width) of the prior turned by +-`TURN_RAD` about the box's axes: +x, -x, +y, -y, +z, -z.

    Args:
      anchors: Gaussians (B, N), box frame; intrinsics (B, V, 4); camera_from_box (B, V, 4, 4).
    """
    axes = TURN_RAD * jnp.asarray([sign * np.eye(3)[axis] for axis in range(3) for sign in (1.0, -1.0)])
    turns = rigid.transform(rigid.exp_so3(axes), jnp.zeros_like(axes))
    camera_from_turned = rigid.matmul(camera_from_box[:, :, None], turns)
    views = camera_from_turned.shape[1:3]
    clouds = gaussians.views(gaussians.views(anchors, views[0]), views[1])
    intrinsics = jnp.broadcast_to(intrinsics[:, :, None], (*camera_from_turned.shape[:3], 4))
    return gaussians.project(clouds, camera_from_turned, intrinsics, height, width)


class Matching(nn.Module):
    """Where in the X-ray, and turned which way, the prior's projection fits: learned features correlated over all shifts.

    A network that has to find a displacement by convolutions alone needs many more examples; correlation is equivariant
    to it by construction. Turns out of the image plane have no such structure, so the prior is projected a little turned
    about each axis, and the views' evidence for each turn is added.

    heads: number of feature pairs; reach: largest shift on either axis, in cells of `cell` pixels.
    """

    heads: int
    reach: int
    cell: int

    @nn.compact
    def __call__(self, xray, templates):
        """Features of the fit.

        Args:
          xray: (B, V, H, W, C) channels of the X-ray; templates: (B, V, 7, H, W, D) channels of the prior's projection as
            it stands, then turned as in `turned_priors`.
        Returns:
          code (B, V, F); shift (B, V, heads, 2) in pixels, columns first: where the prior has to go, the mean of each head's
          softmax over shifts and turns; turn (B, heads, 3): rotation vector in the box frame, rad, each axis the mean over
          turning one way, the other, or not at all.
        """
        b, v, t = templates.shape[:3]

        def features(x):
            x = backbones.space_to_depth(x.reshape(-1, *x.shape[-3:]), self.cell)
            for _ in range(2):
                x = nn.relu(nn.Conv(2 * self.heads, (3, 3))(x))
            x = nn.Conv(self.heads, (3, 3))(x)
            x = x - jnp.mean(x, (1, 2), keepdims=True)
            return x * jax.lax.rsqrt(jnp.mean(x**2, (1, 2), keepdims=True) + 1e-4)

        found, template = features(xray), features(templates)
        height, width = found.shape[1:3]
        template = template.reshape(b * v, t, height, width, self.heads)
        # Padded so far that no shift in reach wraps round into the image, to a multiple of 8, which FFTs like.
        size = [8 * -(-(n + self.reach) // 8) for n in (height, width)]
        spectrum = jnp.fft.rfft2(found, size, (1, 2))[:, None] * jnp.conj(jnp.fft.rfft2(template, size, (2, 3)))
        scores = jnp.fft.irfft2(spectrum, size, (2, 3)) / (height * width)
        order = jnp.arange(-self.reach, self.reach + 1)
        scores = scores[:, :, order][:, :, :, order]  # negative shifts wrap round to the end
        sharpness = self.param("sharpness", nn.initializers.constant(3.0), (self.heads,))
        logits = (scores * jnp.exp(sharpness)).reshape(b, v, t, -1, self.heads)
        evidence = jax.nn.logsumexp(logits, 3)
        chance = jnp.exp(logits - jax.nn.logsumexp(evidence, 2)[:, :, None, None])
        chance = jnp.sum(chance, 2).reshape(b, v, len(order), len(order), self.heads)
        shift = jnp.stack([jnp.einsum("bvyxh,x->bvh", chance, order), jnp.einsum("bvyxh,y->bvh", chance, order)], -1)
        code = nn.relu(nn.Dense(64)(scores[:, 0].reshape(b, v, -1)))
        relative = (evidence[:, :, 1:] - evidence[:, :, :1]).reshape(b, v, -1)
        code = [code, shift.reshape(b, v, -1) / self.reach, jnp.max(chance, (2, 3)), relative]
        still, one_way, other = (jnp.sum(evidence[:, :, first::2], 1) for first in (0, 1, 2))
        still = jnp.broadcast_to(still[:, :1], one_way.shape)
        odds = jax.nn.softmax(jnp.stack([still, one_way, other]), 0)
        turn = TURN_RAD * jnp.swapaxes(odds[1] - odds[2], -1, -2)
        return jnp.concatenate(code, -1), self.cell * shift, turn


def turn_logits(turn, anchors):
    """Logits (..., B, N, 11) of `activate` that turn the anchors (B, N) by rotation vectors (..., B, 3) about the origin."""
    arm = rigid.apply_rotation(rigid.exp_so3(turn)[..., None, :, :], anchors.mean) - anchors.mean
    zeros = jnp.zeros_like(arm)
    # `activate` adds a tenth of these to a unit quaternion; its vector part is half the angle for turns this small.
    spin = jnp.broadcast_to(5.0 * turn[..., None, :], arm.shape)
    return jnp.concatenate([arm / ANCHORED_STEP_MM, zeros, zeros[..., :1], spin, zeros[..., :1]], -1)


class AnchoredHead(nn.Module):
    """Linear, ReLU, Linear at every anchor and view: queries see the features of both views where the anchor projects.

    Each view answers in its own axes, so no camera angle is learned; the answers are fused by their stated precision (a
    view knows the image plane better than its depth). The first Linear acts on the concatenation of local feature, context of
    this and of all views, and anchor; it is applied part by part, which is the same map at a fraction of the cost.
    """

    hidden: int
    context: int

    @nn.compact
    def __call__(self, gated, pooled, weights, rotation, anchors, shift):
        """One answer per leading branch.

        Args:
          gated: (K, B, V, h, w, C) attended features of K branches; pooled: (K, B, V, M * C).
          weights: (B, V, N, h * w) of `sampling_weights`; rotation: (B, V, 3, 3) of `view_from_box`.
          anchors: Gaussians (B, N), box frame; shift: (K, B, V, heads, 2) of `Matching`, mm, times the attention's level.
        Returns:
          logits per view (K, B, V, N, 12): shift in view axes 3, log precision 2, scale 3, rotation 3, density 1.
        """
        k, b, v, h, w, _ = gated.shape
        local = nn.Dense(self.hidden)(gated).reshape(k, b, v, h * w, self.hidden)
        local = jnp.einsum("bvnp,kbvpc->kbvnc", weights, local)
        code = nn.Dense(self.context)(pooled)
        everyone = jnp.broadcast_to(jnp.mean(code, 2, keepdims=True), code.shape)
        code = nn.Dense(self.hidden, use_bias=False)(nn.relu(jnp.concatenate([code, everyone], -1)))
        mean = rigid.apply_rotation(rotation[:, :, None], anchors.mean[:, None])
        depth_free = [anchors.density[:, None, :, None] / DENSITY_UNIT, anchors.scale[:, None] / 3.0]
        query = jnp.concatenate([mean / 20.0, *(jnp.broadcast_to(a, (b, v, *a.shape[2:])) for a in depth_free)], -1)
        query = nn.Dense(self.hidden, use_bias=False)(query)
        out = nn.Dense(12, kernel_init=nn.initializers.variance_scaling(0.05, "fan_in", "truncated_normal"))
        answers = out(nn.relu(local + code[:, :, :, None] + query))
        # The matched shift has a way of its own to the answer. With an attention level of 3 against the intervention's 1
        # this start makes the effect's shift the mean of the heads'.
        heads = shift.shape[-2]
        share = self.param("share", nn.initializers.constant(0.5 / heads), (heads, 1))
        direct = jnp.sum(share * shift, -2) / ANCHORED_STEP_MM
        return answers.at[..., :2].add(direct[:, :, :, None])


def fuse_views(answers, rotation):
    """Logits (..., B, N, 11) of `activate` from per-view answers (..., B, V, N, 12) and rotations view_from_box (B, V, 3, 3).

    Answers are those of `AnchoredHead`. The shift is the precision-weighted least squares of the views' shifts; rotation
    vectors are turned to the box and averaged; scale and density are averaged.
    """
    shift, log_precision, scale, turn, density = jnp.split(answers, (3, 5, 8, 11), -1)
    precision = jnp.exp(2.0 * jnp.tanh(log_precision) + jnp.asarray([0.0, -3.0]))
    diagonal = jnp.concatenate([precision[..., :1], precision], -1)  # image plane twice, depth once
    R = rotation[:, :, None]
    information = jnp.sum(jnp.sum(R[..., :, :, None] * R[..., :, None, :] * diagonal[..., :, None, None], -3), -4)
    right = jnp.sum(jnp.sum(R * (diagonal * shift)[..., None], -2), -3)
    inverse = symmetric.to_matrix(symmetric.inverse(symmetric.from_matrix(information)))
    turn = jnp.mean(jnp.sum(R * turn[..., None], -2), -3)
    quaternion = jnp.concatenate([jnp.zeros_like(turn[..., :1]), turn], -1)
    fused = rigid.apply_rotation(inverse, right)
    return jnp.concatenate([fused, jnp.mean(scale, -3), quaternion, jnp.mean(density, -3)], -1)


def carry_detail(reconstruction, anchors, fine, radius_mm=6.0):
    """The deformation that a network gave its anchors, applied to a finer cloud of the same object.

    A network answers for a few hundred anchors; the prior knows the object in finer Gaussians. Each of these follows the
    anchors near it: shift, turn, and the ratios of scale and density are averaged with Gaussian weights of `radius_mm`
    and the anchors' mass.

    Args:
      reconstruction, anchors: Gaussians (N,), one for one, as returned by RecM for these anchors; fine: Gaussians (M,);
        all in the box frame.
    Returns:
      Gaussians (M,).
    """
    offset2 = jnp.sum((fine.mean[:, None] - anchors.mean[None]) ** 2, -1)
    log_mass = jnp.log(anchors.density + 1e-12) + jnp.sum(jnp.log(anchors.scale), -1)
    weights = jax.nn.softmax(-0.5 * offset2 / radius_mm**2 + log_mass, -1)

    def average(values):
        return jnp.matmul(weights, values, precision=jax.lax.Precision.HIGHEST)

    back = anchors.quaternion * jnp.asarray([1.0, -1, -1, -1])
    turn = rigid.multiply_quaternions(reconstruction.quaternion, back)
    turn = average(jnp.where(turn[..., :1] < 0, -turn, turn))
    turn = turn / jnp.linalg.norm(turn, axis=-1, keepdims=True)
    log_density = jnp.log(reconstruction.density + 1e-9) - jnp.log(anchors.density + 1e-9)
    log_scale = jnp.log(reconstruction.scale) - jnp.log(anchors.scale)
    return gaussians.Gaussians(
        density=fine.density * jnp.exp(average(log_density[:, None])[:, 0]),
        mean=fine.mean + average(reconstruction.mean - anchors.mean),
        scale=fine.scale * jnp.exp(average(log_scale)),
        quaternion=rigid.multiply_quaternions(turn, fine.quaternion),
    )


def effect(answers):
    """Eq. 1 on the head's logits (K, ...), factual first, then the draws: factual and effect Y(A) - E[Y(do(A))], (2, ...)."""
    return jnp.stack([answers[0], answers[0] - jnp.mean(answers[1:], 0)])


class PaperHead(nn.Module):
    """The paper's GSHead: Linear, ReLU, Linear from the attention-pooled features of all views to N x 11 numbers."""

    hidden: int
    count: int

    @nn.compact
    def __call__(self, pooled):
        """(K, B, V, M * C) -> logits (K, B, N, 11)."""
        x = pooled.reshape(*pooled.shape[:2], -1)
        x = nn.Dense(self.count * 11)(nn.relu(nn.Dense(self.hidden)(x)))
        return x.reshape(*x.shape[:2], self.count, 11)


class RecM(nn.Module):
    """The reconstruction module (Fig. 1e)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, xrays, valid, intrinsics, camera_from_box, anchors, key=None):
        """Reconstructs the vertebra in the box frame.

        Args:
          xrays: (B, V, H, W) line integrals; valid: (B, V, H, W) bool, the pixels that count; intrinsics: (B, V, 4);
            camera_from_box: (B, V, 4, 4) at the current pose.
          anchors: Gaussians (B, N), box frame: the CT's vertebra (the prior), or a uniform cloud where there is none.
          key: PRNG key of the counterfactual draws; None for the deterministic mean map.
        Returns:
          `Reconstruction`; effect = activate(Y(A) - E[Y(do(A))]), the difference taken on the head's logits.
        Raises:
          ValueError: an unknown head.
        """
        c = self.config
        b, v, height, width = xrays.shape
        prior = gaussians.project(gaussians.views(anchors, v), camera_from_box, intrinsics, height, width)
        channels = image_channels(xrays, valid, jax.lax.stop_gradient(prior), intrinsics, camera_from_box)
        name, options = c.backbone_2d
        features = backbones.make_backbone(name, **dict(options))(channels.reshape(b * v, height, width, -1))
        features = features.reshape(b, v, *features.shape[1:])
        factual_maps = attention.AttentionMaps(c.attention_maps)(features)
        intervened = attention.counterfactual_maps(key, factual_maps.shape, c.counterfactual_draws)
        maps = jnp.concatenate([factual_maps[None], intervened])
        gated, pooled = attention.attend(features[None], maps)
        level = jnp.mean(maps, (-3, -2, -1))[..., None]
        turned = turned_priors(anchors, intrinsics, camera_from_box, height, width)
        templates = 2.0 * jax.lax.stop_gradient(jnp.concatenate([prior[:, :, None], turned], 2))
        templates = jnp.stack([templates, templates - camera.box_blur(templates, HIGH_PASS_PX)], -1)
        cell = max(1, round(MATCHING_CELL_MM / c.pixel_mm))
        matching = Matching(c.attention_maps, round(MATCHING_REACH_MM / (cell * c.pixel_mm)), cell)
        fit, shift, turn = matching(channels[..., :2], templates)
        pooled = jnp.concatenate([pooled, level * fit], -1)
        if c.head == "anchored":
            rotation = view_from_box(camera_from_box)
            means = rigid.apply(camera_from_box, gaussians.views(anchors, v).mean)
            uv = camera.project_camera(intrinsics, means)
            weights = sampling_weights(uv, (height, width), features.shape[2:4])
            mm_per_px = camera_from_box[..., 2, 3] / intrinsics[..., 0]
            shift = level[..., None] * shift * mm_per_px[..., None, None]
            answers = AnchoredHead(c.hidden, c.context)(gated, pooled, weights, rotation, anchors, shift)
            # As the shift: a way of its own to the answer, and from the start the mean of the heads' in the effect.
            share = self.param("turn_share", nn.initializers.constant(0.5 / c.attention_maps), (c.attention_maps, 1))
            turn = jnp.mean(level, 2)[..., None] * turn
            turn = jnp.sum(share * turn, -2)
            fused = fuse_views(effect(answers), rotation) + turn_logits(effect(turn), anchors)
            base, step_mm = anchors, ANCHORED_STEP_MM
        elif c.head == "paper":
            answers = PaperHead(c.hidden, c.gaussians)(pooled)
            fused = effect(answers)
            base = gaussians.uniform_cloud(1, 8.0, DENSITY_UNIT * math.log(2.0))
            base = jax.tree.map(lambda a: jnp.broadcast_to(a, (b, c.gaussians, *a.shape[1:])), base)
            step_mm = PAPER_STEP_MM
        else:
            raise ValueError(f"head: found {c.head!r}, wanted 'anchored' or 'paper'")
        return Reconstruction(activate(fused[0], base, step_mm), activate(fused[1], base, step_mm), factual_maps)
