"""What a command says while it runs, beside its results: progress, warnings, and what ended it.

It says so on standard error, as lines for people or, with --log=json, as one JSON object per line, and with the time in `log.txt`
of the run's folder.
"""

import contextlib
import json
import logging
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

from data_pipelines.io import processes

FILE = "log.txt"
_LOGGER = logging.getLogger(__name__)


def say(kind: str, text: str, **values: Any) -> None:
    """Passes an event to the log file, and to standard error where that takes JSON.

    Args:
      kind: 'begin', 'progress', 'warning' or 'error'; text: one line for people; values: the same as plain values, for programs.
    """
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # Its own argument, since a record's text is not formatted without one.
    _LOGGER.info(text, extra={"event": {"time": moment, "kind": kind, **values, "text": text}})


def as_json() -> bool:
    """Whether standard error takes JSON, so that nothing else may be written there."""
    return any(isinstance(handler, _Json) for handler in _LOGGER.handlers)


class _Json(logging.Handler):
    def emit(self, record):
        with contextlib.suppress(OSError, ValueError):  # standard error is closed
            print(json.dumps(record.event), file=sys.stderr, flush=True)


class _KeptIn(logging.Handler):
    """A log file in a folder that the command may have yet to make: a refused command leaves none."""

    def __init__(self, folder):
        super().__init__()
        self._folder, self._lines = folder, []

    def emit(self, record):
        event = record.event
        self._lines.append(f"{event['time']} {event['kind']}: {event['text']}\n")
        self.flush()

    def flush(self):
        if self._lines and self._folder.is_dir() and processes.is_first():
            with contextlib.suppress(OSError):  # the run says itself that its disk is full
                with open(self._folder / FILE, "a", encoding="utf-8") as stream:
                    stream.writelines(self._lines)
                self._lines = []

    def close(self):
        self.flush()
        super().close()


@contextlib.contextmanager
def told(form: str = "text", folder: pathlib.Path | None = None) -> Iterator[None]:
    """Inside, events are told.

    Args:
      form: of standard error, 'text' or 'json'; folder: where the first of jax's processes appends to `log.txt`; None for no file.
    """
    handlers: list[logging.Handler] = [_Json()] if form == "json" else []
    if folder is not None:
        handlers.append(_KeptIn(folder))
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
    for handler in handlers:
        _LOGGER.addHandler(handler)
    say("begin", shlex.join(sys.argv))
    try:
        yield
    finally:
        for handler in handlers:
            _LOGGER.removeHandler(handler)
            handler.close()
