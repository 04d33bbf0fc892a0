"""Slices of a CT in the C-arm's frame, and X-rays, as arrays of bytes that the page draws."""

import dataclasses

import numpy as np

from data_pipelines.ct.scans import AIR_HU
from data_pipelines.ct.scans import Scan
from experiments.reports import pictures
from radgs_jax.geometry import resample
from radgs_jax.geometry.xray import XRay

PIXELS, PIXEL_MM = 256, 0.7
"""Size of a slice and its pixels: 179 mm, a vertebra with its neighbours and the back's muscles, at a CT's usual resolution. Half
the pixels blur it, twice takes four times as long to send."""
REACH, STEP_MM = 60, 1.0
"""Slices to each side of the vertebra's centre, and their distance: past the neighbours of a lumbar vertebra. Half stops inside
them; twice leaves the pictures of the other two planes."""
PLANES = {"axial": (2, (0, 1)), "coronal": (1, (0, 2)), "sagittal": (0, (1, 2))}
"""The world axis that a plane's slices follow, and those of its columns and rows. Columns and rows run against their axes: the
patient's right is on the left, the front above, or on the left of a sagittal slice, and the head above, as radiologists look."""
EDGES = {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF"}
"""Letters at the left, right, upper and lower edge of a plane's slices: right, left, anterior, posterior, head, foot."""
XRAY_STEPS = 65535
"""Numbers that an X-ray's line integrals are sent in: 16 bits, whose steps no window shows."""


@dataclasses.dataclass(frozen=True)
class Slices:
    """A CT at a pose.

    Attributes:
      scan: the CT.
      world_from_ct: (4, 4), mm.
      centre: (3,) where the three middle slices meet, world mm.
    """

    scan: Scan
    world_from_ct: np.ndarray
    centre: np.ndarray

    def slice(self, plane: str, index: int) -> np.ndarray:
        """HU (PIXELS, PIXELS) int16 of a slice, air outside the scan; index: from -REACH to REACH along the plane's world axis."""
        along, (column, row) = PLANES[plane]
        world_from_pixel = np.zeros((4, 4))
        world_from_pixel[column, 0] = world_from_pixel[row, 1] = -PIXEL_MM
        world_from_pixel[along, 2] = world_from_pixel[3, 3] = 1.0
        middle = world_from_pixel @ [0.5 * (PIXELS - 1), 0.5 * (PIXELS - 1), 0.0, 0.0]
        world_from_pixel[:3, 3] = self.centre - middle[:3]
        world_from_pixel[along, 3] += STEP_MM * index
        ct_from_pixel = np.linalg.inv(self.world_from_ct) @ world_from_pixel
        hu, ct_from_index = self._part(ct_from_pixel)
        if not hu.size:
            return np.full((PIXELS, PIXELS), AIR_HU, np.int16)
        found = resample.resample(hu, ct_from_index, ct_from_pixel, (PIXELS, PIXELS, 1), outside=AIR_HU)
        return np.clip(np.round(found[:, :, 0].T), -32768, 32767).astype(np.int16)

    def _part(self, ct_from_pixel):
        """The part of the scan that a slice reaches, and its affine, so that not all of it is converted for each slice."""
        grid = self.scan.ct_from_index
        met = resample.reached(np.linalg.inv(grid) @ ct_from_pixel, (PIXELS, PIXELS, 1), self.scan.hu.shape)
        start = [axis.start for axis in met]
        return self.scan.hu[met], resample.part_from_index(grid, start)


def xray_range(xray: XRay) -> dict[str, float]:
    """Line integrals between which an X-ray is sent (low, high), and which are drawn black and white at first."""
    image, valid = np.asarray(xray.line_integrals), np.asarray(xray.valid)
    shown, middle = image[valid], tuple(slice(n // 4, n - n // 4) for n in image.shape)
    # Bones are in the middle half; the air beside a lateral's back would take most of the greys.
    black, white = pictures.contrast(image[middle], valid[middle])
    low, high = float(shown.min()), float(shown.max())
    return {"low": low, "high": high, "black": float(black), "white": float(white)}


def xray_numbers(xray: XRay) -> np.ndarray:
    """An X-ray (H, W) uint16: 0 to XRAY_STEPS from the lowest to the highest valid line integral; 0 where a pixel is not valid."""
    limits = xray_range(xray)
    scale = XRAY_STEPS / max(limits["high"] - limits["low"], 1e-9)
    numbers = np.clip(np.round((np.asarray(xray.line_integrals) - limits["low"]) * scale), 0, XRAY_STEPS)
    return np.where(xray.valid, numbers, 0).astype(np.uint16)
