"""Voxel grids: a shape and an affine from voxel indices to a frame in mm."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class VoxelGrid:
    """frame_from_index: (..., 4, 4) affine, voxel i has its centre at i; shape: three static sizes."""

    frame_from_index: jax.Array
    shape: tuple = flax.struct.field(pytree_node=False)


def centred(shape, spacing_mm, dtype=jnp.float32):
    """Axis-aligned `VoxelGrid` of three sizes whose middle is the frame's origin; `spacing_mm` one number or three."""
    size = jnp.asarray(shape, dtype)
    spacing = jnp.broadcast_to(jnp.asarray(spacing_mm, dtype), (3,))
    affine = jnp.diag(jnp.concatenate([spacing, jnp.ones(1, dtype)]))
    return VoxelGrid(affine.at[:3, 3].set(-0.5 * (size - 1) * spacing), tuple(int(n) for n in shape))
