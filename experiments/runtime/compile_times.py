"""Times of code that jax compiles on the way, without the compiling."""

import time

import jax
import numpy as np

from experiments.runtime import kept_programs

PREFIX = "/jax/core/compile/"
"""What the names of jax's events about tracing, lowering and compiling begin with."""


class Stopwatch(kept_programs.Stopwatch):
    """Like `kept_programs.Stopwatch`, and also without the time that `jax.jit` takes to trace, lower and compile.

    Both count what happens in the `with` block in all threads.
    """

    def __enter__(self) -> "Stopwatch":
        self._compiled: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)
        spent = sum(seconds for _, seconds in self._compiled)
        self._loading += spent
        super().__exit__(*error)
        self.wall_s, self.cpu_s = max(self.wall_s, 0.0), max(self.cpu_s, 0.0)

    def leave_out(self, seconds: np.ndarray) -> None:
        """Excludes seconds (2,) that have just passed, in which jax may have compiled, of wall-clock and of CPU time."""
        began = time.perf_counter() - float(seconds[0])
        self._compiled = [(at, spent) for at, spent in self._compiled if at < began]
        super().leave_out(seconds)

    def _hear(self, event, duration, **_):
        if event.startswith(PREFIX):
            self._compiled.append((time.perf_counter(), duration))
