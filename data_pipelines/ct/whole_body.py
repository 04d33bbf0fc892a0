"""The rest of the body at a coarse resolution, and the two parts that refinement moves."""

import numpy as np

from radgs_jax import attenuation
from radgs_jax.geometry import resample
from radgs_jax.registration import prepared

FILL_HU = 40.0
"""What fills a vertebra's hole in the rest of the body: muscle."""
END_MM = 60.0
"""How far a scan's end slices are repeated: the body goes on where the scan stops."""
BODY_MM = 2.0
"""Voxels of the rest of the body that poses are refined with."""
PART_MM = 1.0
"""And of the vertebra."""
PART_REACH_MM = 130.0
"""How far along the body rays through a vertebra's window leave its level."""


class WholeBody:
    """A scan's attenuation on a coarser grid, its end slices repeated for 60 mm, from which single vertebrae can be taken.

    Averaging is linear, so taking a vertebra out costs a small patch, not a pass over the scan.
    """

    def __init__(self, scan, spacing_mm):
        self._spacing_mm, self._grid = spacing_mm, scan.ct_from_index
        mu = attenuation.from_hounsfield(scan.hu)
        self._mu, self.ct_from_index, self._repeat = coarse_body(mu, scan.ct_from_index, spacing_mm)

    def without(self, vertebra):
        """Attenuation (X, Y, Z) in 1/mm on the grid `ct_from_index`, muscle in the vertebra's place."""
        factor = resample.block_factors(self._grid, self._spacing_mm)
        start = np.linalg.solve(self._grid[:3, :3], vertebra.ct_from_index[:3, 3] - self._grid[:3, 3])
        start = np.rint(start).astype(int)
        first = start // factor
        padded = np.pad(excess_over_fill(vertebra), [(int(n), 0) for n in start - first * factor])
        patch, _ = resample.block_average(padded, self._grid, self._spacing_mm)
        rest = self._mu.copy()
        first[2] += self._repeat
        rest[tuple(slice(a, a + n) for a, n in zip(first, patch.shape))] -= patch
        return rest


def coarse_body(array, ct_from_index, spacing_mm):
    """A scan's array (X, Y, Z) averaged over blocks (`block_average`), its end slices repeated for END_MM.

    Returns:
      the array, its affine (4, 4) in mm, and how often each end slice was repeated.
    """
    # The last block is filled up with the end slice: filled with air, it would be what is repeated.
    fill = -array.shape[2] % resample.block_factors(ct_from_index, spacing_mm)[2]
    array = np.pad(array, ((0, 0), (0, 0), (0, fill)), mode="edge")
    array, affine = resample.block_average(array, ct_from_index, spacing_mm)
    # The scan axis is the one nearest to the body's length; after reorientation to RAS that is the last one.
    repeat = int(round(END_MM / np.linalg.norm(affine[:3, 2])))
    affine[:3, 3] -= affine[:3, 2] * repeat
    return np.pad(array, ((0, 0), (0, 0), (repeat, repeat)), mode="edge"), affine, repeat


def moving_parts(whole, vertebra):
    """The `Parts` of a `WholeBody` and one `Vertebra` of its scan, in sizes that few vertebrae differ in."""
    box_from_ct = np.linalg.inv(vertebra.ct_from_box)
    excess, ct_from_excess = resample.block_average(excess_over_fill(vertebra), vertebra.ct_from_index, PART_MM)
    rest, grid = whole.without(vertebra), whole.ct_from_index
    along = np.linalg.norm(grid[:3, 2])
    middle = resample.apply_affine(np.linalg.inv(grid), vertebra.ct_from_box[None, :3, 3])[0, 2]
    first = max(0, int(middle - PART_REACH_MM / along))
    rest = rest[:, :, first : int(middle + PART_REACH_MM / along) + 2]
    ct_from_rest = resample.part_from_index(grid, [0, 0, first])
    arrays = [np.pad(a, [(0, -n % 16) for n in a.shape]).astype(np.float16) for a in (excess, rest)]
    return prepared.Parts(arrays[0], box_from_ct @ ct_from_excess, arrays[1], box_from_ct @ ct_from_rest)


def excess_over_fill(vertebra):
    """Attenuation (X, Y, Z), 1/mm, that a `Vertebra` has above the muscle that fills its hole, on its own grid."""
    fill = attenuation.from_hounsfield(np.array(FILL_HU, np.float32))
    return np.where(vertebra.mask, vertebra.density - fill, 0.0).astype(np.float32)
