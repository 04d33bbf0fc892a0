"""Times the operators on this machine, beside the physical bound and beside DiffDRR.

    python -m kernels.bench --op=splat --spec=paper_50k [--implementation=NAME] [--against=diffdrr] [--plots=DIR] [--json]
    python -m kernels.bench --suite=summary [--json]

What the figures mean:
  forward, both     median seconds of one compiled call: the value; the value and the gradients to every array argument.
  to pose           value and gradient to the six numbers of a rigid motion round the isocentre, the motion included.
  backward          both - forward.
  pairs             (Gaussian, sample) pairs with q < 16, those that the support rule gives a weight; counted exactly.
  bound             pairs / (the best rate of exps that XLA reaches on an array in the cache, all threads, same run).
  memory            XLA's temporaries, and by how much the resident memory of a fresh process rises in the one call.
  slope             of log(time) against log(size) by least squares; in the summary the worst of operators, forward and both.
  diffdrr_over_x    seconds of DiffDRR's trilinear renderer, forward and backward to the pose, over ours for the same; the
                    worse of one thread each and all threads each. DiffDRR takes 128 samples a ray from a crop of 96^3 voxels.

Everything that a ratio compares is timed in turns, so that a noisy machine disturbs both sides. DiffDRR is no dependency:
`--diffdrr_python` names a python that has it (torch for the CPU, diffdrr without its dependencies, torchio, roma, fastcore,
einops, seaborn); without one its figures are null.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from kernels.common import rays
from kernels.common import support
from kernels.common import symmetric
from kernels.drr import api as drr_api
from kernels.drr import arg_specs as drr_specs
from kernels.splat import api as splat_api
from kernels.splat import arg_specs as splat_specs
from kernels.tools import program
from kernels.voxelize import api as voxelize_api
from kernels.voxelize import arg_specs as voxelize_specs


@dataclasses.dataclass(frozen=True)
class Operator:
    """A public operator, the names of its backends (best first) and its module of specs."""

    function: object
    backends: tuple[str, ...]
    specs: object


OPERATORS = {
    "splat": Operator(splat_api.splat, tuple(splat_api.BACKENDS), splat_specs),
    "voxelize": Operator(voxelize_api.voxelize, tuple(voxelize_api.BACKENDS), voxelize_specs),
    "drr": Operator(drr_api.drr, tuple(drr_api.FORWARD), drr_specs),
}

ROUNDS = 7
"""Turns in which compared functions are timed."""


def say(line):
    """One line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


def threads():
    """Threads that XLA uses in this process: its processors."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# The pairs that the support rule needs.


def _interval(a, b, c, size):
    """First and last integer of [0, size) with a x^2 + 2 b x + c < 0, for a > 0; last < first where there is none."""
    root = b * b - a * c
    half = np.sqrt(np.maximum(root, 0.0))
    first = np.maximum(np.floor((-b - half) / a) + 1, 0)
    last = np.minimum(np.ceil((-b + half) / a) - 1, size - 1)
    empty = ~(root > 0.0)
    return np.where(empty, 0, first).astype(np.int64), np.where(empty, -1, last).astype(np.int64)


def _rows(counts, limit=2**20):
    """Yields (owner, index) of rows 0 .. counts[i] - 1 of every i, about `limit` at a time."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        base = ends[start] - counts[start]
        stop = max(start + 1, int(np.searchsorted(ends, base + limit, side="right")))
        owner = np.repeat(np.arange(start, stop), counts[start:stop])
        yield owner, np.arange(len(owner)) - (ends - counts - base)[owner]
        start = stop


def splat_pairs(mean, precision, intrinsics, height, width):
    """Pairs (Gaussian, pixel) with q < 16, for mean (N, 3), precision (N, 6), intrinsics (4,); visible Gaussians only."""
    p, packed = np.asarray(mean, np.float64), np.asarray(precision, np.float64)
    fx, fy, cx, cy = np.asarray(intrinsics, np.float64)
    K = np.asarray(_matrix(packed))
    visible = p[:, 2] > support.SIGMA_MAX * np.sqrt(np.linalg.inv(K)[:, 2, 2])
    p, K = p[visible], K[visible]
    # q < 16 on the ray d is d' (c K - K p p' K) d < 0 with c = p' K p - 16, a conic in the pixel (u, v, 1).
    Kp = np.einsum("nij,nj->ni", K, p)
    Q = (np.einsum("ni,ni->n", p, Kp) - support.Q_MAX)[:, None, None] * K - Kp[:, :, None] * Kp[:, None, :]
    ray = np.array([[1.0 / fx, 0.0, -cx / fx], [0.0, 1.0 / fy, -cy / fy], [0.0, 0.0, 1.0]])
    Q = ray.T @ Q @ ray
    # Rows that the outline reaches: where the discriminant in u is positive. One more on each side for rounding.
    top, bottom = _interval(
        Q[:, 0, 0] * Q[:, 1, 1] - Q[:, 0, 1] ** 2,
        Q[:, 0, 0] * Q[:, 1, 2] - Q[:, 0, 1] * Q[:, 0, 2],
        Q[:, 0, 0] * Q[:, 2, 2] - Q[:, 0, 2] ** 2,
        height,
    )
    top, bottom = np.maximum(top - 1, 0), np.minimum(bottom + 1, height - 1)
    total = 0
    for owner, row in _rows(np.maximum(bottom - top + 1, 0)):
        v, C = (top[owner] + row).astype(np.float64), Q[owner]
        first, last = _interval(
            C[:, 0, 0],
            C[:, 0, 1] * v + C[:, 0, 2],
            C[:, 1, 1] * v * v + 2.0 * C[:, 1, 2] * v + C[:, 2, 2],
            width,
        )
        total += int(np.sum(np.maximum(last - first + 1, 0)))
    return total


def voxel_pairs(mean, precision, shape):
    """Pairs (Gaussian, voxel) with q < 16, for mean (N, 3) in voxel indices and precision (N, 6)."""
    m, K = np.asarray(mean, np.float64), np.asarray(_matrix(np.asarray(precision, np.float64)))
    half = support.SIGMA_MAX * np.sqrt(np.diagonal(np.linalg.inv(K), axis1=1, axis2=2))
    low = np.clip(np.ceil(m - half)[:, :2], 0, np.array(shape[:2])).astype(np.int64)
    high = np.clip(np.floor(m + half)[:, :2], -1, np.array(shape[:2]) - 1).astype(np.int64)
    counts = np.maximum(high - low + 1, 0)
    total = 0
    for owner, row in _rows(np.prod(counts, 1)):
        k, c = K[owner], m[owner]
        x = low[owner, 0] + row // counts[owner, 1] - c[:, 0]
        y = low[owner, 1] + row % counts[owner, 1] - c[:, 1]
        # The quadratic in z itself, its centre moved by the mean.
        a, b = k[:, 2, 2], k[:, 0, 2] * x + k[:, 1, 2] * y
        rest = k[:, 0, 0] * x * x + 2.0 * k[:, 0, 1] * x * y + k[:, 1, 1] * y * y - support.Q_MAX
        first, last = _interval(a, b - a * c[:, 2], rest + c[:, 2] * (a * c[:, 2] - 2.0 * b), shape[2])
        total += int(np.sum(np.maximum(last - first + 1, 0)))
    return total


def _matrix(packed):
    xx, xy, xz, yy, yz, zz = packed.T
    return np.stack([np.stack([xx, xy, xz], -1), np.stack([xy, yy, yz], -1), np.stack([xz, yz, zz], -1)], -2)


def pairs(op, spec, arrays):
    """Pairs of a spec's arrays; None for `drr`, which has no Gaussians."""
    if op == "splat":
        return splat_pairs(*arrays[1:], *spec.size)
    return voxel_pairs(*arrays[1:], *spec.size) if op == "voxelize" else None


# What is timed.


def resolve(op, spec, implementation):
    """The name of the backend that `implementation` (a name or None) means here.

    Raises:
      ValueError: an unknown name. NotImplementedError: this machine cannot run it.
    """
    reason = None
    for name in OPERATORS[op].backends if implementation is None else (implementation,):
        try:
            jax.jit(_function(op, spec, name)).lower(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in spec.arrays()))
            return name
        except NotImplementedError as error:
            reason = error
    raise NotImplementedError(f"{op}: {reason}")


def _function(op, spec, implementation):
    return lambda *arrays: OPERATORS[op].function(*arrays, *spec.size, implementation=implementation, **spec.options)


def _both(function):
    def run(cotangent, *arrays):
        value, pullback = jax.vjp(function, *arrays)
        return value, pullback(cotangent)

    return run


def _to_pose(op, function):
    """Value and gradient to a pose (6,): a Rodrigues vector, then mm; 0 is no motion."""

    def moved(pose, arrays):
        # The Cayley map is smooth at 0, where an angle is not.
        a, t = pose[:3], pose[3:]
        zero = jnp.zeros_like(a[0])
        A = jnp.stack([zero, -a[2], a[1], a[2], zero, -a[0], -a[1], a[0], zero]).reshape(3, 3)
        R = jnp.eye(3, dtype=pose.dtype) + 2.0 / (1.0 + jnp.sum(a * a)) * (A + A @ A)
        pivot = jnp.array([0.0, 0.0, rays.SOURCE_ISOCENTRE_MM], pose.dtype)
        shift = pivot - R @ pivot + t
        if op == "drr":
            volume, affine, intrinsics = arrays
            turned = affine[..., :3] @ R
            offset = affine[..., :3] @ shift + affine[..., 3]
            return volume, jnp.concatenate([turned, offset[..., None]], -1), intrinsics
        density, mean, precision, intrinsics = arrays
        # Homogeneous, so that the sums over Gaussians behind R and shift are one product.
        mean = jnp.concatenate([mean, jnp.ones_like(mean[..., :1])], -1)
        # K -> R K R' is linear in the six numbers: one product with a 6x6 matrix, whose rows are the turned unit matrices.
        turn = symmetric.from_matrix(R @ symmetric.to_matrix(jnp.eye(6, dtype=pose.dtype)) @ R.T)
        return density, mean @ jnp.concatenate([R.T, shift[None]]), precision @ turn, intrinsics

    def run(cotangent, pose, *arrays):
        value, pullback = jax.vjp(lambda pose: function(*moved(pose, arrays)), pose)
        return value, pullback(cotangent)[0]

    return run


@functools.lru_cache(maxsize=2)
def _inputs(op, spec):
    """The spec's arrays on the device, and a cotangent of its output's shape."""
    arrays = tuple(jnp.asarray(a) for a in spec.arrays())
    output = jax.eval_shape(_function(op, spec, None), *arrays)
    return arrays, jnp.asarray(np.random.default_rng(1).normal(size=output.shape), jnp.float32)


def _call(op, spec, implementation, what):
    """A function and its arguments; what: forward, both or to_pose."""
    arrays, cotangent = _inputs(op, spec)
    function = _function(op, spec, implementation)
    if what == "forward":
        return function, arrays
    if what == "both":
        return _both(function), (cotangent, *arrays)
    return _to_pose(op, function), (cotangent, jnp.zeros(6), *arrays)


def timer(op, spec, implementation, what):
    """A callable that runs one compiled call and returns its seconds."""
    function, arguments = _call(op, spec, implementation, what)
    return _clocked(jax.jit(function), *arguments)


def _clocked(compiled, *arguments):
    def run():
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - start

    return run


EXP_SIZES = tuple(2**p for p in (14, 16, 17, 18, 19, 20))
"""Array lengths, 64 kB to 4 MB, among which the best rate of exps is sought: first-level to last-level cache."""

_EXPS = 2**22


@functools.partial(jax.jit, static_argnums=1)
def _repeated_exp(x, passes):
    # exp(-x) leads to 0.567 from any start: no pass can be left out, and no value overflows or becomes subnormal.
    return jax.lax.fori_loop(0, passes, lambda _, x: jnp.exp(-x), x)


def exp_timers(sizes=EXP_SIZES, exps=_EXPS):
    """Timers, by array length, of `exps` exps each."""
    return {("exp", n): _clocked(_repeated_exp, jnp.full(n, 0.3, jnp.float32), max(1, exps // n)) for n in sizes}


def exp_rate(medians, exps=_EXPS):
    """Best exps per second among the medians of `exp_timers`."""
    return max(max(1, exps // key[1]) * key[1] / seconds for key, seconds in medians.items() if key[0] == "exp")


def take_turns(timers, seconds):
    """Median seconds of each timer, in a dict; each is warmed up, then called for about `seconds`, in ROUNDS turns.

    Args:
      timers: dict name -> callable that does the work once and returns its seconds.
    """
    for run in timers.values():
        run()
    calls = {name: max(1, min(300, round(seconds / ROUNDS / max(run(), 1e-6)))) for name, run in timers.items()}
    taken = {name: [] for name in timers}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for name, run in timers.items():
                taken[name] += [run() for _ in range(calls[name])]
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(values) for name, values in taken.items()}


# Fresh processes: memory, and runs with fewer threads.


def _apart(function, *arguments):
    """`function(*arguments)` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _status_bytes(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


def _memory_here(op, spec, implementation, what):
    function, arguments = _call(op, spec, implementation, what)
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(arguments)
    analysis = compiled.memory_analysis()
    rise = None
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
        before = _status_bytes("VmRSS")
        jax.block_until_ready(compiled(*arguments))
        rise = _status_bytes("VmHWM") - before
    except OSError:
        jax.block_until_ready(compiled(*arguments))
    return {
        "xla_temporaries_mib": analysis.temp_size_in_bytes / 2**20 if analysis else None,
        "rise_mib": rise / 2**20 if rise is not None else None,
        "process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def memory(op, spec, implementation, what):
    """Memory of one call in a fresh process, MiB: `xla_temporaries_mib`, `rise_mib` (results and whatever the backend holds,
    above code and inputs; None where the system does not tell) and `process_peak_mib`."""
    return _apart(_memory_here, op, spec, implementation, what)


# DiffDRR.

DIFFDRR_SAMPLES = 128


class Peer:
    """DiffDRR in a process of its own. `missing` says why there is none."""

    def __init__(self, python, spec, thread_count):
        self.missing = None
        volume, affine, intrinsics = spec.arrays()
        matrix = np.eye(4)
        matrix[:3] = spec.spacing_mm * affine[0].astype(np.float64)
        matrix[:3, 3] -= 0.5 * spec.spacing_mm * (np.array(spec.shape) - 1)
        self._folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._folder.name)
        np.save(folder / "volume.npy", volume)
        np.save(folder / "weights.npy", np.asarray(_inputs("drr", spec)[1][0]))
        self._image = folder / "image.npy"
        settings = {
            "volume": str(folder / "volume.npy"),
            "weights": str(folder / "weights.npy"),
            "spacing_mm": spec.spacing_mm,
            "matrix": matrix.tolist(),
            "pixels": spec.size,
            "focal_px": float(intrinsics[0, 0]),
            "samples": DIFFDRR_SAMPLES,
            "threads": thread_count,
        }
        script = pathlib.Path(__file__).with_name("peer_diffdrr.py")
        self._process = subprocess.Popen(
            [python, "-I", str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        first = self._process.stdout.readline()
        if not first:
            self.missing = (self._process.stderr.read().strip().splitlines() or ["it ended without a word"])[-1]
        else:
            self.missing = json.loads(first).get("missing")

    def _ask(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"DiffDRR stopped: {self._process.stderr.read().strip()[-500:]}")
        return answer

    def timer(self, what):
        """A timer of `forward` or `both`."""

        def run():
            seconds = float(self._ask(what))
            time.sleep(0.02)  # OpenMP's threads spin for a while after their work, on the processors that are ours next
            return seconds

        return run

    def image(self):
        """What it renders, (height, width)."""
        self._ask(f"image {self._image}")
        return np.load(self._image)

    def close(self):
        """Ends the process; its standard input closes, so it leaves by itself."""
        self._process.communicate()
        self._folder.cleanup()


def _race_here(python, crop, ours, thread_count, seconds):
    if thread_count < threads() and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:thread_count])
    peer = Peer(python, crop, thread_count)
    try:
        if peer.missing:
            return {"missing": peer.missing}
        timers = {("diffdrr", what): peer.timer(what) for what in ("forward", "both")}
        for op, (spec, implementation) in ours.items():
            for what in ("forward", "both", "to_pose"):
                timers[op, what] = timer(op, spec, implementation, what)
        medians = take_turns(timers, seconds)
        result = {
            "threads": thread_count,
            "diffdrr_forward_ms": 1e3 * medians["diffdrr", "forward"],
            "diffdrr_to_pose_ms": 1e3 * medians["diffdrr", "both"],
        }
        for op in ours:
            result |= {f"{op}_{what}_ms": 1e3 * medians[op, what] for what in ("forward", "both", "to_pose")}
            result[f"diffdrr_over_{op}"] = medians["diffdrr", "both"] / medians[op, "to_pose"]
        # Both render the crop from the same arrays: a large difference would mean that the times compare unlike things.
        image = np.asarray(jax.jit(_function("drr", crop, None))(*_inputs("drr", crop)[0]))[0]
        result["image_difference"] = float(np.linalg.norm(peer.image() - image) / np.linalg.norm(image))
        return result
    finally:
        peer.close()


def against_diffdrr(python, crop, ours, seconds):
    """Ours and DiffDRR in turns, forward and backward to the pose: a list of dicts, one thread each, then all threads each.

    None, with a line on standard error, where `python` (a path or None) has no DiffDRR. `crop` is the `drr` spec that DiffDRR
    renders; `ours` maps an operator's name to (spec, implementation). Times in ms.
    """
    if python is None:
        if importlib.util.find_spec("diffdrr") is None:
            say("DiffDRR: not installed here; --diffdrr_python=PATH names a python that has it")
            return None
        python = sys.executable
    counts = [1] if hasattr(os, "sched_setaffinity") and threads() > 1 else []
    results = []
    for count in (*counts, threads()):
        say(f"DiffDRR beside {' and '.join(ours)}, {count} thread(s) each")
        results.append(_apart(_race_here, str(python), crop, ours, count, seconds))
        if "missing" in results[-1]:
            say(f"DiffDRR: {results[-1]['missing']}")
            return None
    return results


def _worst(races, key):
    return None if races is None else min(race[key] for race in races)


# Growth.


def growth(op, axis, specs, implementation, seconds):
    """Times of `op` on a series of specs that grow along `axis` (gaussians, pixels or voxels).

    Returns:
      dict of sizes, forward_ms, both_ms, slope_forward and slope_both.
    """
    sizes = [_size(spec, axis) for spec in specs]
    say(f"{op}: {len(sizes)} sizes from {sizes[0]:,} to {sizes[-1]:,} {axis}")
    result = {"sizes": sizes}
    for what in ("forward", "both"):
        timers = {}
        for index, spec in enumerate(specs):
            timers[index] = timer(op, spec, implementation, what)
        medians = take_turns(timers, seconds)
        times = [medians[index] for index in range(len(specs))]
        result[f"{what}_ms"] = [1e3 * t for t in times]
        result[f"slope_{what}"] = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
    return result


def _size(spec, axis):
    if axis == "gaussians":
        return spec.gaussians
    return spec.height * spec.width if axis == "pixels" else int(np.prod(spec.shape))


def plot(path, title, axis, curves):
    """Writes a PNG of time against size, log-log, beside the line of slope 1; `curves` as `growth` gives it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.0), layout="constrained")
    axes = figure.subplots()
    sizes = np.array(curves["sizes"], float)
    for what, label in (("forward", "value"), ("both", "value and gradients")):
        axes.loglog(sizes, curves[f"{what}_ms"], "o-", label=f"{label}, slope {curves[f'slope_{what}']:.2f}")
    axes.loglog(sizes, curves["both_ms"][-1] * sizes / sizes[-1], "--", color="grey", label="slope 1")
    axes.set(title=title, xlabel=axis, ylabel="ms")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, path)


def plot_growth(folder, op, implementation, curves):
    """One PNG per axis, `<op>_<axis>_<implementation>.png`; `curves` maps an axis to what `growth` gives."""
    for axis, curve in curves.items():
        path = pathlib.Path(folder) / f"{op}_{axis}_{implementation}.png"
        plot(path, f"{op}, {implementation}, {threads()} thread(s)", axis, curve)
        say(f"wrote {path}")


# One spec.


def bench(op, name, implementation=None, *, seconds=1.0, diffdrr=False, diffdrr_python=None):
    """All figures of one operator on one of its named specs, as a flat dict; times in ms, memory in MiB.

    Raises:
      ValueError, NotImplementedError: an implementation that is unknown, or cannot run here.
    """
    spec = OPERATORS[op].specs.SPECS[name]
    implementation = resolve(op, spec, implementation)
    say(f"{op} {name} ({implementation}, {threads()} thread(s)): times")
    kinds = ("forward", "both") if op == "voxelize" else ("forward", "both", "to_pose")
    timers = {what: timer(op, spec, implementation, what) for what in kinds}
    arrays, _ = _inputs(op, spec)
    count = pairs(op, spec, arrays)
    medians = take_turns({**timers, **(exp_timers() if count is not None else {})}, seconds)
    result = {"op": op, "spec": name, "shape": spec.describe(), "implementation": implementation, "threads": threads()}
    result |= {f"{what}_ms": 1e3 * medians[what] for what in kinds}
    result["backward_over_forward"] = _backward_over_forward(medians["forward"], medians["both"])
    if count is not None:
        rate = exp_rate(medians)
        result |= {
            "pairs": count,
            "pairs_per_second": count / medians["forward"],
            "exps_per_second": rate,
            "bound_ms": 1e3 * count / rate,
            "forward_over_bound": medians["forward"] * rate / count,
        }
    for what in ("forward", "both"):
        say(f"{op} {name}: memory of {what}")
        result[f"memory_{what}"] = memory(op, spec, implementation, what)
    if diffdrr:
        crop = dataclasses.replace(
            drr_specs.SPECS["crop_96"], height=spec.height, width=spec.width, pixel_mm=spec.pixel_mm
        )
        races = against_diffdrr(diffdrr_python, spec if op == "drr" else crop, {op: (spec, implementation)}, seconds)
        result["diffdrr"] = races
        result[f"diffdrr_over_{op}"] = _worst(races, f"diffdrr_over_{op}")
    return result


def _backward_over_forward(forward, both):
    return max(both - forward, 0.0) / forward


# The summary.


@dataclasses.dataclass(frozen=True)
class Suite:
    """What `summary` runs: specs by their role, growth as (operator, axis, series of specs), the growth series at whose end
    memory is measured, and seconds per measurement."""

    splat: object = splat_specs.SPECS["paper_50k"]
    voxelize_64: object = voxelize_specs.SPECS["paper_50k_64"]
    voxelize_128: object = voxelize_specs.SPECS["paper_50k_128"]
    vertebra: object = splat_specs.SPECS["vertebra_10k"]
    crop: object = drr_specs.SPECS["crop_96"]
    growth: tuple = (
        ("splat", "gaussians", splat_specs.GROWTH["gaussians"]),
        ("voxelize", "gaussians", voxelize_specs.GROWTH["gaussians"]),
        ("splat", "pixels", splat_specs.GROWTH["pixels"]),
        ("voxelize", "voxels", voxelize_specs.GROWTH["voxels"]),
    )
    memory: tuple[str, ...] = ("splat_gaussians", "voxelize_gaussians", "splat_pixels", "voxelize_voxels")
    exp_sizes: tuple[int, ...] = EXP_SIZES
    seconds: float = 1.0


def summary(suite=None, *, diffdrr_python=None, plots=None):
    """The figures that the README quotes, in one dict that JSON can hold; keys as the module's docstring explains them.

    Args:
      suite: a `Suite`, by default the one of realistic sizes (some minutes on two cores).
      diffdrr_python: path of a python that has DiffDRR, or None.
      plots: folder for the PNGs of the growth series, or None.
    """
    suite = suite or Suite()
    seconds = suite.seconds
    specs = {"splat": suite.splat, "voxelize_64": suite.voxelize_64, "voxelize_128": suite.voxelize_128}
    ops = {name: name.split("_")[0] for name in specs}
    names = {op: resolve(op, spec, None) for op, spec in (("splat", suite.splat), ("voxelize", suite.voxelize_64))}
    names["drr"] = resolve("drr", suite.crop, None)
    result = {"threads": threads(), "implementations": names, "jax": jax.__version__}

    say("times beside the bound")
    counts, timers = {}, exp_timers(suite.exp_sizes)
    for name, spec in specs.items():
        counts[name] = pairs(ops[name], spec, _inputs(ops[name], spec)[0])
        for what in ("forward", "both"):
            timers[name, what] = timer(ops[name], spec, names[ops[name]], what)
    timers["splat_xla", "forward"] = timer("splat", suite.splat, "xla", "forward")
    medians = take_turns(timers, seconds)
    rate = exp_rate(medians)
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
        curve = growth(op, axis, series, names[op], seconds)
        curves.setdefault(op, {})[axis] = curve
        slopes.setdefault(axis, []).extend([curve["slope_forward"], curve["slope_both"]])
    for axis in ("gaussians", "pixels", "voxels"):
        result[f"slope_{axis}"] = max(slopes[axis]) if axis in slopes else None
    result["growth"] = curves

    result["memory"] = {}
    for op, axis, series in suite.growth:
        if f"{op}_{axis}" in suite.memory:
            say(f"{op}: memory at {_size(series[-1], axis):,} {axis}")
            result["memory"][f"{op}_{axis}"] = memory(op, series[-1], names[op], "both")

    races = against_diffdrr(
        diffdrr_python,
        suite.crop,
        {"splat": (suite.vertebra, names["splat"]), "drr": (suite.crop, names["drr"])},
        seconds,
    )
    result["diffdrr"] = races
    for op in ("splat", "drr"):
        result[f"diffdrr_over_{op}"] = _worst(races, f"diffdrr_over_{op}")

    if plots is not None:
        for op, by_axis in curves.items():
            plot_growth(plots, op, names[op], by_axis)
    return result


def rounded(tree, digits=4):
    """The same tree with floats rounded to `digits` significant digits, for printing."""
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


# The program. Its flags are its own, so that importing this module leaves other programs' flags alone.

FLAGS = flags.FlagValues()
OP = flags.DEFINE_enum("op", None, sorted(OPERATORS), "Operator.", flag_values=FLAGS)
SPEC = flags.DEFINE_string("spec", None, "A name in kernels/<op>/arg_specs.py.", flag_values=FLAGS)
IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Backend; by default the best.", flag_values=FLAGS)
AGAINST = flags.DEFINE_enum("against", None, ["diffdrr"], "Compare with this program too.", flag_values=FLAGS)
DIFFDRR_PYTHON = flags.DEFINE_string("diffdrr_python", None, "Python that has DiffDRR.", flag_values=FLAGS)
PLOTS = flags.DEFINE_string("plots", None, "Folder for PNGs of time against size.", flag_values=FLAGS)
SUITE = flags.DEFINE_enum("suite", None, ["summary"], "All of it, instead of --op.", flag_values=FLAGS)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)
SECONDS = flags.DEFINE_float("seconds", 1.0, "Time given to each measurement.", lower_bound=0.0, flag_values=FLAGS)
HELP = flags.DEFINE_bool("help", False, "Show this help.", short_name="?", flag_values=FLAGS)


def _check():
    """Raises flags.Error where the flags do not fit together or name what is not there."""
    if (OP.value is None) == (SUITE.value is None):
        raise flags.Error("wanted either --op and --spec, or --suite=summary")
    if SUITE.value is not None:
        for flag in (SPEC, IMPLEMENTATION):
            if flag.value is not None:
                raise flags.Error(f"--{flag.name} goes with --op, not with --suite")
    else:
        specs = OPERATORS[OP.value].specs.SPECS
        if SPEC.value not in specs:
            raise flags.Error(f"--spec={SPEC.value}, wanted one of {', '.join(specs)}")
        if AGAINST.value is not None and OP.value == "voxelize":
            raise flags.Error("--against=diffdrr: DiffDRR renders images, so --op must be splat or drr")
        try:
            resolve(OP.value, specs[SPEC.value], IMPLEMENTATION.value)
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


def main():
    """Reads the flags, measures and prints; bad flags end the program with one line and status 2."""
    if not program.read_flags(FLAGS, HELP, __doc__, _check):
        return
    python = DIFFDRR_PYTHON.value
    if SUITE.value is not None:
        result = summary(Suite(seconds=SECONDS.value), diffdrr_python=python, plots=PLOTS.value)
    else:
        result = bench(
            OP.value,
            SPEC.value,
            IMPLEMENTATION.value,
            seconds=SECONDS.value,
            diffdrr=AGAINST.value == "diffdrr",
            diffdrr_python=python,
        )
        if PLOTS.value is not None:
            name, series = result["implementation"], OPERATORS[OP.value].specs.GROWTH
            curves = {axis: growth(OP.value, axis, specs, name, SECONDS.value) for axis, specs in series.items()}
            plot_growth(PLOTS.value, OP.value, name, curves)
            result["growth"] = curves
    if JSON.value:
        print(json.dumps(rounded(result)))
    else:
        _print(rounded(result))


if __name__ == "__main__":
    main()
