"""The definition of `voxelize`, dense and simple; exact in float64, the reference for every backend."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Float

from kernels.common import support
from kernels.common import symmetric
from kernels.common.types import Array


def voxelize(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    shape: Sequence[int],
    *,
    use_support: bool = True,
) -> Float[Array, "*batch x y z"]:
    """Density of a sum of Gaussians, sampled at voxel centres.

    Coordinates are voxel indices (voxel i has its centre at i), which makes the operator independent of spacing and
    orientation: the caller transforms mean and precision to index space with the grid's affine.

    Args:
      density: peak attenuation, 1/mm.
      mean: in voxel indices.
      precision: inverse covariance, 1/voxel^2.
      shape: three static sizes.
      use_support: False gives the sum without the support rule.
    Returns:
      Density, 1/mm: sum of density * weight(r'Kr), r = index - mean, over Gaussians that are finite and whose precision is
      positive definite.
    """
    axes = [jnp.arange(n, dtype=mean.dtype) for n in shape]
    index = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)
    r = index - mean[..., None, None, None, :]
    K = symmetric.to_matrix(precision)[..., None, None, None, :, :]
    q = jnp.sum(r * jnp.sum(K * r[..., None, :], -1), -1)
    w = support.weight(q) if use_support else jnp.exp(-0.5 * q)
    drawn = symmetric.is_positive(precision) & jnp.all(jnp.isfinite(mean), -1)
    return jnp.sum(jnp.where(drawn[..., None, None, None], density[..., None, None, None] * w, 0.0), -4)
