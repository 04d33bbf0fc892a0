"""Runs code in an interpreter of its own, in which nothing of ours has been imported yet."""

import os
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
    return _printed(["-c", code], options)


def end(code: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The code's exit status, standard output and standard error; options: as in `run`."""
    return _ended(["-c", code], options)


def run_script(script: pathlib.Path | str, *arguments: object) -> str:
    """What a test file prints that is run as a script, with the compiler's ordinary settings instead of the tests' quick ones."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests" / "support")))
    return _printed([str(script), *map(str, arguments)], {"env": environment})


def _ended(arguments, options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, **{"cwd": REPOSITORY, **options}
    )


def _printed(arguments, options):
    done = _ended(arguments, options)
    assert done.returncode == 0, done.stderr
    return done.stdout
