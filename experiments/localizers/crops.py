"""Random crops of acquisitions as training batches."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import scipy

from data_pipelines.simulation import panel

if typing.TYPE_CHECKING:
    from experiments.localizers.training import LocalizerTraining

CLEAN_SHARE = 0.3
"""Fraction of crops from clean X-rays. Chosen by hand, like all values below: more variation covers more
X-ray panels and takes more training."""
COLLIMATED_SHARE, COLLIMATED_RANGE = 0.2, (0.2, 0.8)
"""Fraction of crops with a further collimator, and the range of its strength (`panel.random_collimator`)."""
VALID_LIMIT, OPEN_LIMIT = 0.9, 0.5
"""Minimum interpolated value at which a pixel counts as valid, and as not covered by the further collimator."""
CURVE, SHADE, NOISE = 0.1, 0.2, 0.05
"""Maximum strength of the contrast curve (per unit of line integral), of the shading and of the noise (line integrals)."""
BLURRED_SHARE, BLUR_PX = 0.3, (0.3, 1.0)
"""Fraction of blurred crops, and the range of the blur's standard deviation, pixels."""


def batch_of(
    pool: Mapping[str, np.ndarray],
    levels: Sequence[int],
    rng: np.random.Generator,
    config: LocalizerTraining,
    size: int,
) -> tuple[np.ndarray, ...]:
    """A training batch: crops of clean and of measured X-rays at random places, slightly turned and scaled, with their truth.

    Args:
      pool: X-rays, as `acquisitions.gather` returns them.
      levels: VerSe numbers that the localizer knows, K of them.
      config: ranges of the crops.
      size: number of crops, B.
    Returns:
      images and valid (B, S, S); beam (B, 3), the viewing direction in world axes; centres (B, K, 2), pixels; seen and known
      (B, K), whether a level is in the crop and whether that is known.
    """
    levels, crop_px = list(levels), config.crop_px
    rows = []
    for index in rng.integers(len(pool["valid"]), size=size):
        clean = rng.uniform() < CLEAN_SHARE
        image = pool["clean" if clean else "measured"][index].astype(np.float32)
        valid = np.ones(image.shape, bool) if clean else pool["valid"][index]
        # Pixel (row, column) of the pool's image = matrix @ pixel of the crop + start.
        angle, scale = np.radians(config.turn_deg * rng.uniform(-1.0, 1.0)), 1.0 + config.scale * rng.uniform(-1.0, 1.0)
        matrix = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        room = 0.5 * max(image.shape[0] - crop_px, 0)
        place = 0.5 * (np.array(image.shape) - 1) + rng.uniform(-room, room, 2)
        start = place - matrix @ np.full(2, 0.5 * (crop_px - 1))
        inside = (
            scipy.ndimage.affine_transform(valid.astype(np.float32), matrix, start, (crop_px,) * 2, order=1)
            > VALID_LIMIT
        )
        image = scipy.ndimage.affine_transform(image, matrix, start, (crop_px,) * 2, order=1, mode="nearest")
        image = _spoil(image, rng)
        if rng.uniform() < COLLIMATED_SHARE:
            inside &= panel.random_collimator(image.shape, rng.uniform(*COLLIMATED_RANGE), rng, 1.0) > OPEN_LIMIT
        uv = np.linalg.solve(matrix, pool["centroids"][index][:, ::-1].T - start[:, None]).T[:, ::-1]
        pixel = np.rint(uv).astype(int)
        seen = pool["in_sight"][index] & (pixel >= 0).all(1) & (pixel < crop_px).all(1)
        covered = seen & ~inside[tuple(np.clip(pixel[:, ::-1], 0, crop_px - 1).T)]
        known = pool["known"][index] & ~covered
        beam = pool["camera_from_world"][index][2, :3]
        rows.append((image, inside, beam, uv[levels], seen[levels], known[levels]))
    types = (np.float32, bool, np.float32, np.float32, bool, bool)
    return tuple(np.stack(column).astype(kind) for column, kind in zip(zip(*rows), types))


def _spoil(image, rng):
    """Adds faults of X-ray panels beyond the simulated ones: another contrast curve, shading, blur and noise."""
    image = image / (1.0 + rng.uniform(0.0, CURVE) * np.maximum(image, 0.0))
    shade = scipy.ndimage.zoom(
        rng.normal(size=(3, 3)), np.array(image.shape) / 3, order=1, grid_mode=True, mode="nearest"
    )
    image = image + rng.uniform(0.0, SHADE) * shade
    if rng.uniform() < BLURRED_SHARE:
        image = scipy.ndimage.gaussian_filter(image, rng.uniform(*BLUR_PX))
    return image + rng.uniform(0.0, NOISE) * rng.normal(size=image.shape)
