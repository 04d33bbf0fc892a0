"""Resampling to another grid against scipy on the whole grid: only the part that the array reaches is computed."""

import numpy as np
import pytest
import scipy
from scipy.spatial.transform import Rotation

from radgs_jax.geometry import resample

SHAPE, GRID = (9, 7, 12), (16, 21, 11)


def _affine(rng):
    """A turned, sheared, perhaps mirrored affine of voxels whose sides differ."""
    affine = np.eye(4)
    scale = np.diag(rng.choice([-1.0, 1.0], 3) * rng.uniform(0.4, 4.0, 3))
    affine[:3, :3] = (
        Rotation.random(random_state=rng).as_matrix() @ scale @ (np.eye(3) + rng.uniform(-0.2, 0.2, (3, 3)))
    )
    affine[:3, 3] = rng.uniform(-40.0, 40.0, 3)
    return affine


def _place(affine, index):
    return affine[:3, :3] @ index + affine[:3, 3]


def _cases():
    """Affines of an array and of a grid that overlap in part, by a random voxel of each that lie at one place."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        ct_from_index, ct_from_grid = _affine(rng), _affine(rng)
        met = _place(ct_from_index, rng.uniform(0, 1, 3) * (np.array(SHAPE) - 1))
        ct_from_grid[:3, 3] += met - _place(ct_from_grid, rng.uniform(0, 1, 3) * (np.array(GRID) - 1))
        yield rng.normal(size=SHAPE), ct_from_index, ct_from_grid


def _everywhere(array, ct_from_index, ct_from_grid, order, outside):
    matrix = np.linalg.inv(ct_from_index) @ ct_from_grid
    options = {"order": order, "mode": "constant", "cval": outside}
    return scipy.ndimage.affine_transform(array.astype(np.float32), matrix, output_shape=GRID, **options)


@pytest.mark.parametrize("order", [0, 1])
def test_the_part_that_is_reached_is_all_that_there_is(order):
    shares, computed = [], []
    for array, *affines in _cases():
        found = resample.resample(array, *affines, GRID, order, outside=-7.0)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, _everywhere(array, *affines, order, -7.0), atol=2e-5)
        shares.append(np.mean(found != -7.0))
        part = resample.reached(np.linalg.inv(affines[1]) @ affines[0], SHAPE, GRID)
        computed.append(np.prod([one.stop - one.start for one in part]) / np.prod(GRID))
    assert 0.0 < min(shares) < 0.01 and 0.4 < max(shares) < 1.0
    assert min(computed) < 0.1 and max(computed) == 1.0


def test_a_grid_beside_the_array_is_outside():
    ct_from_grid = np.eye(4)
    for shift in ((20.0, 0, 0), (0, -30.0, 0), (-16.0, 7.5, 40.0)):
        ct_from_grid[:3, 3] = shift
        found = resample.resample(np.ones(SHAPE), np.eye(4), ct_from_grid, GRID, outside=3.0)
        np.testing.assert_array_equal(found, np.full(GRID, 3.0))


def test_on_its_own_grid_an_array_is_itself():
    """With its outermost voxels, which lie on the border of what is reached."""
    array = next(_cases())[0]
    affine = np.array([[0, -2.0, 0, 8.0], [0.5, 0, 0, -3.0], [0, 0, 1.5, 7.5], [0, 0, 0, 1.0]])
    for order in (0, 1):
        np.testing.assert_array_equal(resample.resample(array, affine, affine, SHAPE, order), np.float32(array))
