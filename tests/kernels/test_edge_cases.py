"""Every backend on extreme, empty and non-finite inputs."""

import kernel_cases
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from kernels.drr import api as drr_api
from kernels.splat import api as splat_api
from kernels.voxelize import api as voxelize_api

SMALL = (9, 12)
SMALL_CAMERA = np.array([500.0, 450.0, 5.2, 4.6])
SMALL_SHAPE = (6, 9, 5)


def _ellipsoid(means, sigma=(2.0, 4.0, 3.0), density=0.02):
    """Equal rotated Gaussians at `means`."""
    R = Rotation.from_rotvec([0.4, -0.7, 0.2]).as_matrix()
    K = R @ np.diag(np.array(sigma) ** -2.0) @ R.T
    packed = [K[0, 0], K[0, 1], K[0, 2], K[1, 1], K[1, 2], K[2, 2]]
    n = len(means)
    return np.full(n, density), np.array(means, float).reshape(n, 3), np.tile(packed, (n, 1))


@kernel_cases.over_backends(splat_api.BACKENDS)
def test_splat_of_nothing(implementation):
    image, gradients = kernel_cases.run_with_ones("splat", implementation, *_ellipsoid([]), SMALL_CAMERA, size=SMALL)
    np.testing.assert_array_equal(image, np.zeros(SMALL))
    assert [g.shape for g in gradients] == [(0,), (0, 3), (0, 6), (4,)] and kernel_cases.all_finite(gradients)


@kernel_cases.over_backends(splat_api.BACKENDS)
def test_splat_of_zero_density(implementation):
    cloud = _ellipsoid([[1.0, 2.0, 700.0], [-3.0, 0.0, 690.0]], density=0.0)
    image, gradients = kernel_cases.run_with_ones("splat", implementation, *cloud, SMALL_CAMERA, size=SMALL)
    np.testing.assert_array_equal(image, np.zeros(SMALL))
    assert kernel_cases.all_finite(gradients) and np.all(gradients[0] > 0)


@kernel_cases.over_backends(splat_api.BACKENDS)
@pytest.mark.parametrize("mean", [[1.0, 2.0, -700.0], [0.0, 0.0, 0.0], [0.5, 0.0, 5.0], [1.0, 0.0, -5.0]])
def test_splat_behind_or_across_the_source(implementation, mean):
    image, gradients = kernel_cases.run_with_ones(
        "splat", implementation, *_ellipsoid([mean, mean]), SMALL_CAMERA, size=SMALL
    )
    np.testing.assert_array_equal(image, np.zeros(SMALL))
    assert all(not np.any(g) for g in gradients)


@kernel_cases.over_backends(splat_api.BACKENDS)
@pytest.mark.parametrize(
    "cloud",
    [
        _ellipsoid([[3.0, -2.0, 700.0], [40.0, 9.0, 650.0]], (90.0, 160.0, 60.0)),
        _ellipsoid([[0.3, 0.5, 700.0], [-3.1, 1.2, 700.0]], (0.3, 0.2, 0.5)),
        _ellipsoid([[-7.28, -6.2, 700.0], [40.0, 3.0, 700.0]], (0.02, 0.03, 0.01)),
    ],
    ids=["larger than the image", "sub-pixel", "a hundredth of a pixel, outside"],
)
def test_splat_of_extreme_sizes(implementation, cloud):
    image, gradients = kernel_cases.run_with_ones("splat", implementation, *cloud, SMALL_CAMERA, size=SMALL)
    wanted, _ = kernel_cases.exact_value_and_gradients(
        "splat", SMALL, np.ones(SMALL), *kernel_cases.to_single(*cloud, SMALL_CAMERA)
    )
    np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-4 * max(wanted.max(), 1e-3))
    assert kernel_cases.all_finite((image, gradients))


def _poisoned(cloud, argument, value, position):
    """A cloud with one bad Gaussian, and the same without its density; unused lanes of a backend may read the last."""
    good = [a[0].copy() for a in cloud]
    good[0][position] = 0.0
    bad = [a[0].copy() for a in cloud]
    bad[argument][position, 1] = value
    return bad, good


def _assert_ignored(result, wanted, position):
    """The bad Gaussian adds nothing and gets zero gradients; the others (and the camera) have theirs."""
    (value, gradients), (wanted_value, wanted_gradients) = result, wanted
    np.testing.assert_allclose(value, wanted_value, rtol=0, atol=1e-6 * float(wanted_value.max()))
    assert all(not np.any(g[position]) for g in gradients[:3])
    kernel_cases.assert_gradients_close(
        [np.delete(g, position, 0) for g in gradients[:3]] + [*gradients[3:]],
        [np.delete(g, position, 0) for g in wanted_gradients[:3]] + [*wanted_gradients[3:]],
    )


_bad_values = pytest.mark.parametrize(
    "argument,value,position",
    [
        (1, np.nan, 0),
        (1, np.nan, -1),
        (1, np.inf, 14),
        (1, np.inf, -1),
        (2, np.nan, 14),
        (2, np.nan, -1),
        (2, np.inf, -1),
    ],
)


@_bad_values
@kernel_cases.over_backends(splat_api.BACKENDS)
def test_splat_ignores_what_is_not_finite(implementation, argument, value, position):
    bad, good = _poisoned(kernel_cases.splat_cloud(20), argument, value, position)
    results = (
        kernel_cases.run_with_ones(
            "splat", implementation, *a, kernel_cases.CAMERAS[0], size=(kernel_cases.HEIGHT, kernel_cases.WIDTH)
        )
        for a in (bad, good)
    )
    _assert_ignored(*results, position)


@_bad_values
@kernel_cases.over_backends(voxelize_api.BACKENDS)
def test_voxelize_ignores_what_is_not_finite(implementation, argument, value, position):
    bad, good = _poisoned(kernel_cases.voxel_cloud(21), argument, value, position)
    _assert_ignored(
        *(kernel_cases.run_with_ones("voxelize", implementation, *a, size=kernel_cases.SHAPE) for a in (bad, good)),
        position,
    )


@kernel_cases.over_backends(voxelize_api.BACKENDS)
@pytest.mark.parametrize(
    "cloud",
    [
        _ellipsoid([]),
        _ellipsoid([[2.0, 3.0, 1.0], [3.0, 4.0, 2.5]], density=0.0),
        _ellipsoid([[-40.0, 3.0, 2.0], [2.0, 3.0, 900.0]]),
        _ellipsoid([[2.0, 5.0, 1.0], [-9.0, 3.0, 4.0]], (60.0, 90.0, 40.0)),
        _ellipsoid([[2.1, 4.9, 1.0], [3.5, 3.5, 2.5]], (0.2, 0.1, 0.15)),
    ],
    ids=["nothing", "zero density", "outside", "larger than the grid", "sub-voxel"],
)
def test_voxelize_of_hostile_clouds(implementation, cloud):
    volume, gradients = kernel_cases.run_with_ones("voxelize", implementation, *cloud, size=SMALL_SHAPE)
    wanted, _ = kernel_cases.exact_value_and_gradients(
        "voxelize", SMALL_SHAPE, np.ones(SMALL_SHAPE), *kernel_cases.to_single(*cloud)
    )
    np.testing.assert_allclose(volume, wanted, rtol=0, atol=1e-4 * max(wanted.max(), 1e-3))
    assert [g.shape for g in gradients] == [a.shape for a in cloud] and kernel_cases.all_finite(gradients)


@kernel_cases.over_backends(drr_api.FORWARD)
@pytest.mark.parametrize("depth_mm", [3.0, -400.0], ids=["source inside", "behind the source"])
def test_drr_near_and_behind_the_source(implementation, depth_mm):
    arrays = kernel_cases.to_single(
        kernel_cases.smooth_volume(), kernel_cases.voxel_from_camera(depth_mm=depth_mm), kernel_cases.DRR_CAMERAS
    )
    wanted, _ = kernel_cases.exact_value_and_gradients(
        "drr", kernel_cases.DRR_SIZE, np.ones((2, *kernel_cases.DRR_SIZE)), *arrays
    )
    image, gradients = kernel_cases.run_single(
        "drr", implementation, kernel_cases.DRR_SIZE, np.ones((2, *kernel_cases.DRR_SIZE)), *arrays
    )
    np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-5 * max(wanted.max(), 1e-3))
    assert kernel_cases.all_finite(gradients) and (np.any(wanted) if depth_mm > 0 else not np.any(image))


@kernel_cases.over_backends(drr_api.PER_RAY)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_drr_ignores_rays_that_are_not_finite(implementation, value):
    """Bad directions in view 0 and a bad origin of view 1: no image, no gradients; the other rays keep theirs."""
    volume, *view = kernel_cases.to_single(
        kernel_cases.smooth_volume(), kernel_cases.voxel_from_camera(), kernel_cases.DRR_CAMERAS
    )
    origin, direction = kernel_cases.drr_rays((volume, *view), kernel_cases.DRR_SIZE)
    cotangent = np.float32(kernel_cases.random_cotangent((2, *kernel_cases.DRR_SIZE)))
    bad = np.zeros((2, *kernel_cases.DRR_SIZE), bool)
    bad[0, [5, 7, 9], [6, 8, 10]], bad[1] = True, True
    wanted_image, wanted = kernel_cases.drr_backend(
        implementation, volume, origin, direction, 1.0, np.where(bad, 0, cotangent)
    )
    origin, direction = origin.copy(), direction.copy()
    direction[0, [5, 7, 9], [6, 8, 10], [0, 1, 2]] = value
    origin[1, 2] = value
    image, gradients = kernel_cases.drr_backend(implementation, volume, origin, direction, 1.0, cotangent)
    np.testing.assert_array_equal(image, np.where(bad, 0, wanted_image))
    assert np.all(wanted_image[0][bad[0]] > 0) and np.any(wanted_image[1])
    for gradient, truth in zip(gradients, wanted):
        np.testing.assert_array_equal(gradient, truth)


@kernel_cases.over_backends(drr_api.PER_RAY)
@pytest.mark.parametrize(
    "shape,batch,size",
    [
        ((4, 5, 6), 0, (3, 4)),
        ((4, 5, 6), 2, (0, 4)),
        ((4, 5, 6), 2, (3, 0)),
        ((4, 0, 6), 2, (3, 4)),
        ((1, 1, 1), 2, (3, 4)),
    ],
    ids=["no views", "no rows", "no columns", "no voxels", "one voxel"],
)
def test_drr_of_nothing(implementation, shape, batch, size):
    """Shapes without elements, and one voxel that no ray meets: zeros."""
    affine = np.zeros((batch, 3, 4)) + np.concatenate([np.eye(3), [[90.0], [70.0], [-600.0]]], 1)
    arrays = np.ones(shape), affine, np.zeros((batch, 4)) + [500.0, 450.0, 1.5, 1.0]
    image, gradients = kernel_cases.run_single("drr", implementation, size, np.ones((batch, *size)), *arrays)
    assert image.shape == (batch, *size) and not np.any(image)
    assert [g.shape for g in gradients] == [a.shape for a in arrays] and not any(np.any(g) for g in gradients)
