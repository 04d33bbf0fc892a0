"""Compares with cases that another program made from a real CT; skipped where their folder is missing."""

import os
import pathlib

import numpy as np
import pytest

from data_pipelines import cases
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.io import files
from data_pipelines.simulation import quick
from radgs_jax import metrics
from radgs_jax.geometry import rigid_host

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CASES = pathlib.Path(os.environ.get("RADGS_SHARED", REPOSITORY.parent / "shared")) / "bench" / "cases" / "cases.json"
pytestmark = pytest.mark.skipif(
    not CASES.exists(), reason="the bench cases are not next to the repository (RADGS_SHARED)"
)


def _images(scene):
    """Line integrals of a scene's vertebra alone."""
    return [xray.line_integrals for xray in cases.read_xrays(scene, "easy")]


@pytest.fixture(scope="module")
def bench():
    case_file = cases.read(CASES)
    volume = next(iter(case_file.volumes.values()))
    scan = scans.read_scan(volume.full_ct, volume.full_mask)
    return case_file, {v.name: extraction.extract(scan, v.full_label, 64) for v in case_file.volumes.values()}


def _cameras(scene):
    return np.stack([v.intrinsics for v in scene.cameras]), np.stack([v.camera_from_world for v in scene.cameras])


def _normalised(images):
    flat = images.reshape(len(images), -1).astype(np.float64)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def test_our_xray_of_every_easy_scene_is_the_given_one(bench):
    case_file, vertebrae = bench
    for scene in case_file.scenes.values():
        vertebra, given = vertebrae[scene.volume], np.stack(_images(scene))
        ours = quick.render(
            vertebra.density,
            vertebra.ct_from_index,
            cases.truth(case_file, scene),
            *_cameras(scene),
            given.shape[1:],
            0.5,
        )
        ncc = np.sum(_normalised(ours) * _normalised(given), 1)
        ratio = ours.sum((1, 2)) / given.sum((1, 2))
        assert (ncc >= 0.998).all(), (scene.name, ncc)
        assert ((ratio > 0.98) & (ratio < 1.02)).all(), (scene.name, ratio)


@pytest.mark.parametrize("scene_name", ["cxr_L1_s0", "cxr_T10_s1"])
def test_the_pose_of_best_ncc_is_the_true_one(bench, scene_name):
    """Gauss-Newton on NCC, from half a millimetre and half a degree away; a slip of half a pixel would move the optimum."""
    case_file, vertebrae = bench
    scene = case_file.scenes[scene_name]
    vertebra, truth = vertebrae[scene.volume], cases.truth(case_file, scene)
    K, E = _cameras(scene)
    points = vertebra.points @ truth[:3, :3].T + truth[:3, 3]
    p = points @ E[:, :3, :3].transpose(0, 2, 1) + E[:, None, :3, 3]
    uv = p[..., :2] / p[..., 2:] * K[:, None, :2] + K[:, None, 2:]
    corner = np.floor(uv.min(1)).astype(int) - 12
    size = int((uv.max(1) - corner).max()) + 12
    given = np.stack([image[r : r + size, c : c + size] for image, (c, r) in zip(_images(scene), corner)])
    window = K.copy()
    window[:, 2:] -= corner
    target, centre = _normalised(given), points.mean(0)

    def residual(pose):
        images = quick.render(vertebra.density, vertebra.ct_from_index, pose, window, E, (size, size), 0.5)
        return (_normalised(images) - target).ravel()

    steps = np.array([2e-3] * 3 + [0.05] * 3)
    pose = rigid_host.motion_about(centre, np.array([0.009, -0.007, 0.008, 0.4, -0.5, 0.3])) @ truth
    assert metrics.mtre(vertebra.points, pose, truth) > 0.4
    for _ in range(5):
        jacobian = (
            np.stack(
                [
                    (
                        residual(rigid_host.motion_about(centre, d) @ pose)
                        - residual(rigid_host.motion_about(centre, -d) @ pose)
                    )
                    for d in np.diag(steps)
                ],
                1,
            )
            / 2
        )
        update = -np.linalg.lstsq(jacobian, residual(pose), rcond=None)[0] * steps
        pose = rigid_host.motion_about(centre, update) @ pose
    assert metrics.mtre(vertebra.points, pose, truth) < 0.1


def test_every_complete_vertebra_of_the_real_scans_is_extracted():
    listed = files.read_json(CASES.parent.parent.parent / "data" / "cases.json")
    for entry in listed:
        folder = CASES.parent.parent.parent / "data" / entry["case"]
        ct = next(folder.glob("*_ct.nii.gz"), None)
        if ct is None:
            continue
        scan = scans.read_scan(ct, next(folder.glob("*_msk.nii.gz")))
        complete = [int(k) for k, v in entry["labels"].items() if not v["touch"]]
        for label in complete[::4]:
            assert (extraction.extract(scan, label, 32).cloud.density > 0).sum() > 16
