"""RecM: two X-rays to radiative Gaussians of one vertebra, with counterfactual attention before the Gaussian head."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from kernels import symmetric
from radgs_jax import camera
from radgs_jax import gaussians
from radgs_jax import rigid
from radgs_jax.models import attention
from radgs_jax.models import backbones
from radgs_jax.models import matching
from radgs_jax.models.config import ModelConfig

DENSITY_UNIT = 0.02
"""1/mm; raw density 0 means softplus(0) of it."""
SCALE_RANGE = (0.4, 20.0)
"""Smallest and largest standard deviation of a Gaussian, mm."""
HIGH_PASS_PX = 4
"""Radius of the box that a high pass takes off."""
MATCHING_CELL_MM = 6.0
"""Cells, at the isocentre, among which a Gaussian is looked for in the X-ray; features say where within one."""
LEVELS = 0.5
"""An attention level of 3 against the intervention's 1 makes an effect of twice an answer; this makes it one again."""
ANCHORED_STEP_MM = 10.0
PAPER_STEP_MM = 30.0
"""What a mean's logit of 1 moves a Gaussian by."""


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


def _query(anchors, rotation):
    """What identifies Gaussians (B, A) to a view: place in its axes, density and scale, (B, V, A, 7)."""
    place = rigid.apply_rotation(rotation[:, :, None], anchors.mean[:, None]) / 20.0
    own = jnp.concatenate([anchors.density[..., None] / DENSITY_UNIT, anchors.scale / 3.0], -1)
    return jnp.concatenate([place, jnp.broadcast_to(own[:, None], (*place.shape[:3], 4))], -1)


class Matching(nn.Module):
    """Where in the X-ray each of the prior's Gaussians is: its learned descriptor correlated with the features of every cell.

    A network that has to find a displacement by convolutions alone needs many more examples; correlation over all cells is
    equivariant to it by construction, and Gaussians that answer one by one show a turn as shifts that differ.

    heads: descriptors a Gaussian has; width: channels; cell: pixels along a cell.
    """

    heads: int
    width: int
    cell: int

    @nn.compact
    def __call__(self, xray, prior, uv, query):
        """Features of the fit.

        Args:
          xray: (B, V, H, W, C) channels of the X-ray; prior: (B, V, H, W, D) of the prior's projection.
          uv: (B, V, A, 2) pixels where the Gaussians project; query: (B, V, A, Q) what identifies each.
        Returns:
          maps (B, V, h, w, 2 * width), features of both images; code (B, V, A, F); shift (B, V, A, heads, 2) in pixels,
          columns first: where each Gaussian has to go, the mean of a softmax over cells.
        """
        b, v, height, width = xray.shape[:4]

        def features(image):
            x = backbones.space_to_depth(image.reshape(b * v, height, width, -1), self.cell)
            x = nn.relu(nn.Conv(self.width, (3, 3))(x))
            x = nn.relu(x + nn.Conv(self.width, (3, 3))(x))
            return nn.relu(nn.Conv(self.width, (3, 3))(x))

        found, template = features(xray), features(prior)
        h, w = found.shape[1:3]
        maps = jnp.concatenate([found, template], -1).reshape(b, v, h, w, -1)
        weights = sampling_weights(uv, (height, width), (h, w))
        template = jnp.einsum("bvap,bvpc->bvac", weights, template.reshape(b, v, h * w, -1))
        own = nn.relu(nn.Dense(64)(jnp.concatenate([template, query], -1)))
        size = self.width // 2
        own = nn.Dense(self.heads * size)(own).reshape(*own.shape[:3], self.heads, size)
        cells = nn.Dense(self.heads * size)(found.reshape(b, v, h * w, -1)).reshape(b, v, h * w, self.heads, size)
        rows, columns = jnp.mgrid[0:h, 0:w]
        place = jnp.stack([columns.reshape(-1), rows.reshape(-1)], -1).astype(uv.dtype)
        here = (uv + 0.5) / self.cell - 0.5
        near = self.param("near", nn.initializers.constant(0.03), (self.heads,))
        apart = jnp.sum((place - here[..., None, :]) ** 2, -1)
        score = jnp.einsum("bvahc,bvphc->bvhap", own, cells) / math.sqrt(size)
        score = score - jax.nn.softplus(near)[:, None, None] * 0.1 * apart[:, :, None]
        evidence = jax.nn.logsumexp(score, -1)
        chance = jnp.exp(score - evidence[..., None])
        powers = jnp.concatenate([place, jnp.sum(place**2, -1, keepdims=True)], -1)
        moments = jnp.einsum("bvhap,pk->bvhak", chance, powers)
        spread = jnp.log(jnp.maximum(moments[..., 2] - jnp.sum(moments[..., :2] ** 2, -1), 0.0) + 0.1)
        shift = moments[..., :2] - here[:, :, None]
        # What all Gaussians together say, the certain ones most.
        common = jnp.sum(jax.nn.softmax(-2.0 * spread, -1)[..., None] * shift, 3, keepdims=True)
        seen = jnp.concatenate(
            [shift / 4.0, jnp.broadcast_to(common / 4.0, shift.shape), spread[..., None], evidence[..., None] / 4.0], -1
        )
        seen = jnp.moveaxis(seen, 2, 3).reshape(*uv.shape[:3], -1)
        return maps, jnp.concatenate([seen, template], -1), self.cell * jnp.moveaxis(shift, 2, 3)


class AnchoredHead(nn.Module):
    """Linear, ReLU, Linear (twice) at every anchor and view: local features, what `Matching` found, and the views' context.

    Each view answers in its own axes, so no camera angle is learned. Beside its own answer an anchor follows a field that is
    affine in its place, which the context gives: most of what is to be found is a rigid motion.
    """

    hidden: int
    context: int

    @nn.compact
    def __call__(self, local, pooled, code, query, direct):
        """One answer per leading branch.

        Args:
          local: (K, B, V, A, C) attended features of K branches where the anchors project; pooled: (K, B, V, P).
          code, query: (B, V, A, ...) of `Matching` and of the anchors; direct: (K, B, V, A, 2) the matched shift, mm.
        Returns:
          answers (K, B, V, A, 11): shift in the view's image axes 2, log precision 2, scale 3, rotation 3, density 1.
        """
        pooled = nn.relu(nn.Dense(self.context)(pooled))
        everyone = jnp.broadcast_to(jnp.mean(pooled, 2, keepdims=True), pooled.shape)
        pooled = nn.relu(nn.Dense(self.context)(jnp.concatenate([pooled, everyone], -1)))
        x = nn.Dense(self.hidden)(local) + nn.Dense(self.hidden)(jnp.concatenate([code, query], -1))
        x = nn.relu(x + nn.Dense(self.hidden)(pooled)[:, :, :, None])
        level = jnp.mean(x, 3)
        both = jnp.broadcast_to(jnp.mean(level, 2, keepdims=True), level.shape)
        context = jnp.concatenate([level, both, pooled], -1)
        x = nn.relu(nn.Dense(self.hidden)(x) + nn.Dense(self.hidden)(context)[:, :, :, None])
        small = nn.initializers.variance_scaling(0.05, "fan_in", "truncated_normal")
        answers = nn.Dense(11, kernel_init=small)(x)
        field = nn.Dense(8, kernel_init=small)(context).reshape(*context.shape[:3], 2, 4)
        place = jnp.concatenate([query[..., :3], jnp.ones_like(query[..., :1])], -1)
        field = jnp.sum(field[:, :, :, None] * place[..., None, :], -1)
        shift = direct + ANCHORED_STEP_MM * (answers[..., :2] + field)
        return jnp.concatenate([shift, answers[..., 2:]], -1)


def fuse_views(shift, log_precision, rotation):
    """Places of anchors by least squares of what the views say of them.

    Args:
      shift, log_precision: (..., B, V, A, 2) mm in a view's image axes, log 1/mm^2; rotation: (B, V, 3, 3) view_from_box.
    Returns:
      shift (..., B, A, 3) in the box frame and its information (..., B, A, 3, 3), 1/mm^2, in which a view's depth has next to
      none.
    """
    precision = jnp.exp(log_precision)
    R = rotation[:, :, None, :2]
    information = jnp.sum(jnp.sum(R[..., :, None] * R[..., None, :] * precision[..., None, None], -3), -4)
    right = jnp.sum(jnp.sum(R * (precision * shift)[..., None], -2), -3)
    known = information + 1e-3 * jnp.eye(3)
    inverse = symmetric.to_matrix(symmetric.inverse(symmetric.from_matrix(known)))
    return rigid.apply_rotation(inverse, right), information


def logits(answers, fused, rotation):
    """Logits (..., B, A, 11) of `activate` from answers (..., B, V, A, 11) and the fused shift (..., B, A, 3), box frame.

    Rotation vectors are turned to the box and averaged over views; scale and density are averaged.
    """
    scale, turn, density = jnp.split(answers[..., 4:], (3, 6), -1)
    turn = jnp.mean(jnp.sum(rotation[:, :, None] * turn[..., None], -2), -3)
    quaternion = jnp.concatenate([jnp.zeros_like(turn[..., :1]), turn], -1)
    parts = (fused / ANCHORED_STEP_MM, jnp.mean(scale, -3), quaternion, jnp.mean(density, -3))
    return jnp.concatenate(parts, -1)


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
    """Eq. 1 on the head's logits (K, ...), factual first, then the draws: factual and effect Y(A) - E[Y(do(A))], (2, ...).

    Without draws the effect is the factual itself.
    """
    if len(answers) == 1:
        return jnp.stack([answers[0], answers[0]])
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
            answers = effect(PaperHead(c.hidden, c.gaussians)(pooled))
            base = gaussians.uniform_cloud(1, 8.0, DENSITY_UNIT * math.log(2.0))
            base = jax.tree.map(lambda a: jnp.broadcast_to(a, (b, c.gaussians, *a.shape[1:])), base)
            return Reconstruction(*(activate(a, base, PAPER_STEP_MM) for a in answers), factual_maps)
        if c.head != "anchored":
            raise ValueError(f"head: found {c.head!r}, wanted 'anchored' or 'paper'")
        anchors = matching.subset(cloud, c.anchors)
        rotation = view_from_box(camera_from_box)
        query = _query(anchors, rotation)
        means = rigid.apply(camera_from_box, gaussians.views(anchors, v).mean)
        uv = camera.project_camera(intrinsics, means)
        cell = max(1, round(MATCHING_CELL_MM / c.pixel_mm))
        templates = jnp.stack([2.0 * prior, 2.0 * (prior - camera.box_blur(prior, HIGH_PASS_PX))], -1)
        xray = jnp.concatenate([channels[..., :2], channels[..., 5:]], -1)
        found, code, shift = Matching(c.matching_heads, c.matching_width, cell)(xray, templates, uv, query)
        share = self.param("share", nn.initializers.constant(0.5 / c.matching_heads), (c.matching_heads,))
        mm_per_px = (camera_from_box[..., 2, 3] / intrinsics[..., 0])[:, :, None, None]
        direct = mm_per_px * jnp.sum(share[:, None] * shift, -2)
        level = (LEVELS if c.counterfactual_draws else 1.0) * jnp.mean(maps, (-3, -2, -1))[..., None, None]
        local = [self._read(gated, uv, (height, width)), self._read(found[None], uv, (height, width))]
        local = [jnp.broadcast_to(a, (len(maps), *a.shape[1:])) for a in local]
        answers = AnchoredHead(c.hidden, c.context)(jnp.concatenate(local, -1), pooled, code, query, level * direct)
        # How far to trust a view is no part of the Gaussians: the factual branch alone says it.
        log_precision = jnp.clip(answers[0, ..., 2:4], -6.0, 6.0) - 2.0
        answers = effect(answers)
        shift, information = fuse_views(answers[..., :2], log_precision, rotation)
        branches = [activate(a, anchors, ANCHORED_STEP_MM) for a in logits(answers, shift, rotation)]
        matches = matching.Matches(anchors.mean, branches[1].mean, information)
        carried = [jax.vmap(carry_detail)(branch, anchors, cloud) for branch in branches]
        return Reconstruction(*carried, factual_maps, matches, answers[1, ..., :2], log_precision, rotation)

    @staticmethod
    def _read(features, uv, image_size):
        """Features (K, B, V, h, w, C) at pixels uv (B, V, A, 2): (K, B, V, A, C)."""
        weights = sampling_weights(uv, image_size, features.shape[3:5])
        return jnp.einsum("bvap,kbvpc->kbvac", weights, features.reshape(*features.shape[:3], -1, features.shape[-1]))
