"""`voxelize` and its gradient on a GPU: two Pallas kernels, compiled by Triton.

They are built like those of `splat`, with bricks of voxels in place of tiles of pixels: kernels/splat/pallas_triton.py explains
how any number of (Gaussian, brick) pairs is drawn in fixed memory, and why nothing needs atomics. As in voxelize.cc the quadratic
form is a sum of squares, q = a dx^2 + b (dy + yx dx)^2 + k_zz (dz + zx dx + zy dy)^2, whose terms cannot cancel.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from kernels.common import dispatch
from kernels.common import exact
from kernels.common import support
from kernels.common import symmetric
from kernels.common import triton_tiles
from kernels.common.types import Array

BRICK = (8, 8, 4)
"""Voxels per axis of a forward program. Chosen by hand, as `TILE` of splat's."""
BLOCK = (4, 4, 4)
"""Voxels per axis that a backward program evaluates at a time. Chosen by hand."""
SUMS = 10
"""Number of sums over its voxels in which a Gaussian's gradients are linear."""


def _prepare(mean, precision, shape):
    """Fields (M, 9) of every Gaussian (zeros where it is not drawn), and its first and last voxels (M, 3)."""
    xx, _, xz, yy, yz, zz = precision.T
    (a_xx, a_xy, _, a_yy, _, a_zz), det = exact.adjugate(precision)
    a, b = det / a_xx, a_xx / zz
    halves = [support.SIGMA_MAX * jnp.sqrt(minor / det) for minor in (a_xx, a_yy, a_zz)]
    fields = (*mean.T, a, b, -a_xy / a_xx, xz / zz, yz / zz, zz)
    drawn = exact.usable((zz > 0, a_xx > 0, det > 0, xx + yy + zz < symmetric.TRACE_MAX), *fields, *halves)
    fields, halves = ([jnp.where(drawn, value, 0.0) for value in values] for values in (fields, halves))
    boxes = [exact.box(m - half, m + half, size) for m, half, size in zip(fields[:3], halves, shape)]
    first, last = (jnp.stack(ends, -1) for ends in zip(*boxes))
    return jnp.stack(fields, -1), first, jnp.where(drawn[:, None], last, -1)


def _draw(across, starts, owners, table, volumes, out):
    """Adds the Gaussians of one brick to it; the loop keeps one sum per voxel and place in a group."""
    t = pl.program_id(0)
    index, rest = [], t
    for count, size in zip(across[::-1], BRICK[::-1]):
        corner = lax.rem(rest, jnp.int32(count)) * size
        rest = lax.div(rest, jnp.int32(count))
        index.append((corner + lax.broadcasted_iota(jnp.int32, (size,), 0)).astype(jnp.float32))
    z, y, x = index[0][None, None, :, None], index[1][None, :, None, None], index[2][:, None, None, None]
    first, end = starts[t], starts[t + 1]

    def step(i, total):
        base = first + i * triton_tiles.GROUP
        live = base + lax.broadcasted_iota(jnp.int32, (triton_tiles.GROUP,), 0) < end
        owner = plt.load(owners.at[pl.ds(base, triton_tiles.GROUP)], mask=live, other=0)
        field = lambda f: plt.load(table.at[owner * 16 + f], mask=live, other=0.0)[None, None, None, :]
        mx, my, mz, a, b, yx, zx, zy, zz, density = map(field, range(10))
        dx, dy, dz = x - mx, y - my, z - mz
        ey, ez = dy + yx * dx, dz + (zx * dx + zy * dy)
        return total + density * support.weight(a * dx * dx + b * ey * ey + zz * ez * ez)

    zeros = jnp.zeros((*BRICK, triton_tiles.GROUP), jnp.float32)
    total = lax.fori_loop(
        0, lax.div(end - first + (triton_tiles.GROUP - 1), jnp.int32(triton_tiles.GROUP)), step, zeros
    )
    out[...] = volumes[...] + jnp.sum(total, 3)


def forward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    shape: Sequence[int],
    *,
    interpret: bool = False,
) -> Float[Array, "*batch x y z"]:
    """As `xla.forward`, float32 only.

    Args:
      interpret: run the kernel as plain JAX, on any device; slow, for tests.
    Raises:
      NotImplementedError: the device is not a GPU, or an array is not float32.
    """
    arrays = (density, mean, precision)
    dispatch.require("gpu", arrays, interpret)
    batch, n = density.shape[:-1], density.shape[-1]
    if density.size == 0 or 0 in shape:
        return jnp.zeros((*batch, *shape), jnp.float32)
    fields, first, last = _prepare(mean.reshape(-1, 3), precision.reshape(-1, 6), shape)
    table = jnp.pad(jnp.concatenate([fields, density.reshape(-1, 1)], -1), ((0, 0), (0, 6))).reshape(-1)
    across = tuple(pl.cdiv(size, brick) for size, brick in zip(shape, BRICK))
    b = density.size // n

    def draw(starts, owners, volumes):
        kernel = functools.partial(_draw, across)
        return triton_tiles.draw_tiles(kernel, "voxelize_forward", starts, owners, table, volumes, interpret)

    volumes = jnp.zeros((b * across[0] * across[1] * across[2], *BRICK), jnp.float32)
    volumes = triton_tiles.add_tiles(first, last, BRICK, across, n, draw, volumes)
    volumes = volumes.reshape(b, *across, *BRICK).transpose(0, 1, 4, 2, 5, 3, 6)
    volumes = volumes.reshape(b, *(count * brick for count, brick in zip(across, BRICK)))
    return volumes[:, : shape[0], : shape[1], : shape[2]].reshape(*batch, *shape)


def _gather(split, shape, n, boxes, table, cotangent, out):
    """The sums of voxelize.cc's Gather over every `split`-th block of a Gaussian's box."""
    program = pl.program_id(0)
    i, share = lax.div(program, jnp.int32(split)), lax.rem(program, jnp.int32(split))
    first, last = [boxes[i * 6 + k] for k in range(3)], [boxes[i * 6 + 3 + k] for k in range(3)]
    mx, my, mz, a, b, yx, zx, zy, zz = (table[i * 9 + k] for k in range(9))
    counts = [lax.div(l - f + size, jnp.int32(size)) for f, l, size in zip(first, last, BLOCK)]
    voxels = BLOCK[0] * BLOCK[1] * BLOCK[2]
    lane = lax.broadcasted_iota(jnp.int32, (voxels,), 0)
    lanes = (
        lax.div(lane, jnp.int32(BLOCK[1] * BLOCK[2])),
        lax.rem(lax.div(lane, jnp.int32(BLOCK[2])), jnp.int32(BLOCK[1])),
        lax.rem(lane, jnp.int32(BLOCK[2])),
    )
    volume = lax.div(i, jnp.int32(n)) * (shape[0] * shape[1] * shape[2])

    def step(k, sums):
        block = share + k * split
        corner = lax.div(block, counts[1] * counts[2]), lax.rem(lax.div(block, counts[2]), counts[1])
        corner = *corner, lax.rem(block, counts[2])
        x, y, z = (f + c * size + l for f, c, size, l in zip(first, corner, BLOCK, lanes))
        inside = (x <= last[0]) & (y <= last[1]) & (z <= last[2])
        c = plt.load(cotangent.at[volume + (x * shape[1] + y) * shape[2] + z], mask=inside, other=0.0)
        dx, dy, dz = (index.astype(jnp.float32) - m for index, m in ((x, mx), (y, my), (z, mz)))
        ey, ez = dy + yx * dx, dz + (zx * dx + zy * dy)
        w, dw = support.weight_and_slope(a * dx * dx + b * ey * ey + zz * ez * ez)
        slope = c * dw
        sx, sy, sz = slope * dx, slope * dy, slope * dz
        terms = [c * w, sx, sy, sz, sx * dx, sx * dy, sx * dz, sy * dy, sy * dz, sz * dz]
        return tuple(total + term for total, term in zip(sums, terms))

    empty = functools.reduce(jnp.logical_or, [l < f for f, l in zip(first, last)])
    blocks = jnp.where(empty, 0, counts[0] * counts[1] * counts[2])
    steps = lax.div(blocks - share + (split - 1), jnp.int32(split))
    sums = lax.fori_loop(0, steps, step, tuple(jnp.zeros((voxels,), jnp.float32) for _ in range(SUMS)))
    for k, total in enumerate(sums):
        out[program * SUMS + k] = jnp.sum(total)


def backward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    cotangent: Float[Array, "*batch x y z"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "..."], ...]:
    """As `xla.backward`, float32 only; `interpret` and errors as in `forward`."""
    arrays = (density, mean, precision, cotangent)
    dispatch.require("gpu", arrays, interpret)
    shapes = [a.shape for a in arrays[:3]]
    shape, n, m = cotangent.shape[-3:], density.shape[-1], density.size
    if density.size == 0 or cotangent.size == 0:
        return tuple(jnp.zeros(s, jnp.float32) for s in shapes)
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    fields, first, last = _prepare(mean, precision, shape)
    boxes = jnp.concatenate([first, last], -1).reshape(-1)
    kernel = functools.partial(_gather, triton_tiles.shares(m), shape, n)
    sums = triton_tiles.sum_boxes(
        kernel, "voxelize_backward", m, SUMS, boxes, fields.reshape(-1), cotangent.reshape(-1), interpret
    )

    # The sums of a Gaussian that is not drawn are 0, but 0 * nan is nan.
    drawn = jnp.all(first <= last, -1)
    density = jnp.where(drawn, density, 0.0)
    xx, xy, xz, yy, yz, zz = jnp.where(drawn[:, None], precision, 0.0).T
    x, y, z = -2.0 * density * sums[:, 1:4].T
    to_mean = jnp.stack([xx * x + xy * y + xz * z, xy * x + yy * y + yz * z, xz * x + yz * y + zz * z], -1)
    # An off-diagonal entry is two of the matrix.
    to_precision = density[:, None] * sums[:, 4:] * jnp.asarray([1.0, 2.0, 2.0, 1.0, 2.0, 1.0], jnp.float32)
    return tuple(part.reshape(s) for part, s in zip((sums[:, 0], to_mean, to_precision), shapes))
