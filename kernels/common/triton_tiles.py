"""Tiles of images and volumes for Pallas's Triton backend: instances drawn in chunks, sums over boxes."""

import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Int32

from kernels.common.types import Array

GROUP = 8
"""Number of Gaussians that a forward program evaluates at a time. With 16, too few programs fit the registers."""

CHUNK = 1 << 18
"""Maximum number of instances drawn by one launch. Chosen by hand: 2 MB of them, with enough work to hide the cost of a launch."""

COUNTABLE = 2**31 - 1
"""Maximum number of instances that int32 can count."""

PROGRAMS = 4096
"""Number of backward programs among which few Gaussians are divided, to fill a GPU. Chosen by hand."""

MOST_SHARES = 32
"""Maximum number of backward programs per Gaussian. Chosen by hand."""

_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def shares(m: int) -> int:
    """Number of backward programs per Gaussian, for m Gaussians."""
    return max(1, min(MOST_SHARES, PROGRAMS // m))


def add_tiles(
    first: Int32[Array, "m d"],
    last: Int32[Array, "m d"],
    tile: Sequence[int],
    across: Sequence[int],
    n: int,
    draw: Callable[[Array, Array, Array], Array],
    images: Float[Array, " tiles *tile"],
) -> Float[Array, " tiles *tile"]:
    """Adds all Gaussians to all images, tile by tile.

    Args:
      first, last: box of samples of each Gaussian, both ends included and inside the image; empty where last < first on an
        axis.
      tile: d static sizes.
      across: d static numbers of tiles per image.
      n: number of Gaussians per image; Gaussian i belongs to image i // n.
      draw: (starts, owners, images) -> images adds one chunk: `owners` (chunk + GROUP,) int32 are Gaussians sorted by tile,
        those of tile t (of all images) from starts[t] to starts[t + 1], in ascending order.
      images: the tiles of all images before.
    Returns:
      The images after the last chunk.
    """
    # As many Gaussians at a time as are sure to have a countable number of instances; usually all of them.
    most = (COUNTABLE - CHUNK) // math.prod(across)
    for begin in range(0, first.shape[0], most):
        part = slice(begin, begin + most)
        images = _add_some(first[part], last[part], begin, tile, across, n, draw, images)
    return images


def _add_some(first, last, begin, tile, across, n, draw, images):
    """`add_tiles` for the Gaussians from number `begin` on."""
    m, dims, tiles = first.shape[0], len(tile), images.shape[0]
    corner = [first[:, axis] // tile[axis] for axis in range(dims)]
    empty = jnp.any(last < first, -1)
    counts = [jnp.where(empty, 0, last[:, axis] // tile[axis] - corner[axis] + 1) for axis in range(dims)]
    per_gaussian = math.prod(counts)
    ends = jnp.cumsum(per_gaussian, dtype=jnp.int32)
    chunk = min(CHUNK, pl.next_power_of_2(4 * m))
    # An unrolled search is a few kernels; the default is a loop with one launch per step.
    search = functools.partial(jnp.searchsorted, method="scan_unrolled")

    def step(k, images):
        index = k * chunk + jnp.arange(chunk, dtype=jnp.int32)
        owner = jnp.minimum(search(ends, index, side="right"), m - 1).astype(jnp.int32)
        rest = index - (ends - per_gaussian)[owner]
        position: list[Any] = [None] * dims
        for axis in reversed(range(dims)):
            count = jnp.maximum(counts[axis][owner], 1)
            position[axis] = corner[axis][owner] + rest % count
            rest = rest // count
        owner = owner + begin
        key = owner // n
        for axis in range(dims):
            key = key * across[axis] + position[axis]
        key = jnp.where(index < ends[-1], key, tiles)
        key, owner = lax.sort((key, owner), num_keys=1, is_stable=True)
        starts = search(key, jnp.arange(tiles + 1, dtype=jnp.int32)).astype(jnp.int32)
        # A program reads whole groups, and a group may begin at the last instance.
        return draw(starts, jnp.pad(owner, (0, GROUP)), images)

    return lax.fori_loop(0, (ends[-1] + (chunk - 1)) // chunk, step, images)


def draw_tiles(
    kernel: Callable[..., None],
    name: str,
    starts: Int[Array, " starts"],
    owners: Int[Array, " owners"],
    table: Float[Array, " table"],
    images: Float[Array, " tiles *tile"],
    interpret: bool,
) -> Float[Array, " tiles *tile"]:
    """Launches `kernel` once, with a program per tile.

    Args:
      kernel: (starts, owners, table, images, out), all but the last two whole; it adds its Gaussians to its tile.
      name: of the compiled kernel.
      starts, owners, images: as `add_tiles` passes them to `draw`.
      table: 16 numbers of each Gaussian.
      interpret: run the kernel as plain JAX.
    Returns:
      The new images, in the buffer of the old.
    """
    block = pl.BlockSpec((None, *images.shape[1:]), lambda t: (t, *[0] * (images.ndim - 1)))
    return pl.pallas_call(
        kernel,
        grid=(images.shape[0],),
        in_specs=[_WHOLE, _WHOLE, _WHOLE, block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(images.shape, images.dtype),
        input_output_aliases={3: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name=name,
        interpret=interpret,
    )(starts, owners, table, images)


def sum_boxes(
    kernel: Callable[..., None],
    name: str,
    m: int,
    sums: int,
    boxes: Int[Array, " boxes"],
    table: Float[Array, " table"],
    cotangent: Float[Array, " samples"],
    interpret: bool,
) -> Float[Array, "m sums"]:
    """Launches `kernel` once, with `shares(m)` programs for each of m Gaussians.

    Args:
      kernel: (boxes, table, cotangent, out), all whole and flat; program i writes `sums` numbers at i * sums.
      name: of the compiled kernel.
      m: number of Gaussians.
      sums: numbers per Gaussian.
      boxes, table, cotangent: what the kernel reads.
      interpret: run the kernel as plain JAX.
    Returns:
      The numbers of each Gaussian, added up over its programs.
    """
    parts = pl.pallas_call(
        kernel,
        grid=(m * shares(m),),
        in_specs=[_WHOLE] * 3,
        out_specs=_WHOLE,
        out_shape=jax.ShapeDtypeStruct((m * shares(m) * sums,), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        name=name,
        interpret=interpret,
    )(boxes, table, cotangent)
    return jnp.sum(parts.reshape(m, shares(m), sums), 1)
