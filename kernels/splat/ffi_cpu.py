"""`splat` and its gradient in C++ on the CPU."""

import pathlib

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels import ffi_build


def _call(target, symbol, results, arrays):
    """Calls `symbol` of splat.cc; leading axes are a batch there too, so vmap only adds one."""
    dispatch.require("cpu", arrays)
    ffi_build.register(pathlib.Path(__file__).with_name("splat.cc"), target, symbol)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(target, results, vmap_method="broadcast_all")(*arrays)


def forward(density, mean, precision, intrinsics, height, width):
    """As `xla.forward`, float32 only."""
    arrays = (density, mean, precision, intrinsics)
    return _call("radgs_splat_forward", "RadgsSplatForward", [(*density.shape[:-1], height, width)], arrays)[0]


def backward(density, mean, precision, intrinsics, cotangent):
    """As `xla.backward`, float32 only."""
    arrays = (density, mean, precision, intrinsics, cotangent)
    results = [density.shape, mean.shape, precision.shape, (*density.shape, 4)]
    to_density, to_mean, to_precision, to_camera = _call("radgs_splat_backward", "RadgsSplatBackward", results, arrays)
    return to_density, to_mean, to_precision, jnp.sum(to_camera, -2)
