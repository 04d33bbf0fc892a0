"""The definition of `drr`, dense and plain; exact in float64, the yardstick of every backend."""

import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from kernels.common.rays import rays


def drr(volume, voxel_from_camera, intrinsics, height, width, step_mm, far_mm):
    """Line integrals by the midpoint rule on a fixed lattice of distances from the source, out to `far_mm`.

    Samples lie at distances t_i = (i + 1/2) * step_mm along each ray's unit direction, at
    voxel_from_camera @ [t_i d / |d|, 1] in voxel indices. The volume is trilinear between voxel centres and falls linearly
    to 0 one voxel beyond them. The lattice does not move with the pose, so the image is a smooth function of it.

    Args:
      volume: (X, Y, Z) attenuation, 1/mm.
      voxel_from_camera: (B, 3, 4) affine to voxel indices.
      intrinsics: (B, 4) fx, fy, cx, cy in pixels.
      height, width: image size; step_mm: sample distance in mm; far_mm: where to stop.
    Returns:
      (B, height, width) line integrals, no unit.
    """
    d = rays(intrinsics, height, width)
    unit = d / jnp.linalg.norm(d, axis=-1, keepdims=True)
    t = (jnp.arange(int(far_mm / step_mm), dtype=unit.dtype) + 0.5) * step_mm
    points = unit[..., None, :] * t[:, None]
    index = (
        jnp.einsum("bij,bhwtj->ibhwt", voxel_from_camera[:, :, :3], points)
        + voxel_from_camera[:, :, 3].T[:, :, None, None, None]
    )
    return jnp.sum(map_coordinates(volume, list(index), order=1, mode="constant", cval=0.0), -1) * step_mm
