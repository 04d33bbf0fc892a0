"""The operators as the tools see them: function, backends, specs, and functions of a spec's arrays alone."""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.common.types import Array
from kernels.drr import api as drr_api
from kernels.drr import arg_specs as drr_specs
from kernels.splat import api as splat_api
from kernels.splat import arg_specs as splat_specs
from kernels.voxelize import api as voxelize_api
from kernels.voxelize import arg_specs as voxelize_specs

Spec = splat_specs.SplatSpec | voxelize_specs.VoxelizeSpec | drr_specs.DrrSpec
"""Realistic arguments of an operator."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """A public operator.

    Attributes:
      function: the operator itself.
      backends: names of its backends, best first.
      specs: the module with its `SPECS` and `GROWTH`.
    """

    function: Callable
    backends: tuple[str, ...]
    specs: ModuleType


OPERATORS = {
    "splat": Operator(splat_api.splat, tuple(splat_api.BACKENDS), splat_specs),
    "voxelize": Operator(voxelize_api.voxelize, tuple(voxelize_api.BACKENDS), voxelize_specs),
    "drr": Operator(drr_api.drr, tuple(drr_api.FORWARD), drr_specs),
}


def resolve(op: str, spec: Spec, implementation: str | None) -> str:
    """Returns the name of the backend that `implementation` (a name, or None for the best) selects on this machine.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: the backend cannot run on this machine.
    """
    reason = None
    for name in OPERATORS[op].backends if implementation is None else (implementation,):
        try:
            jax.jit(of_arrays(op, spec, name)).lower(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in spec.arrays()))
            return name
        except NotImplementedError as error:
            reason = error
    raise NotImplementedError(f"{op}: {reason}")


def of_arrays(op: str, spec: Spec, implementation: str | None) -> Callable[..., Any]:
    """The operator as a function of its arrays alone; sizes and options are the spec's."""
    return lambda *arrays: OPERATORS[op].function(*arrays, *spec.size, implementation=implementation, **spec.options)


@functools.lru_cache(maxsize=2)
def inputs(op: str, spec: Spec) -> tuple[tuple[Array, ...], Array]:
    """The spec's arrays on the device, and a random cotangent of the output's shape."""
    arrays = tuple(jnp.asarray(a) for a in spec.arrays())
    output = jax.eval_shape(of_arrays(op, spec, None), *arrays)
    return arrays, jnp.asarray(np.random.default_rng(1).normal(size=output.shape), jnp.float32)
