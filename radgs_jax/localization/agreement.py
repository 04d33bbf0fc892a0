"""Views that agree on the levels they show, and a start pose from what they say together. numpy."""

import dataclasses
import itertools

import numpy as np
import scipy

from radgs_jax.geometry import triangulation

SPREAD_MM = 3.0
"""Standard deviation of the distance at which two views' rays of one vertebra pass each other."""
APART_MM = 3.0 * SPREAD_MM
"""Rays that pass each other at a larger distance are of different vertebrae."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What the views say together.

    shifts: (V,) by how many levels each view's own answer was moved; probability: of these shifts against all others;
    level -> centres (3,) world mm, covariances (3, 3), apart_mm: largest distance between two views' rays.
    own_apart_mm: the same as `apart_mm` for the views' own answers: large where a view mixed the levels up.
    """

    shifts: tuple
    probability: float
    centres: dict
    covariances: dict
    apart_mm: dict
    own_apart_mm: dict


def agree(found, intrinsics, camera_from_world, reach=2):
    """The one numbering of the levels that all views support best, among shifts of each by up to `reach` levels.

    A set of shifts scores each view's evidence for the shifted levels, and, for each pair of views and each level that both
    show, half the square of the distance between their rays over `SPREAD_MM`, but no worse than at `APART_MM`.

    Args:
      found: `Found` of each view; intrinsics: (V, 4); camera_from_world: (V, 4, 4).
    Returns:
      `Agreement`, or None where no level is in sight of two views.
    Raises:
      ValueError: as `triangulate`: one camera given twice.
    """
    lines = [triangulation.rays(f.uv, k, E) for f, k, E in zip(found, intrinsics, camera_from_world)]
    views = range(len(found))
    apart = {(a, b): triangulation.ray_distance(*lines[a], *lines[b]) for a in views for b in views if a < b}
    own = [_evidence(f, reach) for f in found]
    options, scores = [], []
    for shifts in itertools.product(range(-reach, reach + 1), repeat=len(found)):
        score = sum(evidence[s + reach] for evidence, s in zip(own, shifts))
        for (a, b), distances in apart.items():
            same = found[a].levels[:, None] + shifts[a] == found[b].levels[None] + shifts[b]
            score += 0.5 * np.maximum(APART_MM**2 - distances[same] ** 2, 0.0).sum() / SPREAD_MM**2
        options.append(shifts)
        scores.append(score)
    share = scipy.special.softmax(np.array(scores))
    best = int(share.argmax())
    shifts = options[best]
    centres, covariances, apart_mm = {}, {}, {}
    for level in sorted({int(n) for f, s in zip(found, shifts) for n in f.levels + s}):
        seen = _places(found, shifts, level)
        if len(seen) < 2 or not 0 <= level < len(found[0].absent):
            continue
        sources = np.stack([lines[v][0] for v, _ in seen])
        directions = np.stack([lines[v][1][i] for v, i in seen])
        mm = np.array([found[v].spread_px[i] * camera_from_world[v][2, 3] / intrinsics[v][0] for v, i in seen])
        centres[level], covariances[level] = triangulation.triangulate(sources, directions, mm)
        apart_mm[level] = _largest(apart, seen)
    if not centres:
        return None
    own_apart = {}
    for level in {int(n) for f in found for n in f.levels}:
        seen = _places(found, [0] * len(found), level)
        if len(seen) > 1:
            own_apart[level] = _largest(apart, seen)
    return Agreement(shifts, float(share[best]), centres, covariances, apart_mm, own_apart)


def pose_from_centres(centres_world, centres_ct, level, place_mm=3.0, turn_rad=0.1):
    """A first pose world_from_ct (4, 4) of one vertebra from centres found in the world and known in the CT.

    Its centre goes where it was found. Its neighbours, up to three levels away, turn it: the most probable rotation for
    errors of `place_mm` in their places and a prior of `turn_rad` about the CT's own axes (a patient on his back), which is
    Kabsch's solution (Acta Cryst. A32 (1976) 922) with (place_mm / turn_rad)^2 on the diagonal. So the spine's direction is
    taken from the X-rays; the twist about it, which centres do not show, stays the CT's.

    Args:
      centres_world, centres_ct: level -> (3,) mm; level: one that is in both.
    """
    near = [n for n in centres_world if n in centres_ct and abs(n - level) <= 3]
    world = np.stack([centres_world[n] - centres_world[level] for n in near])
    ct = np.stack([centres_ct[n] - centres_ct[level] for n in near])
    u, _, vt = np.linalg.svd(world.T @ ct + (place_mm / turn_rad) ** 2 * np.eye(3))
    pose = np.eye(4)
    pose[:3, :3] = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
    pose[:3, 3] = centres_world[level] - pose[:3, :3] @ centres_ct[level]
    return pose


def _places(found, shifts, level):
    """(view, index of the place) of a level in every view that shows it."""
    numbers = [f.levels + s for f, s in zip(found, shifts)]
    return [(v, int(np.flatnonzero(n == level)[0])) for v, n in enumerate(numbers) if level in n]


def _largest(apart, seen):
    return max(float(apart[a, b][i, j]) for n, (a, i) in enumerate(seen) for b, j in seen[n + 1 :])


def _evidence(found, reach):
    """(2 reach + 1,) log-probability of a view's places, moved by -reach to reach levels."""
    count = len(found.absent)
    # A place that would be of a level that was never trained says nothing.
    unknown = found.evidence.mean() if found.evidence.size else 0.0
    result = []
    for shift in range(-reach, reach + 1):
        levels = found.levels + shift
        inside = (levels >= 0) & (levels < count)
        unseen = np.setdiff1d(np.arange(count), levels)
        result.append(
            found.evidence[np.flatnonzero(inside), levels[inside]].sum()
            + unknown * np.count_nonzero(~inside)
            + found.absent[unseen].sum()
        )
    return np.array(result)
