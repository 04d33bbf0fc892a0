"""`splat` and its gradient in C++ on the CPU."""

import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common import dispatch
from kernels.common import ffi_build
from kernels.common.types import Array

TARGETS = {
    "radgs_splat_forward": "RadgsSplatForward",
    "radgs_splat_backward_of_cloud": "RadgsSplatBackwardOfCloud",
    "radgs_splat_backward": "RadgsSplatBackward",
}
"""Name in jax -> symbol of the library."""


def register_backend() -> None:
    """Builds the library and registers TARGETS with jax; errors as in `ffi_build.register_targets`."""
    ffi_build.register_targets(pathlib.Path(__file__).with_name("splat.cc"), tuple(TARGETS.items()))


def _call(target, results, arrays):
    """Calls `target` of splat.cc; leading axes are a batch. It has no rule for vmap, which `batching.along_batch` handles."""
    dispatch.require("cpu", arrays)
    register_backend()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(target, results)(*arrays)


def forward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    intrinsics: Float[Array, "*batch 4"],
    height: int,
    width: int,
) -> Float[Array, "*batch height width"]:
    """As `xla.forward`, float32 only.

    Raises:
      NotImplementedError: the device is not a CPU, an array is not float32, or the library cannot be built.
    """
    arrays = (density, mean, precision, intrinsics)
    return _call("radgs_splat_forward", [(*density.shape[:-1], height, width)], arrays)[0]


def backward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    intrinsics: Float[Array, "*batch 4"],
    cotangent: Float[Array, "*batch height width"],
    to_camera: bool = True,
) -> tuple[Float[Array, "..."], ...]:
    """As `xla.backward`, float32 only; errors as in `forward`."""
    arrays = (density, mean, precision, intrinsics, cotangent)
    cloud = [density.shape, mean.shape, precision.shape]
    if not to_camera:
        return tuple(_call("radgs_splat_backward_of_cloud", cloud, arrays))
    *gradients, each = _call("radgs_splat_backward", [*cloud, (*density.shape, 4)], arrays)
    return *gradients, jnp.sum(each, -2)
