"""Pictures of registrations, and plots of scores."""

import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from data_pipelines.io import files
from data_pipelines.simulation import quick
from radgs_jax import metrics
from radgs_jax.geometry import camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration.pipeline import Outcome
from radgs_jax.registration.prepared import Vertebra

COLOURS = {"start": "#e8a33d", "estimate": "#35c4e8", "truth": "#7bd150"}
PIXELS = 300
"""Minimum side of a drawn X-ray, pixels. Chosen by hand: resolution of the picture against time to draw it."""
OUTLINE = 0.06
"""Line integral at which a vertebra's outline is drawn. Chosen by hand: lower values follow thin bone, higher ones lose it."""
OUTLINE_STEP_MM = 1.0
"""Step of the rays that outlines are rendered with, mm. Chosen by hand: half of it takes twice as long."""
BONE = 0.06
"""Attenuation that is drawn white, 1/mm: the upper end of the range that reconstructions are scored in (docs/accuracy.md)."""
LEAST_MM = 1e-3
"""Lower end of logarithmic error axes, mm: errors below it are drawn there."""


def _save(figure, path):
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, facecolor="white")


def _outline(axes, silhouette, colour, style="-"):
    if silhouette.max() > 0:
        axes.contour(silhouette, levels=[OUTLINE], colors=[colour], linewidths=1.3, linestyles=style)


def registration_picture(
    path: pathlib.Path | str,
    title: str,
    xrays: Sequence[XRay],
    vertebra: Vertebra,
    poses: Mapping[str, np.ndarray],
    outcome: Outcome,
    reconstruction: np.ndarray,
    moved_ct: np.ndarray,
) -> None:
    """A PNG of the X-rays with the vertebra's outline at each pose, the attention map, and slices of reconstruction and CT.

    Args:
      poses: world_from_ct (4, 4) of 'start', 'estimate' and possibly 'truth'.
      outcome: of the registration.
      reconstruction, moved_ct: (X, Y, Z) on one grid in world axes, 1/mm.
    """
    figure = Figure(figsize=(15, 8.6), layout="constrained")
    figure.suptitle(title)
    rows = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    top = rows[0].subplots(1, 2 * len(xrays))
    for i, xray in enumerate(xrays):
        full = xray.camera
        factor = max(1, min(full.height, full.width) // PIXELS)
        small = camera.bin_image(xray.line_integrals, factor)
        k = camera.bin(full, factor).intrinsics
        axes = top[2 * i]
        low, high = np.percentile(small, [1, 99.5])
        axes.imshow(small, cmap="gray", vmin=low, vmax=high)
        for name, world_from_ct in poses.items():
            drawn = quick.render(
                vertebra.density,
                vertebra.ct_from_index,
                world_from_ct,
                k[None],
                full.camera_from_world[None],
                small.shape,
                OUTLINE_STEP_MM,
            )[0]
            _outline(axes, drawn, COLOURS[name], "--" if name == "start" else "-")
        axes.set_title(f"view {i + 1}: {', '.join(poses)}", fontsize=9)
        crop = top[2 * i + 1]
        window = outcome.crops[i]
        crop.imshow(window, cmap="gray")
        height, width = window.shape
        crop.imshow(
            outcome.attention[i],
            cmap="inferno",
            alpha=0.55,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="bilinear",
        )
        drawn = quick.render(
            vertebra.density,
            vertebra.ct_from_index,
            poses["estimate"],
            outcome.intrinsics[i : i + 1],
            full.camera_from_world[None],
            window.shape,
            OUTLINE_STEP_MM,
        )[0]
        _outline(crop, drawn, COLOURS["estimate"])
        crop.set_title("network's crop, attention (CAL)", fontsize=9)
    bottom = rows[1].subplots(1, 6)
    names = ("sagittal", "coronal", "axial")
    for axis, name in enumerate(names):
        for j, (volume, label) in enumerate(((reconstruction, "reconstruction"), (moved_ct, "CT at the estimate"))):
            axes = bottom[2 * axis + j]
            axes.imshow(
                np.take(volume, volume.shape[axis] // 2, axis).T, cmap="gray", origin="lower", vmin=0, vmax=BONE
            )
            axes.set_title(f"{name}: {label}", fontsize=9)
    for axes in (*top, *bottom):
        axes.set_xticks([])
        axes.set_yticks([])
    handles = [matplotlib.lines.Line2D([], [], color=COLOURS[n], label=n) for n in poses]
    rows[0].legend(handles=handles, loc="lower center", ncols=len(poses), fontsize=9, frameon=False)
    _save(figure, path)


def error_plot(
    path: pathlib.Path | str, title: str, start_mm: np.ndarray, error_mm: np.ndarray, trajectories_mm: np.ndarray
) -> None:
    """A PNG of error against start error, and of error along the trajectory; mTRE in mm.

    Args:
      start_mm, error_mm: (C,); trajectories_mm: (C, 1 + passes + levels).
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.scatter(start_mm, error_mm, s=18, color=COLOURS["estimate"])
    left.plot([0, 25], [0, 25], color="grey", lw=0.8, ls="--", label="start pose")
    left.axhline(metrics.SUCCESS_MM, color="#c44", lw=0.8, label=f"success: {metrics.SUCCESS_MM:g} mm")
    left.set(
        xlabel="start mTRE, mm",
        ylabel="mTRE after registration, mm",
        xlim=(0, 26),
        ylim=(0, max(6.0, float(np.max(error_mm)) * 1.05)),
    )
    left.legend(frameon=False)
    passes = np.arange(trajectories_mm.shape[1])
    for q, style in ((25, ":"), (50, "-"), (75, ":"), (90, "--")):
        right.plot(passes, np.percentile(trajectories_mm, q, axis=0), style, color="#333", label=f"{q}th percentile")
    right.set(xlabel="pass", ylabel="mTRE, mm", yscale="log")
    right.legend(frameon=False)
    _save(figure, path)


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
    for (name, found), colour in zip(starts.items(), ("#35c4e8", "#e8a33d", "#888888")):
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
                panel.scatter(spread[chosen], np.maximum(error[chosen], LEAST_MM), s=11, marker=marker, color="#35c4e8")
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
    _save(figure, path)
