"""The pair store: the same records however they were made, the same batches however they are read, one line on damage."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.io import checksums
from data_pipelines.io import locks
from data_pipelines.pairs import codec
from data_pipelines.pairs import identity
from data_pipelines.pairs import loader as loaders
from data_pipelines.pairs import pair_store
from radgs_jax import errors

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of `example`."""

    shape: tuple = (2, 5, 7)
    scale: float = 1.5


@pair_store.named("test.example/1", "old.place.example")
def example(config, seed, index):
    """Arrays of several types; no two axes have the same length, so that transposed ones would be noticed."""
    rng = np.random.default_rng([seed, index])
    return {
        "xrays": (config.scale * rng.normal(size=config.shape)).astype(np.float16),
        "pose": rng.normal(size=(4, 4)),
        "camera": rng.normal(size=(2, 4)).astype(">f4"),
        "index": np.int32(index),
        "mask": rng.random(config.shape[1:]) < 0.5,
        "nothing": np.zeros((0, 3), np.float32),
    }


@pair_store.named("test.dies_once/1", "old.place.dies_once")
def dies_once(config, seed, index):
    """As `example`, but the process exits at example 11, unless a file shows that it did so before."""
    mark = pathlib.Path(os.environ["PAIR_STORE_TEST_MARK"])
    if index == 11 and not mark.exists():
        mark.touch()
        os._exit(9)
    return example(config, seed, index)


@pair_store.named("test.from_file/1", "old.place.from_file")
def from_file(config, seed, index, path):
    """An example from a file whose path is no part of the store's identity."""
    return {"value": np.frombuffer(path.read_bytes(), np.uint8)[index : index + 1] * config["factor"]}


@pair_store.named("test.fails_at_7/1", "old.place.fails_at_7")
def fails_at_7(config, seed, index):
    if index == 7:
        raise ZeroDivisionError("at 7")
    return example(config, seed, index)


@pair_store.named("test.uneven/1", "old.place.uneven")
def uneven(config, seed, index):
    made = example(config, seed, index)
    return {**made, "pose": made["pose"][: 3 if index == 6 else 4]}


@pair_store.named("test.training_pair/1", "old.place.training_pair")
def training_pair(config, seed, index):
    """Arrays like those of a stored pair: three float16 images of two views, and the cameras."""
    rng = np.random.default_rng([seed, index])
    blobs = rng.random((3, 2, 14, 14)).repeat(8, 2).repeat(8, 3)
    images = (blobs + 0.01 * rng.normal(size=blobs.shape)).astype(np.float16)
    cameras = {"intrinsics": np.zeros((2, 4), np.float32), "camera_from_world": np.zeros((2, 4, 4), np.float32)}
    return {"rest": images[0], "excess": images[1], "vertebra": images[2], **cameras, "world_from_box": np.eye(4)}


def shard_digests(source):
    return [shard["sha256"] for shard in source.manifest["shards"]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """23 examples in shards of 4."""
    return pair_store.write(tmp_path_factory.mktemp("store"), example, 23, Config(), 5, processes=1, shard_size=4)


def assert_is_example(found, index, seed=5):
    wanted = example(Config(), seed, index)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        value = np.asarray(value)
        assert found[name].dtype == value.dtype.newbyteorder("<") and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


def test_records_come_back_exactly_and_in_order(source):
    assert len(source) == 23
    for index in (22, 0, 3, 4, 11, np.int64(7)):
        assert_is_example(source[index], int(index))
    for index in (-1, 23):
        with pytest.raises(IndexError):
            source[index]
    assert_is_example(pair_store.open(source.folder)[9], 9)
    pair_store.verify(source)


def test_the_manifest_says_what_and_with_what(source):
    manifest = json.loads((source.folder / "manifest.json").read_text())
    assert manifest["config"] == {"shape": [2, 5, 7], "scale": 1.5} and manifest["seed"] == 5
    assert manifest["config_hash"] == identity.content_hash(Config(), pair_store.FORMAT)
    assert {"python", "numpy", "array_record"} <= set(manifest["versions"])
    assert manifest["example"] == "test.example/1" and manifest["arrays"]["xrays"] == {
        "dtype": "<f2",
        "shape": [2, 5, 7],
    }
    assert [shard["records"] for shard in manifest["shards"]] == [4, 4, 4, 4, 4, 3]


def test_two_processes_make_what_one_makes(source, tmp_path):
    done = []
    two = pair_store.write(tmp_path / "two", example, 23, Config(), 5, processes=2, shard_size=4, on_done=done.append)
    assert shard_digests(two) == shard_digests(source) and done == [4, 4, 4, 4, 4, 3]
    assert two.digest() == source.digest()


def test_where_files_lie_is_no_part_of_a_store(tmp_path):
    """The context reaches worker processes, and a store is found again with another context."""
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(bytes(range(8)))
    write = functools.partial(pair_store.write, tmp_path / "store", from_file, 8, {"factor": 2}, shard_size=4)
    made = write(processes=2, context=paths[0])
    assert [int(made[i]["value"][0]) for i in range(8)] == list(range(0, 16, 2))
    assert str(tmp_path) not in (made.folder / "manifest.json").read_text()
    assert write(processes=1, context=paths[1]).digest() == made.digest()


def test_two_hosts_make_what_one_makes(source, tmp_path):
    host = functools.partial(
        pair_store.write, tmp_path, example, 23, Config(), 5, processes=1, shard_size=4, process_count=2
    )
    assert host(process_index=1) is None
    with pytest.raises(errors.InputError, match="3 finished"):
        pair_store.open(tmp_path)
    assert shard_digests(host(process_index=0)) == shard_digests(source)


def test_records_do_not_depend_on_the_shards(source, tmp_path):
    other = pair_store.write(tmp_path, example, 23, Config(), 5, processes=1, shard_size=9)
    for index in range(23):
        assert_is_example(other[index], index)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    code = (
        "import test_pair_store as t\nfrom data_pipelines.pairs import pair_store\n"
        f"pair_store.write({str(tmp_path / 'store')!r}, t.dies_once, 23, t.Config(), 5, processes=1, shard_size=4)\n"
    )
    path = os.pathsep.join([str(REPOSITORY), str(pathlib.Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "PAIR_STORE_TEST_MARK": str(mark)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 9 and mark.exists()
    finished = sorted((tmp_path / "store").glob("examples-*"))
    assert [path.name[9:14] for path in finished] == ["00000", "00001"]
    times = [path.stat().st_mtime_ns for path in finished]
    with pytest.raises(errors.InputError, match=r"shards: found 2 finished, wanted all 6"):
        pair_store.open(tmp_path / "store")

    monkeypatch.setenv("PAIR_STORE_TEST_MARK", str(mark))
    resumed = pair_store.write(tmp_path / "store", dies_once, 23, Config(), 5, processes=1, shard_size=4)
    whole = pair_store.write(tmp_path / "whole", dies_once, 23, Config(), 5, processes=1, shard_size=4)
    assert shard_digests(resumed) == shard_digests(whole)
    assert [path.stat().st_mtime_ns for path in finished] == times  # kept, not rewritten
    assert not list((tmp_path / "store").glob(".*"))


def test_a_failing_example_leaves_whole_shards_only(tmp_path):
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        with pytest.raises(ZeroDivisionError, match="at 7"):
            pair_store.write(folder, fails_at_7, 12, Config(), 5, processes=processes, shard_size=4)
        assert not list(folder.glob(".*")) and not (folder / "examples-00001-of-00003.array_record").exists()
    with pytest.raises(ValueError, match="example 6"):
        pair_store.write(tmp_path / "uneven", uneven, 12, Config(), 5, processes=1, shard_size=4)
    with pytest.raises(ValueError, match="elsewhere"):
        pair_store.write(tmp_path / "shards", uneven, 12, Config(), 5, processes=1, shard_size=1)
    with pytest.raises(ValueError, match="array 'name'"):
        codec.Codec.of({"name": np.array(["text"])})


def test_another_store_is_refused_not_overwritten(source):
    again = functools.partial(pair_store.write, source.folder, processes=1)
    same = again(example, 23, Config(), 5, shard_size=4)
    assert same.digest() == source.digest()
    for call, part in (
        (lambda: again(example, 23, Config(scale=2.0), 5, shard_size=4), "config.scale: found 1.5, wanted 2.0"),
        (lambda: again(example, 23, Config(), 6, shard_size=4), "seed: found 5, wanted 6"),
        (lambda: again(example, 24, Config(), 5, shard_size=4), "count: found 23, wanted 24"),
        (lambda: again(uneven, 23, Config(), 5, shard_size=4), "example: found"),
    ):
        with pytest.raises(errors.InputError) as caught:
            call()
        assert part in str(caught.value) and "name another folder" in str(caught.value)
    assert_is_example(pair_store.open(source.folder)[3], 3)


def test_an_unfinished_store_goes_on_with_the_same_libraries_only(tmp_path, monkeypatch):
    begin = functools.partial(pair_store.write, tmp_path, example, 8, Config(), 5, processes=1, shard_size=4)
    begin(process_index=0, process_count=2)
    monkeypatch.setattr(pair_store, "_versions", lambda: {"python": "3.11.0", "numpy": "0.1"})
    with pytest.raises(errors.InputError, match=r"versions\."):
        begin()
    monkeypatch.undo()
    assert begin() is not None
    monkeypatch.setattr(pair_store, "_versions", lambda: {"python": "3.11.0", "numpy": "0.1"})
    assert_is_example(begin()[5], 5)  # a finished store may have been written with other versions


def edited(folder, change, sealed=checksums.sealed):
    """Changes a manifest and, by default, its checksum too, so that the checks behind that are met."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


SHARD = "examples-00001-of-00006.array_record"
DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: file"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "valid JSON"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "format: found list"),
    "other format": (lambda f: edited(f, lambda m: m.update(format="x/9")), "format: found x/9"),
    "no config": (lambda f: edited(f, lambda m: m.pop("config")), "config: found nothing"),
    "count as text": (lambda f: edited(f, lambda m: m.update(count="23")), "count: found 23"),
    "other count": (lambda f: edited(f, lambda m: m.update(count=99)), "shards: found 6"),
    "shards as text": (lambda f: edited(f, lambda m: m.update(shards="all")), "shards: found all"),
    "a path outside": (lambda f: edited(f, lambda m: m["shards"][1].update(file="../x")), "shards[1]"),
    "no size": (lambda f: edited(f, lambda m: m["shards"][1].pop("bytes")), "shards[1]"),
    "objects": (lambda f: edited(f, lambda m: m["arrays"]["pose"].update(dtype="O")), "arrays.pose"),
    "bad type": (lambda f: edited(f, lambda m: m["arrays"]["pose"].update(dtype="<f77")), "arrays.pose"),
    "bad shape": (lambda f: edited(f, lambda m: m["arrays"]["pose"].update(shape=[4, -4])), "arrays.pose"),
    "huge shape": (lambda f: edited(f, lambda m: m["arrays"]["pose"].update(shape=[10**9] * 3)), "an intact record"),
    "edited": (lambda f: edited(f, lambda m: m["arrays"]["xrays"].update(dtype="<i2"), dict), "manifest.json: sha256"),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD}: size: found no file"),
    "cut shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-70000]), f"{SHARD}: size"),
    "flipped bits": (lambda f: flip(f / SHARD), f"{SHARD}: example"),
    "shards swapped in": (lambda f: (f / SHARD).write_bytes(bytes((f / SHARD).stat().st_size)), f"{SHARD}: example"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    for place in range(100, 2000):
        content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line(kind, source, tmp_path):
    for path in source.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage, part = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(errors.InputError) as caught:
        opened = pair_store.open(tmp_path)
        for index in range(len(opened)):
            opened[index]
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_byte_is_found_by_its_digest(source, tmp_path):
    for path in source.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    flip(tmp_path / SHARD)
    with pytest.raises(errors.InputError, match="sha256"):
        pair_store.verify(pair_store.open(tmp_path))


def test_shards_without_a_manifest_are_not_adopted(source, tmp_path):
    (tmp_path / SHARD).write_bytes((source.folder / SHARD).read_bytes())
    with pytest.raises(errors.InputError, match="manifest: found none"):
        pair_store.write(tmp_path, example, 23, Config(scale=9.0), 5, processes=1, shard_size=4)


def indices(loader, steps):
    return [next(loader)["index"].tolist() for _ in range(steps)]


def test_batches_are_a_function_of_seed_and_step(source):
    one, again, other = (loaders.Loader(source, seed, 6, workers=n) for seed, n in ((3, 1), (3, 3), (4, 1)))
    first = indices(one, 23)
    assert indices(again, 23) == first != indices(other, 23)
    batch = next(one)
    assert batch["xrays"].shape == (6, 2, 5, 7) and batch["xrays"].dtype == np.float16
    for row, index in enumerate(batch["index"]):
        assert_is_example({name: value[row] for name, value in batch.items()}, int(index))
    # 23 batches of 6 are 6 epochs: each shows every example once, in an order of its own.
    epochs = np.reshape(first, (6, 23))
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


def test_seeds_do_not_share_epochs(source):
    epochs = [tuple(epoch) for seed in range(3) for epoch in indices(loaders.Loader(source, seed, 23), 3)]
    assert len(set(epochs)) == 9


def test_processes_share_every_batch_without_overlap(source):
    whole = indices(loaders.Loader(source, 3, 6), 23)
    for count in (2, 3):
        parts = [indices(loaders.Loader(source, 3, 6, p, count), 23) for p in range(count)]
        for step, batch in enumerate(whole):
            shares = [parts[p][step] for p in range(count)]
            # In the order of the whole batch, by which random numbers belong to examples.
            assert sum(shares, []) == batch and len({len(share) for share in shares}) == 1
    with pytest.raises(ValueError, match="divide"):
        loaders.Loader(source, 3, 6, 0, 4)
    with pytest.raises(ValueError, match="process 2 of 2"):
        loaders.Loader(source, 3, 6, 2, 2)


def test_an_iterator_goes_on_from_its_state(source):
    loader = loaders.Loader(source, 3, 6)
    indices(loader, 9)
    state = json.loads(json.dumps(loader.get_state()))
    assert state["step"] == 9
    wanted = indices(loader, 5)
    fresh = loaders.Loader(source, 3, 6, workers=1)
    indices(fresh, 2)
    fresh.set_state(state)
    assert fresh.get_state() == state and indices(fresh, 5) == wanted
    halves = [loaders.Loader(source, 3, 6, p, 2) for p in range(2)]
    for half in halves:
        half.set_state(state)
    rows = [indices(half, 5) for half in halves]
    assert [a + b for a, b in zip(*rows)] == wanted
    loader.set_state({**state, "step": 0})
    assert indices(loader, 1) == indices(loaders.Loader(source, 3, 6), 1)


def test_the_state_lives_in_an_orbax_checkpoint(source, tmp_path):
    from orbax.checkpoint import v1 as ocp

    loader = loaders.Loader(source, 3, 6)
    indices(loader, 4)
    params = {"w": np.arange(3.0)}
    ocp.save_pytree(tmp_path / "step_4", params, custom_metadata={"loader": loader.get_state()})
    wanted = indices(loader, 3)
    fresh = loaders.Loader(source, 3, 6)
    fresh.set_state(ocp.metadata(tmp_path / "step_4").custom_metadata["loader"])
    assert indices(fresh, 3) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"batch": 12},
        {"store": "0" * 16},
        {"step": -1},
        {"step": "7"},
        {"step": True},
        {"format": "x"},
        {"more": 1},
    ],
)
def test_a_state_of_something_else_is_refused(source, change):
    loader = loaders.Loader(source, 3, 6)
    with pytest.raises(errors.InputError, match="loader state"):
        loader.set_state({**loader.get_state(), **change})
    with pytest.raises(errors.InputError, match="loader state"):
        loader.set_state(None)


def test_the_loader_outruns_a_training_step(tmp_path):
    """A step of the demo takes 8 to 16 pairs 2 to 5 times a second, at most 80 pairs a second; it must not wait for them."""
    source = pair_store.write(tmp_path, training_pair, 96, {}, 0, processes=1, shard_size=32)
    loader = loaders.Loader(source, 0, 16)
    alone = loaders.throughput(loader, 20)
    assert alone["examples_per_s"] > 2 * 80, alone

    matrix = np.ones((500, 500), np.float32)

    def step(batch):  # keeps the cores busy, as a training step does
        for _ in range(6):
            matrix @ matrix

    busy = loaders.throughput(loader, 10, step)
    assert busy["waiting_share"] < 0.2, busy


def test_a_store_that_names_its_maker_by_an_alias_goes_on(tmp_path):
    """Manifests that name the maker by its old module path are accepted, finished or not."""
    begin = functools.partial(pair_store.write, tmp_path, example, 8, Config(), 5, processes=1, shard_size=4)
    for finished in (False, True):
        begin(process_count=1 if finished else 2)
        # Such manifests are older than their checksums.
        edited(tmp_path, lambda m: (m.update(example="old.place.example"), m.pop("sha256")), dict)
        assert begin() is not None
    edited(tmp_path, lambda m: m.update(example="another.maker"))
    with pytest.raises(errors.InputError, match="example"):
        begin()


def test_an_older_store_without_a_checksum_is_checked_whole(source, tmp_path, caplog):
    for path in source.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edited(tmp_path, lambda m: m.pop("sha256"), dict)
    assert_is_example(pair_store.open(tmp_path)[9], 9)
    assert "no checksum of the manifest" in caplog.text
    content = bytearray((tmp_path / SHARD).read_bytes())
    content[-1] ^= 1
    (tmp_path / SHARD).write_bytes(content)
    with pytest.raises(errors.InputError, match=f"{SHARD}: sha256: found"):
        pair_store.open(tmp_path)


def test_a_second_process_in_a_store_is_told_so(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    with locks.hold(folder / ".lock-0-of-1", folder):
        with pytest.raises(errors.InputError, match="found one in use by process .* wanted one that no other run"):
            pair_store.write(folder, example, 8, Config(), 5, processes=1, shard_size=4)
    assert len(pair_store.write(folder, example, 8, Config(), 5, processes=1, shard_size=4)) == 8
    assert not list(folder.glob(".*"))
    with locks.hold(folder / ".lock-0-of-1", folder):  # a finished store is only read
        assert len(pair_store.write(folder, example, 8, Config(), 5, processes=1, shard_size=4)) == 8
