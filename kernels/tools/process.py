"""Progress lines, the number of threads, and functions run in fresh processes."""

import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any


def say(line: str) -> None:
    """Prints one line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


def threads() -> int:
    """Number of threads that XLA uses in this process: the processors that it may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_apart(function: Callable, *arguments: Any) -> Any:
    """Returns `function(*arguments)`, computed in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
