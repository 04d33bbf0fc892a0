"""X-rays as networks see them, whatever the gain, the air value and the beam's hardness."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array

_QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles that standardise an image, no unit. Chosen by hand: closer to 0 and 1 metal and air enter, closer to 0.5 the range is
that of soft tissue."""
_CLIP = 4.0
"""Limit of a standardised value, in units of its scale. Chosen by hand: at half, bone is clipped; at twice, metal is brighter."""
_MIN_RANGE = 1e-3
"""Smallest scale of an image, line integral. Chosen by hand: it keeps flat images finite; half or twice changes only such
images."""
_MIN_VARIANCE = 1e-4
"""Smallest local variance, in units of the squared scale. Chosen by hand: it keeps flat regions finite; larger values hide faint
texture, smaller ones amplify noise there."""
_CONTRAST_PX = 10
"""Radius in pixels of the window for local contrast, 15 mm: about half a vertebra. Chosen by hand: at half, the window is inside a
vertebral body; at twice, it spans its neighbours."""


def standardise(
    images: Real[Array, "batch height width"], valid: Bool[Array, "batch height width"]
) -> Float[jax.Array, "batch height width 3"]:
    """The network's input from line integrals, independent of gain, air value and the beam's hardness.

    The channels are: the image minus its median, divided by half the range of its middle 80 %; its local contrast (minus the mean,
    divided by the standard deviation, of the 21 x 21 pixels around); and the valid pixels. Only valid pixels enter the statistics.
    """
    low, middle, high = jnp.nanquantile(jnp.where(valid, images, jnp.nan), jnp.array(_QUANTILES), axis=(1, 2))
    scale = jnp.maximum(0.5 * (high - low), _MIN_RANGE)[:, None, None]
    x = jnp.clip((images - middle[:, None, None]) / scale, -_CLIP, _CLIP)
    mask = valid.astype(images.dtype)
    x = jnp.where(valid, x, 0.0)
    share = jnp.maximum(_box_sum(mask), 1.0)
    mean = _box_sum(x) / share
    spread = jnp.sqrt(jnp.maximum(_box_sum(x * x) / share - mean**2, _MIN_VARIANCE))
    contrast = jnp.where(valid, jnp.clip((x - mean) / spread, -_CLIP, _CLIP), 0.0)
    return jnp.stack([x, contrast, mask], -1)


def _box_sum(x):
    size = 2 * _CONTRAST_PX + 1
    for window in ((1, size, 1), (1, 1, size)):
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1), "SAME")
    return x
