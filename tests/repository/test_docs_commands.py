"""Commands that the documentation shows: their flags are there, and they run on a phantom as they are written."""

import json
import os
import re
import shutil
import subprocess
import sys

import doc_pages
import fresh_python
import numpy as np
import pytest

from data_pipelines.cameras import exchange

REPOSITORY = doc_pages.REPOSITORY
OTHER_PROGRAMS = re.compile(r"\b(pip|pytest|git|tensorboard|pre-commit|XLA_FLAGS)\b")
"""Lines with these have flags of other programs."""

NOT_RUN = {
    r"^make (train|test|compile-check)": "minutes to hours; CI runs make test and make compile-check",
    r"experiments\.train ": "hours of training; tests/experiments/test_training_runs.py trains less",
    r"experiments\.(study|ablation|calibrate) ": "tens of minutes to hours; their tests run small ones",
    r"experiments\.(table1|home_tests) ": "hours of other systems; their tests run small ones",
    r"kernels\.tools\.bench ": "minutes of measurements; tests/kernels runs a short one",
    r"experiments\.compile_check ": "needs the compilers of requirements-aot.txt; CI compiles a step",
    r"experiments\.segment --ct=CT --output": "needs TotalSegmentator, which is no dependency",
    r"^python score\.py|OUT/results\.json cases\.json": "belongs to a bench that is not in the repository",
    r"tests/experiments/test_spines\.py": "ten minutes; pytest -m slow runs it",
    r"wrist_inputs\.py|OUT/radius\.nii\.gz": "data that are not in the repository",
    r"experiments\.serve ": "a server; make test-browser works it",
    r"^r = torch\.load": "for the Python of another program",
    r"^tensorboard ": "a server; tensorboard is no dependency",
    r"^FILE: FIELD: ": "no command, but a message",
}
"""Blocks that no test runs: what one of their lines matches -> why."""
OF_ALL = {"help": True, "log": False}
"""Flags that `cli.run` adds: name -> whether it takes no value."""


def _given_flags():
    """Flags of each command, as a fresh Python defines them: module -> name -> whether it takes no value."""
    code = (
        "import importlib, json, pathlib\n"
        "from absl import flags\n"
        "found = {}\n"
        "for layer in ('experiments', 'data_pipelines', 'kernels'):\n"
        "    for path in pathlib.Path(layer).rglob('*.py'):\n"
        "        if '\\nif __name__ == \"__main__\":' not in path.read_text(): continue\n"
        "        module = importlib.import_module('.'.join(path.with_suffix('').parts))\n"
        "        before = set(flags.FLAGS)\n"
        "        if hasattr(module, 'define_flags'): module.define_flags()\n"
        "        values = getattr(module, 'FLAGS', flags.FLAGS)\n"
        "        names = set(values) - before if values is flags.FLAGS else set(values)\n"
        "        found[module.__name__] = {name: bool(values[name].boolean) for name in names}\n"
        "        for name in names & set(flags.FLAGS): delattr(flags.FLAGS, name)\n"
        "print(json.dumps(found))"
    )
    return json.loads(fresh_python.run(code).splitlines()[-1])


def _has(flags, name, value):
    """Whether there is such a flag, with a value or without one."""
    if name in flags:
        return True
    return not value and flags.get(name.removeprefix("no"), False)


def test_flags_that_documents_name_are_there():
    commands = _given_flags()
    every = {name: is_switch for flags in commands.values() for name, is_switch in flags.items()} | OF_ALL
    for page in doc_pages.pages():
        if page.name == "CHANGELOG.md":
            continue
        for line in doc_pages.code_lines(page):
            called = re.search(r"python3? -m ((?:experiments|data_pipelines|kernels)[\w.]*)", line)
            flags = commands.get(called[1]) if called else every
            assert flags is not None or called[1] == "kernels.bench", f"{page.name}: {called[1]} is no command"
            if flags is None or OTHER_PROGRAMS.search(line):
                continue
            for name, value in re.findall(r"(?<![\w-])--(\w+)(=?)", line.split(" #")[0]):
                assert _has(flags | OF_ALL, name, value), f"{page.name}: --{name} in {line!r}"


def test_blocks_of_commands_parse():
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for page in doc_pages.guides():
        for block in doc_pages.blocks(page, doc_pages.SHELL):
            done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
            assert done.returncode == 0, f"{page.name}: {done.stderr}"
            assert set(re.findall(r"^make ([\w-]+)", block, re.MULTILINE)) <= set(targets), page.name


def _reason(block):
    return [why for pattern, why in NOT_RUN.items() if re.search(pattern, block, re.MULTILINE)]


def _run_blocks():
    """Pages with their blocks that are run, in order."""
    for page in doc_pages.guides():
        if chosen := [block for block in doc_pages.blocks(page, doc_pages.SHELL) if not _reason(block)]:
            yield pytest.param(chosen, id=page.name)


def test_every_reason_not_to_run_a_block_is_in_use():
    shown = "\n".join(block for page in doc_pages.guides() for block in doc_pages.blocks(page, doc_pages.SHELL))
    assert not [pattern for pattern in NOT_RUN if not re.search(pattern, shown, re.MULTILINE)]


def _shell(script, folder, programs):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PATH": f"{programs}{os.pathsep}{environment['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    command = ["bash", "-e", "-u", "-o", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder for PATH: `python` is the one that runs the tests."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def patient(tmp_path_factory, programs):
    """A folder with the files that blocks name: a phantom's CT and labels, two X-rays, their cameras, a case file."""
    folder = tmp_path_factory.mktemp("patient")
    _shell("python -m experiments.demo --out=demo", folder, programs)
    for name, pattern in (("ct.nii.gz", "*_ct.nii.gz"), ("labels.nii.gz", "*_msk.nii.gz")):
        (found,) = (folder / "demo" / "patient").glob(pattern)
        (folder / name).symlink_to(found)
    scan = "--ct=ct.nii.gz --mask=labels.nii.gz --label=22"
    _shell(f"python -m experiments.simulate {scan} --scenes=1 --starts_mm=0,5,10 --out=C.json", folder, programs)
    for name in ("ap.npy", "lat.npy", "cameras.json"):
        (folder / name).symlink_to(folder / "demo" / name)
    # A file of its own, since a command may not write what it reads.
    shutil.copyfile(folder / "demo" / "cameras.json", folder / "calibration.json")
    return folder


@pytest.mark.docs
@pytest.mark.parametrize("blocks", _run_blocks())
def test_blocks_run_as_they_are_written(blocks, patient, programs, tmp_path):
    """The blocks of a page one after the other, in a folder where what they read has the names that they use."""
    for path in patient.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    for block in blocks:
        _shell(block, tmp_path, programs)
    for results in tmp_path.glob("OUT/results.json"):
        found = json.loads(results.read_text())
        assert found["results"] and all(case["accepted"] for case in found["results"]) and not found.get("failures")


@pytest.mark.docs
def test_camera_commands_of_the_table_bring_back_what_they_wrote(patient, programs, tmp_path):
    """Each row's flags: from our cameras to the other program's file, then by the shown command back to ours."""
    page = (REPOSITORY / "docs" / "cameras.md").read_text()
    (first,) = [
        block for block in doc_pages.blocks(REPOSITORY / "docs" / "cameras.md", doc_pages.SHELL) if "carm.json" in block
    ]
    _shell(first, tmp_path, programs)
    rows = re.findall(r"^\|.*\| `--from=(\w+) (.*?)--files=(\S+) \.\.\.`", page, re.MULTILINE)
    assert {name for name, *_ in rows} == set(exchange.CONVENTIONS)
    for name, given, paths in rows:
        if paths.endswith(".dcm"):
            continue  # tests/experiments/test_cameras_command.py reads such files
        pitch = "" if "--pixel_mm" in given else "--pixel_mm=0.3"
        there = f"--to={name} {given} {pitch} --files=cameras.json --out={paths} --nodraw"
        back = f"--from={name} {given} --files={paths} --xrays={patient}/ap.npy,{patient}/lat.npy --size=976x976 --out=again.json"
        for flags in (there, back):
            _shell(f"python -m experiments.cameras {flags}", tmp_path, programs)
        wanted, found = (json.loads((tmp_path / file).read_text()) for file in ("cameras.json", "again.json"))
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_allclose(b["K"], a["K"], atol=1e-3, err_msg=name)
            np.testing.assert_allclose(b["E"], a["E"], atol=1e-3, err_msg=name)
