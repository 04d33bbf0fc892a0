"""Cameras: projection, and the exactness of bin in coordinates and in rendered images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from kernels.drr import drr
from radgs_jax import gaussians
from radgs_jax.geometry import camera as cameras
from radgs_jax.geometry import grid as grids
from radgs_jax.geometry import rigid


def _pose(rotation_vector, z_mm):
    T = np.eye(4)
    T[:3, :3] = Rotation.from_rotvec(rotation_vector).as_matrix()
    T[:3, 3] = [6.0, -11.0, z_mm]
    return T


def _camera(rotation_vector=(0.7, -1.1, 0.4), focal=(1830.0, 1790.0), centre=(90.3, 55.8), size=(130, 170)):
    intrinsics = jnp.asarray([*focal, *centre])
    return cameras.Camera(intrinsics, jnp.asarray(_pose(rotation_vector, 700.0)), *size)


def _points(n=40):
    return np.random.default_rng(0).normal(size=(n, 3)) * [25.0, 14.0, 33.0] + [4.0, -7.0, 12.0]


def test_project_is_the_pinhole_matrix(x64):
    camera, points = _camera(), _points()
    fx, fy, cx, cy = np.asarray(camera.intrinsics)
    P = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]) @ np.asarray(camera.camera_from_world)[:3]
    uvw = points @ P[:, :3].T + P[:, 3]
    np.testing.assert_allclose(cameras.project(camera, jnp.asarray(points)), uvw[:, :2] / uvw[:, 2:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_bin_maps_pixels_exactly(x64, factor):
    camera, points = _camera(), jnp.asarray(_points())
    full, binned = cameras.project(camera, points), cameras.bin(camera, factor)
    np.testing.assert_allclose(cameras.project(binned, points), (full - 0.5 * (factor - 1)) / factor, rtol=0, atol=1e-9)
    image = np.random.default_rng(1).normal(size=(2, camera.height, camera.width))
    assert cameras.bin_image(jnp.asarray(image), factor).shape == (2, binned.height, binned.width)


def test_bin_image_of_a_linear_image_is_its_value_at_the_block_centre(x64):
    v, u = np.mgrid[:13, :17]
    factor, ramp = 3, lambda u, v: 2.0 * u - 5.0 * v + 1.0
    v_out, u_out = np.mgrid[:4, :5]
    wanted = ramp(u_out * factor + 1.0, v_out * factor + 1.0)
    np.testing.assert_allclose(cameras.bin_image(jnp.asarray(ramp(u, v)), factor), wanted, rtol=0, atol=1e-12)


def _smooth_volume():
    """A grid and a density of three wide anisotropic Gaussians: 10 binned pixels and more across one sigma."""
    rng = np.random.default_rng(2)
    cloud = gaussians.Gaussians(
        jnp.asarray([0.01, 0.02, 0.015]),
        jnp.asarray(rng.normal(size=(3, 3)) * [6.0, 3.0, 4.0]),
        jnp.asarray(rng.uniform(16.0, 22.0, (3, 3))),
        jnp.asarray(Rotation.random(3, rng).as_quat()),
    )
    grid = grids.centred((34, 40, 30), (5.0, 4.5, 6.0), jnp.float64)
    return grid, gaussians.voxelize(cloud, grid)


@jax.jit
def _render(camera, grid, volume):
    index_from_camera = jnp.linalg.inv(grid.frame_from_index) @ rigid.inverse(camera.camera_from_world)
    size = camera.height, camera.width
    return drr(volume, index_from_camera[None, :3], camera.intrinsics[None], *size, step_mm=3.0)[0]


def _relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_rendering_agrees_with_bin(x64):
    """Block means of the full image equal the binned camera's image; a principal point off by half a block does not."""
    grid, volume = _smooth_volume()
    full = _camera(focal=(1400.0, 1480.0), centre=(44.3, 30.9), size=(62, 83))
    image, factor = _render(full, grid, volume), 4
    binned = cameras.bin(full, factor)
    wanted = cameras.bin_image(image, factor)
    assert _relative(_render(binned, grid, volume), wanted) < 1e-3
    naive = cameras.Camera(full.intrinsics / factor, full.camera_from_world, binned.height, binned.width)
    assert _relative(_render(naive, grid, volume), wanted) > 1e-2


def test_supersampled_binning_converges(x64):
    """What supersampling still lacks is the image's curvature, so it falls fourfold with each halving of the pixels."""
    grid, volume = _smooth_volume()
    coarse = _camera(focal=(88.0, 92.0), centre=(5.1, 3.4), size=(8, 11))
    images = {}
    for factor in (2, 4, 8):
        fine = cameras.Camera(
            coarse.intrinsics * factor + 0.5 * (factor - 1) * jnp.asarray([0.0, 0.0, 1.0, 1.0]),
            coarse.camera_from_world,
            8 * factor,
            11 * factor,
        )
        np.testing.assert_allclose(cameras.bin(fine, factor).intrinsics, coarse.intrinsics, rtol=1e-12)
        images[factor] = cameras.bin_image(_render(fine, grid, volume), factor)
    assert _relative(images[4], images[8]) < 0.3 * _relative(images[2], images[8]) < 1e-3
