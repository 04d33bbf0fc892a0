"""Derivative images, their noise, and the correlation of two of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array

T_FREEDOM = 5.0
"""Degrees of freedom of the residuals' t distribution (Lange et al. 1989), no unit. Chosen by hand: at half, residuals of a few
standard deviations lose more of their weight; at twice, metal and other outliers count more, as in least squares."""
MIN_SIGNAL = 0.1
"""Fraction of an image's energy that is always taken for signal, no unit. Chosen by hand: it bounds how much `correlation` is
raised for noise, by a factor of 1 / sqrt(0.1) = 3.2; at half the bound is 4.5, at twice 2.2."""

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _kernels(sigma):
    """Offsets in pixels, and a Gaussian and its derivative at them."""
    radius = int(np.ceil(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    smooth = np.exp(-0.5 * (offsets / sigma) ** 2)
    smooth /= smooth.sum()
    return offsets, smooth, offsets / sigma**2 * smooth


@functools.cache
def _bands(size, sigma):
    """Filter matrices (size, size) of a Gaussian and of its derivative; borders are repeated."""
    offsets, *kernels = _kernels(sigma)
    result = []
    for kernel in kernels:
        band = np.zeros((size, size))
        for offset, weight in zip(offsets, kernel):
            np.add.at(band, (np.arange(size), np.clip(np.arange(size) + offset, 0, size - 1)), weight)
        result.append(band.astype(np.float32))
    return result


def derivatives(
    images: Float[Array, "views size size channels"], sigma: float
) -> Float[jax.Array, "views size size channels 2"]:
    """Derivatives along v and u, per pixel, of images that are blurred by `sigma` pixels."""
    smooth, slope = _bands(images.shape[1], sigma)
    pairs = ((slope, smooth), (smooth, slope))
    return jnp.stack([einsum("ij,vjkc,lk->vilc", a, images, b) for a, b in pairs], -1)


def noise_energy(
    images: Float[Array, "views size size"], valid: Bool[Array, "views size size"], sigma: float
) -> Float[jax.Array, " views"]:
    """Expected squared length per pixel of the `derivatives` of an image's white noise.

    The noise's variance is estimated from the mixed second difference, in which smooth structures cancel (Immerkaer 1996), and
    by its median, which edges hardly change.
    """
    difference = images
    for axis in (1, 2):
        ends = [
            jax.lax.slice_in_dim(difference, start, start + images.shape[axis] - 2, axis=axis) for start in range(3)
        ]
        difference = ends[0] - 2.0 * ends[1] + ends[2]
    inside = interior(valid, 1)[:, 1:-1, 1:-1] > 0
    typical = jnp.nan_to_num(jnp.nanmedian(jnp.where(inside, jnp.abs(difference), jnp.nan), (1, 2)))
    _, smooth, slope = _kernels(sigma)
    # 0.6745 is the median magnitude of a standard normal deviate; 36 is the sum of the squared coefficients of the mixed
    # difference, (1, -2, 1) along both axes.
    return (typical / 0.6745) ** 2 / 36.0 * 2.0 * np.sum(smooth**2) * np.sum(slope**2)


def interior(valid: Bool[Array, "views height width"], margin: int) -> Float[jax.Array, "views height width"]:
    """1 for pixels whose neighbours within `margin` pixels are all valid, else 0. Pixels beyond the window count as valid."""
    window = (1, 2 * margin + 1, 2 * margin + 1)
    return jax.lax.reduce_window(valid.astype(jnp.float32), jnp.inf, jax.lax.min, window, (1, 1, 1), "SAME")


def correlation(
    a: Float[Array, "views size size 2"],
    b: Float[Array, "views size size 2"],
    weights: Float[Array, "views size size"],
    noise: Float[Array, " views"],
) -> Float[jax.Array, " views"]:
    """Weighted cosine of derivative images, corrected for the noise of `a` (attenuation, Spearman 1904).

    Args:
      noise: energy of the noise in `a` per pixel, from `noise_energy`.
    """

    def dot(x, y):
        return einsum("vyxd,vyxd,vyx->v", x, y, weights)

    energy = dot(a, a)
    clean = jnp.maximum(energy - noise * jnp.sum(weights, (1, 2)), MIN_SIGNAL * energy)
    return dot(a, b) * jax.lax.rsqrt(clean * dot(b, b) + 1e-20)
