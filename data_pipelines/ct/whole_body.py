"""The body without one vertebra at a coarse resolution, and the two rigid parts that an X-ray is modelled with."""

from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
import scipy

from data_pipelines.ct import scans
from radgs_jax import attenuation
from radgs_jax.geometry import resample
from radgs_jax.registration import prepared
from radgs_jax.registration.parts import Parts

FILL_HU = 40.0
"""HU that replaces a vertebra in the body: muscle. Chosen by hand: half or twice changes the attenuation by a few percent,
which the vertebra's excess takes up."""
END_MM = 60.0
"""Length in mm by which the end slices of a scan are repeated, since the body continues beyond the scan. Chosen by hand: half lets
oblique rays at the end of a scan leave the body, twice costs memory."""
BODY_MM = 2.0
"""Largest voxel side in mm of the surroundings that poses are refined with. Chosen by hand: half takes eight times the memory,
twice blurs the neighbours' edges over more than a pixel."""
PART_REACH_MM = 130.0
"""Length in mm of the surroundings above and below a vertebra that rays through its window may cross. Chosen by hand: half cuts off
rays of steep views, twice doubles the memory."""
EXCESS_MULTIPLE, REST_MULTIPLE = 64, 16
"""Shapes of parts are padded to multiples of these numbers of voxels, so that nearly all vertebrae share their programs. Chosen by
hand: half compiles more programs; twice takes more memory, but hardly any time, since rays end where there are only zeros."""

SLAB = 16
"""Coarse slices that are averaged at a time; half or twice takes half or twice the memory, some ten megabytes."""
ROUND_MM = 6.0
"""How far from a bone tissue is looked for, mm. Chosen by hand: half may lie within blurred borders of the bone, twice takes a thin
arm's surroundings for air."""
TISSUE = 0.25
"""Least mean attenuation around a bone, relative to water, of a CT that shows more than the bone. Chosen by hand: fat has 0.9,
lungs 0.2 to 0.5 and the air of a cut-out bone 0; at half the blur of a cut-out bone's border counts as tissue, at twice lungs are
air."""


class WholeBody:
    """A scan's attenuation on a coarser grid, its end slices repeated for END_MM, from which single vertebrae can be removed.

    Averaging is linear, so removing a vertebra changes a small patch only and does not need a pass over the scan.

    Attributes:
      ct_from_index: (4, 4) in mm, of the coarser grid.
      factor: (3,) voxels of the scan in one of that grid, along each axis.
    """

    def __init__(self, scan: scans.Scan, spacing_mm: float):
        self._spacing_mm, self._grid = spacing_mm, scan.ct_from_index
        self.factor = resample.block_factors(scan.ct_from_index, spacing_mm)
        self._mu, self.ct_from_index, self._repeat = coarse_body(
            scan.hu, scan.ct_from_index, spacing_mm, attenuation.from_hounsfield
        )

    def without(self, vertebra: prepared.Vertebra) -> np.ndarray:
        """Attenuation (X, Y, Z) in 1/mm on the grid `ct_from_index`, with muscle in place of the vertebra.

        All 0 where the CT shows nothing around the bone.
        """
        start = np.linalg.solve(self._grid[:3, :3], vertebra.ct_from_index[:3, 3] - self._grid[:3, 3])
        start = np.rint(start).astype(int)
        first = start // self.factor
        padded = np.pad(excess_over_fill(vertebra), [(int(n), 0) for n in start - first * self.factor])
        patch, _ = resample.block_average(padded, self._grid, self._spacing_mm)
        first[2] += self._repeat
        if self._stands_alone(vertebra, first, start):
            return np.zeros_like(self._mu)
        rest = self._mu.copy()
        rest[tuple(slice(a, a + n) for a, n in zip(first, patch.shape))] -= patch
        return rest

    def _stands_alone(self, vertebra, first, start):
        """Whether the CT shows nothing around a bone, as one does that bones were cut out of."""
        offset = [int(n) for n in start % self.factor]
        mask = np.pad(vertebra.mask.astype(np.float32), [(n, 0) for n in offset])
        share, affine = resample.block_average(mask, self._grid, self._spacing_mm)
        reach = [int(np.ceil(ROUND_MM / n)) for n in np.linalg.norm(affine[:3, :3], axis=0)]
        low = np.maximum(np.array(first) - reach, 0)
        high = np.minimum(np.array(first) + share.shape + reach, self._mu.shape)
        around = np.zeros(high - low, bool)
        inside = tuple(slice(a, a + n) for a, n in zip(np.array(first) - low, share.shape))
        around[inside] = share > 0
        near = scipy.ndimage.distance_transform_edt(~around, np.linalg.norm(affine[:3, :3], axis=0))
        # The first voxels beside the bone hold some of it.
        shell = (near > 0.5 * ROUND_MM) & (near <= ROUND_MM)
        mu = self._mu[tuple(slice(a, b) for a, b in zip(low, high))][shell]
        return mu.size > 0 and mu.mean() < TISSUE * attenuation.from_hounsfield(np.zeros(1, np.float32))[0]


def coarse_body(
    array: np.ndarray,
    ct_from_index: np.ndarray,
    spacing_mm: float,
    values: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Averages a scan's array (X, Y, Z) over blocks (`resample.block_average`) and repeats its end slices for END_MM.

    Args:
      values: what is averaged, as a function of a part of the array: a whole CT of floats would take gigabytes more.
    Returns:
      The array, its affine (4, 4) in mm, and the number of times that each end slice was repeated.
    """
    # The last block is completed with the end slice. Padded with zeros, its mean would be too low, and it is the one
    # that is repeated.
    factor, slices = int(resample.block_factors(ct_from_index, spacing_mm)[2]), array.shape[2]
    parts = []
    for first in range(0, slices, SLAB * factor):
        part = values(array[:, :, first : first + SLAB * factor])
        part = np.pad(part, ((0, 0), (0, 0), (0, -part.shape[2] % factor)), mode="edge")
        parts.append(resample.block_average(part, ct_from_index, spacing_mm))
    array, affine = np.concatenate([part for part, _ in parts], 2), parts[0][1]
    # The axis along the body is the last one, since axes are nearest to RAS+.
    repeat = int(round(END_MM / np.linalg.norm(affine[:3, 2])))
    affine[:3, 3] -= affine[:3, 2] * repeat
    return np.pad(array, ((0, 0), (0, 0), (repeat, repeat)), mode="edge"), affine, repeat


def moving_parts(whole: WholeBody, vertebra: prepared.Vertebra) -> Parts:
    """The two parts of a body and one vertebra of its scan, padded so that most vertebrae have the same shapes."""
    box_from_ct = np.linalg.inv(vertebra.ct_from_box)
    excess, ct_from_excess = resample.block_average(
        excess_over_fill(vertebra), vertebra.ct_from_index, prepared.PART_MM
    )
    rest, grid = whole.without(vertebra), whole.ct_from_index
    along = np.linalg.norm(grid[:3, 2])
    middle = resample.apply_affine(np.linalg.inv(grid), vertebra.ct_from_box[None, :3, 3])[0, 2]
    first = max(0, int(middle - PART_REACH_MM / along))
    rest = sharpened(rest[:, :, first : int(middle + PART_REACH_MM / along) + 2], whole.factor)
    # As long wherever in the scan a vertebra lies.
    rest = np.pad(rest, [(0, 0), (0, 0), (0, max(0, int(2.0 * PART_REACH_MM / along) + 3 - rest.shape[2]))])
    ct_from_rest = resample.part_from_index(grid, [0, 0, first])
    arrays = [
        np.pad(part, [(0, -n % multiple) for n in part.shape]).astype(np.float16)
        for part, multiple in ((excess, EXCESS_MULTIPLE), (rest, REST_MULTIPLE))
    ]
    return Parts(arrays[0], box_from_ct @ ct_from_excess, arrays[1], box_from_ct @ ct_from_rest)


def sharpened(array: np.ndarray, factor: Sequence[int]) -> np.ndarray:
    """A coarser array (X, Y, Z), less the blur that averaging over blocks and interpolating between their means have added.

    Along an axis, the mean of f voxels has a variance of (1 - 1/f^2) / 12 of a block's side squared, and linear interpolation one
    of 1/6, where it had 1 / (6 f^2) in the finer array. The filter (-a, 1 + 2 a, -a) takes away 2 a of it.

    Args:
      factor: voxels of the finer array in a block, along each axis.
    """
    for axis, f in enumerate(factor):
        a = (1.0 - 1.0 / f**2) / 8.0
        if a > 0.0:
            array = scipy.ndimage.correlate1d(array, [-a, 1.0 + 2.0 * a, -a], axis, mode="nearest")
    return array


def excess_over_fill(vertebra: prepared.Vertebra) -> np.ndarray:
    """Attenuation (X, Y, Z) in 1/mm of a vertebra above the muscle that replaces it, on the vertebra's own grid."""
    fill = attenuation.from_hounsfield(np.array(FILL_HU, np.float32))
    return np.where(vertebra.mask, vertebra.density - fill, 0.0).astype(np.float32)
