"""Fixtures that several files of these tests share: a trained run, its first case, commands, two views of a spine."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny

from data_pipelines import cases
from data_pipelines.simulation import carm
from experiments import train
from experiments.patients import registering
from experiments.patients.workdir import load
from experiments.patients.workdir import ScanDigests
from experiments.patients.workdir import target_of
from radgs_jax.localization.chain import Found
from radgs_jax.registration import confidence

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The file with the longest tests first, so that no process ends with it while the other is idle."""
    items.sort(key=lambda item: item.path.name != "test_training_runs.py")


@contextlib.contextmanager
def _locked(path):
    """One process at a time, among the workers of pytest-xdist."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished tiny run that no test may change: (workdir, table). It is trained once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own in the session's
    workdir, finished = base / "trained", base / "trained.txt"
    with _locked(base / "trained.lock"):
        if not finished.exists():
            table = train.train(tiny.config(), workdir)
            finished.write_text(table)
    return workdir, finished.read_text()


@pytest.fixture
def first_case(trained):
    """The first case of the trained run's held-out cases: (case file, case, scene, target)."""
    case_file = cases.read(trained[0] / "eval" / "cases.json")
    case = case_file.cases[0]
    scene = case_file.scenes[case.scene]
    volume = case_file.volumes[scene.volume]
    target = target_of(volume)
    return case_file, case, scene, target


@pytest.fixture(scope="session")
def run_command():
    """A function that runs a command, (module, *flags), and returns the `CompletedProcess`."""

    def run(module, *flags):
        command = [sys.executable, "-m", f"experiments.{module}", *flags]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def two_views():
    """A function that makes up what the localizer finds in two views."""
    return _two_views


def _two_views(levels_seen, sure, rng):
    """`Found` of an AP and a lateral view of a spine of seven levels: what each calls its places, and how sure it is."""
    z = 90.0 - 28.0 * np.arange(7)
    points = np.stack([6 * np.sin(z / 40), -0.002 * z**2, z], -1)
    E = carm.sample_views(rng, carm.CArm())
    intrinsics = np.array([[466.7, 466.7, 70.0, 64.0], [466.7, 466.7, 60.0, 75.0]])
    found = []
    for e, k, seen, names, certainty in zip(E, intrinsics, *zip(*levels_seen), sure):
        camera = points[seen] @ e[:3, :3].T + e[:3, 3]
        uv = k[:2] * camera[:, :2] / camera[:, 2:] + k[2:] + 0.3 * rng.normal(size=(len(seen), 2))
        evidence = np.full((len(seen), 7), -6.0)
        evidence[np.arange(len(seen)), names] = -6.0 + certainty
        true = np.array(seen)
        evidence[np.arange(len(seen)), true] = np.maximum(evidence[np.arange(len(seen)), true], -6.5 + certainty)
        n = len(seen)
        found.append(Found(np.array(names), uv, np.full(n, 0.9), np.full(n, 0.5), evidence, np.full(7, -1.0)))
    return found, intrinsics, E, points


@pytest.fixture
def ready(trained, first_case):
    """The prepared vertebra of the first case, with a rule that accepts what it is told to: (rule name) -> `Prepared`."""
    prepared = load(trained[0] / "p3", first_case[3], ScanDigests())
    fitted_for = confidence.method_digest(prepared.refine, prepared.search)
    thresholds = {"refusing": 2.0, "accepting": 0.0}

    def with_rule(kind):
        size = (-3.0, 0.0)
        rule = confidence.AcceptanceRule((0.0,) * 9, (thresholds[kind],) * 2, size, 2.0, fitted_for)
        return dataclasses.replace(prepared, rule=rule)

    return with_rule


@pytest.fixture
def rows(first_case):
    """Four cases of one acquisition, their starts some millimetres apart."""
    _, case, scene, target = first_case
    found = []
    for index in range(4):
        start = case.world_from_ct.copy()
        start[2, 3] += 0.5 * index
        xrays = lambda: cases.read_xrays(scene, "artic")  # noqa: E731
        found.append(registering.Row(f"case_{index}", target, xrays, start))
    return found
