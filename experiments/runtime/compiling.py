"""Says when jax compiles programs instead of loading them: it takes a while, and happens once."""

import contextlib
import sys
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import tqdm

from experiments.runtime import events

COMPILED = "/jax/compilation_cache/cache_misses"
"""Jax's event for a program that was compiled and not loaded, recorded when it is written to the cache."""
COMPILE_TIME = "/jax/core/compile/backend_compile_duration"
"""Jax's event for a program that was compiled or loaded: what shows it where there is no cache."""


@contextlib.contextmanager
def told(tell: Callable[[], None]) -> Iterator[None]:
    """Inside, `tell` is called after each program that was compiled, in the thread that asked for it."""
    cached = bool(jax.config.jax_compilation_cache_dir)

    def event(name: str, **more: Any) -> None:
        if name == COMPILED:
            tell()

    def duration(name: str, seconds: float, **more: Any) -> None:
        if name == COMPILE_TIME and not cached:
            tell()

    jax.monitoring.register_event_listener(event)
    jax.monitoring.register_event_duration_secs_listener(duration)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_listener(event)
        jax.monitoring.unregister_event_duration_listener(duration)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Inside, the first program that is compiled brings a line into the log, and on a terminal to standard error."""
    said = []

    def say() -> None:
        if not said:
            kept = bool(jax.config.jax_compilation_cache_dir)
            said.append("compiling, once: later starts load these programs" if kept else "compiling")
            events.say("progress", said[0])
            if sys.stderr.isatty() and not events.as_json():
                tqdm.tqdm.write(said[0], file=sys.stderr)

    with told(say):
        yield
