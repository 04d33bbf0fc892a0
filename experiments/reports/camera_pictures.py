"""The check picture of cameras: where sources and detectors are around the patient, and the patient's axes in each X-ray."""

import pathlib
from collections.abc import Sequence
from typing import Any

import mpl_toolkits.mplot3d  # noqa: F401  registers the projection "3d"
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from data_pipelines.cameras import checks
from data_pipelines.cameras.conventions import Pinhole
from experiments.reports import pictures
from experiments.reports.plots import save

VIEW_COLORS = ("#1668b8", "#c2570c", "#5b3f9e", "#5f6b1d")
AXIS_COLORS = ("#d62728", "#2ca02c", "#1fa8ff")
"""Of the axes to the patient's right, front and head, as in 3D Slicer's views."""
SIDES = ((16.0, 62.0, "from the patient's front and right"), (78.0, 90.0, "from above the head"))
"""Elevation and azimuth, degrees, that the room is drawn from, and what that is for a patient who stands."""
AXIS_MM = 160.0
"""Length of a patient axis in the room, mm."""
IN_IMAGE_MM = 60.0
"""Length of a patient axis in an X-ray, mm. Chosen by hand: half is short beside letters, twice leaves small images."""
SHORTEST = 0.15
"""Length of an axis in an X-ray, as a share of the image's side, from which it gets letters. Chosen by hand: half puts letters on
each other, twice leaves oblique axes without."""
PANEL_RATIO = 1.6
"""Where a panel is drawn whose pixel pitch is not known, as distance from the source relative to the isocentre's. C-arms have 1.5
to 1.7; nothing else depends on it."""
MAX_PIXELS = 500
"""Pixels along the longer side of a drawn X-ray; twice takes longer and shows no more on the page."""
MAX_VIEWS = 4
ZOOM = 1.3
"""How large the room is drawn, so that it fills its half of the page."""


LEGEND = "numbers: X-ray sources; thick: an image's first row, which begins at pixel 0, 0"


def check_picture(
    path: pathlib.Path | str, views: Sequence[Pinhole], images: Sequence[np.ndarray | None], title: str
) -> None:
    """A PNG: the room from two sides, and below it each view with the patient's axes where the central rays meet.

    Args:
      views: the first MAX_VIEWS are drawn.
      images: (H, W) numbers of each view's X-ray, or None where there is none.
    """
    views, images = list(views)[:MAX_VIEWS], list(images)[:MAX_VIEWS]
    centre = checks.meeting(views)
    centre = np.zeros(3) if centre is None else centre
    figure = Figure(figsize=(11.0, 10.6))
    figure.suptitle(title, fontsize=12, x=0.03, y=0.985, ha="left", fontweight="bold")
    for column, (elevation, azimuth, name) in enumerate(SIDES):
        axes: Any = figure.add_axes((0.01 + 0.5 * column, 0.46, 0.48, 0.47), projection="3d")
        axes.view_init(elevation, azimuth)
        figure.text(0.25 + 0.5 * column, 0.945, f"the room, {name}", fontsize=10, ha="center")
        _room(axes, views, centre)
    figure.text(0.03, 0.445, LEGEND, fontsize=8, color="#555555")
    width = 0.94 / len(views)
    for index, (view, image) in enumerate(zip(views, images)):
        panel = figure.add_axes((0.03 + index * width, 0.035, width - 0.03, 0.38))
        color = VIEW_COLORS[index % len(VIEW_COLORS)]
        _image(panel, view, image, centre)
        panel.set_title(f"view {index + 1}", fontsize=10, color=color, fontweight="bold")
    save(figure, path)


def panel_corners(view: Pinhole, centre: Float[np.ndarray, "3"]) -> Float[np.ndarray, "4 3"]:
    """The image's corners on the panel, in the world, from its first pixel along the first row; centre: the isocentre, mm."""
    if view.pixel_mm is not None:
        depth = abs(view.K[0, 0]) * view.pixel_mm[0]
    else:
        depth = PANEL_RATIO * np.linalg.norm(centre - checks.source_of(view))
    right, low = view.width - 0.5, view.height - 0.5
    pixels = np.array([[-0.5, -0.5, 1], [right, -0.5, 1], [right, low, 1], [-0.5, low, 1]])
    camera = depth * np.linalg.solve(view.K, pixels.T).T
    return (camera - view.E[:3, 3]) @ view.E[:3, :3]


def _room(axes, views, centre):
    axes.set_axis_off()
    axes.computed_zorder = False  # otherwise sources hide their numbers
    for index, view in enumerate(views):
        color = VIEW_COLORS[index % len(VIEW_COLORS)]
        source, corners = checks.source_of(view), panel_corners(view, centre)
        axes.scatter(*source, color=color, s=190, depthshade=False, zorder=4)
        axes.text(*source, str(index + 1), color="white", fontsize=9, fontweight="bold", **_CENTRED, zorder=5)
        axes.add_collection3d(Poly3DCollection([corners], facecolors=color, edgecolors=color, alpha=0.22))
        for corner in corners:
            axes.plot(*np.stack([source, corner], 1), color=color, lw=0.7, alpha=0.6)
        middle = corners.mean(0)
        axes.plot(*np.stack([source, middle], 1), color=color, lw=1.0, ls="--")
        # The first pixel and the first row say how the image lies on the panel.
        axes.scatter(*corners[0], color=color, s=26, marker="s", depthshade=False)
        axes.plot(*corners[:2].T, color=color, lw=2.6)
        axes.text(
            *(corners[0] + 0.25 * (corners[0] - middle)), "0, 0", color=color, fontsize=8, ha="center", va="center"
        )
    for axis, (pair, color) in enumerate(zip(checks.LETTERS, AXIS_COLORS)):
        for letter, sign in zip(pair, (1.0, -1.0)):
            tip = centre.copy()
            tip[axis] += sign * AXIS_MM
            axes.plot(*np.stack([centre, tip], 1), color=color, lw=2.4 if sign > 0 else 1.0)
            tip[axis] += sign * 0.22 * AXIS_MM
            axes.text(*tip, letter, color=color, fontsize=11, fontweight="bold", ha="center", va="center")
    limits = np.array([axes.get_xlim3d(), axes.get_ylim3d(), axes.get_zlim3d()])
    axes.set_box_aspect(np.ptp(limits, axis=1), zoom=ZOOM)


def _image(axes: Axes, view, image, centre):
    if image is None:
        axes.imshow(np.full((2, 2), 0.25), cmap="gray", vmin=0, vmax=1, extent=_frame(view))
        axes.autoscale(False)
    else:
        step = max(1, -(-max(image.shape) // MAX_PIXELS))
        small = np.asarray(image[::step, ::step], np.float64)
        finite = np.isfinite(small)
        low, high = pictures.contrast(np.where(finite, small, 0.0), finite)
        axes.imshow(small, cmap="gray", vmin=low, vmax=high if high > low else low + 1.0, extent=_frame(view))
        axes.autoscale(False)
    axes.set_xticks([0, view.width - 1])
    axes.set_yticks([0, view.height - 1])
    axes.tick_params(labelsize=7)
    start, size = _pixel(view, centre), max(view.height, view.width)
    axes.plot(*start, "o", color="white", ms=4)
    for axis, (pair, color) in enumerate(zip(checks.LETTERS, AXIS_COLORS)):
        tips = [_pixel(view, centre + sign * IN_IMAGE_MM * np.eye(3)[axis]) for sign in (1.0, -1.0)]
        # An axis along the beam is a point.
        named = np.linalg.norm(tips[0] - tips[1]) > SHORTEST * size
        for letter, tip, width in zip(pair, tips, (2.4, 1.0)):
            axes.plot(*np.stack([start, tip], 1), color=color, lw=width)
            if named:
                place = tip + 0.035 * size * (tip - start) / np.linalg.norm(tip - start)
                axes.text(
                    place[0], place[1], letter, color="white", fontsize=11, fontweight="bold", **_CENTRED, bbox=_BOX
                )


_CENTRED = {"ha": "center", "va": "center"}
_BOX = {"facecolor": "black", "alpha": 0.5, "pad": 1.5, "lw": 0}


def _frame(view):
    """Where `imshow` puts an image of a view, or a binning of it: the borders of its first and last pixels."""
    return (-0.5, view.width - 0.5, view.height - 0.5, -0.5)


def _pixel(view, point):
    """The pixel (u, v) of a world point."""
    seen = view.K @ (view.E[:3, :3] @ point + view.E[:3, 3])
    return seen[:2] / seen[2]
