"""Work that several processes share: parts that together are the whole, and the same results from the last run."""

import dataclasses

import numpy as np
import pytest
import tiny

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.phantom import scan_files
from experiments import study
from experiments.patients import preparing
from experiments.patients import registering
from experiments.patients import workdir
from experiments.patients.workdir import Target
from experiments.runtime.shards import Shard
from experiments.scoring import conditions
from radgs_jax import errors
from radgs_jax.registration.pipeline import RegisterOptions

QUICK = RegisterOptions(passes=1)


def test_parts_are_the_whole_without_repetition():
    items = ["b", "a", "b", "c", "d", "a"]
    parts = [Shard(index, 3).of(items) for index in range(3)]
    assert parts == [["b", "d"], ["a"], ["c"]] and Shard().of(items) == ["b", "a", "c", "d"]
    assert Shard(4, 9).of(items) == []


def test_a_bad_part_is_one_line(run_command):
    for text in ("2/2", "1", "-1/3", "a/b"):
        done = run_command("prepare", "--workdir=w", "--cases=c.json", f"--shard={text}")
        assert done.returncode == 2 and done.stderr.startswith(("error: flags: --shard: found", "error: c.json")), done


def test_a_shared_lock_keeps_others_out_and_not_each_other(tmp_path):
    path = tmp_path / "lock"
    with locks.hold(path, tmp_path, shared=True), locks.hold(path, tmp_path, shared=True):
        with pytest.raises(errors.InputError, match="in use"), locks.hold(path, tmp_path):
            pass
    with locks.hold(path, tmp_path):
        with pytest.raises(errors.InputError, match="in use"), locks.hold(path, tmp_path, shared=True):
            pass


def test_a_run_takes_the_cases_of_its_parts(trained, first_case, tmp_path):
    """Three vertebrae in two parts, of which one is there; its cases are not registered again."""
    _, case, scene, target = first_case
    load, xrays = workdir.loader(trained[0] / "p3"), cases.read_xrays(scene, "artic")
    rows = [
        registering.Row(f"{label}_{number}", dataclasses.replace(target, label=label), xrays, case.world_from_ct)
        for number in range(2)
        for label in (21, 22)
    ]

    def run(out, pictures=False, **options):
        return registering.register_rows(rows, load, tmp_path / out, QUICK, pictures=pictures, **options)

    part = run("out", shard=Shard(1, 2))
    assert part.out == tmp_path / "out.parts" / "1-of-2" and [one["id"] for one in part.results] == ["22_0", "22_1"]
    with pytest.raises(errors.InputError, match="a part of a run with other inputs or flags"):
        run("out", inputs={"xrays": "others"})
    registered = []
    whole = run("out", say=registered.append)
    assert [line.split()[0] for line in registered] == ["21_0", "21_1"]
    assert [one["id"] for one in whole.results] == [row.name for row in rows]
    alone = run("alone")
    for found, wanted in zip(whole.results, alone.results):
        np.testing.assert_array_equal(found["T"], wanted["T"])
    assert not (tmp_path / "out.parts").exists()


def test_parts_prepare_one_workdir(trained, tmp_path):
    phantoms = scan_files.phantoms(tmp_path / "scans", [3, 4, 5], tiny.config().phantom)
    targets = [Target(*phantom, label) for phantom in phantoms for label in (21, 22)]
    base = trained[0] / "p2" / "model"

    def prepare(folder, shard=Shard()):
        preparing.prepare(tiny.config(), tmp_path / folder, targets, base, minutes=0.0, shard=shard)
        manifest = files.read_json(tmp_path / folder / "manifest.json")
        vertebrae = {name: digest for name, digest in manifest["checksums"].items() if name.endswith(".npz")}
        return manifest["scans"], vertebrae

    first = prepare("parts", Shard(1, 2))
    assert [len(part) for part in first] == [1, 2]
    # The other part never ran: the whole makes what is missing.
    found, alone = prepare("parts"), prepare("alone")
    assert found == alone and [len(part) for part in found] == [3, 6]
    assert prepare("parts", Shard(0, 2)) == alone


def test_parts_of_a_study_are_its_conditions_each_once(tmp_path, monkeypatch):
    ran, monkeypatched = [], monkeypatch.setattr
    patient = type("Patient", (), {"labels": [21, 22]})()
    monkeypatched(conditions, "Patient", lambda *_: patient)
    monkeypatched(conditions, "register_condition", lambda patient, condition, *_: ran.append(condition) or [])
    for index in range(3):
        study.run_study("ct", "mask", [21], "w", tmp_path, scenes=4, sweep_scenes=1, shard=Shard(index, 3))
    assert len(ran) == len(set(ran)) == 4 + len(conditions.sweeps()) and not list(tmp_path.iterdir())
