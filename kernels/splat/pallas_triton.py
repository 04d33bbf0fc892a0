"""`splat` and its gradient on a GPU: two Pallas kernels, compiled by Triton.

Forward: one program per image tile. Every (Gaussian, tile) pair that can be non-zero is an instance. Their number depends on the
data, so a list of all of them has no static size. `add_tiles` takes them in chunks of fixed size instead, sorts each chunk by tile
and launches one kernel that adds the chunk to the images in place. So any number of instances is drawn in fixed memory; usually the
first chunk holds all of them.

Backward: one program per Gaussian, or several with a fixed share of its pixels each. It visits the Gaussian's box and keeps all
sums of the gradients in registers. That needs no instances, no sort and no sum over instances, which in XLA is a scatter; on a GPU
a scatter adds atomically, in no fixed order. Nothing here uses atomics, so equal inputs give equal bits.

The forms, and the quantities of each Gaussian in plain JAX, are those of footprint.py.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from kernels.common import dispatch
from kernels.common import support
from kernels.common import triton_tiles
from kernels.common.types import Array
from kernels.splat import footprint

TILE = (16, 16)
"""Rows and columns of pixels of a forward program. Chosen by hand: larger tiles need more registers and evaluate more pixels in
vain, smaller ones have more instances."""
BLOCK = (8, 8)
"""Rows and columns of pixels that a backward program evaluates at a time. Chosen by hand, for the same reasons."""


def _draw(across, tiles, starts, owners, table, images, out):
    """Adds the Gaussians of one tile to it; the loop keeps one sum per pixel and place in a group."""
    t = pl.program_id(0)
    tile = lax.rem(t, jnp.int32(tiles))
    pixels = lambda tile, size: (tile * size + lax.broadcasted_iota(jnp.int32, (size,), 0)).astype(jnp.float32)
    v = pixels(lax.div(tile, jnp.int32(across)), TILE[0])[:, None, None]
    u = pixels(lax.rem(tile, jnp.int32(across)), TILE[1])[None, :, None]
    first, end = starts[t], starts[t + 1]

    def step(i, total):
        base = first + i * triton_tiles.GROUP
        live = base + lax.broadcasted_iota(jnp.int32, (triton_tiles.GROUP,), 0) < end
        owner = plt.load(owners.at[pl.ds(base, triton_tiles.GROUP)], mask=live, other=0)
        field = lambda f: plt.load(table.at[owner * 16 + f], mask=live, other=0.0)[None, None, :]
        amplitude, u0, u1, v0, v1, ss, st2, tt, sz2, tz2, nss, nst2, ntt = map(field, range(13))
        s, t = (u - u0) - u1, (v - v0) - v1
        alpha = jnp.maximum((1.0 + t * (tz2 + t * tt)) + s * ((sz2 + t * st2) + s * ss), footprint.ALPHA_MIN)
        root = lax.rsqrt(alpha)
        q = (t * t * ntt + s * (t * nst2 + s * nss)) * (root * root)
        return total + amplitude * root * support.weight(q)

    total = lax.fori_loop(
        0,
        lax.div(end - first + (triton_tiles.GROUP - 1), jnp.int32(triton_tiles.GROUP)),
        step,
        jnp.zeros((*TILE, triton_tiles.GROUP), jnp.float32),
    )
    out[...] = images[...] + jnp.sum(total, 2)


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
      NotImplementedError: the device is not a GPU, or an array is not float32.
    """
    arrays = (density, mean, precision, intrinsics)
    dispatch.require("gpu", arrays, interpret)
    batch, n = density.shape[:-1], density.shape[-1]
    if density.size == 0 or height * width == 0:
        return jnp.zeros((*batch, height, width), jnp.float32)
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    intrinsics = intrinsics.reshape(-1, 4)
    b = intrinsics.shape[0]
    g = footprint.prepare(mean, precision, intrinsics, n, height, width)
    fields = footprint.draw_fields(g, density)
    table = jnp.pad(jnp.stack(fields, -1), ((0, 0), (0, 16 - len(fields)))).reshape(-1)
    down, across = pl.cdiv(height, TILE[0]), pl.cdiv(width, TILE[1])
    kernel = functools.partial(_draw, across, down * across)

    def draw(starts, owners, images):
        return triton_tiles.draw_tiles(kernel, "splat_forward", starts, owners, table, images, interpret)

    first, last = (jnp.stack(pair, -1) for pair in zip(g.rows, g.columns))
    images = jnp.zeros((b * down * across, *TILE), jnp.float32)
    images = triton_tiles.add_tiles(first, last, TILE, (down, across), n, draw, images)
    images = images.reshape(b, down, across, *TILE).transpose(0, 1, 3, 2, 4)
    images = images.reshape(b, down * TILE[0], across * TILE[1])[:, :height, :width]
    images = images * footprint.ray_lengths(intrinsics, height, width)
    return images.reshape(*batch, height, width)


def _gather(split, height, width, n, boxes, table, cotangent, out):
    """The sums of splat.cc's Gather over every `split`-th block of a Gaussian's box."""
    program = pl.program_id(0)
    i, share = lax.div(program, jnp.int32(split)), lax.rem(program, jnp.int32(split))
    v_first, v_last, u_first, u_last = (boxes[i * 4 + k] for k in range(4))
    u0, u1, v0, v1, *fields = (table[i * 17 + k] for k in range(17))
    pixels = BLOCK[0] * BLOCK[1]
    lane = lax.broadcasted_iota(jnp.int32, (pixels,), 0)
    row, column = lax.div(lane, jnp.int32(BLOCK[1])), lax.rem(lane, jnp.int32(BLOCK[1]))
    image = lax.div(i, jnp.int32(n)) * (height * width)
    down, across = (
        lax.div(last - first + size, jnp.int32(size))
        for first, last, size in ((v_first, v_last, BLOCK[0]), (u_first, u_last, BLOCK[1]))
    )

    def step(k, sums):
        block = share + k * split
        v = v_first + lax.div(block, across) * BLOCK[0] + row
        u = u_first + lax.rem(block, across) * BLOCK[1] + column
        inside = (v <= v_last) & (u <= u_last)
        c = plt.load(cotangent.at[image + v * width + u], mask=inside, other=0.0)
        s, t = (u.astype(jnp.float32) - u0) - u1, (v.astype(jnp.float32) - v0) - v1
        terms = footprint.terms(s, t, c, *fields)
        return tuple(total + term for total, term in zip(sums, terms))

    blocks = jnp.where((v_last < v_first) | (u_last < u_first), 0, down * across)
    steps = lax.div(blocks - share + (split - 1), jnp.int32(split))
    sums = lax.fori_loop(0, steps, step, tuple(jnp.zeros((pixels,), jnp.float32) for _ in range(footprint.SUMS)))
    for k, total in enumerate(sums):
        out[program * footprint.SUMS + k] = jnp.sum(total)


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
    dispatch.require("gpu", arrays, interpret)
    shapes = [a.shape for a in arrays[:4]]
    (height, width), n = cotangent.shape[-2:], density.shape[-1]
    if density.size == 0 or cotangent.size == 0:
        return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes[: 3 + to_camera])
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    intrinsics = intrinsics.reshape(-1, 4)
    m = density.shape[0]
    g = footprint.prepare(mean, precision, intrinsics, n, height, width)
    fields = footprint.gather_fields(g, mean, intrinsics, n)
    table = jnp.stack(fields, -1).reshape(-1)
    boxes = jnp.stack((*g.rows, *g.columns), -1).reshape(-1)
    kernel = functools.partial(_gather, triton_tiles.shares(m), height, width, n)
    sums = triton_tiles.sum_boxes(
        kernel, "splat_backward", m, footprint.SUMS, boxes, table, cotangent.reshape(-1), interpret
    ).T
    parts = footprint.gradients(g, sums, density, mean, precision, intrinsics, n)
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes[: 3 + to_camera]))
