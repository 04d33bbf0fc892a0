"""`voxelize` in plain XLA: bricks, window scatter, hand-written backward; runs on any device."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from jaxtyping import Int32

from kernels.common import exact
from kernels.common import instances
from kernels.common import support
from kernels.common import symmetric
from kernels.common.types import Array

BRICK = (4, 4, 8)
"""Voxels per axis of a tile. Chosen by hand: larger tiles make larger scatters and evaluate more voxels in vain."""


def voxel_boxes(
    mean: Float[Array, "m 3"], precision: Float[Array, "m 6"], shape: Sequence[int]
) -> tuple[Int32[Array, "m 3"], Int32[Array, "m 3"]]:
    """First and last voxel of the region q < 16, clipped to the grid; last < first if there is none."""
    covariance = symmetric.inverse(precision)
    half = support.SIGMA_MAX * jnp.sqrt(jnp.maximum(covariance[..., np.array([0, 3, 5])], 0.0))
    size = jnp.asarray(np.array(shape), mean.dtype)
    low = jnp.clip(jnp.ceil(mean - half - exact.BOX_MARGIN), 0, size).astype(jnp.int32)
    high = jnp.clip(jnp.floor(mean + half + exact.BOX_MARGIN), -1, size - 1).astype(jnp.int32)
    shown = (symmetric.is_positive(precision) & jnp.all(jnp.isfinite(mean), -1))[..., None]
    return jnp.where(shown, low, 0), jnp.where(shown, high, -1)


def _pairs(owner, corner, mean, precision):
    """Offsets r, K r and q of a chunk of bricks, each (CHUNK, *BRICK)."""
    m, K = mean[owner], precision[owner]
    offsets = np.meshgrid(*[np.arange(n) for n in BRICK], indexing="ij")
    start = corner.astype(m.dtype) - m
    r = [start[:, axis, None, None, None] + offsets[axis].astype(m.dtype) for axis in range(3)]
    kxx, kxy, kxz, kyy, kyz, kzz = (K[:, i, None, None, None] for i in range(6))
    Kr = [
        kxx * r[0] + kxy * r[1] + kxz * r[2],
        kxy * r[0] + kyy * r[1] + kyz * r[2],
        kxz * r[0] + kyz * r[1] + kzz * r[2],
    ]
    return r, Kr, r[0] * Kr[0] + r[1] * Kr[1] + r[2] * Kr[2]


def forward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    shape: Sequence[int],
) -> Float[Array, "*batch x y z"]:
    """As `oracle.voxelize`, float32 or float64."""
    batch, n = density.shape[:-1], density.shape[-1]
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    if density.size == 0:
        return jnp.zeros((*batch, *shape), mean.dtype)
    low, high = voxel_boxes(mean, precision, shape)
    mean, precision = instances.finite(mean, precision)

    def body(owner, corner, valid, volumes):
        _, _, q = _pairs(owner, corner, mean, precision)
        values = jnp.where(valid, density[owner], 0.0)[:, None, None, None] * support.weight(q)
        return instances.add_windows(volumes, owner // n, corner, values)

    volumes = jnp.zeros((density.shape[0] // n, *(size + b for size, b in zip(shape, BRICK))), mean.dtype)
    volumes = instances.for_each_chunk(instances.tile_counts(low, high, BRICK), low, BRICK, body, volumes)
    return volumes[:, : shape[0], : shape[1], : shape[2]].reshape(*batch, *shape)


def backward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    cotangent: Float[Array, "*batch x y z"],
) -> tuple[Float[Array, "..."], ...]:
    """Gradients to density, mean and precision: dv/drho = w; dv/dm = -2 rho w' K r; dv/dK = rho w' r r' (w' = dw/dq)."""
    shape, shapes, n = cotangent.shape[-3:], (density.shape, mean.shape, precision.shape), density.shape[-1]
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    if density.size == 0:
        return tuple(jnp.zeros(s, mean.dtype) for s in shapes)
    low, high = voxel_boxes(mean, precision, shape)
    mean, precision = instances.finite(mean, precision)
    cotangent = jnp.pad(cotangent.reshape(-1, *shape), ((0, 0), *((0, b) for b in BRICK)))

    def body(owner, corner, valid, sums):
        r, Kr, q = _pairs(owner, corner, mean, precision)
        g = jnp.where(valid[:, None, None, None], instances.read_windows(cotangent, owner // n, corner, BRICK), 0.0)
        w, dw = support.weight_and_slope(q)
        slope = g * dw * density[owner][:, None, None, None]
        terms = [
            g * w,
            -2.0 * slope * Kr[0],
            -2.0 * slope * Kr[1],
            -2.0 * slope * Kr[2],
            slope * r[0] * r[0],
            2.0 * slope * r[0] * r[1],
            2.0 * slope * r[0] * r[2],
            slope * r[1] * r[1],
            2.0 * slope * r[1] * r[2],
            slope * r[2] * r[2],
        ]
        # Idle lanes compute with some owner, and 0 * nan is nan.
        terms = jnp.stack([jnp.sum(term, (1, 2, 3)) for term in terms], -1)
        return sums.at[owner].add(jnp.where(valid[:, None], terms, 0.0))

    sums = instances.for_each_chunk(
        instances.tile_counts(low, high, BRICK), low, BRICK, body, jnp.zeros((density.shape[0], 10), mean.dtype)
    )
    return tuple(part.reshape(s) for part, s in zip((sums[:, 0], sums[:, 1:4], sums[:, 4:]), shapes))
