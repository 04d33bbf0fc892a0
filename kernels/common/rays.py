"""Rays of an image's pixels, and cameras that can be rendered."""

import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array

SOURCE_ISOCENTRE_MM = 700.0
"""Distance from the source to the isocentre in the benchmarks' specs, of the order of a C-arm's. Chosen by hand."""

MOST_PX = 1e7
LEAST_FOCAL_PX = 1e-3
"""Limits of usable intrinsics, px. Chosen by hand: far beyond any camera, and safe from overflow in float32."""


def usable_camera(intrinsics: Float[Array, "*batch 4"]) -> Bool[Array, "*batch"]:
    """True for finite intrinsics below MOST_PX in size, with focal lengths above LEAST_FOCAL_PX in size."""
    size = jnp.abs(intrinsics)
    return jnp.all(size < MOST_PX, -1) & jnp.all(size[..., :2] > LEAST_FOCAL_PX, -1)


def rays(intrinsics: Float[Array, "*batch 4"], height: int, width: int) -> Float[Array, "*batch height width 3"]:
    """Ray directions (x, y, 1) in the camera frame, for intrinsics fx, fy, cx, cy.

    Pixel centres are integers: column u, row v lies on x = (u - cx) / fx, y = (v - cy) / fy.
    """
    fx, fy, cx, cy = (intrinsics[..., i, None, None] for i in range(4))
    v, u = jnp.meshgrid(
        jnp.arange(height, dtype=intrinsics.dtype), jnp.arange(width, dtype=intrinsics.dtype), indexing="ij"
    )
    x, y = jnp.broadcast_arrays((u - cx) / fx, (v - cy) / fy)
    return jnp.stack([x, y, jnp.ones_like(x)], -1)
