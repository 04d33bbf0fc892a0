"""The training loop: models replaced while it is stopped, transfers to the device, steps that are not finite."""

import functools
import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from data_pipelines.io import files
from experiments.patients.models import load_model
from experiments.patients.models import model_exists
from experiments.patients.models import model_hash
from experiments.patients.models import save_model
from experiments.runtime import progress
from experiments.training import checkpoint
from experiments.training import loop
from radgs_jax.models import radgs_reg
from radgs_jax.models import trained
from radgs_jax.training import sharding
from radgs_jax.training.update import cosine
from radgs_jax.training.update import result_of
from radgs_jax.training.update import state_of
from radgs_jax.training.update import update_of
from radgs_jax.training.update import UpdateConfig

WIDTH = 3


class Stopped(BaseException):
    """Simulates the end of the process: only the test catches it."""


@pytest.fixture(scope="module")
def models():
    """An old model and a new one: {note: `trained.Model`}."""
    params = jax.device_get(jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(3)))
    shapes = {0: np.zeros(trained.MEAN_SHAPE, np.float16)}
    other = jax.tree.map(lambda a: a + 1, params)
    return {"old": trained.Model(params, tiny.MODEL, shapes), "new": trained.Model(other, tiny.MODEL, shapes)}


def _stop_at(monkeypatch, folder, when):
    """Makes renaming and deleting in `folder` end the process at step `when` // 2, before it or (odd `when`) half-way through."""
    number, half = divmod(when, 2)
    taken, rename, rmtree = [], pathlib.Path.rename, shutil.rmtree

    def step(do, do_half):
        taken.append(do)
        if len(taken) == number + 1:
            if half:
                do_half()
            raise Stopped
        return do()

    def renamed(self, target):
        do = functools.partial(rename, self, target)
        return step(do, do) if self.parent == folder else do()

    def removed(path, *args, **options):
        do = functools.partial(rmtree, path, *args, **options)
        half = lambda: (pathlib.Path(path) / "manifest.json").unlink(missing_ok=True)
        return step(do, half) if pathlib.Path(path).parent == folder else do()

    monkeypatch.setattr(pathlib.Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return taken


def _whole(folder, models):
    """The note of the model found in `folder`; asserts that the model is complete and equal to that of the note."""
    assert model_exists(folder)
    aside = folder.with_name(".model.replaced")
    for place in (aside, folder) if aside.exists() else (folder,):
        found = model_hash(load_model(place))
        assert found in map(model_hash, models.values())
    notes = [note for note, model in models.items() if model_hash(model) == found]
    assert len(notes) == 1
    return notes[0]


@pytest.mark.long
def test_wherever_a_model_is_replaced_there_is_one(models, tmp_path):
    """The process ends before, and half-way through, each of the steps that take the old model away."""
    folder, found, when = tmp_path / "model", [], 0
    assert not model_exists(folder)
    while True:
        save_model(folder, models["old"], "old")
        assert _whole(folder, models) == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]
        with pytest.MonkeyPatch.context() as patch:
            taken = _stop_at(patch, tmp_path, when)
            try:
                save_model(folder, models["new"], "new")
            except Stopped:
                pass
        found.append(_whole(folder, models))
        if len(taken) <= when // 2:
            break
        when += 1
    assert found == sorted(found, key=["old", "new"].index) and set(found) == {"old", "new"}
    assert when >= 8


@pytest.mark.long
@pytest.mark.parametrize("first", [3, 5])
def test_a_replacement_that_is_stopped_twice_leaves_a_model_too(models, tmp_path, first):
    """The first time with the old model set aside, before and after the new one is there; the second stop at each step."""
    folder = tmp_path / "model"
    for second in range(1, 16, 2):
        save_model(folder, models["old"], "old")
        for when in (first, second):
            with pytest.MonkeyPatch.context() as patch:
                _stop_at(patch, tmp_path, when)
                try:
                    save_model(folder, models["new"], "new")
                except Stopped:
                    pass
            assert model_exists(folder)
    _whole(folder, models)
    save_model(folder, models["new"], "new")
    assert files.read_json(folder / "manifest.json")["note"] == "new"
    assert _whole(folder, models) == "new" and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_learning_rate_asks_no_device():
    with jax.transfer_guard("disallow"):
        found = [cosine(step, 1000, 2e-3) for step in range(0, 1001, 7)]
    cosines = np.cos(np.pi * np.minimum(1.0, np.arange(0, 1001, 7) / 1000), dtype=np.float32)
    wanted = 2e-3 * np.minimum(1.0, (np.arange(0, 1001, 7) + 1) / 50) * 0.5 * (1.0 + cosines)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-3 * np.finfo(np.float32).eps)
    assert cosine(49, 100, 1.0) == 0.5 * (1.0 + math.cos(0.49 * math.pi)) and cosine(9, 0, 1.0) == 0.0


class Batches:
    """Endless batches of noise, batch n a function of n; those in `bad` make every gradient non-finite."""

    def __init__(self, bad=()):
        self.place, self.bad = 0, set(bad)

    def __next__(self):
        self.place += 1
        batch = np.random.default_rng(self.place).normal(size=(2, WIDTH)).astype(np.float32)
        return np.where(self.place - 1 in self.bad, np.float32(np.nan), batch)

    def get_state(self):
        return {"step": self.place}

    def set_state(self, place):
        self.place = place["step"]


def _objective(params, key, batch):
    miss = params["plain"] - batch - 0.1 * jax.random.normal(key, (WIDTH,))
    return jnp.mean(miss**2), {"largest": jnp.max(jnp.abs(miss))}


@pytest.fixture(scope="module")
def update():
    return update_of(sharding.make_mesh(), _objective, ("plain",))


@pytest.fixture
def scalars(monkeypatch):
    """[(step, scalars)] as they are logged."""
    found = []
    monkeypatch.setattr(progress.Log, "scalars", lambda self, step, values: found.append((step, values)))
    return found


def _state():
    return sharding.made(sharding.make_mesh(), lambda: state_of({"plain": jnp.arange(3.0)}, ("plain",)))


def _train(folder, update, batches, steps, checkpoint_seconds=1e9, guard="allow", trace_steps=0):
    state, key = _state(), jax.random.key(5)
    with jax.transfer_guard(guard):
        return loop.run_steps(
            folder / "stage",
            folder,
            sharding.make_mesh(),
            state,
            update,
            batches,
            key=key,
            rate=lambda step: cosine(step, 100, 1e-2),
            steps=steps,
            checkpoint_seconds=checkpoint_seconds,
            trace_steps=trace_steps,
        )


def test_a_step_moves_nothing_to_or_from_the_device_by_itself(update, scalars, tmp_path, monkeypatch):
    """Metrics are fetched only where they are logged. Single numbers, which a CPU's guard lets pass, are refused here."""
    wanted = _train(tmp_path / "free", update, Batches(), 23)
    batches, asked, device_get = Batches(), set(), jax.device_get

    def get(values):
        asked.add(batches.place)
        return device_get(values)

    def refuse(self):
        raise AssertionError("a number that is waited for")

    monkeypatch.setattr(jax, "device_get", get)
    for name in ("__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(type(jnp.zeros(())), name, refuse)
    for steps in (13, 23):
        state = _train(tmp_path, update, batches, steps, guard="disallow")
    assert asked <= {0, 10, 13, 20, 23}
    assert [step for step, _ in scalars] == [10, 20, 23, 10, 13, 20, 23]
    jax.tree.map(np.testing.assert_array_equal, device_get(state), device_get(wanted))


def test_a_loop_is_the_update_step_by_step(update, tmp_path):
    """Placing the key and the learning rate beforehand changes no bit."""
    state, batches, key = _state(), Batches(), jax.random.key(5)
    for step in range(12):
        rate = np.float32(cosine(step, 100, 1e-2))
        state, _ = update(state, jax.random.fold_in(key, step), rate, jnp.asarray(next(batches)))
    looped = _train(tmp_path, update, Batches(), 12)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(looped), jax.device_get(state))


def test_one_compilation_serves_the_timed_steps_and_the_loop(tmp_path, compilations):
    mesh, batches = sharding.make_mesh(), Batches()
    batches.close = lambda: None
    update = update_of(mesh, _objective, ("plain",))
    options = {"seed": 5, "learning_rate": 1e-2, "checkpoint_seconds": 1e9, "budget_s": 0.0}
    loop.scheduled(tmp_path / "stage", tmp_path, mesh, _state(), update, batches, **options)
    assert [made["fun_name"] for made in compilations].count("jit(step)") == 1


def test_skipped_steps_are_counted_and_change_nothing(update, scalars, tmp_path):
    bad = {3, 4, 11, *range(30, 39)}
    _train(tmp_path, update, Batches(bad), 25)
    before = checkpoint.load_state(tmp_path / "stage", _state())
    assert before[0] == 25 and before[3] == 3
    assert [(step, values["skipped"]) for step, values in scalars] == [(10, 2), (20, 3), (25, 3)]
    del scalars[:]
    # Nine in a row, added to the earlier count; a checkpoint is due at every step.
    state = _train(tmp_path, update, Batches(bad), 45, checkpoint_seconds=0.0)
    assert [(step, values["skipped"]) for step, values in scalars] == [(30, 3), (40, 12), (45, 12)]
    assert np.isfinite(np.asarray(state["params"]["plain"])).all()
    own = {"loss", "gradient_norm", "parameter_norm", "largest", "learning_rate", "skipped"}
    assert scalars[-1][1].keys() == own | {"examples_per_s", "waiting_share", "memory_gb"}
    assert scalars[-1][1]["examples_per_s"] > 0 and 0 <= scalars[-1][1]["waiting_share"] < 1
    start = _state()
    kept = jax.device_get(start)
    after, metrics = update(start, jax.random.key(0), np.float32(1.0), jnp.full((2, WIDTH), jnp.nan))
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), kept)
    _, metrics = update(after, jax.random.key(0), np.float32(1.0), jnp.zeros((2, WIDTH)))
    assert int(metrics["skipped"]) == 0


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
@pytest.mark.parametrize("first,count", [(13, 10), (13, 1000), (20, 10), (0, 10)])
def test_a_row_of_skipped_steps_ends_the_run(update, scalars, tmp_path, first, count, checkpoint_seconds):
    """The message says how to repeat them, the same command meets them again, and checkpoints are older than they are."""
    bad = [*range(first, first + count)]
    if first:
        _train(tmp_path, update, Batches(bad), 5)
    for _ in range(2):
        with pytest.raises(loop.DivergedError) as caught:
            _train(tmp_path, update, Batches(bad), 60, checkpoint_seconds)
        line = str(caught.value)
        assert "\n" not in line and f"{tmp_path / 'stage'}: steps {first} to {first + 9}, counted from 0: found" in line
        saved = None if first == 0 else first if checkpoint_seconds == 0 else 5
        assert checkpoint.latest(tmp_path / "stage") == saved
        assert f"goes on from {'the start' if saved is None else f'step_{saved}'}:" in line
        assert scalars[-1][1]["skipped"] >= 10
    found = re.search(
        r"step (\d+) takes its batch at (\{.*?\}), kept as \S+, and its key from .*wrap_key_data\((.*?)\), (\d+)\)",
        line,
    )
    assert int(found[1]) == int(found[4]) == first
    kept = files.read_npz(tmp_path / "stage" / f"batch_of_step_{first}.npz", "batch")["batch"]
    assert kept.shape == (2, WIDTH) and np.isnan(kept).all()
    key = jax.random.wrap_key_data(jnp.asarray(json.loads(found[3]), jnp.uint32))
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(5))).all()
    batches = Batches(bad)
    batches.set_state(json.loads(found[2]))
    _, metrics = update(_state(), jax.random.fold_in(key, first), np.float32(1e-2), next(batches))
    assert int(metrics["skipped"]) == 1


def test_the_bar_tells_of_skipped_steps(update, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    _train(tmp_path / "some", update, Batches({2}), 10)
    assert "skipped=1" in capsys.readouterr().err
    _train(tmp_path / "none", update, Batches(), 10)
    assert "skipped" not in capsys.readouterr().err


def _no_noise(params, key, batch):
    return jnp.mean((params["plain"] - batch) ** 2), {}


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    mesh, batch = sharding.make_mesh(), np.random.default_rng(3).normal(size=(6, WIDTH)).astype(np.float32)
    found = []
    for parts in (1, 3):
        step = update_of(mesh, _no_noise, ("plain",), UpdateConfig(parts=parts))
        found.append(jax.device_get(step(_state(), jax.random.key(0), np.float32(1e-2), batch)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), *found)


def test_the_moving_average_follows_and_is_what_a_phase_ends_with():
    config = UpdateConfig(ema=0.75)
    step = update_of(sharding.make_mesh(), _no_noise, ("plain",), config)
    state = state_of({"plain": jnp.arange(3.0), "fixed": jnp.ones(2)}, ("plain",), config)
    average = np.arange(3.0)
    for number in range(5):
        batch = np.full((2, WIDTH), np.nan if number == 2 else 1.0, np.float32)
        state, _ = step(state, jax.random.key(number), np.float32(0.1), batch)
        # A step that is skipped changes nothing.
        average = average if number == 2 else 0.75 * average + 0.25 * np.asarray(state["params"]["plain"])
    result = result_of(state)
    np.testing.assert_allclose(result["plain"], average, rtol=1e-5)
    assert np.abs(result["plain"] - state["params"]["plain"]).max() > 0.01 and result["fixed"].shape == (2,)


def test_a_profile_of_some_steps_lies_beside_the_log(update, tmp_path):
    _train(tmp_path, update, Batches(), 5, trace_steps=2)
    assert list((tmp_path / "tensorboard" / "stage").rglob("*.xplane.pb"))
