"""Runs a command's `main`: parses flags, sets up the compilation cache, and reports bad input as one line with status 2."""

import atexit
import gc
import os
import pathlib
import sys
from collections.abc import Callable
from collections.abc import Sequence

import jax
from absl import app
from absl import flags

from kernels.tools import program
from radgs_jax import errors

LAST_LABEL = 28
"""The largest VerSe number: T13."""


def label_numbers(values: Sequence[str]) -> list[int]:
    """VerSe numbers of a list of strings.

    Raises:
      InputError: not a whole number from 1 to 28.
    """
    for value in values:
        if not value.isdigit() or not 1 <= int(value) <= LAST_LABEL:
            errors.fail("flags", "--label", repr(value), f"VerSe numbers, 1 to {LAST_LABEL}")
    return [int(value) for value in values]


def numbers(flag: str, values: Sequence[str], wanted: str = "numbers") -> list[float]:
    """Parses a flag's strings as floats.

    Args:
      flag: its name; values: its strings; wanted: what the error message asks for.
    Raises:
      InputError: a string that is not a number.
    """
    try:
        return [float(value) for value in values]
    except ValueError:
        return errors.fail("flags", flag, ",".join(values), wanted)


def bins(flag: str, edges: Sequence[str]) -> list[tuple[float, float]]:
    """Parses a flag's strings as ascending edges of bins (low, high).

    Raises:
      InputError: fewer than two numbers, or not ascending.
    """
    wanted = "ascending numbers from 0, two at least"
    values = numbers(flag, edges, wanted)
    if len(values) < 2 or values[0] < 0 or any(a >= b for a, b in zip(values, values[1:])):
        errors.fail("flags", flag, ",".join(edges), wanted)
    return list(zip(values[:-1], values[1:]))


def run(main: Callable[[], None], define_flags: Callable[[], None]) -> None:
    """Defines and parses the flags and calls `main`.

    Bad flags or input end the program with one line on standard error and status 2, a run that cannot continue with status 1.
    """
    app.define_help_flags()
    define_flags()
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise flags.Error(f"found the argument {rest[0]!r}, wanted flags only")
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "radgs_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # A command compiles about a hundred small programs, which together take as long as a large one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        # Otherwise the garbage collector traverses all of jax's objects once more at exit, which takes half a second.
        atexit.register(gc.freeze)
        main()
    except flags.Error as error:
        program.stop("flags: " + " ".join(str(error).split()))
    except errors.InputError as error:
        program.stop(str(error))
    except errors.RunError as error:
        program.stop(str(error), status=1)
