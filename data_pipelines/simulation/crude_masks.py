"""Masks of a vertebra that are not what an expert would draw: the border moved, in steps, or blurred by coarse voxels."""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy

from data_pipelines.ct import scans

MARGIN = 8
"""Margin around a vertebra's box in which its mask is changed, voxels: the largest dilation of the sweeps at 0.25 mm
spacing. Chosen by hand; twice of it only takes longer, half of it would cut dilations on fine scans."""
WAVE_MM = 5.0
"""Standard deviation of the filter that makes a border wander smoothly, mm. Chosen by hand, about the size of what segmentation
networks miss or add; half of it makes a rough border, twice of it moves whole faces."""
STEP_MM = 1.5
"""Voxels of a wandering border, mm: what segmentation networks work at. Half is hardly seen; twice loses processes."""

Change = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A mask (X, Y, Z) bool and its spacing (3,), mm -> the changed mask."""


def eroded(mask: np.ndarray, spacing_mm: np.ndarray, size_mm: float) -> np.ndarray:
    """The mask (X, Y, Z) without what is nearer than `size_mm` to its outside."""
    return scipy.ndimage.distance_transform_edt(mask, spacing_mm) > size_mm


def dilated(mask: np.ndarray, spacing_mm: np.ndarray, size_mm: float) -> np.ndarray:
    """The mask (X, Y, Z) and what is within `size_mm` of it."""
    return scipy.ndimage.distance_transform_edt(~mask, spacing_mm) <= size_mm


def coarse(mask: np.ndarray, spacing_mm: np.ndarray, size_mm: float) -> np.ndarray:
    """The mask (X, Y, Z) as voxels of about `size_mm` show it."""
    steps = np.maximum(1, np.round(size_mm / spacing_mm).astype(int))
    index = [np.minimum(np.arange(n) // s * s + s // 2, n - 1) for n, s in zip(mask.shape, steps)]
    return mask[np.ix_(*index)]


def wandering(mask: np.ndarray, spacing_mm: np.ndarray, most_mm: float, rng: np.random.Generator) -> np.ndarray:
    """The mask (X, Y, Z) with its border moved in or out by up to `most_mm`, smoothly along it, in voxels of `STEP_MM`."""
    inside = scipy.ndimage.distance_transform_edt(mask, spacing_mm)
    from_centres = inside - scipy.ndimage.distance_transform_edt(~mask, spacing_mm)
    # Distances are between voxel centres, and the border lies half a voxel nearer.
    signed_mm = np.sign(from_centres) * np.maximum(np.abs(from_centres) - 0.5 * spacing_mm.mean(), 0.0)
    wave = scipy.ndimage.gaussian_filter(rng.normal(size=mask.shape), WAVE_MM / spacing_mm)
    return coarse(signed_mm + most_mm * np.clip(0.5 * wave / wave.std(), -1.0, 1.0) > 0, spacing_mm, STEP_MM)


def changed(scan: scans.Scan, label: int, change: Change) -> scans.Scan:
    """A scan with a changed mask of one vertebra, VerSe number `label`; other vertebrae keep theirs."""
    region = tuple(slice(max(0, s.start - MARGIN), s.stop + MARGIN) for s in scan.boxes[label])
    labels = scan.labels.copy()
    part = labels[region]
    found = change(part == label, np.linalg.norm(scan.ct_from_index[:3, :3], axis=0))
    found &= (part == label) | (part == 0)
    labels[region] = np.where(found, label, np.where(part == label, 0, part))
    return dataclasses.replace(scan, labels=labels)
