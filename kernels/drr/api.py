"""Public `drr`: one definition, one custom gradient, several backends."""

import functools

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.drr import ffi_cpu
from kernels.drr import geometry
from kernels.drr import xla

FORWARD = {"ffi_cpu": ffi_cpu.forward, "xla": xla.forward}
BACKWARD = {"ffi_cpu": ffi_cpu.backward, "xla": xla.backward}


def drr(volume, voxel_from_camera, intrinsics, height, width, *, step_mm=1.0, implementation=None):
    """Line integrals through a voxel volume, differentiable in the volume, the pose and the intrinsics.

    The definition is `kernels.drr.oracle.drr`: trilinear samples on a lattice of distances from the source that does not
    move with the pose, out to wherever the volume ends.

    Args:
      volume: (X, Y, Z) attenuation, 1/mm.
      voxel_from_camera: (B, 3, 4) affine from camera mm to voxel indices (voxel i has its centre at i).
      intrinsics: (B, 4) fx, fy, cx, cy in pixels.
      height, width: static image size; step_mm: static sample distance, mm, above 0.
      implementation: backend name, order of names, or None for the best available.
    Returns:
      (B, height, width) line integrals, no unit. A view whose pose is not finite is 0 and gives the volume no gradient.
    Raises:
      ValueError: shapes that do not fit, a step that is not positive, or an unknown implementation.
    """
    if volume.ndim != 3:
        raise ValueError(f"drr: volume has shape {volume.shape}, wanted (X, Y, Z)")
    batch = intrinsics.shape[:1]
    if voxel_from_camera.shape != (*batch, 3, 4) or intrinsics.shape != (*batch, 4):
        raise ValueError(
            f"drr: voxel_from_camera {voxel_from_camera.shape} and intrinsics {intrinsics.shape}, "
            "wanted (B, 3, 4) and (B, 4)"
        )
    if not step_mm > 0:
        raise ValueError(f"drr: step_mm is {step_mm}, wanted more than 0")
    implementation = (
        implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
    )
    dtype = jnp.result_type(volume, voxel_from_camera, intrinsics)
    if volume.size == 0:
        return jnp.zeros((*batch, height, width), dtype)
    origin, direction = geometry.voxel_rays(
        jnp.asarray(voxel_from_camera, dtype), jnp.asarray(intrinsics, dtype), height, width
    )
    return _drr(float(step_mm), implementation, jnp.asarray(volume, dtype), origin, direction)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _drr(step_mm, implementation, volume, origin, direction):
    return dispatch.run("drr", FORWARD, implementation, volume, origin, direction, step_mm)


def _drr_fwd(step_mm, implementation, *arrays):
    return _drr(step_mm, implementation, *arrays), arrays


def _drr_bwd(step_mm, implementation, arrays, cotangent):
    return dispatch.run("drr", BACKWARD, implementation, *arrays, step_mm, cotangent)


_drr.defvjp(_drr_fwd, _drr_bwd)
