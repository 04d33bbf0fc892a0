"""Choice of a backend: a name, an order of names, or None for the best on the device that the computation runs on.

That device is known when a program is lowered, not when it is traced: its arguments may be committed to a device other than the
default one, or it may be exported for another machine. So a call of an operator is one primitive, whose lowering for a kind of
device traces the backend chosen for that kind. `jax.lax.platform_dependent` would trace all of them every time, Pallas's on a
CPU included.
"""

import contextvars
import dataclasses
import functools
import importlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Literal

import jax
from absl import logging
from jax.extend import backend as clients
from jax.extend import core
from jax.interpreters import mlir

from kernels.common.types import Array
from kernels.common.types import Implementation

Device = Literal["cpu", "gpu", "tpu"]
"""Kinds of devices that have backends of their own."""

_lowered_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowered_for", default=None)
"""The kind of device that a backend is traced for inside `run`."""


class NotBuilt(NotImplementedError):
    """A backend suits the device and the arrays but cannot be built on this machine; the text says why, and what helps."""


def hashable(implementation: Implementation) -> Implementation:
    """The argument `implementation=` in a form that jax can hash as a static argument."""
    return implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)


def run(
    op: str, backends: Mapping[str, Callable], implementation: Implementation, call: Callable, *arrays: Array
) -> tuple[Array, ...]:
    """Results of the first backend, in the given order, that can run on the device of the computation.

    Outside `jax.jit` that is the device that an array is committed to, or the default one. A backend that cannot run raises
    NotImplementedError.

    Args:
      op: the operator's name, for messages.
      backends: name -> callable, best first.
      implementation: None (the order of `backends`), a name, or a sequence of names.
      call: (backend, *arrays) -> array or tuple of arrays; it may be traced later, and for several kinds of devices.
      arrays: the arguments.
    Raises:
      ValueError: a name is unknown.
      NotImplementedError: the only named backend can run on no device of this process, or, later, not on the device that the
        program is lowered for.
      ExceptionGroup: the same for several backends, with the reason of each.
    """
    names = (
        list(backends)
        if implementation is None
        else ([implementation] if isinstance(implementation, str) else list(implementation))
    )
    unknown = [name for name in names if name not in backends]
    if unknown:
        raise ValueError(f"{op}: unknown implementation {unknown[0]!r}, wanted one of {sorted(backends)}")
    choice = _Choice(op, {name: backends[name] for name in names}, implementation is None, call)
    return tuple(_operator.bind(*arrays, choice=choice))


def warn_not_built(reason: Exception) -> None:
    """Logs a warning with the cost and the remedy, once per process, if `reason` is a NotBuilt."""
    if isinstance(reason, NotBuilt):
        text = "the C++ kernels are not available, so XLA's run in their place, about four times slower: %s"
        logging.log_first_n(logging.WARNING, text, 1, reason)


def on_call(device: Device, module: str, *names: str) -> tuple[Callable, ...]:
    """Functions of a module, by name, that import it when they are called: importing Pallas takes a sixth of a second.

    Args:
      device: kind of device that the functions are for; a call for another raises NotImplementedError, as `require` does,
        without the import.
      module: full name of the module.
      names: of its functions.
    """

    def later(name):
        def function(*args, **kwargs):
            require(device, ())
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

        return function

    return tuple(later(name) for name in names)


def require(device: Device, arrays: Sequence[Array], interpret: bool = False) -> None:
    """Checks that a float32 backend for one kind of device can run.

    Args:
      device: the kind of device that the backend is for.
      arrays: the arguments.
      interpret: the kernel is interpreted, which works on any device.
    Raises:
      NotImplementedError: the program is traced for another kind of device (outside `run`, the default device is of another
        kind), or an array is not float32.
    """
    found = _lowered_for.get() or _default_device()
    if not interpret and found != device:
        raise NotImplementedError(f"the device is {found}, not {device}")
    wrong = [str(a.dtype) for a in arrays if a.dtype != "float32"]
    if wrong:
        raise NotImplementedError(f"float32 only, not {wrong[0]}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """One call of an operator, with its traced programs by kind of device and shapes."""

    op: str
    backends: dict
    by_default: bool
    call: Callable
    programs: dict = dataclasses.field(default_factory=dict, repr=False)

    def program(self, device, avals):
        """Traces the first backend that can run on a kind of device; errors as in `run`."""
        if (device, avals) not in self.programs:
            token = _lowered_for.set(device)
            try:
                # jax caches traces by function and shapes, so another device needs another function.
                self.programs[device, avals] = jax.make_jaxpr(lambda *arrays: self._results(*arrays))(*avals)
            finally:
                _lowered_for.reset(token)
        return self.programs[device, avals]

    def _results(self, *arrays):
        reasons = []
        for name, backend in self.backends.items():
            try:
                return jax.tree.leaves(self.call(backend, *arrays))
            except NotImplementedError as reason:
                if len(self.backends) == 1:
                    raise
                reasons.append(reason)
                if self.by_default:
                    warn_not_built(reason)
                logging.log_first_n(
                    logging.INFO, "%s: %s is not available (%s); trying the next backend", 3, self.op, name, reason
                )
        raise ExceptionGroup(f"{self.op}: no implementation can run here", reasons)


def _kind(device):
    """The kind (cpu, gpu, tpu or another) of a device or of a platform's name."""
    name = getattr(device, "platform", device)
    return "gpu" if name in ("cuda", "rocm") else name


def _default_device():
    # A configuration value without a declared attribute.
    return _kind(getattr(jax.config, "jax_default_device") or jax.default_backend())  # noqa: B009


def _devices():
    """The kinds of devices of this process, the default one first."""
    return dict.fromkeys([_default_device(), *(_kind(client) for client in clients.backends().values())])


_operator = core.Primitive("radgs_operator")
_operator.multiple_results = True


@_operator.def_impl
def _(*arrays, choice):
    committed = [a for a in arrays if isinstance(a, jax.Array) and a.committed]
    device = _kind(next(iter(committed[0].devices()))) if committed else _default_device()
    return core.jaxpr_as_fun(choice.program(device, tuple(map(jax.typeof, arrays))))(*arrays)


@_operator.def_abstract_eval
def _(*avals, choice):
    # Shapes are the same on every device. The default one comes first, because its trace will probably be lowered too.
    refusals = []
    for device in _devices():
        try:
            return choice.program(device, avals).out_avals
        except (NotImplementedError, ExceptionGroup) as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _lower(device, ctx, *operands, choice):
    return mlir.lower_fun(core.jaxpr_as_fun(choice.program(device, ctx.avals_in)))(ctx, *operands)


for _device in ("cpu", "gpu", "tpu"):
    mlir.register_lowering(_operator, functools.partial(_lower, _device), platform=_device)
mlir.register_lowering(_operator, functools.partial(_lower, "another"))
