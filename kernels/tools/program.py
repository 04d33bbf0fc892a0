"""What the programs of kernels and data_pipelines share: flags of their own, and what is wrong as one line with status 2."""

import sys

from absl import flags


def read_flags(flag_values, help_flag, text, check):
    """Reads a program's flags, then calls `check()`, which may raise flags.Error; False after --help, which prints `text`.

    Bad flags end the program with one line on standard error and status 2.

    Args:
      flag_values: `flags.FlagValues` of the program; help_flag: the holder of its --help.
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


def stop(line, status=2):
    """Ends the program with `line` on standard error and that exit status."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)
