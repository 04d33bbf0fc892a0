"""Choice of a backend: a name, an order of names, or None for the best that this machine can run."""

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
