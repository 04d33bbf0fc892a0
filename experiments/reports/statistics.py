"""Intervals of proportions and medians, and the study's tables."""

import numpy as np

from radgs_jax import metrics


def wilson(successes, count, z=1.96):
    """95 % interval (low, high) of a share, after Wilson (1927)."""
    share, scale = successes / count, 1.0 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return middle - half, middle + half


def median_interval(rows, seed=0, draws=2000):
    """95 % interval (low, high) of the median error, scenes drawn with replacement: a scene's starts are no independent cases."""
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
    f"{'wrong, accepted':>16} {'right, refused':>15} {'radius holds':>13}"
)


def line(name, rows):
    """One line of a table: rows of `run`."""
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
    radius = np.array([r["uncertainty_mm"] for r in rows])
    inside = f"{100 * np.mean((error <= radius)[right]):11.1f} %" if right.any() else f"{'-':>13}"
    return f"{text} {inside}"


def by_start(rows, edges):
    """Lines of rows by their start errors' bins, then all, then the interval of the median."""
    lines = []
    for low, high in edges:
        inside = [r for r in rows if low <= r["start_mm"] < high]
        if inside:
            lines.append(line(f"start {low:g}-{high:g} mm", inside))
    low, high = median_interval(rows)
    count = len({r["scene"] for r in rows})
    return [*lines, line("all", rows), f"{count} scenes; 95 % interval of the median: {low:.3f} to {high:.3f} mm"]


def methods(found):
    """Lines of a table of what `compare` returns."""
    lines = [f"{'':>36} {'n':>4} {'median mm':>10} {'p90 mm':>8} {'< 2 mm':>8}"]
    for name, error in found.items():
        right = np.mean(np.array(error) < metrics.SUCCESS_MM)
        lines.append(
            f"{name:>36} {len(error):4d} {np.median(error):10.2f} {np.percentile(error, 90):8.2f} {100 * right:6.1f} %"
        )
    return lines
