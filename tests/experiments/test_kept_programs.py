"""Kept programs: their results, when they are traced, what names their files, and what a stopwatch leaves out."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import kept_programs
from experiments.runtime import sealed_files
from kernels.drr import drr_and_motion
from radgs_jax import gaussians
from radgs_jax.models import backbones
from radgs_jax.models.config import ModelConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_programs, "_folder", lambda: tmp_path)
    return tmp_path


def _cloud(count=30):
    rng = np.random.default_rng(2)
    q = rng.normal(size=(count, 4))
    return gaussians.Gaussians(
        density=jnp.asarray(rng.uniform(0.01, 0.05, count), jnp.float32),
        mean=jnp.asarray(rng.normal(size=(count, 3)) * [5.0, 9.0, 14.0] + [3.0, -4.0, 7.0], jnp.float32),
        scale=jnp.asarray(rng.uniform(0.5, 3.0, (count, 3)), jnp.float32),
        quaternion=jnp.asarray(q / np.linalg.norm(q, axis=-1, keepdims=True), jnp.float32),
    )


def _traced(function):
    """The function, and a list that grows with each trace."""
    traces = []

    def counted(*args, **options):
        traces.append(1)
        return function(*args, **options)

    counted.__module__, counted.__qualname__ = function.__module__, function.__qualname__
    return counted, traces


def test_a_second_process_does_not_trace_and_gives_the_same(folder):
    """A second `kept` simulates a new process: it shares only files with the first."""
    motion = jnp.eye(4).at[:3, 3].set(jnp.asarray([1.0, 2.0, -3.0]))
    wanted = gaussians.move(_cloud(), motion)
    for expected in (1, 0):
        function, traces = _traced(gaussians.move)
        call = kept_programs.kept(function)
        for _ in range(2):
            found = call(_cloud(), motion)
        assert len(traces) == expected
        assert isinstance(found, gaussians.Gaussians)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(list(folder.iterdir())) == 1


def _project(volume, matrix, intrinsics, size, step_mm):
    return drr_and_motion(volume, matrix, intrinsics, size, size, step_mm=step_mm)


def test_the_kernels_of_this_machine_are_there_after_loading(folder):
    rng = np.random.default_rng(4)
    volume = jnp.asarray(rng.uniform(0, 0.02, (9, 7, 11)), jnp.float32)
    index_from_camera = jnp.eye(4).at[:3, 3].set(jnp.asarray([4.0, 3.0, -60.0]))[None, :3]
    intrinsics = jnp.asarray([[30.0, 31.0, 3.5, 4.5]])
    # Compiled as well, because drr's rays round differently where each operation runs by itself.
    wanted = jax.jit(_project, static_argnums=(3, 4))(volume, index_from_camera, intrinsics, 8, 0.7)
    for _ in range(2):
        call = kept_programs.kept(_project, static_argnames=("size", "step_mm"))
        found = call(volume, index_from_camera, intrinsics, size=8, step_mm=0.7)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shapes_static_arguments_and_sources_name_the_program(folder, monkeypatch):
    def power(x, n):
        return x**n

    call = kept_programs.kept(power, static_argnames="n")
    x = np.arange(3, dtype=np.float32)
    for count, (value, n) in enumerate(((x, 2), (x, 3), (x[:2], 3)), 1):
        np.testing.assert_allclose(call(value, n=n), value**n, rtol=1e-6)
        assert len(list(folder.iterdir())) == count
    monkeypatch.setattr(sealed_files, "sources", lambda packages: "changed")
    kept_programs.kept(power, static_argnames="n")(x, n=2)
    assert len(list(folder.iterdir())) == 4


def test_nothing_is_kept_of_a_backbone_that_only_its_code_describes(folder):
    def scaled(x, config):
        return config.voxel_mm * x

    call = kept_programs.kept(scaled, static_argnames="config")
    for config, files in ((ModelConfig(backbone_2d=(backbones.ResNet18, ())), 0), (ModelConfig(), 1)):
        np.testing.assert_allclose(call(np.float32(2.0), config=config), 2.0 * config.voxel_mm)
        assert len(list(folder.iterdir())) == files


def test_only_the_programs_that_were_used_last_stay_in_memory(folder, monkeypatch):
    """A process has a limited number of memory areas, and each program takes many. A dropped one is loaded from its file again."""
    monkeypatch.setattr(kept_programs, "MAX_LOADED", 3)
    traced = []

    def double(x):
        traced.append(x.shape)
        return 2.0 * x

    call, compiled, real = kept_programs.kept(double), [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *a, **o: compiled.append(1) or real(self, *a, **o))
    for size in (1, 2, 3, 1, 4, 1, 2):
        np.testing.assert_array_equal(call(np.ones(size, np.float32)), 2.0 * np.ones(size))
    # The fourth size drops the second one, which was not used for longest; only that one is needed again.
    assert len(compiled) == 5 and traced == [(1,), (2,), (3,), (4,)]


@pytest.mark.parametrize("package", ["radgs_jax", "jax", "jaxlib", "flax"])
def test_the_version_of_each_package_names_the_program(folder, package, monkeypatch):
    call = kept_programs.kept(lambda x: 2.0 * x)
    call(np.float32(1.5))
    monkeypatch.setattr(f"{package}.__version__", "0.0.1")
    kept_programs.kept(lambda x: 2.0 * x)(np.float32(1.5))
    assert len(list(folder.iterdir())) == 2


def test_slow_kernels_are_mentioned_where_programs_are_only_loaded(tmp_path):
    """Without a compiler; a first process keeps the program, and the second traces nothing."""
    script = (
        "import sys, jax, test_kept_programs as t; from experiments.runtime import kept_programs\n"
        "jax.config.update('jax_compilation_cache_dir', sys.argv[1] + '/xla')\n"
        "call = kept_programs.kept(t._project, static_argnames=('size', 'step_mm'))\n"
        "shapes = [jax.numpy.zeros(shape, 'float32') for shape in ((9, 7, 11), (1, 3, 4), (1, 4))]\n"
        "call.lower(*shapes, size=8, step_mm=0.7)"
    )
    here = pathlib.Path(__file__).parent
    search = os.pathsep.join([str(here.parents[1]), str(here)])
    environment = {"PYTHONPATH": search, "PATH": str(tmp_path), "CXX": "g++", "XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr.count("C++ kernels are not available") == 1, done.stderr
    assert len(list((tmp_path / "traces").iterdir())) == 1


def test_without_a_cache_it_is_jit(monkeypatch):
    monkeypatch.setattr(kept_programs, "_folder", lambda: None)
    function, traces = _traced(lambda x: 2.0 * x)
    call = kept_programs.kept(function)
    np.testing.assert_allclose([call(1.5), call(2.5)], [3.0, 5.0])
    assert len(traces) == 1


def _slow_to_trace(seconds):
    """A function whose tracing takes that much wall-clock time, half of it on the CPU."""

    def double(x):
        time.sleep(seconds / 2)
        end = time.process_time() + seconds / 2
        while time.process_time() < end:
            pass
        return 2.0 * x

    return kept_programs.kept(double)


@pytest.mark.parametrize("where", ["kept on disk", "nowhere"])
def test_a_stopwatch_leaves_out_what_a_first_call_spends_on_its_program(where, tmp_path, monkeypatch):
    """The same with a folder, where the program is exported and compiled, and without one."""
    monkeypatch.setattr(kept_programs, "_folder", lambda: tmp_path if where == "kept on disk" else None)
    call, seconds = _slow_to_trace(0.6), 0.6
    start = time.perf_counter(), time.process_time()
    with kept_programs.Stopwatch() as watch:
        np.testing.assert_allclose(call(np.float32(1.5)), 3.0)
    wall_s, cpu_s = time.perf_counter() - start[0], time.process_time() - start[1]
    assert watch.wall_s <= wall_s - seconds and watch.cpu_s <= cpu_s - seconds / 2
    assert 0.0 <= watch.wall_s < 0.2 and watch.times() == {"runtime_s": watch.wall_s, "cpu_s": watch.cpu_s}
    # The program is there now: nothing is left out of a second call, nor of anything else.
    left_out = []
    monkeypatch.setattr(kept_programs.Stopwatch, "leave_out", lambda self, seconds: left_out.append(seconds))
    with kept_programs.Stopwatch() as watch:
        call(np.float32(2.5))
        time.sleep(0.05)
    assert not left_out and watch.wall_s >= 0.05


def test_a_stopwatch_counts_all_but_its_own_threads_programs(folder):
    """Another thread's compilation does not hold up this one, so that it is not this one's to leave out."""
    call = _slow_to_trace(0.2)
    with kept_programs.Stopwatch() as watch:
        thread = threading.Thread(target=call, args=(np.float32(1.0),))
        thread.start()
        thread.join()
    assert watch.wall_s >= 0.2
    call(np.float32(1.0))  # outside of any block, and with one that an error has ended
    with pytest.raises(KeyError):
        with kept_programs.Stopwatch() as watch:
            raise KeyError
    assert watch.wall_s >= 0.0 and kept_programs._watch.get() is None


def test_kept_shapes_are_those_of_the_function(folder):
    def init(width):
        return {"a": {"kernel": jnp.zeros((2, width)), "bias": jnp.zeros(width, bool)}, "b": jnp.zeros((), jnp.int32)}

    wanted = jax.eval_shape(lambda: init(5))
    assert kept_programs.kept_shapes(init, 5) == wanted
    function, traces = _traced(init)
    assert kept_programs.kept_shapes(function, 5) == wanted and not traces
    assert kept_programs.kept_shapes(function, 6)["a"]["kernel"].shape == (2, 6) and len(traces) == 1


def test_a_lowered_program_compiled_is_what_calls_run(folder, compilations):
    for _ in range(2):
        call = kept_programs.kept(gaussians.move)
        motion = jnp.eye(4).at[0, 3].set(2.0)
        call.lower(_cloud(), motion).compile()
        before = len(compilations)
        assert before
        call(_cloud(), motion)
        assert len(compilations) == before


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(kept_programs, "_folder", lambda: tmp_path / "file" / "traces")
    for _ in range(2):
        function, traces = _traced(lambda x: 2.0 * x)
        np.testing.assert_allclose(kept_programs.kept(function)(np.float32(1.5)), 3.0)
        assert len(traces) == 1
    assert kept_programs.kept_shapes(lambda n: {"a": jnp.zeros(n)}, 3)["a"].shape == (3,)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_damaged_files_are_made_again(folder):
    def init(width):
        return {"a": jnp.zeros((2, width))}

    def results():
        return kept_programs.kept(gaussians.move)(_cloud(), jnp.eye(4)), kept_programs.kept_shapes(init, 5)

    wanted = results()
    paths = list(folder.iterdir())
    assert len(paths) == 2
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = results()
    np.testing.assert_array_equal(found[0].mean, wanted[0].mean)
    assert found[1] == wanted[1]
    mended = {path: path.read_bytes() for path in folder.iterdir()}
    results()
    assert {path: path.read_bytes() for path in folder.iterdir()} == mended and set(mended) == set(paths)
