"""The trunk round the spine: the body contour, and soft tissue painted inside it (muscles, lungs, vessels, organs).

Positions (scan mm), sizes and HU were chosen by hand for a plausible overlay in X-rays; nothing is measured in them. x points
to the patient's right.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy

from data_pipelines.phantom import anatomy
from data_pipelines.phantom.painter import Painter


class Trunk:
    """The body contour: an ellipse at each height, with layers of fat and muscle under the skin.

    Attributes:
      heights: (Z,) z of the contour's slices, scan mm.
      centre_y, half_x, half_y: (Z,) centre and semi-axes of the skin, mm.
      fat, muscle: thickness of the layers, mm.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        scale: float,
        extent_mm: Sequence[float],
        spine: np.ndarray,
        tips: np.ndarray,
        heights: np.ndarray,
    ) -> None:
        """Draws a trunk.

        Args:
          scale: of the patient, 1 for the mean.
          extent_mm: lateral and antero-posterior field of view, which the trunk must fit into.
          spine: (N, 3) points along the vertebral bodies, from the sacrum upwards.
          tips: (N, 3) tips of the spinous processes, which the fat of the back covers.
          heights: (Z,) z of the slices, evenly spaced.
        """
        width, depth = extent_mm
        self.heights = heights
        self.fat = rng.uniform(12, 25)
        self.muscle = rng.uniform(11, 15)
        half_y = min(rng.uniform(98, 106) * scale, depth / 2 - 17)
        waist = np.exp(-np.square((heights - 90 * scale) / (70 * scale)))
        self.half_x = min(rng.uniform(150, 158) * scale, width / 2 - 6) * (1 - 0.05 * waist)
        smooth = 30.0 / (heights[1] - heights[0])
        line = scipy.ndimage.gaussian_filter1d(np.interp(heights, spine[:, 2], spine[:, 1]), smooth, mode="nearest")
        # The lumbar hollow of the back is shallower than the lordosis beneath it; the belly is almost straight.
        back = 0.65 * line + 0.35 * line.mean() - 61 * scale - 0.75 * self.fat
        cover = tips[:, 1] - np.interp(tips[:, 2], heights, back)
        back -= max(0.0, self.fat - cover.min())
        front = back.mean() + 2 * half_y + 0.15 * (line - line.mean())
        self.centre_y, self.half_y = (front + back) / 2, (front - back) / 2

    def cage(self, z: float) -> tuple[float, float, float]:
        """The ellipse that ribs follow at height z: semi-axes along x and y, and the centre's y, mm."""
        half_x, half_y, y = (np.interp(z, self.heights, v) for v in (self.half_x, self.half_y, self.centre_y))
        return half_x - self.fat - 8, half_y - 0.75 * self.fat - 8, y

    def depth(self, grid: Sequence[np.ndarray]) -> np.ndarray:
        """Depth of each voxel below the skin, (X, Y, Z) float32 mm, negative in air."""
        u = grid[0][:, None, None] / self.half_x.astype(np.float32)
        half_y = self.half_y.astype(np.float32)
        v = (grid[1][:, None] - self.centre_y.astype(np.float32)) / half_y
        u, v = u * u, (v * v)[None]
        # The mixed term squares the ellipse a little, which flattens the back and the belly.
        q = np.sqrt(np.maximum(u + v - 0.3 * np.minimum(u, 1.2) * np.minimum(v, 1.2), 1e-6))
        return (1 - q) * half_y * (1 + 0.25 * u / (u + v + 1e-3))


@dataclasses.dataclass(frozen=True)
class _Landmarks:
    """Where organs are placed from: the spine's x and y in each slice (Z,), z by VerSe number, z near T9, and the scale."""

    spine_x: np.ndarray
    spine_y: np.ndarray
    level_z: dict
    t9: float
    scale: float


def soft_tissue(
    rng: np.random.Generator,
    painter: Painter,
    trunk: Trunk,
    table: dict[int, anatomy.LevelSize],
    scale: float,
    scan_from_vertebra: dict[int, np.ndarray],
    spine: np.ndarray,
) -> None:
    """Paints everything except bones and discs.

    Args:
      painter: its volume is overwritten.
      table: sizes by VerSe number.
      scale: of the patient, 1 for the mean.
      scan_from_vertebra: (4, 4) by VerSe number.
      spine: (N, 3) points along the vertebral bodies, from the sacrum upwards.
    """
    z = painter.grid[2]
    depth = trunk.depth(painter.grid)
    fat, wall = trunk.fat, trunk.fat + trunk.muscle
    layers_mm = [-0.7, 0.7, 1.6, 2.6, fat - 0.7, fat + 0.7, wall - 0.7, wall + 0.7]
    painter.hu[...] = np.interp(depth, layers_mm, [-1000, 20, 20, -100, -100, 52, 52, -95])
    cavity = np.clip((depth - wall) / 1.5, 0, 1)

    spine_x, spine_y = (np.interp(z, spine[:, 2], spine[:, i]) for i in (0, 1))
    level_z = {label: pose[2, 3] for label, pose in scan_from_vertebra.items()}
    at = _Landmarks(spine_x, spine_y, level_z, level_z[anatomy.L5] + 295 * scale, scale)
    below = _lungs(rng, painter, trunk, at, depth, cavity)
    _organs(rng, painter, trunk, at, cavity, below)
    _muscles(rng, painter, table, at)
    _vessels(rng, painter, table, at)


def _lungs(rng, painter, trunk, at, depth, cavity):
    """Paints the lungs and the heart; returns the opacity (X, Y, Z) of the cavity below the diaphragm.

    The lungs lie above two domes, on both sides of the mediastinum, down to the recess behind the diaphragm.
    """
    x, y, z = painter.grid
    centre_y, wall = trunk.centre_y, trunk.fat + trunk.muscle
    dome = np.full((len(x), len(y)), np.inf, np.float32)
    for side, top in ((1, at.t9 + 2), (-1, at.t9 - 12)):
        ahead = y - centre_y.mean() - 5
        u = np.square((x - side * 66) / 72)[:, None] + np.square(ahead / np.where(ahead > 0, 110, 68))[None, :]
        lung = np.where((side * x > 0)[:, None], top - 85 * u, np.inf)
        dome = np.minimum(dome, lung)
    lowest = np.searchsorted(z, at.level_z[anatomy.L1] + 10)
    upper = (slice(None), slice(None), slice(lowest, None))
    lateral = np.abs(x[:, None, None] - at.spine_x[lowest:].astype(np.float32)) - 23 * at.scale
    front = (y[:, None] - at.spine_y[lowest:].astype(np.float32) - 8)[None]
    lateral = np.minimum(lateral, np.abs(x[:, None, None] + 8) - 14 - 0.4 * front)
    above = z[lowest:] - dome[:, :, None]
    air = np.clip(above / 2, 0, 1) * np.clip(lateral / 2, 0, 1) * np.clip((depth[upper] - wall - 3) / 1.5, 0, 1)
    painter.hu[upper] += (rng.uniform(-830, -740) - painter.hu[upper]) * air
    below = np.ones_like(cavity)
    below[upper] = np.clip(-above / 2, 0, 1)
    below *= cavity
    painter.ellipsoid((-22, centre_y.mean() + 42, at.t9 + 32), (58, 42, 44), 45, cavity)
    return below


def _organs(rng, painter, trunk, at, cavity, below):
    """Paints the abdominal organs, bounded by the diaphragm and the wall: liver, spleen, stomach, kidneys, colon, bowel."""
    z, centre_y, level_z, scale = painter.grid[2], trunk.centre_y, at.level_z, at.scale
    front_y = centre_y.mean() + 8
    liver_z = at.t9 - 62 * scale
    painter.ellipsoid((62, front_y, liver_z), (80, 82, 76 * scale), rng.uniform(48, 62), below)
    painter.ellipsoid((-92, front_y - 32, at.t9 - 58 * scale), (34, 42, 50 * scale), rng.uniform(42, 54), below)
    painter.ellipsoid((-48, front_y + 28, at.t9 - 66 * scale), (42, 36, 46 * scale), 28, below, gas=-850)
    for side, label in ((1, 21), (-1, 20)):
        spine_y = np.interp(level_z[label], z, at.spine_y)
        centre = np.array([side * rng.uniform(58, 64) * scale, spine_y + 2, level_z[label] + rng.uniform(-6, 6)])
        painter.ellipsoid(centre, np.array([27, 24, 53]) * scale, rng.uniform(30, 40), cavity)
        painter.ellipsoid(centre - [side * 12, -3, 0], np.array([12, 9, 24]) * scale, -80, cavity)
    for side in (1, -1):
        ripple = 18 + 3 * np.sin(z / 9 + rng.uniform(0, 6))
        span = (z > level_z[anatomy.L5] - 20) & (z < level_z[21] + 10)
        colon_x = np.full_like(z, side * rng.uniform(84, 92) * scale)
        painter.column(colon_x, centre_y - 4, ripple * span, ripple * span, 22, cavity)
        for _ in range(4):
            centre = (colon_x[0], front_y - 6, rng.uniform(level_z[anatomy.L5], level_z[anatomy.L1]))
            painter.ellipsoid(centre, rng.uniform(9, 15, 3), -850, cavity)
    for _ in range(48):
        centre = (rng.uniform(-72, 72), front_y + rng.uniform(8, 62), rng.uniform(-70, level_z[anatomy.L1] - 10))
        gas = -850 if rng.uniform() < 0.25 else None
        painter.ellipsoid(centre, rng.uniform(11, 22, 3), rng.uniform(15, 45), cavity, gas=gas)


def _by_height(z, table, at, size):
    """A size of the levels, by VerSe number, interpolated to every slice (Z,)."""
    labels = sorted(table, reverse=True)
    return np.interp(z, [at.level_z[label] for label in labels], [size(table[label]) for label in labels])


def _muscles(rng, painter, table, at):
    """Paints the muscles along the spine: psoas, quadratus lumborum, erector spinae and multifidus."""
    z, spine_x, spine_y, level_z, scale = painter.grid[2], at.spine_x, at.spine_y, at.level_z, at.scale
    grow = np.clip((level_z[anatomy.L1] + 12 - z) / (level_z[anatomy.L1] - level_z[anatomy.L5]), 0, 1.3)
    half_width = _by_height(z, table, at, lambda level: level.width / 2)
    swell = 1 - 0.25 * np.clip((z - level_z[anatomy.L1]) / 80, 0, 1)
    tone = rng.uniform(46, 60)
    for side in (1, -1):
        bulk = rng.uniform(0.92, 1.08) * scale
        psoas = (8 + 13 * grow) * bulk * (grow > 0)
        sideways = half_width + 0.85 * psoas + np.clip(-z, 0, None) * 0.3
        painter.column(spine_x + side * sideways, spine_y - 4 + np.clip(-z, 0, None) * 0.5, psoas, 1.2 * psoas, tone)
        quadratus = 9 * bulk * ((grow > 0.1) & (z > -5))
        painter.column(spine_x + side * (half_width + 32 * bulk), spine_y - 26, 1.7 * quadratus, quadratus, tone)
        ending = np.clip((z + 80) / 60, 0, 1)
        erector = 21 * bulk * swell * ending
        painter.column(spine_x + side * 33 * bulk, spine_y - 50 * scale, 1.35 * erector, erector, tone - 4)
        multifidus = 17 * bulk * ending
        painter.column(spine_x + side * 14 * bulk, spine_y - 47 * scale, 0.75 * multifidus, 1.15 * multifidus, tone - 8)


def _vessels(rng, painter, table, at):
    """Paints the aorta and vena cava on the front of the bodies, their branches below L4, and the dural sac."""
    z, spine_x, spine_y = painter.grid[2], at.spine_x, at.spine_y
    ahead = _by_height(z, table, at, lambda level: level.depth / 2)
    radius = rng.uniform(8.5, 11)
    split = np.clip((at.level_z[23] - z) / 60, 0, 1)
    blood = rng.uniform(40, 180)
    trunk_part = radius * (split < 0.08)
    painter.column(spine_x - 9, spine_y + ahead + radius + 1, trunk_part, trunk_part, blood)
    cava = trunk_part * (z < at.t9 - 40)
    painter.column(spine_x + 15, spine_y + ahead + 7, 1.2 * cava, 0.9 * cava, 0.5 * blood + 22)
    for side in (1, -1):
        branch = 0.62 * radius * (split > 0)
        sideways = side * (5 + 52 * split) - 6
        painter.column(spine_x + sideways, spine_y + ahead + radius - 8 * split, branch, branch, blood)
    painter.column(spine_x, spine_y - ahead - 8.5, np.full_like(z, 8.5), np.full_like(z, 6.5), 25)
