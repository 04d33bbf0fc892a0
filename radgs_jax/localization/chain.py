"""Levels chained along the spine, in one image. numpy.

Levels follow each other from head to feet. A hidden Markov chain over them says so: each level is in a cell of the image or
out of sight, those in sight are without a gap, and a level lies below the one above it by a spacing from a Gaussian. Its
forward-backward recursion gives the marginals, its Viterbi path the best joint answer (Rabiner, Proc. IEEE 77 (1989) 257).
"""

import dataclasses

import numpy as np
import scipy

from radgs_jax.localization.network import STRIDE

_DOWN, _ACROSS = 10, 5
"""Cells within which the next level is sought."""


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
