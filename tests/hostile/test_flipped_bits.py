"""Damage to what was written: a flipped bit, a cut, a block of zeros in any file is one clear line, is mended, or changes nothing.

60 places are tried in the quick tests and 500 in the slow ones: in a prepared workdir, the shipped base with its localizer and
rule, checkpoints and kept programs. `tests/kernels/test_private_cache.py` does the same with compiled kernels, and
`tests/data_pipelines/pairs/test_pair_store.py` with pairs.
"""

import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from sealed_files import fingerprint
from sealed_files import read_base
from sealed_files import read_workdir

from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.phantom import scan_files
from experiments import configs
from experiments.localizers import localizer_files
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients import workdir as workdirs
from experiments.runtime import kept_programs
from experiments.runtime import sealed_files
from experiments.training import checkpoint
from radgs_jax import errors
from radgs_jax.models import radgs_reg
from radgs_jax.models import trained

QUICK, SLOW = 15, 125
"""Places of each of the four kinds of files."""
STAGE = configs.StageConfig(pairs=1, ct_pairs=1, steps=(0, 0, 0), learning_rate=1e-4)
UNREAD = {"pairs", "checkpoints", "tensorboard"}
"""Folders of a workdir that registering does not read."""


def damage(path, rng):
    """Flips a bit of a file, cuts it, or overwrites a block by zeros, or by ones where it is zero; says what and where."""
    content = bytearray(path.read_bytes())
    if not content:
        path.write_bytes(b"\0")
        return f"{path.name}: a byte where there was none"
    kind, place = rng.choice(("flip", "cut", "zero")), rng.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    else:
        block = content[place : place + 512]
        content[place : place + 512] = bytes(len(block)) if any(block) else b"\xff" * len(block)
    path.write_bytes(content)
    return f"{path.name}: {kind} at {place}"


def try_places(folder, read, count, seed, tmp_path):
    """Damages one file at a time of a copy of a folder; `read(copy)` must say so in one line or return what it does undamaged.

    Returns:
      how often it was said.
    """
    rng, copy, said = random.Random(seed), tmp_path / "copy", 0
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*UNREAD))
    wanted = read(copy)
    paths = sorted(path for path in copy.rglob("*") if path.is_file())
    for _ in range(count):
        path = rng.choice(paths)
        content = path.read_bytes()
        what = damage(path, rng)
        try:
            assert read(copy) == wanted, what
        except errors.InputError as error:
            said += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error) and ": found " in str(error), what
        path.write_bytes(content)
    assert read(copy) == wanted
    return said


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A vertebra of a coarse phantom prepared with an untrained network: (workdir, target)."""
    folder = tmp_path_factory.mktemp("flips")
    subject, ct, mask = scan_files.phantoms(folder / "scans", [30005], tiny.config().phantom)[0]
    params = jax.device_get(jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(3)))
    shapes = {0: np.zeros(trained.MEAN_SHAPE, np.float16), 21: np.zeros(trained.MEAN_SHAPE, np.float16)}
    models.save_model(folder / "base", trained.Model(params, tiny.MODEL, shapes), "untrained")
    rule = workdirs.read_rule(models.base_folder() / workdirs.CALIBRATION)
    config = tiny.config(p3=STAGE, refine=configs.DEMO.refine)
    target = workdirs.Target(subject, ct, mask, 21)
    preparing.prepare(config, folder / "workdir", [target], folder / "base", rule=rule)
    return folder / "workdir", target


def test_damaged_workdirs_are_one_line(prepared, tmp_path):
    assert try_places(prepared[0], read_workdir(prepared[1]), QUICK, 1, tmp_path) >= QUICK // 2


def test_damaged_bases_are_one_line(tmp_path):
    assert try_places(models.base_folder(), read_base, QUICK, 2, tmp_path) >= QUICK // 2


@pytest.mark.slow
def test_workdirs_damaged_anywhere_are_one_line(prepared, tmp_path):
    assert try_places(prepared[0], read_workdir(prepared[1]), SLOW, 3, tmp_path) >= SLOW // 2


@pytest.mark.slow
def test_bases_damaged_anywhere_are_one_line(tmp_path):
    assert try_places(models.base_folder(), read_base, SLOW, 4, tmp_path) >= SLOW // 2


def _state(step):
    rng = np.random.default_rng(step)
    leaves = {f"w{i}": rng.normal(size=(40, 30)).astype(np.float32) for i in range(3)}
    return {"params": leaves, "moments": {k: v * 2 for k, v in leaves.items()}, "count": np.int32(step)}


def damage_checkpoints(count, seed, tmp_path, caplog):
    """The latest of two checkpoints is damaged: it comes back as it was, or the one before it does, with one line."""
    rng, folder = random.Random(seed), tmp_path / "stage"
    like = jax.tree.map(jnp.asarray, _state(0))
    for step in (5, 7, 9):
        checkpoint.save_state(folder, step, jax.tree.map(jnp.asarray, _state(step)), {"step": step}, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["step_7", "step_9"]
    paths = sorted(path for path in (folder / "step_9").rglob("*") if path.is_file())
    for _ in range(count):
        path = rng.choice(paths)
        content = path.read_bytes()
        what = damage(path, rng)
        caplog.clear()
        step, state, place, skipped = checkpoint.load_state(folder, like)
        assert (place, skipped) == ({"step": step}, 2) and fingerprint(state) == fingerprint(_state(step)), what
        assert (step, caplog.text.count("\n")) in ((9, 0), (7, 1)), what
        path.write_bytes(content)
    for step in (7, 9):
        (folder / f"step_{step}" / checksums.NAME).unlink()
    with pytest.raises(errors.InputError, match=r"checkpoints: found none of 2 .*\(step 7, 9\), wanted one that is"):
        checkpoint.load_state(folder, like)


def test_a_damaged_checkpoint_falls_back_on_the_one_before(tmp_path, caplog):
    damage_checkpoints(QUICK, 5, tmp_path, caplog)


@pytest.mark.slow
def test_checkpoints_damaged_anywhere_fall_back_on_the_one_before(tmp_path, caplog):
    damage_checkpoints(SLOW, 6, tmp_path, caplog)


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_two_whole_ones(tmp_path, monkeypatch):
    folder, like = tmp_path / "stage", jax.tree.map(jnp.asarray, _state(0))
    for step in (5, 7):
        checkpoint.save_state(folder, step, jax.tree.map(jnp.asarray, _state(step)))

    def killed(path, **_):
        if path.exists():
            next(file for file in path.rglob("*") if file.is_file()).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_state(folder, 9, jax.tree.map(jnp.asarray, _state(9)))
    monkeypatch.undo()
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_7", "step_9"]
    for step in (9, 7):
        assert checkpoint.load_state(folder, like)[0] == step
        (folder / f"step_{step}" / checksums.NAME).unlink()
    checkpoint.save_state(folder, 8, jax.tree.map(jnp.asarray, _state(8)))
    assert sorted(path.name for path in folder.iterdir()) == ["step_7", "step_8"]


def _turn(x, n):
    return jnp.sin(x) * n + jnp.cos(x[::-1])


def damage_programs(count, seed, tmp_path, monkeypatch, caplog):
    """A damaged program gives the same numbers, after one line, and is there again afterwards."""
    monkeypatch.setattr(kept_programs, "_folder", lambda: tmp_path)
    rng, x = random.Random(seed), np.linspace(-1, 1, 50, dtype=np.float32)

    def results():
        shapes = kept_programs.kept_shapes(models._fresh_params, tiny.MODEL)
        return fingerprint(kept_programs.kept(_turn, "n")(x, n=3)), str(shapes)

    wanted = results()
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 2
    for _ in range(count):
        path = rng.choice(paths)
        what = damage(path, rng)
        caplog.clear()
        assert results() == wanted and caplog.text.count("made again") == caplog.text.count("\n") == 1, what
        caplog.clear()
        assert results() == wanted and not caplog.text, what


@pytest.mark.long
def test_damaged_programs_are_made_again(tmp_path, monkeypatch, caplog):
    damage_programs(QUICK, 7, tmp_path, monkeypatch, caplog)


@pytest.mark.slow
def test_programs_damaged_anywhere_are_made_again(tmp_path, monkeypatch, caplog):
    damage_programs(SLOW, 8, tmp_path, monkeypatch, caplog)


def test_a_program_that_does_not_run_is_made_again(tmp_path, monkeypatch, caplog):
    """A file in another's place is noticed, and so is a program that was written as it is, and is another."""
    monkeypatch.setattr(kept_programs, "_folder", lambda: tmp_path)
    x = np.ones(4, np.float32)
    wanted = kept_programs.kept(_turn, "n")(x, n=3)
    (path,) = tmp_path.iterdir()
    kept_programs.kept(_turn, "n")(np.ones((2, 3), np.float32), n=3)
    (other,) = set(tmp_path.iterdir()) - {path}
    swapped = other.read_bytes()
    data = sealed_files.unpacked(other.name, swapped)
    for content, found in (
        (swapped, "not as it was written"),
        (sealed_files.packed(path.name, data), "Rank mismatch"),
    ):
        path.write_bytes(content)
        caplog.clear()
        for _ in range(2):
            np.testing.assert_array_equal(kept_programs.kept(_turn, "n")(x, n=3), wanted)
            assert caplog.text.count("made again") == caplog.text.count("\n") == 1 and found in caplog.text


# What an editor does by hand, and what is missing.


def _edited(path, change):
    value = files.read_json(path)
    change(value)
    files.write_json(path, value)


@pytest.mark.long
def test_an_edited_or_missing_file_of_a_workdir_is_one_line_and_is_mended(prepared, tmp_path):
    workdir, target = prepared
    digest = workdirs.ScanDigests().of(target)
    calibration, vertebra = f"{digest}/calibration.json", f"{digest}/vertebra_21.npz"
    attacks = {
        "a rule that accepts more": lambda f: _edited(f / calibration, lambda v: v.update(thresholds=[0.5] * 3)),
        "no rule": lambda f: (f / calibration).unlink(),
        "a step further": lambda f: _edited(f / f"{digest}/refine.json", lambda v: v["levels"][0].update(pixel_mm=5.0)),
        "another volume, with right CRCs": lambda f: files.write_npz(
            f / vertebra, **{**np.load(f / vertebra), "density": 2 * np.load(f / vertebra)["density"]}
        ),
        "no vertebra": lambda f: (f / vertebra).unlink(),
        "another model, complete": lambda f: models.save_model(
            f / digest / "model", models.load_model(workdir.parent / "base"), "another note"
        ),
        "no checksums of the model": lambda f: (f / digest / "model" / checksums.NAME).unlink(),
    }
    base = workdir.parent / "base"
    config = tiny.config(p3=STAGE, refine=configs.DEMO.refine)
    rule = workdirs.read_rule(models.base_folder() / workdirs.CALIBRATION)
    wanted = read_workdir(target)(workdir)
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    for name, attack in attacks.items():
        attack(copy)
        with pytest.raises(errors.InputError) as caught:
            workdirs.load(copy, target, workdirs.ScanDigests())
        assert "prepare the workdir again" in str(caught.value) and "\n" not in str(caught.value), name
        preparing.prepare(config, copy, [target], base, rule=rule)
        assert read_workdir(target)(copy) == wanted, name
    for change, line in (
        (lambda v: v.pop("checksums"), "sha256: found"),
        (lambda v: (v.pop("checksums"), v.pop("sha256")), "sha256: found nothing"),
        (lambda v: v.update(format="radgs-workdir/2"), "prepare it again, into a new folder"),
    ):
        content = (copy / "manifest.json").read_text()
        _edited(copy / "manifest.json", change)
        with pytest.raises(errors.InputError, match=line):
            workdirs.load(copy, target, workdirs.ScanDigests())
        (copy / "manifest.json").write_text(content)


def test_an_edited_base_is_one_line_and_renewed_by_what_writes_it(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(models.base_folder(), base)
    path = base / workdirs.CALIBRATION
    _edited(path, lambda v: v.update(radius=1.0))
    with pytest.raises(errors.InputError, match="calibration.json: sha256: found .*damaged or edited"):
        workdirs.read_rule(path)
    checksums.renew(path)  # as `experiments.calibrate` does
    assert workdirs.read_rule(path).radius == 1.0
    localizer = localizer_files.read_localizer(base / "detector.npz")
    localizer_files.write_localizer(base / "detector.npz", localizer, "written again")
    assert fingerprint(localizer_files.read_localizer(base / "detector.npz").params) == fingerprint(localizer.params)
    _edited(path, lambda v: v.update(thresholds=[0.0] * 2))
    checksums.renew(path)
    with pytest.raises(errors.InputError, match="thresholds: found .*wanted chances of 0.5 at least"):
        workdirs.read_rule(path)
    (base / checksums.NAME).unlink()
    with pytest.raises(errors.InputError, match="checksums.json: file: found nothing"):
        models.load_model(base)


def test_a_lone_localizer_carries_its_checksum(tmp_path):
    localizer = localizer_files.read_localizer(models.base_folder() / "detector.npz")
    localizer_files.write_localizer(tmp_path / "x.npz", localizer, "alone")
    localizer_files.read_localizer(tmp_path / "x.npz")
    arrays = dict(np.load(tmp_path / "x.npz"))
    name = next(k for k, v in arrays.items() if v.ndim > 1)
    files.write_npz(tmp_path / "x.npz", **{**arrays, name: arrays[name] + 1})
    with pytest.raises(errors.InputError, match="x.npz: sha256: found other arrays"):
        localizer_files.read_localizer(tmp_path / "x.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused(tmp_path, value):
    params = jax.device_get(jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(3)))
    first = jax.tree.leaves(params)[0]
    spoilt = jax.tree.map(lambda a: np.full_like(a, value) if a is first else a, params)
    shapes = {0: np.zeros(trained.MEAN_SHAPE, np.float16)}
    models.save_model(tmp_path / "m", trained.Model(spoilt, tiny.MODEL, shapes), "spoilt")
    with pytest.raises(errors.InputError, match="params: .*: found values that are not finite"):
        models.load_model(tmp_path / "m")


def test_a_second_process_that_replaces_a_model_is_told_so(tmp_path):
    params = jax.device_get(jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(3)))
    model = trained.Model(params, tiny.MODEL, {0: np.zeros(trained.MEAN_SHAPE, np.float16)})
    with locks.hold(pathlib.Path(tmp_path / ".m.lock"), tmp_path / "m"):
        with pytest.raises(errors.InputError, match="m: folder: found one in use by process"):
            models.save_model(tmp_path / "m", model, "second")
    models.save_model(tmp_path / "m", model, "third")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
