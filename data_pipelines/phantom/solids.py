"""Signed distances: the solids that bones are built from, and how neighbours are kept apart."""

import numpy as np
import scipy

_FAR_MM = 20.0
BLUR_MM = 1.5


def rotation(axis, degrees):
    """(4, 4) rotation about coordinate axis 0, 1 or 2."""
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    out = np.eye(4)
    out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def translation(x, y, z):
    out = np.eye(4)
    out[:3, 3] = x, y, z
    return out


def apply_affine(a_from_b, p):
    return a_from_b[:3, :3] @ np.asarray(p, np.float64) + a_from_b[:3, 3]


def _union(a, b, k):
    """Smooth minimum: the seam is filled over a width of k mm."""
    h = np.maximum(k - np.abs(a - b), 0.0)
    return np.minimum(a, b) - h * h / (4.0 * k)


def cut(a, b, k):
    """Smooth maximum: the edge is rounded over a width of k mm."""
    return -_union(-a, -b, k)


def _plate(p, a, b, up, half_height, radius):
    """Distance to a tapered plate from a to b: a stadium section, along `up` half_height and across it radius in mm.

    half_height and radius are pairs (at a, at b); with both equal it is a capsule.
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
    """A bone: distance field `f` on a window of the grid (three coordinate vectors in scan mm)."""

    def __init__(self, grid, low, high):
        self.grid = grid
        self.start = [int(np.searchsorted(g, lo)) for g, lo in zip(grid, low)]
        stop = [max(int(np.searchsorted(g, hi)), s) for g, hi, s in zip(grid, high, self.start)]
        self.slices = tuple(slice(s, e) for s, e in zip(self.start, stop))
        self.f = np.full([e - s for s, e in zip(self.start, stop)], _FAR_MM, np.float32)

    def window(self, low, high):
        """Local slices of the box low..high and its open mesh of scan coordinates."""
        local, mesh = [], []
        for axis, (g, s) in enumerate(zip(self.grid, self.slices)):
            g = g[s]
            i, j = np.searchsorted(g, low[axis]), np.searchsorted(g, high[axis])
            local.append(slice(i, max(i, j)))
            mesh.append(g[local[-1]].reshape([-1 if k == axis else 1 for k in range(3)]))
        return tuple(local), mesh

    def plate(self, a, b, up, half_height, radius, k=3.0, carve=False):
        """Unite with a plate, or carve it out; the points and `up` are in scan mm."""
        reach = max(*half_height, *radius) + 6.0
        local, mesh = self.window(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        if self.f[local].size:
            d = _plate(mesh, np.asarray(a), np.asarray(b), np.asarray(up), half_height, radius)
            self.f[local] = cut(self.f[local], -d, k) if carve else _union(self.f[local], d, k)

    def in_frame(self, scan_from_frame, low, high):
        """Local slices that cover the box low..high of a frame, and the coordinates in that frame there."""
        corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
        corners = corners @ scan_from_frame[:3, :3].T + scan_from_frame[:3, 3]
        local, mesh = self.window(corners.min(0), corners.max(0))
        r, t = scan_from_frame[:3, :3].astype(np.float32), scan_from_frame[:3, 3].astype(np.float32)
        d = [m - o for m, o in zip(mesh, t)]
        return local, [d[0] * r[0, i] + d[1] * r[1, i] + d[2] * r[2, i] for i in range(3)]

    def body(self, scan_from_body, width, depth, height, wedge_deg, heart):
        """Unite with a vertebral body; heart in 0..1 narrows the front, as in thoracic bodies."""
        margin = np.array([width / 2 + 5, depth / 2 + 5, height / 2 + 7])
        local, (x, y, z) = self.in_frame(scan_from_body, -margin, margin)
        a, b = width / 2, depth / 2
        flank = a * (1 - (0.04 + 0.12 * heart) * np.clip(y / b, -1, 1))
        back = b - (1.6 + 0.6 * heart) * np.exp(-np.square(x / (0.4 * a)))
        n = 2.35 - 0.2 * heart
        q = (np.abs(x) / flank) ** n
        q = (q + (np.abs(y) / np.where(y < 0, back, b)) ** n) ** (1 / n)
        # Rim, waist and back to the rim: the lip is confined to the outer quarter of the height.
        waist = 1 - 0.115 * np.maximum(1 - np.abs(2 * z / height) ** 2.5, 0)
        side = (q - waist) * np.hypot(x, y) / np.maximum(q, 1e-3)
        bowl = np.maximum(1 - np.square(q / 0.86), 0)
        lean = y * np.float32(np.tan(np.radians(wedge_deg / 2)))
        top = z - (height / 2 + 0.4 + lean - 2.1 * bowl)
        bottom = -z - (height / 2 + 0.4 + lean - 2.4 * bowl)
        f = cut(cut(top, bottom, 1.0), side, 2.2)
        self.f[local] = np.minimum(self.f[local], f)


def smooth_curve(points, count, smooth):
    """Resample a polyline (N, 3) to `count` points at equal arc length, corners rounded."""
    points = np.asarray(points, np.float64)
    arc = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.linspace(0, arc[-1], count)
    fine = np.stack([np.interp(at, arc, points[:, i]) for i in range(3)], 1)
    return scipy.ndimage.gaussian_filter1d(fine, smooth, axis=0, mode="nearest")


def _overlap(a, b):
    """Local slices of two solids on the voxels that both windows cover."""
    low = [max(p, q) for p, q in zip(a.start, b.start)]
    high = [max(min(p.stop, q.stop), lo) for p, q, lo in zip(a.slices, b.slices, low)]
    return tuple(tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, solid.start)) for solid in (a, b))


def keep_apart(a, b, gap):
    """Separate two bones along the surface of equal distance, with a joint space of gap mm."""
    in_a, in_b = _overlap(a, b)
    difference = (a.f[in_a] - b.f[in_b]) / 2
    a.f[in_a] = np.maximum(a.f[in_a], difference + gap / 2)
    b.f[in_b] = np.maximum(b.f[in_b], gap / 2 - difference)


def give_way(a, b, gap):
    """Cut bone a back until it keeps gap mm from bone b."""
    in_a, in_b = _overlap(a, b)
    a.f[in_a] = np.maximum(a.f[in_a], gap - b.f[in_b])
