"""How a command ends, and what it says on the way: one line for whatever stops it, and one for each warning.

Bad input, outputs that cannot be written and runs that cannot continue are errors of `radgs_jax.errors`. This module turns the
rest into a line and a status of its own: signals, memory that is used up, files and pipes that fail. Any other exception is a
fault of this program, and keeps its traceback.
"""

import concurrent.futures
import contextlib
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import NoReturn

import tqdm

from experiments.runtime import events
from kernels.tools import program
from radgs_jax import errors

CANNOT_CONTINUE, UNUSABLE, REFUSED, OUT_OF_MEMORY = 1, 2, 3, 4
"""Exit statuses: a run that cannot continue; input or output that cannot be used; a refused pose, with `register --strict`; memory
that is used up."""
OF_A_SIGNAL = 128
"""Added to a signal's number, as shells do: 130 after Ctrl-C, 143 after SIGTERM, 141 where the reader of the output has gone."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a command to end."""
SHOWN_CHARACTERS = 240
"""Maximum length of another library's message, characters; chosen by hand, so that a message stays a line."""
LINE_CHARACTERS = 600
"""Maximum length of a warning, characters; chosen by hand, longer than any of ours."""
_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")
"""Jax's warning about an entry of its cache, with the program's name."""

_said: list[str] = []


class Stopped(KeyboardInterrupt):
    """A signal that asked for the end.

    Attributes:
      number: the signal's.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{text and '; '}{text}")
        self.number = number


def warnings_said() -> list[str]:
    """The warnings that this command has printed, in order, without repetitions."""
    return list(dict.fromkeys(_said))


def warn(text: object) -> None:
    """Prints a warning on standard error, in one line of printable characters and beside a progress bar, and remembers it."""
    line = _line(text)
    _said.append(line)
    events.say("warning", line)
    if not events.as_json():
        with contextlib.suppress(OSError, ValueError):  # standard error is closed
            tqdm.tqdm.write(f"warning: {line}", file=sys.stderr)


def _line(text):
    line = " ".join(str(text).split())
    line = line if len(line) <= LINE_CHARACTERS else f"{line[:LINE_CHARACTERS]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class _Handler(logging.Handler):
    def emit(self, record):
        warn(record.getMessage())


@contextlib.contextmanager
def one_line_each() -> Iterator[None]:
    """Inside, warnings of this program and of its libraries are lines, and what stops the program is one, with its status.

    Raises:
      SystemExit: after the line.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_warnings_as_lines())
        stack.enter_context(_signals(_stop))
        try:
            yield
            sys.stdout.flush()
        except errors.InputError as error:
            _end(str(error), UNUSABLE)
        except errors.RunError as error:
            _end(str(error), CANNOT_CONTINUE)
        except Stopped as error:
            _end(str(error), OF_A_SIGNAL + error.number)
        except KeyboardInterrupt:
            _end("stopped by SIGINT", OF_A_SIGNAL + signal.SIGINT)
        except MemoryError as error:
            _end(_out_of_memory(error), OUT_OF_MEMORY)
        except BrokenPipeError:
            _silence()
            _end("standard output: found nobody who reads it", OF_A_SIGNAL + signal.SIGPIPE)
        except OSError as error:
            _silence()
            _end(_unusable(error), UNUSABLE)
        except concurrent.futures.BrokenExecutor:
            line = "a worker process: found it ended by the system, perhaps for memory, wanted it to finish; run again to go on"
            _end(line, CANNOT_CONTINUE)
        except RuntimeError as error:  # jax's own is one
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            _end(_out_of_memory(error), OUT_OF_MEMORY)


def _end(line, status):
    events.say("error", line, status=status)
    if events.as_json():
        sys.exit(status)
    program.stop(line, status)


def end_at_once(line: str) -> NoReturn:
    """Ends the program with a line and CANNOT_CONTINUE, without what is else done at exit."""
    try:
        _end(line, CANNOT_CONTINUE)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(CANNOT_CONTINUE)


def _out_of_memory(error):
    text = _line(error)[:SHOWN_CHARACTERS]
    return f"memory: found too little{text and ': '}{text}, wanted enough: fewer or smaller inputs, or another machine"


def _unusable(error):
    place = " and ".join(str(name) for name in (error.filename, error.filename2) if name) or "a file or stream"
    return _line(f"{place}: file: found {error.strerror or error}, wanted one that can be read or written")


def _silence():
    """Standard output goes nowhere, so that what is left in its buffer fails no second time at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _warnings_as_lines():
    handler, before = _Handler(logging.WARNING), threading.excepthook
    root, absl = logging.getLogger(), logging.getLogger("absl")
    own = absl.handlers[:], absl.propagate
    absl.handlers, absl.propagate = [], True
    # Importing orbax gives the root logger a handler of its own, which would print every line a second time.
    others = [other for other in root.handlers if type(other) is logging.StreamHandler]
    for other in others:
        root.removeHandler(other)
    root.addHandler(handler)
    threading.excepthook = lambda found: _thread_failed(found, before)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            yield
    finally:
        root.removeHandler(handler)
        for other in others:
            root.addHandler(other)
        absl.handlers, absl.propagate = own
        threading.excepthook = before


def _thread_failed(found, before):
    """Logs are written by a thread of their own, whose full disk must not be a traceback."""
    if isinstance(found.exc_value, OSError):
        warn(_unusable(found.exc_value))
    else:
        before(found)


def _show(message, category, filename, lineno, file=None, line=None):
    import jax  # here, so that --help need not wait for it

    unreadable = _UNREADABLE.match(str(message))
    if unreadable and jax.config.jax_compilation_cache_dir:
        folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
        _drop_damaged(folder, unreadable[1])
        warn(f"{folder}: the compiled program {unreadable[1]} was damaged, and is made again")
    else:
        warn(message)


def _drop_damaged(folder, name):
    """Removes entries of jax's cache that cannot be unpacked, since jax never replaces one."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            if entry.startswith(f"{name}-"):
                try:
                    zlib.decompress((folder / entry).read_bytes())
                except zlib.error:
                    (folder / entry).unlink(missing_ok=True)


def _stop(number, frame):
    raise Stopped(number)


@contextlib.contextmanager
def _signals(handler):
    """Handles SIGNALS inside, where they are not ignored; only a process's first thread can."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: old for number, old in found.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def held() -> Iterator[list[int]]:
    """Inside, a signal that asks for the end is only noted, so that work can be saved first; a second one ends it at once.

    Yields:
      the numbers of the signals so far.
    Raises:
      Stopped: at the end, if there was one.
    """
    asked = []

    def note(number, frame):
        if asked:
            raise Stopped(number)
        asked.append(number)

    with _signals(note):
        yield asked
    if asked:
        raise Stopped(asked[0])
