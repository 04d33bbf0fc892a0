"""Compiles the Pallas kernels for accelerators that need not be present, and models their speed on each chip.

    python -m kernels.tools.compile_check [--wheels=DIR] [--libtpu=DIR] [--json]

XLA's own compilers do it, ahead of time, for the described chips in `chips.TARGETS`, from an A100 to a mesh of 8 H100 and a TPU
slice. GPUs need two wheels, in DIR or installed, and ptxas with its libdevice, from CUDA or a third wheel; they need no driver
and none of CUDA's libraries. TPUs need libtpu and a backend `pallas_tpu`. A target without its compiler is skipped, and a line
says why and how to install it. On a mesh, every device has one cloud of a batch, and nothing may gather the clouds.

What the columns mean, per kernel and target:
  registers, spills   registers per thread, and bytes of spill stores and loads, which `ptxas -v` reports for XLA's PTX. It is
                      the ptxas that XLA runs.
  shared, threads     bytes of shared memory per block, and threads per block, as XLA launches it.
  launches            of the kernel for this spec: `forward` draws its instances in chunks.
  MB moved            what the launches read and write if each operand is read once and each result written once.
  temp MB             XLA's temporaries, of the whole program.
  flops, specials     per pair of a Gaussian and a sample, as `roofline.operations` counts them in the kernel's own loop.
  needed ms           the chip's bound for the pairs that the support rule needs: no kernel that moves these bytes is faster.
  tiled ms            the same for the pairs that this kernel evaluates, whole tiles or blocks: what it can reach.
  by                  what sets the bound: flops, specials or bytes; `roofline.bound` has the arithmetic.
  collectives         in the compiled program.

A kernel that does not compile, that spills, or whose program gathers clouds ends the program with status 1 and a line on
standard error. Bad flags end it with status 2.
"""

import dataclasses
import glob
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any
from typing import cast

import jax
from absl import flags

from kernels.tools import bench
from kernels.tools import compiler_output
from kernels.tools import compilers
from kernels.tools import lowering
from kernels.tools import process
from kernels.tools import program
from kernels.tools import roofline
from kernels.tools.chips import CHIPS
from kernels.tools.chips import TARGETS

SPECS = {"splat": "paper_50k", "voxelize": "paper_50k_128"}
"""The spec that each operator is compiled for."""


def check_target(name: str, paths: Sequence[pathlib.Path | str], cuda: str | None) -> list[dict[str, Any]]:
    """Compiles all kernels for a target and models them.

    Args:
      name: of the target.
      paths: folders with compilers, searched before the installed ones.
      cuda: result of `compilers.find_cuda`.
    Returns:
      A dict per kernel, with the columns that the module's docstring explains and `failure`, a phrase or None.
    """
    target = TARGETS[name]
    chip = CHIPS[target.chip]
    wanted = [
        (op, spec, what)
        for op, spec in SPECS.items()
        if roofline.find_backend(op, chip.kind)
        for what in ("forward", "backward")
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for (op, spec, what), compiled in zip(wanted, lowering.compile_target(name, wanted, paths, folder, cuda)):
            row = {"kernel": f"{op}_{what}", "spec": spec, "failure": compiled.get("error")}
            rows.append(row)
            if row["failure"]:
                continue
            calls = compiled.pop("calls")
            if len(calls) != 1:
                row["failure"] = f"the compiled program holds {len(calls)} Pallas kernels, wanted 1"
                continue
            figures = roofline.model(op, spec, chip.kind)[what]
            row |= compiled | figures
            row["bytes"] = calls[0]["bytes"] * figures["launches"]
            work = figures["flops"], figures["specials"], row["bytes"]
            row["needed"] = roofline.bound(chip, figures["pairs"], *work)
            row["evaluated"] = roofline.bound(chip, figures["tiled"], *work) if figures["tiled"] is not None else None
            if chip.kind == "gpu":
                function = f"{op}_{what}"
                sequences = glob.glob(os.path.join(glob.escape(folder), f"*.jit_{function}.thunk_sequence.txt"))
                launches = compiler_output.parse_launches("".join(pathlib.Path(path).read_text() for path in sequences))
                row |= launches.get(calls[0]["name"], {"grid": None, "threads": None, "shared": None})
                row |= lowering.assembly_of(folder, function, calls[0]["name"], cast(str, cuda))
            else:
                row["registers_missing"] = "a TPU's compiler does not report them"
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


def missing(kind: str, wheels: str | None, libtpu: str | None) -> str | None:
    """Why nothing can be compiled for a kind of chip, gpu or tpu, or None; folders as in `check`."""
    reasons = [compilers.missing_wheels(wheels) if kind == "gpu" else compilers.missing_libtpu(libtpu)]
    if not any(roofline.find_backend(op, kind) for op in SPECS):
        reasons.append(f"no operator has a backend {roofline.BACKENDS[kind]}")
    return "; ".join(filter(None, reasons)) or None


def check(wheels: str | None = None, libtpu: str | None = None) -> dict[str, Any]:
    """Checks all targets.

    Args:
      wheels: folder with XLA's GPU compiler; None where it is installed, if at all.
      libtpu: folder with libtpu; likewise.
    Returns:
      `ptxas`, its release or None; `chips`, name -> numbers of the data sheet; and `targets`, name -> result of `check_target`,
      or the reason why it was skipped.
    """
    paths = [os.path.abspath(folder) for folder in (wheels, libtpu) if folder is not None]
    cuda = compilers.find_cuda(paths)
    chips = {name: dataclasses.asdict(chip) for name, chip in CHIPS.items()}
    targets = {}
    for name, target in TARGETS.items():
        reason = missing(CHIPS[target.chip].kind, wheels, libtpu)
        if reason is None:
            process.say(f"{name}: compiling")
        targets[name] = reason or check_target(name, paths, cuda)
    return {
        "ptxas": cuda and compilers.ptxas_release(os.path.join(cuda, "bin", "ptxas")),
        "chips": chips,
        "targets": targets,
    }


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


# The program. It has its own FlagValues, so that importing this module leaves the flags of other programs alone.

FLAGS = flags.FlagValues()
WHEELS = flags.DEFINE_string("wheels", None, "Folder with jax-cuda12-pjrt and jax-cuda12-plugin.", flag_values=FLAGS)
LIBTPU = flags.DEFINE_string("libtpu", None, "Folder with libtpu.", flag_values=FLAGS)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)
HELP = flags.DEFINE_bool("help", False, "Show this help.", short_name="?", flag_values=FLAGS)


def _check_flags():
    """Raises flags.Error where a folder lacks the packages that its flag names."""
    for flag, names in ((WHEELS, compilers.WHEEL_NAMES), (LIBTPU, ("libtpu",))):
        if flag.value is None:
            continue
        if not os.path.isdir(flag.value):
            raise flags.Error(f"--{flag.name}={flag.value} is no folder")
        for name in names:
            if name not in compilers.versions(flag.value, names):
                raise flags.Error(f"--{flag.name}={flag.value} has no {name}")


def main() -> None:
    """Reads the flags and checks all targets; exits with status 2 for bad flags, 1 for a failure."""
    if not program.read_flags(FLAGS, HELP, __doc__, _check_flags):
        return
    # This process only counts pairs; that needs no accelerator.
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
