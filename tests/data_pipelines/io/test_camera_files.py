"""Cameras and transforms in JSON: each refusal names the test that failed and the likely mend."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_pipelines.io import camera_files
from radgs_jax import errors

K = np.array([[3700.0, 0, 480.2], [0, 3650.0, 391.7], [0, 0, 1]])
E = np.eye(4)
E[:3, :3], E[:3, 3] = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix(), [12.0, -7.0, 690.0]
SHAPE = (800, 960)
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


def scaled(T, factor):
    T = T.copy()
    T[:3, :3] *= factor
    return T


def skewed():
    T = E.copy()
    T[:3, 0] += 0.1 * T[:3, 1]
    T[:3, 0] /= np.linalg.norm(T[:3, 0])
    return T


NOT_RIGID = {
    "flat": (E.ravel(), "found 16 numbers in one list, wanted 4 lists of 4 numbers"),
    "3x4": (E[:3], "found 3 rows of 4 numbers, wanted a 4x4 matrix: add the row 0 0 0 1"),
    "3x3": (E[:3, :3], r"found shape \(3, 3\)"),
    "transposed": (E.T, "last row 12, -7, 690, 1, wanted it transposed"),
    "last row": (np.vstack([E[:3], [0, 0, 0, 2]]), "last row 0, 0, 0, 2, wanted a rigid transform: 0, 0, 0, 1"),
    "perspective": (np.vstack([E[:3], [0, 0, 1, 0]]), "last row 0, 0, 1, 0"),
    "scale": (scaled(E, 1.02), "a scale of 1.02 instead of 1, wanted"),
    "thousand": (scaled(E, 1000.0), "a scale of 1000 instead of 1: metres for mm"),
    "thousandth": (scaled(E, 0.001), "a scale of 0.001 instead of 1: mm for metres"),
    "mirrored": (MIRROR @ E, r"a matrix that mirrors \(determinant -1\)"),
    "columns": (E @ np.diag([2.0, 1, 1, 1]), "columns 2, 1, 1 long instead of 1"),
    "angles": (skewed(), "columns that are not at right angles"),
    "zero": (np.diag([0.0, 0, 0, 1]), "columns 0, 0, 0 long"),
    "ragged": ([[1, 2], [3]], "wanted a .*matrix of numbers"),
    "text": ("E", "wanted a .*matrix of numbers"),
    "object": ({"a": 1}, "wanted a .*matrix of numbers"),
}


@pytest.mark.parametrize("name", NOT_RIGID)
def test_what_is_not_rigid_is_named(name):
    value, said = NOT_RIGID[name]
    value = value.tolist() if isinstance(value, np.ndarray) else value
    with pytest.raises(errors.InputError, match=f"^file: T: found .*{said}|^file: T: {said}") as caught:
        camera_files.check_rigid("file", "T", value)
    assert "\n" not in str(caught.value)


def test_rounded_transforms_are_rigid():
    for digits in (4, 6, 12):
        np.testing.assert_array_equal(camera_files.check_rigid("f", "T", E.round(digits).tolist()), E.round(digits))


def read(value, **options):
    value = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in value.items()}
    return camera_files.read_camera("file", "view", value, SHAPE, **options)


def test_all_three_matrices_must_agree():
    """P in any scale and sign, and rounded to four decimals."""
    for factor in (1.0, -3.0, 1e-6):
        camera = read({"P": factor * K @ E[:3], "K": K, "E": E})
        np.testing.assert_array_equal(camera.camera_from_world, E)
    read({"P": (K @ E[:3]).round(4), "K": K.round(1), "E": E.round(4)})
    others = {
        "half a pixel": K + np.array([[0, 0, 0.5], [0, 0, 0], [0, 0, 0]]),
        "focal length": K @ np.diag([1.05, 1.05, 1]),
    }
    for other in others.values():
        with pytest.raises(
            errors.InputError, match="^file: view: P, K and E: found points within .* px apart.*one camera"
        ):
            read({"P": other @ E[:3], "K": K, "E": E})
    moved = E.copy()
    moved[0, 3] += 5.0
    with pytest.raises(errors.InputError, match="up to 33.31 px apart"):
        read({"P": np.diag([1.0, 1, 1]) @ K @ moved[:3], "K": K, "E": E})


NO_CAMERA = {
    "nothing": ({}, "found {}, wanted an object with P"),
    "another program's": (
        {"sdd": 1124.0, "rot": [0, 0, 0]},
        r"found the keys \['sdd', 'rot'\], wanted an object with P",
    ),
    "3x4 E": ({"K": K, "E": E[:3]}, "view.E: found 3 rows of 4 numbers, wanted .*0 0 0 1"),
    "ragged E": ({"K": K, "E": [[1, 2], [3]]}, "view.E: found"),
    "negative focal": (
        {"K": K * [[-1, 1, -1], [1, -1, -1], [1, 1, 1]], "E": E},
        "view.K: found fx -3700 and fy -3650.*180 degrees",
    ),
    "mirrored K": ({"K": K * [[-1, 1, 1], [1, 1, 1], [1, 1, 1]], "E": E}, "view.K: found fx -3700 .*--mirrored"),
    "mirrored E": ({"K": K, "E": MIRROR @ E}, "view.E: found a matrix that mirrors.*--mirrored"),
    "mirrored P": ({"P": np.diag([-1.0, 1, 1]) @ K @ E[:3]}, "view.P: found a mirrored camera.*--mirrored"),
    "inverse E": ({"K": K, "E": np.linalg.inv(E)}, "the inverse of E would fit: E is camera_from_world"),
    "axes of OpenGL": ({"K": K, "E": np.diag([1, -1, -1, 1.0]) @ E}, "rows 2 and 3 of E negated"),
    "focal of 0": ({"K": K * [[0, 1, 1], [1, 1, 1], [1, 1, 1]], "E": E}, "view.K: found"),
}


@pytest.mark.parametrize("name", NO_CAMERA)
def test_what_is_no_camera_is_named(name):
    value, said = NO_CAMERA[name]
    with pytest.raises(errors.InputError, match=said) as caught:
        read(value)
    assert str(caught.value).startswith("file: view") and "\n" not in str(caught.value)


def test_mirrored_cameras_in_every_form():
    """P, K with a negative fx, and E with its first row negated are the same camera, which shows the image's columns mirrored."""
    columns = np.array([[-1, 0, SHAPE[1] - 1], [0, 1, 0], [0, 0, 1.0]])
    P = columns @ K @ E[:3]
    negative = columns @ K
    reflected = K.copy()
    reflected[0, 2] = SHAPE[1] - 1 - K[0, 2]
    for value in (
        {"P": P},
        {"P": -2 * P},
        {"K": negative, "E": E},
        {"K": reflected, "E": MIRROR @ E},
        {"P": P, "K": negative, "E": E},
    ):
        camera = read(value, mirrored=True)
        np.testing.assert_allclose(camera.intrinsics, K[[0, 1, 0, 1], [0, 1, 2, 2]], rtol=1e-9)
        np.testing.assert_allclose(camera.camera_from_world, E, atol=1e-8)
    for value in ({"P": K @ E[:3]}, {"K": K, "E": E}, {"K": negative, "E": MIRROR @ E}):
        with pytest.raises(
            errors.InputError, match="^file: view: found a camera that does not mirror, with --mirrored"
        ):
            read(value, mirrored=True)
