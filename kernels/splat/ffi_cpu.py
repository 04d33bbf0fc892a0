"""`splat` and its gradient in C++ on the CPU."""

import pathlib

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels import ffi_build


def _call(target, symbol, results, arrays):
    """Calls `symbol` of splat.cc, whose leading axes are a batch; vmap goes no further than `batching.along_batch`."""
    dispatch.require("cpu", arrays)
    ffi_build.register(pathlib.Path(__file__).with_name("splat.cc"), target, symbol)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(target, results)(*arrays)


def forward(density, mean, precision, intrinsics, height, width):
    """As `xla.forward`, float32 only.

    Raises:
      NotImplementedError: the device is no CPU, an array is not float32, or the library cannot be built.
    """
    arrays = (density, mean, precision, intrinsics)
    return _call("radgs_splat_forward", "RadgsSplatForward", [(*density.shape[:-1], height, width)], arrays)[0]


def backward(density, mean, precision, intrinsics, cotangent, to_camera=True):
    """As `xla.backward`, float32 only; errors as in `forward`."""
    arrays = (density, mean, precision, intrinsics, cotangent)
    cloud = [density.shape, mean.shape, precision.shape]
    if not to_camera:
        return tuple(_call("radgs_splat_backward_of_cloud", "RadgsSplatBackwardOfCloud", cloud, arrays))
    *gradients, each = _call("radgs_splat_backward", "RadgsSplatBackward", [*cloud, (*density.shape, 4)], arrays)
    return *gradients, jnp.sum(each, -2)
