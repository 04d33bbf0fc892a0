"""Simulated case files: variants, true poses, and the quick panel's faults."""

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines import cases
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick
from radgs_jax import errors
from radgs_jax.geometry import distortion


def test_an_unknown_variant_is_refused_before_anything_is_written(stored, tmp_path):
    with pytest.raises(ValueError, match="variants: found 'hard', wanted some of easy, full, artic, real"):
        case_files.simulated_cases(
            tmp_path / "c.json", [stored], (21,), 1, ((0, 5),), 5, quick.PanelFaults(), ("real", "hard")
        )
    assert not list(tmp_path.iterdir())


def test_a_bent_scene_shows_the_vertebra_at_its_true_pose(stored, tmp_path):
    """Edges of the vertebra projected at T_gt match edges of the X-rays better than 5 mm away."""
    path = case_files.simulated_cases(
        tmp_path / "bent.json", [stored], (21,), 1, ((0, 5),), 4, quick.PanelFaults(), posture="bent"
    )
    case_file = cases.read(path)
    (scene,) = case_file.scenes.values()
    truth = cases.truth(case_file, scene)
    np.testing.assert_allclose(truth[:3, :3] @ truth[:3, :3].T, np.eye(3), atol=1e-9)
    vertebra = extraction.extract(scans.read_scan(*stored[1:]), 21, 64)
    cameras = np.stack([v.intrinsics for v in scene.cameras]), np.stack([v.camera_from_world for v in scene.cameras])

    def likeness(pose, images):
        drawn = quick.render(vertebra.density, vertebra.ct_from_index, pose, *cameras, images[0].shape, 2.0)
        a, b = (np.stack(np.gradient(np.stack(i).astype(np.float64), axis=(1, 2))) for i in (drawn, images))
        return (a * b).sum() / np.sqrt((a**2).sum() * ((b * (a != 0)) ** 2).sum())

    for variant in ("artic", "real"):
        images = [x.line_integrals for x in cases.read_xrays(scene, variant)]
        off = [np.eye(4) for _ in range(3)]
        for axis, motion in enumerate(off):
            motion[axis, 3] = 5.0
        assert all(likeness(truth, images) > likeness(motion @ truth, images) + 0.05 for motion in off), variant
    with pytest.raises(errors.InputError, match="variant|array"):
        cases.read_xrays(scene, "easy")


def test_wrong_masks_and_cameras_are_written_beside_the_true_cameras(stored, tmp_path):
    """X-rays, points and true pose stay; the mask's border moves by less than is asked, and cameras by about as much."""
    arguments = [stored], (21,), 2, ((0, 5),), 5, quick.PanelFaults()
    right = cases.read(case_files.simulated_cases(tmp_path / "a" / "c.json", *arguments, variants=("artic",)))
    errors = case_files.InputErrors(mask_mm=3.0, camera_sd=(3.0, 0.5))
    path = case_files.simulated_cases(tmp_path / "b" / "c.json", *arguments, variants=("artic",), errors=errors)
    wrong = cases.read(path)
    for a, b in zip(right.raw["scenes"], wrong.raw["scenes"]):
        assert a["views"] == b["views_true"] and a["T_gt"] == b["T_gt"]
        for true, given in zip(b["views_true"], b["views"]):
            assert true["K"] == given["K"]
            motion = np.linalg.inv(true["E"]) @ np.array(given["E"])
            shift, turn = np.linalg.norm(motion[:3, 3]), np.degrees(np.arccos((np.trace(motion[:3, :3]) - 1) / 2))
            assert 0.0 < shift < 12.0 and 0.0 < turn < 2.0
    name = next(iter(right.volumes))
    np.testing.assert_array_equal(cases.points(right, name), cases.points(wrong, name))
    true, crude = (scans.read_scan(f.volumes[name].full_ct, f.volumes[name].full_mask) for f in (right, wrong))
    np.testing.assert_allclose(true.ct_from_index, crude.ct_from_index, atol=1e-4)
    changed = (true.labels == 21) != (crude.labels == 21)
    assert changed.sum() > 0.03 * (true.labels == 21).sum()
    spacing = np.linalg.norm(true.ct_from_index[:3, :3], axis=0)
    bone = ndimage.distance_transform_edt(true.labels != 21, spacing)
    inside = ndimage.distance_transform_edt(true.labels == 21, spacing)
    assert max(bone[changed].max(), inside[changed].max()) < 3.0 + 3.5  # and the phantom's voxels of 3 mm
    others = (true.labels != 21) & (true.labels != 0)
    np.testing.assert_array_equal(true.labels[others], crude.labels[others])


def test_stretched_xrays_are_those_of_the_same_scene(stored, tmp_path):
    arguments = [stored], (21,), 1, ((0, 5),), 5, quick.PanelFaults(), ("artic",)
    flat = cases.read(case_files.simulated_cases(tmp_path / "a" / "c.json", *arguments))
    stretch = case_files.InputErrors(distortion=0.1)
    stretched = cases.read(case_files.simulated_cases(tmp_path / "b" / "c.json", *arguments, errors=stretch))
    (scene,), (raw,) = stretched.scenes.values(), stretched.raw["scenes"]
    (wanted,) = (cases.read_xrays(s, "artic") for s in flat.scenes.values())
    for shown, true, k in zip(cases.read_xrays(scene, "artic"), wanted, raw["distortions"]):
        assert -0.1 <= k[0] <= -0.05 and 0.0 <= k[1] <= 0.03
        error = lambda x: np.abs(x.line_integrals - true.line_integrals)[x.valid & true.valid].mean()
        assert error(distortion.straightened(shown, np.array(k))) < 0.2 * error(shown)


@pytest.mark.parametrize("posture", ["rigid", "bent"])
def test_views_are_as_far_apart_as_asked(stored, tmp_path, posture):
    path = tmp_path / "c.json"
    made = case_files.simulated_cases(
        path, [stored], (21,), 1, ((0, 5),), 5, quick.PanelFaults(), ("artic",), posture, apart_deg=25.0
    )
    (scene,) = cases.read(made).scenes.values()
    a, b = (view.camera_from_world[2, :3] for view in scene.cameras)
    assert np.degrees(np.arccos(a @ b)) == pytest.approx(25.0, abs=1e-3)


def test_degraded_xrays_keep_their_content(scan):
    rng = np.random.default_rng(0)
    ideal = np.asarray(rng.uniform(1, 3, (2, 8, 8)).repeat(8, 1).repeat(8, 2), np.float32)
    real = quick.degrade(ideal, np.random.default_rng(1), quick.PanelFaults())
    assert real.shape == ideal.shape and np.isfinite(real).all()
    assert np.corrcoef(real.ravel(), ideal.ravel())[0, 1] > 0.9 and np.abs(real - ideal).mean() > 0.05
    np.testing.assert_array_equal(real, quick.degrade(ideal, np.random.default_rng(1), quick.PanelFaults()))
    off = quick.PanelFaults(photons=0, hardening=0, scatter=0, blur_px=0, gain_ramp=0, air=0)
    np.testing.assert_allclose(quick.degrade(ideal, np.random.default_rng(1), off), ideal, atol=1e-4)
