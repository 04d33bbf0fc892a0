"""What every program's `main` shares: flags, the compilation cache, and bad input as one line with exit status 2."""

import atexit
import gc
import os
import pathlib
import sys

import jax
from absl import app
from absl import flags

from kernels.tools import program
from radgs_jax import errors


def label_numbers(values):
    """VerSe numbers of a list of strings.

    Raises:
      InputError: not a whole number from 1 to 28.
    """
    for value in values:
        if not value.isdigit() or not 1 <= int(value) <= 28:
            errors.fail("flags", "--label", repr(value), "VerSe numbers, 1 to 28")
    return [int(value) for value in values]


def numbers(flag, values, wanted="numbers"):
    """Floats of strings given to a flag of that name.

    Raises:
      InputError: one that is no number; `wanted` says what is.
    """
    try:
        return [float(value) for value in values]
    except ValueError:
        return errors.fail("flags", flag, ",".join(values), wanted)


def bins(flag, edges):
    """[(low, high)] of ascending edges, given as strings to a flag of that name.

    Raises:
      InputError: fewer than two numbers, or not ascending.
    """
    wanted = "ascending numbers from 0, two at least"
    values = numbers(flag, edges, wanted)
    if len(values) < 2 or values[0] < 0 or any(a >= b for a, b in zip(values, values[1:])):
        errors.fail("flags", flag, ",".join(edges), wanted)
    return list(zip(values[:-1], values[1:]))


def run(main, define_flags):
    """Defines and parses flags and calls `main()`.

    Bad flags or input end the program with one line on standard error and status 2, a run that cannot go on with status 1.
    """
    app.define_help_flags()
    define_flags()
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            raise flags.Error(f"found the argument {rest[0]!r}, wanted flags only")
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "radgs_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # A program starts with a hundred small ones, which together take as long as a large one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        # Else the interpreter looks through all that jax has made once more when it ends: half a second.
        atexit.register(gc.freeze)
        main()
    except flags.Error as error:
        program.stop("flags: " + " ".join(str(error).split()))
    except errors.InputError as error:
        program.stop(str(error))
    except errors.RunError as error:
        program.stop(str(error), status=1)
