"""Heads that turn image features into Gaussians: matching, anchored, and the paper's."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common import symmetric
from kernels.common.types import Array
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid
from radgs_jax.models import activation
from radgs_jax.models import backbones

# Parameters are trained with the constants below; other values need new training.
PLACE_UNIT_MM = 20.0
"""Input unit of an anchor's place, mm, about a vertebra's radius. Chosen by hand to give inputs near 1, as is the next one; half
and twice make the input twice and half as large, which the first layer can undo."""
SCALE_UNIT_MM = 3.0
"""Input unit of an anchor's scale, mm."""
DESCRIPTOR_WIDTH = 64
"""Channels of the layer that makes descriptors. Chosen by hand; half is less expressive, twice costs twice the time of that
layer."""
START_NEARNESS = 0.03
"""Softplus argument of the learned penalty on distance in matching, at the start. Chosen by hand; since softplus is flat around 0,
half and twice change the first penalty by 1 and 2 %."""
NEARNESS_UNIT = 0.1
"""Penalty on distance in matching per softplus, 1/cell^2. Chosen by hand: it starts at 0.07, a standard deviation of 2.7 cells (16
mm). At half and twice that is 3.8 and 1.9 cells."""
MIN_SPREAD = 0.1
"""Smallest variance of a match in its logarithm, cell^2: 2 mm. Chosen by hand; at half, sharp matches look surer; at twice, less
so."""
CERTAINTY_POWER = 2.0
"""Power of the inverse variance by which matches are weighted in the shift that all share. Chosen by hand: at half, uncertain
matches count more; at twice, the shift rests on few of them."""
FEATURE_UNIT = 4.0
"""Unit of a match's shift (cells) and evidence as features. Chosen by hand to give inputs near 1; the next layer can undo half or
twice."""
START_SCALE = 0.05
"""Variance scale of the last layers at the start, so that first answers are small. Chosen by hand: at half, the start is closer to
the anchors; at twice, further."""
MIN_INFORMATION = 1e-3
"""Information added to every direction when views are fused, 1/mm^2: a standard deviation of 30 mm around the anchor. It keeps the
depth of a single view at the anchor's. At half and twice the standard deviation is 45 and 22 mm."""


def view_from_box(camera_from_box: Float[Array, "*batch 4 4"]) -> Float[jax.Array, "*batch 3 3"]:
    """Rotation from the box to a view's own axes: those of the camera, turned so that +z passes through the box's origin."""
    R, origin = camera_from_box[..., :3, :3], camera_from_box[..., :3, 3]
    z = origin / jnp.linalg.norm(origin, axis=-1, keepdims=True)
    x = jnp.asarray([1.0, 0, 0]) - z[..., :1] * z
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return rigid.matmul(jnp.stack([x, jnp.cross(z, x), z], -2), R)


def sampling_weights(
    uv: Float[Array, "*batch n 2"], image_size: tuple[int, ...], feature_size: tuple[int, ...]
) -> Float[jax.Array, "*batch n cells"]:
    """Weights that read a feature map at image pixels by bilinear interpolation, clamped to the map's border.

    Feature cell i covers image pixels [i s, (i + 1) s), s = image_size / feature_size, so its centre is s (i + 1/2) - 1/2.

    Args:
      image_size, feature_size: height and width in pixels and in cells.
    """
    hats = []
    for axis in (1, 0):  # v picks the row, u the column
        stride = image_size[1 - axis] / feature_size[1 - axis]
        count = feature_size[1 - axis]
        position = jnp.clip((uv[..., axis] + 0.5) / stride - 0.5, 0.0, count - 1.0)
        hats.append(jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(count))))
    rows, columns = hats
    return (rows[..., :, None] * columns[..., None, :]).reshape(*uv.shape[:-1], -1)


def query(anchors: Gaussians, rotation: Float[Array, "batch views 3 3"]) -> Float[jax.Array, "batch views anchors 7"]:
    """Identifies Gaussians (B, A) to a view by their place in its axes, density and scale."""
    place = rigid.apply_rotation(rotation[:, :, None], anchors.mean[:, None]) / PLACE_UNIT_MM
    own = jnp.concatenate([anchors.density[..., None] / activation.DENSITY_UNIT, anchors.scale / SCALE_UNIT_MM], -1)
    return jnp.concatenate([place, jnp.broadcast_to(own[:, None], (*place.shape[:3], 4))], -1)


class Matching(nn.Module):
    """Finds each of the prior's Gaussians in the X-ray by correlating its learned descriptor with the features of every cell.

    Correlation over all cells is equivariant to displacements by construction, so it needs far fewer examples than convolutions
    that have to learn them. A rotation shows as shifts that differ between Gaussians.

    Attributes:
      heads: number of descriptors of a Gaussian.
      width: channels of the features.
      cell: pixels along a cell.
    """

    heads: int
    width: int
    cell: int

    @nn.compact
    def __call__(
        self,
        xray: Float[Array, "batch views height width c"],
        prior: Float[Array, "batch views height width d"],
        uv: Float[Array, "batch views anchors 2"],
        query: Float[Array, "batch views anchors q"],
    ) -> tuple[
        Float[jax.Array, "batch views h w maps"],
        Float[jax.Array, "batch views anchors code"],
        Float[jax.Array, "batch views anchors heads 2"],
    ]:
        """Matches the Gaussians.

        Args:
          xray: channels of the X-ray.
          prior: channels of the prior's projection.
          uv: pixels at which the Gaussians project.
          query: result of `query`.

        Returns:
          Feature maps of both images; a code of each match; and the shift of each Gaussian in pixels (u, v), the mean of a softmax
          over cells.
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
        own = nn.relu(nn.Dense(DESCRIPTOR_WIDTH)(jnp.concatenate([template, query], -1)))
        size = self.width // 2
        own = nn.Dense(self.heads * size)(own).reshape(*own.shape[:3], self.heads, size)
        cells = nn.Dense(self.heads * size)(found.reshape(b, v, h * w, -1)).reshape(b, v, h * w, self.heads, size)
        rows, columns = jnp.mgrid[0:h, 0:w]
        place = jnp.stack([columns.reshape(-1), rows.reshape(-1)], -1).astype(uv.dtype)
        here = (uv + 0.5) / self.cell - 0.5
        near = self.param("near", nn.initializers.constant(START_NEARNESS), (self.heads,))
        apart = jnp.sum((place - here[..., None, :]) ** 2, -1)
        score = jnp.einsum("bvahc,bvphc->bvhap", own, cells) / math.sqrt(size)
        score = score - jax.nn.softplus(near)[:, None, None] * NEARNESS_UNIT * apart[:, :, None]
        evidence = jax.nn.logsumexp(score, -1)
        chance = jnp.exp(score - evidence[..., None])
        powers = jnp.concatenate([place, jnp.sum(place**2, -1, keepdims=True)], -1)
        moments = jnp.einsum("bvhap,pk->bvhak", chance, powers)
        spread = jnp.log(jnp.maximum(moments[..., 2] - jnp.sum(moments[..., :2] ** 2, -1), 0.0) + MIN_SPREAD)
        shift = moments[..., :2] - here[:, :, None]
        # The shift that all Gaussians share, weighted by certainty.
        common = jnp.sum(jax.nn.softmax(-CERTAINTY_POWER * spread, -1)[..., None] * shift, 3, keepdims=True)
        seen = jnp.concatenate(
            [
                shift / FEATURE_UNIT,
                jnp.broadcast_to(common / FEATURE_UNIT, shift.shape),
                spread[..., None],
                evidence[..., None] / FEATURE_UNIT,
            ],
            -1,
        )
        seen = jnp.moveaxis(seen, 2, 3).reshape(*uv.shape[:3], -1)
        return maps, jnp.concatenate([seen, template], -1), self.cell * jnp.moveaxis(shift, 2, 3)


class AnchoredHead(nn.Module):
    """Linear, ReLU, Linear (twice) at every anchor and view, from local features, the result of `Matching` and the views' context.

    Each view answers in its own axes, so no camera angle has to be learned. In addition to its own answer, an anchor follows a
    field that is affine in its place and depends on the context, because most of the displacement is a rigid motion.
    """

    hidden: int
    context: int

    @nn.compact
    def __call__(
        self,
        local: Float[Array, "branches batch views anchors c"],
        pooled: Float[Array, "branches batch views p"],
        code: Float[Array, "batch views anchors code"],
        query: Float[Array, "batch views anchors q"],
        direct: Float[Array, "#branches batch views anchors 2"],
    ) -> Float[jax.Array, "branches batch views anchors 11"]:
        """Answers for each branch, the factual and the counterfactual ones.

        Args:
          local: attended features where the anchors project.
          pooled: attention-pooled features of the views.
          code: result of `Matching`.
          query: result of `query`.
          direct: matched shift, mm.

        Returns:
          Shift in the view's image axes 2 (mm), log precision 2, scale 3, rotation 3, density 1.
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
        small = nn.initializers.variance_scaling(START_SCALE, "fan_in", "truncated_normal")
        answers = nn.Dense(11, kernel_init=small)(x)
        field = nn.Dense(8, kernel_init=small)(context).reshape(*context.shape[:3], 2, 4)
        place = jnp.concatenate([query[..., :3], jnp.ones_like(query[..., :1])], -1)
        field = jnp.sum(field[:, :, :, None] * place[..., None, :], -1)
        shift = direct + activation.ANCHORED_STEP_MM * (answers[..., :2] + field)
        return jnp.concatenate([shift, answers[..., 2:]], -1)


def fuse_views(
    shift: Float[Array, "*#branches batch views anchors 2"],
    log_precision: Float[Array, "*#branches batch views anchors 2"],
    rotation: Float[Array, "batch views 3 3"],
) -> tuple[Float[jax.Array, "... anchors 3"], Float[jax.Array, "... anchors 3 3"]]:
    """Fuses the shifts that the views give an anchor, by least squares.

    Args:
      shift: along a view's image axes, mm.
      log_precision: of the shift, log 1/mm^2.
      rotation: view_from_box.

    Returns:
      The shift in the box frame, mm, and its information, 1/mm^2, which is near zero along the depth of a single view.
    """
    precision = jnp.exp(log_precision)
    R = rotation[:, :, None, :2]
    information = jnp.sum(jnp.sum(R[..., :, None] * R[..., None, :] * precision[..., None, None], -3), -4)
    right = jnp.sum(jnp.sum(R * (precision * shift)[..., None], -2), -3)
    known = information + MIN_INFORMATION * jnp.eye(3)
    inverse = symmetric.to_matrix(symmetric.inverse(symmetric.from_matrix(known)))
    return rigid.apply_rotation(inverse, right), information


def logits(
    answers: Float[Array, "*branches batch views anchors 11"],
    fused: Float[Array, "*branches batch anchors 3"],
    rotation: Float[Array, "batch views 3 3"],
) -> Float[jax.Array, "*branches batch anchors 11"]:
    """Logits of `activate` from the views' answers and the fused shift.

    Rotation vectors are turned into the box frame and averaged over views; scale and density are averaged.
    """
    scale, turn, density = jnp.split(answers[..., 4:], (3, 6), -1)
    turn = jnp.mean(jnp.sum(rotation[:, :, None] * turn[..., None], -2), -3)
    quaternion = jnp.concatenate([jnp.zeros_like(turn[..., :1]), turn], -1)
    parts = (fused / activation.ANCHORED_STEP_MM, jnp.mean(scale, -3), quaternion, jnp.mean(density, -3))
    return jnp.concatenate(parts, -1)


def effect(answers: Float[Array, " branches *rest"]) -> Float[jax.Array, " 2 *rest"]:
    """Eq. 1 on the head's logits: the factual answer Y(A) and the effect Y(A) - E[Y(do(A))].

    `answers` has the factual one first, then the draws. Without draws the effect is the factual answer itself.
    """
    if len(answers) == 1:
        return jnp.stack([answers[0], answers[0]])
    return jnp.stack([answers[0], answers[0] - jnp.mean(answers[1:], 0)])


class PaperHead(nn.Module):
    """The paper's GSHead: Linear, ReLU, Linear from the attention-pooled features of all views to `count` x 11 logits."""

    hidden: int
    count: int

    @nn.compact
    def __call__(self, pooled: Float[Array, "branches batch views p"]) -> Float[jax.Array, "branches batch n 11"]:
        """Logits of `activation.activate` for each branch."""
        x = pooled.reshape(*pooled.shape[:2], -1)
        x = nn.Dense(self.count * 11)(nn.relu(nn.Dense(self.hidden)(x)))
        return x.reshape(*x.shape[:2], self.count, 11)
