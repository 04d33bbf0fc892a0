"""`drr` and its gradients in C++ on the CPU."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kernels.common import dispatch
from kernels.common import ffi_build

TARGETS = {
    "radgs_drr_forward": "RadgsDrr",
    "radgs_drr_rays": "RadgsDrrRays",
    "radgs_drr_volume": "RadgsDrrVolume",
    "radgs_drr_per_ray": "RadgsDrrPerRay",
}
"""Functions of the library by their names in jax."""


def register_backend():
    """Makes TARGETS known to jax; errors as `ffi_build.register_targets`."""
    ffi_build.register_targets(pathlib.Path(__file__).with_name("drr.cc"), tuple(TARGETS.items()))


def _call(target, volume_shape, results, arrays, step_mm):
    """Calls `target` of drr.cc; vmap goes no further than `batching.along_batch`."""
    dispatch.require("cpu", arrays)
    if math.prod(n + 2 for n in volume_shape) >= 2**31:
        raise NotImplementedError(f"fewer than 2^31 voxels only, with a border of one, not {volume_shape}")
    register_backend()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(target, results)(*arrays, step_mm=np.float32(step_mm))


def forward(volume, origin, direction, step_mm):
    """As `xla.forward`, float32 only.

    Raises:
      NotImplementedError: the device is no CPU, an array is not float32, 2^31 voxels or more, or the library cannot be built.
    """
    results = [direction.shape[:-1]]
    return _call("radgs_drr_forward", volume.shape, results, (volume, origin, direction), step_mm)[0]


def to_rays(volume, origin, direction, cotangent, step_mm):
    """As `xla.to_rays`, float32 only; errors as in `forward`."""
    arrays, results = (volume, origin, direction, cotangent), [origin.shape, direction.shape]
    return tuple(_call("radgs_drr_rays", volume.shape, results, arrays, step_mm))


def to_volume(shape, origin, direction, cotangent, step_mm):
    """As `xla.to_volume`, float32 only; errors as in `forward`."""
    return _call("radgs_drr_volume", shape, [shape], (origin, direction, cotangent), step_mm)[0]


def per_ray(volume, origin, direction, step_mm):
    """As `xla.per_ray`, float32 only; errors as in `forward`."""
    arrays, results = (volume, origin, direction), [direction.shape[:-1], direction.shape, direction.shape]
    return tuple(_call("radgs_drr_per_ray", volume.shape, results, arrays, step_mm))
