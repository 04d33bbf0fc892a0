"""Soft tissue round the spine: skin, muscles, lungs, vessels and organs."""

import numpy as np
import scipy

from data_pipelines.phantom import anatomy
from data_pipelines.phantom import solids


class Trunk:
    """Body contour by height, behind the spinous `tips` (N, 3): skin semi-axes, centre, thickness of layers."""

    def __init__(self, rng, scale, config, spine, tips, heights):
        width, depth = config.extent_mm
        self.heights = heights
        self.fat = rng.uniform(12, 25)
        self.muscle = rng.uniform(11, 15)
        half_y = min(rng.uniform(98, 106) * scale, depth / 2 - 17)
        waist = np.exp(-np.square((heights - 90 * scale) / (70 * scale)))
        self.half_x = min(rng.uniform(150, 158) * scale, width / 2 - 6) * (1 - 0.05 * waist)
        smooth = 30.0 / (heights[1] - heights[0])
        line = scipy.ndimage.gaussian_filter1d(np.interp(heights, spine[:, 2], spine[:, 1]), smooth, mode="nearest")
        # The lumbar hollow of the back is shallower than the lordosis beneath it, the belly almost straight.
        back = 0.65 * line + 0.35 * line.mean() - 61 * scale - 0.75 * self.fat
        cover = tips[:, 1] - np.interp(tips[:, 2], heights, back)
        back -= max(0.0, self.fat - cover.min())
        front = back.mean() + 2 * half_y + 0.15 * (line - line.mean())
        self.centre_y, self.half_y = (front + back) / 2, (front - back) / 2

    def cage(self, z):
        """Semi-axes and centre y of the ellipse that the ribs follow."""
        half_x, half_y, y = (np.interp(z, self.heights, v) for v in (self.half_x, self.half_y, self.centre_y))
        return half_x - self.fat - 8, half_y - 0.75 * self.fat - 8, y

    def depth(self, grid):
        """Depth below the skin in mm, (X, Y, Z) float32, negative in air."""
        u = grid[0][:, None, None] / self.half_x.astype(np.float32)
        half_y = self.half_y.astype(np.float32)
        v = (grid[1][:, None] - self.centre_y.astype(np.float32)) / half_y
        u, v = u * u, (v * v)[None]
        # A circle squared a little: flat back and belly.
        q = np.sqrt(np.maximum(u + v - 0.3 * np.minimum(u, 1.2) * np.minimum(v, 1.2), 1e-6))
        return (1 - q) * half_y * (1 + 0.25 * u / (u + v + 1e-3))


class Painter:
    """The HU volume (float32) and brushes that blend tissues into it; windows and shapes in scan mm."""

    def __init__(self, grid):
        self.grid = grid
        self.hu = np.full([len(g) for g in grid], -1000.0, np.float32)

    def _blend(self, where, f, value, weight=None):
        cover = np.clip(0.5 - f / solids.BLUR_MM, 0, 1)
        if weight is not None:
            cover = cover * weight[where]
        self.hu[where] += (value - self.hu[where]) * cover

    def ellipsoid(self, centre, semi, value, weight=None, gas=None):
        """An ellipsoid; gas: HU of the gas in its upper (anterior, supine) part instead of a solid filling."""
        centre, semi = np.asarray(centre), np.asarray(semi)
        where = tuple(slice(*np.searchsorted(g, [c - s - 2, c + s + 2])) for g, c, s in zip(self.grid, centre, semi))
        x, y, z = (g[w] - np.float32(c) for g, w, c in zip(self.grid, where, centre))
        q = np.square(x / semi[0])[:, None, None] + np.square(y / semi[1])[None, :, None] + np.square(z / semi[2])
        f = (np.sqrt(q) - 1).astype(np.float32) * semi.min()
        self._blend(where, f, value, weight)
        if gas is not None:
            level = np.float32(0.35 * semi[1]) - y[None, :, None]
            self._blend(where, np.maximum(f + 2.5, level), gas, weight)

    def column(self, centre_x, centre_y, half_x, half_y, value, weight=None):
        """A vertical column: centre and semi-axes per slice, (Z,) each; absent where a semi-axis is not positive."""
        on = np.flatnonzero((half_x > 0) & (half_y > 0))
        if not on.size:
            return
        zs = slice(on[0], on[-1] + 1)
        cx, cy, hx, hy = (np.asarray(v[zs], np.float32) for v in (centre_x, centre_y, half_x, half_y))
        where = (
            slice(*np.searchsorted(self.grid[0], [(cx - hx).min() - 2, (cx + hx).max() + 2])),
            slice(*np.searchsorted(self.grid[1], [(cy - hy).min() - 2, (cy + hy).max() + 2])),
            zs,
        )
        x = (self.grid[0][where[0]][:, None] - cx) / np.maximum(hx, 0.1)
        y = (self.grid[1][where[1]][:, None] - cy) / np.maximum(hy, 0.1)
        q = np.sqrt(np.square(x)[:, None] + np.square(y)[None])
        self._blend(where, (q - 1) * np.minimum(hx, hy), value, weight)

    def bone(self, solid, shell, cortical, cancellous):
        """A bone with a cortical shell of `shell` mm; shell and cancellous HU may be arrays over the solid's window."""
        self._blend(solid.slices, solid.f, cortical)
        cover = np.clip(0.5 - (solid.f + shell) / solids.BLUR_MM, 0, 1)
        self.hu[solid.slices] += (cancellous - self.hu[solid.slices]) * cover


def soft_tissue(rng, painter, trunk, table, scale, scan_from_vertebra, spine):
    """Paint everything but bone and discs."""
    grid = painter.grid
    x, y, z = grid
    depth = trunk.depth(grid)
    fat, wall = trunk.fat, trunk.fat + trunk.muscle
    layers_mm = [-0.7, 0.7, 1.6, 2.6, fat - 0.7, fat + 0.7, wall - 0.7, wall + 0.7]
    painter.hu[...] = np.interp(depth, layers_mm, [-1000, 20, 20, -100, -100, 52, 52, -95])
    cavity = np.clip((depth - wall) / 1.5, 0, 1)

    spine_x, spine_y = (np.interp(z, spine[:, 2], spine[:, i]) for i in (0, 1))
    centre_y = trunk.centre_y
    level_z = {label: pose[2, 3] for label, pose in scan_from_vertebra.items()}
    t9 = level_z[anatomy.L5] + 295 * scale

    # Lungs: above two domes, beside the mediastinum, down to the recess behind the diaphragm.
    dome = np.full((len(x), len(y)), np.inf, np.float32)
    for side, top in ((1, t9 + 2), (-1, t9 - 12)):
        ahead = y - centre_y.mean() - 5
        u = np.square((x - side * 66) / 72)[:, None] + np.square(ahead / np.where(ahead > 0, 110, 68))[None, :]
        lung = np.where((side * x > 0)[:, None], top - 85 * u, np.inf)
        dome = np.minimum(dome, lung)
    lowest = np.searchsorted(z, level_z[anatomy.L1] + 10)
    upper = (slice(None), slice(None), slice(lowest, None))
    beside = np.abs(x[:, None, None] - spine_x[lowest:].astype(np.float32)) - 23 * scale
    front = (y[:, None] - spine_y[lowest:].astype(np.float32) - 8)[None]
    beside = np.minimum(beside, np.abs(x[:, None, None] + 8) - 14 - 0.4 * front)
    above = z[lowest:] - dome[:, :, None]
    air = np.clip(above / 2, 0, 1) * np.clip(beside / 2, 0, 1) * np.clip((depth[upper] - wall - 3) / 1.5, 0, 1)
    painter.hu[upper] += (rng.uniform(-830, -740) - painter.hu[upper]) * air
    below = np.ones_like(cavity)
    below[upper] = np.clip(-above / 2, 0, 1)
    below *= cavity

    painter.ellipsoid((-22, centre_y.mean() + 42, t9 + 32), (58, 42, 44), 45, cavity)

    # Abdominal organs (x is right). The diaphragm and the wall bound them.
    front_y = centre_y.mean() + 8
    liver_z = t9 - 62 * scale
    painter.ellipsoid((62, front_y, liver_z), (80, 82, 76 * scale), rng.uniform(48, 62), below)
    painter.ellipsoid((-92, front_y - 32, t9 - 58 * scale), (34, 42, 50 * scale), rng.uniform(42, 54), below)
    painter.ellipsoid((-48, front_y + 28, t9 - 66 * scale), (42, 36, 46 * scale), 28, below, gas=-850)
    for side, label in ((1, 21), (-1, 20)):
        at = np.interp(level_z[label], z, spine_y)
        centre = np.array([side * rng.uniform(58, 64) * scale, at + 2, level_z[label] + rng.uniform(-6, 6)])
        painter.ellipsoid(centre, np.array([27, 24, 53]) * scale, rng.uniform(30, 40), cavity)
        painter.ellipsoid(centre - [side * 12, -3, 0], np.array([12, 9, 24]) * scale, -80, cavity)
    for side in (1, -1):
        ripple = 18 + 3 * np.sin(z / 9 + rng.uniform(0, 6))
        span = (z > level_z[anatomy.L5] - 20) & (z < level_z[21] + 10)
        at = np.full_like(z, side * rng.uniform(84, 92) * scale)
        painter.column(at, centre_y - 4, ripple * span, ripple * span, 22, cavity)
        for _ in range(4):
            centre = (at[0], front_y - 6, rng.uniform(level_z[anatomy.L5], level_z[anatomy.L1]))
            painter.ellipsoid(centre, rng.uniform(9, 15, 3), -850, cavity)
    for _ in range(48):
        centre = (rng.uniform(-72, 72), front_y + rng.uniform(8, 62), rng.uniform(-70, level_z[anatomy.L1] - 10))
        gas = -850 if rng.uniform() < 0.25 else None
        painter.ellipsoid(centre, rng.uniform(11, 22, 3), rng.uniform(15, 45), cavity, gas=gas)

    # Muscles beside the spine.
    grow = np.clip((level_z[anatomy.L1] + 12 - z) / (level_z[anatomy.L1] - level_z[anatomy.L5]), 0, 1.3)
    half_width = np.interp(
        z,
        [level_z[label] for label in sorted(table, reverse=True)],
        [table[label].width / 2 for label in sorted(table, reverse=True)],
    )
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

    # Great vessels on the front of the bodies, dividing at L4; the dural sac.
    ahead = np.interp(
        z,
        [level_z[label] for label in sorted(table, reverse=True)],
        [table[label].depth / 2 for label in sorted(table, reverse=True)],
    )
    radius = rng.uniform(8.5, 11)
    split = np.clip((level_z[23] - z) / 60, 0, 1)
    blood = rng.uniform(40, 180)
    trunk_part = radius * (split < 0.08)
    painter.column(spine_x - 9, spine_y + ahead + radius + 1, trunk_part, trunk_part, blood)
    cava = trunk_part * (z < t9 - 40)
    painter.column(spine_x + 15, spine_y + ahead + 7, 1.2 * cava, 0.9 * cava, 0.5 * blood + 22)
    for side in (1, -1):
        branch = 0.62 * radius * (split > 0)
        sideways = side * (5 + 52 * split) - 6
        painter.column(spine_x + sideways, spine_y + ahead + radius - 8 * split, branch, branch, blood)
    painter.column(spine_x, spine_y - ahead - 8.5, np.full_like(z, 8.5), np.full_like(z, 6.5), 25)
