"""Progress of a run: a bar with an ETA on the terminal, and scalars and images for TensorBoard."""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from data_pipelines.io import processes

TERMINAL_S, LOG_FILE_S = 0.2, 20.0
"""Minimum time between updates of a bar, s, chosen by hand: smooth on a terminal, few lines in a log file."""


def bar(total: int, text: str, start: int = 0) -> tqdm.tqdm:
    """A progress bar with ETA on standard error, updated rarely where that is not a terminal. Of jax's processes the first has one.

    Args:
      total: number of steps; text: its title; start: number of steps done already.
    """
    interval = TERMINAL_S if sys.stderr.isatty() else LOG_FILE_S
    intervals = dict(mininterval=interval, maxinterval=4 * interval)
    # As wide as the terminal; a wider bar would leave a line at every update.
    others = not processes.is_first()
    return tqdm.tqdm(total=total, initial=start, desc=text, dynamic_ncols=True, disable=others, **intervals)


class Log:
    """TensorBoard event file of one stage, in `folder`/tensorboard/`stage`, which jax's first process writes."""

    def __init__(self, folder: pathlib.Path | str, stage: str) -> None:
        self._writer = None
        if processes.is_first():
            import tensorboardX  # an extra of the package, needed for training only

            self._writer = tensorboardX.SummaryWriter(str(pathlib.Path(folder) / "tensorboard" / stage))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars: name -> value."""
        for name, value in values.items() if self._writer else ():
            self._writer.add_scalar(name, float(value), step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image (H, W) with values in [0, 1]."""
        if self._writer:
            self._writer.add_image(name, image[None], step)

    def close(self) -> None:
        """Flushes pending events and closes the file."""
        if self._writer:
            self._writer.close()


class Trace:
    """jax's profile of some steps of a stage, in the folder of its `Log`."""

    def __init__(self, folder: pathlib.Path | str, stage: str, start: int, stop: int) -> None:
        """Records from step `start` to before `stop`; nothing where they are the same."""
        self._folder = pathlib.Path(folder) / "tensorboard" / stage
        self._start, self._stop, self._on = start, stop, False

    def before(self, step: int, state: Any) -> None:
        """To be called before each step with the state, for which it waits where the profile begins or ends."""
        if step not in (self._start, self._stop) or self._start == self._stop:
            return
        jax.block_until_ready(state)
        if step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        else:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
