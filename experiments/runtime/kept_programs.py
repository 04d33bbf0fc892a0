"""Compiled functions whose traces outlive the process.

Jax's persistent cache spares a new process what XLA does, but not tracing and lowering, which take longer. The StableHLO of a
`kept` function lies beside that cache, named by all that it was made from: the sources, the versions of this package, jax,
jaxlib and flax, the kernels' backends, the static arguments, the shapes. On a CPU only, where a program is often started for
one case; elsewhere, and without a cache, `kept` is `jax.jit`.
"""

import contextlib
import contextvars
import functools
import hashlib
import json
import pathlib
import time
import types

import flax
import jax
import jaxlib
import numpy as np
from absl import logging
from jax import export

import radgs_jax
from data_pipelines.io import files
from kernels.common import dispatch
from kernels.drr import ffi_cpu as drr_library
from kernels.splat import ffi_cpu as splat_library
from kernels.voxelize import ffi_cpu as voxelize_library
from radgs_jax import gaussians
from radgs_jax.models import matching
from radgs_jax.models import radgs_reg
from radgs_jax.models import recm
from radgs_jax.registration import gauss_newton

PACKAGES = ("kernels", "radgs_jax", "data_pipelines", "experiments")
RESULTS = (gaussians.Gaussians, matching.Matches, recm.Reconstruction, radgs_reg.Registration, gauss_newton.Refined)
"""Nodes of what kept functions return, beside tuples, lists and dicts."""


_watch = contextvars.ContextVar("stopwatch", default=None)


class Stopwatch:
    """Times a `with` block, except for what `kept` functions spend on loading or compiling programs in its thread.

    wall_s, cpu_s: seconds, once the block has ended.
    """

    def __enter__(self):
        self._start, self._loading = _clock(), np.zeros(2)
        self._token = _watch.set(self)
        return self

    def __exit__(self, *error):
        _watch.reset(self._token)
        self.wall_s, self.cpu_s = (_clock() - self._start - self._loading).tolist()

    def leave_out(self, seconds):
        """Seconds (2,) of wall and of CPU that do not count."""
        self._loading += seconds

    def times(self):
        """The two as a result file has them."""
        return {"runtime_s": self.wall_s, "cpu_s": self.cpu_s}


def _clock():
    return np.array([time.perf_counter(), time.process_time()])


def kept(function, static_argnames=()):
    """`jax.jit` of a function whose static arguments, `static_argnames`, are keyword-only and fully described by their `repr`.

    It is called as that, and has its `lower`: what that gives, once compiled, is what calls with such arguments run. A damaged
    file is made again; where none can be written, nothing is kept, with a warning. A `Stopwatch` leaves out the time that a
    call spends on getting its program.
    """
    jitted = jax.jit(function, static_argnames=static_argnames)
    programs, compiled = {}, {}

    def program(args, options):
        """A jitted function and its arguments."""
        leaves, tree = jax.tree.flatten(args)
        leaves = [leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf) for leaf in leaves]
        key = tree, tuple(jax.typeof(leaf) for leaf in leaves), tuple(sorted(options.items()))
        if key not in programs:
            flat = jax.jit(lambda *leaves: jitted(*jax.tree.unflatten(tree, leaves), **options))
            if folder := _folder():
                flat = jax.jit(_exported(_path(folder, function, key, "stablehlo"), flat, leaves).call)
            programs[key] = flat
        return key, leaves

    @functools.wraps(function)
    def call(*args, **options):
        start = _clock()
        key, leaves = program(args, options)
        if key not in compiled:
            compiled[key] = programs[key].lower(*leaves).compile()
            if watch := _watch.get():
                watch.leave_out(_clock() - start)
        return compiled[key](*leaves)

    def lower(*args, **options):
        key, leaves = program(args, options)
        lowered = programs[key].lower(*leaves)

        def compile():
            compiled[key] = lowered.compile()

        return types.SimpleNamespace(compile=compile)

    call.lower = lower
    return call


def kept_shapes(function, *args):
    """`jax.eval_shape` of a function that gives nested dicts of arrays; the arguments have a `repr` that tells all.

    Damaged files and folders that cannot be written are as for `kept`.
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

    return _from_file(_path(folder, function, args, "json"), read, lambda: json.dumps(make()).encode())


def _folder():
    cache = jax.config.jax_compilation_cache_dir
    return pathlib.Path(cache).with_name("traces") if cache and jax.default_backend() == "cpu" else None


def _exported(path, function, leaves):
    """The `export.Exported` of a jitted function of arrays, from `path` or written there."""
    _register_results()

    def make():
        # That a later jax may not know them is of no account: another jax is another file.
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in _backends()]
        return export.export(function, disabled_checks=checks)(*leaves).serialize()

    return _from_file(path, lambda data: export.deserialize(bytearray(data)), make)


def _from_file(path, read, make):
    """`read` of a file's bytes; where they are not there, or it can make nothing of them, of those of `make()`, kept there."""
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        try:
            return read(data)
        except Exception as error:  # of which sort depends on where it is damaged
            logging.warning("%s: made again: %s", path, error)
    data = make()
    try:
        with files.replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        logging.warning("%s: not kept, so the next start is as slow: %s", path, error)
    return read(data)


@functools.cache
def _register_results():
    for node in RESULTS:
        name = f"{node.__module__}.{node.__qualname__}"
        export.register_pytree_node_serialization(
            node, serialized_name=name, serialize_auxdata=lambda aux: b"", deserialize_auxdata=lambda data: ()
        )


@functools.cache
def _backends():
    """Names of the C++ functions that this machine has, which calls of theirs need to be registered for."""
    names = []
    for library in (drr_library, splat_library, voxelize_library):
        try:
            library.register_backend()
        except NotImplementedError as reason:
            # Here too, because a program that is loaded is not traced.
            dispatch.warn_not_built(reason)
            continue
        names += library.TARGETS
    return tuple(names)


def _path(folder, function, key, suffix):
    """The file of what a function gives for a `key`, whose `repr` tells all."""
    versions = tuple(package.__version__ for package in (radgs_jax, jax, jaxlib, flax))
    made_by = versions, jax.config.jax_enable_x64, _backends(), _sources()
    digest = hashlib.sha256(repr((made_by, key)).encode()).hexdigest()[:24]
    return folder / f"{function.__module__}.{function.__qualname__}-{digest}.{suffix}"


@functools.cache
def _sources():
    """Digest of all code that may be traced."""
    digest, root = hashlib.sha256(), pathlib.Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
