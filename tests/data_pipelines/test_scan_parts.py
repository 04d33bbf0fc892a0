"""Scans and parts of them: any stored orientation, frames of vertebrae, the rest of the body, and one clear line on bad input."""

import dataclasses
import pathlib

import nibabel
import numpy as np
import pytest
import tiny

from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.phantom import generate
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import carm
from data_pipelines.simulation import quick
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax.geometry import resample


def test_reading_does_not_depend_on_the_stored_orientation(scan, tmp_path):
    made = generate.make_phantom(30002, tiny.config().phantom)
    np.testing.assert_array_equal(scan.hu, made.hu)
    np.testing.assert_allclose(scan.ct_from_index, made.affine, atol=1e-4)
    other = scan_files.write_verse(made, tmp_path, "other", "LAS")
    np.testing.assert_array_equal(scans.read_scan(other["ct"], other["mask"]).labels, scan.labels)


def test_vertebra_frame_follows_the_spine(scan):
    made = generate.make_phantom(30002, tiny.config().phantom)
    for label in (21, 22, 23):
        frame = extraction.ct_from_box(scan, label)
        np.testing.assert_allclose(frame[:3, :3] @ frame[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.det(frame[:3, :3]) > 0
        angle = np.degrees(np.arccos(np.clip(frame[:3, 2] @ made.patient_from_vertebra[label][:3, 2], -1, 1)))
        assert angle < 8.0
        assert np.linalg.norm(frame[:3, 3] - made.centroids[label]) < 15.0


@pytest.mark.parametrize("spacing_mm", [1.0, 6.0])
def test_rest_and_excess_add_up_to_the_whole_scan(scan, spacing_mm):
    """With everything at one pose, the X-ray of the parts equals that of the scan, up to the softened fill."""
    vertebra = extraction.extract(scan, 22, 64)
    body = quick.RigidBody(whole_body.WholeBody(scan, spacing_mm), vertebra)
    rng = np.random.default_rng(0)
    world_from_ct = carm.sample_world_from_ct(rng, vertebra.ct_from_box[:3, 3])
    E, k = carm.sample_views(rng, carm.CArm()), np.stack([carm.intrinsics(carm.CArm(), 16)] * 2)
    rest = body.render_rest(world_from_ct, k, E, (61, 61), 1.0)
    excess, alone = body.render_vertebra(world_from_ct, k, E, (61, 61), 1.0, 1)
    nothing = dataclasses.replace(vertebra, mask=np.zeros_like(vertebra.mask), density=np.zeros_like(vertebra.density))
    whole = quick.RigidBody(whole_body.WholeBody(scan, spacing_mm), nothing)
    direct = whole.render_rest(world_from_ct, k, E, (61, 61), 1.0)
    # The excess keeps its native grid, so a coarser rest differs by the vertebra's own blur.
    assert np.linalg.norm(rest + excess - direct) < (1e-3 if spacing_mm < 2 else 0.02) * np.linalg.norm(direct)
    assert alone.max() > 0.8 and (excess <= alone + 1e-4).all()


def test_a_coarser_array_is_as_sharp_as_the_finer_one():
    """Second moments of a single voxel after averaging, sharpening and linear interpolation, over all places in a block."""
    factor, side = np.array([2, 3, 1]), 12
    moments = []
    for place in np.ndindex(*factor):
        fine = np.zeros((side,) * 3)
        at = 6 + np.array(place)
        fine[tuple(at)] = 1.0
        coarse, _ = resample.block_average(fine, np.diag([3.0, 2.0, 6.0, 1.0]), 6.0)
        sharp = whole_body.sharpened(coarse, factor)
        assert sharp.sum() == pytest.approx(coarse.sum())
        middles = [np.arange(n) * f + 0.5 * (f - 1) for n, f in zip(sharp.shape, factor)]
        away = np.meshgrid(*[m - a for m, a in zip(middles, at)], indexing="ij")
        # A voxel's own tent, of half width f, has the variance f^2 / 6.
        moments.append([np.sum(sharp * d**2) / sharp.sum() + f**2 / 6 for d, f in zip(away, factor)])
    np.testing.assert_allclose(np.mean(moments, 0), 1 / 6, atol=1e-6)


def test_the_body_goes_on_where_the_scan_stops(scan):
    """A last block that the scan fills in part has the attenuation of the end slice, without air mixed in."""
    odd = scan.hu.shape[2] - 1 + scan.hu.shape[2] % 2
    cut = dataclasses.replace(scan, hu=scan.hu[:, :, :odd], labels=scan.labels[:, :, :odd])
    vertebra = extraction.extract(scan, 22, 64)
    mu = whole_body.WholeBody(cut, 6.0).without(vertebra)
    end = np.repeat(attenuation.from_hounsfield(cut.hu[:, :, -1:]), 2, 2)
    end, _ = resample.block_average(end, cut.ct_from_index, 6.0)
    assert odd % 2 == 1 and end.shape == (*mu.shape[:2], 1)
    np.testing.assert_allclose(mu[:, :, -1:], end, atol=1e-7)


def test_a_cut_vertebra_an_absent_label_and_a_mask_over_air_are_refused(scan):
    with pytest.raises(errors.InputError, match="mask: label: found .* wanted T2 among them"):
        extraction.extract(scan, 9, 64)
    top = np.argwhere(scan.labels == 22)[:, 2].max()
    cut = dataclasses.replace(scan, hu=scan.hu[:, :, :top], labels=scan.labels[:, :, :top])
    with pytest.raises(errors.InputError, match="touches the scan's border on axis 2"):
        extraction.extract(cut, 22, 64)
    air = dataclasses.replace(scan, hu=np.full_like(scan.hu, -1000.0))
    with pytest.raises(errors.InputError, match=r"mask: label 22 \(L3\): found a mask over nothing but air, wanted"):
        extraction.extract(air, 22, 64)


def test_broken_arrays_are_one_clear_line(stored, tmp_path):
    _, ct, mask = stored
    with pytest.raises(errors.InputError, match="found nothing, wanted a NIfTI file"):
        scans.read_scan(tmp_path / "no.nii.gz", mask)
    truncated = tmp_path / "cut.nii.gz"
    truncated.write_bytes(pathlib.Path(ct).read_bytes()[:20000])
    with pytest.raises(errors.InputError, match="wanted a complete NIfTI volume"):
        scans.read_scan(truncated, mask)
    image = nibabel.load(ct)
    hu = np.asarray(image.dataobj).astype(np.float32)
    hu[3, 4, 5] = np.nan
    nifti.write_nifti(tmp_path / "nan.nii.gz", hu, image.affine)
    with pytest.raises(errors.InputError, match="voxels: found 1 not finite, wanted finite HU"):
        scans.read_scan(tmp_path / "nan.nii.gz", mask)
    shifted = image.affine.copy()
    shifted[0, 3] += 2.0
    nifti.write_nifti(tmp_path / "shifted.nii.gz", np.asarray(nibabel.load(mask).dataobj), shifted)
    with pytest.raises(errors.InputError, match="affine: found a grid 2.00 mm away"):
        scans.read_scan(ct, tmp_path / "shifted.nii.gz")
    nifti.write_nifti(tmp_path / "small.nii.gz", np.asarray(nibabel.load(mask).dataobj)[:-1], image.affine)
    with pytest.raises(errors.InputError, match="shape in RAS order"):
        scans.read_scan(ct, tmp_path / "small.nii.gz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(errors.InputError, match="complete npz file"):
        files.read_npz(tmp_path / "bad.npz", "a")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with pytest.raises(errors.InputError, match="plain arrays"):
        files.read_npz(tmp_path / "objects.npz", "a")


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "a.json"
    with pytest.raises(ValueError), files.replacing(target) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
