"""Symmetric 3x3 matrices stored as six numbers: xx, xy, xz, yy, yz, zz."""

import jax.numpy as jnp

TRACE_MAX = 1e12
"""Of precisions: determinants of such matrices fit a float, and no sample meets a Gaussian of sigma 1e-6."""


def to_matrix(packed):
    """(..., 6) -> (..., 3, 3)."""
    xx, xy, xz, yy, yz, zz = (packed[..., i] for i in range(6))
    return jnp.stack([jnp.stack([xx, xy, xz], -1), jnp.stack([xy, yy, yz], -1), jnp.stack([xz, yz, zz], -1)], -2)


def from_matrix(matrix):
    """(..., 3, 3) symmetric -> (..., 6)."""
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


def inverse(packed):
    """Inverse by cofactors, (..., 6) -> (..., 6). A singular matrix gives inf or nan."""
    xx, xy, xz, yy, yz, zz = (packed[..., i] for i in range(6))
    c_xx, c_xy, c_xz = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
    det = xx * c_xx + xy * c_xy + xz * c_xz
    return jnp.stack([c_xx, c_xy, c_xz, xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy], -1) / det[..., None]


def determinant(packed):
    """Determinant (...) of (..., 6)."""
    xx, xy, xz, yy, yz, zz = (packed[..., i] for i in range(6))
    return xx * (yy * zz - yz * yz) + xy * (xz * yz - xy * zz) + xz * (xy * yz - xz * yy)


def is_positive(packed):
    """True (...) for a positive definite matrix (..., 6), by the pivots of its elimination, whose trace is below TRACE_MAX."""
    xx, xy, xz, yy, yz, zz = (packed[..., i] for i in range(6))
    b = yy - yz * yz / zz
    cross = xy - xz * yz / zz
    return (zz > 0.0) & (b > 0.0) & (xx - xz * xz / zz - cross * cross / b > 0.0) & (xx + yy + zz < TRACE_MAX)
