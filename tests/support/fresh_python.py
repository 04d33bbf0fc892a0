"""Runs code in an interpreter of its own, in which nothing of ours has been imported yet."""

import pathlib
import subprocess
import sys
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def run(code: str, **options: Any) -> str:
    """What the code prints, run from the repository; it fails with the code's standard error.

    Args:
      options: of `subprocess.run`, such as cwd or env.
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, **{"cwd": REPOSITORY, **options})
    assert done.returncode == 0, done.stderr
    return done.stdout
