"""Training by several processes and devices of this machine: the losses of one, and a signal that reaches one of them."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 900
RUN = """
import sys
sys.path[:0] = ['tests/support', '.']
import dataclasses, json, jax, tiny
from absl import flags
from experiments import train
from experiments.runtime import cli, cluster, progress

def scalars(self, step, values):
    if jax.process_index() == 0:
        print(json.dumps([self.stage, step, float(values['loss'])]), flush=True)

def define():
    cluster.define()
    flags.DEFINE_string('workdir', None, '')
    flags.DEFINE_string('stage', 'full', '')
    flags.DEFINE_integer('steps', 3, '')

def main():
    stage = dataclasses.replace(tiny.config().p1, steps=(flags.FLAGS.steps, 3, 3))
    few = dataclasses.replace(stage, steps=(3, 3, 3))
    config = tiny.config(batch=4, labels=(21,), patient_labels=(21,), p1=stage, p2=few, p3=few)
    init = progress.Log.__init__
    progress.Log.__init__ = lambda self, folder, name: (init(self, folder, name), setattr(self, 'stage', name))[0]
    progress.Log.scalars = scalars
    with cluster.joined():
        train.train(config, flags.FLAGS.workdir, flags.FLAGS.stage)

if __name__ == '__main__':
    cli.run(main, define)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts the processes of a run, (workdir, devices of each, processes, *flags) -> [(process, its log)]."""
    script = tmp_path_factory.mktemp("script") / "run.py"
    script.write_text(RUN)

    def start(workdir, devices, processes, *flags):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        forced = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        found = []
        for rank in range(processes):
            joining = [f"--distributed=127.0.0.1:{port},{processes},{rank}"] if processes > 1 else []
            log = workdir.with_name(f"{workdir.name}_{len(flags)}_{rank}.log")
            command = [sys.executable, str(script), f"--workdir={workdir}", *joining, *flags]
            with open(log, "w") as stream:
                options = {"cwd": REPOSITORY, "env": {**os.environ, "XLA_FLAGS": forced}, "stderr": subprocess.STDOUT}
                found.append((subprocess.Popen(command, stdout=stream, **options), log))
        return found

    return start


def _losses(running, status=0):
    """{(stage, step): loss} of a run that ends with a status."""
    codes = [process.wait(LIMIT_S) for process, _ in running]
    logs = [log.read_text() for _, log in running]
    assert codes == [status] * len(running), "\n".join(log[-3000:] for log in logs)
    lines = [line for log in logs for line in re.findall(r'\["(\w+)", (\d+), ([-+.\de]+)\]', log)]
    return {(stage, int(step)): float(loss) for stage, step, loss in lines}


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """Losses of one process with one device."""
    return _losses(start(tmp_path_factory.mktemp("alone") / "W", 1, 1))


@pytest.mark.multiprocess
def test_losses_do_not_depend_on_processes_and_devices(start, alone, tmp_path):
    two = _losses(start(tmp_path / "two", 2, 2))
    one = _losses(start(tmp_path / "one", 4, 1))
    assert two.keys() == one.keys() == alone.keys() and len(two) == 9
    for place, loss in two.items():
        np.testing.assert_allclose(loss, one[place], rtol=1e-5, err_msg=str(place))
        np.testing.assert_allclose(loss, alone[place], rtol=1e-4, err_msg=str(place))


@pytest.mark.multiprocess
def test_a_signal_to_one_process_saves_both_and_another_number_goes_on(start, tmp_path):
    """SIGTERM in the middle of an epoch; one process goes on, and ends as a run of two that nobody stopped."""
    running = start(tmp_path / "W", 2, 2, "--stage=p1_rec", "--steps=400")
    checkpoints, limit = tmp_path / "W" / "checkpoints" / "p1_rec", time.monotonic() + LIMIT_S
    while not list(checkpoints.glob("step_*")) and time.monotonic() < limit:
        assert all(process.poll() is None for process, _ in running), running[0][1].read_text()[-3000:]
        time.sleep(0.2)
    running[1][0].send_signal(signal.SIGTERM)
    stopped = _losses(running, 128 + signal.SIGTERM)
    saved = max(int(path.name[5:]) for path in checkpoints.glob("step_*"))
    assert max(step for _, step in stopped) <= saved < 400
    shutil.copytree(tmp_path / "W", tmp_path / "copy")
    two = _losses(start(tmp_path / "W", 2, 2, "--stage=p1_rec", "--steps=400"))
    one = _losses(start(tmp_path / "copy", 1, 1, "--stage=p1_rec", "--steps=400"))
    assert min(step for _, step in one) >= saved and one.keys() == two.keys()
    first = min(two)
    np.testing.assert_allclose(one[first], two[first], rtol=1e-3)
