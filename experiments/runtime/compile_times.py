"""Times of code that jax compiles on the way, without the compiling."""

import threading

import jax
import numpy as np

from experiments.runtime import kept_programs

PREFIX = "/jax/core/compile/"
"""What the names of jax's events about tracing, lowering and compiling begin with."""


class Stopwatch(kept_programs.Stopwatch):
    """Like `kept_programs.Stopwatch`, and also without the time that `jax.jit` takes to trace, lower and compile.

    jax says when that begins and when it ends. Both clocks are read there, so that the CPU seconds of all of the compiler's threads
    are left out. What has been dispatched before is waited for and counts; what other threads run meanwhile is left out, too.
    """

    def __enter__(self) -> "Stopwatch":
        self._compiled: list[tuple[np.ndarray, np.ndarray]] = []
        self._open, self._lock, self._began = 0, threading.Lock(), np.zeros(2)
        jax.monitoring.register_scalar_listener(self._begins)
        jax.monitoring.register_event_duration_secs_listener(self._ends)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_scalar_listener(self._begins)
        jax.monitoring.unregister_event_duration_listener(self._ends)
        self._loading += sum((spent for _, spent in self._compiled), np.zeros(2))
        super().__exit__(*error)

    def leave_out(self, seconds: np.ndarray) -> None:
        """Excludes seconds (2,) that have just passed, in which jax may have compiled, of wall-clock and of CPU time."""
        began = kept_programs.clock()[0] - float(seconds[0])
        self._compiled = [(at, spent) for at, spent in self._compiled if at[0] < began]
        super().leave_out(seconds)

    def _begins(self, event, value, **_):
        if not event.startswith(PREFIX):
            return
        if not self._open:
            jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])
        with self._lock:
            # What begins in the middle of something else, or in another thread meanwhile, is a part of it.
            if not self._open:
                self._began = kept_programs.clock()
            self._open += 1

    def _ends(self, event, duration, **_):
        if not event.startswith(PREFIX):
            return
        with self._lock:
            # What began before the block is not left out of it.
            if self._open == 1:
                self._compiled.append((self._began, kept_programs.clock() - self._began))
            self._open = max(0, self._open - 1)
