"""The backend that an operator runs is that of the device of the computation, and a slow one is reported."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.common import ffi_build
from kernels.drr import drr
from kernels.drr import drr_and_motion
from kernels.splat import splat
from kernels.voxelize import voxelize

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def _cloud(means):
    rng = np.random.default_rng(3)
    density, precision = rng.uniform(0.01, 0.03, (2, 9)), np.tile([0.1, 0.01, 0.0, 0.2, 0.02, 0.15], (2, 9, 1))
    return density, rng.normal(size=(2, 9, 3)) * [4, 3, 2] + means, precision


VIEWS = (
    np.tile(np.concatenate([np.eye(3), [[4.0], [3.0], [-40.0]]], 1), (2, 1, 1)),
    np.tile([50.0, 48.0, 4.0, 3.5], (2, 1)),
)
OPERATORS = {
    "splat": (splat, (9, 11), (*_cloud([0, 0, 700]), np.tile([700.0, 650.0, 5.0, 4.0], (2, 1)))),
    "voxelize": (voxelize, ((7, 6, 8),), _cloud([3, 3, 4])),
    "drr": (drr, (7, 8), (np.random.default_rng(4).uniform(0, 0.02, (9, 7, 8)), *VIEWS)),
    "drr_and_motion": (drr_and_motion, (7, 8), (np.random.default_rng(4).uniform(0, 0.02, (9, 7, 8)), *VIEWS)),
}
TRITON, MOSAIC, CPP = "@__gpu$xla.gpu.triton", "@tpu_custom_call", "@radgs_"


def _arrays(name):
    return [jnp.asarray(a, jnp.float32) for a in OPERATORS[name][2]]


def _function(name, implementation=None):
    """The operator with its gradients, if it has any; a new function each time, so that jax has no trace of it."""
    operator, size, _ = OPERATORS[name]
    draw = functools.partial(lambda *arrays: operator(*arrays, *size, implementation=implementation))

    def both(*arrays):
        value, pull = jax.vjp(draw, *arrays)
        return value, pull(value)

    return draw if name == "drr_and_motion" else both


def _same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def cpp():
    """Skips the test where the C++ kernels cannot be built."""
    try:
        splat(*_arrays("splat"), 9, 11, implementation="ffi_cpu")
    except NotImplementedError as reason:
        pytest.skip(f"ffi_cpu: {reason}")


@pytest.fixture
def gpu_as_default(cpp, monkeypatch):
    """Pretends that the default device is a GPU; computations with arguments committed to the CPU are lowered for the CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize(
    "name,platform,calls",
    [
        ("splat", "cpu", CPP),
        ("splat", "cuda", TRITON),
        ("splat", "rocm", TRITON),
        ("splat", "tpu", MOSAIC),
        ("voxelize", "cpu", CPP),
        ("voxelize", "cuda", TRITON),
        ("voxelize", "tpu", None),
        ("drr", "cpu", CPP),
        ("drr", "cuda", None),
        ("drr_and_motion", "cpu", CPP),
        ("drr_and_motion", "tpu", None),
    ],
)
def test_a_program_holds_the_backend_of_the_platform_that_it_is_lowered_for(name, platform, calls, cpp):
    """The program holds no other backend and no choice among several, although this process's device is a CPU."""
    text = jax.jit(_function(name)).trace(*_arrays(name)).lower(lowering_platforms=(platform,)).as_text()
    assert [call for call in (TRITON, MOSAIC, CPP) if call in text] == ([calls] if calls else [])
    # XLA's backends are loops.
    assert calls != CPP or ("stablehlo.case" not in text and "stablehlo.while" not in text)


@pytest.mark.parametrize("name", OPERATORS)
def test_with_a_gpu_as_default_the_cpu_runs_its_own_backend(name, gpu_as_default, monkeypatch):
    arrays = jax.device_put(_arrays(name), jax.devices("cpu")[0])
    program = jax.jit(_function(name)).lower(*arrays)
    assert CPP in program.as_text() and "stablehlo.while" not in program.as_text()
    compiled, eager = program.compile()(*arrays), _function(name)(*arrays)
    monkeypatch.undo()
    _same(compiled, jax.jit(_function(name))(*arrays))
    _same(eager, _function(name)(*arrays))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_default_device_may_be_set(device, gpu_as_default):
    """It is a name or a device; no argument is committed."""
    draw = lambda *arrays: splat(*arrays, 9, 11, implementation="ffi_cpu")
    with jax.default_device(device if device == "cpu" else jax.devices("cpu")[0]):
        _same(draw(*_arrays("splat")), jax.jit(draw)(*_arrays("splat")))


def test_a_named_backend_is_refused_only_where_it_cannot_run(gpu_as_default):
    arrays = jax.device_put(_arrays("splat"), jax.devices("cpu")[0])
    assert CPP in jax.jit(_function("splat", "ffi_cpu")).lower(*arrays).as_text()
    for implementation in ("pallas_triton", "pallas_tpu"):
        with pytest.raises(NotImplementedError, match="not (gpu|tpu)"):
            jax.jit(_function("splat", implementation)).lower(*arrays)
    with pytest.raises(ExceptionGroup):
        jax.jit(_function("splat", ["pallas_triton", "pallas_tpu"])).lower(*arrays)


def test_a_named_backend_without_its_device_is_refused_when_traced():
    for implementation in ("pallas_triton", "pallas_tpu"):
        with pytest.raises(NotImplementedError, match="the device is cpu"):
            jax.eval_shape(_function("splat", implementation), *_arrays("splat"))


def test_one_export_for_two_platforms(cpp):
    arrays = _arrays("voxelize")
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"radgs_voxelize_{way}") for way in ("forward", "backward")]
    checks.append(jax.export.DisabledSafetyCheck.custom_call(TRITON[1:]))
    exported = jax.export.export(jax.jit(_function("voxelize")), platforms=("cpu", "cuda"), disabled_checks=checks)(
        *arrays
    )
    assert CPP in exported.mlir_module() and TRITON in exported.mlir_module()
    _same(exported.call(*arrays), jax.jit(_function("voxelize"))(*arrays))


def _python(script, **environment):
    """The standard error of a new process."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(pathlib.Path(__file__).parent)]),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_tracing_on_a_cpu_loads_no_other_device_s_backends():
    _python(
        "import sys, jax, test_dispatch as t\n"
        "jax.jit(t._function('splat')).lower(*t._arrays('splat'))\n"
        "assert 'jax.experimental.pallas' not in sys.modules"
    )


def test_processors_next_to_one_gpu_keep_a_split_batch_split(cpp):
    """The arrays may be split over other devices than the default one."""
    _python(
        "import jax, numpy as np, test_dispatch as t\n"
        "mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))\n"
        "jax.device_count = lambda backend=None: 1\n"
        "arrays = jax.device_put(t._arrays('splat'), split)\n"
        "text = jax.jit(t._function('splat')).lower(*arrays).compile().as_text()\n"
        "assert 'radgs_splat_forward' in text and 'all-gather' not in text, text",
        XLA_FLAGS=os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2",
    )


# Messages where the C++ kernels are missing. Only shapes are computed, so nothing is compiled.

SHAPES = """
import jax, test_dispatch as t
for dtype in ("float64", "float32"):
    with jax.enable_x64(dtype == "float64"):
        for name in ("drr", "splat", "voxelize", "splat"):
            shapes = [jax.ShapeDtypeStruct(a.shape, dtype) for a in t.OPERATORS[name][2]]
            jax.eval_shape(t._function(name), *shapes)
"""


def _compiler(folder, body):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\necho call >> {folder / 'calls'}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_compiler_is_mentioned_once(tmp_path):
    said = _python(SHAPES, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), CXX="g++").splitlines()
    assert len(said) == 1 and "no C++ compiler found; install" in said[0] and "four times slower" in said[0]


def test_a_build_that_fails_is_mentioned_and_not_tried_again(tmp_path):
    compiler = _compiler(tmp_path, "echo 'a.h:3: fatal error: no such thing' >&2; echo 'error: and more' >&2; exit 1")
    (said,) = _python(SHAPES, XDG_CACHE_HOME=str(tmp_path), CXX=compiler).splitlines()
    assert "drr.cc did not compile: a.h:3: fatal error: no such thing" in said and "and more" not in said
    assert (tmp_path / "calls").read_text().count("call") == 3  # one for each library


def test_a_library_that_does_not_load_is_mentioned(tmp_path):
    compiler = _compiler(tmp_path, 'for last; do :; done; echo rubbish > "$last"')
    (said,) = _python(SHAPES, XDG_CACHE_HOME=str(tmp_path), CXX=compiler).splitlines()
    assert "drr.cc could not be built or loaded" in said


def test_a_cache_that_cannot_be_written_is_mentioned(tmp_path):
    (tmp_path / "file").touch()
    (said,) = _python(SHAPES, XDG_CACHE_HOME=str(tmp_path / "file"), CXX=_compiler(tmp_path, "")).splitlines()
    assert str(tmp_path / "file") in said and "set XDG_CACHE_HOME" in said


@pytest.mark.parametrize(
    "wanted",
    ["RADGS_NO_FFI=1", "implementation='xla'", "implementation=('ffi_cpu', 'xla')"],
    ids=["env", "name", "order"],
)
def test_no_warning_where_xla_was_requested(tmp_path, wanted):
    script = SHAPES if wanted.startswith("RADGS") else SHAPES.replace("(name)", f"(name, {wanted})")
    environment = {"RADGS_NO_FFI": "1"} if wanted.startswith("RADGS") else {}
    assert _python(script, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), CXX="g++", **environment) == ""


# The CPU that a library is built for.


def _with_cpu(monkeypatch, features, machine="x86_64"):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: f"processor\t: 0\nflags\t\t: {' '.join(features)}\n")
    monkeypatch.setattr(ffi_build.platform, "machine", lambda: machine)


@pytest.mark.parametrize("missing", sorted(ffi_build.X86_64_V3))
def test_every_feature_of_the_target_is_tested(missing, monkeypatch):
    """A virtual machine may, for example, have AVX2 and hide FMA."""
    features = ["fpu", "sse2", *sorted(ffi_build.X86_64_V3), "avx512f"]
    _with_cpu(monkeypatch, features)
    assert ffi_build._has_x86_64_v3()
    _with_cpu(monkeypatch, [feature for feature in features if feature != missing])
    assert not ffi_build._has_x86_64_v3()


def test_kinds_of_cpus_that_share_a_cache_share_no_library(monkeypatch, tmp_path):
    """x86-64 with and without the features, and ARM, which has the same compiler flags as an old x86-64."""
    names = []

    def build(command, **_):
        names.append(pathlib.Path(command[-1]).name)
        raise subprocess.CalledProcessError(1, command, stderr="error: not this time")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", _compiler(tmp_path, ""))
    monkeypatch.setattr(ffi_build.subprocess, "run", build)
    source = REPOSITORY / "kernels" / "drr" / "drr.cc"
    for features, machine in ((ffi_build.X86_64_V3, "x86_64"), ((), "x86_64"), ((), "aarch64")):
        with monkeypatch.context() as patch:
            _with_cpu(patch, features, machine)
            assert "not this time" in ffi_build._why_not.__wrapped__(source, ())
    assert len(set(names)) == 3
