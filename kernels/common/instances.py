"""Footprints as a flat list of fixed-size tiles, worked through in chunks: the loop under the XLA backends.

Every Gaussian of every image owns a box of samples (pixels or voxels). Its box is cut into tiles of one fixed shape,
anchored at the box's first corner. Instance i of the list belongs to the Gaussian `owner` and to one of its tiles. The
list is never stored: each chunk finds its owners by a search in the cumulative counts, so memory holds one chunk, whatever
the number and the size of the Gaussians.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

CHUNK = 2048


def finite(mean, precision):
    """Means (M, D) and precisions (M, 6) with harmless values in place of Gaussians that are not finite.

    Such Gaussians own no tiles, but the idle lanes of the last chunk compute with some owner, and 0 * nan is nan. Call it
    after the boxes are known: these values have a footprint.
    """
    usable = jnp.all(jnp.isfinite(mean), -1, keepdims=True) & jnp.all(jnp.isfinite(precision), -1, keepdims=True)
    return jnp.where(usable, mean, 0.0), jnp.where(usable, precision, 1.0)


def tile_counts(low, high, tile):
    """Tiles per axis (M, D) of integer boxes [low, high] (both inclusive); 0 on every axis where a box is empty."""
    extent = high - low + 1
    counts = -(-extent // jnp.asarray(tile, extent.dtype))
    return jnp.where(jnp.any(extent <= 0, -1, keepdims=True), 0, counts)


def for_each_chunk(counts, low, tile, body, carry):
    """Runs `carry = body(owner, corner, valid, carry)` over all instances, CHUNK at a time.

    Args:
      counts: (M, D) int32, tiles per axis of each Gaussian.
      low: (M, D) int32, first corner of each box.
      tile: D static sizes.
      body: receives owner (CHUNK,), corner (CHUNK, D) of the tile, valid (CHUNK,) and the carry.
    """
    dims = len(tile)
    per_gaussian = jnp.prod(counts, -1)
    ends = jnp.cumsum(per_gaussian)
    total = ends[-1]

    def step(chunk, carry):
        index = chunk * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
        valid = index < total
        owner = jnp.minimum(jnp.searchsorted(ends, index, side="right"), ends.shape[0] - 1).astype(jnp.int32)
        rest = jnp.where(valid, index - (ends - per_gaussian)[owner], 0)
        position = []
        for axis in reversed(range(dims)):
            n = jnp.maximum(counts[owner, axis], 1)
            position.append(rest % n)
            rest = rest // n
        corner = low[owner] + jnp.stack(position[::-1], -1) * jnp.asarray(np.array(tile), jnp.int32)
        return body(owner, corner, valid, carry)

    return lax.fori_loop(0, (total + CHUNK - 1) // CHUNK, step, carry)


def _window_numbers(dims):
    # Images are (B, *spatial); a window lies in one image, so the batch axis is inserted (scatter) or collapsed (gather).
    window = tuple(range(1, dims + 1))
    scatter = lax.ScatterDimensionNumbers(
        update_window_dims=window, inserted_window_dims=(0,), scatter_dims_to_operand_dims=tuple(range(dims + 1))
    )
    gather = lax.GatherDimensionNumbers(
        offset_dims=window, collapsed_slice_dims=(0,), start_index_map=tuple(range(dims + 1))
    )
    return scatter, gather


def add_windows(images, image_index, corner, windows):
    """Adds windows (CHUNK, *tile) into images (B, *spatial) at (image_index, corner); windows must lie inside."""
    scatter, _ = _window_numbers(corner.shape[-1])
    index = jnp.concatenate([image_index[:, None], corner], -1)
    return lax.scatter_add(images, index, windows, scatter, mode=lax.GatherScatterMode.CLIP)


def read_windows(images, image_index, corner, tile):
    """Windows (CHUNK, *tile) of images (B, *spatial) at (image_index, corner)."""
    _, gather = _window_numbers(corner.shape[-1])
    index = jnp.concatenate([image_index[:, None], corner], -1)
    return lax.gather(images, index, gather, (1, *tile), mode=lax.GatherScatterMode.CLIP)
