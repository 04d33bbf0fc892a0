"""float32 products without cancellation, and the integer boxes of supports."""

import functools
from collections.abc import Iterable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int32

from kernels.common.types import Array

BOX_MARGIN = 1e-3
"""Samples by which a support's box is widened, so that rounding of its bounds drops none. Chosen by hand: the weight at the edge is
close to 0, so more only costs time. Also in the C++ kernels (`Clip`)."""


def halves(a: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """a = high + low, with at most 12 significant bits each, so that products of halves are exact in float32."""
    bits = lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, a - high


def minor(
    a: Float[Array, " m"], b: Float[Array, " m"], c: Float[Array, " m"], d: Float[Array, " m"]
) -> Float[Array, " m"]:
    """a b - c d in float32, accurate to a few units in the last place of the result, even under cancellation.

    All products are exact, so a compiler may contract them to fused multiply-adds without changing the result.
    """
    (a, a_), (b, b_), (c, c_), (d, d_) = map(halves, (a, b, c, d))
    return (a * b - c * d) + ((a * b_ - c * d_) + (a_ * b - c_ * d) + (a_ * b_ - c_ * d_))


def adjugate(precision: Float[Array, "m 6"]) -> tuple[tuple[Float[Array, " m"], ...], Float[Array, " m"]]:
    """Adjugates of packed symmetric matrices, as six arrays, and their determinants."""
    xx, xy, xz, yy, yz, zz = precision.T
    a_xx, a_xy, a_xz = minor(yy, zz, yz, yz), minor(xz, yz, xy, zz), minor(xy, yz, xz, yy)
    rest = minor(xx, zz, xz, xz), minor(xy, xz, xx, yz), minor(xx, yy, xy, xy)
    return (a_xx, a_xy, a_xz, *rest), xx * a_xx + xy * a_xy + xz * a_xz


def usable(conditions: Iterable[Bool[Array, " m"]], *values: Float[Array, " m"]) -> Bool[Array, " m"]:
    """True where all conditions hold and all values are finite."""
    return functools.reduce(jnp.logical_and, [*conditions, *map(jnp.isfinite, values)])


def box(low: Float[Array, " m"], high: Float[Array, " m"], size: int) -> tuple[Int32[Array, " m"], Int32[Array, " m"]]:
    """First and last integers of [0, size) within real bounds, widened by BOX_MARGIN; last < first if there are none."""
    first = jnp.clip(jnp.ceil(low - BOX_MARGIN), 0, size).astype(jnp.int32)
    return first, jnp.clip(jnp.floor(high + BOX_MARGIN), -1, size - 1).astype(jnp.int32)
