"""Settings shared by all tests: a persistent compilation cache, and a fixture for float64."""

import os
import pathlib

import jax
import pytest

_cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
jax.config.update("jax_compilation_cache_dir", str(_cache / "radgs_jax" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def x64():
    """Runs the test with float64 enabled."""
    with jax.enable_x64(True):
        yield
