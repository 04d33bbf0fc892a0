"""Plots of scores."""

import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data_pipelines.io import files
from radgs_jax import metrics

ESTIMATE, OTHER = "#35c4e8", "#e8a33d"
FEW = 30
"""Values of a loss below which each is marked, chosen by hand: a single one draws no line."""
LEAST_MM = 1e-3
"""Lower end of logarithmic error axes, mm: errors below it are drawn there."""


def save(figure: Figure, path: pathlib.Path | str) -> None:
    """Writes a figure as a PNG, atomically."""
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, facecolor="white")


def error_plot(
    path: pathlib.Path | str, title: str, start_mm: np.ndarray, error_mm: np.ndarray, trajectories_mm: np.ndarray
) -> None:
    """A PNG of error against start error, and of error along the trajectory; mTRE in mm.

    Args:
      start_mm, error_mm: (C,); trajectories_mm: (C, poses) from the start to the end.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.scatter(start_mm, np.maximum(error_mm, LEAST_MM), s=18, color=ESTIMATE)
    shown = np.linspace(LEAST_MM, 26, 200)
    left.plot(shown, shown, color="grey", lw=0.8, ls="--", label="start pose")
    left.axhline(metrics.SUCCESS_MM, color="#c44", lw=0.8, label=f"success: {metrics.SUCCESS_MM:g} mm")
    left.set(
        xlabel="start mTRE, mm",
        ylabel="mTRE after registration, mm",
        xlim=(0, 26),
        ylim=(0.5 * LEAST_MM, 2.0 * max(26.0, float(np.max(error_mm)))),
        yscale="log",
    )
    left.yaxis.set_major_formatter("{x:g}")
    left.legend(frameon=False)
    passes = np.arange(trajectories_mm.shape[1])
    for q, style in ((25, ":"), (50, "-"), (75, ":"), (90, "--")):
        right.plot(passes, np.percentile(trajectories_mm, q, axis=0), style, color="#333", label=f"{q}th percentile")
    right.set(xlabel="pass", ylabel="mTRE, mm", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(frameon=False)
    save(figure, path)


def loss_curves(path: pathlib.Path | str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """A PNG with a panel for each phase: its loss over its steps; curves: name -> steps and values."""
    columns = 3
    rows = max(1, -(-len(curves) // columns))
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for panel, (name, (steps, values)) in zip(panels, curves.items()):
        panel.plot(steps, values, color="#333333", lw=0.9, marker="." if len(steps) < FEW else None)
        panel.set(title=name, xlabel="step", ylabel="loss")
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    save(figure, path)


def study_page(
    path: pathlib.Path | str,
    starts: Mapping[str, Sequence[Mapping[str, Any]]],
    groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> None:
    """A PNG with a page of plots: error against start error, and one panel per sweep with a point per case; mTRE in mm.

    Args:
      starts: name -> rows of `conditions.register_condition`; groups: sweep -> point -> rows.
    """
    panels = 1 + len(groups)
    columns = 3
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for (name, found), colour in zip(starts.items(), (ESTIMATE, OTHER)):
        start, error = (np.array([row[key] for row in found]) for key in ("start_mm", "error_mm"))
        axes[0].scatter(start, np.maximum(error, LEAST_MM), s=9, color=colour, label=name)
    axes[0].set(xlabel="start mTRE, mm", ylabel="mTRE, mm", yscale="log", title="start error")
    axes[0].legend(frameon=False, fontsize=8)
    for panel, (group, points) in zip(axes[1:], groups.items()):
        places = np.arange(len(points))
        for place, found in zip(places, points.values()):
            error = np.array([row["error_mm"] for row in found])
            refused = np.array([row["accepted"] is False for row in found])
            spread = place + np.linspace(-0.25, 0.25, len(error))
            for chosen, marker in ((~refused, "o"), (refused, "x")):
                panel.scatter(spread[chosen], np.maximum(error[chosen], LEAST_MM), s=11, marker=marker, color=ESTIMATE)
        for key, style, text in (("error_mm", "-", "median"), ("network_mm", ":", "median, network alone")):
            medians = [np.median([row[key] for row in found]) for found in points.values()]
            panel.plot(places, np.maximum(medians, LEAST_MM), style, color="#333333", label=text)
        panel.set(yscale="log", ylabel="mTRE, mm", title=group)
        panel.set_xticks(places, list(points), fontsize=8)
        panel.legend(frameon=False, fontsize=7)
    for panel in axes[:panels]:
        panel.axhline(metrics.SUCCESS_MM, color="#cc4444", lw=0.8)
    for panel in axes[panels:]:
        panel.set_axis_off()
    axes[0].text(0.02, 0.02, "crosses in the other panels: refused", transform=axes[0].transAxes, fontsize=7)
    save(figure, path)


def views_plot(
    path: pathlib.Path | str, views: Sequence[int], psnr_db: Mapping[str, Sequence[float]], wanted_db: float
) -> None:
    """A PNG of reconstructions' honest PSNR, dB, over the number of X-rays, one line a system.

    Args:
      psnr_db: name of a system -> its PSNR for each of `views`; wanted_db: where a grey line is drawn.
    """
    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in psnr_db.items():
        axes.plot(views, values, "o-", label=name)
    axes.axhline(wanted_db, color="grey", lw=0.8, ls="--")
    axes.set(xlabel="X-rays", ylabel="honest PSNR, dB", xscale="log")
    axes.set_xticks(list(views), [str(count) for count in views])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)
