"""`drr` and its gradients in C++ on the CPU."""

import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kernels.common import dispatch
from kernels.common import ffi_build
from kernels.common.types import Array

TARGETS = {
    "radgs_drr_forward": "RadgsDrr",
    "radgs_drr_volume": "RadgsDrrVolume",
    "radgs_drr_per_ray": "RadgsDrrPerRay",
}
"""Name in jax -> symbol of the library."""


def register_backend() -> None:
    """Builds the library and registers TARGETS with jax; errors as in `ffi_build.register_targets`."""
    ffi_build.register_targets(pathlib.Path(__file__).with_name("drr.cc"), tuple(TARGETS.items()))


def _call(target, volume_shape, results, arrays, step_mm):
    """Calls `target` of drr.cc. It has no rule for vmap, which `batching.along_batch` handles."""
    dispatch.require("cpu", arrays)
    # Offsets into the padded volume are int32.
    if math.prod(n + 2 for n in volume_shape) >= 2**31:
        raise NotImplementedError(f"fewer than 2^31 voxels only, with a border of one, not {volume_shape}")
    register_backend()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(target, results)(*arrays, step_mm=np.float32(step_mm))


def forward(
    volume: Float[Array, "x y z"],
    origin: Float[Array, "views 3"],
    direction: Float[Array, "views height width 3"],
    step_mm: float,
) -> Float[Array, "views height width"]:
    """As `xla.forward`, float32 only.

    Raises:
      NotImplementedError: the device is not a CPU, an array is not float32, 2^31 voxels or more, or the library cannot be built.
    """
    results = [direction.shape[:-1]]
    return _call("radgs_drr_forward", volume.shape, results, (volume, origin, direction), step_mm)[0]


def to_volume(
    shape: Sequence[int],
    origin: Float[Array, "views 3"],
    direction: Float[Array, "views height width 3"],
    cotangent: Float[Array, "views height width"],
    step_mm: float,
) -> Float[Array, "x y z"]:
    """As `xla.to_volume`, float32 only; errors as in `forward`."""
    return _call("radgs_drr_volume", shape, [shape], (origin, direction, cotangent), step_mm)[0]


def per_ray(
    volume: Float[Array, "x y z"],
    origin: Float[Array, "views 3"],
    direction: Float[Array, "views height width 3"],
    step_mm: float,
) -> tuple[
    Float[Array, "views height width"], Float[Array, "views height width 3"], Float[Array, "views height width 3"]
]:
    """As `xla.per_ray`, float32 only; errors as in `forward`."""
    arrays, results = (volume, origin, direction), [direction.shape[:-1], direction.shape, direction.shape]
    image, by_origin, by_direction = _call("radgs_drr_per_ray", volume.shape, results, arrays, step_mm)
    return image, by_origin, by_direction
