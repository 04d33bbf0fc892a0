"""Voxel grids: a shape and an affine from voxel indices to a frame in mm."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp

from kernels.common.types import Leaf


@flax.struct.dataclass
class VoxelGrid:
    """A grid of voxels in a frame.

    Attributes:
      frame_from_index: (..., 4, 4) affine, mm; the centre of voxel i has index i.
      shape: three static sizes.
    """

    frame_from_index: Leaf
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)


def centred(shape: Sequence[int], spacing_mm: float | Sequence[float], dtype: Any = jnp.float32) -> VoxelGrid:
    """Axis-aligned grid of three sizes whose middle is the frame's origin. `spacing_mm` is one number or one per axis."""
    size = jnp.asarray(shape, dtype)
    spacing = jnp.broadcast_to(jnp.asarray(spacing_mm, dtype), (3,))
    affine = jnp.diag(jnp.concatenate([spacing, jnp.ones(1, dtype)]))
    return VoxelGrid(affine.at[:3, 3].set(-0.5 * (size - 1) * spacing), tuple(int(n) for n in shape))
