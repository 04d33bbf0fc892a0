"""Worker processes: spawned, and ended quietly where this process is asked to end."""

import concurrent.futures
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def pool(count: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool of `count` processes, whose work is cancelled when the block ends with an error.

    Ctrl-C and Python's other KeyboardInterrupts end the processes at once; after another error they finish what they are at.
    """
    # Spawned, not forked: the parent may hold jax's threads.
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_leave_signals) as executor:
        try:
            yield executor
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
            raise


def _leave_signals():
    """Ctrl-C reaches all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
