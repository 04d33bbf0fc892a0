"""The localizer's network, for single X-rays: the distribution of each level's centre over the image and 'not visible'.

Payer et al. ("Coarse to fine vertebrae localization and segmentation", VISAPP 2020) regress one heatmap per level. Here each is a
probability distribution over the cells of the image and 'not visible', so that `chain` can connect the levels. Images are upright
(the head up) and of one pixel size at the isocentre.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax.models import backbones
from radgs_jax.models.standardise import standardise

STRIDE = 4
"""Pixels along a cell, which follows from the backbone: 2 x 2. Half would need a finer level of it, twice a coarser one."""
MULTIPLE = 16
"""Heights and widths of images are multiples of this number of pixels: the coarsest stride of the default backbone."""
_MIN_VALID = 0.5
"""Fraction of a cell's pixels that must be valid for the cell to be an answer, no unit. Chosen by hand: at half, centres behind the
collimator's edge can be answered; at 1, only cells that are fully visible can."""
_OUTSIDE = -20.0
"""Added to the logit of a cell that is not valid: its probability falls by exp(-20) = 2e-9. Chosen by hand: at half by 5e-5, where
such cells may still be answered; twice is no different from it in practice."""
_ABSENT_LOGIT = 7.0
"""First logit of 'not visible', chosen by hand: exp(7) is about 1100 cells, so at first a level is as likely absent as anywhere in
the image. Training starts from less balanced answers at half or twice."""


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Sizes of the localizer's network, chosen by hand for a CPU.

    Attributes:
      levels: VerSe numbers from head to feet, by default T1 to L5; the scans in use have no T13 or L6.
      pixel_mm: pixel size at the isocentre.
      widths, blocks, features: of the backbone, `backbones.SmallCNN`.
    """

    levels: tuple[int, ...] = tuple(range(8, 25))
    pixel_mm: float = 1.5
    widths: tuple[int, ...] = (16, 32, 64, 96)
    blocks: tuple[int, ...] = (1, 1, 2, 2)
    features: int = 48


@flax.struct.dataclass
class Levels:
    """A distribution for each level; in predictions, its logarithm.

    Attributes:
      cells: (B, K, h, w) that the level's centre is in a cell.
      absent: (B, K) that the level is not visible.
    """

    cells: Leaf
    absent: Leaf


class Detector(nn.Module):
    """The localizer's network."""

    config: DetectorConfig

    @nn.compact
    def __call__(
        self,
        images: Real[Array, "batch height width"],
        valid: Bool[Array, "batch height width"],
        beam: Real[Array, "batch 3"],
    ) -> Levels:
        """Log-probabilities on height / 4 x width / 4 cells.

        Args:
          images: line integrals.
          beam: direction of the camera's axis in the world.

        Raises:
          ValueError: a height or width that is not a multiple of `MULTIPLE`.
        """
        batch, height, width = images.shape
        if height % MULTIPLE or width % MULTIPLE:
            raise ValueError(f"Detector: image of {height} x {width}, wanted multiples of {MULTIPLE}")
        config, count = self.config, len(self.config.levels)
        direction = jnp.broadcast_to(beam[:, None, None], (batch, height, width, 3))
        x = jnp.concatenate([standardise(images, valid), direction], -1)
        x = backbones.SmallCNN(config.widths, config.blocks, 2, config.features)(x)
        x = nn.relu(backbones.ResidualBlock()(nn.relu(x)))
        cells = nn.Dense(count, kernel_init=nn.initializers.zeros)(x)
        covered = valid.reshape(batch, height // STRIDE, STRIDE, width // STRIDE, STRIDE).mean((2, 4)) < _MIN_VALID
        cells = cells + jnp.where(covered[..., None], _OUTSIDE, 0.0)
        pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)
        bias = nn.initializers.constant(_ABSENT_LOGIT)
        absent = nn.Dense(count, kernel_init=nn.initializers.zeros, bias_init=bias)(pooled)
        flat = jnp.concatenate([cells.reshape(batch, -1, count), absent[:, None]], 1)
        flat = jax.nn.log_softmax(flat, 1).transpose(0, 2, 1)
        return Levels(flat[..., :-1].reshape(batch, count, height // STRIDE, width // STRIDE), flat[..., -1])


def init(config: DetectorConfig, key: jax.Array) -> Any:
    """Initial parameters of a `Detector`, from a PRNG key."""
    image = jnp.zeros((1, 2 * MULTIPLE, 2 * MULTIPLE))
    return Detector(config).init(key, image, jnp.ones(image.shape, bool), jnp.zeros((1, 3)))


def target(centres: Real[Array, "batch levels 2"], seen: Bool[Array, "batch levels"], shape: tuple[int, ...]) -> Levels:
    """The true distribution: each centre is distributed over the four cells around it, so that their mean is the centre.

    Args:
      centres: pixels u, v.
      seen: whether a level is visible.
      shape: height and width of the image in pixels.
    """
    weights = []
    for axis, size in ((1, shape[0]), (0, shape[1])):
        place = (centres[..., axis] - 0.5 * (STRIDE - 1)) / STRIDE
        place = jnp.clip(place, 0.0, size // STRIDE - 1.0)
        weights.append(jnp.maximum(0.0, 1.0 - jnp.abs(place[..., None] - jnp.arange(size // STRIDE))))
    cells = weights[0][..., :, None] * weights[1][..., None, :]
    return Levels(jnp.where(seen[..., None, None], cells, 0.0), jnp.where(seen, 0.0, 1.0))


def loss(prediction: Levels, target: Levels, known: Bool[Array, "batch levels"]) -> Float[jax.Array, ""]:
    """Cross-entropy of a prediction (logarithms) against the truth, averaged over the levels whose truth is `known`."""
    entropy = -jnp.sum(prediction.cells * target.cells, (-1, -2)) - prediction.absent * target.absent
    return jnp.sum(entropy * known) / jnp.maximum(jnp.sum(known), 1.0)
