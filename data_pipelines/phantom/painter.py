"""Blends tissues into a volume of Hounsfield units, with borders softened as by a CT's point spread."""

from collections.abc import Sequence

import numpy as np

from data_pipelines.phantom import solids

BLUR_MM = 1.5
"""Width over which two tissues are blended at their border, mm; chosen by hand, near the default voxel size. At half of it
borders are voxel stairs; at twice it the cortical shells, about 1 mm thick, fade into the marrow."""


class Painter:
    """A volume of HU and brushes that blend tissues into it.

    Attributes:
      grid: coordinates of the voxels along x, y and z, (X,), (Y,), (Z,), scan mm.
      hu: (X, Y, Z) float32, air at first.
    """

    def __init__(self, grid: Sequence[np.ndarray]) -> None:
        self.grid = grid
        self.hu = np.full([len(g) for g in grid], -1000.0, np.float32)

    def _blend(self, where, f, value, weight=None):
        cover = np.clip(0.5 - f / BLUR_MM, 0, 1)
        if weight is not None:
            cover = cover * weight[where]
        self.hu[where] += (value - self.hu[where]) * cover

    def ellipsoid(
        self,
        centre: Sequence[float],
        semi: Sequence[float],
        value: float,
        weight: np.ndarray | None = None,
        gas: float | None = None,
    ) -> None:
        """Paints an ellipsoid with axes along the grid's.

        Args:
          centre, semi: (3,) centre and semi-axes, scan mm.
          value: HU.
          weight: (X, Y, Z) opacity in 0 to 1 that limits the brush; None for 1 everywhere.
          gas: HU of the gas in the anterior part, which is the upper one of a supine patient; None for no gas.
        """
        centre, semi = np.asarray(centre), np.asarray(semi)
        where = tuple(slice(*np.searchsorted(g, [c - s - 2, c + s + 2])) for g, c, s in zip(self.grid, centre, semi))
        x, y, z = (g[w] - np.float32(c) for g, w, c in zip(self.grid, where, centre))
        q = np.square(x / semi[0])[:, None, None] + np.square(y / semi[1])[None, :, None] + np.square(z / semi[2])
        f = (np.sqrt(q) - 1).astype(np.float32) * semi.min()
        self._blend(where, f, value, weight)
        if gas is not None:
            level = np.float32(0.35 * semi[1]) - y[None, :, None]
            self._blend(where, np.maximum(f + 2.5, level), gas, weight)

    def column(
        self,
        centre_x: np.ndarray,
        centre_y: np.ndarray,
        half_x: np.ndarray,
        half_y: np.ndarray,
        value: float,
        weight: np.ndarray | None = None,
    ) -> None:
        """Paints a vertical column with an ellipse in each slice.

        Args:
          centre_x, centre_y, half_x, half_y: (Z,) centres and semi-axes, scan mm; a slice is left out where a semi-axis is
            not positive.
          value, weight: as in `ellipsoid`.
        """
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

    def bone(
        self, solid: solids.Solid, shell: float | np.ndarray, cortical: float, cancellous: float | np.ndarray
    ) -> None:
        """Paints a solid with a cortical shell round a cancellous core.

        Args:
          shell: thickness of the shell, mm; a number or an array over the solid's window.
          cortical: HU of the shell.
          cancellous: HU of the core; a number or an array over the solid's window.
        """
        self._blend(solid.slices, solid.f, cortical)
        cover = np.clip(0.5 - (solid.f + shell) / BLUR_MM, 0, 1)
        self.hu[solid.slices] += (cancellous - self.hu[solid.slices]) * cover
