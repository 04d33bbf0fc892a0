"""Symmetric 3x3 matrices stored as six numbers: xx, xy, xz, yy, yz, zz."""

import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array

TRACE_MAX = 1e12
"""Upper bound of a precision's trace, 1/mm^2 or 1/voxel^2. Determinants below it fit a float32 (1e36), and a Gaussian beyond it,
of sigma 1e-6, would meet no sample. Twice is still safe, a hundred times is not. Also in common/parallel.h."""


def to_matrix(packed: Float[Array, "*batch 6"]) -> Float[Array, "*batch 3 3"]:
    """Unpacks six numbers to a matrix."""
    xx, xy, xz, yy, yz, zz = (packed[..., i] for i in range(6))
    return jnp.stack([jnp.stack([xx, xy, xz], -1), jnp.stack([xy, yy, yz], -1), jnp.stack([xz, yz, zz], -1)], -2)


def from_matrix(matrix: Float[Array, "*batch 3 3"]) -> Float[Array, "*batch 6"]:
    """Packs a symmetric matrix, of which it reads the upper triangle."""
    return jnp.stack(
        [
            matrix[..., 0, 0],
            matrix[..., 0, 1],
            matrix[..., 0, 2],
            matrix[..., 1, 1],
            matrix[..., 1, 2],
            matrix[..., 2, 2],
        ],
        -1,
    )


def inverse(packed: Float[Array, "*batch 6"]) -> Float[Array, "*batch 6"]:
    """Inverse by cofactors; a singular matrix gives inf or nan."""
    xx, xy, xz, yy, yz, zz = (packed[..., i] for i in range(6))
    c_xx, c_xy, c_xz = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
    det = xx * c_xx + xy * c_xy + xz * c_xz
    return jnp.stack([c_xx, c_xy, c_xz, xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy], -1) / det[..., None]


def determinant(packed: Float[Array, "*batch 6"]) -> Float[Array, "*batch"]:
    """Determinant by cofactors."""
    xx, xy, xz, yy, yz, zz = (packed[..., i] for i in range(6))
    return xx * (yy * zz - yz * yz) + xy * (xz * yz - xy * zz) + xz * (xy * yz - xz * yy)


def is_positive(packed: Float[Array, "*batch 6"]) -> Bool[Array, "*batch"]:
    """True for a positive definite matrix, by the pivots of its elimination, with a trace below TRACE_MAX."""
    xx, xy, xz, yy, yz, zz = (packed[..., i] for i in range(6))
    b = yy - yz * yz / zz
    cross = xy - xz * yz / zz
    return (zz > 0.0) & (b > 0.0) & (xx - xz * xz / zz - cross * cross / b > 0.0) & (xx + yy + zz < TRACE_MAX)
