"""Acquisitions of an articulated body: parts that add up, motions, labels, implants, and another program's X-rays."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

from data_pipelines import cases
from data_pipelines import simulation
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.simulation import beam
from data_pipelines.simulation import materials
from data_pipelines.simulation import quick
from radgs_jax import errors
from radgs_jax.geometry import rigid_host

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
CASES = pathlib.Path(os.environ.get("RADGS_SHARED", REPOSITORY.parent / "shared")) / "bench" / "cases" / "cases.json"
GEOMETRY = simulation.Geometry(window=48, binning=20)
STILL = simulation.Preset(
    flexion_deg=(0, 0), lateral_bend_deg=(0, 0), twist_deg=(0, 0), jitter_deg=(0, 0), jitter_mm=(0, 0)
)
CLEAN = dataclasses.replace(
    STILL,
    scatter_to_primary=(0, 0),
    quanta_per_mm2=(1e9, 1e9),
    electronic_quanta=(0, 0),
    focal_blur_mm=(0, 0),
    detector_blur_mm=(0, 0),
    gain_ramp=(0, 0),
    vignetting=(0, 0),
    offset_drift=(0, 0),
    air_value=(0, 0),
    chance_collimator=0.0,
    chance_hardware=0.0,
)


@pytest.fixture(scope="module")
def scan():
    """A trunk with seven vertebrae (the last one cut), each a body with one process to the back and one to the left."""
    affine = rigid_host.matrix([0.03, -0.05, 0.02], 0) @ np.diag([2.0, 2.2, 2.5, 1.0])
    affine[:3, 3] = [-150.0, -130.0, -400.0]
    shape = (130, 100, 84)
    ct = np.moveaxis(np.indices(shape, dtype=np.float32), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    x, y, z = np.moveaxis(ct - [-15.0, -20.0, -300.0], -1, 0)
    hu = np.full(shape, -1000.0, np.float32)
    hu[(x / 115) ** 2 + (y / 90) ** 2 < 1] = 30.0
    hu[((x - 60) / 35) ** 2 + ((y - 20) / 40) ** 2 + ((z - 40) / 70) ** 2 < 1] = -800.0
    labels = np.zeros(shape, np.uint8)
    for step, label in enumerate(range(15, 22)):
        up = z - 80 + 28 * step
        body = (x / 20) ** 2 + ((y + 20) / 15) ** 2 < 1
        process = (np.abs(x) < 4) & (np.abs(y + 48) < 16) | (np.abs(x + 24) < 12) & (np.abs(y + 36) < 5)
        part = (np.abs(up) < 11) & body | (np.abs(up + 4) < 5) & process
        labels[part] = label
        hu[part] = np.where(np.abs(up) > 8, 700.0, 250.0)[part]
    low = int(np.argwhere(labels == 21)[:, 2].min()) + 2
    return scans.Scan("trunk", hu[:, :, low:], labels[:, :, low:], affine @ rigid_host.matrix([0, 0, 0], [0, 0, low]))


@pytest.fixture(scope="module")
def body(scan):
    return simulation.ArticulatedBody(scan, rest_mm=5.0, vertebra_mm=2.6)


def _simulate(body, index=0, label=18, preset=None, geometry=GEOMETRY):
    return simulation.simulate(
        body, label, np.random.default_rng([7, label, index]), preset or simulation.Preset(), geometry
    )


def test_vertebrae_that_the_scan_cuts_stay_with_the_rest(body, scan):
    assert body.spine.labels == (15, 16, 17, 18, 19, 20) and 21 in scan.boxes
    with pytest.raises(errors.InputError, match="simulate: label: found 21, wanted a complete vertebra"):
        _simulate(body, label=21)
    empty = dataclasses.replace(scan, labels=np.zeros_like(scan.labels))
    with pytest.raises(errors.InputError, match="trunk: labels: found .*, wanted a complete vertebra"):
        simulation.ArticulatedBody(empty)


def test_parts_at_rest_add_up_to_the_whole_scan(body, scan):
    """With nothing moved, the X-ray of the parts equals that of the scan, rendered by the quick simulator."""
    sample = _simulate(body, preset=STILL)
    whole = whole_body.WholeBody(scan, 2.6)
    vertebra = extraction.extract(scan, 18, 64)
    world_from_ct = sample.world_from_box.astype(np.float64) @ np.linalg.inv(vertebra.ct_from_box)
    direct = quick.RigidBody(whole, vertebra)
    cameras = sample.intrinsics, sample.camera_from_world, (GEOMETRY.window,) * 2
    rest = direct.render_rest(world_from_ct, *cameras, 1.0)
    excess, alone = direct.render_vertebra(world_from_ct, *cameras, 0.6)
    ours = sample.rest + sample.excess
    assert np.linalg.norm(ours - rest - excess) < 0.02 * np.linalg.norm(rest + excess)
    assert np.linalg.norm(sample.excess - excess) < 0.06 * np.linalg.norm(excess)
    assert np.linalg.norm(sample.vertebra - alone) < 0.06 * np.linalg.norm(alone)
    np.testing.assert_allclose(sample.vertebra.sum((1, 2)), alone.sum((1, 2)), rtol=0.01)


def test_a_body_moved_as_one_is_a_moved_camera(body):
    """One motion of all levels, by the warp, equals that motion of the pose, except near the scan's repeated end slices."""
    sample = _simulate(body, preset=STILL)
    world_from_ct = sample.world_from_box.astype(np.float64) @ np.linalg.inv(body.spine.ct_from_box[3])
    motion = rigid_host.motion_about(body.spine.centres[3], np.array([0.06, -0.04, 0.1, 6.0, -4, 3]))
    cameras = sample.intrinsics, sample.camera_from_world.astype(np.float64), GEOMETRY.window
    still, moved = np.tile(np.eye(4), (6, 1, 1)), np.tile(motion, (6, 1, 1))
    warped, _ = body.render_rest(moved, world_from_ct, *cameras)
    placed, _ = body.render_rest(still, world_from_ct @ motion, *cameras)
    unmoved, _ = body.render_rest(still, world_from_ct, *cameras)
    middle = np.s_[:, 10:38]
    assert np.linalg.norm((warped - placed)[middle]) < 0.1 * np.linalg.norm((unmoved - placed)[middle])


def test_a_sample_is_a_function_of_seed_and_index(body):
    one, other = _simulate(body, 4), _simulate(body, 5)
    again = _simulate(body, 4)
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(again, field.name))
        assert np.isfinite(getattr(one, field.name)).all()
    assert np.abs(one.rest - other.rest).max() > 0.1
    # Draws for the panel and the implants change neither the posture nor the cameras.
    clean = _simulate(body, 4, preset=dataclasses.replace(simulation.Preset(), chance_hardware=0.0, kvp=(70, 70)))
    np.testing.assert_array_equal(clean.rest, one.rest)


def test_every_vertebra_moves_on_its_own(body):
    still, moved = _simulate(body, preset=STILL), _simulate(body)
    np.testing.assert_array_equal(still.camera_from_world, moved.camera_from_world)
    assert np.abs(still.world_from_box - moved.world_from_box).max() > 0.01
    shift = (moved.centroids - still.centroids)[:, [15, 16, 17, 18, 19, 20]]
    relative = shift - shift.mean(1, keepdims=True)
    assert (np.linalg.norm(relative, axis=-1) > 1e-3).all()


def test_labels_are_where_the_vertebrae_are(body):
    """The labelled centroid of each target is the centre of its image, in windows that are aimed off it."""
    geometry = dataclasses.replace(GEOMETRY, aim_mm=25.0)
    for label in body.spine.labels[1:5]:
        sample = _simulate(body, label=label, geometry=geometry)
        assert sample.in_sight[:, label].all() and not sample.in_sight[:, [1, 14, 21, 28]].any()
        for view in range(2):
            E, k = sample.camera_from_world[view], sample.intrinsics[view]
            p = (E @ sample.world_from_box)[:3, 3]
            np.testing.assert_allclose(sample.centroids[view, label], k[:2] * p[:2] / p[2] + k[2:], atol=1e-3)
            image = sample.vertebra[view]
            v, u = np.indices(image.shape)
            centre = np.array([(image * u).sum(), (image * v).sum()]) / image.sum()
            assert np.abs(centre - sample.centroids[view, label]).max() < 2.0
    off = [_simulate(body, i, geometry=geometry).centroids[:, 18] - 24 for i in range(4)]
    assert np.max(np.abs(off)) > 1.0


def test_a_perfect_panel_shows_the_hardened_clean_image(body):
    sample = _simulate(body, preset=CLEAN)
    clean = sample.rest + sample.excess
    assert sample.valid.all() and not sample.metal.any()
    for measured, wanted in zip(sample.measured, clean):
        assert np.corrcoef(measured.ravel(), wanted.ravel())[0, 1] > 0.99
    mono = beam.monochromatic()
    signal, _ = beam.transmit(mono, {materials.SOFT_TISSUE: clean[0]})
    np.testing.assert_allclose(-np.log(signal), np.maximum(clean[0], 0), atol=1e-4)


def test_implants_are_in_the_measured_image_only(body):
    with_metal = dataclasses.replace(CLEAN, chance_hardware=1.0)
    thick = 0
    for index in range(6):
        bare, implanted = _simulate(body, index, preset=CLEAN), _simulate(body, index, preset=with_metal)
        np.testing.assert_array_equal(bare.rest, implanted.rest)
        np.testing.assert_array_equal(bare.vertebra, implanted.vertebra)
        metal = implanted.metal > 1.0
        assert (implanted.measured - bare.measured).min() > -0.02 and metal.mean() < 0.3
        assert (implanted.measured - bare.measured)[metal].min(initial=1.0) > 0.1
        thick += metal.any()
    assert thick >= 3


def test_the_preset_holds_the_issues_ranges_and_all_of_it_is_usable(body):
    preset = simulation.Preset()
    assert preset.kvp == (70, 120) and preset.scatter_to_primary == (0.1, 2) and preset.gain_ramp == (0, 0.1)
    assert preset.focal_blur_mm == preset.detector_blur_mm == (0.2, 1.5) and preset.air_value == (0, 0.2)
    assert preset.quanta_per_mm2[1] / preset.quanta_per_mm2[0] == 100
    for end in (0, 1):
        extreme = dataclasses.replace(
            preset,
            chance_collimator=float(end),
            chance_hardware=float(end),
            **{
                f.name: (getattr(preset, f.name)[end],) * 2
                for f in dataclasses.fields(preset)
                if "chance" not in f.name
            },
        )
        sample = _simulate(body, preset=extreme)
        assert np.isfinite(sample.measured).all() and sample.valid.mean() > 0.1


@pytest.mark.long
@pytest.mark.skipif(not CASES.exists(), reason="the bench cases are not beside the repository (RADGS_SHARED)")
def test_our_xray_of_every_easy_scene_is_the_given_one():
    """The vertebra alone at 70 keV, at the default resolution of the crops, against another program's."""
    case_file = cases.read(CASES)
    volume = next(iter(case_file.volumes.values()))
    body = simulation.ArticulatedBody(scans.read_scan(volume.full_ct, volume.full_mask))
    for scene in case_file.scenes.values():
        given = np.stack([x.line_integrals for x in cases.read_xrays(scene, "easy")])
        K, E = np.stack([v.intrinsics for v in scene.cameras]), np.stack([v.camera_from_world for v in scene.cameras])
        label = case_file.volumes[scene.volume].full_label
        _, _, ours = body.render_vertebra(label, cases.truth(case_file, scene), K, E, given.shape[1])
        for a, b in zip(ours, given):
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] >= 0.998
            assert 0.98 < a.sum() / b.sum() < 1.02
