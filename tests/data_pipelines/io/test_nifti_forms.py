"""A NIfTI file that says twice where it is: sform and qform agree, differ by rounding, or contradict each other."""

import nibabel
import numpy as np
import pytest
from absl import logging as absl_logging
from scipy.spatial import transform

from data_pipelines.ct import scans
from data_pipelines.io import nifti
from radgs_jax import errors


@pytest.fixture
def said(monkeypatch):
    """Lines that were said."""
    lines = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *values: lines.append(message % values))
    return lines


def _affine(degrees=(4.0, -7.0, 12.0), spacing=(0.8, 0.9, 2.0), corner=(-90.0, 40.0, 310.0)):
    affine = np.eye(4)
    affine[:3, :3] = transform.Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * spacing
    affine[:3, 3] = corner
    return affine


def _write(path, sform, qform, codes=(1, 1), shape=(30, 24, 18), kind=nibabel.Nifti1Image):
    image = kind(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), sform)
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1], strip_shears=True)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


MIRRORED, ROTATED = np.diag([-1.0, 1, 1, 1]), np.array([[0, -1.0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
MOVED, TURNED = np.eye(4), np.eye(4)
MOVED[:3, 3] = [0, 12.0, 0]
TURNED[:3, :3] = transform.Rotation.from_euler("z", 6, degrees=True).as_matrix()


@pytest.mark.parametrize(
    ("change", "axes"),
    [
        (MIRRORED, "axes RAS by the sform, LAS by the qform"),
        (np.diag([-1.0, -1, 1, 1]), "axes RAS by the sform, LPS by the qform"),
        (ROTATED, "axes RAS by the sform, ALS by the qform"),
        (MOVED, "axes RAS by the sform, RAS by the qform, up to 12.0 mm apart"),
        (TURNED, "axes RAS by the sform, RAS by the qform"),
        (np.diag([1.0, 1, 1.1, 1]), "up to .* mm apart"),
    ],
)
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_forms_that_contradict_each_other_are_refused(tmp_path, change, axes, kind):
    affine = _affine((0, 0, 0)) if change is ROTATED else _affine()
    path = _write(tmp_path / "ct.nii.gz", affine, change @ affine, kind=kind)
    for read in (nifti.read_nifti, nifti.read_nifti_grid, scans.read_ct):
        with pytest.raises(errors.InputError, match=axes) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: sform and qform: found axes")
        assert "wanted one place: set the code of the wrong one to 0" in str(caught.value)


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (2, 0)])
def test_a_form_without_a_code_says_nothing(tmp_path, said, codes):
    path = _write(tmp_path / "ct.nii.gz", _affine(), MIRRORED @ _affine(), codes)
    _, affine = nifti.read_nifti(path)
    wanted = _affine() if codes[0] else MIRRORED @ _affine()
    assert np.linalg.det(affine[:3, :3]) > 0 and not said
    corner = np.linalg.inv(affine) @ wanted[:, 3]
    np.testing.assert_allclose(corner, np.rint(corner), atol=1e-4)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (4, -7, 12), (35, 20, -40), (179, 1, 2)])
def test_a_rounded_qform_is_the_same(tmp_path, said, degrees):
    affine = _affine(degrees, (0.7, 0.7, 1.0), (-200.0, 300.0, 900.0))
    nifti.read_nifti(_write(tmp_path / "ct.nii.gz", affine, affine, shape=(200, 8, 200)))
    assert not said


def test_a_small_difference_is_said_once(tmp_path, said):
    affine, moved = _affine(), _affine()
    moved[0, 3] += 0.4
    path = _write(tmp_path / "ct.nii.gz", affine, moved)
    nifti.read_nifti_grid(path)
    nifti.read_nifti(path)
    assert said == [f"{path}: sform and qform: up to 0.40 mm apart, the sform is taken"]


def test_a_qform_that_is_no_rotation_is_refused(tmp_path):
    path = _write(tmp_path / "ct.nii", _affine(), _affine())
    raw = bytearray(path.read_bytes())
    raw[256:268] = np.array([0.9, 0.9, 0.9], "<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(errors.InputError, match="qform: found no rotation"):
        nifti.read_nifti(path)
