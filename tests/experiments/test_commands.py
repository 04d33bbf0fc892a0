"""Commands as modules: importable together, without flags until they run, and usable as functions without any."""

import json
import pathlib

import fresh_python
import pytest

from experiments import calibrate
from experiments import detect
from experiments import doctor
from experiments import register
from experiments import simulate
from experiments import study
from experiments import train
from experiments.patients import preparing
from experiments.patients import registering
from radgs_jax import errors

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = (
    "train",
    "prepare",
    "register",
    "serve",
    "demo",
    "segment",
    "detect",
    "simulate",
    "cameras",
    "calibrate",
    "study",
    "ablation",
    "table1",
    "home_tests",
    "metal",
    "compile_check",
    "doctor",
)


def test_all_commands_are_imported_together_and_define_no_flag_until_they_run():
    code = (
        "import importlib, sys; sys.argv = ['x', '--unknown']\n"
        f"modules = [importlib.import_module('experiments.' + name) for name in {COMMANDS}]\n"
        "from absl import flags\n"
        "found = [name for name in flags.FLAGS.flags_by_module_dict() if name.startswith('experiments')]\n"
        "assert not found and not flags.FLAGS.is_parsed(), found\n"
        "before = set(flags.FLAGS)\n"
        "for module in modules:\n"
        "    module.define_flags()\n"
        "    defined = set(flags.FLAGS) - before\n"
        "    assert defined and callable(module.main), module\n"
        "    for name in defined:\n"
        "        delattr(flags.FLAGS, name)\n"
    )
    fresh_python.run(code)


def test_reading_a_workdir_and_registering_import_no_training():
    code = (
        "import sys, experiments.patients.workdir, experiments.patients.models, experiments.register\n"
        "found = [name for name in sys.modules if 'training' in name.split('.') and name.split('.')[0] in"
        " ('experiments', 'data_pipelines', 'radgs_jax')]\n"
        "assert not found, found"
    )
    fresh_python.run(code)


def test_a_missing_flag_is_one_line(run_command):
    for command, line in (
        ("prepare", "flags: --workdir: found nothing, wanted a value"),
        ("register", "flags: --out: found nothing, wanted a value"),
    ):
        done = run_command(command)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


def test_the_demo_shows_a_registered_vertebra(tmp_path, run_command):
    done = run_command("demo", f"--out={tmp_path / 'demo'}")
    assert done.returncode == 0, done.stderr
    page = done.stdout.splitlines()[-1].removeprefix("open ")
    assert "L3: accepted, within" in done.stdout and pathlib.Path(page).read_text().count("<article") == 1


def test_the_doctor_says_what_runs_and_why(run_command):
    done = run_command("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["radgs_jax"] and found["model"]["there"] and set(found["extras"]) == set(doctor.EXTRAS)
    assert found["kernels"]["splat"]["xla"] is None and "not gpu" in found["kernels"]["splat"]["pallas_triton"]
    assert all(backends["xla"] is None for backends in found["kernels"].values())
    text = doctor.describe(found | {"kept": {"reason": "no home"}})
    assert "splat: takes " in text and "nothing: no home" in text


def test_help_is_no_failure(run_command):
    done = run_command("register", "--help")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith(register.__doc__)
    assert all(f"--{name}" in done.stdout for name in ("passes", "cameras", "shard", "log"))
    # The console script, whose program is another file than the command's module.
    code = "import sys; sys.argv = ['radgs-register', '--help']; from experiments import register; register.command()"
    script = fresh_python.run(code)
    assert script.replace("experiments.register:", str(REPOSITORY / "experiments" / "register.py:")) == done.stdout


def test_every_command_is_in_the_list():
    found = {path.stem for path in (REPOSITORY / "experiments").glob("*.py") if "def main(" in path.read_text()}
    assert found == set(COMMANDS)


def test_what_commands_do_are_functions_that_need_no_flags(tmp_path):
    """Each is called with input that it refuses, in a process that has parsed no flag."""
    missing = tmp_path / "missing"
    there = tmp_path / "there.json"
    there.write_text("{}")
    calls = [
        ("manifest.json", lambda: preparing.prepare(train.configs.DEMO, tmp_path / "w", [], missing)),
        ("a new file", lambda: simulate.simulate_cases(missing, missing, [20], there)),
        ("missing", lambda: detect.find_in_case_file(missing, missing)),
        ("missing:", lambda: detect.score_localizer_file(missing, tmp_path)),
        ("file: found nothing", lambda: calibrate.fit_acceptance_rule([missing], tmp_path / "rule.json")),
        ("manifest.json", lambda: study.run_study(missing, missing, [20], missing, tmp_path / "s")),
        ("a new folder", lambda: registering.register_rows([], lambda target: None, there)),
        ("not finished", lambda: train.train(train.configs.DEMO, tmp_path / "t", "p1_reg")),
    ]
    for text, call in calls:
        with pytest.raises(errors.InputError, match=text):
            call()
