"""The two rigid parts that an X-ray is modelled with, and how arrays get onto the device."""

import dataclasses

import flax.struct
import jax
import numpy as np
from jaxtyping import Float

from kernels.common.types import Leaf


@flax.struct.dataclass
class Parts:
    """The vertebra and the rest of the body, as voxel volumes of attenuation in 1/mm.

    Attributes:
      excess: (X, Y, Z) the vertebra's attenuation above the muscle that fills its hole in `rest`.
      box_from_excess: (4, 4) affine from a voxel index of `excess` to the vertebra's box frame, mm.
      rest: (X', Y', Z') everything else.
      box_from_rest: (4, 4) the same for `rest`.
    """

    excess: Leaf
    box_from_excess: Leaf
    rest: Leaf
    box_from_rest: Leaf


PARTS = tuple(field.name for field in dataclasses.fields(Parts))


def on_device(values: object) -> Float[jax.Array, "..."]:
    """Numbers as a float32 array on the device. Numpy converts them: jax would load a program for every shape."""
    return jax.device_put(np.asarray(values, np.float32))


def on_device_parts(parts: Parts) -> Parts:
    """`Parts` in float32 on the device."""
    return Parts(**{name: on_device(getattr(parts, name)) for name in PARTS})
