"""Views all round a vertebra: where their cameras stand, and what they show, against line integrals by formula."""

import numpy as np
import pytest

from data_pipelines.simulation import around
from radgs_jax import gaussians
from radgs_jax.geometry import rigid_host
from radgs_jax.registration.prepared import Vertebra

SIGMA_MM = 5.0
BALLS_MM = np.array([[6.0, -4.0, 9.0], [-14.0, 11.0, -7.0]])
PEAKS = np.array([0.04, 0.02])
"""Two balls whose density falls off as a Gaussian, in the vertebra's own frame. Neither is on an axis."""
PX, PIXEL_MM = 48, 1.5


def _density(points):
    """1/mm at points (..., 3), mm, the vertebra's own frame."""
    square = np.sum((points[..., None, :] - BALLS_MM) ** 2, -1)
    return np.exp(-0.5 * square / SIGMA_MM**2) @ PEAKS


@pytest.fixture(scope="module")
def vertebra():
    """The balls on tilted, anisotropic voxels of a CT, and the mask of where they are densest."""
    ct_from_box = rigid_host.matrix([0.3, -0.5, 0.8], [40.0, -25.0, 300.0])
    ct_from_index = rigid_host.matrix([-0.2, 0.1, 0.4], [0.0, 0.0, 0.0]) @ np.diag([1.2, 1.0, 1.4, 1.0])
    shape = np.array([64, 76, 56])
    ct_from_index[:3, 3] = ct_from_box[:3, 3] - ct_from_index[:3, :3] @ (0.5 * (shape - 1))
    box_from_index = np.linalg.inv(ct_from_box) @ ct_from_index
    index = np.moveaxis(np.indices(shape), 0, -1)
    density = _density(index @ box_from_index[:3, :3].T + box_from_index[:3, 3])
    cloud = gaussians.uniform_cloud(2, 8.0, 0.02)
    return Vertebra(20, density, density > 0.01, ct_from_index, ct_from_box, cloud, np.zeros((1, 3)))


@pytest.mark.parametrize("count", [2, 5])
def test_cameras_stand_evenly_over_half_a_turn_and_look_at_the_centre(vertebra, count):
    images, intrinsics, cameras = around.xrays_around(vertebra, count, PIXEL_MM, PX)
    assert images.shape == (count, PX, PX) and intrinsics.shape == (count, 4) and cameras.shape == (count, 4, 4)
    np.testing.assert_allclose(cameras[:, :3, 3], np.tile([0, 0, around.SOURCE_MM], (count, 1)), atol=1e-9)
    # The centre of the bone is in the middle of the image, where a pixel has its nominal size.
    np.testing.assert_allclose(intrinsics[:, 2:], 0.5 * (PX - 1))
    np.testing.assert_allclose(around.SOURCE_MM / intrinsics[:, :2], PIXEL_MM)
    turns = cameras[:, :3, :3]
    np.testing.assert_allclose(turns @ np.swapaxes(turns, 1, 2), np.tile(np.eye(3), (count, 1, 1)), atol=1e-12)
    # Beams are across the long axis, which is upright in the images: v runs to the feet.
    np.testing.assert_allclose(turns[:, 1], np.tile([0, 0, -1.0], (count, 1)), atol=1e-12)
    beams = turns[:, 2, :2]
    angles = np.unwrap(np.arctan2(beams[:, 1], beams[:, 0]))
    np.testing.assert_allclose(np.abs(np.diff(angles)), np.pi / count, atol=1e-12)


def test_images_are_the_line_integrals_of_the_vertebra(vertebra):
    images, intrinsics, cameras = around.xrays_around(vertebra, 5, PIXEL_MM, PX)
    expected = np.zeros_like(images)
    for image, (fx, fy, cx, cy), camera in zip(expected, intrinsics, cameras):
        v, u = np.meshgrid(np.arange(PX), np.arange(PX), indexing="ij")
        ray = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones_like(u)], -1)
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        for peak, ball in zip(PEAKS, BALLS_MM @ camera[:3, :3].T + camera[:3, 3]):
            away = np.sum(ball**2) - np.square(ray @ ball)
            image += peak * SIGMA_MM * np.sqrt(2.0 * np.pi) * np.exp(-0.5 * away / SIGMA_MM**2)
    # Voxels and pixels of a fifth of the balls' width blur them by a few per cent.
    np.testing.assert_allclose(images, expected, atol=0.05 * expected.max())
    assert np.corrcoef(images.ravel(), expected.ravel())[0, 1] > 0.999
    np.testing.assert_allclose(images.sum((1, 2)), expected.sum((1, 2)), rtol=0.01)


def test_the_vertebra_in_its_own_axes(vertebra):
    density, mask = around.in_box(vertebra, 40, 1.5)
    places = 1.5 * (np.moveaxis(np.indices((40,) * 3), 0, -1) - 19.5)
    expected = _density(places)
    np.testing.assert_allclose(density, expected, atol=0.05 * expected.max())
    assert mask.dtype == bool and mask.any()
    # The nearest voxel is up to a millimetre away, over which the density changes by a tenth of its peak.
    assert expected[mask].min() > 0.004 and expected[~mask].max() < 0.018
