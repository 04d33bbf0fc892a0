"""Compiles kernels for a described chip, and assembles them where ptxas is installed.

Compiling runs in a process of its own: a compiler that crashes takes only itself down, and a compiler's settings are read from
the environment once per process.
"""

import glob
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from kernels.tools import compiler_output
from kernels.tools import operators
from kernels.tools import roofline
from kernels.tools.chips import Chip
from kernels.tools.chips import CHIPS
from kernels.tools.chips import Target
from kernels.tools.chips import target_config
from kernels.tools.chips import TARGETS

PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
"""jax's name of the platform of each kind of chip."""
_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Limit for all kernels of a target; chosen by hand, several times what they take. Less could cut off a slow machine.
_TIMEOUT_S = 1800


def _named(function, name):
    """The function under another name; the compiler names its files after it."""

    def named(*arrays):
        return function(*arrays)

    named.__name__ = named.__qualname__ = name
    return named


def _compile(target, topology, op, spec_name, what):
    """Compiles one program for a topology; returns what the compiler reports of it."""
    kind = CHIPS[target.chip].kind
    spec = operators.OPERATORS[op].specs.SPECS[spec_name]
    batch = (target.devices,) if target.devices > 1 else ()
    module = roofline.find_backend(op, kind)
    assert module is not None
    function, shapes = roofline.programs(op, spec, module, batch)[what]
    mesh = Mesh(np.array(topology.devices), ("data",))
    split = PartitionSpec("data") if batch else PartitionSpec()
    if batch:
        # As in the training step: the compiler cannot split a kernel's call by itself, and would gather its operands.
        function = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    sharding = NamedSharding(mesh, split)
    start = time.perf_counter()
    jitted = jax.jit(_named(function, f"{op}_{what}"), in_shardings=sharding, out_shardings=sharding)
    compiled = jitted.trace(*shapes).lower(lowering_platforms=(PLATFORMS[kind],)).compile()
    seconds = time.perf_counter() - start
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    return {
        "seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": compiler_output.parse_collectives(hlo),
        "calls": compiler_output.parse_pallas_calls(hlo),
    }


def _topology_of(target, chip):
    options = {"target_config": target_config(chip)} if chip.kind == "gpu" else {}
    return topologies.get_topology_desc(
        platform=PLATFORMS[chip.kind],
        **{"topology" if chip.kind == "gpu" else "topology_name": target.topology},
        **options,
    )


def take_jobs(work: Callable[[Target, Chip, Any, Any], dict[str, Any]]) -> None:
    """What a compiler's process does: the jobs on standard input, one after the other, each with a line of JSON in its file.

    Args:
      work: (target, its chip, its topology, a job) -> what the compiler reports.
    """
    given = json.load(sys.stdin)
    target = TARGETS[given["target"]]
    chip = CHIPS[target.chip]
    # The backends ask for the default device, which here is the described one.
    setattr(jax, "default_backend", lambda: chip.kind)  # noqa: B010
    topology = None
    for job in given["jobs"]:
        try:
            if topology is None:
                topology = _topology_of(target, chip)
            result = work(target, chip, topology, job)
        except Exception as error:  # any failure of a compiler is a result
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        with open(given["results"], "a") as file:
            file.write(json.dumps(result) + "\n")


def work() -> None:
    """The process of `compile_target`."""
    take_jobs(lambda target, _, topology, job: _compile(target, topology, *job))


def give_jobs(
    name: str,
    jobs: Sequence[Any],
    function: str,
    paths: Sequence[pathlib.Path | str],
    folder: pathlib.Path | str,
    xla_flags: str,
    limit_s: float = _TIMEOUT_S,
) -> list[dict[str, Any]]:
    """Has jobs done in a process of their own, whose imports include the compilers in `paths`.

    Args:
      name: of the target.
      jobs: plain values each.
      function: the process's, as module.function, which calls `take_jobs`.
      folder: for the results; xla_flags: value of XLA_FLAGS; limit_s: for all of them.
    Returns:
      A dict per job; `error` alone where it failed.
    """
    results = pathlib.Path(folder) / "results"
    given = {"target": name, "jobs": jobs, "results": str(results)}
    # JAX_PLATFORMS=cpu keeps the GPU plugin from looking for a driver. The user's own flags for XLA could change the compiled
    # code, and a program from a cache would dump none.
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "TPU_SKIP_MDS_QUERY": "1"}
    # Nothing runs, so no chip is taken, and other users of libtpu on this machine are not disturbed.
    variables |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for path in paths:
        if (library := pathlib.Path(path) / "libtpu" / "libtpu.so").is_file():
            variables["TPU_LIBRARY_PATH"] = str(library)
    # Before anything is imported, since jax looks for compilers once.
    imports = f"import sys; sys.path.extend({[str(path) for path in paths]}); import {function.rpartition('.')[0]}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"{imports}; {function}()"],
            input=json.dumps(given),
            cwd=_ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
        status = f"the compiler's process ended with status {done.returncode}"
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        ending = f"{status}: {lines[-1].strip()[:300]}" if lines else status
    except subprocess.TimeoutExpired:
        ending = f"not compiled in {limit_s:.0f} s"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return found + [{"error": ending}] * (len(jobs) - len(found))


def compile_target(
    name: str,
    wanted: Sequence[tuple[str, str, str]],
    paths: Sequence[pathlib.Path | str],
    folder: pathlib.Path | str,
    cuda: str | None = None,
) -> list[dict[str, Any]]:
    """Compiles programs for a target.

    Args:
      name: of the target.
      wanted: (operator, name of a spec, forward or backward) each.
      paths: folders to import the compilers from, in addition to the usual ones.
      folder: where the compiler dumps its output.
      cuda: result of `compilers.find_cuda`; only a GPU needs one.
    Returns:
      A dict per program: bytes of its memory, `collectives`, `calls` and `seconds`; or `error` alone.
    """
    xla_flags = f"--xla_dump_to={folder}" + (f" --xla_gpu_cuda_data_dir={cuda}" if cuda else "")
    return give_jobs(name, wanted, "kernels.tools.lowering.work", paths, folder, xla_flags)


def assemble(cuda: str, ptx: pathlib.Path | str) -> tuple[dict[str, dict[str, int]], str | None]:
    """Runs ptxas on a file of PTX: the result of `parse_ptxas` and None, or {} and the reason for the failure."""
    (target,) = re.findall(r"^\.target\s+(\w+)", pathlib.Path(ptx).read_text(), re.MULTILINE)
    command = [os.path.join(cuda, "bin", "ptxas"), "-v", f"--gpu-name={target}", str(ptx), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return {}, f"ptxas: {said[-1][:200] if said else f'status {done.returncode}'}"
    return compiler_output.parse_ptxas(done.stdout + done.stderr), None


def assembly_of(folder: pathlib.Path | str, function: str, kernel: str, cuda: str) -> dict[str, Any]:
    """Registers and spills of a kernel in a dump.

    Args:
      folder: the dump.
      function: the jitted function that has the kernel.
      kernel: its name.
      cuda: result of `compilers.find_cuda`.
    Returns:
      `registers`, `spill_stores` and `spill_loads`, and `registers_missing`, the reason where they are None.
    """
    unknown = {"registers": None, "spill_stores": None, "spill_loads": None}
    for ptx in sorted(glob.glob(os.path.join(glob.escape(str(folder)), f"*.jit_{function}.*.ptx"))):
        if f".entry {kernel}(" in pathlib.Path(ptx).read_text():
            kernels, missing = assemble(cuda, ptx)
            return {**unknown, **kernels.get(kernel, {}), "registers_missing": missing}
    return {**unknown, "registers_missing": "XLA dumped no PTX of it"}
