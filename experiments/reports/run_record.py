"""`run.json`: what a run was made with, so that its results can be traced and made again."""

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib
import numpy as np

import radgs_jax

FORMAT = "radgs-run/1"


class RunRecord:
    """A run from its begin to its end."""

    def __init__(self) -> None:
        self._begun, self._start = time.time(), (time.perf_counter(), time.process_time())

    def finish(self, inputs: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
        """The content of run.json.

        Args:
          inputs: plain values that identify what was read, such as digests of files; warnings: what was said on the way.
        """
        wall_s, cpu_s = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        packages = {"radgs_jax": radgs_jax, "jax": jax, "jaxlib": jaxlib, "numpy": np}
        return {
            "format": FORMAT,
            "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), **{name: p.__version__ for name, p in packages.items()}},
            "machine": {
                "system": platform.platform(),
                "cpus": os.cpu_count(),
                "devices": [str(d) for d in jax.devices()],
            },
            "inputs": inputs,
            "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._begun)),
            "wall_s": round(wall_s, 3),
            "cpu_s": round(cpu_s, 3),
            "warnings": list(warnings),
        }


def _module():
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else os.path.basename(sys.argv[0])
