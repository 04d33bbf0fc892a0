"""Trainings that are killed, whose checkpoints are damaged, and whose disk is full: each goes on, to the same bits."""

import os
import pathlib
import random
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from trainings import LIMIT_S
from trainings import Running

KILLS, STEPS, FEW, INTERVAL = 20, 400, 100, 1
FLAGS = "--stage=p1_rec", f"--log_steps={INTERVAL}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function from (steps, processes) to the arrays of a run that nobody disturbs."""
    found = {}

    def arrays(steps, processes=1):
        if (steps, processes) not in found:
            workdir = tmp_path_factory.mktemp("undisturbed") / "W"
            Running(workdir, *FLAGS, f"--steps={steps}", processes=processes).ended()
            found[steps, processes] = _arrays(workdir, steps)
        return found[steps, processes]

    return arrays


def _checkpoints(workdir):
    return workdir / "checkpoints" / "p1_rec"


def _arrays(workdir, steps):
    """A checkpoint's, whatever devices wrote it."""
    path, here = _checkpoints(workdir) / f"step_{steps}", jax.sharding.SingleDeviceSharding(jax.devices()[0])
    described = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), ocp.metadata(path).metadata
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(ocp.load_pytree(path, described))]


def _wait(running, enough):
    limit = time.monotonic() + LIMIT_S
    while not enough() and time.monotonic() < limit:
        assert not running.stopped(), running.text()[-6000:]
        time.sleep(0.01)


def _kill(running, rank=0):
    running.processes[rank].send_signal(signal.SIGKILL)
    for process in running.processes:
        process.wait(LIMIT_S)


def _damage(folder, how):
    """Damages the largest file of the latest checkpoint."""
    latest = max(folder.glob("step_*"), key=lambda path: int(path.name[5:]))
    path = max((path for path in latest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.chaos
def test_kills_at_random_moments_lose_one_interval_at_most(undisturbed, tmp_path):
    """Every save takes about as long as the steps between, so that many kills hit one. After two of them the latest is damaged."""
    rng, workdir = random.Random(0), tmp_path / "W"
    damages = {6: "truncated", 13: "a bit"}
    last, saving, allowed = 0, 0, INTERVAL
    for kill in range(KILLS):
        running = Running(workdir, *FLAGS, f"--steps={STEPS}")
        _wait(running, lambda: any(line[0] == "p1_rec" for line in running.lines()))
        resumed = [line[1] for line in running.lines() if line[0] == "resumed"]
        assert last - (resumed or [0])[0] <= allowed, (kill, last, resumed)
        time.sleep(rng.uniform(0.0, 1.0))
        _kill(running)
        last = max(line[1] for line in running.lines() if line[0] == "p1_rec")
        assert last < STEPS
        saving += bool(list(_checkpoints(workdir).glob(".step_*")))
        allowed = INTERVAL
        if kill in damages:
            _damage(_checkpoints(workdir), damages[kill])
            allowed = 2 * INTERVAL
    assert saving > 0
    Running(workdir, *FLAGS, f"--steps={STEPS}").ended()
    for a, b in zip(_arrays(workdir, STEPS), undisturbed(STEPS), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.chaos
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_two_that_is_killed_ends_the_other_and_both_go_on(undisturbed, tmp_path, rank):
    workdir, flags = tmp_path / "W", (*FLAGS, f"--steps={FEW}")
    running = Running(workdir, *flags, processes=2)
    _wait(running, lambda: any(line[1] >= 3 * INTERVAL for line in running.lines()))
    _kill(running, rank)
    last = running.lines()[-1][1]
    again = Running(workdir, *flags, processes=2).ended()
    assert again[0][0] == "resumed" and 0 <= last - again[0][1] <= INTERVAL
    for a, b in zip(_arrays(workdir, FEW), undisturbed(FEW, 2), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 48 MB of its own; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.chaos
def test_a_full_disk_ends_the_run_with_a_line_and_room_lets_it_go_on(undisturbed, small_disk):
    workdir, flags = small_disk / "W", (*FLAGS, f"--steps={FEW}")
    running = Running(workdir, *flags)
    _wait(running, lambda: any(line[1] >= 2 * INTERVAL for line in running.lines()))
    ballast = pathlib.Path(small_disk / "ballast")
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            os.truncate(ballast, ballast.stat().st_size - (1 << 16))  # the log of the run is on this disk, too
    running.processes[0].wait(LIMIT_S)
    last = running.lines()[-1][1]
    assert running.processes[0].returncode == 2 and "checkpoint" in running.text().splitlines()[-1], running.text()[
        -3000:
    ]
    ballast.unlink()
    again = Running(workdir, *flags).ended()
    assert again[0][0] == "resumed" and 0 <= last - again[0][1] <= INTERVAL
    for a, b in zip(_arrays(workdir, FEW), undisturbed(FEW), strict=True):
        np.testing.assert_array_equal(a, b)
