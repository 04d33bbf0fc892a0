"""What every backend of `drr` needs to know of its rays, in plain differentiable jax."""

import jax.numpy as jnp

from kernels.splat.oracle import rays


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
    first = jnp.floor(jnp.clip(near / step_mm - 0.5, -1e8, 1e8)).astype(jnp.int32)
    first = jnp.maximum(first, 0)
    last = jnp.ceil(jnp.clip(far / step_mm - 0.5, -1e8, 1e8)).astype(jnp.int32)
    return first, jnp.where(far > near, jnp.maximum(last - first + 1, 0), 0)
