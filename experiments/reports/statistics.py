"""Intervals of proportions and medians, and the study's tables."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from radgs_jax import metrics

ScoredCase = Mapping[str, Any]
"""A registered case, as `conditions.register_condition` returns it."""


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's (1927) score interval (low, high) of a proportion.

    Args:
      successes: of `count` trials; z: quantile of the normal distribution; 1.96 gives a 95 % interval.
    """
    share, scale = successes / count, 1.0 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return middle - half, middle + half


def median_interval(rows: Sequence[ScoredCase], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval (low, high) of the median error, mm.

    Whole scenes are drawn, because cases of one scene are not independent.

    Args:
      draws: number of bootstrap samples.
    """
    by_scene = {}
    for row in rows:
        by_scene.setdefault(row["scene"], []).append(row["error_mm"])
    scenes, rng = list(by_scene.values()), np.random.default_rng(seed)
    medians = [
        np.median(np.concatenate([scenes[i] for i in rng.integers(0, len(scenes), len(scenes))])) for _ in range(draws)
    ]
    return np.percentile(medians, 2.5), np.percentile(medians, 97.5)


HEADER = (
    f"{'':>34} {'n':>4} {'median mm':>10} {'p90 mm':>8} {'network':>8} {'< 2 mm':>8} {'95 % of it':>14} "
    f"{'wrong, accepted':>16} {'right, refused':>15} {'radius holds':>13} {'95 % of it':>14} {'chi2':>6}"
)
"""Column names of `line`. The last is the reduced chi-square of the right poses' errors by their stated covariances: 1 where those
are right, above where they are too small."""
FREEDOM = 6
"""Degrees of freedom of a pose."""


def line(name: str, rows: Sequence[ScoredCase]) -> str:
    """One line of a table with the columns of `HEADER`."""
    error = np.array([r["error_mm"] for r in rows])
    right = error < metrics.SUCCESS_MM
    accepted = np.array([r["accepted"] is not False for r in rows])
    low, high = wilson(right.sum(), len(rows))
    text = (
        f"{name:>34} {len(rows):4d} {np.median(error):10.2f} {np.percentile(error, 90):8.2f} "
        f"{np.median([r['network_mm'] for r in rows]):8.2f} {100 * right.mean():6.1f} % {100 * low:6.1f}-{100 * high:5.1f} % "
        f"{(accepted & ~right).sum():16d} {(~accepted & right).sum():15d}"
    )
    if any(r["uncertainty_mm"] is None for r in rows):
        return text
    inside = error <= np.array([r["uncertainty_mm"] for r in rows])
    if not right.any():
        return f"{text} {'-':>13}"
    low, high = wilson(inside[right].sum(), right.sum())
    reduced = np.mean([r["chi_square"] for r, counts in zip(rows, right) if counts]) / FREEDOM
    return f"{text} {100 * np.mean(inside[right]):11.1f} % {100 * low:6.1f}-{100 * high:5.1f} % {reduced:6.2f}"


def with_metal_apart(found: Mapping[str, Sequence[ScoredCase]]) -> list[str]:
    """A line for each name; where some of its scenes show metal, also one for those, and one for the others."""
    lines = []
    for name, rows in found.items():
        lines.append(line(name, rows))
        apart = [[row for row in rows if row["metal"] == metal] for metal in (True, False)]
        if all(apart):
            lines += [line(f"{name}, {kind} metal", part) for kind, part in zip(("with", "without"), apart)]
    return lines


def by_start(rows: Sequence[ScoredCase], edges: Sequence[tuple[float, float]]) -> list[str]:
    """A line per bin (low, high) of start errors, one for all rows, and one with the interval of the median."""
    lines = []
    for low, high in edges:
        inside = [r for r in rows if low <= r["start_mm"] < high]
        if inside:
            lines.append(line(f"start {low:g}-{high:g} mm", inside))
    low, high = median_interval(rows)
    count = len({r["scene"] for r in rows})
    return [*lines, line("all", rows), f"{count} scenes; 95 % interval of the median: {low:.3f} to {high:.3f} mm"]


def methods(found: Mapping[str, Sequence[float]]) -> list[str]:
    """Lines of a table of the result of `rivals.compare`."""
    lines = [f"{'':>36} {'n':>4} {'median mm':>10} {'p90 mm':>8} {'< 2 mm':>8}"]
    for name, error in found.items():
        right = np.mean(np.array(error) < metrics.SUCCESS_MM)
        lines.append(
            f"{name:>36} {len(error):4d} {np.median(error):10.2f} {np.percentile(error, 90):8.2f} {100 * right:6.1f} %"
        )
    return lines
