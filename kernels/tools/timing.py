"""What is timed, how it is timed, and how much memory it takes."""

import functools
import gc
import pathlib
import re
import resource
import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import jax
import jax.numpy as jnp

from kernels.common import rays
from kernels.common import symmetric
from kernels.tools import operators
from kernels.tools import process
from kernels.tools.operators import Spec

ROUNDS = 7
"""Number of turns in which compared functions are timed. Chosen by hand: more turns follow a noisy machine better, and leave
fewer calls per turn in the same time."""

Timer = Callable[[], float]
"""Does the work once and returns its seconds."""

Quantity = Literal["forward", "both", "to_pose"]
"""The value; the value and all gradients; the value and the gradient to a rigid motion."""

# The functions.


def _both(function):
    def run(cotangent, *arrays):
        value, pullback = jax.vjp(function, *arrays)
        return value, pullback(cotangent)

    return run


def _to_pose(op, function):
    """Value and gradient to a motion (6,) about the isocentre: a Rodrigues vector (tan of half the angle), then mm."""

    def moved(pose, arrays):
        # The Cayley map, because it is smooth at 0; the norm of a rotation vector is not.
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
        # Homogeneous coordinates, so that the gradients to R and shift are one product over the Gaussians.
        mean = jnp.concatenate([mean, jnp.ones_like(mean[..., :1])], -1)
        # K -> R K R' is linear in the six numbers: a product with a 6x6 matrix, whose rows are the rotated unit matrices.
        turn = symmetric.from_matrix(R @ symmetric.to_matrix(jnp.eye(6, dtype=pose.dtype)) @ R.T)
        return density, mean @ jnp.concatenate([R.T, shift[None]]), precision @ turn, intrinsics

    def run(cotangent, pose, *arrays):
        value, pullback = jax.vjp(lambda pose: function(*moved(pose, arrays)), pose)
        return value, pullback(cotangent)[0]

    return run


def _call(op, spec, implementation, what):
    """A function and its arguments."""
    arrays, cotangent = operators.inputs(op, spec)
    function = operators.of_arrays(op, spec, implementation)
    if what == "forward":
        return function, arrays
    if what == "both":
        return _both(function), (cotangent, *arrays)
    return _to_pose(op, function), (cotangent, jnp.zeros(6), *arrays)


def timer(op: str, spec: Spec, implementation: str | None, what: Quantity) -> Timer:
    """A timer of one compiled call."""
    function, arguments = _call(op, spec, implementation, what)
    return _clocked(jax.jit(function), *arguments)


def _clocked(compiled, *arguments):
    def run():
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - start

    return run


EXP_SIZES = tuple(2**p for p in (14, 16, 17, 18, 19, 20))
"""Array lengths among which the best rate of exps is sought: 64 kB to 4 MB, from first-level to last-level cache."""

# Number of exps per call; chosen by hand: fewer would let the cost of a call show, more would only take longer.
_EXPS = 2**22


@functools.partial(jax.jit, static_argnums=1)
def _repeated_exp(x, passes):
    # Iterating exp(-x) converges to 0.567: no pass can be optimised away, and no value overflows or becomes subnormal.
    return jax.lax.fori_loop(0, passes, lambda _, x: jnp.exp(-x), x)


def exp_timers(sizes: Sequence[int] = EXP_SIZES, exps: int = _EXPS) -> dict[tuple[str, int], Timer]:
    """Timers of about `exps` exps each; a key is ("exp", array length)."""
    return {("exp", n): _clocked(_repeated_exp, jnp.full(n, 0.3, jnp.float32), max(1, exps // n)) for n in sizes}


def exp_rate(medians: Mapping[Any, float], exps: int = _EXPS) -> float:
    """Best exps per second among the medians of `exp_timers`; other keys are passed over."""
    return max(max(1, exps // key[1]) * key[1] / seconds for key, seconds in medians.items() if key[0] == "exp")


# Maximum number of calls per turn; chosen by hand: it bounds the time spent on very short calls.
_MOST_CALLS = 300


def take_turns(timers: Mapping[Any, Timer], seconds: float) -> dict[Any, float]:
    """Median seconds of each timer by its key; each is warmed up, then called for about `seconds`, in ROUNDS turns."""
    for run in timers.values():
        run()
    calls = {name: max(1, min(_MOST_CALLS, round(seconds / ROUNDS / max(run(), 1e-6)))) for name, run in timers.items()}
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


# Memory.


def _status_bytes(field):
    found = re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def _memory_here(op, spec, implementation, what):
    function, arguments = _call(op, spec, implementation, what)
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(arguments)
    analysis = compiled.memory_analysis()
    rise = None
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
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


def memory(op: str, spec: Spec, implementation: str | None, what: Quantity) -> dict[str, float | None]:
    """Memory of one call in a fresh process, MiB.

    Returns:
      `xla_temporaries_mib`; `rise_mib`, the results and all that the backend holds, above code and inputs; and
      `process_peak_mib`. None where the system does not report it.
    """
    return process.run_apart(_memory_here, op, spec, implementation, what)
