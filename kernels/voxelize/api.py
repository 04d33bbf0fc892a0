"""Public `voxelize`: one definition, one custom gradient, several backends."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common import batching
from kernels.common import dispatch
from kernels.common.types import Array
from kernels.common.types import Implementation
from kernels.voxelize import ffi_cpu
from kernels.voxelize import xla

BACKENDS = {
    "pallas_triton": dispatch.on_call("gpu", "kernels.voxelize.pallas_triton", "forward", "backward"),
    "ffi_cpu": (ffi_cpu.forward, ffi_cpu.backward),
    "xla": (xla.forward, xla.backward),
}


def voxelize(
    density: Float[Array, "..."],
    mean: Float[Array, "..."],
    precision: Float[Array, "..."],
    shape: Sequence[int],
    *,
    implementation: Implementation = None,
) -> Float[Array, "..."]:
    """Density of radiative Gaussians at voxel centres, differentiable in every array argument.

    The definition, with its support rule, is `kernels.voxelize.oracle.voxelize`. Leading axes are a batch.

    Args:
      density: (..., N) peak attenuation, 1/mm.
      mean: (..., N, 3) in voxel indices (voxel i has its centre at i).
      precision: (..., N, 6) inverse covariance xx, xy, xz, yy, yz, zz, 1/voxel^2.
      shape: three static sizes.
      implementation: backend name, order of names, or None for the best available.
    Returns:
      (..., *shape) density, 1/mm. Gaussians that are not finite, or whose precision is not positive definite, add nothing and
      get zero gradients.
    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    batch, n = density.shape[:-1], density.shape[-1]
    for name, array, wanted in (("mean", mean, (*batch, n, 3)), ("precision", precision, (*batch, n, 6))):
        if array.shape != wanted:
            raise ValueError(
                f"voxelize: {name} has shape {array.shape}, wanted {wanted} to match density {density.shape}"
            )
    dtype = jnp.result_type(density, mean, precision)
    density, mean, precision = (jnp.asarray(a, dtype) for a in (density, mean, precision))
    density = jnp.where(jnp.isfinite(density), density, 0.0)
    return _voxelize(tuple(shape), dispatch.hashable(implementation), density, mean, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _voxelize(shape, implementation, density, mean, precision):
    forwards = {name: pair[0] for name, pair in BACKENDS.items()}

    def call(forward, *arrays):
        return forward(*arrays, shape)

    run = functools.partial(dispatch.run, "voxelize", forwards, implementation, call)
    return batching.along_batch(run, (1, 2, 2), density, mean, precision)[0]


def _voxelize_fwd(shape, implementation, *arrays):
    return _voxelize(shape, implementation, *arrays), arrays


def _voxelize_bwd(shape, implementation, arrays, cotangent):
    backwards = {name: pair[1] for name, pair in BACKENDS.items()}
    call = lambda backward, *arrays: backward(*arrays)
    run = functools.partial(dispatch.run, "voxelize", backwards, implementation, call)
    return batching.along_batch(run, (1, 2, 2, 3), *arrays, cotangent)


_voxelize.defvjp(_voxelize_fwd, _voxelize_bwd)
