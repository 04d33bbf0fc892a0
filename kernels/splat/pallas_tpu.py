"""`splat` and its gradient on a TPU: two Pallas kernels, compiled by Mosaic.

A tile is TILE x TILE px, so that its pixels in row-major order are the lanes of one vector register, VECTOR. The image, or a
band of whole tile rows of a large image, stays in fast memory while all Gaussians pass, BLOCK of them per program. A core runs its
programs one after another, so a forward program adds each Gaussian to the tiles of its box in place, and a backward program visits
the same tiles and keeps a Gaussian's sums in registers. There is no sort, no scatter and no list that grows with Gaussians times
pixels, and equal inputs give equal bits. The numbers of a Gaussian are read as scalars. Interleaving several Gaussians would not
help, because all of them would take as long as the one with the most tiles.

The forms, and the quantities of each Gaussian, are those of footprint.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels.common import dispatch
from kernels.common import support
from kernels.common.types import Array
from kernels.splat import footprint

TILE = 32
"""Side of a tile, px: TILE^2 is the number of elements of a VECTOR."""
VECTOR = (8, 128)
"""Shape of a TPU's float32 vector register."""
BLOCK = 128
"""Number of Gaussians per program: the sums of each are one lane of a register."""
BAND = 1024
"""Maximum number of tiles in fast memory: 4 MB, twice, because the next band is loaded meanwhile. Chosen by hand: half makes twice
as many bands of a large image, each of which all Gaussians pass; twice could exceed the memory."""

_SHIFT = TILE.bit_length() - 1
_ROWS = 16  # rows of a block's sums: footprint.SUMS, rounded up to whole registers


# Images and Gaussians in memory.


def _bands(height, width):
    """Number of bands of an image, of tile rows per band, and of tiles per row."""
    down, across = pl.cdiv(height, TILE), pl.cdiv(width, TILE)
    bands = pl.cdiv(down, max(1, BAND // across))
    return bands, pl.cdiv(down, bands), across


def _to_tiles(images):
    """Images (B, height, width) as (B, bands, tiles of a band, *VECTOR), zeros beyond the borders."""
    b, height, width = images.shape
    bands, rows, across = _bands(height, width)
    images = jnp.pad(images, ((0, 0), (0, bands * rows * TILE - height), (0, across * TILE - width)))
    images = images.reshape(b, bands, rows, TILE, across, TILE).transpose(0, 1, 2, 4, 3, 5)
    return images.reshape(b, bands, rows * across, *VECTOR)


def _from_tiles(tiles, height, width):
    """The inverse of `_to_tiles`."""
    bands, rows, across = _bands(height, width)
    images = tiles.reshape(-1, bands, rows, across, TILE, TILE).transpose(0, 1, 2, 4, 3, 5)
    return images.reshape(-1, bands * rows * TILE, across * TILE)[:, :height, :width]


def _blocks(columns, n, empty=0):
    """Columns (M,), one number per Gaussian, as (images, blocks, columns, BLOCK), padded with `empty`."""
    rows = jnp.stack(columns).reshape(len(columns), -1, n)
    # A TPU stores an array in whole groups of 8 rows anyway.
    fill = ((0, -len(columns) % 8), (0, 0), (0, -n % BLOCK))
    rows = jnp.pad(rows, fill, constant_values=empty)
    return rows.reshape(rows.shape[0], rows.shape[1], -1, BLOCK).transpose(1, 2, 0, 3)


def _launch(kernel, name, boxes, table, images, result, interpret):
    """Launches `kernel` once, with a program for each image, band and block of Gaussians.

    Args:
      kernel: (boxes, table, images, out); blocks of boxes and table hold scalars.
      boxes: (B, blocks, 8, BLOCK) int32.
      table: (B, blocks, fields, BLOCK) float32.
      images: (B, bands, tiles, *VECTOR) to read, or None: then the kernel has no such argument.
      result: shape of the result: (B, bands, tiles, *VECTOR), or (B, bands, blocks, rows, BLOCK).
    """
    gaussians = lambda a: pl.BlockSpec(
        (None, None, *a.shape[2:]), lambda i, j, k: (i, k, 0, 0), memory_space=pltpu.SMEM
    )
    band = lambda shape: pl.BlockSpec((None, None, *shape[2:]), lambda i, j, k: (i, j, 0, 0, 0))
    sums = pl.BlockSpec((None, None, None, *result[3:]), lambda i, j, k: (i, j, k, 0, 0))
    operands = [boxes, table] + ([] if images is None else [images])
    launch = pl.pallas_call(
        kernel,
        grid=(boxes.shape[0], result[1], boxes.shape[1]),
        in_specs=[gaussians(boxes), gaussians(table)] + ([] if images is None else [band(images.shape)]),
        out_specs=band(result) if images is None else sums,
        out_shape=jax.ShapeDtypeStruct(result, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=name,
        interpret=interpret,
    )
    # Mosaic counts loops in int32 only.
    with jax.enable_x64(False):
        return launch(*operands)


# Parts of both kernels.


def _pixels():
    """Row and column of each lane's pixel in its tile, float32."""
    place = lax.broadcasted_iota(jnp.int32, VECTOR, 0) * VECTOR[1] + lax.broadcasted_iota(jnp.int32, VECTOR, 1)
    return (place >> _SHIFT).astype(jnp.float32), (place & (TILE - 1)).astype(jnp.float32)


def _corner(tile):
    """The first pixel of a row or column of tiles, a scalar float32."""
    return (tile * TILE).astype(jnp.float32)


def _walk(boxes, i, top, rows, visit, carry):
    """Visits the tiles of Gaussian i of a block in a band.

    Args:
      boxes: scalars (8, BLOCK): first and last pixel row, first and last column.
      top: first tile row of the band.
      rows: number of its tile rows.
      visit: (row, column, carry) -> carry, called for each tile.
    """
    v_first, v_last, u_first, u_last = (boxes[k, i] >> _SHIFT for k in range(4))
    along = lambda row, carry: lax.fori_loop(u_first, u_last + 1, functools.partial(visit, row), carry)
    return lax.fori_loop(jnp.maximum(v_first, top), jnp.minimum(v_last + 1, top + rows), along, carry)


def _draw(rows, across, boxes, table, out):
    """Adds a block of Gaussians to a band."""
    top = pl.program_id(1) * rows
    v, u = _pixels()

    @pl.when(pl.program_id(2) == 0)
    def _():
        out[...] = jnp.zeros(out.shape, jnp.float32)

    def gaussian(i, nothing):
        amplitude, u0, u1, v0, v1, ss, st2, tt, sz2, tz2, nss, nst2, ntt = (table[f, i] for f in range(13))

        def visit(row, column, nothing):
            s, t = (u + (_corner(column) - u0)) - u1, (v + (_corner(row) - v0)) - v1
            alpha = (1.0 + t * (tz2 + t * tt)) + s * ((sz2 + t * st2) + s * ss)
            root = lax.rsqrt(jnp.maximum(alpha, footprint.ALPHA_MIN))
            q = (t * t * ntt + s * (t * nst2 + s * nss)) * (root * root)
            tile = (row - top) * across + column
            out[tile] = out[tile] + amplitude * root * support.weight(q)
            return nothing

        return _walk(boxes, i, top, rows, visit, nothing)

    lax.fori_loop(0, BLOCK, gaussian, ())


def forward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    intrinsics: Float[Array, "*batch 4"],
    height: int,
    width: int,
    *,
    interpret: bool = False,
) -> Float[Array, "*batch height width"]:
    """As `xla.forward`, float32 only.

    Args:
      interpret: run the kernel as plain JAX, on any device; slow, for tests.
    Raises:
      NotImplementedError: the device is not a TPU, or an array is not float32.
    """
    arrays = (density, mean, precision, intrinsics)
    dispatch.require("tpu", arrays, interpret)
    batch, n = density.shape[:-1], density.shape[-1]
    if density.size == 0 or height * width == 0:
        return jnp.zeros((*batch, height, width), jnp.float32)
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    intrinsics = intrinsics.reshape(-1, 4)
    g = footprint.prepare(mean, precision, intrinsics, n, height, width)
    fields = footprint.draw_fields(g, density)
    bands, rows, across = _bands(height, width)
    tiles = _launch(
        functools.partial(_draw, rows, across),
        "splat_forward",
        _blocks((*g.rows, *g.columns), n, empty=-1),
        _blocks(fields, n),
        None,
        (intrinsics.shape[0], bands, rows * across, *VECTOR),
        interpret,
    )
    length = footprint.ray_lengths(intrinsics, height, width)
    return (_from_tiles(tiles, height, width) * length).reshape(*batch, height, width)


def _gather(rows, across, boxes, table, cotangent, out):
    """The sums of a block of Gaussians over their tiles in a band, a column each."""
    top = pl.program_id(1) * rows
    v, u = _pixels()
    row_of, column_of = (lax.broadcasted_iota(jnp.int32, (_ROWS, BLOCK), axis) for axis in range(2))

    def gaussian(i, block):
        v_first, v_last, u_first, u_last = (boxes[k, i].astype(jnp.float32) for k in range(4))
        u0, u1, v0, v1, *fields = (table[f, i] for f in range(17))

        def visit(row, column, sums):
            pixel_v, pixel_u = v + _corner(row), u + _corner(column)
            # Nothing overflows inside the box; pixels outside are evaluated at its border, with a cotangent of 0.
            near_v, near_u = jnp.clip(pixel_v, v_first, v_last), jnp.clip(pixel_u, u_first, u_last)
            inside = (near_v == pixel_v) & (near_u == pixel_u)
            c = jnp.where(inside, cotangent[(row - top) * across + column], 0.0)
            terms = footprint.terms((near_u - u0) - u1, (near_v - v0) - v1, c, *fields)
            return tuple(total + term for total, term in zip(sums, terms))

        zeros = tuple(jnp.zeros(VECTOR, jnp.float32) for _ in range(footprint.SUMS))
        lanes = jnp.zeros((_ROWS, BLOCK), jnp.float32)
        for f, total in enumerate(_walk(boxes, i, top, rows, visit, zeros)):
            lanes = jnp.where(row_of == f, jnp.sum(total, 0, keepdims=True), lanes)
        return jnp.where(column_of == i, jnp.sum(lanes, 1, keepdims=True), block)

    out[...] = lax.fori_loop(0, BLOCK, gaussian, jnp.zeros((_ROWS, BLOCK), jnp.float32))


def backward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    intrinsics: Float[Array, "*batch 4"],
    cotangent: Float[Array, "*batch height width"],
    to_camera: bool = True,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "..."], ...]:
    """As `xla.backward`, float32 only; `interpret` and errors as in `forward`."""
    arrays = (density, mean, precision, intrinsics, cotangent)
    dispatch.require("tpu", arrays, interpret)
    shapes = [a.shape for a in arrays[:4]]
    (height, width), n = cotangent.shape[-2:], density.shape[-1]
    if density.size == 0 or cotangent.size == 0:
        return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes[: 3 + to_camera])
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    intrinsics = intrinsics.reshape(-1, 4)
    b = intrinsics.shape[0]
    g = footprint.prepare(mean, precision, intrinsics, n, height, width)
    fields = footprint.gather_fields(g, mean, intrinsics, n)
    bands, rows, across = _bands(height, width)
    boxes = _blocks((*g.rows, *g.columns), n, empty=-1)
    sums = _launch(
        functools.partial(_gather, rows, across),
        "splat_backward",
        boxes,
        _blocks(fields, n),
        _to_tiles(cotangent.reshape(-1, height, width)),
        (b, bands, boxes.shape[1], _ROWS, BLOCK),
        interpret,
    )
    sums = (
        jnp.sum(sums, 1)
        .transpose(2, 0, 1, 3)
        .reshape(_ROWS, b, -1)[: footprint.SUMS, :, :n]
        .reshape(footprint.SUMS, -1)
    )

    parts = footprint.gradients(g, sums, density, mean, precision, intrinsics, n)
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes[: 3 + to_camera]))
