"""Localizers: training, files, scores, simulated X-rays, and one made and used end to end."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines import simulation
from data_pipelines.ct import scans
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.pairs import identity
from data_pipelines.phantom import generate
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import carm
from experiments.localizers import acquisitions
from experiments.localizers import crops
from experiments.localizers import localizer_files
from experiments.localizers import scoring
from experiments.localizers import training
from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.localization import locate
from radgs_jax.localization import network
from radgs_jax.localization import upright

TINY = network.DetectorConfig(levels=(18, 19, 20, 21), widths=(4, 4, 6, 6), blocks=(0, 0, 0, 0), features=4)


REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def _pool(seed, count=4, size=56):
    """X-rays with a bright spot for each of four levels, on which a network could learn."""
    rng = np.random.default_rng(seed)
    centroids = np.zeros((count, 29, 2), np.float32)
    in_sight = np.zeros((count, 29), bool)
    images = rng.normal(3.0, 0.05, (count, size, size)).astype(np.float16)
    for n in range(count):
        for i, label in enumerate((18, 19, 20, 21)):
            centroids[n, label] = 28 + rng.uniform(-3, 3), 6 + 14 * i + rng.uniform(-2, 2)
            u, v = np.rint(centroids[n, label]).astype(int)
            images[n, v - 1 : v + 2, u - 1 : u + 2] += 1 + i
            in_sight[n, label] = True
    E = np.tile(carm.extrinsics(0.0, 0.0, 700.0).astype(np.float32), (count, 1, 1))
    known = np.isin(np.arange(29), (18, 19, 20, 21))
    return {
        "clean": images,
        "measured": images,
        "valid": np.ones(images.shape, bool),
        "intrinsics": np.tile(np.float32([467, 467, 28, 28]), (count, 1)),
        "camera_from_world": E,
        "centroids": centroids,
        "in_sight": in_sight,
        "known": known,
    }


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    pool = acquisitions.gather([_pool(0), _pool(1)])
    config = training.LocalizerTraining(steps=4, batch=2, crop_px=48)
    params = training.train_localizer(pool, folder / "state", TINY, config)
    chain = training.fit_localizer_chain(params, TINY, pool, pool, config, images=2)
    return pool, config, folder, locate.Localizer(params, TINY, chain)


def test_training_goes_on_from_its_checkpoint_to_the_same_parameters(tiny_model, tmp_path):
    pool, config, _, model = tiny_model

    # The schedule belongs to the configuration, so the first half is cut off, not configured shorter.
    class Stop(Exception):
        pass

    def stop(pool, levels, rng, config, size, real=crops.batch_of, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 3:
            raise Stop
        return real(pool, levels, rng, config, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crops, "batch_of", stop)
        patch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
        with pytest.raises(Stop):
            training.train_localizer(pool, tmp_path, TINY, config)
    resumed = training.train_localizer(pool, tmp_path, TINY, config)
    jax.tree.map(np.testing.assert_array_equal, resumed, model.params)


def test_a_batch_tells_where_the_spots_are(tiny_model):
    pool, config = tiny_model[:2]
    rng = np.random.default_rng(2)
    images, valid, beam, centres, seen, known = crops.batch_of(pool, TINY.levels, rng, config, 12)
    np.testing.assert_allclose(beam, np.tile([0.0, -1.0, 0.0], (12, 1)), atol=1e-6)
    hits = 0
    for n in range(12):
        for level in np.flatnonzero(seen[n] & known[n]):
            u, v = np.rint(centres[n, level]).astype(int)
            if 4 < u < 43 and 4 < v < 43:
                around = images[n, v - 4 : v + 5, u - 4 : u + 5]
                hits += 1
                assert around[3:6, 3:6].mean() > around.mean() + 0.2
    assert hits > 15 and (valid | (images == images)).all()


def test_a_localizer_file_comes_back_as_it_went_and_a_damaged_one_is_refused(tiny_model, tmp_path):
    model = tiny_model[3]
    path = tmp_path / "detector.npz"
    localizer_files.write_localizer(path, model, "a test")
    back = localizer_files.read_localizer(path)
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    assert back.config == TINY and back.levels == TINY.levels
    np.testing.assert_array_equal(back.chain.spacing_mm, model.chain.spacing_mm)
    assert (back.chain.weight, back.chain.link) == (model.chain.weight, model.chain.link)
    arrays = dict(np.load(path))
    for name, value in (
        ("header", np.array("[]")),
        ("header", np.array("{")),
        ("header", np.array(str(arrays["header"]).replace("detector/1", "detector/9"))),
        ("params.Dense_0.bias", np.zeros(3, np.float32)),
        ("params.Dense_0.bias", np.full(4, np.nan, np.float32)),
    ):
        files.write_npz(path, **{**arrays, name: value})
        with pytest.raises(errors.InputError, match="detector.npz"):
            localizer_files.read_localizer(path)


def test_locate_says_in_one_line_why_there_is_no_answer(tiny_model):
    model = tiny_model[3]
    view = Camera(np.array([467.0, 467, 28, 28]), carm.extrinsics(0.0, 0.0, 700.0), 56, 56)
    image = np.zeros((56, 56), np.float32)
    with pytest.raises(errors.InputError, match="label: found T9, wanted one of T11 to L2"):
        locate.locate(model, [XRay(image, None, view)] * 2, 16)
    with pytest.raises(errors.InputError, match="that level in two views"):
        locate.locate(model, [XRay(image, None, view)], 20)


def test_one_camera_twice_is_refused_in_one_line(tiny_model, monkeypatch, two_views):
    found, k, E, _ = two_views([([1, 2, 3], [1, 2, 3])] * 2, (6.0, 6.0), np.random.default_rng(9))
    model = dataclasses.replace(tiny_model[3], config=network.DetectorConfig(levels=tuple(range(18, 25))))
    model = dataclasses.replace(model, chain=dataclasses.replace(model.chain, trained=np.ones(7, bool)))
    image = np.zeros((56, 56), np.float32)
    view = Camera(k[0], E[0], 56, 56)
    moved = dataclasses.replace(found[0], uv=found[0].uv + 2.0)
    for second in (found[0], moved):
        answers = iter((found[0], second))
        same = upright.Upright(image, image > 0, k[0], E[0], np.eye(2), np.zeros(2))
        monkeypatch.setattr(locate, "look", lambda *_: (same, next(answers)))
        with pytest.raises(
            errors.InputError, match="X-rays: cameras: found rays that are parallel or meet in a source"
        ):
            locate.locate(model, [XRay(image, None, view)] * 2, 20)


@pytest.fixture(scope="module")
def patient_files(tmp_path_factory):
    """A coarse phantom on disk, stored in another order than RAS: the phantom, its CT and its mask."""
    made = generate.make_phantom(5, generate.PhantomConfig(spacing_mm=(2.5, 2.5, 3.0), levels=(20, 21, 22, 23, 24)))
    paths = scan_files.write_verse(made, tmp_path_factory.mktemp("patient"), "phantom", "PIR")
    return made, paths["ct"], paths["mask"]


def test_views_are_a_function_of_the_scan_its_labels_and_the_seed(patient_files, tmp_path):
    """A store's acquisitions are those of its seeds, are kept, and another label map of the same bones shows the same."""
    _, ct, mask = patient_files
    values, affine = nifti.read_nifti(mask)
    counted_up = np.array(values)
    for number in (20, 21, 22, 23, 24):
        counted_up[values == number] = 51 - number  # as TotalSegmentator counts: L5 is 27, L1 is 31
    counted_up[values == 26] = 25
    other = tmp_path / "other.nii.gz"
    nifti.write_nifti(other, counted_up, affine)
    geometry, stores = simulation.Geometry(window=48, binning=16), []
    for path, labels in ((mask, None), (other, "totalsegmentator")):
        digest = identity.scan_digest(ct, path, labels)
        which = acquisitions.AcquisitionSet(digest, bodies=2, count=2, geometry=geometry)
        done = []
        archive = identity.Archive({digest: identity.FileScan("phantom", ct, path, labels)})
        stores.append(acquisitions.simulated_views(tmp_path / "views", which, 3, archive, done.append))
        assert sum(done) == len(stores[-1]) == 4
    assert stores[0].folder != stores[1].folder
    for index in range(4):
        for name, array in stores[0][index].items():
            np.testing.assert_array_equal(array, stores[1][index][name])
    body = simulation.ArticulatedBody(scans.read_scan(ct, mask))
    rng = np.random.default_rng([3, 1, 0])
    label = int(rng.choice(body.spine.labels))
    sample, stored = simulation.simulate(body, label, rng, simulation.Preset(), geometry), stores[0][2]
    assert stored["target"] == label
    np.testing.assert_array_equal(stored["measured"], np.clip(sample.measured, -30, 60).astype(np.float16))
    pool = acquisitions.gather(stores[0][i] for i in (1, 2))
    assert pool["valid"].shape == (4, 48, 48) and pool["known"].shape == (4, 29)
    np.testing.assert_array_equal(pool["clean"][2:], stored["clean"])
    np.testing.assert_array_equal(np.flatnonzero(pool["known"][3]), body.spine.labels)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "views").rglob("*")}
    again = acquisitions.simulated_views(tmp_path / "views", which, 3, archive)
    assert again.digest() == stores[1].digest()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "views").rglob("*")} == written


def test_a_chain_of_a_scan_without_neighbours_keeps_the_spacings_that_it_started_from(tiny_model):
    pool, config, _, model = tiny_model
    alone = {**pool, "known": pool["known"] & np.isin(np.arange(29), (19, 21))}
    chain = training.fit_localizer_chain(model.params, TINY, alone, alone, config, images=1, prior=model.chain)
    np.testing.assert_array_equal(chain.spacing_mm, model.chain.spacing_mm)
    assert chain.trained.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "shift_px, wrong_level, wanted",
    [(0.0, False, (1.0, 0.5, 1.0)), (0.0, True, (0.0, 0.5, 0.0)), (4.0, False, (1.0, 6.5, 1.0))],
)
def test_scores_of_answers_whose_error_is_known(tiny_model, monkeypatch, shift_px, wrong_level, wanted, two_views):
    """Two views that say the truth, another level's name, or places 4 px of 1.5 mm to one side."""
    rng, seen = np.random.default_rng(8), [1, 2, 3, 4, 5]
    names = [n + 1 for n in seen] if wrong_level else seen
    found, k, E, points = two_views([(seen, names), (seen, names)], (6.0, 6.0), rng)
    for f in found:
        f.uv[:, 0] += shift_px
    model = dataclasses.replace(tiny_model[3], config=network.DetectorConfig(levels=tuple(range(18, 25))))
    model = dataclasses.replace(model, chain=dataclasses.replace(model.chain, trained=np.ones(7, bool)))
    centroids = np.zeros((2, 29, 2), np.float32)
    for view in range(2):
        camera = points @ E[view, :3, :3].T + E[view, :3, 3]
        centroids[view, 18:25] = k[view, :2] * camera[:, :2] / camera[:, 2:] + k[view, 2:]
    acquisition = {
        "measured": np.zeros((2, 140, 140), np.float16),
        "valid": np.ones((2, 140, 140), bool),
        "intrinsics": k,
        "camera_from_world": E,
        "centroids": centroids,
        "in_sight": np.isin(np.arange(29), [18 + n for n in seen])[None].repeat(2, 0),
        "known": np.isin(np.arange(29), range(18, 25)),
        "target": 21,
        "world_from_box": rigid_host.matrix(np.zeros(3), points[3]),
    }
    looks = {tuple(e[:3, 3]) + tuple(e[2, :3]): f for e, f in zip(E, found)}

    def look(model, image, valid, intrinsics, camera_from_world):
        same = upright.Upright(image, valid, intrinsics, camera_from_world, np.eye(2), np.zeros(2))
        return same, looks[tuple(camera_from_world[:3, 3]) + tuple(camera_from_world[2, :3])]

    monkeypatch.setattr(locate, "look", look)
    figures = scoring.score_localizer(model, [acquisition])
    assert (figures["levels"], figures["targets"]) == (10, 1)
    assert (figures["level_right"], figures["target_right"]) == wanted[::2]
    assert figures["centre_mm"] == pytest.approx(wanted[1], abs=0.7)
    assert figures["sure_and_wrong"] == (1.0 if wrong_level and figures["refused"] == 0 else 0.0)


@pytest.mark.slow
def test_a_localizer_is_made_adapted_and_used_end_to_end(patient_files, tmp_path):
    """Phantoms, then one of them as the patient, then a command on X-rays that it has not seen; nothing is made twice."""
    config = training.LocalizerTraining(bodies=2, held_out=1, count=1, steps=2, batch=2, crop_px=64)
    generic = localizer_files.read_localizer(
        training.make_generic_localizer(tmp_path / "generic", config, network.DetectorConfig())
    )
    assert generic.levels == tuple(range(16, 25)) and not generic.centres_ct
    made, ct, mask = patient_files
    path = training.make_patient_localizer(tmp_path / "patient", ct, mask, generic, config)
    patient = localizer_files.read_localizer(path)
    assert patient.levels == (20, 21, 22, 23, 24) == tuple(patient.centres_ct)
    for label, centre in patient.centres_ct.items():
        assert np.linalg.norm(centre - made.centroids[label]) < 25.0
    views = sorted(tmp_path.rglob("*.array_record"))
    before = {p: p.stat().st_mtime_ns for p in views}
    first = path.read_bytes()
    assert training.make_patient_localizer(tmp_path / "patient", ct, mask, generic, config).read_bytes() == first
    assert len(before) == 3 and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record")} == before
    cameras = tmp_path / "cameras.json"
    view = Camera(np.array([467.0, 467, 60, 60]), carm.extrinsics(0.0, 0.0, 700.0), 122, 122)
    files.write_json(cameras, [camera_files.camera_json(view, "AP")])
    np.save(tmp_path / "ap.npy", np.random.default_rng(0).normal(3.0, 1.0, (122, 122)).astype(np.float32))
    command = [sys.executable, "-m", "experiments.detect", "--do=find", f"--detector={path}", f"--cameras={cameras}"]
    command += [f"--xrays={tmp_path / 'ap.npy'}", "--label=21", f"--out={tmp_path / 'found.json'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "that level in two views" in done.stderr
    assert not (tmp_path / "found.json").exists()
