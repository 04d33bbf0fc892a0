"""Starts `tiny_train` as one or several of jax's processes, and reads what it prints."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 900


class Running:
    """The processes of a run.

    Attributes:
      processes: of subprocess; logs: their output.
    """

    def __init__(self, workdir, *flags, devices=1, processes=1):
        """Starts them; devices: of each process."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        # The tests' quick loops round by their shapes, which differ between numbers of devices; the last of two flags counts.
        xla = f"--xla_cpu_use_fusion_emitters=true --xla_force_host_platform_device_count={devices}"
        environment = {
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla}",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "support")]),
        }
        self.processes, self.logs = [], []
        for rank in range(processes):
            joining = [f"--distributed=127.0.0.1:{port},{processes},{rank}"] if processes > 1 else []
            script = str(REPOSITORY / "tests" / "support" / "tiny_train.py")
            command = [sys.executable, script, f"--workdir={workdir}", *joining, *flags]
            self.logs.append(workdir.with_name(f"{workdir.name}_{rank}.log"))
            with open(self.logs[-1], "w") as stream:
                options = {"cwd": REPOSITORY, "env": environment, "stderr": subprocess.STDOUT}
                self.processes.append(subprocess.Popen(command, stdout=stream, **options))

    def text(self):
        """What all have printed so far."""
        return "\n".join(log.read_text() for log in self.logs)

    def lines(self):
        """The lines of JSON that have been printed so far."""
        return [json.loads(line) for line in re.findall(r'\["\w+", [^\[\]]*\]', self.text())]

    def ended(self, status=0):
        """`lines`, when all have ended with a status."""
        codes = [process.wait(LIMIT_S) for process in self.processes]
        assert codes == [status] * len(codes), self.text()[-6000:]
        return self.lines()

    def stopped(self):
        """Whether none is running."""
        return all(process.poll() is not None for process in self.processes)
