"""Sets of pairs: the truth in them, the same bytes however they were made, and batches."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny
from scipy.spatial.transform import Rotation

from data_pipelines import cases
from data_pipelines.pairs import build
from data_pipelines.pairs import examples
from data_pipelines.pairs import identity
from radgs_jax import errors
from radgs_jax import gaussians


def _simulated(stored, folder, labels=(21, 22), count=3, seed=4, on_done=lambda records: None, **changes):
    config = dataclasses.replace(tiny.config().pairs, **changes)
    vertebrae = [(identity.FileScan(*stored), label) for label in labels]
    return build.simulated_pairs(folder, vertebrae, count, seed, config, 400, 5, on_done=on_done)


@pytest.fixture(scope="module")
def pair_set(stored, tmp_path_factory):
    """Three pairs of each of two vertebrae."""
    return _simulated(stored, tmp_path_factory.mktemp("pairs"))


def _digests(pair_set):
    sources = pair_set.source, pair_set.moved, pair_set.vertebrae
    return [shard["sha256"] for source in sources for shard in source.manifest["shards"]]


def test_a_pair_is_a_function_of_seed_and_index(stored, pair_set):
    """Pairs made in another order equal those of the store, which were made in order."""
    _, ct, mask = stored
    digest = identity.scan_digest(ct, mask)
    which = examples.OfEach(examples.Vertebrae(((digest, 21), (digest, 22)), 400), 3, tiny.config().pairs)
    archive = identity.Archive({digest: identity.FileScan(*stored)})
    for index in (5, 0, 4, 1):
        pair = examples.simulated(which, 4, index, archive)
        assert set(pair) == {*examples.ARRAYS, "owner"} and pair["owner"] == index // 3
        for name, value in pair.items():
            np.testing.assert_array_equal(value, pair_set.source[index][name])
    other = examples.simulated(which, 5, 0, archive)
    assert np.abs(other["rest"].astype(float) - pair_set.source[0]["rest"]).max() > 0.1
    # Two poses share a rendering of the rest of the body, the third has another, and vertebrae share no random draws.
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
    monkeypatch.setattr(build, "SHARD_SIZE", 4)  # one vertebra of three pairs
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
    monkeypatch.setattr(build, "SHARD_SIZE", 4)
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
    with pytest.raises(errors.InputError, match="wanted T2 among them"):
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
            assert batch.excess.dtype == np.float16 and batch.rest.shape == (4, 2, 56, 56)
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
    # An `easy` X-ray shows the vertebra alone, so the measured image must match the target, to half a pixel or less.
    assert pair["valid"].mean() > 0.9
    assert np.corrcoef(pair["measured"].ravel().astype(float), pair["vertebra"].ravel().astype(float))[0, 1] > 0.995


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
