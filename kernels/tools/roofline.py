"""A model of a kernel on a chip: operations per pair, pairs, bytes, and the time that they need at least."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from typing import cast
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kernels.common import triton_tiles
from kernels.tools import operators
from kernels.tools import pair_counts
from kernels.tools.chips import Chip
from kernels.tools.operators import Spec

BACKENDS = {"gpu": "pallas_triton", "tpu": "pallas_tpu"}
"""The backend of an operator for each kind of chip."""


def bound(chip: Chip, pairs: float, flops: float, specials: float, moved: float) -> dict[str, Any]:
    """The minimum time of a kernel on a chip, and what sets it.

    Three things overlap at best, so the slowest is the bound:
      flops     pairs x flops per pair / peak float32 rate = cores x flops per clock x clock
      specials  pairs x specials per pair / special-function rate = cores x specials per clock x clock
      bytes     bytes moved / bandwidth of the memory
    For 2 million pairs of 25 flops and 2 specials and 10 MB on an A100: 5e7 / 1.949e13 = 2.6 us, 4e6 / 2.436e12 = 1.6 us,
    1e7 / 2.039e12 = 4.9 us; the bytes are the bound.

    Args:
      pairs: number of pairs of a Gaussian and a sample.
      flops, specials: operations of each pair.
      moved: bytes read from and written to the memory.
    Returns:
      `flops_ms`, `specials_ms` (None where the chip's rate is unknown), `bytes_ms`, `bound_ms` and `by`.
    """
    times: dict[str, float | None] = {
        "flops": 1e3 * pairs * flops / chip.flops,
        "specials": 1e3 * pairs * specials / chip.specials if chip.specials else None,
        "bytes": 1e3 * moved / chip.bandwidth,
    }
    by = max((name for name in times if times[name] is not None), key=lambda name: cast(float, times[name]))
    return {**{f"{name}_ms": value for name, value in times.items()}, "bound_ms": times[by], "by": by}


_SPECIALS = {"exp", "exp2", "log", "rsqrt", "sqrt", "tanh", "logistic", "sin", "cos"}
_LOOPS = {"while": "body_jaxpr", "scan": "jaxpr"}
_FLOPS = {"add": 1, "sub": 1, "mul": 1, "max": 1, "min": 1, "neg": 1, "square": 1, "clamp": 2, "exp": 1, "sqrt": 1}


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs inside an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _equations(jaxpr: core.Jaxpr) -> Iterator[tuple[core.JaxprEqn, bool]]:
    """All equations at any depth, each with whether it has no equations inside."""
    for equation in jaxpr.eqns:
        inner = list(_inner(equation))
        yield equation, not inner
        for part in inner:
            yield from _equations(part)


def _has_loop(jaxpr):
    return any(equation.primitive.name in _LOOPS for equation, _ in _equations(jaxpr))


def operations(jaxpr: core.Jaxpr) -> tuple[float, float]:
    """float32 operations and special functions per pair in a Pallas kernel's innermost loop.

    Counted per element of a result: 1 for an addition, product, minimum or maximum, 2 for a clamp. An exp is a special
    function and a product (its base is 2); so are a square root (x times 1 / sqrt(x)) and a quotient, unless its divisor is a
    constant, which makes it a product. A reduction counts an addition per element that it removes, a matrix product 2 per
    multiply-add. Comparisons, selections, conversions, integers and loads do not count. A term with fewer elements than a
    step has pairs, such as one per row or per Gaussian, counts for its share.

    Args:
      jaxpr: a jaxpr with one `pallas_call`, at any depth. The kernel's innermost loops are counted, or the whole kernel where
        it has no loop.
    Returns:
      (flops, specials) per pair. The number of pairs of a step is its number of exps, as every pair has one weight.
    Raises:
      ValueError: the kernel has no exp.
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
        size = math.prod(cast(Any, result).shape)
        pairs += size * (name in ("exp", "exp2"))
        flops += size * _FLOPS.get(name, 0)
        specials += size * (name in _SPECIALS)
        if name == "div":
            flops += size
            specials += size * (not isinstance(equation.invars[1], core.Literal))
        elif name == "integer_pow":
            flops += size * (abs(equation.params["y"]).bit_length() - 1)
        elif name.startswith("reduce_"):
            flops += math.prod(cast(Any, equation.invars[0].aval).shape) - size
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = cast(Any, equation.invars[0].aval).shape
            flops += 2 * size * math.prod(shape[axis] for axis in contracted)
    if not pairs:
        raise ValueError("the kernel has no exp, so its pairs cannot be counted")
    return flops / pairs, specials / pairs


def tiled_work(spec: Any, module: ModuleType) -> dict[str, int]:
    """The work of the Triton backend on a spec's cloud, counted on the CPU without running its kernels.

    Args:
      spec: of splat or voxelize; `size` and `arrays()` are enough.
      module: the operator's `pallas_triton`.
    Returns:
      `launches` of the forward kernel (the backward kernel has one), and the numbers of pairs that the two kernels evaluate:
      `forward`, all samples of each tile that a Gaussian's box touches, and `backward`, all samples of each block.
    """
    boxes: list[Any] = []
    launched: list[int] = []
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
def model(op: str, spec_name: str, kind: str) -> dict[str, dict[str, Any]]:
    """The numbers of an operator's two kernels that do not depend on the chip.

    Args:
      kind: gpu or tpu.
    Returns:
      For `forward` and `backward`: `flops` and `specials` per pair, `pairs` that are needed, pairs that are `tiled` (None for a
      TPU), and `launches`.
    """
    spec, module = operators.OPERATORS[op].specs.SPECS[spec_name], find_backend(op, kind)
    assert module is not None
    arrays = spec.arrays()
    pairs = pair_counts.count_pairs(op, spec, arrays)
    work = tiled_work(spec, module) if kind == "gpu" else {"launches": 1}
    result: dict[str, dict[str, Any]] = {}
    for what, (function, shapes) in programs(op, spec, module, interpret=True).items():
        flops, specials = operations(jax.make_jaxpr(function)(*shapes).jaxpr)
        launches = work["launches"] if what == "forward" else 1
        result[what] = {"flops": flops, "specials": specials, "pairs": pairs, "launches": launches}
        result[what]["tiled"] = work.get(what)
    return result


def find_backend(op: str, kind: str) -> ModuleType | None:
    """The Pallas backend of an operator for gpu or tpu, or None where the package has none."""
    name = f"kernels.{op}.{BACKENDS[kind]}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def programs(
    op: str, spec: Spec, module: ModuleType, batch: tuple[int, ...] = (), **options: Any
) -> dict[str, tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]:
    """The backend's functions `forward` and `backward`, each with the shapes of its arguments.

    Args:
      batch: leading axes of all arguments.
      options: keyword arguments of both functions.
    """
    shapes = [jax.ShapeDtypeStruct((*batch, *a.shape), a.dtype) for a in spec.arrays()]
    size: Any = spec.size[0] if op == "voxelize" else spec.size
    cotangent = jax.ShapeDtypeStruct((*batch, *size), jnp.float32)
    return {
        "forward": (lambda *arrays: module.forward(*arrays, *spec.size, **options), shapes),
        "backward": (functools.partial(module.backward, **options), [*shapes, cotangent]),
    }
