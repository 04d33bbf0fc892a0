"""Vertebra detector for single X-rays: for each level, where its centre is, or that it is not in sight.

Payer et al. ("Coarse to fine vertebrae localization and segmentation", VISAPP 2020) regress one heatmap a level; here
each is a distribution, over the cells of the image and 'not in sight', whose sum is 1, so that levels can be chained
(`radgs_jax.detection`). Images are upright (the head up) and of one pixel size at the isocentre.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from radgs_jax.models import backbones

STRIDE = 4
"""Pixels along a cell."""
MULTIPLE = 16
"""Images are whole multiples of this many pixels high and wide."""
_CONTRAST_PX = 10
_OUTSIDE = -20.0


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """levels: VerSe numbers from head to feet, T1 to L5 (no T13 or L6: no scan here has one); pixel_mm: at the isocentre.

    widths, blocks, features: of the backbone.
    """

    levels: tuple = tuple(range(8, 25))
    pixel_mm: float = 1.5
    widths: tuple = (16, 32, 64, 96)
    blocks: tuple = (1, 1, 2, 2)
    features: int = 48


@flax.struct.dataclass
class Levels:
    """A distribution for each level, as a prediction its logarithm: cells (B, K, h, w), absent (B, K)."""

    cells: jax.Array
    absent: jax.Array


def standardise(images, valid):
    """What the network sees of line integrals (B, H, W): (B, H, W, 3), free of gain, air value and the beam's hardness.

    The image less its median over half the range of its middle 80 %, its local contrast (less the mean, over the standard
    deviation, of the 21 x 21 pixels around), both within +-4 and taken over valid pixels (B, H, W) only; and these.
    """
    low, middle, high = jnp.nanquantile(jnp.where(valid, images, jnp.nan), jnp.array([0.1, 0.5, 0.9]), axis=(1, 2))
    scale = jnp.maximum(0.5 * (high - low), 1e-3)[:, None, None]
    x = jnp.clip((images - middle[:, None, None]) / scale, -4.0, 4.0)
    mask = valid.astype(images.dtype)
    x = jnp.where(valid, x, 0.0)
    share = jnp.maximum(_box_sum(mask), 1.0)
    mean = _box_sum(x) / share
    spread = jnp.sqrt(jnp.maximum(_box_sum(x * x) / share - mean**2, 1e-4))
    contrast = jnp.where(valid, jnp.clip((x - mean) / spread, -4.0, 4.0), 0.0)
    return jnp.stack([x, contrast, mask], -1)


def _box_sum(x):
    size = 2 * _CONTRAST_PX + 1
    for window in ((1, size, 1), (1, 1, size)):
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1), "SAME")
    return x


class Detector(nn.Module):
    """Line integrals, valid pixels (B, H, W) and beam directions (B, 3) in the world to log `Levels` of H/4 x W/4 cells.

    Raises:
      ValueError: a height or width that is not a multiple of `MULTIPLE`.
    """

    config: DetectorConfig

    @nn.compact
    def __call__(self, images, valid, beam):
        batch, height, width = images.shape
        if height % MULTIPLE or width % MULTIPLE:
            raise ValueError(f"Detector: image of {height} x {width}, wanted multiples of {MULTIPLE}")
        config, count = self.config, len(self.config.levels)
        direction = jnp.broadcast_to(beam[:, None, None], (batch, height, width, 3))
        x = jnp.concatenate([standardise(images, valid), direction], -1)
        x = backbones.SmallCNN(config.widths, config.blocks, 2, config.features)(x)
        x = nn.relu(backbones.ResidualBlock()(nn.relu(x)))
        cells = nn.Dense(count, kernel_init=nn.initializers.zeros)(x)
        covered = valid.reshape(batch, height // STRIDE, STRIDE, width // STRIDE, STRIDE).mean((2, 4)) < 0.5
        cells = cells + jnp.where(covered[..., None], _OUTSIDE, 0.0)
        pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)
        # At the start a level is as likely out of sight as anywhere in the image.
        bias = nn.initializers.constant(7.0)
        absent = nn.Dense(count, kernel_init=nn.initializers.zeros, bias_init=bias)(pooled)
        flat = jnp.concatenate([cells.reshape(batch, -1, count), absent[:, None]], 1)
        flat = jax.nn.log_softmax(flat, 1).transpose(0, 2, 1)
        return Levels(flat[..., :-1].reshape(batch, count, height // STRIDE, width // STRIDE), flat[..., -1])


def init(config, key):
    """Fresh parameters of a `Detector` with a `DetectorConfig`, from a PRNG key."""
    image = jnp.zeros((1, 2 * MULTIPLE, 2 * MULTIPLE))
    return Detector(config).init(key, image, jnp.ones(image.shape, bool), jnp.zeros((1, 3)))


def target(centres, seen, shape):
    """The truth as `Levels`: each centre shared by the four cells around it, so that the cells' mean is the centre.

    Args:
      centres: (B, K, 2) pixels u, v; seen: (B, K) bool, in sight; shape: (height, width) in pixels.
    """
    weights = []
    for axis, size in ((1, shape[0]), (0, shape[1])):
        place = (centres[..., axis] - 0.5 * (STRIDE - 1)) / STRIDE
        place = jnp.clip(place, 0.0, size // STRIDE - 1.0)
        weights.append(jnp.maximum(0.0, 1.0 - jnp.abs(place[..., None] - jnp.arange(size // STRIDE))))
    cells = weights[0][..., :, None] * weights[1][..., None, :]
    return Levels(jnp.where(seen[..., None, None], cells, 0.0), jnp.where(seen, 0.0, 1.0))


def loss(prediction, target, known):
    """Cross-entropy of log `Levels` against the truth, averaged over the levels whose truth is `known` (B, K): a scalar."""
    entropy = -jnp.sum(prediction.cells * target.cells, (-1, -2)) - prediction.absent * target.absent
    return jnp.sum(entropy * known) / jnp.maximum(jnp.sum(known), 1.0)
