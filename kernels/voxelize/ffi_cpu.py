"""`voxelize` and its gradient in C++ on the CPU."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common import dispatch
from kernels.common import ffi_build
from kernels.common.types import Array

TARGETS = {
    "radgs_voxelize_forward": "RadgsVoxelizeForward",
    "radgs_voxelize_backward": "RadgsVoxelizeBackward",
}
"""Name in jax -> symbol of the library."""


def register_backend() -> None:
    """Builds the library and registers TARGETS with jax; errors as in `ffi_build.register_targets`."""
    ffi_build.register_targets(pathlib.Path(__file__).with_name("voxelize.cc"), tuple(TARGETS.items()))


def _call(target, results, arrays):
    """Calls `target` of voxelize.cc; leading axes are a batch. It has no rule for vmap, which `batching.along_batch` handles."""
    dispatch.require("cpu", arrays)
    register_backend()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(target, results)(*arrays)


def forward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    shape: Sequence[int],
) -> Float[Array, "*batch x y z"]:
    """As `xla.forward`, float32 only.

    Raises:
      NotImplementedError: the device is not a CPU, an array is not float32, or the library cannot be built.
    """
    arrays = (density, mean, precision)
    return _call("radgs_voxelize_forward", [(*density.shape[:-1], *shape)], arrays)[0]


def backward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    cotangent: Float[Array, "*batch x y z"],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n 3"], Float[Array, "*batch n 6"]]:
    """As `xla.backward`, float32 only; errors as in `forward`."""
    arrays = (density, mean, precision, cotangent)
    to_density, to_mean, to_precision = _call("radgs_voxelize_backward", [a.shape for a in arrays[:3]], arrays)
    return to_density, to_mean, to_precision
