"""Exact numbers of (Gaussian, sample) pairs with q < 16, the pairs to which the support rule gives a weight."""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from kernels.common import support
from kernels.common.types import Array
from kernels.tools.operators import Spec


def _interval(a, b, c, size):
    """First and last integer of [0, size) with a x^2 + 2 b x + c < 0, for a > 0; last < first where there is none."""
    root = b * b - a * c
    half = np.sqrt(np.maximum(root, 0.0))
    first = np.maximum(np.floor((-b - half) / a) + 1, 0)
    last = np.minimum(np.ceil((-b + half) / a) - 1, size - 1)
    empty = ~(root > 0.0)
    return np.where(empty, 0, first).astype(np.int64), np.where(empty, -1, last).astype(np.int64)


# Rows worked on at a time: bounds the memory at some hundred MB, whatever the size of the cloud.
_ROWS_AT_A_TIME = 2**20


def _rows(counts: np.ndarray, limit: int = _ROWS_AT_A_TIME) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (owner, index) of rows 0 .. counts[i] - 1 of every i, about `limit` at a time."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        base = ends[start] - counts[start]
        stop = max(start + 1, int(np.searchsorted(ends, base + limit, side="right")))
        owner = np.repeat(np.arange(start, stop), counts[start:stop])
        yield owner, np.arange(len(owner)) - (ends - counts - base)[owner]
        start = stop


def splat_pairs(
    mean: Float[Array, "n 3"],
    precision: Float[Array, "n 6"],
    intrinsics: Float[Array, "4"],
    height: int,
    width: int,
) -> int:
    """Number of pairs (visible Gaussian, pixel) with q < 16; arguments as `splat` takes them, for one cloud."""
    p, packed = np.asarray(mean, np.float64), np.asarray(precision, np.float64)
    fx, fy, cx, cy = np.asarray(intrinsics, np.float64)
    K = np.asarray(_matrix(packed))
    visible = p[:, 2] > support.SIGMA_MAX * np.sqrt(np.linalg.inv(K)[:, 2, 2])
    p, K = p[visible], K[visible]
    # q < 16 on the ray d is d' (c K - K p p' K) d < 0 with c = p' K p - 16, a conic in the pixel (u, v, 1).
    Kp = np.einsum("nij,nj->ni", K, p)
    Q = (np.einsum("ni,ni->n", p, Kp) - support.Q_MAX)[:, None, None] * K - Kp[:, :, None] * Kp[:, None, :]
    ray = np.array([[1.0 / fx, 0.0, -cx / fx], [0.0, 1.0 / fy, -cy / fy], [0.0, 0.0, 1.0]])
    Q = ray.T @ Q @ ray
    # Rows that the outline reaches have a positive discriminant in u. One more row on each side allows for rounding.
    top, bottom = _interval(
        Q[:, 0, 0] * Q[:, 1, 1] - Q[:, 0, 1] ** 2,
        Q[:, 0, 0] * Q[:, 1, 2] - Q[:, 0, 1] * Q[:, 0, 2],
        Q[:, 0, 0] * Q[:, 2, 2] - Q[:, 0, 2] ** 2,
        height,
    )
    top, bottom = np.maximum(top - 1, 0), np.minimum(bottom + 1, height - 1)
    total = 0
    for owner, row in _rows(np.maximum(bottom - top + 1, 0)):
        v, C = (top[owner] + row).astype(np.float64), Q[owner]
        first, last = _interval(
            C[:, 0, 0],
            C[:, 0, 1] * v + C[:, 0, 2],
            C[:, 1, 1] * v * v + 2.0 * C[:, 1, 2] * v + C[:, 2, 2],
            width,
        )
        total += int(np.sum(np.maximum(last - first + 1, 0)))
    return total


def voxel_pairs(mean: Float[Array, "n 3"], precision: Float[Array, "n 6"], shape: Sequence[int]) -> int:
    """Number of pairs (Gaussian, voxel) with q < 16; arguments as `voxelize` takes them, for one cloud."""
    m, K = np.asarray(mean, np.float64), np.asarray(_matrix(np.asarray(precision, np.float64)))
    half = support.SIGMA_MAX * np.sqrt(np.diagonal(np.linalg.inv(K), axis1=1, axis2=2))
    low = np.clip(np.ceil(m - half)[:, :2], 0, np.array(shape[:2])).astype(np.int64)
    high = np.clip(np.floor(m + half)[:, :2], -1, np.array(shape[:2]) - 1).astype(np.int64)
    counts = np.maximum(high - low + 1, 0)
    total = 0
    for owner, row in _rows(np.prod(counts, 1)):
        k, c = K[owner], m[owner]
        x = low[owner, 0] + row // counts[owner, 1] - c[:, 0]
        y = low[owner, 1] + row % counts[owner, 1] - c[:, 1]
        # The quadratic in the voxel index z itself, not in its offset from the mean.
        a, b = k[:, 2, 2], k[:, 0, 2] * x + k[:, 1, 2] * y
        rest = k[:, 0, 0] * x * x + 2.0 * k[:, 0, 1] * x * y + k[:, 1, 1] * y * y - support.Q_MAX
        first, last = _interval(a, b - a * c[:, 2], rest + c[:, 2] * (a * c[:, 2] - 2.0 * b), shape[2])
        total += int(np.sum(np.maximum(last - first + 1, 0)))
    return total


def _matrix(packed):
    xx, xy, xz, yy, yz, zz = packed.T
    return np.stack([np.stack([xx, xy, xz], -1), np.stack([xy, yy, yz], -1), np.stack([xz, yz, zz], -1)], -2)


def count_pairs(op: str, spec: Spec, arrays: Sequence[Array]) -> int | None:
    """Number of pairs in a spec's arrays; None for `drr`, which has no Gaussians."""
    size: Any = spec.size
    if op == "splat":
        _, mean, precision, intrinsics = arrays
        return splat_pairs(mean, precision, intrinsics, *size)
    if op == "voxelize":
        _, mean, precision = arrays
        return voxel_pairs(mean, precision, *size)
    return None
