"""Solids as signed distance fields: the primitives that bones are built from, and joint spaces between neighbours.

Distances are in mm, negative inside. The coefficients of the vertebral body's surface were drawn by hand.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy

_FAR_MM = 20.0
"""Distance that an empty solid starts from, mm: larger than any width over which solids are blended."""


def _union(a, b, k):
    """Union by a smooth minimum: the seam is filled over a width of k mm."""
    h = np.maximum(k - np.abs(a - b), 0.0)
    return np.minimum(a, b) - h * h / (4.0 * k)


def cut(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Intersection of two distance fields by a smooth maximum: the edge is rounded over a width of k mm."""
    return -_union(-a, -b, k)


def _plate(p, a, b, up, half_height, radius):
    """Distance to a tapered plate from a to b with a stadium as cross-section.

    The section measures `half_height` along `up` and `radius` across it, in mm; both are pairs (at a, at b). Where the two
    are equal the plate is a capsule.
    """
    length = np.linalg.norm(b - a)
    e = (b - a) / length
    up = up - e * (up @ e)
    up = up / np.linalg.norm(up)
    n = np.cross(e, up)
    d = [p[i] - np.float32(a[i]) for i in range(3)]
    u, v, w = (sum(d[i] * np.float32(q[i]) for i in range(3)) for q in (e, up, n))
    t = np.clip(u / np.float32(length), 0, 1)
    r = np.float32(radius[0]) + np.float32(radius[1] - radius[0]) * t
    h = np.float32(half_height[0]) + np.float32(half_height[1] - half_height[0]) * t
    beyond = u - t * np.float32(length)
    v = np.maximum(np.abs(v) - np.maximum(h - r, 0), 0)
    return np.sqrt(beyond * beyond + v * v + w * w) - r


class Solid:
    """A distance field on a box-shaped window of the scan grid.

    Attributes:
      grid: coordinates of the scan's voxels along x, y and z, (X,), (Y,), (Z,), scan mm.
      start: index of the window's first voxel along each axis.
      slices: the window in arrays of the scan's shape.
      f: signed distance on the window, mm, float32.
    """

    def __init__(
        self, grid: Sequence[np.ndarray], low: Sequence[float] | np.ndarray, high: Sequence[float] | np.ndarray
    ) -> None:
        """An empty solid whose window covers the box from `low` to `high`, (3,) scan mm."""
        self.grid = grid
        self.start = [int(np.searchsorted(g, lo)) for g, lo in zip(grid, low)]
        stop = [max(int(np.searchsorted(g, hi)), s) for g, hi, s in zip(grid, high, self.start)]
        self.slices = tuple(slice(s, e) for s, e in zip(self.start, stop))
        self.f = np.full([e - s for s, e in zip(self.start, stop)], _FAR_MM, np.float32)

    def window(self, low: np.ndarray, high: np.ndarray) -> tuple[tuple[slice, ...], list[np.ndarray]]:
        """Slices of `f` for the box from `low` to `high`, (3,) scan mm, and the open mesh of its coordinates."""
        local, mesh = [], []
        for axis, (g, s) in enumerate(zip(self.grid, self.slices)):
            g = g[s]
            i, j = np.searchsorted(g, low[axis]), np.searchsorted(g, high[axis])
            local.append(slice(i, max(i, j)))
            mesh.append(g[local[-1]].reshape([-1 if k == axis else 1 for k in range(3)]))
        return tuple(local), mesh

    def plate(
        self,
        a: np.ndarray,
        b: np.ndarray,
        up: npt.ArrayLike,
        half_height: Sequence[float] | np.ndarray,
        radius: Sequence[float] | np.ndarray,
        k: float = 3.0,
        carve: bool = False,
    ) -> None:
        """Unites the solid with a tapered plate, or carves the plate out of it.

        Args:
          a, b: (3,) ends of the plate's centre line, scan mm.
          up: (3,) direction in which the plate is high; its part along the centre line is ignored.
          half_height, radius: at a and at b: half the height along `up`, half the thickness across it, mm.
          k: width over which the seam is rounded, mm.
          carve: removes the plate.
        """
        reach = max(*half_height, *radius) + 6.0
        local, mesh = self.window(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        if self.f[local].size:
            d = _plate(mesh, np.asarray(a), np.asarray(b), np.asarray(up), half_height, radius)
            self.f[local] = cut(self.f[local], -d, k) if carve else _union(self.f[local], d, k)

    def in_frame(
        self, scan_from_frame: np.ndarray, low: Sequence[float] | np.ndarray, high: Sequence[float] | np.ndarray
    ) -> tuple[tuple[slice, ...], list[np.ndarray]]:
        """Slices of `f` that cover a box of another frame, and that frame's x, y and z of their voxels.

        Args:
          scan_from_frame: (4, 4) rigid.
          low, high: (3,) corners of the box, mm in the frame.
        """
        corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
        corners = corners @ scan_from_frame[:3, :3].T + scan_from_frame[:3, 3]
        local, mesh = self.window(corners.min(0), corners.max(0))
        r, t = scan_from_frame[:3, :3].astype(np.float32), scan_from_frame[:3, 3].astype(np.float32)
        d = [m - o for m, o in zip(mesh, t)]
        return local, [d[0] * r[0, i] + d[1] * r[1, i] + d[2] * r[2, i] for i in range(3)]

    def body(
        self, scan_from_body: np.ndarray, width: float, depth: float, height: float, wedge_deg: float, heart: float
    ) -> None:
        """Unites the solid with a vertebral body: a superellipse with a waist, a hollow back and concave endplates.

        Args:
          scan_from_body: (4, 4) frame at the body's centre.
          width, depth, height: mm.
          wedge_deg: angle between the endplates.
          heart: 0 to 1; narrows the front to the heart shape of thoracic bodies.
        """
        margin = np.array([width / 2 + 5, depth / 2 + 5, height / 2 + 7])
        local, (x, y, z) = self.in_frame(scan_from_body, -margin, margin)
        a, b = width / 2, depth / 2
        flank = a * (1 - (0.04 + 0.12 * heart) * np.clip(y / b, -1, 1))
        back = b - (1.6 + 0.6 * heart) * np.exp(-np.square(x / (0.4 * a)))
        n = 2.35 - 0.2 * heart
        q = (np.abs(x) / flank) ** n
        q = (q + (np.abs(y) / np.where(y < 0, back, b)) ** n) ** (1 / n)
        # The waist is widest at mid height; the exponent confines the lip to the outer quarter of the height.
        waist = 1 - 0.115 * np.maximum(1 - np.abs(2 * z / height) ** 2.5, 0)
        side = (q - waist) * np.hypot(x, y) / np.maximum(q, 1e-3)
        bowl = np.maximum(1 - np.square(q / 0.86), 0)
        lean = y * np.float32(np.tan(np.radians(wedge_deg / 2)))
        top = z - (height / 2 + 0.4 + lean - 2.1 * bowl)
        bottom = -z - (height / 2 + 0.4 + lean - 2.4 * bowl)
        f = cut(cut(top, bottom, 1.0), side, 2.2)
        self.f[local] = np.minimum(self.f[local], f)


def smooth_curve(points: npt.ArrayLike, count: int, smooth: float) -> np.ndarray:
    """Resamples a polyline to points at equal arc length and rounds its corners.

    Args:
      points: (N, 3).
      count: number of points of the result.
      smooth: standard deviation of the rounding, in points of the result.

    Returns:
      (count, 3).
    """
    points = np.asarray(points, np.float64)
    arc = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.linspace(0, arc[-1], count)
    fine = np.stack([np.interp(at, arc, points[:, i]) for i in range(3)], 1)
    return scipy.ndimage.gaussian_filter1d(fine, smooth, axis=0, mode="nearest")


def _overlap(a, b):
    """Slices of two solids' fields for the voxels that both windows cover."""
    low = [max(p, q) for p, q in zip(a.start, b.start)]
    high = [max(min(p.stop, q.stop), lo) for p, q, lo in zip(a.slices, b.slices, low)]
    return tuple(tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, solid.start)) for solid in (a, b))


def keep_apart(a: Solid, b: Solid, gap: float) -> None:
    """Separates two bones along the surface of equal distance, with a joint space of `gap` mm."""
    in_a, in_b = _overlap(a, b)
    difference = (a.f[in_a] - b.f[in_b]) / 2
    a.f[in_a] = np.maximum(a.f[in_a], difference + gap / 2)
    b.f[in_b] = np.maximum(b.f[in_b], gap / 2 - difference)


def give_way(a: Solid, b: Solid, gap: float) -> None:
    """Cuts bone a back until it keeps `gap` mm from bone b."""
    in_a, in_b = _overlap(a, b)
    a.f[in_a] = np.maximum(a.f[in_a], gap - b.f[in_b])
