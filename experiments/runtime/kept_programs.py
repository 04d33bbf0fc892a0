"""Compiled functions whose traces outlive the process.

Jax's persistent cache saves a new process XLA's work, but not tracing and lowering, which take longer. The StableHLO of a
`kept` function is therefore stored next to that cache, in a file named by everything it depends on: the sources, the versions of
this package, jax, jaxlib and flax, the kernels' backends, the static arguments and the shapes. This is done on a CPU only, where a
command is often started for one case; on other platforms, and without a cache, `kept` is `jax.jit`. A file holds its
SHA-256, since a damaged program could be another one; such a file is made again.
"""

import collections
import contextvars
import functools
import hashlib
import json
import pathlib
import threading
import time
import types
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from jax import export

import radgs_jax
from experiments.runtime import sealed_files
from kernels.common import dispatch
from kernels.common import private_cache
from kernels.drr import ffi_cpu as drr_library
from kernels.splat import ffi_cpu as splat_library
from kernels.voxelize import ffi_cpu as voxelize_library
from radgs_jax import gaussians
from radgs_jax.models import matching
from radgs_jax.models import radgs_reg
from radgs_jax.models import recm
from radgs_jax.models.config import ModelConfig
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import projection

PACKAGES = ("kernels", "radgs_jax", "data_pipelines", "experiments")
RESULTS = (
    gaussians.Gaussians, matching.Matches, recm.Reconstruction, radgs_reg.Registration,
    gauss_newton.Candidates, gauss_newton.Window, projection.Projection,
)  # fmt: skip
"""Classes of the pytree nodes that kept functions take and return, apart from tuples, lists and dicts."""

DIGEST_CHARACTERS = 24
"""Length of the digest in a file's name: 96 bits, so that two programs never share a name."""

MAX_LOADED = 24
"""Programs of one function that are in memory; the one that was not used for longest goes first. A program of a refinement takes
1,600 of the 65,530 memory areas that Linux lets a process have, and a vertebra of a new size needs up to six. Twice as many end the
process; half loads programs again where vertebrae of a few sizes take turns."""
_watch = contextvars.ContextVar("stopwatch", default=None)


class Stopwatch:
    """Times a `with` block, excluding the time that `kept` functions called in its thread spend on loading or compiling programs.

    Attributes:
      wall_s, cpu_s: seconds of wall-clock and of the process's CPU time, set when the block ends.
    """

    def __enter__(self) -> "Stopwatch":
        self._start, self._loading = clock(), np.zeros(2)
        self._token = _watch.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _watch.reset(self._token)
        self.wall_s, self.cpu_s = (clock() - self._start - self._loading).tolist()

    def leave_out(self, seconds: np.ndarray) -> None:
        """Excludes seconds (2,) of wall-clock and of CPU time."""
        self._loading += seconds

    def times(self) -> dict[str, float]:
        """Both times under the names that result files use."""
        return {"runtime_s": self.wall_s, "cpu_s": self.cpu_s}


def count_cpu(seconds: float) -> None:
    """Adds CPU seconds of another process, which works for this thread, to the thread's `Stopwatch`, if there is one."""
    if watch := _watch.get():
        watch.leave_out(np.array([0.0, -seconds]))


def clock() -> np.ndarray:
    """Seconds (2,) of wall-clock and of the process's CPU time, each since some moment."""
    return np.array([time.perf_counter(), time.process_time()])


def kept(function: Callable, static_argnames: str | Sequence[str] = ()) -> Callable:
    """`jax.jit` whose traces are kept on disk, with the same signature.

    The result has `lower` as well; once its result is compiled, calls with such arguments run that program. A file that is damaged,
    or whose program cannot be lowered, is made again. Where no file can be written, nothing is kept, and a warning is logged. A
    `Stopwatch` excludes the time that a call spends on obtaining its program.

    Args:
      function: a function of arrays; static_argnames: its static arguments, keyword-only and fully described by their `repr`.
        Nothing is kept of a `ModelConfig` with `own_backbones`, whose code no digest covers.
    """
    jitted = jax.jit(function, static_argnames=static_argnames)
    programs, compiled, paths, lock = {}, collections.OrderedDict(), {}, threading.Lock()

    def program(args, options):
        """The key of a program, which is put into `programs`, and the program's arguments."""
        leaves, tree = jax.tree.flatten(args)
        leaves = [leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf) for leaf in leaves]
        key = tree, tuple(jax.typeof(leaf) for leaf in leaves), tuple(sorted(options.items()))
        if key not in programs:
            flat = jax.jit(lambda *leaves: jitted(*jax.tree.unflatten(tree, leaves), **options))
            folder = None if _has_own_code(options) else _folder()
            if folder:
                paths[key] = _path(folder, function, key, "stablehlo")
                flat = jax.jit(_exported(paths[key], flat, leaves).call)
            programs[key] = flat
        return key, leaves

    @functools.wraps(function)
    def call(*args, **options):
        start = clock()
        key, leaves = program(args, options)
        ready = used(key)
        if ready is None:
            ready = lower(*args, **options).compile()
            if watch := _watch.get():
                watch.leave_out(clock() - start)
        return ready(*leaves)

    def used(key):
        """The compiled program of a key, which is then the last one to be dropped; None if there is none."""
        with lock:
            if key in compiled:
                compiled.move_to_end(key)
            return compiled.get(key)

    def lower(*args, **options):
        key, leaves = program(args, options)
        ready = used(key)
        try:
            lowered = None if ready else programs[key].lower(*leaves)
        except Exception as error:
            if (path := paths.pop(key, None)) is None:
                raise
            sealed_files.say_made_again(path, error)
            path.unlink(missing_ok=True)
            del programs[key]
            key, leaves = program(args, options)
            del paths[key]  # so that this is tried once
            lowered = programs[key].lower(*leaves)

        def compile():
            if lowered is None:
                return ready
            made = lowered.compile()
            with lock:
                compiled[key] = made
                while len(compiled) > MAX_LOADED:
                    oldest, _ = compiled.popitem(last=False)
                    for held in (programs, paths):
                        held.pop(oldest, None)
            return made

        return types.SimpleNamespace(compile=compile)

    call.lower = lower
    return call


def kept_shapes(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`jax.eval_shape` whose results are kept on disk; damaged files and unwritable folders are handled as by `kept`.

    Args:
      function: returns nested dicts of arrays; args: its arguments, fully described by their `repr`.
    Returns:
      nested dicts of `jax.ShapeDtypeStruct`.
    """
    folder = _folder()
    if folder is None:
        return jax.eval_shape(functools.partial(function, *args))

    def make():
        found = jax.eval_shape(functools.partial(function, *args))
        return jax.tree.map(lambda leaf: {"shape": leaf.shape, "dtype": str(leaf.dtype)}, found)

    def shape(value):
        return jax.ShapeDtypeStruct(value["shape"], value["dtype"])

    def read(data):
        return jax.tree.map(shape, json.loads(data), is_leaf=lambda value: set(value) == {"shape", "dtype"})

    return sealed_files.from_file(_path(folder, function, args, "json"), read, lambda: json.dumps(make()).encode())


def _has_own_code(options):
    return any(isinstance(value, ModelConfig) and value.own_backbones for value in options.values())


def _folder():
    cache = jax.config.jax_compilation_cache_dir
    if not cache or jax.default_backend() != "cpu":
        return None
    return private_cache.private(pathlib.Path(cache).with_name("traces"))


def _exported(path, function, leaves):
    """The `export.Exported` of a jitted function of arrays, read from `path`, or made and written there."""
    _register_results()

    def make():
        # The check is for later versions of jax, which may lack these calls; here each version has its own file.
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in _backends()]
        return export.export(function, disabled_checks=checks)(*leaves).serialize()

    return sealed_files.from_file(path, lambda data: export.deserialize(bytearray(data)), make)


@functools.cache
def _register_results():
    for node in RESULTS:
        name = f"{node.__module__}.{node.__qualname__}"
        export.register_pytree_node_serialization(
            node, serialized_name=name, serialize_auxdata=lambda aux: b"", deserialize_auxdata=lambda data: ()
        )


@functools.cache
def _backends():
    """Names of the C++ kernels that this machine can run; registers them, which a loaded program needs before it runs."""
    names = []
    for library in (drr_library, splat_library, voxelize_library):
        try:
            library.register_backend()
        except NotImplementedError as reason:
            # The kernels warn while they are traced, and a loaded program is not traced.
            dispatch.warn_not_built(reason)
            continue
        names += library.TARGETS
    return tuple(names)


def _path(folder, function, key, suffix):
    """The file that belongs to a function and a `key`, which is fully described by its `repr`."""
    versions = tuple(package.__version__ for package in (radgs_jax, jax, jaxlib, flax))
    made_by = versions, jax.config.jax_enable_x64, _backends(), sealed_files.sources(PACKAGES)
    digest = hashlib.sha256(repr((made_by, key)).encode()).hexdigest()[:DIGEST_CHARACTERS]
    return folder / f"{function.__module__}.{function.__qualname__}-{digest}.{suffix}"
