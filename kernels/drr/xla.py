"""`drr` in plain XLA: all rays march together, one lattice step at a time; hand-written backward; any device."""

import itertools
import math

import jax.numpy as jnp
from jax import lax

from kernels.drr import geometry


def _padded(shape):
    """Sizes with a border of one voxel, so that every sample has eight neighbours."""
    return tuple(n + 2 for n in shape)


def _march(origin, direction, shape, step_mm, body, carry):
    """Runs `carry = body(corners, f, t, inside, carry)` for every lattice step of rays (B, H, W) in voxel indices.

    corners: eight (offset into the padded volume, bits) of the cell that a sample lies in, bits 1 where the corner is the
    upper one of an axis; f: place in the cell, three (B, H, W); t: distance from the source, mm; inside: bool (B, H, W).
    """
    first, count = geometry.sample_range(origin, direction, shape, step_mm)
    _, Y, Z = _padded(shape)

    def step(k, carry):
        t = (first + k).astype(direction.dtype) * step_mm + 0.5 * step_mm
        position = [origin[:, None, None, axis] + t * direction[..., axis] for axis in range(3)]
        inside, cell, f = k < count, [], []
        for p, n in zip(position, shape):
            lower = jnp.floor(p)
            inside &= (p > -1) & (p < n)
            cell.append(jnp.clip(lower + 1, 0, n).astype(jnp.int32))
            f.append(p - lower)
        start = (cell[0] * Y + cell[1]) * Z + cell[2]
        corners = [(start + (i * Y + j) * Z + k, (i, j, k)) for i, j, k in itertools.product((0, 1), repeat=3)]
        return body(corners, f, t, inside, carry)

    return lax.fori_loop(0, jnp.max(count, initial=0), step, carry)


def _weight(bits, f):
    """Trilinear weight of a corner; of the axes that `bits` and `f` name."""
    return math.prod(x if bit else 1.0 - x for bit, x in zip(bits, f))


def forward(volume, origin, direction, step_mm):
    """Line integrals (B, H, W): sums of samples along rays, times `step_mm`.

    Args:
      volume: (X, Y, Z), 1/mm; origin: (B, 3), direction: (B, H, W, 3) per mm, in voxel indices.
    """
    flat = jnp.pad(volume, 1).reshape(-1)

    def body(corners, f, t, inside, image):
        del t
        # Axis by axis, z first: a third of the products of eight weights.
        values = [flat[index] for index, _ in corners]
        for x in reversed(f):
            values = [low + x * (high - low) for low, high in zip(values[::2], values[1::2])]
        return image + jnp.where(inside, values[0], 0.0)

    start = jnp.zeros(direction.shape[:-1], direction.dtype)
    return step_mm * _march(origin, direction, volume.shape, step_mm, body, start)


def per_ray(volume, origin, direction, step_mm):
    """Line integrals (B, H, W), as `forward`, and their derivatives to each ray's own origin and direction, (B, H, W, 3) each."""
    flat = jnp.pad(volume, 1).reshape(-1)

    def body(corners, f, t, inside, carry):
        values = [flat[index] for index, _ in corners]
        slopes = []
        for axis in range(3):
            others = [i for i in range(3) if i != axis]
            signed = (
                value * (2 * bits[axis] - 1) * _weight([bits[i] for i in others], [f[i] for i in others])
                for value, (_, bits) in zip(values, corners)
            )
            # Selected, because the weights of a ray that is not finite are not.
            slopes.append(jnp.where(inside, sum(signed), 0.0))
        slope = jnp.stack(slopes, -1)
        value = sum(value * _weight(bits, f) for value, (_, bits) in zip(values, corners))
        return carry[0] + jnp.where(inside, value, 0.0), carry[1] + slope, carry[2] + t[..., None] * slope

    start = (jnp.zeros(direction.shape[:-1], direction.dtype), jnp.zeros_like(direction), jnp.zeros_like(direction))
    return tuple(step_mm * total for total in _march(origin, direction, volume.shape, step_mm, body, start))


def to_rays(volume, origin, direction, cotangent, step_mm):
    """Gradients to origin (B, 3) and direction (B, H, W, 3) from the cotangent (B, H, W) of `forward`."""
    _, by_origin, by_direction = per_ray(volume, origin, direction, step_mm)
    return jnp.sum(cotangent[..., None] * by_origin, (1, 2)), cotangent[..., None] * by_direction


def to_volume(shape, origin, direction, cotangent, step_mm):
    """Gradient to the volume of that shape, summed over views, from the cotangent (B, H, W) of `forward`."""
    scaled = cotangent * step_mm

    def body(corners, f, t, inside, d_volume):
        del t
        for index, bits in corners:
            d_volume = d_volume.at[index].add(jnp.where(inside, _weight(bits, f) * scaled, 0.0))
        return d_volume

    start = jnp.zeros(math.prod(_padded(shape)), direction.dtype)
    d_volume = _march(origin, direction, shape, step_mm, body, start)
    return d_volume.reshape(_padded(shape))[1:-1, 1:-1, 1:-1]
