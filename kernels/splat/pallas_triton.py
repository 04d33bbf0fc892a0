"""`splat` and its gradient on a GPU: two Pallas kernels, compiled by Triton.

Forward, one program per image tile. Every (Gaussian, tile) pair that can be non-zero is an instance. Their number depends on
the data, so a list of all of them has no static size: `add_tiles` takes them in chunks of fixed size instead, sorts
each chunk by tile and launches one kernel on it that adds to the images in place. Any number of instances is drawn, in
fixed memory, and mostly the first chunk holds all.

Backward, one program per Gaussian, or several for a fixed share of its pixels each: it walks through the Gaussian's box and
keeps all sums of the gradients in registers. That needs no instances and no sort, and no sum over instances, which in XLA
is a scatter: on a GPU that adds atomically, in no fixed order. Nothing here uses atomics, so equal inputs give equal bits.

All forms are those of splat.cc, in pixel offsets (s, t) from the projected mean: nothing large cancels per pixel. What a
Gaussian needs once is computed in plain JAX, with products split in halves where float32 alone would cancel.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels import support

TILE = (16, 16)  # pixels of a forward program
GROUP = 8  # Gaussians that a forward program evaluates at a time; with 16, too few programs fit the registers
BLOCK = (8, 8)  # pixels that a backward program evaluates at a time; likewise
SUMS = 14
ALPHA_MIN = 1e-12  # rounding can push alpha, positive by definition, to 0 where an extreme needle points at the source
CHUNK = 1 << 18  # most instances drawn by one launch: 2 MB of them, and work enough to hide what a launch costs
COUNTABLE = 2**31 - 1  # most instances that int32 can count
PROGRAMS = 4096  # a few large Gaussians are shared out over so many backward programs, to fill a GPU

_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


# What the voxeliser's backend needs too.


def check(interpret, arrays):
    """Raises NotImplementedError unless the default device is a GPU (or `interpret`) and all arrays are float32."""
    if not interpret and jax.default_backend() != "gpu":
        raise NotImplementedError(f"the device is {jax.default_backend()}, not gpu")
    wrong = [str(a.dtype) for a in arrays if a.dtype != jnp.float32]
    if wrong:
        raise NotImplementedError(f"float32 only, not {wrong[0]}")


def with_batch_axes(function, *arrays):
    """`function(*arrays)`, whose leading axes are a batch: vmap adds one more to all arrays, and to all results."""

    @custom_vmap
    def call(*arrays):
        return function(*arrays)

    @call.def_vmap
    def _(size, batched, *arrays):
        whole = (a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(arrays, batched))
        results = call(*whole)
        return results, jax.tree.map(lambda _: True, results)

    return call(*arrays)


def _halves(a):
    """a = high + low with at most 12 significant bits in each, so that products of halves are exact in float32."""
    bits = lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, a - high


def minor(a, b, c, d):
    """a b - c d in float32, (M,) each, to some units in the last place of the result, however much cancels.

    All products are exact, so a compiler that contracts them to fused multiply-adds changes nothing.
    """
    (a, a_), (b, b_), (c, c_), (d, d_) = map(_halves, (a, b, c, d))
    return (a * b - c * d) + ((a * b_ - c * d_) + (a_ * b - c_ * d) + (a_ * b_ - c_ * d_))


def adjugate(precision):
    """Adjugates of symmetric matrices (M, 6) as six arrays (M,), and their determinants (M,)."""
    xx, xy, xz, yy, yz, zz = precision.T
    a_xx, a_xy, a_xz = minor(yy, zz, yz, yz), minor(xz, yz, xy, zz), minor(xy, yz, xz, yy)
    rest = minor(xx, zz, xz, xz), minor(xy, xz, xx, yz), minor(xx, yy, xy, xy)
    return (a_xx, a_xy, a_xz, *rest), xx * a_xx + xy * a_xy + xz * a_xz


def usable(conditions, *values):
    """True (M,) where all conditions (M,) hold and all values (M,) are finite."""
    return functools.reduce(jnp.logical_and, [*conditions, *map(jnp.isfinite, values)])


def box(low, high, size):
    """Integers within real bounds (M,) and [0, size), as first and last int32; last < first if there are none.

    The margin keeps samples that rounding would push over the edge of the support, where the weight is close to 0.
    """
    first = jnp.clip(jnp.ceil(low - 1e-3), 0, size).astype(jnp.int32)
    return first, jnp.clip(jnp.floor(high + 1e-3), -1, size - 1).astype(jnp.int32)


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


# The operator.


class _Footprint(NamedTuple):
    """What is computed once per Gaussian, arrays (M,) in the notation of splat.cc; zeros where it is not drawn."""

    drawn: jax.Array
    u0: jax.Array  # the projected mean is at pixel (u0 + u1, v0 + v1), u0 and v0 whole numbers
    u1: jax.Array
    v0: jax.Array
    v1: jax.Array
    ss: jax.Array
    st: jax.Array
    tt: jax.Array
    sz: jax.Array
    tz: jax.Array
    nss: jax.Array
    nst: jax.Array
    ntt: jax.Array
    m_zz: jax.Array
    x: jax.Array
    y: jax.Array
    rows: tuple  # first and last pixel row and column, int32
    columns: tuple


def _project(p, depth, x, focal, centre):
    """Pixel of the mean as a whole number and a rest that is right to 2^-34 of the image or so; x = p / depth."""
    (depth, depth_), (x_high, x_low), (focal_high, focal_low) = map(_halves, (depth, x, focal))
    error = ((p - x_high * depth) - x_high * depth_ - x_low * depth - x_low * depth_) / (depth + depth_)
    high = focal_high * x_high
    low = focal_high * x_low + focal_low * x_high + focal_low * x_low + focal * error
    whole = jnp.round(centre + high)
    return whole, ((centre - whole) + high) + low


def _prepare(mean, precision, intrinsics, n, height, width):
    """The `_Footprint` of Gaussians (M, 3) and (M, 6) under intrinsics (M / n, 4)."""
    px, py, depth = mean.T
    xx, xy, xz, yy, yz, zz = precision.T
    fx, fy, cx, cy = jnp.repeat(intrinsics, n, 0).T
    (a_xx, a_xy, a_xz, a_yy, a_yz, a_zz), det = adjugate(precision)
    x, y = px / depth, py / depth
    u0, u1 = _project(px, depth, x, fx, cx)
    v0, v1 = _project(py, depth, y, fy, cy)
    m_x, m_y, m_z = xx * x + xy * y + xz, xy * x + yy * y + yz, xz * x + yz * y + zz
    m_zz = x * m_x + y * m_y + m_z
    ss, st, tt = xx / (fx * fx * m_zz), xy / (fx * fy * m_zz), yy / (fy * fy * m_zz)
    sz, tz = m_x / (fx * m_zz), m_y / (fy * m_zz)
    # The minors of M = P'KP are elements of P^-1 adj(K) P^-T; taken from the rounded M they would cancel in a needle.
    scale = depth * depth / m_zz
    nss = scale * (a_yy - 2.0 * y * a_yz + y * y * a_zz) / (fx * fx)
    nst = -scale * (a_xy - y * a_xz - x * a_yz + x * y * a_zz) / (fx * fy)
    ntt = scale * (a_xx - 2.0 * x * a_xz + x * x * a_zz) / (fy * fy)
    # The outline is the conic N - 16 alpha = 0; its extent in t is where its discriminant in s is 0, and vice versa.
    q = support.Q_MAX
    css, cst, ctt, cs, ct = nss - q * ss, nst - q * st, ntt - q * tt, -q * sz, -q * tz
    area = minor(css, ctt, cst, cst)

    def extent(c_own, c_other, c_ii):
        middle = (cst * c_other - c_ii * c_own) / area
        return middle, jnp.sqrt(jnp.square(middle) + (c_other * c_other + q * c_ii) / area)

    s_middle, s_half = extent(cs, ct, ctt)
    t_middle, t_half = extent(ct, cs, css)
    before = depth > support.SIGMA_MAX * jnp.sqrt(jnp.maximum(a_zz / det, 0.0))
    bounds = (s_middle, s_half, t_middle, t_half)
    drawn = usable(
        (before, m_zz > 0, det > 0, a_zz > 0, nss > 0, css > 0, area > 0),
        *(*bounds, u0, u1, v0, v1, ss, st, tt, sz, tz, nss, nst, ntt),
    )
    clean = lambda value: jnp.where(drawn, value, 0)
    columns = box(clean(u0 + (u1 + s_middle - s_half)), clean(u0 + (u1 + s_middle + s_half)), width)
    rows = box(clean(v0 + (v1 + t_middle - t_half)), clean(v0 + (v1 + t_middle + t_half)), height)
    columns, rows = ((first, jnp.where(drawn, last, -1)) for first, last in (columns, rows))
    values = map(clean, (u0, u1, v0, v1, ss, st, tt, sz, tz, nss, nst, ntt, m_zz, x, y))
    return _Footprint(drawn, *values, rows, columns)


def _draw(across, tiles, starts, owners, table, images, out):
    """Adds the Gaussians of one tile to it; the loop keeps one sum per pixel and place in a group."""
    t = pl.program_id(0)
    tile = lax.rem(t, jnp.int32(tiles))
    pixels = lambda tile, size: (tile * size + lax.broadcasted_iota(jnp.int32, (size,), 0)).astype(jnp.float32)
    v = pixels(lax.div(tile, jnp.int32(across)), TILE[0])[:, None, None]
    u = pixels(lax.rem(tile, jnp.int32(across)), TILE[1])[None, :, None]
    first, end = starts[t], starts[t + 1]

    def step(i, total):
        base = first + i * GROUP
        live = base + lax.broadcasted_iota(jnp.int32, (GROUP,), 0) < end
        owner = plt.load(owners.at[pl.ds(base, GROUP)], mask=live, other=0)
        field = lambda f: plt.load(table.at[owner * 16 + f], mask=live, other=0.0)[None, None, :]
        amplitude, u0, u1, v0, v1, ss, st2, tt, sz2, tz2, nss, nst2, ntt = map(field, range(13))
        s, t = (u - u0) - u1, (v - v0) - v1
        alpha = jnp.maximum((1.0 + t * (tz2 + t * tt)) + s * ((sz2 + t * st2) + s * ss), ALPHA_MIN)
        root = lax.rsqrt(alpha)
        q = (t * t * ntt + s * (t * nst2 + s * nss)) * (root * root)
        return total + amplitude * root * support.weight(q)

    total = lax.fori_loop(
        0, lax.div(end - first + (GROUP - 1), jnp.int32(GROUP)), step, jnp.zeros((*TILE, GROUP), jnp.float32)
    )
    out[...] = images[...] + jnp.sum(total, 2)


def forward(density, mean, precision, intrinsics, height, width, *, interpret=False):
    """As `xla.forward`, float32 only; a precision that is not positive definite adds nothing.

    Args:
      interpret: run the kernel as plain JAX, on any device (slow; for tests).
    Raises:
      NotImplementedError: the device is no GPU, or an array is not float32.
    """
    arrays = (density, mean, precision, intrinsics)
    check(interpret, arrays)
    return with_batch_axes(functools.partial(_forward, height, width, interpret), *arrays)


def _forward(height, width, interpret, density, mean, precision, intrinsics):
    batch, n = density.shape[:-1], density.shape[-1]
    if density.size == 0 or height * width == 0:
        return jnp.zeros((*batch, height, width), jnp.float32)
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    intrinsics = intrinsics.reshape(-1, 4)
    b = intrinsics.shape[0]
    g = _prepare(mean, precision, intrinsics, n, height, width)
    # The length of the ray is a factor of the pixel, so it is left to the end.
    amplitude = jnp.where(g.drawn, density * jnp.sqrt(2.0 * jnp.pi / g.m_zz), 0.0)
    fields = (amplitude, g.u0, g.u1, g.v0, g.v1, g.ss, 2 * g.st, g.tt, 2 * g.sz, 2 * g.tz, g.nss, 2 * g.nst, g.ntt)
    table = jnp.pad(jnp.stack(fields, -1), ((0, 0), (0, 16 - len(fields)))).reshape(-1)
    down, across = pl.cdiv(height, TILE[0]), pl.cdiv(width, TILE[1])
    kernel = functools.partial(_draw, across, down * across)

    def draw(starts, owners, images):
        return draw_tiles(kernel, "splat_forward", starts, owners, table, images, interpret)

    first, last = (jnp.stack(pair, -1) for pair in zip(g.rows, g.columns))
    images = jnp.zeros((b * down * across, *TILE), jnp.float32)
    images = add_tiles(first, last, TILE, (down, across), n, draw, images)
    images = images.reshape(b, down, across, *TILE).transpose(0, 1, 3, 2, 4)
    images = images.reshape(b, down * TILE[0], across * TILE[1])[:, :height, :width]
    fx, fy, cx, cy = intrinsics.T[..., None]
    x = (jnp.arange(width, dtype=jnp.float32) - cx) / fx
    y = (jnp.arange(height, dtype=jnp.float32) - cy) / fy
    images = images * jnp.sqrt(1.0 + jnp.square(x)[:, None, :] + jnp.square(y)[:, :, None])
    return images.reshape(*batch, height, width)


def _gather(split, height, width, n, boxes, table, cotangent, out):
    """The sums of splat.cc's Gather over every `split`-th block of a Gaussian's box."""
    program = pl.program_id(0)
    i, share = lax.div(program, jnp.int32(split)), lax.rem(program, jnp.int32(split))
    v_first, v_last, u_first, u_last = (boxes[i * 4 + k] for k in range(4))
    u0, u1, v0, v1, ss, st, tt, sz, tz, nss, nst, ntt, ls, lt, lss, ltt, scale = (table[i * 17 + k] for k in range(17))
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
        bend_s, bend_t = sz + t * st + s * ss, tz + t * tt + s * st
        alpha = jnp.maximum(1.0 + s * (sz + bend_s) + t * (tz + bend_t), ALPHA_MIN)
        length_s, length_t = ls + s * lss, lt + t * ltt
        length = 1.0 + s * (ls + length_s) + t * (lt + length_t)
        both = 1.0 / (alpha * length)
        inverse = length * both
        w, dw = support.weight_and_slope((t * t * ntt + s * (2.0 * t * nst + s * nss)) * inverse)
        h = c * jnp.sqrt(length * inverse)
        unit, slope = h * w, scale * h * dw
        ez = -(s * bend_s + t * bend_t) * inverse
        d = 1.0 + ez
        es, et = d * s, d * t
        ks, kt, kz = slope * es, slope * et, slope * ez
        unit_a, turn, span = unit * inverse, 2.0 * slope * d, unit * (alpha * both)
        along = -0.5 * unit_a
        bs = span * length_s - unit_a * bend_s + turn * (ss * es + st * et + sz * ez)
        bt = span * length_t - unit_a * bend_t + turn * (st * es + tt * et + tz * ez)
        terms = [
            unit,
            ks,
            kt,
            kz,
            ks * es + along * s * s,
            ks * et + along * s * t,
            ks * ez + along * s,
            kt * et + along * t * t,
            kt * ez + along * t,
            kz * ez + along,
            bs * s,
            bt * t,
            bs,
            bt,
        ]
        return tuple(total + term for total, term in zip(sums, terms))

    blocks = jnp.where((v_last < v_first) | (u_last < u_first), 0, down * across)
    steps = lax.div(blocks - share + (split - 1), jnp.int32(split))
    sums = lax.fori_loop(0, steps, step, tuple(jnp.zeros((pixels,), jnp.float32) for _ in range(SUMS)))
    for k, total in enumerate(sums):
        out[program * SUMS + k] = jnp.sum(total)


def backward(density, mean, precision, intrinsics, cotangent, *, interpret=False):
    """As `xla.backward`, float32 only; `interpret` and errors as in `forward`."""
    arrays = (density, mean, precision, intrinsics, cotangent)
    check(interpret, arrays)
    return with_batch_axes(functools.partial(_backward, interpret), *arrays)


def _backward(interpret, *arrays):
    shapes = [a.shape for a in arrays[:4]]
    density, mean, precision, intrinsics, cotangent = arrays
    (height, width), n = cotangent.shape[-2:], density.shape[-1]
    if density.size == 0 or cotangent.size == 0:
        return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    density, mean, precision = density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6)
    intrinsics = intrinsics.reshape(-1, 4)
    m = density.shape[0]
    g = _prepare(mean, precision, intrinsics, n, height, width)
    fx, fy, _, _ = jnp.repeat(intrinsics, n, 0).T
    depth, x, y, m_zz = jnp.where(g.drawn, mean[:, 2], 1.0), g.x, g.y, jnp.where(g.drawn, g.m_zz, 1.0)
    length2 = 1.0 + x * x + y * y
    lengths = x / (fx * length2), y / (fy * length2), 1.0 / (fx * fx * length2), 1.0 / (fy * fy * length2)
    fields = (g.u0, g.u1, g.v0, g.v1, g.ss, g.st, g.tt, g.sz, g.tz, g.nss, g.nst, g.ntt, *lengths, depth * depth * m_zz)
    table = jnp.stack(fields, -1).reshape(-1)
    boxes = jnp.stack((*g.rows, *g.columns), -1).reshape(-1)
    kernel = functools.partial(_gather, shares(m), height, width, n)
    sums = sum_boxes(kernel, "splat_backward", m, SUMS, boxes, table, cotangent.reshape(-1), interpret).T

    thickness = jnp.sqrt(2.0 * jnp.pi * length2 / m_zz)
    amplitude = density * thickness
    turn = -2.0 * amplitude / (depth * m_zz)
    rz = turn * sums[3]
    rx, ry = turn * sums[1] / fx + x * rz, turn * sums[2] / fy + y * rz
    kxx, kxy, kxz, kyy, kyz, kzz = precision.T
    to_mean = kxx * rx + kxy * ry + kxz * rz, kxy * rx + kyy * ry + kyz * rz, kxz * rx + kyz * ry + kzz * rz

    scale = amplitude / m_zz
    xx, xy, xz = scale * sums[4] / (fx * fx), scale * sums[5] / (fx * fy), scale * sums[6] / fx
    yy, yz, zz = scale * sums[7] / (fy * fy), scale * sums[8] / fy, scale * sums[9]
    to_precision = (
        xx + 2.0 * x * xz + x * x * zz,
        2.0 * (xy + x * yz + y * xz + x * y * zz),
        2.0 * (xz + x * zz),
        yy + 2.0 * y * yz + y * y * zz,
        2.0 * (yz + y * zz),
        zz,
    )
    to_camera = (x * sums[12] + sums[10] / fx, y * sums[13] + sums[11] / fy, sums[12], sums[13])
    gradients = (thickness * sums[0], *to_mean, *to_precision, *(-amplitude * part for part in to_camera))
    # A Gaussian that is not drawn has no sums, but 0 * nan is nan.
    gradients = jnp.where(g.drawn[:, None], jnp.stack(gradients, -1), 0.0)
    to_camera = jnp.sum(gradients[:, 10:].reshape(-1, n, 4), 1)
    parts = gradients[:, 0], gradients[:, 1:4], gradients[:, 4:10], to_camera
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes))
