"""The loop of the XLA backends: a flat list of fixed-size tiles, processed in chunks.

Every Gaussian of every image owns a box of samples (pixels or voxels). The box is cut into tiles of one fixed shape, starting at
its first corner. Instance i of the list is one tile of the Gaussian `owner`. The list is never stored: each chunk finds its owners
by a search in the cumulative counts, so memory holds one chunk, whatever the number and size of the Gaussians.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float
from jaxtyping import Int

from kernels.common.types import Array

CHUNK = 2048
"""Number of instances processed at a time. Chosen by hand: a smaller chunk costs more iterations, a larger one more memory, and
more idle lanes in the last chunk."""


def finite(
    mean: Float[Array, "m d"], precision: Float[Array, "m 6"]
) -> tuple[Float[Array, "m d"], Float[Array, "m 6"]]:
    """Replaces means and precisions of Gaussians that are not finite by harmless values.

    Such Gaussians own no tiles, but the idle lanes of the last chunk compute with some owner, and 0 * nan is nan. Call it
    after computing the boxes, because these values have a footprint.
    """
    usable = jnp.all(jnp.isfinite(mean), -1, keepdims=True) & jnp.all(jnp.isfinite(precision), -1, keepdims=True)
    return jnp.where(usable, mean, 0.0), jnp.where(usable, precision, 1.0)


def tile_counts(low: Int[Array, "m d"], high: Int[Array, "m d"], tile: Sequence[int]) -> Int[Array, "m d"]:
    """Number of tiles per axis of integer boxes [low, high] (both inclusive); 0 on every axis for an empty box."""
    extent = high - low + 1
    counts = -(-extent // jnp.asarray(tile, extent.dtype))
    return jnp.where(jnp.any(extent <= 0, -1, keepdims=True), 0, counts)


def for_each_chunk(
    counts: Int[Array, "m d"], low: Int[Array, "m d"], tile: Sequence[int], body: Callable[..., Any], carry: Any
) -> Any:
    """Runs `carry = body(owner, corner, valid, carry)` over all instances, CHUNK at a time.

    Args:
      counts: number of tiles per axis of each Gaussian.
      low: first corner of each box.
      tile: d static sizes.
      body: receives owner (CHUNK,), the tile's corner (CHUNK, d), valid (CHUNK,) and the carry.
      carry: its first value.
    Returns:
      The last carry.
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
    # A window lies in one of the images (B, *spatial), so the batch axis is inserted (scatter) or collapsed (gather).
    window = tuple(range(1, dims + 1))
    scatter = lax.ScatterDimensionNumbers(
        update_window_dims=window, inserted_window_dims=(0,), scatter_dims_to_operand_dims=tuple(range(dims + 1))
    )
    gather = lax.GatherDimensionNumbers(
        offset_dims=window, collapsed_slice_dims=(0,), start_index_map=tuple(range(dims + 1))
    )
    return scatter, gather


def add_windows(
    images: Float[Array, " images *spatial"],
    image_index: Int[Array, " chunk"],
    corner: Int[Array, "chunk d"],
    windows: Float[Array, " chunk *tile"],
) -> Float[Array, " images *spatial"]:
    """Adds windows to images at (image_index, corner); windows must lie inside."""
    scatter, _ = _window_numbers(corner.shape[-1])
    index = jnp.concatenate([image_index[:, None], corner], -1)
    return lax.scatter_add(images, index, windows, scatter, mode=lax.GatherScatterMode.CLIP)


def read_windows(
    images: Float[Array, " images *spatial"],
    image_index: Int[Array, " chunk"],
    corner: Int[Array, "chunk d"],
    tile: Sequence[int],
) -> Float[Array, " chunk *tile"]:
    """Windows of images at (image_index, corner), of the size of `tile`."""
    _, gather = _window_numbers(corner.shape[-1])
    index = jnp.concatenate([image_index[:, None], corner], -1)
    return lax.gather(images, index, gather, (1, *tile), mode=lax.GatherScatterMode.CLIP)
