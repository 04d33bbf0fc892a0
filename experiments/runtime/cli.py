"""Runs a command's `main`: parses flags, sets up the compilation cache, and reports bad input as one line with status 2."""

import atexit
import gc
import pathlib
import re
import sys
from collections.abc import Callable
from collections.abc import Sequence

from absl import flags

from experiments.runtime import endings
from experiments.runtime import events
from kernels.common import private_cache
from kernels.tools import program
from radgs_jax import errors
from radgs_jax import levels

# `--help` of a command lists these flags as its own.
flags.disclaim_key_flags()


def warnings_said() -> list[str]:
    """The warnings that this command has printed, one line each, in order and without repetitions."""
    return endings.warnings_said()


def label_numbers(values: Sequence[str]) -> list[int]:
    """VerSe numbers of levels that are given by name ('L1') or number ('20').

    Raises:
      InputError: neither, or a level twice.
    """
    found = []
    for value in values:
        number = levels.level_number(value)
        if number is None or number in found:
            twice = "" if number is None else ", which is there twice"
            errors.fail(
                "flags", "--label", f"{value!r}{twice}", "names of levels (L1) or VerSe numbers (20), each once"
            )
        found.append(number)
    return found


def bone_labels(values: Sequence[str]) -> list[int]:
    """Labels of bones beyond the spine that are given by their values in the mask.

    Raises:
      InputError: not a whole number within what a label can hold, or a value twice.
    """
    most = 255 - levels.FIRST_BONE
    for place, value in enumerate(values):
        if not value.isdecimal() or not 1 <= int(value) <= most or value in values[:place]:
            errors.fail("flags", "--bone", repr(value), f"values of the mask from 1 to {most}, each once")
    return [levels.FIRST_BONE + int(value) for value in values]


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


def mm_and_degrees(flag: str, values: Sequence[str], most: tuple[float, float]) -> tuple[float, float]:
    """Parses a flag's strings as a length, mm, and an angle, degrees, from 0 to `most`.

    Raises:
      InputError: anything else.
    """
    wanted = f"mm and degrees, such as 1.0,0.3, at most {most[0]:g},{most[1]:g}"
    found = numbers(flag, values, wanted)
    if len(found) != 2 or min(found) < 0 or found[0] > most[0] or found[1] > most[1]:
        errors.fail("flags", flag, ",".join(values), wanted)
    return found[0], found[1]


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


class _Help(flags.BooleanFlag):
    """--help: prints a module's docstring and flags, and ends the program with status 0."""

    def __init__(self, module: str) -> None:
        super().__init__("help", False, "Show this help.", short_name="?")
        self._module = module

    def parse(self, argument):
        super().parse(argument)
        if self.value:
            # absl knows the flags of the module that is run as a program by the program's path.
            place = sys.argv[0] if self._module == "__main__" else self._module
            print(f"{sys.modules[self._module].__doc__}\nflags:\n{flags.FLAGS.module_help(place)}")
            sys.exit(0)


def _one_line(error: flags.Error) -> str:
    """What is wrong with the flags; absl's words for a required flag that is missing are replaced by ours."""
    missing = re.findall(r"Flag --(\w+) must have a value other than None", str(error))
    if missing:
        wanted = "a value" if len(missing) == 1 else "a value for each"
        return f"flags: {', '.join(f'--{name}' for name in missing)}: found nothing, wanted {wanted}"
    return "flags: " + " ".join(str(error).split())


def run(main: Callable[[], None], define_flags: Callable[[], None], log_in: str | None = None) -> None:
    """Defines and parses the flags and calls `main`.

    --help ends the program with status 0. Bad flags, input that cannot be read and output that cannot be written end it with one
    line on standard error and status 2, a run that cannot continue with status 1, and the rest as `endings` says.

    Args:
      log_in: name of the flag that names the run's folder, which gets a log file.
    """
    flags.DEFINE_flag(_Help(main.__module__))
    define_flags()
    flags.DEFINE_enum("log", "text", ["text", "json"], "Progress, warnings and errors as lines for people or as JSON.")
    with endings.one_line_each():
        try:
            rest = flags.FLAGS(sys.argv)[1:]
            if rest:
                raise flags.Error(f"found the argument {rest[0]!r}, wanted flags only")
        except flags.Error as error:
            program.stop(_one_line(error))
    given = flags.FLAGS
    folder = None if log_in is None or given[log_in].value is None else pathlib.Path(given[log_in].value)
    with events.told(given.log, folder), endings.one_line_each():
        # Here, so that --help need not wait for jax.
        import jax

        from experiments.runtime import compiling

        if cache := private_cache.folder("xla"):
            jax.config.update("jax_compilation_cache_dir", str(cache))
        # A command compiles about a hundred small programs, which together take as long as a large one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        # Otherwise the garbage collector traverses all of jax's objects once more at exit, which takes half a second.
        atexit.register(gc.freeze)
        with compiling.said_once():
            main()
