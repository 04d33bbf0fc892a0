"""Straight borders at any angle as candidates for a search: where the steepest steps of an image agree on four directions."""

import numpy as np
import scipy

_STEEP = 0.08
"""Smallest step of a border's point, in units of the logarithm per pixel. Half adds anatomy, twice misses weak borders."""
_INWARD = 0.5
"""Smallest cosine between such a step and the direction to the image's middle, since a field contains that. Half adds anatomy,
twice excludes all."""
_BIN_DEG = 2.0
"""Width of the bins of directions, in degrees. Half has fewer points in each, twice is less sure of the angle."""
_AGREE = 0.35
"""Smallest share of the steps whose directions, apart from quarter turns, are within a bin of the most frequent one. Without a
border it is about 0.1 to 0.2; half takes anatomy, and 1 is the maximum."""
_NEAR_DEG = 8.0
"""Largest angle between a step and the border that it is counted for, in degrees. Half loses points to noise, twice adds others."""
_TILTS_DEG = np.arange(-3.0, 3.5, 1.0)
"""Angles about the most frequent direction that are tried, in degrees. Half misses borders that are not quite square."""
_MIN_POINTS = 12
"""Smallest number of points of a border. Half adds specks, twice misses short borders."""


def candidates(log: np.ndarray, count: int) -> list[list[np.ndarray]]:
    """For each of four directions, up to `count` borders (a, b, c) with a u + b v >= c inside, best first; none if steps disagree.

    Args:
      log: (H, W) logarithm of intensity, in the pixels that borders are in.
      count: how many.
    """
    smooth = scipy.ndimage.gaussian_filter(log, 0.7)
    gv, gu = np.gradient(smooth)
    size = np.hypot(gu, gv)
    v, u = np.nonzero(size > _STEEP)
    if len(v) < 4 * _MIN_POINTS:
        return [[], [], [], []]
    normal = np.stack([gu[v, u], gv[v, u]]) / size[v, u]
    middle = 0.5 * (np.array(log.shape)[:, None] - 1)
    inward = np.stack([middle[1] - u, middle[0] - v])
    inward /= np.maximum(np.linalg.norm(inward, axis=0), 1.0)
    keep = (normal * inward).sum(0) > _INWARD
    u, v, normal, weight = u[keep], v[keep], normal[:, keep], np.minimum(size[v, u][keep], 1.0)
    angle = np.degrees(np.arctan2(normal[1], normal[0]))
    bins = int(90 / _BIN_DEG)
    votes = np.bincount((angle % 90 / _BIN_DEG).astype(int) % bins, weight, bins)
    votes = votes + np.roll(votes, 1) + np.roll(votes, -1)
    best = int(np.argmax(votes))
    if votes[best] < _AGREE * weight.sum():
        return [[], [], [], []]
    return [_along(u, v, angle, weight, (best + 0.5) * _BIN_DEG + 90 * quarter, count) for quarter in range(4)]


def _along(u, v, angle, weight, direction, count):
    """The strongest borders whose normal is near `direction`, degrees."""
    off = np.abs((angle - direction + 180) % 360 - 180)
    near = off < _NEAR_DEG
    if near.sum() < _MIN_POINTS:
        return []
    u, v, weight = u[near], v[near], weight[near]
    found = []
    for tilt in np.radians(direction + _TILTS_DEG):
        a, b = np.cos(tilt), np.sin(tilt)
        offset = a * u + b * v
        low = np.floor(offset.min())
        at = np.rint(offset - low).astype(int)
        total = np.bincount(at, weight)
        if total.max() > 0:
            found += [(total[k], a, b, low + k) for k in np.argsort(total)[::-1][:2] if (at == k).sum() >= _MIN_POINTS]
    found.sort(key=lambda line: -line[0])
    return [np.array(line[1:]) for line in found[:count]]
