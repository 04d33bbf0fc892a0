"""Line integrals against analytic ones: known shapes in a scan, and chords of capsules."""

import functools

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines import simulation
from data_pipelines.ct import scans
from data_pipelines.simulation import carm
from data_pipelines.simulation import hardware
from radgs_jax import attenuation
from radgs_jax.geometry import rigid_host

# A voxel phantom of known shapes. HU from -1000 to 0 are linear in attenuation, so partly filled voxels are exact.

SHAPES = {
    "sphere": np.array([24.0, 24.0, 24.0]),
    "ellipsoid": np.array([30.0, 16.0, 22.0]),
    "box": np.array([22.0, 15.0, 18.0]),
}
TILT = rigid_host.matrix([0.4, -0.3, 0.5], 0)[:3, :3]


def _inside(name, points):
    """Whether points (..., 3), mm from the centre, are inside the tilted shape."""
    q = points @ TILT / SHAPES[name]
    return np.abs(q).max(-1) <= 1 if name == "box" else np.sum(q**2, -1) <= 1


def _chord(name, origin, direction):
    """Length in the tilted shape of lines through `origin` (3,), mm from its centre, along unit directions (..., 3)."""
    o, d = origin @ TILT / SHAPES[name], direction @ TILT / SHAPES[name]
    if name == "box":
        ends = np.sort([(-1 - o) / d, (1 - o) / d], 0)
        return np.maximum(ends[1].min(-1) - ends[0].max(-1), 0)
    a, b, c = np.sum(d * d, -1), d @ o, o @ o - 1
    return 2 * np.sqrt(np.maximum(b * b - a * c, 0)) / a


@functools.cache
def _shape_hu(name):
    """HU of one shape of water in air on an oblique, anisotropic grid, the grid's affine, and the shape's centre, CT mm."""
    affine = rigid_host.matrix([0.05, -0.04, 0.03], 0) @ np.diag([0.65, 0.6, 0.7, 1.0])
    shape = np.array([114, 124, 106])
    centre = np.array([-30.0, 40.0, -250.0])
    affine[:3, 3] = centre - affine[:3, :3] @ (0.5 * (shape - 1) + [0.3, -0.2, 0.4])
    index = np.moveaxis(np.indices(shape, dtype=np.float32), 0, -1)
    points = index @ affine[:3, :3].T.astype(np.float32) + (affine[:3, 3] - centre).astype(np.float32)
    occupancy = _inside(name, points).astype(np.float32)
    border = _inside(name, points * 0.95) != _inside(name, points * 1.07)
    fine = (np.arange(4) + 0.5) / 4 - 0.5
    shifts = np.stack(np.meshgrid(fine, fine, fine), -1).reshape(-1, 3) @ affine[:3, :3].T
    near = points[border]
    occupancy[border] = np.mean([_inside(name, near + shift.astype(np.float32)) for shift in shifts], 0)
    return -1000 + 1000 * occupancy, affine, centre


def _shape_scan(name, labelled):
    """A scan of a shape, with a label that covers the shape, or else a small cube of air."""
    hu, affine, centre = _shape_hu(name)
    labels = np.zeros(hu.shape, np.uint8)
    if labelled:
        labels[hu > -1000] = 20
    else:
        labels[2:5, 2:5, 2:5] = 20
    return scans.Scan("phantom", hu, labels, affine), centre


def _cameras(size, centre_px_off=3.3):
    """Two oblique cameras of about 0.8 mm pixels at the isocentre, off-centre and with different focal lengths."""
    E = np.stack([carm.extrinsics(12, -9, 700.0), carm.extrinsics(77, 13, 650.0)])
    K = np.array(
        [[900.0, 910, 0.5 * size + centre_px_off, 0.5 * size - 2], [870.0, 860, 0.5 * size - 1, 0.5 * size + 2]]
    )
    return K, E


def _rays(K, E, size):
    """Origins (V, 3) and unit directions (V, size, size, 3) in world mm."""
    u, v = np.meshgrid(np.arange(size), np.arange(size))
    origins, directions = [], []
    for k, e in zip(K, E):
        d = np.stack([(u - k[2]) / k[0], (v - k[3]) / k[1], np.ones_like(u, float)], -1) @ e[:3, :3]
        origins.append(-e[:3, :3].T @ e[:3, 3])
        directions.append(d / np.linalg.norm(d, axis=-1, keepdims=True))
    return np.array(origins), np.array(directions)


@pytest.mark.parametrize("labelled", [True, False], ids=["as a vertebra", "as the rest"])
@pytest.mark.parametrize("name", SHAPES)
def test_line_integrals_of_known_shapes(name, labelled):
    """Within 0.5 % of the largest value, on rays at least two pixels from outlines and edges that do not graze a face.

    Near edges voxels round the shape off, which does not change the sum over the image: it is right within 0.1 %.
    """
    scan, centre = _shape_scan(name, labelled)
    body, size = simulation.ArticulatedBody(scan, rest_mm=0.5, vertebra_mm=0.5), 96
    world_from_ct = rigid_host.matrix([0.1, 0.2, -0.15], 0)
    world_from_ct[:3, 3] = [4, -6, 3] - world_from_ct[:3, :3] @ centre
    K, E = _cameras(size)
    if labelled:
        _, _, image = body.render_vertebra(20, world_from_ct, K, E, size, 0.4)
    else:
        # The cube of air is treated as a vertebra: muscle fills its place, and its negative excess removes the muscle.
        image, _ = body.render_rest(np.eye(4)[None], world_from_ct, K, E, size, 0.4)
        image = image + body.render_vertebra(20, world_from_ct, K, E, size, 0.4)[0]
    # render_vertebra averages four rays per pixel, and so does the analytic value.
    shifts = [(-0.25, -0.25), (-0.25, 0.25), (0.25, -0.25), (0.25, 0.25)] if labelled else [(0, 0)]
    R, t = world_from_ct[:3, :3], world_from_ct[:3, 3]
    wanted = np.zeros_like(image)
    for shift in shifts:
        origins, directions = _rays(K - [0, 0, *shift], E, size)
        for view in range(2):
            chord = _chord(name, (origins[view] - t) @ R - centre, directions[view] @ R)
            wanted[view] += attenuation.WATER_PER_MM * chord / len(shifts)
    bent = np.abs([ndimage.laplace(image, mode="nearest") for image in wanted])
    steep = np.hypot(*np.gradient(wanted, axis=(1, 2)))
    straight = (ndimage.maximum_filter(bent, (0, 5, 5)) < 0.02 * wanted.max()) & (steep < 0.06 * wanted.max())
    error = np.abs(image - wanted) / wanted.max()
    assert straight[wanted > 0].mean() > 0.5
    assert error[straight].max() < 0.005
    np.testing.assert_allclose(image.sum((1, 2)), wanted.sum((1, 2)), rtol=1e-3)


def test_chords_of_capsules_are_exact():
    """Against lengths sampled along the same rays, and against a calculation by hand for a ray across the middle."""
    size = 40
    K, E = _cameras(size)
    rod = hardware.Implant(np.array([[-10.0, 3, -8], [4, -2, 6], [14, 5, 9]]), 3.0)
    image = hardware.chords([rod], K, E, size, size)
    n = hardware.OVERSAMPLE
    fine = K * [n, n, n, n] + [0, 0, 0.5 * (n - 1), 0.5 * (n - 1)]
    origins, directions = _rays(fine, E, size * n)
    t = np.arange(600, 800, 0.1)
    for view in range(2):
        rows, columns = np.nonzero(image[view] > 0.5)
        for row, column in list(zip(rows, columns))[::7]:
            block = directions[view, n * row : n * row + n, n * column : n * column + n].reshape(-1, 3)
            points = origins[view] + t[None, :, None] * block[:, None]
            distance = np.min([_distance(points, a, b) for a, b in zip(rod.points, rod.points[1:])], 0)
            assert abs((distance < 3.0).sum(1).mean() * 0.1 - image[view, row, column]) < 0.06
    camera = np.eye(4)[None]
    wire = hardware.Implant(np.array([[-5.0, 0, 100], [5, 0, 100]]), 1.0)
    across = hardware.chords([wire], np.array([[1000.0, 1000, 0, 0]]), camera, 1, 1)[0, 0, 0]
    heights = np.array([-1, 0, 1]) / 3 * 0.1
    assert abs(across - np.mean(2 * np.sqrt(1 - heights**2))) < 1e-3
    behind = hardware.Implant(-wire.points, 1.0)
    assert not hardware.chords([behind], np.array([[1000.0, 1000, 0, 0]]), camera, 4, 4).any()


def _distance(points, a, b):
    along = np.clip((points - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
    return np.linalg.norm(points - a - along[..., None] * (b - a), axis=-1)
