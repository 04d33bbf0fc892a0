"""The definition of `drr`, dense and simple; exact in float64, the reference for every backend."""

import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Float

from kernels.common.rays import rays
from kernels.common.types import Array


def drr(
    volume: Float[Array, "x y z"],
    voxel_from_camera: Float[Array, "views 3 4"],
    intrinsics: Float[Array, "views 4"],
    height: int,
    width: int,
    step_mm: float,
    far_mm: float,
) -> Float[Array, "views height width"]:
    """Line integrals by the midpoint rule on a fixed lattice of distances from the source, out to `far_mm`.

    Samples lie at distances t_i = (i + 1/2) * step_mm along each ray's unit direction, at
    voxel_from_camera @ [t_i d / |d|, 1] in voxel indices. The volume is trilinear between voxel centres and falls linearly
    to 0 one voxel beyond them. The lattice does not move with the pose, so the image is a smooth function of the pose.

    Args:
      volume: attenuation, 1/mm.
      voxel_from_camera: affine from camera mm to voxel indices.
      intrinsics: fx, fy, cx, cy in pixels.
      height, width: image size, px.
      step_mm: distance of samples along a ray.
      far_mm: length of the rays.
    Returns:
      Line integrals, no unit.
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
