"""Procedural CT of a human spine from T9 to the sacrum, with vertebra labels in VerSe numbers.

Every bone is a signed distance field (mm, negative inside) on its own window of the scan grid: smooth unions of tapered
plates, and superellipse bodies. The bones are posed by a chain of rigid transforms that starts at the sacrum. Facet
joints are placed in the frame of the disc that they belong to, so both partners of a joint fit in any posture.

Frames: `patient` is RAS+ mm. `vertebra` has its origin at the centre of the vertebral body, x right, y anterior, z
along the body axis. `disc` is the same at the centre of the disc. All shapes are built in `scan`, which is parallel to
`patient` with its origin at the centre of the S1 endplate.
"""

import dataclasses
import pathlib

import numpy as np
import scipy

from data_pipelines import files

SACRUM = 26
_FIRST, _T12, _L1, _L5 = 16, 19, 20, 24
_FAR_MM = 20.0
_FACET_GAP_MM = 1.6
_BLUR_MM = 1.5


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """Sampling and variation of a phantom.

    spacing_mm: voxel size (x, y, z).
    extent_mm: field of view (lateral, antero-posterior); its height follows from the spine.
    levels: labelled vertebrae in VerSe numbers, without gaps and ending at L5 (24); the first is T9 (16) or lower.
    size_variation: patient scale is 1 +- this; level_variation: size of each vertebra, 1 +- this.
    asymmetry: right against left lengths and positions of the processes, 1 +- this.
    noise_hu: standard deviation of the CT noise.
    """

    spacing_mm: tuple = (1.25, 1.25, 1.5)
    extent_mm: tuple = (330.0, 240.0)
    levels: tuple = tuple(range(_FIRST, _L5 + 1))
    size_variation: float = 0.08
    level_variation: float = 0.03
    asymmetry: float = 0.04
    noise_hu: float = 12.0


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A CT with its labels.

    hu: (X, Y, Z) int16. mask: (X, Y, Z) uint8, VerSe labels, 26 = sacrum, ribs and pelvis 0.
    affine: (4, 4) float64, patient RAS mm from voxel index.
    centroids: label -> (3,) RAS mm, slightly behind the centre of the body, as in VerSe.
    patient_from_vertebra: label -> (4, 4) float64 rigid.
    """

    hu: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    centroids: dict
    patient_from_vertebra: dict


@dataclasses.dataclass(frozen=True)
class _Level:
    """Mean size of one level in mm and degrees; `disc`, `facet_*` describe the joint with the level below."""

    width: float
    depth: float
    height: float
    wedge_deg: float
    canal_width: float
    canal_depth: float
    pedicle_width: float
    pedicle_height: float
    transverse: tuple
    spinous: tuple
    disc: float
    disc_deg: float
    facet_x: float
    facet_deg: float


# transverse: tip (x, behind the body, z). spinous: tip (behind the body, z), half height at root and tip.
# The row of T8 serves the vertebra that the upper border of the scan cuts. disc_deg: lumbar shares of a lordosis of 47
# degrees, rescaled to that of the patient.
_LEVELS = {
    15: _Level(29, 27, 20.5, -3, 17, 15.5, 5.5, 12.5, (30, 26, 8), (37, -31, 7.0, 4.0), 4.5, 0.0, 11.5, 78),
    16: _Level(30, 28, 21, -3, 17, 15.5, 6.0, 13.0, (29, 25, 8), (38, -28, 7.5, 4.5), 5.0, 0.0, 11.5, 77),
    17: _Level(32, 29, 22, -3, 17.5, 15.5, 6.5, 14.0, (28, 24, 8), (37, -23, 8.0, 5.0), 5.5, 0.0, 11.5, 75),
    18: _Level(35, 30, 23, -3, 18.5, 16, 7.5, 15.5, (25.5, 22, 7), (37, -18, 8.5, 6.0), 6.0, 0.0, 12.0, 70),
    19: _Level(39, 31, 25, -3, 21, 16.5, 8.0, 15.5, (23, 19, 5), (38, -14, 9.0, 7.5), 7.0, 1.0, 11.5, 22),
    20: _Level(42, 32, 26.5, -2, 22, 16.5, 8.0, 15.0, (35, 17, 5), (45, -12, 8.5, 9.0), 8.0, 4.0, 12.5, 26),
    21: _Level(44, 33, 27, 0, 22.5, 16, 8.5, 15.0, (40, 17, 4), (47, -12, 9.0, 10.0), 9.0, 5.5, 13.5, 31),
    22: _Level(46, 34, 27.5, 1.5, 23, 16, 10.0, 14.5, (46, 17, 3.5), (48, -12, 9.0, 10.0), 10.0, 7.0, 15.5, 38),
    23: _Level(48, 35, 27.5, 3, 24, 16.5, 12.0, 14.5, (43, 16, 4), (46, -11, 8.5, 9.0), 11.0, 8.5, 18.0, 45),
    24: _Level(50, 35, 27, 8, 26, 17, 15.0, 14.0, (44, 14, 6), (40, -9, 7.5, 7.5), 10.0, 11.0, 21.5, 52),
}
_SIZES = (
    "width",
    "depth",
    "height",
    "canal_width",
    "canal_depth",
    "pedicle_width",
    "pedicle_height",
    "disc",
    "facet_x",
)


def _rotation(axis, degrees):
    """(4, 4) rotation about coordinate axis 0, 1 or 2."""
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    out = np.eye(4)
    out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def _shift(x, y, z):
    out = np.eye(4)
    out[:3, 3] = x, y, z
    return out


def _point(a_from_b, p):
    return a_from_b[:3, :3] @ np.asarray(p, np.float64) + a_from_b[:3, 3]


def _union(a, b, k):
    """Smooth minimum: the seam is filled over a width of k mm."""
    h = np.maximum(k - np.abs(a - b), 0.0)
    return np.minimum(a, b) - h * h / (4.0 * k)


def _cut(a, b, k):
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


class _Solid:
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
            self.f[local] = _cut(self.f[local], -d, k) if carve else _union(self.f[local], d, k)

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
        f = _cut(_cut(top, bottom, 1.0), side, 2.2)
        self.f[local] = np.minimum(self.f[local], f)


def _sizes(rng, config):
    """Level table of one patient, patient scale."""
    scale = 1 + config.size_variation * rng.uniform(-1, 1)
    aspect = {"width": rng.uniform(0.97, 1.03), "height": rng.uniform(0.97, 1.03), "depth": rng.uniform(0.97, 1.03)}
    table = {}
    for label in range(config.levels[0] - 1, _L5 + 1):
        mean = _LEVELS[label]
        own = 1 + config.level_variation * rng.uniform(-1, 1)
        size = {name: getattr(mean, name) * scale * own * aspect.get(name, 1.0) for name in _SIZES}
        reach = scale * own * rng.uniform(0.94, 1.06)
        spinous = scale * own * rng.uniform(0.94, 1.06)
        table[label] = dataclasses.replace(
            mean,
            transverse=tuple(reach * v for v in mean.transverse),
            spinous=tuple(spinous * v for v in mean.spinous),
            **size,
        )
    return table, scale


def _pose(rng, table):
    """Chain from the sacrum upwards: scan_from_sacrum, scan_from_disc and scan_from_vertebra by (upper) label."""
    lordosis = rng.uniform(30, 55)
    kyphosis = rng.uniform(0.6, 1.5)
    slope = 0.78 * lordosis + rng.uniform(-4, 4)
    bend, phase, turn = rng.uniform(-1.6, 1.6), rng.uniform(0, 2 * np.pi), rng.uniform(-1.2, 1.2)
    body_deg = sum(table[label].wedge_deg for label in range(_L1, _L5 + 1))
    disc_deg = sum(table[label].disc_deg for label in range(_L1, _L5 + 1))
    per_disc = (lordosis - body_deg) / disc_deg

    scan_from_sacrum = _rotation(1, rng.uniform(-1.5, 1.5)) @ _rotation(0, -slope)
    scan_from_disc, scan_from_vertebra = {}, {}
    scan_from_top = scan_from_sacrum
    for label in sorted(table, reverse=True):
        v = table[label]
        wave = np.sin(phase + 0.75 * (_L5 - label))
        flex = v.disc_deg * per_disc + rng.uniform(-0.6, 0.6)
        if label <= _T12:
            # The bodies are wedged for the mean kyphosis; the discs make up the patient's own.
            flex += (kyphosis - 1) * v.wedge_deg
        half = _rotation(0, flex / 2) @ _rotation(1, bend * wave / 2) @ _rotation(2, turn * wave / 2)
        scan_from_disc[label] = scan_from_top @ _shift(0, 0, v.disc / 2) @ half
        body_half = _shift(0, 0, v.height / 2)
        scan_from_vertebra[label] = (
            scan_from_disc[label] @ half @ _shift(0, 0, v.disc / 2) @ _rotation(0, v.wedge_deg / 2) @ body_half
        )
        scan_from_top = scan_from_vertebra[label] @ body_half @ _rotation(0, v.wedge_deg / 2)
    return scan_from_sacrum, scan_from_disc, scan_from_vertebra


def _facet(table, upper, side, above):
    """Articular plate of the joint below vertebra `upper` in its disc frame: (top, bottom, across, half_width, radius).

    above: of the upper partner (inferior process), else of the lower one (superior process).
    """
    v = table[upper]
    thoracic = upper < _T12
    angle = np.radians(v.facet_deg)
    # From the upper partner's process towards the lower one's: outwards in the lumbar spine, forwards in the thoracic.
    normal = np.array([side * np.cos(angle), np.sin(angle), 0.0])
    across = np.array([side * -np.sin(angle), np.cos(angle), 0.0])
    radius = 3.1 if thoracic else 3.5 + 0.02 * (v.facet_deg - 20)
    half_width = 6.0 if thoracic else 7.2 + 0.03 * (v.facet_deg - 20)
    joint = np.array([side * v.facet_x, -v.depth / 2 - v.canal_depth * (0.86 if thoracic else 0.84), 0.0])
    centre = joint + normal * (-radius if above else radius) * 0.95
    high, low = (10.0, -8.0) if above else (6.0, -9.0)
    tilt = np.array([0.0, 0.12 if thoracic else 0.08, 1.0])
    return centre + tilt * high, centre + tilt * low, across, half_width, radius


def _vertebra(rng, grid, label, table, scan_from_disc, scan_from_vertebra, config):
    """_Solid of one vertebra, facets still overlapping those of its neighbours."""
    v = table[label]
    pose = scan_from_vertebra[label]
    lumbar = label >= _L1
    low = pose[:3, 3] + np.array([-60.0, -90.0, -62.0])
    solid = _Solid(grid, low, pose[:3, 3] + np.array([60.0, 40.0, 50.0]))
    solid.body(pose, v.width, v.depth, v.height, v.wedge_deg, np.clip((21 - label) / 5, 0, 1))

    def vary():
        return 1 + config.asymmetry * rng.uniform(-1, 1)

    def place(p):
        return _point(pose, p)

    def turn(d):
        return pose[:3, :3] @ np.asarray(d, np.float64)

    def process(p, upper):
        return _point(scan_from_disc[upper], p)

    wall = -v.depth / 2 + 1.6
    canal_y = wall - v.canal_depth / 2
    back_y = wall - v.canal_depth
    up_z, right_x = turn([0, 0, 1]), turn([1, 0, 0])
    root = [0, back_y - (3.5 if lumbar else 2.5), -(0.2 if lumbar else 0.28) * v.height]
    for side in (1, -1):
        # Pedicle: from the upper part of the back of the body.
        pedicle_x = side * (v.canal_width / 2 + v.pedicle_width / 2 - 0.4) * (1 + (vary() - 1) / 3)
        pedicle_z = (0.16 if lumbar else 0.2) * v.height
        width = v.pedicle_width / 2 * vary()
        start = place([pedicle_x * 0.97, wall + 3.0, pedicle_z])
        pillar = place([pedicle_x * (1.0 if lumbar else 0.95), wall - 0.62 * v.canal_depth, pedicle_z])
        solid.plate(start, pillar, up_z, (v.pedicle_height / 2,) * 2, (width, width), 3.5)

        # Articular processes and the pars between them.
        if label > min(table):
            top, bottom, across, half, radius = _facet(table, label - 1, side, above=False)
            top, bottom = process(top, label - 1), process(bottom, label - 1)
            across = scan_from_disc[label - 1][:3, :3] @ across
            half *= vary()
            solid.plate(top, bottom, across, (half * 0.85, half), (radius * 0.9, radius * 1.1), 2.5)
            solid.plate(bottom, pillar, right_x, (6.0, 6.0), (4.6, 4.6), 4.0)
            if lumbar or label == _T12:
                # Mammillary process: the knob on the back of the superior process.
                knob = 0.45 * top + 0.55 * bottom + turn([side * 1.5, -half * 0.75, 0])
                solid.plate(knob, knob + turn([0, -0.5, 1.5]), right_x, (2.8, 2.8), (2.8, 2.8), 3.0)
        top, bottom, across, half, radius = _facet(table, label, side, above=True)
        top, bottom = process(top, label), process(bottom, label)
        across = scan_from_disc[label][:3, :3] @ across
        half *= vary()
        solid.plate(top, bottom, across, (half * 0.95, half * 0.8), (radius, radius * 0.95), 2.5)
        solid.plate(pillar, top, right_x, (6.5, 6.0), (4.4, 4.2), 4.0)

        # Lamina: shingled, its lower border further back.
        outer = 0.45 * pillar + 0.55 * top + turn([-side * 1.0, 1.0 if lumbar else -1.0, -1.0])
        shingle = turn([0, 0.28, 1])
        height = (0.33 if lumbar else 0.48) * v.height
        solid.plate(outer, place(root), shingle, (height, height * 0.95), (3.3, 3.1), 4.0)

        # Transverse process.
        x, behind, z = (c * vary() for c in v.transverse)
        tip = place([side * x, -v.depth / 2 - behind, z])
        if lumbar:
            base = pillar + turn([side * 1.0, -1.0, -1.0])
            bow = 0.55 * base + 0.45 * tip + turn([0, 1.2, -0.8])
            broad = 8.0 if label == _L5 else 6.0
            thick = 5.8 if label == _L5 else 3.5
            solid.plate(base, bow, up_z, (1.1 * broad, 0.8 * broad), (thick + 1.2, 0.8 * thick), 6.0)
            solid.plate(bow, tip, up_z, (0.8 * broad, 4.4), (0.8 * thick, 2.4), 2.5)
        else:
            base = pillar + turn([0, -2.0, 0])
            club = 3.6 if label == _T12 else 5.4
            waist = 0.45 * base + 0.55 * tip
            solid.plate(base, waist, up_z, (7.0, 5.2), (5.0, 3.9), 4.0)
            solid.plate(waist, tip, up_z, (5.2, club + 0.8), (3.9, club), 4.0)

    # Spinous process: a hatchet in the lumbar spine, a slanting spike in the thoracic.
    behind, tip_z, root_half, tip_half = v.spinous
    tip = np.array([rng.uniform(-1.2, 1.2), -v.depth / 2 - behind, tip_z])
    thick = 3.4 if lumbar else 2.9
    middle = 0.5 * (np.array(root) + tip) + [0, 0, 1.0 if lumbar else -0.5]
    tip[1] += tip_half if lumbar else thick
    middle_half, middle_thick = 0.5 * (root_half + tip_half), 0.85 * thick
    solid.plate(place(root), place(middle), up_z, (root_half, middle_half), (thick, middle_thick), 3.5)
    solid.plate(place(middle), place(tip), up_z, (middle_half, tip_half), (middle_thick, thick), 2.5)

    # Canal: rounded in the thoracic spine, a triangle with rounded corners in the lumbar.
    local, (x, y, _) = solid.in_frame(
        pose, [-v.canal_width, canal_y - v.canal_depth, -60], [v.canal_width, wall + 6, 50]
    )
    y = (y - canal_y) / (v.canal_depth / 2)
    x = x / (v.canal_width / 2 * (1 + (0.5 if lumbar else 0.2) * np.clip(y, -1, 0.4)))
    canal = (np.sqrt(np.sqrt(x**4 + y**4 + 1.4 * x * x * y * y)) - 1) * (v.canal_depth / 2)
    solid.f[local] = _cut(solid.f[local], -canal, 1.0)
    return solid


def _sacrum(grid, table, scale, scan_from_disc, scan_from_sacrum):
    """_Solid of the sacrum: five fused bodies on a curve, alae, foramina, canal, crest."""
    solid = _Solid(grid, [-75 * scale, -110 * scale, -130 * scale], [75 * scale, 50 * scale, 40 * scale])
    last = table[_L5]
    width, depth = last.width * 1.02, last.depth * 0.97
    right = scan_from_sacrum[:3, 0]

    def place(p):
        return _point(scan_from_sacrum, np.asarray(p, np.float64))

    # Centre line: the first body hangs from the endplate, the others curve forwards.
    points, behind = [np.zeros(3)], []
    for k, length in enumerate((29.0, 24.0, 21.0, 18.0, 15.0)):
        angle = np.radians(-9 + 14 * k)
        behind.append(np.array([0, -np.cos(angle), -np.sin(angle)]))
        points.append(points[-1] + scale * length * np.array([0, np.sin(angle), -np.cos(angle)]))
    behind.append(behind[-1])
    half_width = scale * np.array([24, 18, 16, 14, 12, 8.0])
    half_depth = scale * np.array([16.0, 11.5, 8.5, 6.5, 5, 4.0])
    flank = scale * np.array([50, 45, 38, 30, 23, 12.0])
    flank_depth = scale * np.array([11, 10.5, 9, 7, 5, 3.5])
    first = scan_from_sacrum @ _rotation(0, 3) @ _shift(0, -2, -13.4 * scale)
    solid.body(first, width, depth, 26 * scale, 3, 0.0)
    for k in range(5):
        a, b = (points[i] + behind[i] * 2.0 * scale for i in (k, k + 1))
        if k == 0:
            a = 0.4 * a + 0.6 * b
        solid.plate(place(a), place(b), right, half_width[[k, k + 1]], half_depth[[k, k + 1]], 5.0)
    for side in (1, -1):
        start = np.array([side * 16 * scale, -7 * scale, -12 * scale])
        wing = np.array([side * flank[0] * 0.86, -15 * scale, -19 * scale])
        solid.plate(
            place(start), place(wing), scan_from_sacrum[:3, 2], (11 * scale, 9 * scale), (8 * scale, 8.5 * scale), 6.0
        )
        for k in range(5):
            a, b = (points[i] + behind[i] * 8.0 * scale for i in (k, k + 1))
            if k == 0:
                a = wing + [0, -3 * scale, -2 * scale]
            else:
                a = a + [side * (flank[k] - flank_depth[k]), 0, 0]
            b = b + [side * (flank[k + 1] - flank_depth[k + 1]), 0, 0]
            solid.plate(place(a), place(b), right, flank_depth[[k, k + 1]] * 1.3, flank_depth[[k, k + 1]], 6.0)
        # Bars between the foramina join the lateral mass to the bodies.
        for k in range(1, 5):
            mid = 0.5 * (points[k] + points[k + 1]) + behind[k] * 6 * scale
            out = mid + [side * (0.5 * (flank[k] + flank[k + 1]) - 6 * scale), 0, 0]
            solid.plate(
                place(mid),
                place(out),
                place(points[k + 1]) - place(points[k]),
                (8.5 * scale, 7.5 * scale),
                (0.8 * flank_depth[k],) * 2,
                4.0,
            )
        top, bottom, across, half, radius = _facet(table, _L5, side, above=False)
        pose = scan_from_disc[_L5]
        top, bottom = _point(pose, top), _point(pose, bottom)
        solid.plate(top, bottom, pose[:3, :3] @ across, (half * 0.85, half), (radius * 0.9, radius * 1.1), 2.5)
        foot = place([side * 25 * scale, -24 * scale, -20 * scale])
        solid.plate(bottom, foot, right, (7 * scale, 9 * scale), (5 * scale, 6 * scale), 5.0)
    # Roof of the canal and median crest.
    for k in range(4):
        a, b = (points[i] + behind[i] * (half_depth[i] + 15 * scale - 2.2 * scale * i) for i in (k, k + 1))
        if k == 0:
            a = 0.4 * a + 0.6 * b
        solid.plate(place(a), place(b), right, (scale * (24 - 3 * k), scale * (21 - 3 * k)), (3.0, 2.8), 4.0)
        solid.plate(place(a), place(b), scan_from_sacrum[:3, :3] @ behind[k], (8.0 - k, 6.5 - k), (2.6, 2.4), 4.0)
    for k in range(4):
        a, b = (points[i] + behind[i] * (half_depth[i] + 7 * scale - 1.2 * scale * i) for i in (k, k + 1))
        radius = scale * (6.5 - 1.2 * np.array([k, k + 1]))
        solid.plate(place(a), place(b), right, scale * (12.5 - 2.2 * np.array([k, k + 1])), radius, 1.0, carve=True)
    for k in range(1, 5):
        for side in (1, -1):
            hole = points[k] + [side * scale * (20.5 - 1.7 * k), 0, 0]
            radius = scale * (5.6 - 0.6 * k)
            a, b = hole - behind[k] * 16 * scale, hole + behind[k] * 30 * scale
            solid.plate(place(a), place(b), right, (radius * 1.35,) * 2, (radius, radius), 2.0, carve=True)
    # The alae and the canal's roof must not grow over the endplate.
    local, (_, y, z) = solid.in_frame(scan_from_sacrum, [-80, -22 * scale, -5], [80, 40, 40])
    solid.f[local] = _cut(solid.f[local], np.minimum(z - 0.4, y + 24 * scale), 1.5)
    return solid


def _curve(points, count, smooth):
    """Resample a polyline (N, 3) to `count` points at equal arc length, corners rounded."""
    points = np.asarray(points, np.float64)
    arc = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.linspace(0, arc[-1], count)
    fine = np.stack([np.interp(at, arc, points[:, i]) for i in range(3)], 1)
    return scipy.ndimage.gaussian_filter1d(fine, smooth, axis=0, mode="nearest")


def _rib(grid, label, table, scan_from_vertebra, trunk):
    """_Solids of both ribs of a thoracic vertebra: head, neck, tubercle, shaft along the inside of the trunk wall."""
    v, pose = table[label], scan_from_vertebra[label]
    last = {15: 125, 16: 112, 17: 104, 18: 84, 19: 52}[label]
    drop = {15: 0.62, 16: 0.62, 17: 0.62, 18: 0.66, 19: 0.72}[label]
    out = []
    for side in (1, -1):
        head = _point(pose, [side * (v.width / 2 + 1.0), -v.depth / 2 + 5.0, 0.28 * v.height])
        tip_x, behind, tip_z = v.transverse
        tubercle = _point(pose, [side * (tip_x + 1.0), -v.depth / 2 - behind + 9.5, tip_z + 1.0])
        neck = 0.5 * (head + tubercle) + [0, -1.5, 0]
        path = [head, neck, tubercle]
        half_x, half_y, y0 = trunk.cage(tubercle[2])
        for degrees in np.arange(30, last + 1, 6):
            angle = np.radians(degrees)
            x = side * half_x * np.sin(angle)
            y = y0 - half_y * np.cos(angle)
            if abs(x) < abs(tubercle[0]) + 10:
                continue
            run = np.hypot(x - path[-1][0], y - path[-1][1])
            path.append(np.array([x, y, path[-1][2] - drop * run]))
        line = _curve(path, 34, 1.0)
        solid = _Solid(grid, line.min(0) - 14, line.max(0) + 14)
        for k in range(len(line) - 1):
            thin = 3.3 if k > 4 else 2.9
            tall = 6.3 if k > 5 else 4.2
            solid.plate(line[k], line[k + 1], [0.0, 0.0, 1.0], (tall, tall), (thin, thin), 0.5)
        out.append(solid)
    return out


def _ilium(grid, side, scale):
    """_Solid of one iliac wing: a bowl ruled between the arcuate line and the crest."""
    crest = [
        (40, -65, -42),
        (51, -62, -14),
        (74, -46, 14),
        (102, -20, 30),
        (123, 14, 22),
        (127, 45, -4),
        (117, 63, -40),
    ]
    waist = [
        (42, -60, -54),
        (50, -42, -32),
        (60, -20, -22),
        (88, 1, -16),
        (112, 18, -24),
        (117, 38, -40),
        (112, 55, -62),
    ]
    brim = [(44, -54, -66), (53, -36, -58), (59, -16, -52), (70, 0, -58), (86, 16, -75), (99, 33, -88), (108, 46, -86)]
    mirror = np.array([side * scale, scale, scale])
    crest, waist, brim = (_curve(np.array(line) * mirror, 26, 1.4) for line in (crest, waist, brim))
    # Rows of a surface that is quadratic from brim through waist to crest.
    at = np.linspace(0, 1, 5)[:, None, None]
    rows = (1 - at) * (1 - 2 * at) * brim + 4 * at * (1 - at) * waist + at * (2 * at - 1) * crest
    thickness = (6.0, 3.4, 2.6, 2.6, 3.6)
    solid = _Solid(grid, rows.min((0, 1)) - 14, rows.max((0, 1)) + 14)
    middle, along = 0.5 * (rows[:, 1:] + rows[:, :-1]), np.diff(rows, axis=1)
    for k in range(middle.shape[1]):
        for j in range(len(rows) - 1):
            strip = 0.5 * (along[j, k] + along[j + 1, k])
            half = 0.5 * np.linalg.norm(strip) + 2.5
            solid.plate(middle[j, k], middle[j + 1, k], strip, (half, half), thickness[j : j + 2], 0.3)
        for edge, tall, thick in ((crest, 5.0, 4.6), (brim, 7.0, 6.2)):
            solid.plate(edge[k], edge[k + 1], [0.0, 0.0, 1.0], (tall, tall), (thick, thick), 3.0)
    return solid


def _overlap(a, b):
    """Local slices of two solids on the voxels that both windows cover."""
    low = [max(p, q) for p, q in zip(a.start, b.start)]
    high = [max(min(p.stop, q.stop), lo) for p, q, lo in zip(a.slices, b.slices, low)]
    return tuple(tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, solid.start)) for solid in (a, b))


def _part(a, b, gap):
    """Separate two bones along the surface of equal distance, with a joint space of gap mm."""
    in_a, in_b = _overlap(a, b)
    difference = (a.f[in_a] - b.f[in_b]) / 2
    a.f[in_a] = np.maximum(a.f[in_a], difference + gap / 2)
    b.f[in_b] = np.maximum(b.f[in_b], gap / 2 - difference)


def _yield(a, b, gap):
    """Cut bone a back until it keeps gap mm from bone b."""
    in_a, in_b = _overlap(a, b)
    a.f[in_a] = np.maximum(a.f[in_a], gap - b.f[in_b])


class _Trunk:
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


class _Painter:
    """The HU volume (float32) and brushes that blend tissues into it; windows and shapes in scan mm."""

    def __init__(self, grid):
        self.grid = grid
        self.hu = np.full([len(g) for g in grid], -1000.0, np.float32)

    def _blend(self, where, f, value, weight=None):
        cover = np.clip(0.5 - f / _BLUR_MM, 0, 1)
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
        cover = np.clip(0.5 - (solid.f + shell) / _BLUR_MM, 0, 1)
        self.hu[solid.slices] += (cancellous - self.hu[solid.slices]) * cover


def _soft_tissue(rng, painter, trunk, table, scale, scan_from_vertebra, spine):
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
    t9 = level_z[_L5] + 295 * scale

    # Lungs: above two domes, beside the mediastinum, down to the recess behind the diaphragm.
    dome = np.full((len(x), len(y)), np.inf, np.float32)
    for side, top in ((1, t9 + 2), (-1, t9 - 12)):
        ahead = y - centre_y.mean() - 5
        u = np.square((x - side * 66) / 72)[:, None] + np.square(ahead / np.where(ahead > 0, 110, 68))[None, :]
        lung = np.where((side * x > 0)[:, None], top - 85 * u, np.inf)
        dome = np.minimum(dome, lung)
    lowest = np.searchsorted(z, level_z[_L1] + 10)
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
        span = (z > level_z[_L5] - 20) & (z < level_z[21] + 10)
        at = np.full_like(z, side * rng.uniform(84, 92) * scale)
        painter.column(at, centre_y - 4, ripple * span, ripple * span, 22, cavity)
        for _ in range(4):
            centre = (at[0], front_y - 6, rng.uniform(level_z[_L5], level_z[_L1]))
            painter.ellipsoid(centre, rng.uniform(9, 15, 3), -850, cavity)
    for _ in range(48):
        centre = (rng.uniform(-72, 72), front_y + rng.uniform(8, 62), rng.uniform(-70, level_z[_L1] - 10))
        gas = -850 if rng.uniform() < 0.25 else None
        painter.ellipsoid(centre, rng.uniform(11, 22, 3), rng.uniform(15, 45), cavity, gas=gas)

    # Muscles beside the spine.
    grow = np.clip((level_z[_L1] + 12 - z) / (level_z[_L1] - level_z[_L5]), 0, 1.3)
    half_width = np.interp(
        z,
        [level_z[label] for label in sorted(table, reverse=True)],
        [table[label].width / 2 for label in sorted(table, reverse=True)],
    )
    swell = 1 - 0.25 * np.clip((z - level_z[_L1]) / 80, 0, 1)
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


def _check(config):
    levels = tuple(config.levels)
    if not levels or levels != tuple(range(levels[0], _L5 + 1)) or levels[0] < _FIRST or levels[0] > _L1:
        raise ValueError(f"levels must run without gaps from {_FIRST}..{_L1} to {_L5}, got {levels}")
    if len(config.spacing_mm) != 3 or min(config.spacing_mm) <= 0:
        raise ValueError(f"spacing_mm must be three positive numbers, got {config.spacing_mm}")
    if config.extent_mm[0] < 200 or config.extent_mm[1] < 160:
        raise ValueError(f"extent_mm must be at least (200, 160), got {config.extent_mm}")


def make_phantom(seed, config=PhantomConfig()):
    """Phantom of one patient, a pure function of (seed, config).

    The vertebra above the first level and the lower end of the sacrum may be cut by the field of view, as in a real
    scan; the vertebra above is not labelled. Raises ValueError for a config that makes no spine.
    """
    _check(config)
    rng = np.random.default_rng(seed)
    table, scale = _sizes(rng, config)
    scan_from_sacrum, scan_from_disc, scan_from_vertebra = _pose(rng, table)
    labels = sorted(table, reverse=True)
    first = config.levels[0]

    # Line through the body centres, from the sacrum upwards, continued straight at both ends.
    spine = np.array(
        [_point(scan_from_sacrum, (0, 0, -60 * scale)), _point(scan_from_sacrum, (0, 0, -15 * scale))]
        + [scan_from_vertebra[label][:3, 3] for label in labels]
    )
    tips = np.array(
        [
            _point(scan_from_vertebra[label], (0, -v.depth / 2 - v.spinous[0], v.spinous[1]))
            for label, v in table.items()
        ]
    )
    top = _point(scan_from_vertebra[first], (0, 0, table[first].height / 2))[2] + 20 * scale
    spacing = np.asarray(config.spacing_mm, np.float64)
    heights = np.arange(-100 * scale, top, spacing[2])
    trunk = _Trunk(rng, scale, config, spine, tips, heights)
    grid = []
    back, front = (trunk.centre_y - trunk.half_y).min(), (trunk.centre_y + trunk.half_y).max()
    for axis, middle in ((0, spine[:, 0].mean()), (1, 0.5 * (back + front))):
        count = int(round(config.extent_mm[axis] / spacing[axis]))
        grid.append(middle + (np.arange(count) - (count - 1) / 2) * spacing[axis])
    grid.append(heights)
    scan_origin = np.array([g[0] for g in grid])
    grid = [g.astype(np.float32) for g in grid]

    bones = {label: _vertebra(rng, grid, label, table, scan_from_disc, scan_from_vertebra, config) for label in labels}
    bones[SACRUM] = _sacrum(grid, table, scale, scan_from_disc, scan_from_sacrum)
    # Texture of the marrow and, much weaker, of the surfaces.
    coarse = scipy.ndimage.gaussian_filter(rng.standard_normal((72, 64, 48)).astype(np.float32), 0.8, mode="wrap")
    coarse /= coarse.std()
    texture = {}
    for label, solid in bones.items():
        corner = rng.integers(0, 12, 3)
        steps = [s * d / 5.0 for s, d in zip(solid.f.shape, spacing)]
        cut = coarse[tuple(slice(c, c + int(np.ceil(n)) + 2) for c, n in zip(corner, steps))]
        zoom = [n / m for n, m in zip(solid.f.shape, cut.shape)]
        texture[label] = scipy.ndimage.zoom(cut, zoom, order=1)
        solid.f += 0.22 * texture[label]
    for upper, lower in zip(labels[1:] + [_L5], labels[:-1] + [SACRUM]):
        _part(bones[upper], bones[lower], _FACET_GAP_MM)

    painter = _Painter(grid)
    _soft_tissue(rng, painter, trunk, table, scale, scan_from_vertebra, spine)
    for label in labels:
        v = table[label]
        disc = _Solid(grid, scan_from_disc[label][:3, 3] - 45, scan_from_disc[label][:3, 3] + 45)
        disc.body(scan_from_disc[label], 0.97 * v.width, 0.96 * v.depth, v.disc + 7, 0, 0.0)
        painter.bone(disc, 4.0, 95.0, 75.0)

    cortical = rng.uniform(760, 1080)
    density = rng.uniform(120, 250)
    loose = [
        solid for label in labels if label <= _T12 for solid in _rib(grid, label, table, scan_from_vertebra, trunk)
    ]
    loose += [_ilium(grid, side, scale) for side in (1, -1)]
    for solid in loose:
        for bone in bones.values():
            _yield(solid, bone, 1.5)
        painter.bone(solid, 1.2, 0.95 * cortical, density + 60)

    mask = np.zeros(painter.hu.shape, np.uint8)
    for label, solid in bones.items():
        marrow = density * rng.uniform(0.94, 1.06) + 22 * texture[label]
        shell = 1.0
        if label != SACRUM:
            v = table[label]
            everywhere = np.full(3, 200.0)
            _, (_, y, _) = solid.in_frame(scan_from_vertebra[label], -everywhere, everywhere)
            arch = np.clip((-v.depth / 2 - y + 2) / 5, 0, 1)
            marrow = marrow + 130 * arch
            shell = 0.95 + 0.4 * arch
        painter.bone(solid, shell, cortical, marrow)
        if label == SACRUM or label in config.levels:
            mask[solid.slices][solid.f < 0] = label

    noise = rng.standard_normal(painter.hu.shape, dtype=np.float32)
    painter.hu += np.float32(config.noise_hu) * noise
    np.clip(np.rint(painter.hu, out=painter.hu), -1024, 3071, out=painter.hu)

    origin = rng.uniform(40, 260, 3) * rng.choice([-1.0, 1.0], 3)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    patient_from_scan = _shift(*(origin - scan_origin))
    poses = {label: patient_from_scan @ scan_from_vertebra[label] for label in config.levels}
    centroids = {label: _point(pose, (0, -0.12 * table[label].depth, 0)) for label, pose in poses.items()}
    return Phantom(painter.hu.astype(np.int16), mask, affine, centroids, poses)


def write_verse(phantom, folder, subject, axcodes="RAS"):
    """Write the VerSe files of a phantom, arrays stored along `axcodes`; returns {'ct', 'mask', 'centroids'} paths.

    The folder is made if missing. Raises ValueError if axcodes does not name each anatomical axis once.
    """
    import nibabel as nib

    axcodes = tuple(axcodes.upper())
    if len(axcodes) != 3 or sorted("RLAPSI".find(c) // 2 for c in axcodes) != [0, 1, 2]:
        raise ValueError(f"axcodes must name each anatomical axis once, as RAS or PIR do, got {axcodes}")
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(("R", "A", "S")), nib.orientations.axcodes2ornt(axcodes)
    )
    ras_from_stored = phantom.affine @ nib.orientations.inv_ornt_aff(turn, phantom.hu.shape)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "ct": folder / f"sub-{subject}_ct.nii.gz",
        "mask": folder / f"sub-{subject}_seg-vert_msk.nii.gz",
        "centroids": folder / f"sub-{subject}_seg-subreg_ctd.json",
    }
    for name, array in (("ct", phantom.hu), ("mask", phantom.mask)):
        files.write_nifti(paths[name], nib.orientations.apply_orientation(array, turn), ras_from_stored)
    write_centroids(paths["centroids"], phantom.centroids, ras_from_stored, axcodes)
    return paths


def write_centroids(path, points, ras_from_stored, axcodes):
    """Writes {label: (3,) RAS+ mm} as a VerSe centroid JSON, atomically: voxels of a label map, to a thousandth.

    Args:
      ras_from_stored: (4, 4) from that map's voxels, as they are stored along the three axis codes `axcodes`, to mm.
    Raises:
      ValueError: a point that is not finite.
    """
    stored_from_ras = np.linalg.inv(ras_from_stored)
    entries = [{"direction": list(axcodes)}]
    for label in sorted(points):
        voxel = _point(stored_from_ras, points[label])
        entries.append({"label": int(label), **{axis: round(float(c), 3) for axis, c in zip("XYZ", voxel)}})
    files.write_json(path, entries)


def make_and_write(seed, config, folder, subject, axcodes):
    """`make_phantom`, then `write_verse`: one job for a worker process, which then imports neither jax nor a network.

    Returns and raises what they do.
    """
    return write_verse(make_phantom(seed, config), folder, subject, axcodes)
