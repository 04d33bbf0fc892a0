"""Rays of an image's pixels, and which cameras can be drawn."""

import jax.numpy as jnp

SOURCE_ISOCENTRE_MM = 700.0


def usable_camera(intrinsics):
    """True (...) for intrinsics (..., 4) that are finite and below 1e7 px, with focal lengths above 1e-3 px."""
    size = jnp.abs(intrinsics)
    return jnp.all(size < 1e7, -1) & jnp.all(size[..., :2] > 1e-3, -1)


def rays(intrinsics, height, width):
    """Ray directions (x, y, 1) in the camera frame, (..., height, width, 3), for intrinsics (..., 4) = fx, fy, cx, cy.

    Pixel centres are integers: column u, row v lies on x = (u - cx) / fx, y = (v - cy) / fy.
    """
    fx, fy, cx, cy = (intrinsics[..., i, None, None] for i in range(4))
    v, u = jnp.meshgrid(
        jnp.arange(height, dtype=intrinsics.dtype), jnp.arange(width, dtype=intrinsics.dtype), indexing="ij"
    )
    x, y = jnp.broadcast_arrays((u - cx) / fx, (v - cy) / fy)
    return jnp.stack([x, y, jnp.ones_like(x)], -1)
