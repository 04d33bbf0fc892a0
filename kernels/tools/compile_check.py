"""Compiles the Pallas kernels for accelerators that need not be there, and sets them beside a model of each chip.

    python -m kernels.compile_check [--wheels=DIR] [--libtpu=DIR] [--json]

XLA's own compilers do it, ahead of time, for described chips: TARGETS, from A100 to a mesh of 8 H100, and a TPU slice. For
GPUs that takes two wheels, in DIR or installed, and ptxas with its libdevice, from CUDA or a third wheel, but no driver and
none of CUDA's libraries; for TPUs libtpu, and a backend `pallas_tpu`. A target whose compiler is absent is skipped, and a line
says why and what installs it. On a mesh every device has one cloud of a batch, and nothing may gather the clouds.

What the columns mean, per kernel and target:
  registers, spills   per thread, and bytes of spill stores and loads: of the PTX that XLA wrote, told by `ptxas -v`, the same
                      ptxas that XLA runs.
  shared              bytes of shared memory per block, as XLA launches it; threads: of a block.
  launches            of the kernel for this spec: `forward` draws its instances in chunks.
  MB moved            what the kernel's launches read and write if each operand is read once and each result written once.
  temp MB             XLA's temporaries, of the whole program.
  flops, specials     per pair of a Gaussian and a sample, as `operations` counts them in the kernel's own loop.
  needed ms           the chip's bound for the pairs that the support rule needs: no kernel that moves these bytes is faster.
  tiled ms            the same for the pairs that this kernel evaluates, whole tiles or blocks: what it can reach.
  by                  what bounds it: flops, specials or bytes. `roofline` has the arithmetic.
  collectives         in the compiled program.

A kernel that does not compile, that spills, or whose program gathers clouds, ends the program with status 1 and a line on
standard error; bad flags with status 2.
"""

import collections
import dataclasses
import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.extend import core
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from kernels.common import triton_tiles
from kernels.tools import bench
from kernels.tools import program


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a data sheet says of a chip.

    Attributes:
      name: as its vendor writes it; source: of the numbers.
      kind: gpu or tpu.
      cores: streaming multiprocessors, or vector units; clock_ghz: the boost clock.
      flops_per_clock: float32 operations per core and clock, a fused multiply-add counted as two where the chip has one.
      specials_per_clock: exp2, 1 / x, 1 / sqrt(x) and the like per core and clock; None where the vendor does not say.
      bandwidth: of the memory, bytes/s; memory, l2: bytes.
      capability: CUDA compute capability; threads, shared, shared_optin: threads and bytes of shared memory per core, and the
        most shared memory that a block can ask for.
    """

    name: str
    source: str
    kind: str
    cores: int
    clock_ghz: float
    flops_per_clock: int
    specials_per_clock: int | None
    bandwidth: float
    memory: int
    l2: int = 0
    capability: tuple[int, int] = (0, 0)
    threads: int = 0
    shared: int = 0
    shared_optin: int = 0

    @property
    def flops(self):
        """Peak float32 operations per second."""
        return self.cores * self.flops_per_clock * self.clock_ghz * 1e9

    @property
    def specials(self):
        """Peak special functions per second, or None."""
        return self.specials_per_clock and self.cores * self.specials_per_clock * self.clock_ghz * 1e9


_GUIDE = "CUDA C++ Programming Guide (special functions per clock, limits of a multiprocessor)"

CHIPS = {
    "a100": Chip(
        "NVIDIA A100 SXM 80 GB",
        f"NVIDIA A100 data sheet and A100 architecture whitepaper; {_GUIDE}",
        *("gpu", 108, 1.41, 128, 16, 2.039e12, 80 * 2**30, 40 * 2**20, (8, 0), 2048, 164 * 2**10, 163 * 2**10),
    ),
    "rtx4090": Chip(
        "NVIDIA GeForce RTX 4090",
        f"NVIDIA Ada GPU architecture whitepaper; {_GUIDE}",
        *("gpu", 128, 2.52, 256, 16, 1.008e12, 24 * 2**30, 72 * 2**20, (8, 9), 1536, 100 * 2**10, 99 * 2**10),
    ),
    "h100": Chip(
        "NVIDIA H100 SXM 80 GB",
        f"NVIDIA H100 data sheet and H100 architecture whitepaper; {_GUIDE}",
        *("gpu", 132, 1.98, 256, 16, 3.35e12, 80 * 2**30, 50 * 2**20, (9, 0), 2048, 228 * 2**10, 227 * 2**10),
    ),
    "v5e": Chip(
        "Google TPU v5e",
        # 197 TFLOP/s = 4 matrix units of 128 x 128 multiply-adds at 1.5 GHz; the vector unit: 8 x 128 lanes of 4 ALUs.
        "Google Cloud TPU v5e documentation (memory, and the clock from 197 TFLOP/s); How to Scale Your Model (vector unit)",
        *("tpu", 1, 1.5, 4096, None, 8.19e11, 16 * 2**30),
    ),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """`devices` chips in a mesh, with a cloud each; `topology` as jax.experimental.topologies wants it."""

    chip: str
    devices: int
    topology: str


TARGETS = {
    "a100": Target("a100", 1, "1x1x1"),
    "rtx4090": Target("rtx4090", 1, "1x1x1"),
    "h100": Target("h100", 1, "1x1x1"),
    "8xh100": Target("h100", 8, "1x1x8"),
    "v5e:2x4": Target("v5e", 8, "v5e:2x4"),
}

SPECS = {"splat": "paper_50k", "voxelize": "paper_50k_128"}
BACKENDS = {"gpu": "pallas_triton", "tpu": "pallas_tpu"}
_PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
_CALLS = ("__gpu$xla.gpu.triton", "tpu_custom_call")
_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TIMEOUT_S = 1800


# The model.


def roofline(chip, pairs, flops, specials, moved):
    """The least milliseconds that a kernel takes on a chip, and what sets them.

    Three things run side by side at best, so the slowest is the bound:
      flops     pairs x flops per pair / peak float32 rate = cores x flops per clock x clock
      specials  pairs x specials per pair / special-function rate = cores x specials per clock x clock
      bytes     bytes moved / bandwidth of the memory
    For 2 million pairs of 25 flops and 2 specials and 10 MB on an A100: 5e7 / 1.949e13 = 2.6 us, 4e6 / 2.436e12 = 1.6 us,
    1e7 / 2.039e12 = 4.9 us; the bytes are the bound.

    Args:
      chip: a `Chip`.
      pairs: of a Gaussian and a sample; flops, specials: of each pair.
      moved: bytes to and from the memory.
    Returns:
      dict with `flops_ms`, `specials_ms` (None where the chip's rate is not known), `bytes_ms`, `bound_ms` and `by`.
    """
    times = {
        "flops": 1e3 * pairs * flops / chip.flops,
        "specials": 1e3 * pairs * specials / chip.specials if chip.specials else None,
        "bytes": 1e3 * moved / chip.bandwidth,
    }
    by = max((name for name in times if times[name] is not None), key=lambda name: times[name])
    return {**{f"{name}_ms": value for name, value in times.items()}, "bound_ms": times[by], "by": by}


_SPECIALS = {"exp", "exp2", "log", "rsqrt", "sqrt", "tanh", "logistic", "sin", "cos"}
_LOOPS = {"while": "body_jaxpr", "scan": "jaxpr"}
_FLOPS = {"add": 1, "sub": 1, "mul": 1, "max": 1, "min": 1, "neg": 1, "square": 1, "clamp": 2, "exp": 1, "sqrt": 1}


def _inner(equation):
    """The jaxprs within an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _equations(jaxpr):
    """All equations (equation, is a leaf) at any depth."""
    for equation in jaxpr.eqns:
        inner = list(_inner(equation))
        yield equation, not inner
        for part in inner:
            yield from _equations(part)


def _has_loop(jaxpr):
    return any(equation.primitive.name in _LOOPS for equation, _ in _equations(jaxpr))


def operations(jaxpr):
    """float32 operations and special functions per pair in a Pallas kernel's innermost loop.

    Counted per element of a result: 1 for an addition, product, minimum or maximum, 2 for a clamp; an exp is a special
    function and a product (its base is 2), a square root likewise (x times 1 / sqrt(x)), a quotient likewise unless its
    divisor is a constant, then it is a product. A reduction counts an addition per element that goes away, a matrix product
    2 per multiply-add. Nothing else counts: comparisons, selections, conversions, integers, loads. What has fewer elements
    than a step has pairs, a term of a row or of a Gaussian, counts for its share.

    Args:
      jaxpr: a jaxpr with one `pallas_call`, at any depth. The kernel's innermost loops are counted, or the whole kernel where
        it has none.
    Returns:
      (flops, specials) per pair. A step has as many pairs as it takes exps: a Gaussian's weight at a sample is one.
    Raises:
      ValueError: the kernel takes no exp.
    """
    (call,) = (e for e, _ in _equations(jaxpr) if e.primitive.name == "pallas_call")
    kernel = call.params["jaxpr"]
    loops = [e for e, _ in _equations(kernel) if e.primitive.name in _LOOPS]
    bodies = [body for body in (e.params[_LOOPS[e.primitive.name]].jaxpr for e in loops) if not _has_loop(body)]
    flops = specials = pairs = 0
    for equation in (e for body in bodies or [kernel] for e, leaf in _equations(body) if leaf):
        name = equation.primitive.name
        result = equation.outvars[0].aval if equation.outvars else None
        if getattr(result, "dtype", None) != jnp.float32:
            continue
        size = math.prod(result.shape)
        pairs += size * (name in ("exp", "exp2"))
        flops += size * _FLOPS.get(name, 0)
        specials += size * (name in _SPECIALS)
        if name == "div":
            flops += size
            specials += size * (not isinstance(equation.invars[1], core.Literal))
        elif name == "integer_pow":
            flops += size * (abs(equation.params["y"]).bit_length() - 1)
        elif name.startswith("reduce_"):
            flops += math.prod(equation.invars[0].aval.shape) - size
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            flops += 2 * size * math.prod(shape[axis] for axis in contracted)
    if not pairs:
        raise ValueError("the kernel takes no exp, so its pairs cannot be counted")
    return flops / pairs, specials / pairs


def tiled_work(spec, module):
    """What the Triton backend makes of a spec's cloud; runs on the CPU, without its kernels.

    Args:
      spec: a `Spec` of splat or voxelize; module: the operator's `pallas_triton`.
    Returns:
      dict with `launches` of the forward kernel (of the backward kernel it is one), and the pairs that both kernels evaluate:
      `forward`, all samples of each tile that a Gaussian's box touches, and `backward`, all of each block.
    """
    boxes, launched = [], []
    add_tiles = triton_tiles.add_tiles

    def record(first, last, tile, *rest):
        jax.debug.callback(lambda *ends: boxes.append((*map(np.asarray, ends), tile)), first, last)
        return add_tiles(first, last, tile, *rest)

    def skip(kernel, name, starts, owners, table, images, interpret):
        jax.debug.callback(lambda count: launched.append(int(count)), starts[-1])
        return images

    with mock.patch.object(triton_tiles, "add_tiles", record), mock.patch.object(triton_tiles, "draw_tiles", skip):
        draw = jax.jit(lambda *arrays: module.forward(*arrays, *spec.size, interpret=True))
        jax.block_until_ready(draw(*spec.arrays()))
        jax.effects_barrier()
    forward = backward = 0
    for first, last, tile in boxes:
        drawn = np.all(last >= first, -1)
        first, last = first[drawn].astype(np.int64), last[drawn].astype(np.int64)
        forward += int(np.sum(np.prod(last // tile - first // tile + 1, -1))) * math.prod(tile)
        block = np.asarray(module.BLOCK)
        backward += int(np.sum(np.prod((last - first) // block + 1, -1))) * math.prod(module.BLOCK)
    return {"launches": len(launched), "forward": forward, "backward": backward}


@functools.lru_cache
def model(op, spec_name, kind):
    """What the roofline needs of an operator's two kernels, whatever the chip.

    Returns:
      dict forward, backward -> dict with `flops` and `specials` per pair, `pairs` needed, pairs `tiled` (None for a TPU),
      and `launches`.
    """
    spec, module = bench.OPERATORS[op].specs.SPECS[spec_name], backend(op, kind)
    arrays = spec.arrays()
    pairs = bench.pairs(op, spec, arrays)
    work = tiled_work(spec, module) if kind == "gpu" else {"launches": 1}
    result = {}
    for what, (function, shapes) in programs(op, spec, module, interpret=True).items():
        flops, specials = operations(jax.make_jaxpr(function)(*shapes).jaxpr)
        launches = work["launches"] if what == "forward" else 1
        result[what] = {"flops": flops, "specials": specials, "pairs": pairs, "launches": launches}
        result[what]["tiled"] = work.get(what)
    return result


def backend(op, kind):
    """The Pallas backend of an operator for gpu or tpu, or None where the package has none."""
    name = f"kernels.{op}.{BACKENDS[kind]}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def programs(op, spec, module, batch=(), **options):
    """The backend's functions and the shapes of their arguments: dict forward, backward -> (callable, ShapeDtypeStructs).

    Args:
      batch: leading axes, a cloud each.
      options: keyword arguments of both functions.
    """
    shapes = [jax.ShapeDtypeStruct((*batch, *a.shape), a.dtype) for a in spec.arrays()]
    cotangent = jax.ShapeDtypeStruct((*batch, *(spec.shape if op == "voxelize" else spec.size)), jnp.float32)
    return {
        "forward": (lambda *arrays: module.forward(*arrays, *spec.size, **options), shapes),
        "backward": (functools.partial(module.backward, **options), [*shapes, cotangent]),
    }


# What compilers and assemblers write.


def parse_ptxas(text):
    """dict kernel -> dict of ints `registers`, `stack`, `spill_stores`, `spill_loads` (bytes), from what `ptxas -v` prints."""
    result, name = {}, None
    for line in text.splitlines():
        if found := re.search(r"(?:Compiling entry function '|Function properties for )([^\s']+)", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            sizes = zip(("stack", "spill_stores", "spill_loads"), map(int, found.groups()))
            result.setdefault(name, {}).update(sizes)
        elif found := re.search(r"Used (\d+) registers", line):
            result.setdefault(name, {})["registers"] = int(found[1])
    return {name: sizes for name, sizes in result.items() if "registers" in sizes}


def parse_launches(text):
    """dict kernel -> dict `grid` (blocks), `threads` (per block), `shared` (bytes per block), from XLA's thunk_sequence.txt."""
    pattern = r"(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+) bytes"
    product = lambda sizes: math.prod(map(int, sizes.split(",")))
    return {
        name: {"grid": product(grid), "threads": product(threads), "shared": int(shared)}
        for name, grid, threads, shared in re.findall(pattern, text)
    }


def array_bytes(text):
    """Bytes of all arrays in text such as `(f32[8,3]{1,0}, s32[])`, HLO's for shapes; layouts are passed over."""
    total = 0
    for dtype, sizes in re.findall(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]", text):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def parse_pallas_calls(hlo):
    """The Pallas kernels in an HLO text: list of dicts `name`, `bytes` (all operands and all results, each once)."""
    result = []
    for line in hlo.splitlines():
        found = re.match(r'\s*(?:ROOT )?%?\S+ = (.*?) custom-call\(.*?custom_call_target="([^"]*)"', line)
        if not found or found[2] not in _CALLS:
            continue
        operands = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", line)
        name = re.search(r'[{,] ?name = "([^"]*)"', line) or re.search(
            r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call', line
        )
        moved = array_bytes(found[1]) + array_bytes(operands[1] if operands else "")
        result.append({"name": name[1] if name else None, "bytes": moved})
    return result


def parse_collectives(hlo):
    """dict opcode -> how many, of the operations in an HLO text that move data between devices."""
    names = "all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    return dict(collections.Counter(re.findall(rf"(?<![\w-])({names})(?:-start)?\(", hlo)))


def target_config(chip):
    """The text proto (stream_executor.GpuTargetConfigProto) by which XLA knows a GPU that is not there."""
    major, minor = chip.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": chip.shared_optin,
        "shared_memory_per_core": chip.shared,
        "threads_per_core_limit": chip.threads,
        "core_count": chip.cores,
        "fpus_per_core": chip.flops_per_clock // 2,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": round(chip.bandwidth),
        "l2_cache_size": chip.l2,
        "clock_rate_ghz": chip.clock_ghz,
        "device_memory_size": chip.memory,
        "device_address_bits": 64,
    }
    # CUDA 12's compiler, a driver that runs what it writes, and a cuDNN of the time.
    return f"""
gpu_device_info {{
  {" ".join(f"{name}: {value}" for name, value in fields.items())}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  name: "{chip.name}" driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.name}"
"""


# Compiling, in a process of its own: a compiler that crashes takes only itself down, and how a compiler is set up is read
# from the environment once per process.


def _named(function, name):
    """The function under another name, by which the compiler names its files."""

    def named(*arrays):
        return function(*arrays)

    named.__name__ = named.__qualname__ = name
    return named


def _compile(target, topology, op, spec_name, what):
    """One program compiled for a topology; dict of what the compiler knows of it."""
    kind = CHIPS[target.chip].kind
    spec = bench.OPERATORS[op].specs.SPECS[spec_name]
    batch = (target.devices,) if target.devices > 1 else ()
    function, shapes = programs(op, spec, backend(op, kind), batch)[what]
    mesh = Mesh(np.array(topology.devices), ("data",))
    split = PartitionSpec("data") if batch else PartitionSpec()
    if batch:
        # As the training step does it: the compiler cannot split a kernel's call by itself, and would gather its operands.
        function = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    sharding = NamedSharding(mesh, split)
    start = time.perf_counter()
    jitted = jax.jit(_named(function, f"{op}_{what}"), in_shardings=sharding, out_shardings=sharding)
    compiled = jitted.trace(*shapes).lower(lowering_platforms=(_PLATFORMS[kind],)).compile()
    seconds = time.perf_counter() - start
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    return {
        "seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": parse_collectives(hlo),
        "calls": parse_pallas_calls(hlo),
    }


def _worker():
    """Compiles one target's programs; the job comes on standard input, and a line of JSON per program goes to its file."""
    job = json.load(sys.stdin)
    sys.path.extend(job["paths"])
    target = TARGETS[job["target"]]
    chip = CHIPS[target.chip]
    # The backends ask for the device, which here is the described one.
    jax.default_backend = lambda: chip.kind
    topology = None
    for op, spec, what in job["programs"]:
        try:
            if topology is None:
                options = {"target_config": target_config(chip)} if chip.kind == "gpu" else {}
                topology = topologies.get_topology_desc(
                    platform=_PLATFORMS[chip.kind],
                    **{"topology" if chip.kind == "gpu" else "topology_name": target.topology},
                    **options,
                )
            result = _compile(target, topology, op, spec, what)
        except Exception as error:  # whatever a compiler raises is the result
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        with open(job["results"], "a") as file:
            file.write(json.dumps(result) + "\n")


def compile_target(name, wanted, paths, folder, cuda=None):
    """Compiles programs for a target.

    Args:
      name: in TARGETS.
      wanted: list of (op, spec's name, forward or backward).
      paths: folders to import the compilers from, besides the usual.
      folder: where the compiler dumps what it writes.
      cuda: as `find_cuda` gives it; only a GPU needs one.
    Returns:
      A dict per program as `_compile` makes it, or with `error` alone.
    """
    folder = pathlib.Path(folder)
    results = folder / "results"
    job = {"target": name, "programs": wanted, "paths": [str(path) for path in paths], "results": str(results)}
    # With the processor alone named, the GPU plugin does not look for a driver. The user's own flags for XLA would compile
    # other code, and a program from a cache would dump none.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    xla_flags = f"--xla_dump_to={folder}" + (f" --xla_gpu_cuda_data_dir={cuda}" if cuda else "")
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "TPU_SKIP_MDS_QUERY": "1"}
    # Whoever else uses libtpu on this machine is not disturbed: nothing runs, so no chip is taken.
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for path in paths:
        if (library := pathlib.Path(path) / "libtpu" / "libtpu.so").is_file():
            environment["TPU_LIBRARY_PATH"] = str(library)
    command = [sys.executable, "-c", "from kernels import compile_check; compile_check._worker()"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job),
            cwd=_ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        status = f"the compiler's process ended with status {done.returncode}"
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        ending = f"{status}: {lines[-1].strip()[:300]}" if lines else status
    except subprocess.TimeoutExpired:
        ending = f"not compiled in {_TIMEOUT_S} s"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return found + [{"error": ending}] * (len(wanted) - len(found))


def find_cuda(paths):
    """The folder of the parts of CUDA that XLA compiles with, bin/ptxas and nvvm/libdevice; None where there is none.

    Sought in the folders `paths`, as pip fills them; then beside the ptxas on PATH and where CUDA installs itself; then among
    installed packages.
    """
    packages = lambda folders: [os.path.join(f, "nvidia", name) for f in folders for name in ("cuda_nvcc", "cu13")]
    on_path = shutil.which("ptxas")
    installed = [os.path.dirname(os.path.dirname(os.path.realpath(on_path)))] if on_path else []
    for folder in (*packages(paths), *installed, "/usr/local/cuda", *packages(filter(None, sys.path))):
        parts = os.path.join(folder, "bin", "ptxas"), os.path.join(folder, "nvvm", "libdevice", "libdevice.10.bc")
        if all(map(os.path.isfile, parts)) and os.access(parts[0], os.X_OK):
            return folder
    return None


def assemble(cuda, ptx):
    """Runs ptxas on a file of PTX: (what `parse_ptxas` gives, None), or ({}, the reason for none)."""
    target = re.search(r"^\.target\s+(\w+)", pathlib.Path(ptx).read_text(), re.MULTILINE)
    command = [os.path.join(cuda, "bin", "ptxas"), "-v", f"--gpu-name={target[1]}", str(ptx), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return {}, f"ptxas: {said[-1][:200] if said else f'status {done.returncode}'}"
    return parse_ptxas(done.stdout + done.stderr), None


def _assembly(folder, program, kernel, cuda):
    """Registers and spills of a kernel in a dump, with `registers_missing` for the reason where they are None."""
    unknown = {"registers": None, "spill_stores": None, "spill_loads": None}
    for ptx in sorted(glob.glob(os.path.join(glob.escape(str(folder)), f"*.jit_{program}.*.ptx"))):
        if f".entry {kernel}(" in pathlib.Path(ptx).read_text():
            kernels, missing = assemble(cuda, ptx)
            return {**unknown, **kernels.get(kernel, {}), "registers_missing": missing}
    return {**unknown, "registers_missing": "XLA dumped no PTX of it"}


def check_target(name, paths, cuda):
    """Compiles all kernels for a target and models them.

    Returns:
      A list of dicts, one per kernel, with the columns that the module's docstring explains and `failure`, a phrase or None.
    """
    target = TARGETS[name]
    chip = CHIPS[target.chip]
    wanted = [
        (op, spec, what) for op, spec in SPECS.items() if backend(op, chip.kind) for what in ("forward", "backward")
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for (op, spec, what), compiled in zip(wanted, compile_target(name, wanted, paths, folder, cuda)):
            row = {"kernel": f"{op}_{what}", "spec": spec, "failure": compiled.get("error")}
            rows.append(row)
            if row["failure"]:
                continue
            calls = compiled.pop("calls")
            if len(calls) != 1:
                row["failure"] = f"the compiled program holds {len(calls)} Pallas kernels, wanted 1"
                continue
            figures = model(op, spec, chip.kind)[what]
            row |= compiled | figures
            row["bytes"] = calls[0]["bytes"] * figures["launches"]
            work = figures["flops"], figures["specials"], row["bytes"]
            row["needed"] = roofline(chip, figures["pairs"], *work)
            row["evaluated"] = roofline(chip, figures["tiled"], *work) if figures["tiled"] is not None else None
            if chip.kind == "gpu":
                program = f"{op}_{what}"
                sequences = glob.glob(os.path.join(glob.escape(folder), f"*.jit_{program}.thunk_sequence.txt"))
                launches = parse_launches("".join(pathlib.Path(path).read_text() for path in sequences))
                row |= launches.get(calls[0]["name"], {"grid": None, "threads": None, "shared": None})
                row |= _assembly(folder, program, calls[0]["name"], cuda)
            else:
                row["registers_missing"] = "a TPU's compiler does not tell"
            row["failure"] = _failure(row)
    return rows


def _failure(row):
    """What is wrong with a compiled kernel, or None."""
    spills = (row.get("spill_stores") or 0) + (row.get("spill_loads") or 0)
    if spills:
        return f"spills: {row['spill_stores']} bytes of stores, {row['spill_loads']} of loads"
    if gathers := row["collectives"].get("all-gather"):
        return f"{gathers} all-gather in a program whose clouds are split over the devices"
    return None


# What is there to compile with.


WHEEL_NAMES = ("jax-cuda12-pjrt", "jax-cuda12-plugin")


def _versions(folder, names):
    """dict package -> its version, of those in a folder, or installed (None)."""
    where = {} if folder is None else {"path": [str(folder)]}
    found = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions(**where))
    return {name: version for name, version in found if name in names}


def missing_wheels(folder):
    """Why XLA's GPU compiler is not in a folder (None: not installed), with the command that installs it; else None."""
    versions = _versions(folder, WHEEL_NAMES)
    cuda = find_cuda([] if folder is None else [folder])
    packages = [f"{name}=={jax.__version__}" for name in WHEEL_NAMES] + ["nvidia-cuda-nvcc-cu12"] * (cuda is None)
    command = f"pip install --no-deps --target DIR {' '.join(packages)}, then --wheels=DIR"
    for name in WHEEL_NAMES:
        if name not in versions:
            return f"no {name}; {command}"
        if versions[name] != jax.__version__:
            return f"{name} is {versions[name]}, wanted {jax.__version__}; {command}"
    return None if cuda else f"no ptxas with its libdevice; {command}"


def missing_libtpu(folder):
    """Why libtpu is not in a folder (None: not installed), with the command that installs it; else None."""
    if "libtpu" in _versions(folder, ("libtpu",)):
        return None
    pins = [r.split(";")[0].strip() for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")]
    return f"no libtpu; pip install --no-deps --target DIR '{' '.join(pins) or 'libtpu'}', then --libtpu=DIR"


def missing(kind, wheels, libtpu):
    """Why a kind of chip, gpu or tpu, cannot be compiled for, or None; folders as the flags give them."""
    reasons = [] if kind == "gpu" else [missing_libtpu(libtpu)]
    if kind == "gpu":
        reasons.append(missing_wheels(wheels))
    if not any(backend(op, kind) for op in SPECS):
        reasons.append(f"no operator has a backend {BACKENDS[kind]}")
    return "; ".join(filter(None, reasons)) or None


def check(wheels=None, libtpu=None):
    """Checks all targets.

    Args:
      wheels, libtpu: folders with the GPU's compiler and with libtpu; None where they are installed, if at all.
    Returns:
      dict `ptxas` (its release, or None), `chips` (name -> the data sheet's numbers) and `targets`: name -> list of kernels as
      `check_target` makes it, or a phrase that says why it was skipped.
    """
    paths = [os.path.abspath(folder) for folder in (wheels, libtpu) if folder is not None]
    cuda = find_cuda(paths)
    chips = {name: dataclasses.asdict(chip) for name, chip in CHIPS.items()}
    targets = {}
    for name, target in TARGETS.items():
        reason = missing(CHIPS[target.chip].kind, wheels, libtpu)
        if reason is None:
            bench.say(f"{name}: compiling")
        targets[name] = reason or check_target(name, paths, cuda)
    return {"ptxas": cuda and version(os.path.join(cuda, "bin", "ptxas")), "chips": chips, "targets": targets}


def version(ptxas):
    """The release of a ptxas, such as `13.0`; None where it does not say."""
    found = re.search(r"release ([\d.]+)", subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else None


_COLUMNS = (
    ("kernel", lambda row: row["kernel"]),
    ("registers", lambda row: row.get("registers")),
    ("spills", lambda row: None if row.get("spill_stores") is None else row["spill_stores"] + row["spill_loads"]),
    ("shared", lambda row: row.get("shared")),
    ("threads", lambda row: row.get("threads")),
    ("launches", lambda row: row["launches"]),
    ("MB moved", lambda row: row["bytes"] / 1e6),
    ("temp MB", lambda row: row["temporary_bytes"] / 1e6),
    ("flops", lambda row: row["flops"]),
    ("specials", lambda row: row["specials"]),
    ("needed ms", lambda row: row["needed"]["bound_ms"]),
    ("by", lambda row: row["needed"]["by"]),
    ("tiled ms", lambda row: row["evaluated"] and row["evaluated"]["bound_ms"]),
    ("by", lambda row: row["evaluated"] and row["evaluated"]["by"]),
    ("collectives", lambda row: ", ".join(f"{n} {name}" for name, n in row["collectives"].items()) or "none"),
)


def _cell(value):
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _print(result):
    for name, rows in result["targets"].items():
        if isinstance(rows, str):
            print(f"{name}: skipped: {rows}")
            continue
        chip = CHIPS[TARGETS[name].chip]
        special = f"{chip.specials / 1e12:.3g}" if chip.specials else "unknown"
        print(
            f"{name}: {chip.name}, {chip.flops / 1e12:.3g} Tflop/s, {special} Tspecial/s, {chip.bandwidth / 1e12:.3g} TB/s"
        )
        good = [row for row in rows if "bytes" in row]
        table = [[title for title, _ in _COLUMNS], *([_cell(value(row)) for _, value in _COLUMNS] for row in good)]
        widths = [max(map(len, column)) for column in zip(*table)]
        for line in table if good else ():
            print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip())
        for reason in dict.fromkeys(row["registers_missing"] for row in good if row.get("registers_missing")):
            print(f"  no registers and spills: {reason}")
    print(f"ptxas: {result['ptxas'] or 'none'}")


# The program. Its flags are its own, so that importing this module leaves other programs' flags alone.

FLAGS = flags.FlagValues()
WHEELS = flags.DEFINE_string("wheels", None, "Folder with jax-cuda12-pjrt and jax-cuda12-plugin.", flag_values=FLAGS)
LIBTPU = flags.DEFINE_string("libtpu", None, "Folder with libtpu.", flag_values=FLAGS)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)
HELP = flags.DEFINE_bool("help", False, "Show this help.", short_name="?", flag_values=FLAGS)


def _check_flags():
    """Raises flags.Error where a folder lacks what it is named for."""
    for flag, names in ((WHEELS, WHEEL_NAMES), (LIBTPU, ("libtpu",))):
        if flag.value is None:
            continue
        if not os.path.isdir(flag.value):
            raise flags.Error(f"--{flag.name}={flag.value} is no folder")
        for name in names:
            if name not in _versions(flag.value, names):
                raise flags.Error(f"--{flag.name}={flag.value} has no {name}")


def main():
    """Reads the flags and checks all targets; bad flags end the program with one line and status 2, a failure with 1."""
    if not program.read_flags(FLAGS, HELP, __doc__, _check_flags):
        return
    # Only clouds are counted in this process, which the processor can do.
    jax.config.update("jax_platforms", "cpu")
    result = check(WHEELS.value, LIBTPU.value)
    if JSON.value:
        print(json.dumps(bench.rounded(result)))
    else:
        _print(result)
    failed = False
    for name, rows in result["targets"].items():
        for row in () if isinstance(rows, str) else rows:
            if row["failure"]:
                failed = True
                print(f"error: {row['kernel']} for {name}: {row['failure']}", file=sys.stderr)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
