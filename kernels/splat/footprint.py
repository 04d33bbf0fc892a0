"""The parts of `splat`'s Pallas backends in plain JAX: quantities of a Gaussian, terms of its pixels, and its gradients.

All forms are those of splat.cc, in pixel offsets (s, t) from the projected mean, so that no large numbers cancel per pixel. The
quantities of a Gaussian split their products in halves where float32 alone would cancel.
"""

from typing import Any
from typing import cast
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common import exact
from kernels.common import support
from kernels.common import symmetric
from kernels.common.types import Array

SUMS = 14
"""Number of sums over its pixels in which a Gaussian's gradients are linear."""
ALPHA_MIN = 1e-12
"""Lower bound of alpha, which is positive by definition; rounding can bring it to 0 where an extreme needle points at the source.
Chosen by hand; it only has to be positive and far below 1."""


class Footprint(NamedTuple):
    """Quantities of a Gaussian, arrays (M,) in the notation of splat.cc; zeros where it is not drawn."""

    drawn: jax.Array
    u0: jax.Array  # the projected mean is at pixel (u0 + u1, v0 + v1); u0 and v0 are whole numbers
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
    rows: tuple[jax.Array, jax.Array]  # first and last, int32
    columns: tuple[jax.Array, jax.Array]  # first and last, int32


def _project(p, depth, x, focal, centre):
    """Pixel of the mean as a whole number and a rest, accurate to about 2^-34 of the image; x = p / depth."""
    (depth, depth_), (x_high, x_low), (focal_high, focal_low) = map(exact.halves, (depth, x, focal))
    error = ((p - x_high * depth) - x_high * depth_ - x_low * depth - x_low * depth_) / (depth + depth_)
    high = focal_high * x_high
    low = focal_high * x_low + focal_low * x_high + focal_low * x_low + focal * error
    whole = jnp.round(centre + high)
    return whole, ((centre - whole) + high) + low


def prepare(
    mean: Float[Array, "m 3"],
    precision: Float[Array, "m 6"],
    intrinsics: Float[Array, "views 4"],
    n: int,
    height: int,
    width: int,
) -> Footprint:
    """The `Footprint` of Gaussians under cameras with n Gaussians each, m = views * n."""
    px, py, depth = mean.T
    xx, xy, xz, yy, yz, zz = precision.T
    fx, fy, cx, cy = jnp.repeat(intrinsics, n, 0).T
    (a_xx, a_xy, a_xz, a_yy, a_yz, a_zz), det = exact.adjugate(precision)
    x, y = px / depth, py / depth
    u0, u1 = _project(px, depth, x, fx, cx)
    v0, v1 = _project(py, depth, y, fy, cy)
    m_x, m_y, m_z = xx * x + xy * y + xz, xy * x + yy * y + yz, xz * x + yz * y + zz
    m_zz = x * m_x + y * m_y + m_z
    ss, st, tt = xx / (fx * fx * m_zz), xy / (fx * fy * m_zz), yy / (fy * fy * m_zz)
    sz, tz = m_x / (fx * m_zz), m_y / (fy * m_zz)
    # The minors of M = P'KP are elements of P^-1 adj(K) P^-T; computed from the rounded M they would cancel for a needle.
    scale = depth * depth / m_zz
    nss = scale * (a_yy - 2.0 * y * a_yz + y * y * a_zz) / (fx * fx)
    nst = -scale * (a_xy - y * a_xz - x * a_yz + x * y * a_zz) / (fx * fy)
    ntt = scale * (a_xx - 2.0 * x * a_xz + x * x * a_zz) / (fy * fy)
    # The outline is the conic N - 16 alpha = 0; its extent in t is where its discriminant in s is 0, and vice versa.
    q = support.Q_MAX
    css, cst, ctt, cs, ct = nss - q * ss, nst - q * st, ntt - q * tt, -q * sz, -q * tz
    area = exact.minor(css, ctt, cst, cst)

    def extent(c_own, c_other, c_ii):
        middle = (cst * c_other - c_ii * c_own) / area
        return middle, jnp.sqrt(jnp.square(middle) + (c_other * c_other + q * c_ii) / area)

    s_middle, s_half = extent(cs, ct, ctt)
    t_middle, t_half = extent(ct, cs, css)
    before = depth > support.SIGMA_MAX * jnp.sqrt(jnp.maximum(a_zz / det, 0.0))
    bounds = (s_middle, s_half, t_middle, t_half)
    drawn = exact.usable(
        (before, xx + yy + zz < symmetric.TRACE_MAX, m_zz > 0, det > 0, a_zz > 0, nss > 0, css > 0, area > 0),
        *(*bounds, u0, u1, v0, v1, ss, st, tt, sz, tz, nss, nst, ntt),
    )
    clean = lambda value: jnp.where(drawn, value, 0)
    columns = exact.box(clean(u0 + (u1 + s_middle - s_half)), clean(u0 + (u1 + s_middle + s_half)), width)
    rows = exact.box(clean(v0 + (v1 + t_middle - t_half)), clean(v0 + (v1 + t_middle + t_half)), height)
    columns, rows = ((first, jnp.where(drawn, last, -1)) for first, last in (columns, rows))
    values = map(clean, (u0, u1, v0, v1, ss, st, tt, sz, tz, nss, nst, ntt, m_zz, x, y))
    return Footprint(cast(Any, drawn), *values, rows=cast(Any, rows), columns=cast(Any, columns))


def draw_fields(g: Footprint, density: Float[Array, " m"]) -> tuple[Float[Array, " m"], ...]:
    """The 13 numbers per Gaussian that drawing needs: amplitude, u0, u1, v0, v1 and the coefficients of alpha and N.

    The length of the ray is a factor of the pixel; `ray_lengths` has it.
    """
    amplitude = jnp.where(g.drawn, density * jnp.sqrt(2.0 * jnp.pi / g.m_zz), 0.0)
    return amplitude, g.u0, g.u1, g.v0, g.v1, g.ss, 2 * g.st, g.tt, 2 * g.sz, 2 * g.tz, g.nss, 2 * g.nst, g.ntt


def ray_lengths(intrinsics: Float[Array, "views 4"], height: int, width: int) -> Float[Array, "views height width"]:
    """Length of each pixel's ray (x, y, 1)."""
    fx, fy, cx, cy = intrinsics.T[..., None]
    x = (jnp.arange(width, dtype=jnp.float32) - cx) / fx
    y = (jnp.arange(height, dtype=jnp.float32) - cy) / fy
    return jnp.sqrt(1.0 + jnp.square(x)[:, None, :] + jnp.square(y)[:, :, None])


def gather_fields(
    g: Footprint, mean: Float[Array, "m 3"], intrinsics: Float[Array, "views 4"], n: int
) -> tuple[Float[Array, " m"], ...]:
    """The 17 numbers per Gaussian of the backward pass: u0, u1, v0, v1 and the last 13 arguments of `terms`."""
    fx, fy, _, _ = jnp.repeat(intrinsics, n, 0).T
    x, y, (depth, m_zz, length2) = g.x, g.y, _scales(g, mean)
    lengths = x / (fx * length2), y / (fy * length2), 1.0 / (fx * fx * length2), 1.0 / (fy * fy * length2)
    outline = g.u0, g.u1, g.v0, g.v1, g.ss, g.st, g.tt, g.sz, g.tz, g.nss, g.nst, g.ntt
    return *outline, *lengths, depth * depth * m_zz


def _scales(g, mean):
    """Depth and M_zz, harmless where nothing is drawn, and the squared length of the ray through the mean."""
    return jnp.where(g.drawn, mean[:, 2], 1.0), jnp.where(g.drawn, g.m_zz, 1.0), 1.0 + g.x * g.x + g.y * g.y


def terms(
    s: Float[Array, "..."],
    t: Float[Array, "..."],
    c: Float[Array, "..."],
    ss: Float[Array, "..."],
    st: Float[Array, "..."],
    tt: Float[Array, "..."],
    sz: Float[Array, "..."],
    tz: Float[Array, "..."],
    nss: Float[Array, "..."],
    nst: Float[Array, "..."],
    ntt: Float[Array, "..."],
    ls: Float[Array, "..."],
    lt: Float[Array, "..."],
    lss: Float[Array, "..."],
    ltt: Float[Array, "..."],
    scale: Float[Array, "..."],
) -> tuple[Float[Array, "..."], ...]:
    """Terms of the SUMS sums of a Gaussian: of pixels at offsets (s, t) with cotangents c; all else is one number per Gaussian."""
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
    first = (unit, ks, kt, kz)
    second = (
        ks * es + along * s * s,
        ks * et + along * s * t,
        ks * ez + along * s,
        kt * et + along * t * t,
        kt * ez + along * t,
        kz * ez + along,
    )
    return (*first, *second, bs * s, bt * t, bs, bt)


def gradients(
    g: Footprint,
    sums: Float[Array, "sums m"],
    density: Float[Array, " m"],
    mean: Float[Array, "m 3"],
    precision: Float[Array, "m 6"],
    intrinsics: Float[Array, "views 4"],
    n: int,
) -> tuple[Float[Array, " m"], Float[Array, "m 3"], Float[Array, "m 6"], Float[Array, "views 4"]]:
    """Gradients to density, mean, precision and intrinsics.

    Args:
      sums: the SUMS `terms`, each summed over the pixels of each Gaussian.
      n: number of Gaussians per view.
    """
    fx, fy, _, _ = jnp.repeat(intrinsics, n, 0).T
    x, y, (depth, m_zz, length2) = g.x, g.y, _scales(g, mean)
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
    rows = (thickness * sums[0], *to_mean, *to_precision, *(-amplitude * part for part in to_camera))
    # The sums of a Gaussian that is not drawn are 0, but 0 * nan is nan.
    rows = jnp.where(g.drawn[:, None], jnp.stack(rows, -1), 0.0)
    to_camera = jnp.sum(rows[:, 10:].reshape(-1, n, 4), 1)
    return rows[:, 0], rows[:, 1:4], rows[:, 4:10], to_camera
