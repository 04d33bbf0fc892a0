"""Finds what a CT does not have in an X-ray: screws, rods, wires, cages, retractors, clips, leads and burnt-in marks.

A small U-Net (Ronneberger et al., "U-Net", MICCAI 2015) says of each pixel whether it shows metal. It replaces thresholds because
scatter makes a screw behind a thick body fainter than a rib beside it; what remains is the sharpness and the shape of its edges.
Pixels with metal are not used, like those outside the collimator.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array
from radgs_jax.geometry import camera as cameras
from radgs_jax.geometry.xray import bin_xray
from radgs_jax.geometry.xray import XRay
from radgs_jax.models.standardise import standardise

THRESHOLD = 0.5
"""Probability from which a pixel shows metal. Chosen by hand: half of it takes sharp bone for metal, and at twice nothing is."""
WIDEN_PX = 2
"""Pixels by which metal is widened, for its blur in the image. Chosen by hand: half leaves rims, whose edges are still strong;
twice costs bone between screws."""
BUCKET_PX = 64
"""Images are padded to multiples of this, so that few programs serve all sizes. A multiple of the network's stride, 8."""
CLEAR_SHARE = 2e-4
"""Share of an image's pixels below which nothing is taken for metal. Chosen by hand: about ten pixels of an image of 240 x 240,
less than a clip; half or twice changes little."""


@dataclasses.dataclass(frozen=True)
class MetalConfig:
    """Sizes of the network, chosen by hand: at twice the widths a case takes a tenth longer.

    Attributes:
      pixel_mm: pixel at the isocentre. At half, the network sees half as far; at twice, wires vanish.
      widths: channels at each resolution, each half of the one before.
    """

    pixel_mm: float = 1.0
    widths: tuple[int, ...] = (8, 16, 24, 32)


@dataclasses.dataclass(frozen=True)
class MetalFinder:
    """A trained network: its parameters and its configuration."""

    params: Any
    config: MetalConfig


class MetalNet(nn.Module):
    """The U-Net: logits (B, H, W) that a pixel shows metal."""

    config: MetalConfig

    @nn.compact
    def __call__(
        self, images: Real[Array, "batch height width"], valid: Bool[Array, "batch height width"]
    ) -> Float[Array, "batch height width"]:
        """H and W are multiples of 2^(number of widths - 1)."""

        def block(x, features):
            for _ in range(2):
                x = nn.relu(nn.Conv(features, (3, 3))(x))
            return x

        x, skips = standardise(images, valid), []
        for features in self.config.widths[:-1]:
            x = block(x, features)
            skips.append(x)
            x = nn.relu(nn.Conv(features, (2, 2), (2, 2))(x))
        x = block(x, self.config.widths[-1])
        for features, skip in zip(self.config.widths[-2::-1], skips[::-1]):
            x = jnp.repeat(jnp.repeat(nn.Conv(features, (1, 1))(x), 2, 1), 2, 2)
            x = block(jnp.concatenate([x, skip], -1), features)
        return nn.Conv(1, (1, 1))(x)[..., 0]


def init(config: MetalConfig, key: jax.Array) -> Any:
    """Initial parameters, from a PRNG key."""
    image = jnp.zeros((1, 16, 16))
    return MetalNet(config).init(key, image, jnp.ones(image.shape, bool))


def probability(
    params: Any,
    images: Real[Array, "batch height width"],
    valid: Bool[Array, "batch height width"],
    config: MetalConfig,
) -> Float[Array, "batch height width"]:
    """Probability of metal in each pixel, of images whose pixels measure about `config.pixel_mm` at the isocentre."""
    return jax.nn.sigmoid(jnp.asarray(MetalNet(config).apply(params, images, valid)))


def loss(
    logits: Float[Array, "batch height width"],
    metal: Bool[Array, "batch height width"],
    valid: Bool[Array, "batch height width"],
) -> Float[Array, ""]:
    """Cross-entropy over valid pixels, plus 1 minus the overlap of both (Dice 1945), which rare pixels count in as much."""
    counts = valid.astype(jnp.float32)
    entropy = jnp.maximum(logits, 0) - logits * metal + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    p = jax.nn.sigmoid(logits) * counts
    overlap = 2.0 * jnp.sum(p * metal) / (jnp.sum(p) + jnp.sum(counts * metal) + 1.0)
    return jnp.sum(entropy * counts) / jnp.maximum(jnp.sum(counts), 1.0) + 1.0 - overlap


def find(
    finder: MetalFinder, xrays: Sequence[XRay], compile: Callable[..., Callable] = jax.jit
) -> list[Bool[np.ndarray, "_ _"]]:
    """Where each X-ray shows metal: masks (H, W) in the X-rays' own pixels, widened by `WIDEN_PX` of the network's.

    Args:
      compile: as in `pipeline.register`.
    """
    from scipy import ndimage  # not at import: a registration without a finder does not need it

    program, masks = _program(compile), []
    for xray in xrays:
        seen = bin_xray(xray, finder.config.pixel_mm)
        shape = np.shape(seen.line_integrals)
        room = [(0, -n % BUCKET_PX) for n in shape]
        image = np.pad(np.asarray(seen.line_integrals, np.float32), room, mode="edge")
        valid = np.pad(np.asarray(seen.valid), room)
        p = np.asarray(program(finder.params, image[None], valid[None], config=finder.config))[
            0, : shape[0], : shape[1]
        ]
        found = (p > THRESHOLD) & np.asarray(seen.valid)
        if found.mean() < CLEAR_SHARE:
            masks.append(np.zeros(np.shape(xray.line_integrals), bool))
            continue
        disc = np.hypot(*np.indices((2 * WIDEN_PX + 1,) * 2) - WIDEN_PX) <= WIDEN_PX + 0.5
        found = ndimage.binary_dilation(found, disc)
        factor = cameras.binning(xray.camera, finder.config.pixel_mm)
        large = np.repeat(np.repeat(found, factor, 0), factor, 1)
        border = [(0, n - m) for n, m in zip(np.shape(xray.line_integrals), large.shape)]
        masks.append(np.pad(large, border, mode="edge"))
    return masks


@functools.cache
def _program(compile):
    return compile(probability, static_argnames="config")


def leave_out(
    finder: MetalFinder | None, xrays: Sequence[XRay], compile: Callable[..., Callable] = jax.jit
) -> list[XRay]:
    """The X-rays with their metal among the invalid pixels; as they are without a finder. Arguments as `find`."""
    if finder is None:
        return list(xrays)
    return [
        dataclasses.replace(xray, valid=np.asarray(xray.valid) & ~mask) if mask.any() else xray
        for xray, mask in zip(xrays, find(finder, xrays, compile))
    ]
