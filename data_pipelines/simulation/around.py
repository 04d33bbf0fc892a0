"""X-rays of a bone alone from all around it, in which a reconstruction can be tested with more views than a C-arm takes."""

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from data_pipelines.simulation import carm
from data_pipelines.simulation import quick
from radgs_jax.geometry import resample
from radgs_jax.registration.prepared import Vertebra

SOURCE_MM = 700.0
"""Distance of the source from the bone's centre, mm: the case format's."""
STEP_MM, OVERSAMPLE = 0.5, 2
"""Distance of samples along a ray, mm, and rays along a side of a pixel. Finer ones change images by less than their noise."""


def xrays_around(
    vertebra: Vertebra, count: int, pixel_mm: float, size_px: int
) -> tuple[
    Float[np.ndarray, "views {size_px} {size_px}"], Float[np.ndarray, "views 4"], Float[np.ndarray, "views 4 4"]
]:
    """Line integrals of a vertebra alone from `count` directions, evenly over half a turn about its long axis.

    Two views are 90 degrees apart.

    Args:
      pixel_mm: size of a pixel at the centre, mm; size_px: pixels along a side.
    Returns:
      images, intrinsics, and camera_from_box, mm.
    """
    cameras = np.stack([carm.extrinsics(180.0 * i / count, 0.0, SOURCE_MM) for i in range(count)])
    focal, middle = SOURCE_MM / pixel_mm, 0.5 * (size_px - 1)
    intrinsics = np.tile([focal, focal, middle, middle], (count, 1))
    box_from_ct = np.linalg.inv(vertebra.ct_from_box)
    seen = intrinsics, cameras, (size_px, size_px), STEP_MM, OVERSAMPLE
    return quick.render(vertebra.density, vertebra.ct_from_index, box_from_ct, *seen), intrinsics, cameras


def in_box(
    vertebra: Vertebra, side: int, spacing_mm: float
) -> tuple[Float[np.ndarray, "{side} {side} {side}"], Bool[np.ndarray, "{side} {side} {side}"]]:
    """A vertebra's density, 1/mm, and mask on `side`^3 voxels in the axes and around the origin of its own frame."""
    box_from_grid = resample.centred_affine(np.zeros(3), (side,) * 3, spacing_mm)
    ct_from_grid = vertebra.ct_from_box @ box_from_grid
    density = resample.resample(vertebra.density, vertebra.ct_from_index, ct_from_grid, (side,) * 3)
    mask = resample.resample(vertebra.mask, vertebra.ct_from_index, ct_from_grid, (side,) * 3, order=0)
    return density, mask > 0.5
