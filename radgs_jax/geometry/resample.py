"""Voxel arrays on other grids: averaged over blocks, or interpolated. numpy."""

import numpy as np
import scipy

GRID_SHAPE = (96, 96, 96)
"""The evaluation grid of the case format: 96^3 at 1 mm in CT axes, centred on the vertebra."""


def part_from_index(ct_from_index, start):
    """The affine (4, 4), mm, of an array's part that begins at voxel `start` (3,), from the whole array's."""
    affine = ct_from_index.copy()
    affine[:3, 3] += ct_from_index[:3, :3] @ np.asarray(start)
    return affine


def apply_affine(matrix, points):
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def resample(array, ct_from_index, ct_from_grid, shape, order=1, outside=0.0):
    """An array (X, Y, Z) on another affine grid of the same frame, `outside` where it ends; order 1 trilinear, 0 nearest.

    Args:
      ct_from_index, ct_from_grid: (4, 4) of the array and of the result; shape: the result's, float32.
    """
    index_from_grid = np.linalg.inv(ct_from_index) @ ct_from_grid
    return scipy.ndimage.affine_transform(
        np.asarray(array, np.float32),
        index_from_grid[:3, :3],
        index_from_grid[:3, 3],
        shape,
        order=order,
        mode="constant",
        cval=outside,
    )


def centred_affine(centre, shape, spacing_mm):
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = centre - 0.5 * spacing_mm * (np.array(shape) - 1)
    return affine


def evaluation_grid(vertebra, centre=None):
    """ct_from_index (4, 4) of the case format's evaluation grid: CT axes, 1 mm, centred on `centre` or the mask's centroid."""
    return centred_affine(vertebra.ct_from_box[:3, 3] if centre is None else np.asarray(centre), GRID_SHAPE, 1.0)


def block_factors(ct_from_index, spacing_mm):
    """Voxels per block and axis that keep the spacing at or below `spacing_mm` (1 at least)."""
    return np.maximum(1, np.floor(spacing_mm / np.linalg.norm(ct_from_index[:3, :3], axis=0) + 1e-6)).astype(int)


def block_average(array, ct_from_index, spacing_mm):
    """An array (X, Y, Z) averaged over whole blocks of voxels, the last ones filled up with zeros, and its exact affine.

    Args:
      ct_from_index: (4, 4) of the array; spacing_mm: largest side of a block, unless a voxel's is larger.
    Returns:
      float32 array, ct_from_index (4, 4) of it.
    """
    factor = block_factors(ct_from_index, spacing_mm)
    padded = np.pad(array, [(0, -n % f) for n, f in zip(array.shape, factor)])
    shape = np.array(padded.shape) // factor
    blocks = padded.reshape(shape[0], factor[0], shape[1], factor[1], shape[2], factor[2])
    affine = ct_from_index.copy()
    affine[:3, :3] = ct_from_index[:3, :3] * factor
    affine[:3, 3] = ct_from_index[:3, 3] + ct_from_index[:3, :3] @ (0.5 * (factor - 1))
    return blocks.mean((1, 3, 5), dtype=np.float32), affine
