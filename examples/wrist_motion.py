"""Motions of radius and ulna between two frames of Autoscoper's wrist data, beside those of the metal beads (docs/real.md).

`python examples/wrist_motion.py DATA OUT` reads the beads from the X-rays in DATA and the poses from OUT/BONE_FRAME/results.json.
"""

import itertools
import pathlib
import sys

import numpy as np
import scipy
from PIL import Image

from data_pipelines.io import files
from radgs_jax.geometry import resample
from radgs_jax.geometry import triangulation

FRAMES = ("0099", "0158")
BEADS = {
    "ulnar": (
        [(779, 1319), (764, 1350), (805, 1340), (766, 1374), (797, 1372), (788, 1397)],
        [(896, 1381), (893, 1412), (878, 1401), (888, 1437), (880, 1434), (881, 1460)],
    ),
    "radial": (
        [(938, 1413), (947, 1417), (943, 1455), (950, 1455), (945, 1480), (952, 1481)],
        [(602, 1424), (622, 1432), (599, 1466), (617, 1471), (594, 1490), (620, 1498)],
    ),
}
"""Pixels (u, v) near the beads in FRAMES[0] of both cameras, read off the pictures; which belongs to which is found."""
REACH_PX = 7
"""How far from such a pixel a bead is looked for in the same frame."""
MOVED_PX = 22
"""How far a bead may have moved between the frames."""
SIGMA_PX = 2.5
"""Standard deviation of the blob that beads are found with; they are 6 pixels wide."""
APART_MM = 0.24
"""How far the rays of one bead may pass each other, mm: one and a half pixels."""


def blobs(path: pathlib.Path) -> np.ndarray:
    """How much an X-ray looks like a dark bead at each pixel."""
    with Image.open(path) as image:
        dark = -np.asarray(image, np.float64)
    return -(SIGMA_PX**2) * scipy.ndimage.gaussian_laplace(dark, SIGMA_PX)


def peaks(strength: np.ndarray, near: tuple[float, float], reach: int, count: int) -> list[np.ndarray]:
    """The strongest local maxima (u, v) within `reach` pixels, to a fraction of a pixel."""
    u, v = (int(round(n)) for n in near)
    part = strength[v - reach : v + reach + 1, u - reach : u + reach + 1]
    tops = np.argwhere((scipy.ndimage.maximum_filter(part, 5) == part) & (part > 0.3 * part.max()))
    found = []
    for row, column in sorted(tops.tolist(), key=lambda p: -part[tuple(p)])[:count]:
        y, x = v - reach + row, u - reach + column
        window = strength[y - 2 : y + 3, x - 2 : x + 3].clip(0)
        offsets = np.arange(-2, 3)
        shift = [(window.sum(axis) * offsets).sum() / window.sum() for axis in (0, 1)]
        found.append(np.array([x + shift[0], y + shift[1]]))
    return found


def points_of(cameras: list[dict], first: list, second: list) -> list[tuple[np.ndarray, float, int, int]]:
    """Points (3,), mm, where rays of two cameras pass each other within APART_MM: (point, distance, index, index)."""
    (source_a, d_a), (source_b, d_b) = (
        triangulation.rays(np.array(uv), np.array(camera["K"])[[0, 1, 0, 1], [0, 1, 2, 2]], np.array(camera["E"]))
        for camera, uv in zip(cameras, (first, second))
    )
    apart, found = triangulation.ray_distance(source_a, d_a, source_b, d_b), []
    for i, j in np.argwhere(apart < APART_MM).tolist():
        point, _ = triangulation.triangulate(np.stack([source_a, source_b]), np.stack([d_a[i], d_b[j]]), np.ones(2))
        found.append((point, apart[i, j], i, j))
    return found


def rigid_fit(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    """The motion (4, 4) that carries points a (N, 3) to b, and the root mean square of what is left, mm."""
    U, _, Vt = np.linalg.svd((b - b.mean(0)).T @ (a - a.mean(0)))
    T = np.eye(4)
    # Of three points a reflection fits as well, so that the sign has to be set.
    T[:3, :3] = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
    T[:3, 3] = b.mean(0) - T[:3, :3] @ a.mean(0)
    left = b - resample.apply_affine(T, a)
    return T, float(np.sqrt((left**2).sum(1).mean()))


def cluster_motion(
    strength: dict[str, list[np.ndarray]], cameras: list[dict], places: tuple[list, list]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Beads (N, 3) of one cluster in both frames, mm, and how rigid it is: the pairing that fits a rigid motion best.

    Args:
      strength: `blobs` of both cameras by frame; places: pixels near the beads in FRAMES[0] of both cameras.
    """
    seen = [[peaks(strength[FRAMES[0]][c], p, REACH_PX, 1)[0] for p in places[c]] for c in (0, 1)]
    # One bead has one pixel in each camera: the pairing with the smallest sum of misses.
    cost = np.full((len(seen[0]), len(seen[1])), 10.0)
    at = {}
    for point, miss, i, j in points_of(cameras, *seen):
        cost[i, j], at[i, j] = miss, point
    pairs = [(i, j) for i, j in zip(*scipy.optimize.linear_sum_assignment(cost)) if (i, j) in at]
    # In the other frame each bead has several candidates; a rigid motion of all of them says which.
    candidates = []
    for i, j in pairs:
        later = [peaks(strength[FRAMES[1]][c], seen[c][k], MOVED_PX, 6) for c, k in ((0, i), (1, j))]
        candidates.append([point for point, *_ in points_of(cameras, *later)])
    before = np.array([at[pair] for pair in pairs])
    best = None
    for chosen in itertools.combinations(range(len(pairs)), 3):
        for trial in itertools.product(*(candidates[k] for k in chosen)):
            T, left = rigid_fit(before[list(chosen)], np.array(trial))
            if left > 0.15:
                continue
            moved = resample.apply_affine(T, before)
            nearest = [
                min(c, key=lambda p: np.linalg.norm(p - m), default=np.full(3, np.inf))
                for c, m in zip(candidates, moved)
            ]
            fits = np.linalg.norm(np.array(nearest) - moved, axis=1) < 0.3
            key = (fits.sum(), -left)
            if best is None or key > best[0]:
                best = key, fits, np.array(nearest)
    _, fits, after = best
    return before[fits], after[fits], rigid_fit(before[fits], after[fits])[1]


def main(data: pathlib.Path, out: pathlib.Path) -> None:
    """Prints how each cluster of beads moved, and how far off each bone's motion would put it."""
    cameras = files.read_json(out / "cameras.json")
    motions = {}
    for bone in ("radius", "ulna"):
        poses = [np.array(files.read_json(out / f"{bone}_{f}" / "results.json")["results"][0]["T"]) for f in FRAMES]
        motions[bone] = poses[1] @ np.linalg.inv(poses[0])
    print("| cluster | beads | rigid within | moved | left by the radius' motion | by the ulna's |")
    print("|---|---|---|---|---|---|")
    strength = {f: [blobs(data / f"xr_rad_uln_cam0{c}_UND.{f}.tif") for c in (1, 2)] for f in FRAMES}
    beads = []
    for name, places in BEADS.items():
        before, after, rigid = cluster_motion(strength, cameras, places)
        beads.append(before)
        moved = np.linalg.norm(after - before, axis=1).mean()
        left = [np.linalg.norm(resample.apply_affine(T, before) - after, axis=1).mean() for T in motions.values()]
        print(f"| {name} | {len(before)} | {rigid:.2f} mm | {moved:.2f} mm | {left[0]:.2f} mm | {left[1]:.2f} mm |")
    centre = np.concatenate(beads).mean(0)
    for bone, T in motions.items():
        angle = np.degrees(np.arccos(np.clip((np.trace(T[:3, :3]) - 1) / 2, -1, 1)))
        shift = np.linalg.norm(resample.apply_affine(T, centre) - centre)
        print(f"{bone}: {shift:.2f} mm at the beads, {angle:.2f} degrees")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:3]))
