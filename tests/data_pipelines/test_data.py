"""Files, scans, vertebrae, cases and pairs: round trips, the C-arm's conventions, and one clear line on bad input."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import nibabel
import numpy as np
import pytest
import tiny
from scipy.spatial.transform import Rotation

from data_pipelines import cases
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.pairs import build
from data_pipelines.pairs import examples
from data_pipelines.pairs import identity
from data_pipelines.phantom import generate
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import carm
from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax import gaussians
from radgs_jax import metrics
from radgs_jax.geometry import resample
from radgs_jax.geometry import rigid


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A coarse phantom on disk, stored PIR: (subject, ct, mask)."""
    return scan_files.phantoms(tmp_path_factory.mktemp("scans"), [30002], tiny.config().phantom)[0]


@pytest.fixture(scope="module")
def scan(stored):
    return scans.read_scan(stored[1], stored[2], stored[0])


@pytest.fixture(scope="module")
def case_path(stored, tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases.json"
    return case_files.simulated_cases(path, [stored], (21,), 1, ((0, 5), (20, 25)), 5, quick.PanelFaults())


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
    """With everything at one pose the X-ray of the parts is the X-ray of the scan, but for the softened fill."""
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


def test_the_body_goes_on_where_the_scan_stops(scan):
    """A last block that the scan fills only in part carries on at the end slice's attenuation, not thinned by air."""
    odd = scan.hu.shape[2] - 1 + scan.hu.shape[2] % 2
    cut = dataclasses.replace(scan, hu=scan.hu[:, :, :odd], labels=scan.labels[:, :, :odd])
    vertebra = extraction.extract(scan, 22, 64)
    mu = whole_body.WholeBody(cut, 6.0).without(vertebra)
    end = np.repeat(attenuation.from_hounsfield(cut.hu[:, :, -1:]), 2, 2)
    end, _ = resample.block_average(end, cut.ct_from_index, 6.0)
    assert odd % 2 == 1 and end.shape == (*mu.shape[:2], 1)
    np.testing.assert_allclose(mu[:, :, -1:], end, atol=1e-7)


def test_a_cut_vertebra_an_absent_label_and_a_mask_over_air_are_refused(scan):
    with pytest.raises(errors.InputError, match="mask: label: found .* wanted 9 among them"):
        extraction.extract(scan, 9, 64)
    top = np.argwhere(scan.labels == 22)[:, 2].max()
    cut = dataclasses.replace(scan, hu=scan.hu[:, :, :top], labels=scan.labels[:, :, :top])
    with pytest.raises(errors.InputError, match="touches the scan's border on axis 2"):
        extraction.extract(cut, 22, 64)
    air = dataclasses.replace(scan, hu=np.full_like(scan.hu, -1000.0))
    with pytest.raises(errors.InputError, match=r"mask: label 22 \(L3\): found a mask over nothing but air, wanted"):
        extraction.extract(air, 22, 64)


def test_carm_angles_are_those_of_the_convention():
    """At 0, 0 the beam runs to posterior, columns to the patient's left, rows to the feet; at 90 the source is on the left."""
    ap, lateral = carm.extrinsics(0, 0, 700.0), carm.extrinsics(90, 0, 700.0)
    np.testing.assert_allclose(ap[:3, :3], [[-1, 0, 0], [0, 0, -1], [0, -1, 0]], atol=1e-12)
    np.testing.assert_allclose(lateral[:3, :3], [[0, -1, 0], [0, 0, -1], [1, 0, 0]], atol=1e-12)
    tilted = carm.extrinsics(-10.01, 3.507, 700.0)
    np.testing.assert_allclose(tilted[2, :3], [-0.17349, -0.98293, -0.06117], atol=1e-4)
    source = -tilted[:3, :3].T @ tilted[:3, 3]
    np.testing.assert_allclose(np.linalg.norm(source), 700.0)


def test_start_poses_have_the_wanted_mtre():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 3)) * [20, 15, 10] + [-22, -50, -285]
    truth = carm.sample_world_from_ct(rng, points.mean(0))
    for wanted in (0.5, 7.0, 24.0) * 10:
        start = carm.start_of_mtre(rng, truth, points.mean(0), points, wanted)
        assert abs(metrics.mtre(points, start, truth) - wanted) < 0.02
        assert rigid.rotation_angle(start[:3, :3], truth[:3, :3]) < np.radians(25.0) + 1e-5


def test_case_file_round_trip(case_path, stored):
    case_file = cases.read(case_path)
    assert [c.name[-2:] for c in case_file.cases] == ["b0", "b1"]
    scene = next(iter(case_file.scenes.values()))
    xrays = cases.read_xrays(scene, "real")
    assert [x.camera for x in xrays] == list(scene.cameras) and all(x.valid.all() for x in xrays)
    assert len(xrays) == 2 and xrays[0].line_integrals.shape == (scene.cameras[0].height, scene.cameras[0].width)
    points = case_file.raw["volumes"][scene.volume]["points"]
    for case, (low, high) in zip(case_file.cases, ((0, 5), (20, 25))):
        assert low <= metrics.mtre(points, case.world_from_ct, cases.truth(case_file, scene)) <= high
    assert case_file.volumes[scene.volume].full_ct.resolve() == pathlib.Path(stored[1]).resolve()
    easy, full = cases.read_xrays(scene, "easy"), cases.read_xrays(scene, "full")
    assert all((f.line_integrals >= e.line_integrals - 0.05).all() for e, f in zip(easy, full))


def test_projection_alone_decomposes_into_the_same_camera(case_path):
    document = files.read_json(case_path)
    view = document["scenes"][0]["views"][0]
    with_both = camera_files.read_view("f", "v", view)
    for scale in (1.0, -3.0):
        alone = camera_files.read_view(
            "f", "v", {"P": (scale * np.array(view["P"])).tolist(), "height": 244, "width": 244}
        )
        np.testing.assert_allclose(alone.intrinsics, with_both.intrinsics, rtol=1e-9)
        np.testing.assert_allclose(alone.camera_from_world, with_both.camera_from_world, atol=1e-7)


def _broken(document, change):
    value = json.loads(json.dumps(document))
    change(value)
    return value


BROKEN = {
    "format": (lambda d: d.update(format="x/2"), "format: found 'x/2'"),
    "no volumes": (lambda d: d.pop("volumes"), "file.volumes: found nothing"),
    "label type": (
        lambda d: next(iter(d["volumes"].values())).update(full_label="20"),
        "full_label: found '20', wanted a int",
    ),
    "scene volume": (lambda d: d["scenes"][0].update(volume="v"), r"scenes\[0\].volume: found 'v'"),
    "start not rigid": (lambda d: d["cases"][0]["T_init"][0].__setitem__(0, 2.0), r"cases\[0\].T_init: found a matrix"),
    "start with nan": (
        lambda d: d["cases"][0]["T_init"][0].__setitem__(0, float("nan")),
        "T_init: found values that are not finite",
    ),
    "start shape": (lambda d: d["cases"][0].update(T_init=[[1, 0], [0, 1]]), r"T_init: found shape \(2, 2\)"),
    "skewed K": (lambda d: d["scenes"][0]["views"][0]["K"][0].__setitem__(1, 5.0), r"views\[0\].K"),
    "view without camera": (lambda d: d["scenes"][0]["views"][0].clear(), r"views\[0\]: found {}"),
    "size": (lambda d: d["scenes"][0]["views"][1].update(height=-4), "height, width"),
    "scene twice": (lambda d: d["scenes"].append(d["scenes"][0]), r"scenes\[1\].id: found '.*' a second time"),
    "case twice": (lambda d: d["cases"].append(d["cases"][0]), r"cases\[2\].id: found '.*' a second time"),
    "case scene": (lambda d: d["cases"][0].update(scene="s"), r"cases\[0\].scene: found 's'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_case_files_are_one_clear_line(case_path, tmp_path, name):
    change, message = BROKEN[name]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(_broken(files.read_json(case_path), change)))
    with pytest.raises(errors.InputError, match=message) as caught:
        cases.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_points_are_wanted_for_scoring_only(case_path, tmp_path):
    name = next(iter(cases.read(case_path).volumes))
    assert cases.points(cases.read(case_path), name).shape == (500, 3)
    for value in ({}, {"points": []}, {"points": [[1, 2]]}, {"points": "x"}):
        document = files.read_json(case_path)
        del document["volumes"][name]["points"]
        document["volumes"][name].update(value)
        files.write_json(tmp_path / "cases.json", document)
        read = cases.read(tmp_path / "cases.json")
        with pytest.raises(errors.InputError, match=f"cases.json: volumes.{name}.points: found .*, wanted"):
            cases.points(read, name)


def test_an_unknown_variant_is_refused_before_anything_is_written(stored, tmp_path):
    with pytest.raises(ValueError, match="variants: found 'hard', wanted some of easy, full, artic, real"):
        case_files.simulated_cases(
            tmp_path / "c.json", [stored], (21,), 1, ((0, 5),), 5, quick.PanelFaults(), ("real", "hard")
        )
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_json_cannot_say_has_no_digest():
    config = tiny.config()
    assert (
        identity.config_hash(config) == identity.config_hash(tiny.config()) != identity.config_hash(tiny.config(seed=1))
    )
    assert (
        identity.config_hash(config, 1)
        != identity.config_hash(config)
        != identity.content_hash([dataclasses.asdict(config)], "another")
    )
    with pytest.raises(TypeError):
        identity.config_hash(pathlib.Path("x"))
    with pytest.raises(ValueError):
        identity.config_hash(float("nan"))


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


def test_xrays_must_fit_their_views(case_path, tmp_path):
    scene = next(iter(cases.read(case_path).scenes.values()))
    stack = files.read_npz(scene.xrays, "real")["real"]
    bad = {"shape": stack[:, :-1], "views": stack[:1], "nan": np.where(np.arange(stack.shape[2]) == 3, np.nan, stack)}
    messages = {
        "shape": r"'real'\[0\]: shape: found \(243, 244\), wanted \(244, 244\)",
        "views": r"wanted \(2, height, width\)",
        "nan": "488|pixels that are not finite",
    }
    for name, array in bad.items():
        files.write_npz(tmp_path / f"{name}.npz", real=array)
        with pytest.raises(errors.InputError, match=messages[name]):
            cases.read_xrays(dataclasses.replace(scene, xrays=tmp_path / f"{name}.npz"), "real")


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "a.json"
    with pytest.raises(ValueError), files.replacing(target) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def _simulated(stored, folder, labels=(21, 22), count=3, seed=4, on_done=lambda records: None, **changes):
    config = dataclasses.replace(tiny.config().pairs, **changes)
    vertebrae = [(*stored, label) for label in labels]
    return build.simulated_pairs(folder, vertebrae, count, seed, config, 400, 5, on_done=on_done)


@pytest.fixture(scope="module")
def pair_set(stored, tmp_path_factory):
    """Three pairs of each of two vertebrae."""
    return _simulated(stored, tmp_path_factory.mktemp("pairs"))


def _digests(pair_set):
    sources = pair_set.source, pair_set.moved, pair_set.vertebrae
    return [shard["sha256"] for source in sources for shard in source.manifest["shards"]]


def test_a_bent_scene_shows_the_vertebra_at_its_true_pose(stored, tmp_path):
    """Edges of the vertebra, projected at T_gt, are where the X-rays have edges; 5 mm off they are not."""
    path = case_files.simulated_cases(
        tmp_path / "bent.json", [stored], (21,), 1, ((0, 5),), 3, quick.PanelFaults(), posture="bent"
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


def test_a_pair_is_a_function_of_seed_and_index(stored, pair_set):
    """Whatever was made before it: the last first, then all of them, against the store that was written in order."""
    subject, ct, mask = stored
    digest = identity.scan_digest(ct, mask)
    which = examples.OfEach(examples.Vertebrae(((digest, 21), (digest, 22)), 400), 3, tiny.config().pairs)
    archive = identity.Archive({digest: (subject, ct, mask, None)})
    for index in (5, 0, 4, 1):
        pair = examples.simulated(which, 4, index, archive)
        assert set(pair) == {*examples.ARRAYS, "owner"} and pair["owner"] == index // 3
        for name, value in pair.items():
            np.testing.assert_array_equal(value, pair_set.source[index][name])
    other = examples.simulated(which, 5, 0, archive)
    assert np.abs(other["rest"].astype(float) - pair_set.source[0]["rest"]).max() > 0.1
    # The two poses of a rendering share the rest of the body, the third does not, and no two vertebrae share draws.
    same = lambda i, j, name: np.array_equal(pair_set.source[i][name], pair_set.source[j][name])
    assert same(0, 1, "rest") and not same(0, 1, "excess") and not same(1, 2, "rest") and not same(0, 3, "intrinsics")
    assert pair["simulated"] and not same(0, 1, "measured") and pair["valid"].dtype == bool


def test_ct_pairs_are_poses_within_their_ranges(pair_set):
    motions = np.stack([pair_set.moved[index]["motion"] for index in range(10)])
    assert [int(pair_set.moved[index]["owner"]) for index in range(10)] == [0] * 5 + [1] * 5
    R = motions[:, :3, :3]
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.tile(np.eye(3), (10, 1, 1)), atol=1e-5)
    shift = np.abs(motions[:, :3, 3])
    assert shift.max() < 25.0 and len(np.unique(shift)) == 30
    config = examples.PairConfig(ct_near=0.0, ct_shift_mm=50.0)
    which = examples.OfEach(examples.Vertebrae((("a", 20),), 8), 2000, config)
    wide = np.stack([examples.moved(which, 0, index, None)["motion"] for index in range(2000)])
    np.testing.assert_allclose(np.abs(wide[:, :3, 3]).mean(0), 25.0, rtol=0.06)  # uniform in +-50 mm
    turn = np.degrees(np.linalg.norm(Rotation.from_matrix(wide[:, :3, :3]).as_rotvec(), axis=1))
    assert 30.0 < turn.max() < 20.0 * np.sqrt(3)


def test_pairs_carry_the_truth(pair_set):
    for index in (0, 5):
        pair, vertebra = pair_set.source[index], pair_set.vertebrae[index // 3]
        assert vertebra["label"] == (21, 22)[index // 3]
        cloud = gaussians.Gaussians(*(vertebra[name] for name in examples.CLOUD))
        camera_from_box = pair["camera_from_world"] @ pair["world_from_box"]
        size = pair["rest"].shape[1:]
        image = gaussians.project(gaussians.views(cloud, 2), camera_from_box, pair["intrinsics"], *size)
        assert np.corrcoef(np.ravel(image), pair["vertebra"].astype(float).ravel())[0, 1] > 0.97
    shapes = pair_set.mean_shapes()
    assert set(shapes) == {0, 21, 22}
    np.testing.assert_array_equal(shapes[22], pair_set.vertebrae[1]["shape"])
    both = 0.5 * (shapes[21].astype(float) + shapes[22].astype(float))
    np.testing.assert_allclose(shapes[0].astype(float), both, atol=1e-4)


def test_interrupted_pairs_go_on_to_the_same_bytes(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "A_SHARD", 4)  # one vertebra of three pairs
    whole = _simulated(stored, tmp_path / "whole")

    class Stopped(Exception):
        pass

    done = []

    def stop(records):
        done.append(records)
        if len(done) == 4:  # two vertebrae, the CT pairs and the first of two shards
            raise Stopped

    with pytest.raises(Stopped):
        _simulated(stored, tmp_path / "again", on_done=stop)
    assert len(list((tmp_path / "again").glob("*/pairs/examples-*"))) == 1
    done.clear()
    again = _simulated(stored, tmp_path / "again", on_done=done.append)
    assert _digests(again) == _digests(whole) and sum(done) == 2 + 10 + 6
    assert len(list((tmp_path / "again").iterdir())) == 1


def test_worker_processes_make_the_same_pairs(stored, pair_set, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_workers", lambda count: 2 if count > 2 else 1)
    monkeypatch.setattr(build, "A_SHARD", 4)
    made = _simulated(stored, tmp_path)
    assert len(made.source.manifest["shards"]) == 2 and len(made) == 6
    for index in range(6):
        for name, value in pair_set.source[index].items():
            np.testing.assert_array_equal(made.source[index][name], value)


def test_another_set_of_pairs_gets_another_folder_and_a_moved_scan_none(stored, pair_set, tmp_path):
    folder = pair_set.source.folder.parent.parent
    before = set(folder.iterdir())
    moved = [tmp_path / pathlib.Path(path).name for path in stored[1:]]
    for old, new in zip(stored[1:], moved):
        new.write_bytes(pathlib.Path(old).read_bytes())
    same = _simulated(("someone", *moved), folder)
    assert same.source.folder == pair_set.source.folder and set(folder.iterdir()) == before
    for changes in (dict(seed=5), dict(count=2), dict(labels=(22, 21)), dict(poses=1)):
        assert _simulated(stored, folder, **changes).source.folder not in {p / "pairs" for p in before}, changes
    assert len(set(folder.iterdir())) == len(before) + 4


def test_a_cut_record_file_is_one_clear_line(stored, tmp_path):
    made = _simulated(stored, tmp_path, labels=(21,), count=2)
    shard = next(made.source.folder.glob("examples-*"))
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(errors.InputError, match=f"{shard.name}: size: found .* bytes, wanted") as caught:
        _simulated(stored, tmp_path, labels=(21,), count=2)
    assert "\n" not in str(caught.value)


def test_a_cut_vertebra_is_found_before_any_pair_is_made(stored, tmp_path):
    with pytest.raises(errors.InputError, match="wanted 9 among them"):
        _simulated(stored, tmp_path, labels=(21, 9))
    assert not list(tmp_path.glob("*/pairs"))


def test_batches_join_pairs_with_their_vertebrae_and_go_on_from_a_place(pair_set):
    def take(batches, count):
        return [next(batches) for _ in range(count)]

    with contextlib.closing(pair_set.batches(3, 4)) as batches:
        first = take(batches, 3)
        place = json.loads(json.dumps(batches.get_state()))
        wanted = take(batches, 2)
    stored = [pair_set.source[index] for index in range(len(pair_set))]
    drawn = []
    for batch in first:
        for row in range(4):
            index = next(i for i, pair in enumerate(stored) if np.array_equal(pair["excess"], batch.excess[row]))
            assert batch.excess.dtype == np.float32 and batch.rest.shape == (4, 2, 56, 56)
            np.testing.assert_array_equal(batch.world_from_box[row], stored[index]["world_from_box"])
            np.testing.assert_array_equal(batch.cloud.mean[row], pair_set.vertebrae[index // 3]["mean"])
            drawn.append(index)
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))  # two epochs in three batches
    with contextlib.closing(pair_set.batches(3, 4)) as batches:
        batches.set_state(place)
        jax.tree.map(np.testing.assert_array_equal, take(batches, 2), wanted)


def test_pairs_from_real_cases_are_centred_on_the_vertebra(case_path, tmp_path):
    case_file = cases.read(case_path)
    tiny_pairs = tiny.config().pairs
    config = dataclasses.replace(tiny_pairs, geometry=dataclasses.replace(tiny_pairs.geometry, window=40))
    made = build.measured_pairs(tmp_path, case_file, list(case_file.scenes), "easy", config, 64, 3.0)
    assert len(made) == 1 and len(made.vertebrae) == 1
    pair = made.source[0]
    assert pair["measured"].shape == (2, 40, 40) and not pair["simulated"] and (pair["excess"] == 0).all()
    for k, E in zip(pair["intrinsics"], pair["camera_from_world"]):
        p = (E @ pair["world_from_box"])[:3, 3]
        assert np.abs(k[:2] * p[:2] / p[2] + k[2:] - 20).max() <= 0.51
    # The `easy` X-ray shows the vertebra alone, so the measured image and the target must be one, to half a pixel and less.
    assert pair["valid"].mean() > 0.9
    assert np.corrcoef(pair["measured"].ravel().astype(float), pair["vertebra"].ravel().astype(float))[0, 1] > 0.995


def test_degraded_xrays_keep_their_content(scan):
    rng = np.random.default_rng(0)
    ideal = np.asarray(rng.uniform(1, 3, (2, 8, 8)).repeat(8, 1).repeat(8, 2), np.float32)
    real = quick.degrade(ideal, np.random.default_rng(1), quick.PanelFaults())
    assert real.shape == ideal.shape and np.isfinite(real).all()
    assert np.corrcoef(real.ravel(), ideal.ravel())[0, 1] > 0.9 and np.abs(real - ideal).mean() > 0.05
    np.testing.assert_array_equal(real, quick.degrade(ideal, np.random.default_rng(1), quick.PanelFaults()))
    off = quick.PanelFaults(photons=0, hardening=0, scatter=0, blur_px=0, gain_ramp=0, air=0)
    np.testing.assert_allclose(quick.degrade(ideal, np.random.default_rng(1), off), ideal, atol=1e-4)
