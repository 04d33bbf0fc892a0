"""Similarity of images, as intensity-based registration uses it: correlations of whole images, of patches and of gradients.

All are between -1 and 1, for images (..., H, W) and the pixels of them that count, and unaware of a gain and an offset.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array

EPS = 1e-5
"""Added to variances: DiffPose's. Images are line integrals, whose variances over a vertebra are 0.01 and more."""
PATCH_PX = 13
"""Side of a patch, pixels: DiffPose's."""
SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
"""Sobel's filter along columns."""

Image = Float[Array, "*batch height width"]
Pixels = Bool[Array, "*batch height width"]


def _correlation(mean, a, b):
    """Of two images, by a function that averages over pixels."""
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = (jnp.maximum(mean(x * x) - m * m, 0.0) for x, m in ((a, mean_a), (b, mean_b)))
    return (mean(a * b) - mean_a * mean_b) / jnp.sqrt((variance_a + EPS) * (variance_b + EPS))


def _centred(x, valid):
    """An image less its mean over valid pixels, 0 elsewhere: float32 loses the contrast of squares of bright images."""
    count = jnp.maximum(jnp.sum(valid, (-2, -1), keepdims=True), 1)
    mean = jnp.sum(jnp.where(valid, x, 0.0), (-2, -1), keepdims=True) / count
    return jnp.where(valid, x - mean, 0.0)


def ncc(a: Image, b: Image, valid: Pixels) -> Float[jax.Array, "*batch"]:
    """Normalised cross-correlation over all valid pixels."""
    count = jnp.maximum(jnp.sum(valid, (-2, -1)), 1)
    return _correlation(lambda x: jnp.sum(x, (-2, -1)) / count, _centred(a, valid), _centred(b, valid))


def patch_ncc(a: Image, b: Image, valid: Pixels, patch_px: int = PATCH_PX) -> Float[jax.Array, "*batch"]:
    """Mean correlation over all patches of valid pixels alone, at every place."""

    def mean(x):
        window = (*(1,) * (x.ndim - 2), patch_px, patch_px)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * x.ndim, "VALID") / patch_px**2

    whole = mean(valid.astype(a.dtype)) > 1.0 - 0.5 / patch_px**2
    each = jnp.where(whole, _correlation(mean, _centred(a, valid), _centred(b, valid)), 0.0)
    return jnp.sum(each, (-2, -1)) / jnp.maximum(jnp.sum(whole, (-2, -1)), 1)


def _sobel(image, kernel):
    flat = image.reshape(-1, 1, *image.shape[-2:])
    found = jax.lax.conv_general_dilated(flat, kernel[None, None], (1, 1), "VALID")
    return found.reshape(*image.shape[:-2], *found.shape[-2:])


def gradient_ncc(a: Image, b: Image, valid: Pixels) -> Float[jax.Array, "*batch"]:
    """Mean of the correlations of both Sobel derivatives."""
    kernel = jnp.asarray(SOBEL, a.dtype)
    inside = _sobel(valid.astype(a.dtype), jnp.ones((3, 3), a.dtype)) > 8.5
    parts = [ncc(_sobel(a, k), _sobel(b, k), inside) for k in (kernel, kernel.T)]
    return 0.5 * (parts[0] + parts[1])
