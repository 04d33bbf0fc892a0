"""`splat` and its gradient in C++ on the CPU."""

import pathlib

import jax
import jax.numpy as jnp

from kernels.common import dispatch
from kernels.common import ffi_build

TARGETS = {
    "radgs_splat_forward": "RadgsSplatForward",
    "radgs_splat_backward_of_cloud": "RadgsSplatBackwardOfCloud",
    "radgs_splat_backward": "RadgsSplatBackward",
}
"""Functions of the library by their names in jax."""


def register_backend():
    """Makes TARGETS known to jax; errors as `ffi_build.register_targets`."""
    ffi_build.register_targets(pathlib.Path(__file__).with_name("splat.cc"), tuple(TARGETS.items()))


def _call(target, results, arrays):
    """Calls `target` of splat.cc, whose leading axes are a batch; vmap goes no further than `batching.along_batch`."""
    dispatch.require("cpu", arrays)
    register_backend()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(target, results)(*arrays)


def forward(density, mean, precision, intrinsics, height, width):
    """As `xla.forward`, float32 only.

    Raises:
      NotImplementedError: the device is no CPU, an array is not float32, or the library cannot be built.
    """
    arrays = (density, mean, precision, intrinsics)
    return _call("radgs_splat_forward", [(*density.shape[:-1], height, width)], arrays)[0]


def backward(density, mean, precision, intrinsics, cotangent, to_camera=True):
    """As `xla.backward`, float32 only; errors as in `forward`."""
    arrays = (density, mean, precision, intrinsics, cotangent)
    cloud = [density.shape, mean.shape, precision.shape]
    if not to_camera:
        return tuple(_call("radgs_splat_backward_of_cloud", cloud, arrays))
    *gradients, each = _call("radgs_splat_backward", [*cloud, (*density.shape, 4)], arrays)
    return *gradients, jnp.sum(each, -2)
