"""Times without compiling: what jax says that it took to trace, lower and compile is left out, and nothing else."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import compile_times
from experiments.runtime.compile_times import Stopwatch

COMPILING = compile_times.PREFIX + "backend_compile_duration"


def _say(event, seconds):
    """Tells the listeners of jax of an event that has just ended."""
    jax.monitoring.record_event_duration_secs(event, seconds)


def _work(seconds):
    """Keeps the process busy for so long by its own clock of CPU time, and returns the wall-clock time that took."""
    began, until = time.perf_counter(), time.process_time() + seconds
    while time.process_time() < until:
        pass
    return time.perf_counter() - began


def test_what_compiles_is_left_out_and_the_rest_is_timed():
    with Stopwatch() as watch:
        worked = _work(0.3)
        _say(COMPILING, 0.1)
        _say(compile_times.PREFIX + "jaxpr_trace_duration", 0.05)
        _say("/jax/checkpoint/write/duration", 5.0)
    assert watch.wall_s == pytest.approx(worked - 0.15, abs=0.05)
    assert watch.cpu_s == pytest.approx(0.15, abs=0.05)
    assert watch.times() == {"runtime_s": watch.wall_s, "cpu_s": watch.cpu_s}


def test_a_program_that_jax_compiles_on_the_way_does_not_count():
    """The same call twice: the first also compiles, and both take as long by the stopwatch."""

    # A number of this run alone, so that no cache on disk holds the program.
    once = time.time_ns() % 1_000_003

    @jax.jit
    def many(x):
        for i in range(40):
            x = jnp.where(x > i + once, jnp.sin(x), jnp.cos(x) @ x)
        return x

    x, walls, spent = np.full((8, 8), 0.5, np.float32), [], []
    for _ in range(2):
        with Stopwatch() as watch:
            began = time.perf_counter()
            many(x).block_until_ready()
            walls.append(time.perf_counter() - began)
        spent.append(watch.wall_s)
    assert walls[0] > 0.05 and walls[1] < 0.2 * walls[0]
    assert 0.0 <= spent[0] < 0.3 * walls[0]
    assert spent[1] == pytest.approx(walls[1], abs=0.05)


def test_programs_that_are_loaded_are_left_out_once():
    """`kept` leaves out the whole time of getting a program, in which jax may compile."""
    with Stopwatch() as watch:
        before = _work(0.1)
        began = time.perf_counter(), time.process_time()
        _work(0.2)
        _say(COMPILING, 0.15)
        watch.leave_out(np.array([time.perf_counter() - began[0], time.process_time() - began[1]]))
        _say(COMPILING, 0.05)
    assert watch.wall_s == pytest.approx(before - 0.05, abs=0.05)
    assert watch.cpu_s == pytest.approx(0.05, abs=0.05)


def test_a_time_is_never_negative():
    """Threads compile side by side, and each says how long it took."""
    with Stopwatch() as watch:
        _say(COMPILING, 3.0)
        _say(COMPILING, 3.0)
    assert watch.wall_s == watch.cpu_s == 0.0


def test_nothing_is_heard_after_the_block():
    """Nor after one that ended with an error."""
    watch = Stopwatch()
    with pytest.raises(KeyError), watch:
        _work(0.1)
        raise KeyError
    timed, heard = watch.wall_s, len(watch._compiled)
    _say(COMPILING, 1.0)
    assert len(watch._compiled) == heard and watch.wall_s == timed > 0.0
