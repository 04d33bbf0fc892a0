"""Progress of a run: a bar with an ETA on the terminal, and scalars and images for TensorBoard."""

import contextlib
import contextvars
import io
import pathlib
import sys
import time
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from data_pipelines.io import processes
from experiments.runtime import events

TERMINAL_S, LINE_S = 0.2, 20.0
"""Minimum time, s, between updates of a bar on a terminal, and between lines of a log; chosen by hand."""
PLANNED = 0.01
"""Share of a plan from which on its pace is measured. Chosen by hand: less depends on the first compilation, more comes late."""


class _Plan:
    """The bars of a whole run, in order, and how long they are expected to take, s."""

    def __init__(self, expected_s: Mapping[str, float]) -> None:
        self._expected, self._begun, self._done = dict(expected_s), time.monotonic(), {}

    def left(self, title: str, share: float, done_here: float) -> tuple[float, float] | None:
        """Share of the run that is done, and the time left, s, when a bar is done to `share`, `done_here` of it in this run.

        What comes before it counts as done. The time is that of the plan, as much faster or slower as the run has been so far.
        """
        if title not in self._expected:
            return None
        titles = list(self._expected)
        rest = titles[titles.index(title) + 1 :]
        self._done[title] = done_here * self._expected[title]
        left = (1.0 - share) * self._expected[title] + sum(self._expected[other] for other in rest)
        done, whole = sum(self._done.values()), sum(self._expected.values())
        pace = (time.monotonic() - self._begun) / done if done > PLANNED * whole else 1.0
        return 1.0 - left / whole, pace * left


_PLAN: contextvars.ContextVar[_Plan | None] = contextvars.ContextVar("plan", default=None)


@contextlib.contextmanager
def planned(expected_s: Mapping[str, float]) -> Iterator[None]:
    """Inside, bars also say how far the whole run is, and when it ends.

    Args:
      expected_s: title of each bar, in order -> time that it is expected to take, s; only the ratios matter much.
    """
    token = _PLAN.set(_Plan(expected_s))
    try:
        yield
    finally:
        _PLAN.reset(token)


class Bar(tqdm.tqdm):
    """A progress bar with an ETA, to be used with `with`: on a terminal a bar, elsewhere a line from time to time.

    Of jax's processes the first has one. It is told as events, too.
    """

    def __init__(self, total: int, text: str, start: int = 0) -> None:
        """Begins.

        Args:
          total: number of steps; text: its title; start: number of steps done already.
        """
        self._terminal, self._plan = sys.stderr.isatty() and not events.as_json(), _PLAN.get()
        self._begun = self._said = time.monotonic()
        self._ended = False
        interval = TERMINAL_S if self._terminal else LINE_S
        # As wide as the terminal; a wider bar would leave a line at every update.
        super().__init__(
            total=total,
            initial=start,
            desc=text,
            dynamic_ncols=True,
            disable=not processes.is_first(),
            file=sys.stderr if self._terminal else io.StringIO(),
            mininterval=interval,
            maxinterval=4 * interval,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm shows, with the whole run beside the title."""
        found = super().format_dict
        if whole := self._whole():
            found["prefix"] = f"[whole run {whole[0]:.0%}, {self.format_interval(whole[1])} left] {self.desc}"
        return found

    def _whole(self):
        if self._plan is None or not self.total:
            return None
        return self._plan.left(self.desc, self.n / self.total, (self.n - self.initial) / self.total)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Shows where it is; called by tqdm."""
        if self._terminal:
            super().display(msg, pos)
        now = time.monotonic()
        # The end of a long one is always said, once.
        ended = self.n >= self.total and now - self._begun >= LINE_S and not self._ended
        if now - self._said < LINE_S and not ended:
            return
        self._said, self._ended = now, self.n >= self.total
        done, elapsed_s, whole = self.n - self.initial, now - self._begun, self._whole()
        left_s = elapsed_s * (self.total - self.n) / done if done else None
        values = {"title": self.desc, "done": self.n, "total": self.total, "elapsed_s": elapsed_s, "left_s": left_s}
        parts = [f"{self.desc}: {self.n} of {self.total}", f"{self.format_interval(elapsed_s)} so far"]
        parts += [f"{self.format_interval(left_s)} left"] if left_s is not None else []
        parts += [self.postfix] if self.postfix else []
        if whole:
            values |= {"whole_share": whole[0], "whole_left_s": whole[1]}
            parts.append(f"whole run {whole[0]:.0%}, {self.format_interval(whole[1])} left")
        events.say("progress", line := ", ".join(parts), **values)
        if not self._terminal and not events.as_json():
            print(line, file=sys.stderr, flush=True)


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
