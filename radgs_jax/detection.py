"""From a detector's distributions to vertebrae: levels chained along the spine, and views that agree on them. numpy.

Levels follow each other from head to feet. A hidden Markov chain over them says so: each level is in a cell of the image or
out of sight, those in sight are without a gap, and a level lies below the one above it by a spacing from a Gaussian. Its
forward-backward recursion gives the marginals, its Viterbi path the best joint answer (Rabiner, Proc. IEEE 77 (1989) 257).
"""

import dataclasses
import itertools

import numpy as np
import scipy

from radgs_jax import camera
from radgs_jax.models.detector import MULTIPLE
from radgs_jax.models.detector import STRIDE

_DOWN, _ACROSS = 10, 5
"""Cells within which the next level is sought."""
SPREAD_MM = 3.0
"""Standard deviation of the distance at which two views' rays of one vertebra pass each other."""
APART_MM = 3.0 * SPREAD_MM
"""Rays that pass each other at a larger distance are of different vertebrae."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """What is known of neighbouring levels in an upright image; lengths in mm at the isocentre.

    spacing_mm: (K - 1,) from each level down to the next; spread_mm: (2,) standard deviations across and down the image.
    weight: of a detector's log-probabilities; link: log-odds of a pair of neighbours both being in sight.
    trained: (K,) bool, levels that the detector has seen; the others are never answered.
    """

    spacing_mm: np.ndarray
    spread_mm: np.ndarray
    weight: float
    link: float
    trained: np.ndarray


def fit_spacing(centres, seen, pixel_mm):
    """`spacing_mm` and `spread_mm` of a `Chain` from true centres (N, K, 2) in pixels and whether they are in sight (N, K).

    A pair of levels that is never in sight together takes the mean of all, which is nan where there is none.
    """
    step = (centres[:, 1:] - centres[:, :-1]) * pixel_mm
    both = seen[:, 1:] & seen[:, :-1]
    total = np.maximum(both.sum(0), 1)
    spacing = np.where(both.any(0), (step[..., 1] * both).sum(0) / total, step[..., 1][both].mean())
    residual = (step - np.stack([np.zeros_like(spacing), spacing], -1))[both]
    return spacing, np.sqrt((residual**2).mean(0))


class Lattice:
    """The chain over one image's cells, for its L trained levels, which have no gap between them.

    log_cells: (K, h, w); log_absent: (K,): a detector's answer for all levels; chain: `Chain`; step_mm: side of a cell.
    """

    def __init__(self, log_cells, log_absent, chain, step_mm):
        levels = np.flatnonzero(chain.trained)
        self.cells = chain.weight * np.asarray(log_cells, np.float64)[levels]
        self.absent = chain.weight * np.asarray(log_absent, np.float64)[levels]
        down = np.arange(1, _DOWN + 1)[:, None] * step_mm
        across = np.arange(-_ACROSS, _ACROSS + 1)[None] * step_mm
        sx, sy = np.maximum(chain.spread_mm, 0.5 * step_mm)
        self.links = [
            chain.link - 0.5 * ((down - chain.spacing_mm[level]) / sy) ** 2 - 0.5 * (across / sx) ** 2
            for level in levels[:-1]
        ]

    @staticmethod
    def _total(score, link, towards):
        """(h, w): log of the summed probability of all neighbours above (-1) or below (+1), each with its link."""
        top = score.max()
        if top == -np.inf:
            return score
        # Probabilities that underflow are 300 orders of magnitude from any that matter.
        kernel = np.zeros((2 * _DOWN + 1, 2 * _ACROSS + 1))
        kernel[_DOWN + 1 :] = np.exp(link)
        if towards > 0:
            kernel = kernel[::-1, ::-1]
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(scipy.ndimage.convolve(np.exp(score - top), kernel, mode="constant"), 0.0)) + top

    @staticmethod
    def _above(score, link):
        """(shifts, h, w): score of the neighbour above at each shift, with its link."""
        h, w = score.shape
        padded = np.pad(score, ((_DOWN, 0), (_ACROSS, _ACROSS)), constant_values=-np.inf)
        return np.stack(
            [
                padded[_DOWN - dy :][:h, _ACROSS - dx :][:, :w] + link[dy - 1, dx + _ACROSS]
                for dy in range(1, _DOWN + 1)
                for dx in range(-_ACROSS, _ACROSS + 1)
            ]
        )

    def marginals(self):
        """Probabilities: cells (L, h, w), absent (L,); and the logarithm of the sum over all joint answers."""
        count = len(self.cells)
        total = scipy.special.logsumexp
        # States of a level: out of sight before the first one, in a cell, out of sight after the last one.
        forward, before, after = [self.cells[0]], [self.absent[0]], [-np.inf]
        for level in range(1, count):
            arrive = self._total(forward[-1], self.links[level - 1], -1)
            forward.append(self.cells[level] + np.logaddexp(before[-1], arrive))
            after.append(self.absent[level] + np.logaddexp(after[-1], total(forward[-2])))
            before.append(before[-1] + self.absent[level])
        backward = [np.zeros_like(self.cells[0])]
        from_before, from_after = [0.0], [0.0]
        for level in range(count - 2, -1, -1):
            following = self.cells[level + 1] + backward[0]
            leave = self.absent[level + 1] + from_after[0]
            onward = self._total(following, self.links[level], 1)
            enter = np.logaddexp(total(following), self.absent[level + 1] + from_before[0])
            backward.insert(0, np.logaddexp(onward, leave))
            from_before.insert(0, enter)
            from_after.insert(0, leave)
        z = np.logaddexp(np.logaddexp(before[-1], after[-1]), total(forward[-1]))
        cells = np.exp(np.stack(forward) + np.stack(backward) - z)
        out = np.logaddexp(np.array(before) + from_before, np.array(after) + from_after)
        return cells, np.exp(out - z), z

    def best(self):
        """The most probable joint answer: for each of the L levels its cell (row, column), or None."""
        count = len(self.cells)
        h, w = self.cells[0].shape
        score, came = [self.cells[0]], [np.full((h, w), -1)]
        before = np.cumsum(self.absent)
        for level in range(1, count):
            options = self._above(score[-1], self.links[level - 1])
            link, best = options.max(0), options.argmax(0)
            first = before[level - 1] >= link
            came.append(np.where(first, -1, best))
            score.append(self.cells[level] + np.where(first, before[level - 1], link))
        left = before[-1] - before
        ends = np.array([s.max() for s in score]) + left
        answer = [None] * count
        if ends.max() <= before[-1]:
            return answer
        level = int(ends.argmax())
        row, column = np.unravel_index(score[level].argmax(), (h, w))
        while True:
            answer[level] = int(row), int(column)
            shift = came[level][row, column]
            if shift < 0:
                return answer
            down, across = divmod(int(shift), 2 * _ACROSS + 1)
            level, row, column = level - 1, row - 1 - down, column - (across - _ACROSS)


@dataclasses.dataclass(frozen=True)
class Found:
    """The n levels found in one image, head to feet.

    levels: (n,) indices into the trained levels; uv: (n, 2) pixels of the network's image; confidence: (n,) probability
    that the level is there; spread_px: (n,) standard deviation along an axis.
    evidence: (n, L) log-probability of each place for each trained level; absent: (L,) that of each level's absence.
    """

    levels: np.ndarray
    uv: np.ndarray
    confidence: np.ndarray
    spread_px: np.ndarray
    evidence: np.ndarray
    absent: np.ndarray


def decode(log_cells, log_absent, chain, step_mm):
    """`Found` of one image.

    The place of a level is the detector's mean over the 5 x 5 cells round its cell in the best joint answer.

    Args:
      log_cells: (K, h, w); log_absent: (K,); chain: `Chain`; step_mm: side of a cell at the isocentre.
    """
    lattice = Lattice(log_cells, log_absent, chain, step_mm)
    marginal, _, _ = lattice.marginals()
    _, h, w = marginal.shape
    levels, places, confidence, spreads, evidence = [], [], [], [], []
    for level, cell in enumerate(lattice.best()):
        if cell is None:
            continue
        row, column = cell
        rows = slice(max(row - 2, 0), min(row + 3, h))
        columns = slice(max(column - 2, 0), min(column + 3, w))
        # The chain tells which level, the detector alone where: the chain's spacing would draw a moved vertebra back.
        share = scipy.special.softmax(lattice.cells[level, rows, columns] / chain.weight)
        v, u = np.mgrid[rows, columns]
        mean = np.array([(share * u).sum(), (share * v).sum()])
        variance = 0.5 * (share * ((u - mean[0]) ** 2 + (v - mean[1]) ** 2)).sum()
        levels.append(level)
        places.append(mean * STRIDE + 0.5 * (STRIDE - 1))
        confidence.append(min(marginal[level, rows, columns].sum(), 1.0))
        spreads.append(max(STRIDE * np.sqrt(variance), 1.0))
        evidence.append(scipy.special.logsumexp(lattice.cells[:, rows, columns], axis=(1, 2)))
    return Found(
        np.array(levels, int),
        np.array(places).reshape(-1, 2),
        np.array(confidence),
        np.array(spreads),
        np.array(evidence).reshape(-1, len(marginal)),
        lattice.absent,
    )


@dataclasses.dataclass(frozen=True)
class Upright:
    """A view as the network sees it: image, valid (H, W), intrinsics (4,) and camera_from_world (4, 4) of that image.

    matrix (2, 2), offset (2,): pixel u, v of the view as it came = matrix @ (u, v) here + offset.
    """

    image: np.ndarray
    valid: np.ndarray
    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    matrix: np.ndarray
    offset: np.ndarray


def upright(image, valid, intrinsics, camera_from_world, pixel_mm):
    """An X-ray turned about its camera's axis until the head (+z of the world) is up, at one pixel size at the isocentre.

    Pixels are averaged over whole blocks, then sampled; the image is filled up to whole multiples of `MULTIPLE` pixels
    with pixels that are not valid.

    Args:
      image, valid: (H, W); intrinsics: (4,); camera_from_world: (4, 4); pixel_mm: of the result.
    Returns:
      `Upright`.
    Raises:
      ValueError: a beam within 30 degrees of the patient's axis.
    """
    focal, centre = intrinsics[:2], intrinsics[2:]
    feet = -camera_from_world[:2, 2]
    if np.linalg.norm(feet) < 0.5:
        raise ValueError("a beam along the patient (+z of the world)")
    feet = feet / np.linalg.norm(feet)
    turn = np.array([[feet[1], -feet[0]], [feet[0], feet[1]]])  # camera x, y to upright x, y
    fine = camera_from_world[2, 3] / focal
    block = np.maximum(1, np.rint(pixel_mm / fine)).astype(int).min()
    small, clear = camera.bin_image(image, block), camera.bin_image(valid, block)
    h, w = (block * n for n in small.shape)
    # Pixels here to pixels there: both are lengths at the isocentre.
    matrix = np.diag(1.0 / fine) @ turn.T * pixel_mm
    corners = np.array([[x, y] for x in (-0.5, w - 0.5) for y in (-0.5, h - 0.5)])
    corners = corners @ np.linalg.inv(matrix).T
    low, high = corners.min(0), corners.max(0)
    size = np.maximum(1, np.rint(high - low)).astype(int)
    offset = matrix @ (low + 0.5)
    to_small = (offset - 0.5 * (block - 1)) / block
    # scipy counts rows first.
    swap, start = matrix[::-1, ::-1] / block, to_small[::-1]
    shape = tuple(-(-size[::-1] // MULTIPLE) * MULTIPLE)
    sampled = scipy.ndimage.affine_transform(small, swap, start, shape, order=1, mode="nearest")
    clear = scipy.ndimage.affine_transform(clear, swap, start, shape, order=1, mode="constant") > 0.9
    rotation = np.eye(4)
    rotation[:2, :2] = turn
    scale = camera_from_world[2, 3] / pixel_mm
    middle = np.linalg.solve(matrix, centre - offset)
    return Upright(
        sampled.astype(np.float32),
        clear,
        np.array([scale, scale, *middle]),
        rotation @ camera_from_world,
        matrix,
        offset,
    )


def rays(uv, intrinsics, camera_from_world):
    """Source (3,) and unit directions (n, 3) in the world of pixels (n, 2)."""
    xy = (uv - intrinsics[2:]) / intrinsics[:2]
    d = np.concatenate([xy, np.ones((len(uv), 1))], -1) @ camera_from_world[:3, :3]
    source = -camera_from_world[:3, :3].T @ camera_from_world[:3, 3]
    return source, d / np.linalg.norm(d, axis=-1, keepdims=True)


def ray_distance(source_a, d_a, source_b, d_b):
    """Shortest distances (n, m) in mm between rays (n, 3) and rays (m, 3): 0 where two pixels are of one point."""
    normal = np.cross(d_a[:, None], d_b[None])
    length = np.maximum(np.linalg.norm(normal, axis=-1), 1e-9)
    return np.abs(normal @ (source_b - source_a)) / length


def triangulate(sources, directions, spreads_mm):
    """World point nearest to rays, by weighted least squares, exactly.

    Args:
      sources, directions: (V, 3), the latter of unit length; spreads_mm: (V,) standard deviations across the rays.
    Returns:
      point (3,) and its covariance (3, 3) in mm^2.
    Raises:
      ValueError: fewer than two rays, parallel ones, or rays that are nearest to each other at a source or behind it.
    """
    across = np.eye(3) - directions[:, :, None] * directions[:, None]
    across = across / np.square(spreads_mm)[:, None, None]
    information = across.sum(0)
    if len(sources) < 2 or np.linalg.cond(information) > 1e8:
        raise ValueError("triangulate: wanted two rays or more that are not parallel")
    point = np.linalg.solve(information, np.einsum("vij,vj->i", across, sources))
    # Different pixels of one camera: their rays meet in its source.
    if (((point - sources) * directions).sum(1) < 1.0).any():
        raise ValueError("triangulate: wanted rays that meet before their sources")
    return point, np.linalg.inv(information)


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
    lines = [rays(f.uv, k, E) for f, k, E in zip(found, intrinsics, camera_from_world)]
    views = range(len(found))
    apart = {(a, b): ray_distance(*lines[a], *lines[b]) for a in views for b in views if a < b}
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
        centres[level], covariances[level] = triangulate(sources, directions, mm)
        apart_mm[level] = _largest(apart, seen)
    if not centres:
        return None
    own_apart = {}
    for level in {int(n) for f in found for n in f.levels}:
        seen = _places(found, [0] * len(found), level)
        if len(seen) > 1:
            own_apart[level] = _largest(apart, seen)
    return Agreement(shifts, float(share[best]), centres, covariances, apart_mm, own_apart)


def start_pose(centres_world, centres_ct, level, place_mm=3.0, turn_rad=0.1):
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
