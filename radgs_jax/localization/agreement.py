"""Agreement between views: one numbering of the levels for all of them, the vertebrae's centres, and a start pose from those.
numpy."""

import dataclasses
import itertools
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import scipy
from jaxtyping import Float
from jaxtyping import Real

from radgs_jax import levels
from radgs_jax.geometry import triangulation
from radgs_jax.localization.chain import Found

RAY_GAP_SD_MM = 3.0
"""Standard deviation of the gap between two views' rays to the same vertebra, mm. Chosen by hand, near the localizer's median error
(docs/data.md). At half, the gaps outweigh what each view says of the levels; at twice, neighbouring levels are told apart less."""
MAX_RAY_GAP_MM = 3.0 * RAY_GAP_SD_MM
"""Largest gap between two rays to the same vertebra, mm: three standard deviations. At half, good views are refused; at twice, it
is near half of a lumbar level's spacing, so rays to two neighbouring vertebrae may pass."""
MAX_SHIFT = 2
"""Largest number of levels by which a view's own numbering is corrected. Chosen by hand. The number of combinations is (2 n + 1) to
the power of the number of views: at 1 larger mistakes stay, at 4 two views need 81 combinations instead of 25."""
PLACE_SD_MM = 3.0
"""Standard deviation of a found centre, mm, in `pose_from_centres`. Chosen by hand. Its ratio to `TURN_SD_RAD` matters: at half the
pose follows the neighbours' centres more, at twice less."""
TURN_SD_RAD = 0.1
"""Standard deviation of the patient's rotation against the CT's own axes, rad (6 degrees), in `pose_from_centres`. Chosen by hand.
At half the pose stays closer to the CT's axes, at twice it follows the neighbours' centres more."""
MAX_NEIGHBOUR = 3
"""Largest distance, in levels, of a neighbour that turns the start pose. Chosen by hand: at half, short lever arms give a noisier
direction; at twice, the curve of the spine, which changes between CT and X-ray, enters."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The numbering that the views agree on, and where the vertebrae are by it. Levels are indices into the trained levels.

    Attributes:
      shifts: number of levels by which each view's own numbering was moved.
      probability: of these shifts among all that were tried.
      centres: (3,) world mm, by level.
      covariances: (3, 3) mm^2 of the centres, by level.
      apart_mm: largest gap between two views' rays, by level.
      own_apart_mm: the same for the views' own numberings; large where a view mixed up the levels.
    """

    shifts: tuple[int, ...]
    probability: float
    centres: dict[int, Float[np.ndarray, "3"]]
    covariances: dict[int, Float[np.ndarray, "3 3"]]
    apart_mm: dict[int, float]
    own_apart_mm: dict[int, float]


def agree(
    found: Sequence[Found],
    intrinsics: Sequence[Real[np.ndarray, "4"]] | Real[np.ndarray, "views 4"],
    camera_from_world: Sequence[Real[np.ndarray, "4 4"]] | Real[np.ndarray, "views 4 4"],
    reach: int = MAX_SHIFT,
) -> Agreement | None:
    """Finds the numbering of the levels that all views together support best, among shifts of each view by up to `reach` levels.

    The score of a set of shifts is the sum of each view's evidence for the shifted levels and, for each pair of views and each
    level that both show, of the log-likelihood of the gap between their rays, truncated at `MAX_RAY_GAP_MM`.

    Args:
      found: the levels found in each view.
      intrinsics, camera_from_world: the camera of each view.

    Returns:
      None if no level is visible in two views.

    Raises:
      ValueError: rays that cannot be triangulated, such as those of one camera given twice.
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
            score += 0.5 * np.maximum(MAX_RAY_GAP_MM**2 - distances[same] ** 2, 0.0).sum() / RAY_GAP_SD_MM**2
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


def pose_from_centres(
    centres_world: Mapping[int, Real[np.ndarray, "3"]], centres_ct: Mapping[int, Real[np.ndarray, "3"]], level: int
) -> Float[np.ndarray, "4 4"]:
    """Start pose world_from_ct of one vertebra, from centres found in the world and known in the CT.

    The vertebra's centre is placed where it was found. Its rotation is the most probable one for errors of `PLACE_SD_MM` in the
    centres of its neighbours and a prior of `TURN_SD_RAD` about the CT's own axes (a supine patient): Kabsch's solution (Acta
    Cryst. A32 (1976) 922) with (PLACE_SD_MM / TURN_SD_RAD)^2 on the diagonal. So the spine's direction comes from the X-rays, and
    the rotation about the spine, which centres do not show, stays that of the CT.

    Args:
      centres_world, centres_ct: centres in mm, by VerSe number.
      level: the vertebra, which must be in both.
    """
    near = [n for n in centres_world if n in centres_ct and abs(levels.steps(n, level, centres_ct)) <= MAX_NEIGHBOUR]
    world = np.stack([centres_world[n] - centres_world[level] for n in near])
    ct = np.stack([centres_ct[n] - centres_ct[level] for n in near])
    u, _, vt = np.linalg.svd(world.T @ ct + (PLACE_SD_MM / TURN_SD_RAD) ** 2 * np.eye(3))
    pose = np.eye(4)
    pose[:3, :3] = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
    pose[:3, 3] = centres_world[level] - pose[:3, :3] @ centres_ct[level]
    return pose


def _places(found, shifts, level):
    """(view, index in its `Found`) of a level, for every view that shows it."""
    numbers = [f.levels + s for f, s in zip(found, shifts)]
    return [(v, int(np.flatnonzero(n == level)[0])) for v, n in enumerate(numbers) if level in n]


def _largest(apart, seen):
    return max(float(apart[a, b][i, j]) for n, (a, i) in enumerate(seen) for b, j in seen[n + 1 :])


def _evidence(found, reach):
    """(2 reach + 1,) log-probability of a view's places if its numbering is moved by -reach to reach levels."""
    count = len(found.absent)
    # A place shifted to a level that was never trained counts as average evidence.
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
