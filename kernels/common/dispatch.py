"""Choice of a backend: a name, an order of names, or None for the best on the device that the computation runs on.

Which device that is shows when a program is lowered, not yet when it is traced: its arguments may be committed to another than
the default one, or it may be exported for another machine. So a call of an operator is one primitive, whose lowering for a kind
of device traces the backend chosen for that. `jax.lax.platform_dependent` would trace them all, each time, and Pallas's on a
CPU too.
"""

import contextvars
import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
from absl import logging
from jax.extend import backend as clients
from jax.extend import core
from jax.interpreters import mlir

_lowered_for = contextvars.ContextVar("lowered_for", default=None)
"""The kind of device that a backend is traced for within `run`."""


class NotBuilt(NotImplementedError):
    """A backend is meant for the device and the arrays, but cannot be built on this machine; the text says why and what helps."""


def run(op, backends, implementation, call, *arrays):
    """Results of the first backend in the wanted order that does not raise NotImplementedError where the computation runs.

    Outside of `jax.jit` that is the device that an array is committed to, or the default one.

    Args:
      op: the operator's name, for messages.
      backends: dict name -> callable, best first.
      implementation: None (the dict's own order), a name, or a sequence of names.
      call: (backend, *arrays) -> array or tuple of arrays; it may be traced later, and for several kinds of devices.
      arrays: the arguments.
    Returns:
      the tuple of results.
    Raises:
      ValueError: an unknown backend name.
      NotImplementedError: a single named backend can run on no device here; later, when lowered: not on that device.
      ExceptionGroup: the same of several backends; it holds every reason.
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


def warn_not_built(reason):
    """Says once per process, where the reason for another backend is a NotBuilt, what that costs and what helps."""
    if isinstance(reason, NotBuilt):
        text = "the C++ kernels are not available, so XLA's run in their place, about four times slower: %s"
        logging.log_first_n(logging.WARNING, text, 1, reason)


def on_call(device, module, *names):
    """Functions of a module, by name, that import it when they are called for such a device: Pallas takes a sixth of a second.

    Raises, when called:
      NotImplementedError: as `require`.
      ImportError, AttributeError: no such module, or no such function in it; and what the function raises.
    """

    def later(name):
        def function(*args, **kwargs):
            require(device, ())
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

        return function

    return tuple(later(name) for name in names)


def require(device, arrays, interpret=False):
    """What a float32 backend for one kind of device asks first.

    Args:
      device: cpu, gpu or tpu; arrays: the arguments; interpret: the kernel is interpreted, which any device can do.
    Raises:
      NotImplementedError: it is traced for another device (outside of `run`: the default one is another), or an array is not
        float32.
    """
    found = _lowered_for.get() or _default_device()
    if not interpret and found != device:
        raise NotImplementedError(f"the device is {found}, not {device}")
    wrong = [str(a.dtype) for a in arrays if a.dtype != "float32"]
    if wrong:
        raise NotImplementedError(f"float32 only, not {wrong[0]}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """One call of an operator, with the programs that it has become for one kind of device or another."""

    op: str
    backends: dict
    by_default: bool
    call: Callable
    programs: dict = dataclasses.field(default_factory=dict, repr=False)

    def program(self, device, avals):
        """The first backend that can run on a kind of device, traced; errors as `run`."""
        if (device, avals) not in self.programs:
            token = _lowered_for.set(device)
            try:
                # Jax keeps traces by function and shapes: for another device, it must be another function.
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
    """cpu, gpu, tpu or another, of a device or the name of a platform."""
    name = getattr(device, "platform", device)
    return "gpu" if name in ("cuda", "rocm") else name


def _default_device():
    return _kind(jax.config.jax_default_device or jax.default_backend())


def _devices():
    """Kinds of devices that this process has, the default one first."""
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
    # Shapes are the same on every device; what is traced for the default one will likely be lowered too.
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
