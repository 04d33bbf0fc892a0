"""Rays of `drr` in voxel indices and their samples, for every backend, in plain differentiable jax."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Float
from jaxtyping import Int32

from kernels.common.rays import rays
from kernels.common.rays import usable_camera
from kernels.common.types import Array

FAR_MM = 1e8
"""Length of the longest ray. A ray that is still inside the volume there, because it hardly moves in voxel indices, has no samples.
Chosen by hand, far beyond any scene. Also in drr.cc."""
MOST_ENTRY = 1e7
"""Upper bound of the size of a usable affine's entries, voxels or voxels per mm. Chosen by hand: far beyond any scene, and safe
from overflow in float32."""
LEAST_SLOPE = 1e-12
"""Lower bound of the size of a direction's components where they divide, voxels per mm. Chosen by hand; it only has to be far below
those of a ray that crosses a voxel. Also in drr.cc."""
MOST_STEPS = 1e9
"""Upper bound of a lattice index: an int32 holds it and the sum of two."""


def usable_views(
    voxel_from_camera: Float[Array, "views 3 4"], intrinsics: Float[Array, "views 4"]
) -> tuple[Float[Array, "views 3 4"], Float[Array, "views 4"]]:
    """The views; those that are not usable in float32 are replaced by a view that sees nothing.

    A view is usable if `rays.usable_camera` accepts its intrinsics and its affine's entries are finite and below MOST_ENTRY.
    """
    camera = usable_camera(intrinsics)
    seen = camera & jnp.all(jnp.abs(voxel_from_camera) < MOST_ENTRY, (-2, -1))
    outside = jnp.array([0.0, 0.0, 0.0, -2.0], voxel_from_camera.dtype)
    affine = jnp.where(seen[..., None, None], voxel_from_camera, outside)
    return affine, jnp.where(camera[..., None], intrinsics, 1.0)


def voxel_rays(
    voxel_from_camera: Float[Array, "views 3 4"], intrinsics: Float[Array, "views 4"], height: int, width: int
) -> tuple[Float[Array, "views 3"], Float[Array, "views height width 3"]]:
    """Origin of the rays, in voxel indices, and their directions, in voxel indices per mm."""
    d = rays(intrinsics, height, width)
    unit = d / jnp.linalg.norm(d, axis=-1, keepdims=True)
    direction = jnp.sum(voxel_from_camera[:, None, None, :, :3] * unit[..., None, :], -1)
    return voxel_from_camera[:, :, 3], direction


def sample_range(
    origin: Float[Array, "views 3"],
    direction: Float[Array, "views height width 3"],
    shape: Sequence[int],
    step_mm: float,
) -> tuple[Int32[Array, "views height width"], Int32[Array, "views height width"]]:
    """First lattice index and number of samples of each ray inside the box (-1, n) of the volume."""
    size = jnp.asarray(shape, direction.dtype)
    tiny = jnp.where(direction < 0, -LEAST_SLOPE, LEAST_SLOPE).astype(direction.dtype)
    slope = jnp.where(jnp.abs(direction) < LEAST_SLOPE, tiny, direction)
    t_a = (-1.0 - origin[:, None, None]) / slope
    t_b = (size - origin[:, None, None]) / slope
    near = jnp.maximum(jnp.max(jnp.minimum(t_a, t_b), -1), 0.0)
    far = jnp.min(jnp.maximum(t_a, t_b), -1)
    # Without the clip, a step below FAR_MM / 2^31 would overflow the index.
    first = jnp.floor(jnp.clip(near / step_mm - 0.5, 0.0, MOST_STEPS)).astype(jnp.int32)
    last = jnp.ceil(jnp.clip(far / step_mm - 0.5, -1.0, MOST_STEPS)).astype(jnp.int32)
    return first, jnp.where((far > near) & (far < FAR_MM), jnp.maximum(last - first + 1, 0), 0)
