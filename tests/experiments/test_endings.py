"""How commands end: one line and a status for signals, memory, full disks and closed pipes; warnings as lines; no traceback."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.io import locks
from experiments.runtime import endings
from experiments.runtime import progress
from experiments.training import checkpoint
from experiments.training import loop
from radgs_jax import errors
from radgs_jax.training import sharding
from radgs_jax.training.update import state_of
from radgs_jax.training.update import update_of

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _interruptible():
    """A shell starts what runs in the background with Ctrl-C ignored, which commands leave as it is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


HEAD = """
import os, signal, sys, time, warnings
from absl import logging
from experiments.runtime import cli, endings
def main():
"""
TAIL = "\n\ncli.run(main, lambda: None)\n"


def _start(body, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    code = HEAD + "\n".join(f"    {line}" for line in body.splitlines()) + TAIL
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, text=True, **options)


def _end(body, **options):
    process = _start(body, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "body, status, line",
    [
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "error: stopped by SIGINT"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, "error: stopped by SIGTERM"),
        ("raise MemoryError", 4, "error: memory: found too little, wanted enough"),
        ("import numpy; numpy.empty(2**55)", 4, "error: memory: found too little: Unable to allocate"),
        ("import jax; jax.numpy.zeros(2**50).block_until_ready()", 4, "error: memory: found too little: "),
        (
            "open('/dev/full', 'w').write('x' * 10**6)",
            2,
            "error: a file or stream: file: found No space left on device",
        ),
        ("open('/no/such/folder/x', 'w')", 2, "error: /no/such/folder/x: file: found No such file or directory"),
        (
            "from concurrent.futures.process import BrokenProcessPool as B; raise B('gone')",
            1,
            "error: a worker process",
        ),
        ("from radgs_jax import errors; errors.fail('x', 'y', 'z', 'w')", 2, "error: x: y: found z, wanted w"),
        ("from radgs_jax import errors; raise errors.RunError('no')", 1, "error: no"),
    ],
    ids=["ctrl-c", "term", "memory", "numpy", "xla", "full", "missing", "worker", "input", "run"],
)
def test_what_stops_a_command_is_one_line_with_a_status(body, status, line, capfd, monkeypatch):
    monkeypatch.setattr(endings, "_silence", lambda: None)  # the test's own output goes on
    with pytest.raises(SystemExit) as ended:
        with endings.one_line_each():
            exec(body, {"os": os, "signal": signal, "time": time})
    err = capfd.readouterr().err
    assert ended.value.code == status and err.startswith(line) and err.count("\n") == 1, err


def test_a_process_ends_so_too_and_a_fault_of_the_program_keeps_its_traceback():
    code, _, err = _end("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)")
    assert code == 143 and err == "error: stopped by SIGTERM\n"
    code, _, err = _end("1 / 0")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("ZeroDivisionError")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_that_is_full_or_closed_is_one_line():
    with open("/dev/full", "w") as full:
        code, _, err = _end("print('x')", stdout=full)
    assert code == 2 and "No space left" in err and err.count("\n") == 1, err
    process = _start("print('x' * 10**6)")
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read().count("\n") == 1


def test_warnings_are_lines_and_are_remembered():
    body = (
        "logging.warning('a %s\\nwarning', 'nice')\n"
        "warnings.warn('of a library', RuntimeWarning)\n"
        "logging.info('nothing')\n"
        "logging.warning('a nice warning')\n"
        "print(endings.warnings_said())"
    )
    code, out, err = _end(body)
    assert code == 0 and out == "['a nice warning', 'of a library']\n"
    assert err.splitlines() == ["warning: a nice warning", "warning: of a library", "warning: a nice warning"]


def test_a_damaged_entry_of_xlas_cache_is_made_again_with_one_line(tmp_path):
    body = "import jax; print(jax.jit(lambda x: jax.numpy.sin(x) + 2)(1.5))"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    wanted = _end(body, env=environment)
    assert wanted[0] == 0 and not wanted[2]
    entries = [p for p in (tmp_path / "radgs_jax" / "xla").iterdir() if "lambda" in p.name]
    assert entries
    for place, path in zip((100, -1, 1), entries):
        content = bytearray(path.read_bytes())
        content[place] ^= 16
        path.write_bytes(content)
    code, out, err = _end(body, env=environment)
    assert (code, out) == wanted[:2] and err.count("\n") == len(entries[:3]) and "and is made again" in err
    assert _end(body, env=environment) == wanted


def test_a_bar_is_as_wide_as_its_terminal(capsys, monkeypatch):
    """A wider one would leave a line at every update."""
    bar = progress.Bar(10, "text")
    assert bar.dynamic_ncols
    bar.close()


# Training.


class Batches:
    """Endless batches of noise, batch n a function of n; a signal arrives while batch `at` is made."""

    def __init__(self, at=None, number=signal.SIGTERM):
        self.place, self.at, self.number = 0, at, number

    def __next__(self):
        self.place += 1
        if self.place == self.at:
            os.kill(os.getpid(), self.number)
        return np.random.default_rng(self.place).normal(size=(2, 3)).astype(np.float32)

    def get_state(self):
        return {"step": self.place}

    def set_state(self, place):
        self.place = place["step"]


def _objective(params, key, batch):
    return jnp.mean((params["plain"] - batch) ** 2), {}


def _state():
    return sharding.made(sharding.make_mesh(), lambda: state_of({"plain": jnp.arange(3.0)}, ("plain",)))


def _train(folder, batches, steps):
    mesh = sharding.make_mesh()
    update = update_of(mesh, _objective, ("plain",))
    rates = dict(rate=lambda step: 1e-2, steps=steps, checkpoint_seconds=1e9)
    return loop.run_steps(folder / "stage", folder, mesh, _state(), update, batches, key=jax.random.key(5), **rates)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_the_run_goes_on_to_the_same_end(tmp_path, number, status, capsys):
    wanted = _train(tmp_path / "whole", Batches(), 12)
    with pytest.raises(SystemExit) as ended:
        with endings.one_line_each():
            _train(tmp_path, Batches(7, number), 12)
    assert ended.value.code == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert "saved up to step 7; run again to go on" in line and line.startswith("error: stopped by SIG")
    assert checkpoint.latest(tmp_path / "stage") == 7
    found = _train(tmp_path, Batches(), 12)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
    assert not list((tmp_path / "stage").glob(".*"))


def test_a_second_run_in_one_stage_is_told_so(tmp_path):
    (tmp_path / "stage").mkdir()
    with locks.hold(tmp_path / "stage" / locks.LOCK, tmp_path / "stage"):
        with pytest.raises(errors.InputError, match="stage: folder: found one in use by process"):
            _train(tmp_path, Batches(), 3)


def test_a_second_signal_does_not_wait():
    start = time.monotonic()
    with pytest.raises(endings.Stopped):
        with endings.held() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert asked == [signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)
    assert time.monotonic() - start < 5 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
