"""`voxelize` and its gradient in C++ on the CPU."""

import pathlib

import jax
import jax.numpy as jnp

from kernels.common import dispatch
from kernels.common import ffi_build

TARGETS = {
    "radgs_voxelize_forward": "RadgsVoxelizeForward",
    "radgs_voxelize_backward": "RadgsVoxelizeBackward",
}
"""Functions of the library by their names in jax."""


def register_backend():
    """Makes TARGETS known to jax; errors as `ffi_build.register_targets`."""
    ffi_build.register_targets(pathlib.Path(__file__).with_name("voxelize.cc"), tuple(TARGETS.items()))


def _call(target, results, arrays):
    """Calls `target` of voxelize.cc, whose leading axes are a batch; vmap goes no further than `batching.along_batch`."""
    dispatch.require("cpu", arrays)
    register_backend()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(target, results)(*arrays)


def forward(density, mean, precision, shape):
    """As `xla.forward`, float32 only.

    Raises:
      NotImplementedError: the device is no CPU, an array is not float32, or the library cannot be built.
    """
    arrays = (density, mean, precision)
    return _call("radgs_voxelize_forward", [(*density.shape[:-1], *shape)], arrays)[0]


def backward(density, mean, precision, cotangent):
    """As `xla.backward`, float32 only; errors as in `forward`."""
    arrays = (density, mean, precision, cotangent)
    return tuple(_call("radgs_voxelize_backward", [a.shape for a in arrays[:3]], arrays))
