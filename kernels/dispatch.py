"""Choice of a backend: a name, an order of names, or None for the best that this machine can run."""

import importlib

import jax
from absl import logging


def run(op, backends, implementation, *args, **kwargs):
    """Calls the first backend in the wanted order that does not raise NotImplementedError.

    Args:
      op: the operator's name, for messages.
      backends: dict name -> callable, best first.
      implementation: None (the dict's own order), a name, or a sequence of names.
    Raises:
      ValueError: an unknown backend name.
      NotImplementedError: a single named backend cannot run here.
      ExceptionGroup: none of several backends can run here; it holds every reason.
    """
    names = (
        list(backends)
        if implementation is None
        else ([implementation] if isinstance(implementation, str) else list(implementation))
    )
    unknown = [name for name in names if name not in backends]
    if unknown:
        raise ValueError(f"{op}: unknown implementation {unknown[0]!r}, wanted one of {sorted(backends)}")
    reasons = []
    for name in names:
        try:
            return backends[name](*args, **kwargs)
        except NotImplementedError as reason:
            if len(names) == 1:
                raise
            reasons.append(reason)
            logging.log_first_n(
                logging.INFO, "%s: %s is not available (%s); trying the next backend", 3, op, name, reason
            )
    raise ExceptionGroup(f"{op}: no implementation can run here", reasons)


def on_call(module, *names):
    """Functions of a module, by name, that import it when they are called: a CPU's start has no sixth of a second for Pallas.

    Raises, when called:
      ImportError, AttributeError: no such module, or no such function in it; and what the function raises.
    """

    def later(name):
        return lambda *args, **kwargs: getattr(importlib.import_module(module), name)(*args, **kwargs)

    return tuple(later(name) for name in names)


def require(device, arrays, interpret=False):
    """What a float32 backend for one kind of device asks first.

    Args:
      device: cpu, gpu or tpu; arrays: the arguments; interpret: the kernel is interpreted, which any device can do.
    Raises:
      NotImplementedError: the default device is another, or an array is not float32.
    """
    if not interpret and jax.default_backend() != device:
        raise NotImplementedError(f"the device is {jax.default_backend()}, not {device}")
    wrong = [str(a.dtype) for a in arrays if a.dtype != "float32"]
    if wrong:
        raise NotImplementedError(f"float32 only, not {wrong[0]}")
