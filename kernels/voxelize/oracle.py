"""The definition of `voxelize`, dense and plain; exact in float64, the yardstick of every backend."""

import jax.numpy as jnp

from kernels.common import support
from kernels.common import symmetric


def voxelize(density, mean, precision, shape, *, use_support=True):
    """Density of a sum of Gaussians, sampled at voxel centres.

    Coordinates are voxel indices (voxel i has its centre at i), which makes the operator independent of spacing and
    orientation: the caller carries mean and precision into index space with the grid's affine.

    Args:
      density: (..., N) peak attenuation, 1/mm.
      mean: (..., N, 3) in voxel indices.
      precision: (..., N, 6) inverse covariance, 1/voxel^2.
      shape: three static sizes.
      use_support: False gives the unlimited sum.
    Returns:
      (..., *shape) density, 1/mm: sum of density * weight(r'Kr), r = index - mean, over Gaussians that are finite and whose
      precision is positive definite.
    """
    axes = [jnp.arange(n, dtype=mean.dtype) for n in shape]
    index = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)
    r = index - mean[..., None, None, None, :]
    K = symmetric.to_matrix(precision)[..., None, None, None, :, :]
    q = jnp.sum(r * jnp.sum(K * r[..., None, :], -1), -1)
    w = support.weight(q) if use_support else jnp.exp(-0.5 * q)
    drawn = symmetric.is_positive(precision) & jnp.all(jnp.isfinite(mean), -1)
    return jnp.sum(jnp.where(drawn[..., None, None, None], density[..., None, None, None] * w, 0.0), -4)
