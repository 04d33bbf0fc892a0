"""Times without compiling: what passes while jax traces, lowers and compiles is left out of both clocks, and nothing else."""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import compile_times
from experiments.runtime import kept_programs
from experiments.runtime.compile_times import Stopwatch

COMPILING = compile_times.PREFIX + "backend_compile_duration"
TRACING = compile_times.PREFIX + "jaxpr_trace_duration"


@contextlib.contextmanager
def _said(event):
    """Tells the listeners of jax that an event begins and ends, as jax does."""
    began = time.time()
    jax.monitoring.record_scalar(event, began)
    try:
        yield
    finally:
        jax.monitoring.record_event_duration_secs(event, time.time() - began)


@pytest.fixture
def spend(monkeypatch):
    """A function that lets seconds of wall-clock and of CPU time pass by the stopwatch's clock."""
    now = np.array([100.0, 50.0])
    monkeypatch.setattr(kept_programs, "clock", now.copy)

    def spend(wall_s, cpu_s):
        now[:] += wall_s, cpu_s

    return spend


def test_each_clock_leaves_out_what_passed_by_it_while_jax_compiled(spend):
    """A compiler that waits takes wall-clock time alone; one with two threads takes more CPU time than that."""
    with Stopwatch() as watch:
        spend(3.0, 2.0)
        with _said(COMPILING):
            spend(8.0, 0.0)
        with _said(TRACING):
            spend(5.0, 10.0)
        with _said("/jax/checkpoint/write/duration"):
            spend(1.0, 0.5)
    assert watch.times() == {"runtime_s": 4.0, "cpu_s": 2.5}


def test_what_compiles_within_something_else_is_left_out_once(spend):
    with Stopwatch() as watch:
        spend(3.0, 2.0)
        with _said(TRACING):
            spend(1.0, 1.0)
            with _said(COMPILING):
                spend(4.0, 6.0)
            spend(1.0, 1.0)
    assert (watch.wall_s, watch.cpu_s) == (3.0, 2.0)


def test_what_has_begun_before_the_block_is_not_left_out_of_it(spend):
    with _said(COMPILING):
        watch = Stopwatch().__enter__()
        spend(2.0, 1.0)
    with _said(TRACING):
        spend(4.0, 4.0)
    watch.__exit__()
    assert (watch.wall_s, watch.cpu_s) == (2.0, 1.0)


def test_programs_that_are_loaded_are_left_out_once(spend):
    """`kept` leaves out the whole time of getting a program, in which jax may compile."""
    with Stopwatch() as watch:
        with _said(COMPILING):
            spend(1.0, 2.0)
        spend(3.0, 2.0)
        began = kept_programs.clock()
        spend(1.0, 1.0)
        with _said(COMPILING):
            spend(5.0, 7.0)
        watch.leave_out(kept_programs.clock() - began)
        with _said(COMPILING):
            spend(2.0, 1.0)
    assert (watch.wall_s, watch.cpu_s) == (3.0, 2.0)


def test_nothing_is_heard_after_the_block(spend):
    """Nor after one that ended with an error."""
    watch = Stopwatch()
    with pytest.raises(KeyError), watch:
        spend(3.0, 2.0)
        raise KeyError
    heard = len(watch._compiled)
    with _said(COMPILING):
        spend(1.0, 1.0)
    assert len(watch._compiled) == heard and (watch.wall_s, watch.cpu_s) == (3.0, 2.0)


def test_what_runs_when_jax_begins_to_compile_counts():
    """Calls return before their results are there."""
    busy = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, a: jnp.sin(a @ a), x))
    x = jnp.full((300, 300), 1e-3)
    busy(x).block_until_ready()
    began = time.perf_counter(), time.process_time()
    busy(x).block_until_ready()
    took_s, spent_s = time.perf_counter() - began[0], time.process_time() - began[1]
    with Stopwatch() as watch:
        found = busy(x)
        with _said(COMPILING):
            time.sleep(2.0 * took_s)
        found.block_until_ready()
    assert watch.cpu_s > 0.5 * spent_s


def test_a_program_that_jax_compiles_on_the_way_does_not_count():
    """The same call twice: the first also compiles, and both take as long by the stopwatch."""

    # A number of this run alone, so that no cache on disk holds the program.
    once = time.time_ns() % 1_000_003

    @jax.jit
    def many(x):
        for i in range(40):
            x = jnp.where(x > i + once, jnp.sin(x), jnp.cos(x) @ x)
        return x

    x, walls, spent, used = np.full((8, 8), 0.5, np.float32), [], [], []
    for _ in range(2):
        with Stopwatch() as watch:
            began = time.perf_counter()
            many(x).block_until_ready()
            walls.append(time.perf_counter() - began)
        spent.append(watch.wall_s)
        used.append(watch.cpu_s)
    assert walls[0] > 0.05 and walls[1] < 0.2 * walls[0]
    assert 0.0 <= spent[0] < 0.3 * walls[0] and 0.0 <= used[0] < 0.3 * walls[0]
    assert spent[1] == pytest.approx(walls[1], abs=0.05)
