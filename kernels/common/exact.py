"""Float32 products that do not cancel, and the integer boxes that supports fill."""

import functools

import jax.numpy as jnp
from jax import lax

# Exact products; `voxelize` needs them too.


def halves(a):
    """a = high + low with at most 12 significant bits in each, so that products of halves are exact in float32."""
    bits = lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, a - high


def minor(a, b, c, d):
    """a b - c d in float32, (M,) each, to some units in the last place of the result, however much cancels.

    All products are exact, so a compiler that contracts them to fused multiply-adds changes nothing.
    """
    (a, a_), (b, b_), (c, c_), (d, d_) = map(halves, (a, b, c, d))
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
