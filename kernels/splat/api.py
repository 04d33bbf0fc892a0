"""Public `splat`: one definition, one custom gradient, several backends."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common import batching
from kernels.common import dispatch
from kernels.common import rays
from kernels.common.types import Array
from kernels.common.types import Implementation
from kernels.splat import ffi_cpu
from kernels.splat import xla

BACKENDS = {
    "pallas_triton": dispatch.on_call("gpu", "kernels.splat.pallas_triton", "forward", "backward"),
    "pallas_tpu": dispatch.on_call("tpu", "kernels.splat.pallas_tpu", "forward", "backward"),
    "ffi_cpu": (ffi_cpu.forward, ffi_cpu.backward),
    "xla": (xla.forward, xla.backward),
}


def splat(
    density: Float[Array, "..."],
    mean: Float[Array, "..."],
    precision: Float[Array, "..."],
    intrinsics: Float[Array, "..."],
    height: int,
    width: int,
    *,
    implementation: Implementation = None,
) -> Float[Array, "..."]:
    """Exact cone-beam line integrals of radiative Gaussians, differentiable in every array argument.

    The definition, with its support rule, is `kernels.splat.oracle.splat`. Leading axes are a batch of (cloud, camera)
    pairs and must agree in all four arrays; for one cloud under several views the caller broadcasts the cloud.

    Args:
      density: (..., N) peak attenuation, 1/mm.
      mean: (..., N, 3) mm in the camera frame: source at 0, +x along columns, +y along rows, +z to the panel.
      precision: (..., N, 6) inverse covariance xx, xy, xz, yy, yz, zz, 1/mm^2, camera frame.
      intrinsics: (..., 4) fx, fy, cx, cy in pixels; pixel centres are integers.
      height, width: static image size, px.
      implementation: backend name, order of names, or None for the best available.
    Returns:
      (..., height, width) line integrals, no unit. Gaussians of infinite or NaN density, and those that are not
      `oracle.visible` (behind the source, not finite, precision not positive definite), add nothing and get zero gradients.
      Cameras rejected by `rays.usable_camera` render zeros.
    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    batch, n = density.shape[:-1], density.shape[-1]
    wanted = {"mean": (*batch, n, 3), "precision": (*batch, n, 6), "intrinsics": (*batch, 4)}
    for name, array in (("mean", mean), ("precision", precision), ("intrinsics", intrinsics)):
        if array.shape != wanted[name]:
            raise ValueError(
                f"splat: {name} has shape {array.shape}, wanted {wanted[name]} to match density {density.shape}"
            )
    dtype = jnp.result_type(density, mean, precision, intrinsics)
    density, mean, precision, intrinsics = (jnp.asarray(a, dtype) for a in (density, mean, precision, intrinsics))
    seen = rays.usable_camera(intrinsics)[..., None]
    density, intrinsics = jnp.where(seen & jnp.isfinite(density), density, 0.0), jnp.where(seen, intrinsics, 1.0)
    return _splat(height, width, dispatch.hashable(implementation), density, mean, precision, intrinsics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _splat(height, width, implementation, density, mean, precision, intrinsics):
    forwards = {name: pair[0] for name, pair in BACKENDS.items()}

    def call(forward, *arrays):
        return forward(*arrays, height, width)

    run = functools.partial(dispatch.run, "splat", forwards, implementation, call)
    return batching.along_batch(run, (1, 2, 2, 1), density, mean, precision, intrinsics)[0]


def _splat_fwd(height, width, implementation, *primals):
    arrays = tuple(primal.value for primal in primals)
    # The gradient to the camera costs time and is seldom needed. Residuals hold arrays only, so it is a flag by its length.
    to_camera = (None,) * primals[3].perturbed
    return _splat(height, width, implementation, *arrays), (arrays, to_camera)


def _splat_bwd(height, width, implementation, residuals, cotangent):
    arrays, to_camera = residuals
    backwards = {name: pair[1] for name, pair in BACKENDS.items()}

    def call(backward, *arrays):
        return backward(*arrays, to_camera=bool(to_camera))

    run = functools.partial(dispatch.run, "splat", backwards, implementation, call)
    gradients = batching.along_batch(run, (1, 2, 2, 1, 2), *arrays, cotangent)
    return gradients if to_camera else (*gradients, jnp.zeros_like(arrays[3]))


_splat.defvjp(_splat_fwd, _splat_bwd, symbolic_zeros=True)
