"""`drr` in plain XLA: all rays march together, one lattice step at a time; hand-written backward; runs on any device."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from kernels.common.types import Array
from kernels.drr import geometry


def _padded(shape):
    """Sizes with a border of one voxel, so that every sample has eight neighbours."""
    return tuple(n + 2 for n in shape)


def _march(origin, direction, shape, step_mm, body, carry):
    """Runs `carry = body(corners, f, t, inside, carry)` for every lattice step of rays (B, H, W) in voxel indices.

    The body receives
      corners: of the cell around each sample, eight (offset into the padded volume, bits); a bit is 1 for the upper corner on
        that axis.
      f: position in the cell, three (B, H, W).
      t: distance from the source, mm.
      inside: bool (B, H, W).
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
    """Trilinear weight of a corner, over the given axes."""
    return math.prod(x if bit else 1.0 - x for bit, x in zip(bits, f))


def forward(
    volume: Float[Array, "x y z"],
    origin: Float[Array, "views 3"],
    direction: Float[Array, "views height width 3"],
    step_mm: float,
) -> Float[Array, "views height width"]:
    """Line integrals: sums of samples along rays, times `step_mm`.

    Args:
      volume: 1/mm.
      origin: of each view's rays, in voxel indices.
      direction: of each ray, in voxel indices per mm.
      step_mm: distance of samples.
    """
    flat = jnp.pad(volume, 1).reshape(-1)

    def body(corners, f, t, inside, image):
        del t
        # Axis by axis, z first, which takes a third of the products of eight weights.
        values = [flat[index] for index, _ in corners]
        for x in reversed(f):
            values = [low + x * (high - low) for low, high in zip(values[::2], values[1::2])]
        return image + jnp.where(inside, values[0], 0.0)

    start = jnp.zeros(direction.shape[:-1], direction.dtype)
    return step_mm * _march(origin, direction, volume.shape, step_mm, body, start)


def per_ray(
    volume: Float[Array, "x y z"],
    origin: Float[Array, "views 3"],
    direction: Float[Array, "views height width 3"],
    step_mm: float,
) -> tuple[
    Float[Array, "views height width"], Float[Array, "views height width 3"], Float[Array, "views height width 3"]
]:
    """Line integrals, as by `forward`, and their derivatives with respect to each ray's own origin and direction."""
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
            # jnp.where, because the weights of a ray that is not finite are not finite either.
            slopes.append(jnp.where(inside, sum(signed), 0.0))
        slope = jnp.stack(slopes, -1)
        value = sum(value * _weight(bits, f) for value, (_, bits) in zip(values, corners))
        return carry[0] + jnp.where(inside, value, 0.0), carry[1] + slope, carry[2] + t[..., None] * slope

    start = (jnp.zeros(direction.shape[:-1], direction.dtype), jnp.zeros_like(direction), jnp.zeros_like(direction))
    image, by_origin, by_direction = _march(origin, direction, volume.shape, step_mm, body, start)
    return step_mm * image, step_mm * by_origin, step_mm * by_direction


def to_volume(
    shape: Sequence[int],
    origin: Float[Array, "views 3"],
    direction: Float[Array, "views height width 3"],
    cotangent: Float[Array, "views height width"],
    step_mm: float,
) -> Float[Array, "x y z"]:
    """Gradient to the volume of that shape, summed over views, from the cotangent of `forward`."""
    scaled = cotangent * step_mm

    def body(corners, f, t, inside, d_volume):
        del t
        for index, bits in corners:
            d_volume = d_volume.at[index].add(jnp.where(inside, _weight(bits, f) * scaled, 0.0))
        return d_volume

    start = jnp.zeros(math.prod(_padded(shape)), direction.dtype)
    d_volume = _march(origin, direction, shape, step_mm, body, start)
    return d_volume.reshape(_padded(shape))[1:-1, 1:-1, 1:-1]
