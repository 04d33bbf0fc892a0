"""Vertebrae, sacrum, ribs and ilia as solids.

The lengths (mm) and fractions that place the processes were drawn by hand on adult shapes. They shape the phantoms only;
their tests check volumes, an open canal and closed surfaces.
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.phantom import anatomy
from data_pipelines.phantom import solids
from data_pipelines.phantom import transforms
from data_pipelines.phantom import trunk as trunks


def _facet(table, upper, side, above):
    """One articular plate of the facet joint below a vertebra.

    Args:
      table: sizes by VerSe number.
      upper: VerSe number of the vertebra above the joint.
      side: 1 right, -1 left.
      above: the plate of the upper vertebra (its inferior process), else that of the lower one (superior process).

    Returns:
      top, bottom (3,), across (3,), half_width, radius: arguments of `Solid.plate`, mm in the frame of the disc.
    """
    v = table[upper]
    thoracic = upper < anatomy.T12
    angle = np.radians(v.facet_deg)
    # The normal points from the upper vertebra's plate to the lower one's: laterally in the lumbar spine, anteriorly in the
    # thoracic.
    normal = np.array([side * np.cos(angle), np.sin(angle), 0.0])
    across = np.array([side * -np.sin(angle), np.cos(angle), 0.0])
    radius = 3.1 if thoracic else 3.5 + 0.02 * (v.facet_deg - 20)
    half_width = 6.0 if thoracic else 7.2 + 0.03 * (v.facet_deg - 20)
    joint = np.array([side * v.facet_x, -v.depth / 2 - v.canal_depth * (0.86 if thoracic else 0.84), 0.0])
    centre = joint + normal * (-radius if above else radius) * 0.95
    high, low = (10.0, -8.0) if above else (6.0, -9.0)
    tilt = np.array([0.0, 0.12 if thoracic else 0.08, 1.0])
    return centre + tilt * high, centre + tilt * low, across, half_width, radius


def make_vertebra(
    rng: np.random.Generator,
    grid: Sequence[np.ndarray],
    label: int,
    table: dict[int, anatomy.LevelSize],
    scan_from_disc: dict[int, np.ndarray],
    scan_from_vertebra: dict[int, np.ndarray],
    asymmetry: float,
) -> solids.Solid:
    """The solid of one vertebra, whose facets still overlap those of its neighbours.

    Args:
      grid: coordinates of the scan's voxels, (X,), (Y,), (Z,).
      label: VerSe number.
      table: sizes by VerSe number.
      scan_from_disc, scan_from_vertebra: (4, 4) by VerSe number, as `anatomy.place_levels` returns them.
      asymmetry: largest relative deviation of the processes' lengths and positions, drawn for each side.
    """
    v = table[label]
    pose = scan_from_vertebra[label]
    lumbar = label >= anatomy.L1
    low = pose[:3, 3] + np.array([-60.0, -90.0, -62.0])
    solid = solids.Solid(grid, low, pose[:3, 3] + np.array([60.0, 40.0, 50.0]))
    solid.body(pose, v.width, v.depth, v.height, v.wedge_deg, np.clip((21 - label) / 5, 0, 1))

    def vary():
        return 1 + asymmetry * rng.uniform(-1, 1)

    def place(p):
        return transforms.apply_affine(pose, p)

    def turn(d):
        return pose[:3, :3] @ np.asarray(d, np.float64)

    def process(p, upper):
        return transforms.apply_affine(scan_from_disc[upper], p)

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
            if lumbar or label == anatomy.T12:
                # Mammillary process, on the back of the superior process.
                knob = 0.45 * top + 0.55 * bottom + turn([side * 1.5, -half * 0.75, 0])
                solid.plate(knob, knob + turn([0, -0.5, 1.5]), right_x, (2.8, 2.8), (2.8, 2.8), 3.0)
        top, bottom, across, half, radius = _facet(table, label, side, above=True)
        top, bottom = process(top, label), process(bottom, label)
        across = scan_from_disc[label][:3, :3] @ across
        half *= vary()
        solid.plate(top, bottom, across, (half * 0.95, half * 0.8), (radius, radius * 0.95), 2.5)
        solid.plate(pillar, top, right_x, (6.5, 6.0), (4.4, 4.2), 4.0)

        # Lamina, tilted so that its lower border lies further back.
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
            broad = 8.0 if label == anatomy.L5 else 6.0
            thick = 5.8 if label == anatomy.L5 else 3.5
            solid.plate(base, bow, up_z, (1.1 * broad, 0.8 * broad), (thick + 1.2, 0.8 * thick), 6.0)
            solid.plate(bow, tip, up_z, (0.8 * broad, 4.4), (0.8 * thick, 2.4), 2.5)
        else:
            base = pillar + turn([0, -2.0, 0])
            club = 3.6 if label == anatomy.T12 else 5.4
            waist = 0.45 * base + 0.55 * tip
            solid.plate(base, waist, up_z, (7.0, 5.2), (5.0, 3.9), 4.0)
            solid.plate(waist, tip, up_z, (5.2, club + 0.8), (3.9, club), 4.0)

    # Spinous process: a broad blade in the lumbar spine, slanting and thin in the thoracic.
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
    solid.f[local] = solids.cut(solid.f[local], -canal, 1.0)
    return solid


def make_sacrum(
    grid: Sequence[np.ndarray],
    table: dict[int, anatomy.LevelSize],
    scale: float,
    scan_from_disc: dict[int, np.ndarray],
    scan_from_sacrum: np.ndarray,
) -> solids.Solid:
    """The solid of the sacrum: five fused bodies on a curve, alae, foramina, canal and crest.

    Args:
      grid, table, scan_from_disc: as in `make_vertebra`.
      scale: of the patient, 1 for the mean.
      scan_from_sacrum: (4, 4), origin at the centre of the S1 endplate.
    """
    solid = solids.Solid(grid, [-75 * scale, -110 * scale, -130 * scale], [75 * scale, 50 * scale, 40 * scale])
    last = table[anatomy.L5]
    width, depth = last.width * 1.02, last.depth * 0.97
    right = scan_from_sacrum[:3, 0]

    def place(p):
        return transforms.apply_affine(scan_from_sacrum, np.asarray(p, np.float64))

    # Centre line from the S1 endplate downwards; each body is tilted 14 degrees further forwards than the one above.
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
    first = scan_from_sacrum @ transforms.rotation(0, 3) @ transforms.translation(0, -2, -13.4 * scale)
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
        top, bottom, across, half, radius = _facet(table, anatomy.L5, side, above=False)
        pose = scan_from_disc[anatomy.L5]
        top, bottom = transforms.apply_affine(pose, top), transforms.apply_affine(pose, bottom)
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
    solid.f[local] = solids.cut(solid.f[local], np.minimum(z - 0.4, y + 24 * scale), 1.5)
    return solid


def make_ribs(
    grid: Sequence[np.ndarray],
    label: int,
    table: dict[int, anatomy.LevelSize],
    scan_from_vertebra: dict[int, np.ndarray],
    trunk: trunks.Trunk,
) -> list[solids.Solid]:
    """The solids of both ribs of a thoracic vertebra: head, neck, tubercle, and a shaft along the inside of the trunk's wall.

    Arguments as in `make_vertebra`; trunk: the body contour that the shafts follow.
    """
    v, pose = table[label], scan_from_vertebra[label]
    # By level: the angle round the trunk at which the rib ends, degrees, and its descent per horizontal length.
    last = {15: 125, 16: 112, 17: 104, 18: 84, 19: 52}[label]
    drop = {15: 0.62, 16: 0.62, 17: 0.62, 18: 0.66, 19: 0.72}[label]
    out = []
    for side in (1, -1):
        head = transforms.apply_affine(pose, [side * (v.width / 2 + 1.0), -v.depth / 2 + 5.0, 0.28 * v.height])
        tip_x, behind, tip_z = v.transverse
        tubercle = transforms.apply_affine(pose, [side * (tip_x + 1.0), -v.depth / 2 - behind + 9.5, tip_z + 1.0])
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
        line = solids.smooth_curve(path, 34, 1.0)
        solid = solids.Solid(grid, line.min(0) - 14, line.max(0) + 14)
        for k in range(len(line) - 1):
            thin = 3.3 if k > 4 else 2.9
            tall = 6.3 if k > 5 else 4.2
            solid.plate(line[k], line[k + 1], [0.0, 0.0, 1.0], (tall, tall), (thin, thin), 0.5)
        out.append(solid)
    return out


def make_ilium(grid: Sequence[np.ndarray], side: int, scale: float) -> solids.Solid:
    """The solid of one iliac wing: a bowl between the arcuate line and the iliac crest.

    Args:
      grid: as in `make_vertebra`.
      side: 1 right, -1 left.
      scale: of the patient, 1 for the mean.
    """
    # Points of the right wing in scan mm.
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
    crest, waist, brim = (solids.smooth_curve(np.array(line) * mirror, 26, 1.4) for line in (crest, waist, brim))
    # Five rows of points on a surface that is quadratic from the brim through the waist to the crest.
    at = np.linspace(0, 1, 5)[:, None, None]
    rows = (1 - at) * (1 - 2 * at) * brim + 4 * at * (1 - at) * waist + at * (2 * at - 1) * crest
    thickness = (6.0, 3.4, 2.6, 2.6, 3.6)
    solid = solids.Solid(grid, rows.min((0, 1)) - 14, rows.max((0, 1)) + 14)
    middle, along = 0.5 * (rows[:, 1:] + rows[:, :-1]), np.diff(rows, axis=1)
    for k in range(middle.shape[1]):
        for j in range(len(rows) - 1):
            strip = 0.5 * (along[j, k] + along[j + 1, k])
            half = 0.5 * np.linalg.norm(strip) + 2.5
            solid.plate(middle[j, k], middle[j + 1, k], strip, (half, half), thickness[j : j + 2], 0.3)
        for edge, tall, thick in ((crest, 5.0, 4.6), (brim, 7.0, 6.2)):
            solid.plate(edge[k], edge[k + 1], [0.0, 0.0, 1.0], (tall, tall), (thick, thick), 3.0)
    return solid
