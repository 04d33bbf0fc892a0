"""Levels chained along the spine, in one image. numpy.

Levels follow each other from head to feet, which a hidden Markov chain over the levels describes: each level is in a cell of the
image or not visible, the visible levels have no gap, and each lies below the previous one by a spacing with a Gaussian
distribution. The forward-backward recursion gives the marginals, the Viterbi path the best joint answer (Rabiner, Proc. IEEE 77
(1989) 257).
"""

import dataclasses

import numpy as np
import scipy
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Real

from kernels.common.types import Array
from radgs_jax.localization.network import STRIDE

_DOWN, _ACROSS = 10, 5
"""Number of cells down, and to either side, within which the next level is sought: 60 and 30 mm at 1.5 mm pixels. Chosen by hand,
above the largest adult spacing of about 36 mm. At half, tall or tilted spines are cut off; at twice, the recursions do four times
the work."""
_NEAR = 2
"""Number of cells around the best cell over which a place is averaged, 12 mm. Chosen by hand: at half, the tails of the network's
distribution are cut off; at twice, the window reaches the neighbouring vertebrae."""
_MIN_SPREAD_CELLS = 0.5
"""Smallest standard deviation of a spacing, cells: a smaller one would fall between cells. Chosen by hand; at half, a spacing
between two cells is penalised; at twice, levels are chained more loosely."""
_MIN_SPREAD_PX = 1.0
"""Smallest standard deviation of a place, pixels. Chosen by hand: it keeps one certain view from outweighing the others without
bound; at half and twice that bound is looser and tighter."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """Relations of neighbouring levels in an upright image; lengths are in mm at the isocentre.

    Attributes:
      spacing_mm: from each of the K levels down to the next.
      spread_mm: standard deviations of the spacing across and down the image.
      weight: factor on the localizer's log-probabilities.
      link: log-odds of two neighbouring levels both being visible.
      trained: levels that the localizer has been trained on; the others are never answered.
    """

    spacing_mm: Float[np.ndarray, " links"]
    spread_mm: Float[np.ndarray, "2"]
    weight: float
    link: float
    trained: Bool[np.ndarray, " levels"]


def fit_spacing(
    centres: Real[Array, "n levels 2"], seen: Bool[Array, "n levels"], pixel_mm: float
) -> tuple[Float[np.ndarray, " links"], Float[np.ndarray, "2"]]:
    """`spacing_mm` and `spread_mm` of a `Chain`, from true centres in pixels and whether they are visible.

    A pair of levels that is never visible together gets the mean over all pairs, which is nan if there are none.
    """
    step = (centres[:, 1:] - centres[:, :-1]) * pixel_mm
    both = seen[:, 1:] & seen[:, :-1]
    total = np.maximum(both.sum(0), 1)
    spacing = np.where(both.any(0), (step[..., 1] * both).sum(0) / total, step[..., 1][both].mean())
    residual = (step - np.stack([np.zeros_like(spacing), spacing], -1))[both]
    return spacing, np.sqrt((residual**2).mean(0))


class Lattice:
    """The chain over the cells of one image, for its L trained levels, which are contiguous."""

    def __init__(
        self,
        log_cells: Real[Array, "levels h w"],
        log_absent: Real[Array, " levels"],
        chain: Chain,
        step_mm: float,
    ) -> None:
        """Weights the network's answer and tabulates the links.

        Args:
          log_cells, log_absent: the network's answer for all K levels, as in `network.Levels`.
          chain: relations of the levels.
          step_mm: side of a cell at the isocentre.
        """
        levels = np.flatnonzero(chain.trained)
        self.cells = chain.weight * np.asarray(log_cells, np.float64)[levels]
        self.absent = chain.weight * np.asarray(log_absent, np.float64)[levels]
        down = np.arange(1, _DOWN + 1)[:, None] * step_mm
        across = np.arange(-_ACROSS, _ACROSS + 1)[None] * step_mm
        sx, sy = np.maximum(chain.spread_mm, _MIN_SPREAD_CELLS * step_mm)
        self.links = [
            chain.link - 0.5 * ((down - chain.spacing_mm[level]) / sy) ** 2 - 0.5 * (across / sx) ** 2
            for level in levels[:-1]
        ]

    @staticmethod
    def _total(score, link, towards):
        """(h, w): log of the sum over all neighbours above (-1) or below (+1) of their probability times their link."""
        top = score.max()
        if top == -np.inf:
            return score
        # Probabilities that underflow are 300 orders of magnitude below the largest, so they do not matter.
        kernel = np.zeros((2 * _DOWN + 1, 2 * _ACROSS + 1))
        kernel[_DOWN + 1 :] = np.exp(link)
        if towards > 0:
            kernel = kernel[::-1, ::-1]
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(scipy.ndimage.convolve(np.exp(score - top), kernel, mode="constant"), 0.0)) + top

    @staticmethod
    def _above(score, link):
        """(shifts, h, w): score of the neighbour above at each shift, plus its link."""
        h, w = score.shape
        padded = np.pad(score, ((_DOWN, 0), (_ACROSS, _ACROSS)), constant_values=-np.inf)
        return np.stack(
            [
                padded[_DOWN - dy :][:h, _ACROSS - dx :][:, :w] + link[dy - 1, dx + _ACROSS]
                for dy in range(1, _DOWN + 1)
                for dx in range(-_ACROSS, _ACROSS + 1)
            ]
        )

    def marginals(
        self,
    ) -> tuple[Float[np.ndarray, "trained h w"], Float[np.ndarray, " trained"], float | np.floating]:
        """Marginal probabilities of the cells and of absence, and the logarithm of the sum over all joint answers."""
        count = len(self.cells)
        total = scipy.special.logsumexp
        # States of a level: not visible and above the first visible one, in a cell, not visible and below the last visible one.
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

    def best(self) -> list[tuple[int, int] | None]:
        """The most probable joint answer: the cell (row, column) of each of the L levels, or None."""
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
        answer: list[tuple[int, int] | None] = [None] * count
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
    """The levels found in one image, head to feet.

    Attributes:
      levels: indices into the trained levels.
      uv: places in pixels of the network's image.
      confidence: probability that the level is at its place.
      spread_px: standard deviation of a place along one axis.
      evidence: log-probability of each place for each trained level.
      absent: log-probability that each trained level is not visible.
    """

    levels: Int[np.ndarray, " n"]
    uv: Real[np.ndarray, "n 2"]
    confidence: Real[np.ndarray, " n"]
    spread_px: Real[np.ndarray, " n"]
    evidence: Real[np.ndarray, "n trained"]
    absent: Real[np.ndarray, " trained"]


def decode(
    log_cells: Real[Array, "levels h w"], log_absent: Real[Array, " levels"], chain: Chain, step_mm: float
) -> Found:
    """Finds the levels of one image. Arguments are those of `Lattice`.

    The place of a level is the network's mean over the 5 x 5 cells around its cell in the best joint answer.
    """
    lattice = Lattice(log_cells, log_absent, chain, step_mm)
    marginal, _, _ = lattice.marginals()
    _, h, w = marginal.shape
    levels, places, confidence, spreads, evidence = [], [], [], [], []
    for level, cell in enumerate(lattice.best()):
        if cell is None:
            continue
        row, column = cell
        rows = slice(max(row - _NEAR, 0), min(row + _NEAR + 1, h))
        columns = slice(max(column - _NEAR, 0), min(column + _NEAR + 1, w))
        # The chain decides the level and the network alone the place, because the chain's spacing would pull back a vertebra that
        # has moved.
        share = scipy.special.softmax(lattice.cells[level, rows, columns] / chain.weight)
        v, u = np.mgrid[rows, columns]
        mean = np.array([(share * u).sum(), (share * v).sum()])
        variance = 0.5 * (share * ((u - mean[0]) ** 2 + (v - mean[1]) ** 2)).sum()
        levels.append(level)
        places.append(mean * STRIDE + 0.5 * (STRIDE - 1))
        confidence.append(min(marginal[level, rows, columns].sum(), 1.0))
        spreads.append(max(STRIDE * np.sqrt(variance), _MIN_SPREAD_PX))
        evidence.append(scipy.special.logsumexp(lattice.cells[:, rows, columns], axis=(1, 2)))
    return Found(
        np.array(levels, int),
        np.array(places).reshape(-1, 2),
        np.array(confidence),
        np.array(spreads),
        np.array(evidence).reshape(-1, len(marginal)),
        lattice.absent,
    )
