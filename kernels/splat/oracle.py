"""The definition of `splat`, dense and simple; exact in float64, the reference for every backend."""

import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common import rays
from kernels.common import support
from kernels.common import symmetric
from kernels.common.types import Array


def visible(mean: Float[Array, "*batch n 3"], precision: Float[Array, "*batch n 6"]) -> Bool[Array, "*batch n"]:
    """True for a finite Gaussian whose 4-sigma ellipsoid lies entirely in front of the source plane (camera z > 0)."""
    covariance_zz = symmetric.inverse(precision)[..., 5]
    before = mean[..., 2] > support.SIGMA_MAX * jnp.sqrt(jnp.maximum(covariance_zz, 0.0))
    return before & symmetric.is_positive(precision) & jnp.all(jnp.isfinite(mean), -1)


def splat(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    intrinsics: Float[Array, "*batch 4"],
    height: int,
    width: int,
    *,
    use_support: bool = True,
) -> Float[Array, "*batch height width"]:
    """Line integrals of a sum of Gaussians; the closed form of the exact cone-beam integral.

    For a ray t * d and one Gaussian with precision K and mean p: a = d'Kd, t* = d'Kp / a, r = p - t* d, q = r'Kr and
    `density * |d| * sqrt(2 pi / a) * weight(q)` (`support.weight`; plain `exp(-q / 2)` without the support rule).

    Args:
      density: peak attenuation, 1/mm.
      mean: mm, camera frame (+z to the panel, source at 0).
      precision: inverse covariance, 1/mm^2, camera frame.
      intrinsics: fx, fy, cx, cy in pixels.
      height, width: image size, px.
      use_support: False gives the sum without the support rule.
    Returns:
      Line integrals, no unit. Gaussians that are not `visible` add nothing.
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
