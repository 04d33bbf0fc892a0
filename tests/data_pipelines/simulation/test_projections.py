"""Cameras given as 3x4 projections: any scale and sign, and one clear line on matrices that are no camera."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_pipelines.io import camera_files
from radgs_jax import errors

E = np.eye(4)
E[:3, :3], E[:3, 3] = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix(), [12.0, -7.0, 690.0]
K = np.array([[3700.0, 0, 480.2], [0, 3650.0, 391.7], [0, 0, 1]])
P = K @ E[:3]
MIRROR = np.array([[-1, 0, 960.0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-9, -3e7])
def test_scale_and_sign_mean_nothing(scale):
    intrinsics, camera_from_world = camera_files.decompose("file", "P", scale * P)
    np.testing.assert_allclose(intrinsics, K[[0, 1, 0, 1], [0, 1, 2, 2]], rtol=1e-9)
    np.testing.assert_allclose(camera_from_world, E, atol=1e-7)


def test_a_skew_of_a_measured_calibration_is_let_pass():
    slight = K.copy()
    slight[0, 1] = 0.2
    assert np.abs(camera_files.decompose("file", "P", slight @ E[:3])[0] - K[[0, 1, 0, 1], [0, 1, 2, 2]]).max() < 0.1


@pytest.mark.parametrize(
    "projection,said",
    [
        (MIRROR @ P, "mirrored"),
        (-MIRROR @ P, "mirrored"),
        (np.concatenate([P[:, :3] @ np.diag([1, 1, 0]), P[:, 3:]], 1), "singular"),
        (np.zeros((3, 4)), "singular"),
        (P - np.outer([0, 0, 1], P[2] * [0, 0, 0, 1]), "plane"),
        (np.array([[1, 0.01, 0], [0, 1, 0], [0, 0, 1]]) @ P, "skew"),
    ],
)
def test_what_is_no_camera_is_one_clear_line(projection, said):
    with pytest.raises(errors.InputError, match=f"^file: P: found .*{said}") as error:
        camera_files.decompose("file", "P", projection)
    assert "\n" not in str(error.value)


def test_a_camera_looks_at_the_isocentre():
    behind = E.copy()
    behind[2, 3] = -690.0
    with pytest.raises(errors.InputError, match=r"view.E: found the isocentre at depth -690"):
        camera_files.read_camera("file", "view", {"K": K.tolist(), "E": behind.tolist(), "height": 8, "width": 9})


@pytest.mark.parametrize(
    "value", [[["1", "0", "0"]] * 3, [[True, False, False]] * 3, [[1, 0], [0]], None, "P", [[1e400] * 3] * 3]
)
def test_a_matrix_is_made_of_finite_numbers(value):
    with pytest.raises(errors.InputError, match="^file: K: found "):
        camera_files.check_matrix("file", "K", value, (3, 3))


@pytest.mark.parametrize("height", [True, 10**12, 0, 8.0, "8"])
def test_an_image_has_a_size(height):
    with pytest.raises(errors.InputError, match="view.height, width: found"):
        camera_files.read_camera("file", "view", {"P": P.tolist(), "height": height, "width": 9})
