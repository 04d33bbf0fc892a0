"""Voxel arrays on other grids: averaged over blocks, or interpolated. numpy."""

import itertools
from collections.abc import Sequence
from typing import Protocol
from typing import runtime_checkable

import numpy as np
import scipy
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Real
from jaxtyping import Shaped

GRID_SHAPE = (96, 96, 96)
"""Voxels of 1 mm of the evaluation grid of the case format, in CT axes, centred on the vertebra. At half, an adult's vertebra does
not fit; at twice, eight times the voxels hold mostly empty space, which raises the paper's scores."""
WHOLE = 1e-6
"""Tolerance of `block_factors`, voxels: a spacing that is a whole number of voxels up to rounding counts as one. Chosen by hand
between the rounding error of an affine and any real difference of spacings; half or twice makes no difference."""


@runtime_checkable
class HasBox(Protocol):
    """Anything with the vertebra's own frame, (4, 4) ct_from_box in mm, such as `registration.prepared.Vertebra`."""

    @property
    def ct_from_box(self) -> np.ndarray:
        """From the vertebra's frame to the CT's."""
        ...


def part_from_index(
    ct_from_index: Float[np.ndarray, "4 4"], start: Real[np.ndarray, "3"] | Sequence[int | np.integer]
) -> Float[np.ndarray, "4 4"]:
    """The affine, mm, of the part of an array that begins at voxel `start`, from the affine of the whole array."""
    affine = ct_from_index.copy()
    affine[:3, 3] += ct_from_index[:3, :3] @ np.asarray(start)
    return affine


def apply_affine(matrix: Real[np.ndarray, "4 4"], points: Real[np.ndarray, "*batch 3"]) -> Real[np.ndarray, "*batch 3"]:
    """Points mapped by an affine."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def resample(
    array: Shaped[np.ndarray, "x y z"],
    ct_from_index: Real[np.ndarray, "4 4"],
    ct_from_grid: Real[np.ndarray, "4 4"],
    shape: Sequence[int | np.integer],
    order: int = 1,
    outside: float | int = 0.0,
) -> Float[np.ndarray, "i j k"]:
    """Interpolates an array on another affine grid of the same frame.

    Args:
      ct_from_index: affine of the array.
      ct_from_grid: affine of the result.
      shape: three sizes of the result.
      order: 1 for trilinear interpolation, 0 for the nearest voxel.
      outside: value beyond the array.

    Returns:
      float32 array of `shape`.
    """
    index_from_grid = np.linalg.inv(ct_from_index) @ ct_from_grid
    found = np.full([int(n) for n in shape], outside, np.float32)
    # A vertebra on the grid of its body fills a hundredth of it.
    met = reached(np.linalg.inv(index_from_grid), array.shape, found.shape)
    first = np.array([part.start for part in met])
    scipy.ndimage.affine_transform(
        np.asarray(array, np.float32),
        index_from_grid[:3, :3],
        apply_affine(index_from_grid, first),
        found[met].shape,
        found[met],
        order=order,
        mode="constant",
        cval=outside,
    )
    return found


def reached(
    grid_from_index: Real[np.ndarray, "4 4"], array_shape: Sequence[int], grid_shape: Sequence[int]
) -> tuple[slice, ...]:
    """The part of a grid, a slice an axis, that an array and the voxel around it reach: the rest is outside."""
    corners = np.array(list(itertools.product(*[(-1.0, float(n)) for n in array_shape])))
    places = apply_affine(grid_from_index, corners)
    first = np.clip(np.floor(places.min(0)), 0, grid_shape).astype(int)
    end = np.clip(np.ceil(places.max(0)) + 1, first, grid_shape).astype(int)
    return tuple(slice(int(a), int(b)) for a, b in zip(first, end))


def centred_affine(
    centre: Real[np.ndarray, "3"], shape: Sequence[int | np.integer], spacing_mm: float | int
) -> Float[np.ndarray, "4 4"]:
    """Affine, mm, of an axis-aligned grid of three sizes whose middle is `centre`."""
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = centre - 0.5 * spacing_mm * (np.array(shape) - 1)
    return affine


def evaluation_grid(
    vertebra: HasBox, centre: Real[np.ndarray, "3"] | Sequence[float] | None = None
) -> Float[np.ndarray, "4 4"]:
    """Affine, mm, of the case format's evaluation grid, centred on `centre` or else on the origin of the vertebra's frame."""
    return centred_affine(vertebra.ct_from_box[:3, 3] if centre is None else np.asarray(centre), GRID_SHAPE, 1.0)


def block_factors(ct_from_index: Real[np.ndarray, "4 4"], spacing_mm: float | int) -> Int[np.ndarray, "3"]:
    """Number of voxels per block along each axis that keeps the spacing at or below `spacing_mm`; at least 1."""
    return np.maximum(1, np.floor(spacing_mm / np.linalg.norm(ct_from_index[:3, :3], axis=0) + WHOLE)).astype(int)


def block_average(
    array: Shaped[np.ndarray, "x y z"], ct_from_index: Real[np.ndarray, "4 4"], spacing_mm: float | int
) -> tuple[Float[np.ndarray, "i j k"], Real[np.ndarray, "4 4"]]:
    """Averages an array over blocks of voxels. Incomplete blocks at the end are filled up with zeros.

    Args:
      ct_from_index: affine of the array, mm.
      spacing_mm: longest allowed side of a block; a voxel that is longer stays as it is.

    Returns:
      float32 array and its exact affine.
    """
    factor = block_factors(ct_from_index, spacing_mm)
    padded = np.pad(array, [(0, -n % f) for n, f in zip(array.shape, factor)])
    shape = np.array(padded.shape) // factor
    blocks = padded.reshape(shape[0], factor[0], shape[1], factor[1], shape[2], factor[2])
    affine = ct_from_index.copy()
    affine[:3, :3] = ct_from_index[:3, :3] * factor
    affine[:3, 3] = ct_from_index[:3, 3] + ct_from_index[:3, :3] @ (0.5 * (factor - 1))
    return blocks.mean((1, 3, 5), dtype=np.float32), affine
