"""Heads that turn image features into Gaussians: matching, anchored, and the paper's."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.common import symmetric
from radgs_jax.geometry import rigid
from radgs_jax.models import activation
from radgs_jax.models import backbones


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


def query(anchors, rotation):
    """What identifies Gaussians (B, A) to a view: place in its axes, density and scale, (B, V, A, 7)."""
    place = rigid.apply_rotation(rotation[:, :, None], anchors.mean[:, None]) / 20.0
    own = jnp.concatenate([anchors.density[..., None] / activation.DENSITY_UNIT, anchors.scale / 3.0], -1)
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
        shift = direct + activation.ANCHORED_STEP_MM * (answers[..., :2] + field)
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
    parts = (fused / activation.ANCHORED_STEP_MM, jnp.mean(scale, -3), quaternion, jnp.mean(density, -3))
    return jnp.concatenate(parts, -1)


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
