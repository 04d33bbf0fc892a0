"""Derivative images, their noise, and how well two of them agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

T_FREEDOM = 5.0
"""Degrees of freedom of the residuals' t distribution."""
LEAST_SIGNAL = 0.1
"""Share of an image's energy that is never taken for noise."""


einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _kernels(sigma):
    """Offsets in pixels, and there a Gaussian and its derivative."""
    radius = int(np.ceil(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    smooth = np.exp(-0.5 * (offsets / sigma) ** 2)
    smooth /= smooth.sum()
    return offsets, smooth, offsets / sigma**2 * smooth


@functools.cache
def _bands(size, sigma):
    """Matrices (size, size) of a Gaussian and of its derivative, borders repeated."""
    offsets, *kernels = _kernels(sigma)
    result = []
    for kernel in kernels:
        band = np.zeros((size, size))
        for offset, weight in zip(offsets, kernel):
            np.add.at(band, (np.arange(size), np.clip(np.arange(size) + offset, 0, size - 1)), weight)
        result.append(band.astype(np.float32))
    return result


def derivatives(images, sigma):
    """Derivatives along v and u, per pixel, of images (V, S, S, C) blurred by `sigma` pixels: (V, S, S, C, 2)."""
    smooth, slope = _bands(images.shape[1], sigma)
    pairs = ((slope, smooth), (smooth, slope))
    return jnp.stack([einsum("ij,vjkc,lk->vilc", a, images, b) for a, b in pairs], -1)


def noise_energy(images, valid, sigma):
    """Expected squared length of what white noise leaves in `derivatives` of a pixel: (V,) for images (V, S, S).

    The noise's variance is told from the mixed second difference, in which smooth structures cancel (Immerkaer 1996), by its
    median, which edges do not move.
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
    # The squares of a normal deviate's median and of the difference's coefficients, (1, -2, 1) along both axes.
    return (typical / 0.6745) ** 2 / 36.0 * 2.0 * np.sum(smooth**2) * np.sum(slope**2)


def interior(valid, margin):
    """Pixels (V, S, S) whose neighbours within `margin` are all valid and in the window."""
    window = (1, 2 * margin + 1, 2 * margin + 1)
    return jax.lax.reduce_window(valid.astype(jnp.float32), jnp.inf, jax.lax.min, window, (1, 1, 1), "SAME")


def correlation(a, b, weights, noise):
    """(V,) weighted cosine of (V, S, S, 2) arrays, as it were without the noise of `a`, of energy (V,) a pixel (Spearman 1904)."""

    def dot(x, y):
        return einsum("vyxd,vyxd,vyx->v", x, y, weights)

    energy = dot(a, a)
    clean = jnp.maximum(energy - noise * jnp.sum(weights, (1, 2)), LEAST_SIGNAL * energy)
    return dot(a, b) * jax.lax.rsqrt(clean * dot(b, b) + 1e-20)
