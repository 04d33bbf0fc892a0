"""Training by two processes on this machine: what one process trains, a signal that reaches one of them, and a lost one."""

import os
import pathlib
import socket
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 400
RUN = """
import sys
sys.path[:0] = ['tests/support', '.']
import dataclasses, jax, json, pathlib, tiny
from absl import flags
from experiments import train
from experiments.runtime import cli, cluster
from radgs_jax.training import update

def define():
    cluster.define()
    flags.DEFINE_string('workdir', None, '')
    flags.DEFINE_integer('steps', 3, '')

def main():
    stage = dataclasses.replace(tiny.config().p1, steps=(flags.FLAGS.steps,) * 3)
    config = tiny.config(p1=stage, batch=4)
    with cluster.joined():
        table = train.train(config, flags.FLAGS.workdir)
        if table:
            print(table)

if __name__ == '__main__':
    cli.run(main, define)
"""


def _command(folder, *flags):
    script = folder / "run.py"
    script.write_text(RUN)
    return [sys.executable, str(script), f"--workdir={folder / 'W'}", *flags]


def _start(folder, devices, processes, *flags):
    """Starts the run's processes with so many devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    found = []
    for rank in range(processes):
        joining = [f"--distributed=127.0.0.1:{port},{processes},{rank}"] if processes > 1 else []
        out = open(folder / f"log_{rank}", "w")
        options = {"cwd": REPOSITORY, "env": environment, "stdout": out, "stderr": subprocess.STDOUT}
        found.append(subprocess.Popen([*_command(folder, *flags), *joining], **options))
    return found


def _finish(folder, running):
    for process in running:
        process.wait(LIMIT_S)
    logs = [(folder / f"log_{rank}").read_text() for rank in range(len(running))]
    return [process.returncode for process in running], logs
