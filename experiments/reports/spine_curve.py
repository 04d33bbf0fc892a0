"""The spine's curve in the X-rays against the CT's: angles from the poses of one acquisition's vertebrae, and a drawing of both."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from radgs_jax.geometry import rigid_host
from radgs_jax.levels import level_name
from radgs_jax.registration.prepared import Vertebra

BAR_MM = 34.0
"""Length of the bar that shows how a vertebra is tilted, mm: about the width of a vertebral body."""
PLANES = {"from the front": (0, -1.0, "R", "L"), "from the patient's left": (1, -1.0, "A", "P")}
"""Of each drawing: the CT's axis along its horizontal, with its sign, and the letters at the left and the right."""
COLOURS = {"CT": "#8a929c", "X-rays": "#0b62a4"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One spine in the axes of the CT (RAS+), head first.

    Attributes:
      centres: (N, 3) of the vertebrae, mm.
      directions: (N, 3) unit vectors to the head: in the CT along the curve, in the X-rays turned with the bones. The angle between
        two of them is of the kind of Cobb's, with the curve's directions for those of end plates.
    """

    centres: np.ndarray
    directions: np.ndarray

    def lordosis_deg(self) -> float:
        """Angle between the ends in the sagittal plane, degrees; positive where the spine is hollow at the back."""
        forwards = [math.atan2(direction[1], direction[2]) for direction in self.directions[[0, -1]]]
        return math.degrees(forwards[1] - forwards[0])

    def to_right_deg(self) -> float:
        """Angle between the ends in the coronal plane, degrees; positive where the upper end leans to the patient's right."""
        rightwards = [math.atan2(direction[0], direction[2]) for direction in self.directions[[0, -1]]]
        return math.degrees(rightwards[0] - rightwards[1])


def curves(vertebrae: Sequence[Vertebra], world_from_ct: Sequence[np.ndarray]) -> dict[str, Curve]:
    """The spine as it was in the CT and as the X-rays show it, so that the lowest vertebra is the same in both.

    Args:
      vertebrae: head first; world_from_ct: (4, 4) their poses, mm.
    """
    boxes = np.stack([vertebra.ct_from_box for vertebra in vertebrae]).astype(np.float64)
    moved = np.linalg.inv(world_from_ct[-1]) @ np.asarray(world_from_ct) @ boxes
    return {name: Curve(its[:, :3, 3], its[:, :3, 2]) for name, its in zip(COLOURS, (boxes, moved))}


def segment(vertebrae: Sequence[Vertebra], world_from_ct: Sequence[np.ndarray]) -> dict[str, Any]:
    """How the upper of two vertebrae has moved relative to the lower one since the CT, in the lower one's axes, as plain values.

    Args:
      vertebrae: the upper and the lower one; world_from_ct: their poses (4, 4), mm.
    """
    upper, lower = vertebrae
    box = lower.ct_from_box.astype(np.float64)
    relative = np.linalg.inv(world_from_ct[1]) @ world_from_ct[0]
    in_box = np.linalg.inv(box) @ relative @ box
    centre = (np.linalg.inv(box) @ [*upper.ct_from_box[:3, 3], 1.0])[:3]
    twist = rigid_host.twist_about(centre, in_box)
    flexion, lateral, axial = (math.degrees(angle) for angle in twist[:3])
    return {
        "upper": level_name(upper.label),
        "lower": level_name(lower.label),
        "turn_deg": {"about_right": flexion, "about_front": lateral, "about_up": axial},
        "shift_mm": {"right": twist[3], "front": twist[4], "up": twist[5]},
    }


def table(levels: Sequence[str], found: dict[str, Curve], segments: Sequence[dict]) -> str:
    """The angles as HTML tables.

    Args:
      levels: names of the vertebrae, head first; found: of `curves`; segments: of spine.json.
    """
    rows = []
    for text, angle in (
        ("lordosis (positive) or kyphosis (negative)", Curve.lordosis_deg),
        ("lean of the upper end to the patient's right", Curve.to_right_deg),
    ):
        before, after = (angle(found[name]) for name in COLOURS)
        rows.append([text, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"])
    ends = f"{levels[0]} to {levels[-1]}, degrees"
    whole = _table(f"Between the ends: {ends}", ("", "CT", "X-rays", "change"), rows)
    pairs = [
        [f"{one['upper']} on {one['lower']}", *(f"{value:+.2f}" for part in parts for value in part.values())]
        for one in segments
        for parts in [(one["turn_deg"], one["shift_mm"])]
    ]
    axes = ("about right", "about front", "about up", "right", "front", "up")
    head = ("upper on lower", *(f"{axis}, {'degrees' if i < 3 else 'mm'}" for i, axis in enumerate(axes)))
    return whole + _table("Moved since the CT, in the lower vertebra's axes", head, pairs)


def _table(caption, head, rows):
    columns = "".join(f"<th scope='col'>{html.escape(text)}</th>" if text else "<td></td>" for text in head)
    lines = "".join(
        f"<tr><th scope='row'>{html.escape(first)}</th>{''.join(f'<td class=number>{value}</td>' for value in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table><caption>{html.escape(caption)}</caption><tr>{columns}</tr>{lines}</table>"


def drawing(levels: Sequence[str], found: dict[str, Curve]) -> str:
    """Both curves from the front and from the side as SVG; arguments as of `table`."""
    panels = "".join(_panel(title, *plane, levels, found) for title, plane in PLANES.items())
    key = " ".join(f'<span style="color:{colour}">&#9644;</span> {name}' for name, colour in COLOURS.items())
    return f'<div class="curves">{panels}</div><p>{key}, with the lowest vertebra in the same place.</p>'


def _panel(title, axis, sign, left, right, levels, found):
    flat = lambda vectors: np.stack([sign * vectors[:, axis], -vectors[:, 2]], -1)
    corners = np.concatenate([flat(curve.centres) for curve in found.values()])
    low, high = corners.min(0) - 0.9 * BAR_MM, corners.max(0) + 0.9 * BAR_MM
    parts = []
    for name, curve in found.items():
        points, ups = flat(curve.centres), flat(curve.directions)
        across = 0.5 * BAR_MM * np.stack([-ups[:, 1], ups[:, 0]], -1)
        bars = "".join(
            f"M{a[0]:.1f},{a[1]:.1f}L{b[0]:.1f},{b[1]:.1f}" for a, b in zip(points - across, points + across)
        )
        line = " ".join(f"{u:.1f},{v:.1f}" for u, v in points)
        parts.append(f'<g stroke="{COLOURS[name]}" fill="none" stroke-width="2"><path d="{bars}M{line}"/></g>')
    for level, (_, v) in zip(levels, flat(found["X-rays"].centres)):
        parts.append(f'<text x="{high[0] + 2:.1f}" y="{v + 3:.1f}">{level}</text>')
    parts += [
        f'<text x="{x:.1f}" y="{low[1]:.1f}">{letter}</text>' for x, letter in ((low[0], left), (high[0] - 8, right))
    ]
    box = f"{low[0] - 4:.1f} {low[1] - 10:.1f} {high[0] - low[0] + 28:.1f} {high[1] - low[1] + 14:.1f}"
    return (
        f'<figure><svg viewBox="{box}" role="img" aria-label="The spine {title}" font-size="9">{"".join(parts)}</svg>'
        f"<figcaption>{title}</figcaption></figure>"
    )
