"""The definition of `splat`, dense and plain; exact in float64, the yardstick of every backend."""

import jax.numpy as jnp

from kernels.common import rays
from kernels.common import support
from kernels.common import symmetric


def visible(mean, precision):
    """True (..., N) for a finite Gaussian whose 4-sigma ellipsoid lies wholly before the source plane (camera z > 0)."""
    covariance_zz = symmetric.inverse(precision)[..., 5]
    before = mean[..., 2] > support.SIGMA_MAX * jnp.sqrt(jnp.maximum(covariance_zz, 0.0))
    return before & symmetric.is_positive(precision) & jnp.all(jnp.isfinite(mean), -1)


def splat(density, mean, precision, intrinsics, height, width, *, use_support=True):
    """Line integrals of a sum of Gaussians; the closed form of the exact cone-beam integral.

    For a ray t * d and one Gaussian with precision K and mean p: a = d'Kd, t* = d'Kp / a, r = p - t* d, q = r'Kr and
    `density * |d| * sqrt(2 pi / a) * weight(q)` (`support.weight`; plain `exp(-q / 2)` without the support rule).

    Args:
      density: (..., N) peak attenuation, 1/mm.
      mean: (..., N, 3) mm, camera frame (+z to the detector, source at 0).
      precision: (..., N, 6) inverse covariance, 1/mm^2, camera frame.
      intrinsics: (..., 4) fx, fy, cx, cy in pixels.
      height, width: image size in pixels.
      use_support: False gives the unlimited sum.
    Returns:
      (..., height, width) line integrals, no unit. Gaussians that are not `visible` add nothing.
    """
    d = rays.rays(intrinsics, height, width)[..., None, :, :, :]
    K = symmetric.to_matrix(precision)[..., None, None, :, :]
    p = mean[..., None, None, :]
    Kd = jnp.sum(K * d[..., None, :], -1)
    a = jnp.sum(d * Kd, -1)
    t = jnp.sum(p * Kd, -1) / a
    r = p - t[..., None] * d
    q = jnp.sum(r * jnp.sum(K * r[..., None, :], -1), -1)
    w = support.weight(q) if use_support else jnp.exp(-0.5 * q)
    amplitude = density[..., None, None] * jnp.sqrt(jnp.sum(d * d, -1) * 2.0 * jnp.pi / a)
    shown = visible(mean, precision)[..., None, None]
    return jnp.sum(jnp.where(shown, amplitude * w, 0.0), -3)
