"""What every backend of `drr` needs to know of its rays, in plain differentiable jax."""

import jax.numpy as jnp

from kernels.common.rays import rays
from kernels.common.rays import usable_camera

FAR_MM = 1e8
"""A ray that is still in the volume there does not leave it; it has no samples."""


def usable_views(voxel_from_camera, intrinsics):
    """The views, with one that sees nothing in place of those whose numbers float32 cannot follow.

    Usable are cameras that `splat.oracle.usable_camera` takes, with affines whose entries are finite and below 1e7.
    """
    camera = usable_camera(intrinsics)
    seen = camera & jnp.all(jnp.abs(voxel_from_camera) < 1e7, (-2, -1))
    outside = jnp.array([0.0, 0.0, 0.0, -2.0], voxel_from_camera.dtype)
    affine = jnp.where(seen[..., None, None], voxel_from_camera, outside)
    return affine, jnp.where(camera[..., None], intrinsics, 1.0)


def voxel_rays(voxel_from_camera, intrinsics, height, width):
    """Origin (B, 3) and direction per mm (B, height, width, 3) of the rays, in voxel indices."""
    d = rays(intrinsics, height, width)
    unit = d / jnp.linalg.norm(d, axis=-1, keepdims=True)
    direction = jnp.sum(voxel_from_camera[:, None, None, :, :3] * unit[..., None, :], -1)
    return voxel_from_camera[:, :, 3], direction


def sample_range(origin, direction, shape, step_mm):
    """First lattice index and number of samples, int32 (B, height, width) each, inside the box (-1, n) of the volume."""
    size = jnp.asarray(shape, direction.dtype)
    tiny = jnp.where(direction < 0, -1e-12, 1e-12).astype(direction.dtype)
    slope = jnp.where(jnp.abs(direction) < 1e-12, tiny, direction)
    t_a = (-1.0 - origin[:, None, None]) / slope
    t_b = (size - origin[:, None, None]) / slope
    near = jnp.maximum(jnp.max(jnp.minimum(t_a, t_b), -1), 0.0)
    far = jnp.min(jnp.maximum(t_a, t_b), -1)
    # A step below FAR_MM / 2^31 would overflow the index.
    first = jnp.floor(jnp.clip(near / step_mm - 0.5, 0.0, 1e9)).astype(jnp.int32)
    last = jnp.ceil(jnp.clip(far / step_mm - 0.5, -1.0, 1e9)).astype(jnp.int32)
    return first, jnp.where((far > near) & (far < FAR_MM), jnp.maximum(last - first + 1, 0), 0)
