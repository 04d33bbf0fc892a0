"""`drr` in plain XLA: all rays march together, one lattice step at a time; hand-written backward; any device."""

import math

import jax.numpy as jnp
from jax import lax

from kernels.drr import geometry


def _corners(position, shape):
    """The eight neighbours of sample positions (..., 3): index triples, trilinear weights and their slopes (..., 3)."""
    base = jnp.floor(position)
    f = position - base
    base = base.astype(jnp.int32)
    for corner in ((i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)):
        index = [base[..., axis] + corner[axis] for axis in range(3)]
        inside = (
            (index[0] >= 0)
            & (index[0] < shape[0])
            & (index[1] >= 0)
            & (index[1] < shape[1])
            & (index[2] >= 0)
            & (index[2] < shape[2])
        )
        flat = (index[0] * shape[1] + index[1]) * shape[2] + index[2]
        part = [f[..., axis] if corner[axis] else 1.0 - f[..., axis] for axis in range(3)]
        sign = [1.0 if bit else -1.0 for bit in corner]
        slopes = (sign[0] * part[1] * part[2], sign[1] * part[0] * part[2], sign[2] * part[0] * part[1])
        yield jnp.where(inside, flat, 0), inside, part[0] * part[1] * part[2], slopes


def _march(origin, direction, shape, step_mm, body, carry):
    first, count = geometry.sample_range(origin, direction, shape, step_mm)

    def step(k, carry):
        t = (first + k).astype(direction.dtype) * step_mm + 0.5 * step_mm
        position = origin[:, None, None] + t[..., None] * direction
        return body(position, t, k < count, carry)

    return lax.fori_loop(0, jnp.max(count, initial=0), step, carry)


def forward(volume, origin, direction, step_mm):
    """Sums of samples along rays (B, H, W) given in voxel indices, times `step_mm`."""
    flat = volume.reshape(-1)

    def body(position, t, active, image):
        del t
        value = sum(
            jnp.where(inside, weight * flat[index], 0.0)
            for index, inside, weight, _ in _corners(position, volume.shape)
        )
        return image + jnp.where(active, value, 0.0)

    return step_mm * _march(
        origin, direction, volume.shape, step_mm, body, jnp.zeros(direction.shape[:-1], direction.dtype)
    )


def to_rays(volume, origin, direction, cotangent, step_mm):
    """Gradients to origin (B, 3) and direction (B, H, W, 3)."""
    flat, scaled = volume.reshape(-1), (cotangent * step_mm)[..., None]

    def body(position, t, active, carry):
        d_origin, d_direction = carry
        slope = [0.0, 0.0, 0.0]
        for index, inside, _, slopes in _corners(position, volume.shape):
            value = jnp.where(inside & active, flat[index], 0.0)
            slope = [total + value * part for total, part in zip(slope, slopes)]
        # Selected, because the weights of a ray that is not finite are not.
        slope = jnp.where(active[..., None], jnp.stack(slope, -1) * scaled, 0.0)
        return d_origin + slope, d_direction + t[..., None] * slope

    start = (jnp.zeros_like(direction), jnp.zeros_like(direction))
    d_origin, d_direction = _march(origin, direction, volume.shape, step_mm, body, start)
    return jnp.sum(d_origin, (1, 2)), d_direction


def to_volume(shape, origin, direction, cotangent, step_mm):
    """Gradient to the volume of that shape, summed over views."""
    scaled = cotangent * step_mm

    def body(position, t, active, d_volume):
        del t
        for index, inside, weight, _ in _corners(position, shape):
            d_volume = d_volume.at[index].add(jnp.where(inside & active, weight * scaled, 0.0))
        return d_volume

    start = jnp.zeros(math.prod(shape), direction.dtype)
    return _march(origin, direction, shape, step_mm, body, start).reshape(shape)
