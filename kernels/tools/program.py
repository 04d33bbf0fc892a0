"""Command lines of programs with their own flags: errors are one line on standard error and status 2."""

import sys
from collections.abc import Callable
from typing import NoReturn

from absl import flags


def read_flags(
    flag_values: flags.FlagValues, help_flag: flags.FlagHolder, text: str | None, check: Callable[[], object]
) -> bool:
    """Reads and checks a program's flags; bad ones end the program with one line on standard error and status 2.

    Args:
      flag_values: the program's flags.
      help_flag: its --help.
      text: printed after --help, before the flags.
      check: raises flags.Error for flags that are wrong.
    Returns:
      False after --help: there is nothing to do.
    """
    try:
        rest = flag_values(sys.argv)[1:]
        if help_flag.value:
            print(f"{text}\n{flag_values.get_help()}")
            return False
        if rest:
            raise flags.Error(f"found the argument {rest[0]!r}, wanted flags only")
        check()
    except flags.Error as error:
        stop("flags: " + " ".join(str(error).split()))
    return True


def stop(line: str, status: int = 2) -> NoReturn:
    """Ends the program with `line` on standard error and that exit status."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)
