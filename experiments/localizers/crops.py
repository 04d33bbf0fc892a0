"""Random crops of acquisitions as training batches."""

import numpy as np
import scipy

from data_pipelines.simulation import panel


def batch_of(pool, levels, rng, config, size):
    """A training batch: crops at random places, turned and scaled a little, of clean and of measured X-rays, with their truth.

    Args:
      pool: as `gather` gives; levels: VerSe numbers of the detector; config: `TrainConfig`; size: B.
    Returns:
      (images, valid (B, S, S), beam (B, 3), centres (B, K, 2), seen, known (B, K)).
    """
    levels, crop_px = list(levels), config.crop_px
    rows = []
    for index in rng.integers(len(pool["valid"]), size=size):
        clean = rng.uniform() < 0.3
        image = pool["clean" if clean else "measured"][index].astype(np.float32)
        valid = np.ones(image.shape, bool) if clean else pool["valid"][index]
        # Pixel (row, column) of the pool's image = matrix @ pixel of the crop + start.
        angle, scale = np.radians(config.turn_deg * rng.uniform(-1.0, 1.0)), 1.0 + config.scale * rng.uniform(-1.0, 1.0)
        matrix = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        room = 0.5 * max(image.shape[0] - crop_px, 0)
        place = 0.5 * (np.array(image.shape) - 1) + rng.uniform(-room, room, 2)
        start = place - matrix @ np.full(2, 0.5 * (crop_px - 1))
        inside = scipy.ndimage.affine_transform(valid.astype(np.float32), matrix, start, (crop_px,) * 2, order=1) > 0.9
        image = scipy.ndimage.affine_transform(image, matrix, start, (crop_px,) * 2, order=1, mode="nearest")
        image = _spoil(image, rng)
        if rng.uniform() < 0.2:
            inside &= panel.collimator(image.shape, rng.uniform(0.2, 0.8), rng, 1.0) > 0.5
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
    """What a detector may do beyond the simulated: another contrast curve, shading, blur and noise."""
    image = image / (1.0 + rng.uniform(0.0, 0.1) * np.maximum(image, 0.0))
    shade = scipy.ndimage.zoom(
        rng.normal(size=(3, 3)), np.array(image.shape) / 3, order=1, grid_mode=True, mode="nearest"
    )
    image = image + rng.uniform(0.0, 0.2) * shade
    if rng.uniform() < 0.3:
        image = scipy.ndimage.gaussian_filter(image, rng.uniform(0.3, 1.0))
    return image + rng.uniform(0.0, 0.05) * rng.normal(size=image.shape)


class Crops:
    """Endless `batch_of`s: batch n is a function of (seed, n), so that its place is n."""

    def __init__(self, pool, levels, config, size):
        self._make, self._seed, self._step = (lambda rng: batch_of(pool, levels, rng, config, size)), config.seed, 0

    def __next__(self):
        self._step += 1
        return self._make(np.random.default_rng([self._seed, self._step - 1]))

    def get_state(self):
        return self._step

    def set_state(self, place):
        self._step = place
