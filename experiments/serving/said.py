"""What a job says while it runs: its step, notes and warnings, and that programs are being compiled."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from experiments.runtime import compiling


class Job:
    """One piece of work of the session."""

    def __init__(self, kind: str, beside: bool) -> None:
        """Args: kind: 'load', 'prepare' or 'register'; beside: whether it was begun in advance, and nobody waits for it."""
        self.kind, self.beside = kind, beside
        self._begun, self._lock = time.monotonic(), threading.Lock()
        self._step, self._compiling = "beginning", False
        self._notes: list[str] = []
        self._warnings: list[str] = []

    def say(self, step: str) -> None:
        """Says what is done from here on."""
        with self._lock:
            self._step, self._compiling = step, False

    def note(self, line: str) -> None:
        """Adds a line about the result."""
        with self._lock:
            self._notes.append(line)

    def warn(self, line: str) -> None:
        """Adds a warning."""
        with self._lock:
            self._warnings.append(line)

    def compiled(self) -> None:
        """A program of the step was compiled, so that others will be."""
        with self._lock:
            self._compiling = True

    def notes(self) -> list[str]:
        """Lines about the result."""
        with self._lock:
            return list(self._notes)

    def warnings(self) -> list[str]:
        """The warnings so far, without repetitions."""
        with self._lock:
            return list(dict.fromkeys(self._warnings))

    def shown(self) -> dict[str, Any]:
        """What the page shows of it, as plain values."""
        with self._lock:
            step = f"{self._step} (compiling, once)" if self._compiling else self._step
            return {"kind": self.kind, "beside": self.beside, "step": step, "seconds": time.monotonic() - self._begun}


class _Handler(logging.Handler):
    """Hands the warnings of one thread to a job."""

    def __init__(self, job: Job) -> None:
        super().__init__(logging.WARNING)
        self._job, self._thread = job, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._job.warn(record.getMessage())


@contextlib.contextmanager
def telling(job: Job) -> Iterator[None]:
    """Inside, warnings of this thread, and jax's compilations, are told to a job."""
    logger, handler = logging.getLogger("absl"), _Handler(job)
    logger.addHandler(handler)
    try:
        with compiling.told(job.compiled):
            yield
    finally:
        logger.removeHandler(handler)
