"""Tiles of an image or a volume under Pallas's Triton backend: instances drawn in chunks, sums over boxes."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

GROUP = 8  # Gaussians that a forward program evaluates at a time; with 16, too few programs fit the registers
CHUNK = 1 << 18  # most instances drawn by one launch: 2 MB of them, and work enough to hide what a launch costs
COUNTABLE = 2**31 - 1  # most instances that int32 can count
PROGRAMS = 4096  # a few large Gaussians are shared out over so many backward programs, to fill a GPU

_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


# What the voxeliser's backend needs too.


def shares(m):
    """Backward programs per Gaussian, where there are m."""
    return max(1, min(32, PROGRAMS // m))


def add_tiles(first, last, tile, across, n, draw, images):
    """Adds all Gaussians to all images, tile by tile.

    Args:
      first, last: (M, D) int32, the box of samples of each Gaussian, both ends included and inside the image; empty where
        last < first on an axis.
      tile: D static sizes.
      across: D static numbers of tiles per image.
      n: Gaussians per image; Gaussian i belongs to image i // n.
      draw: (starts, owners, images) -> images adds one chunk: `owners` (chunk + GROUP,) int32 are Gaussians sorted by tile,
        those of tile t (of all images) from starts[t] to starts[t + 1], in ascending order.
      images: (tiles of all images, *tile), the value to begin with.
    Returns:
      The images after the last chunk.
    """
    # As many Gaussians at a time as surely have a countable number of instances: mostly all of them.
    most = (COUNTABLE - CHUNK) // math.prod(across)
    for begin in range(0, first.shape[0], most):
        part = slice(begin, begin + most)
        images = _add_some(first[part], last[part], begin, tile, across, n, draw, images)
    return images


def _add_some(first, last, begin, tile, across, n, draw, images):
    """`add_tiles` of Gaussians from number `begin` on."""
    m, dims, tiles = first.shape[0], len(tile), images.shape[0]
    corner = [first[:, axis] // tile[axis] for axis in range(dims)]
    empty = jnp.any(last < first, -1)
    counts = [jnp.where(empty, 0, last[:, axis] // tile[axis] - corner[axis] + 1) for axis in range(dims)]
    per_gaussian = math.prod(counts)
    ends = jnp.cumsum(per_gaussian, dtype=jnp.int32)
    chunk = min(CHUNK, pl.next_power_of_2(4 * m))
    # Unrolled, a search is a few kernels; by default it is a loop of one launch per step.
    search = functools.partial(jnp.searchsorted, method="scan_unrolled")

    def step(k, images):
        index = k * chunk + jnp.arange(chunk, dtype=jnp.int32)
        owner = jnp.minimum(search(ends, index, side="right"), m - 1).astype(jnp.int32)
        rest = index - (ends - per_gaussian)[owner]
        position = [None] * dims
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
        # A program reads whole groups, and may begin one at the last instance.
        return draw(starts, jnp.pad(owner, (0, GROUP)), images)

    return lax.fori_loop(0, (ends[-1] + (chunk - 1)) // chunk, step, images)


def draw_tiles(kernel, name, starts, owners, table, images, interpret):
    """One launch of `kernel`, a program per tile.

    Args:
      kernel: (starts, owners, table, images, out), all but the last two whole; it adds its Gaussians to its tile.
      name: of the compiled kernel.
      starts, owners, images: as `add_tiles` gives them.
      table: (M * 16,) float32, what the kernel reads of each Gaussian.
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


def sum_boxes(kernel, name, m, sums, boxes, table, cotangent, interpret):
    """One launch of `kernel`, `shares(m)` programs for each of m Gaussians.

    Args:
      kernel: (boxes, table, cotangent, out), all whole and flat; program i writes `sums` numbers at i * sums.
      name: of the compiled kernel.
    Returns:
      (m, sums), the programs of a Gaussian added up.
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
