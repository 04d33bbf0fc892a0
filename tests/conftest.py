"""Settings shared by all tests: quick compilation, a persistent compilation cache, and a fixture for float64."""

import gc
import os
import pathlib

# The tests compile far longer than they compute: LLVM's cheapest level halves their time, and XLA's older emitters of fused loops
# halve it again. Before jax is imported, and in the environment, so that the programs that tests start do the same, and keep all
# that they compile.
QUICK = " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + QUICK
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.hookimpl(trylast=True)
def pytest_configure():
    from kernels.common import private_cache  # after jaxtyping's plugin, which checks what is imported from then on

    if cache := private_cache.folder("xla"):
        jax.config.update("jax_compilation_cache_dir", str(cache))


LONGEST = ("test_training_runs.py", "test_models.py")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process ends with one while the other is idle."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 30_000
"""Memory areas from which compiled programs are dropped. Linux allows a process 65,530, and XLA crashes at the limit; a test file
takes some thousands."""


@pytest.fixture(scope="module", autouse=True)
def fewer_programs():
    """Each loaded program takes some dozens of memory areas, so that they are dropped between files."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Runs the test with float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compilations():
    """A list that grows with every program that XLA compiles or loads."""
    found = []

    def listen(event, duration_secs, **more):
        if event.endswith("backend_compile_duration"):
            found.append(more)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)
