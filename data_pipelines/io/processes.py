"""The processes of jax's distributed runtime, which share a file system: what is made once is made by the first one.

Without that runtime there is one process, and none of this asks for a device.
"""

import contextlib
import sys
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import TypeVar

import numpy as np

from data_pipelines.io import locks
from radgs_jax import errors

LONGEST_S = 7 * 24 * 3600
"""Time for which processes wait for each other's files, s: a week, longer than any data takes. One that has died ends the wait."""

_Value = TypeVar("_Value")


def several() -> bool:
    """Whether there is more than this process."""
    # Only jax starts several, and what does without it, such as --help, need not wait for its import.
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the first one, or the only one."""
    if not several():
        return True
    import jax

    return jax.process_index() == 0


def agreed(value: int) -> int:
    """The first process's number. All must ask at about the same time."""
    if not several():
        return value
    from jax.experimental import multihost_utils  # a tenth of a second, which a single process saves

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(name: str) -> None:
    """Returns when all processes are here; name: of the place, the same in all."""
    if several():
        from orbax.checkpoint import multihost

        # Not by a collective operation, which waits for half a minute.
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * LONGEST_S)


def first_makes(make: Callable[[], _Value]) -> _Value:
    """What `make` returns, which writes what is not there yet: the first process calls it, and then the others, who find all of it.

    Raises:
      RunError: in the others, where it fails in the first one, which raises its error.
    """
    found = []
    first_does(lambda: found.append(make()))
    return found[0] if found else make()


def first_does(make: Callable[[], Any]) -> None:
    """Calls `make` in the first process alone, while the others wait; raises as `first_makes`."""
    failed = None
    if is_first():
        try:
            make()
        except BaseException as error:
            failed = error
    wait_for_all("the first process")
    went_well = agreed(failed is None)
    if failed is not None:
        raise failed
    if not went_well:
        raise errors.RunError("the first process could not go on, and has said why")


@contextlib.contextmanager
def first_holds(lock: Any, what: object, shared: bool = False) -> Iterator[None]:
    """The first process holds a lock (`locks.hold`) while all of them are in the block; raises as `first_makes`."""
    with contextlib.ExitStack() as stack:
        first_does(lambda: stack.enter_context(locks.hold(lock, what, shared)))
        yield


def all_due(now: bool, due: bool) -> bool:
    """Whether something is due in all processes by the first one's clock. Several processes ask each other only `now` and then."""
    return now and bool(agreed(due)) if several() else due
