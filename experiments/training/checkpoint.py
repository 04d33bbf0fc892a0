"""Checkpoints of training states, by Orbax."""

import pathlib
import shutil
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from experiments.patients import models


def save_state(folder: pathlib.Path | str, step: int, state: Any, place: Any = None, skipped: int = 0) -> None:
    """Saves a training state atomically as `folder`/step_N, and removes older ones. All of jax's processes must call this.

    Args:
      step: number of steps taken.
      state: a pytree of arrays.
      place: plain JSON values that `set_state` of the batches takes; None where the step determines the place.
      skipped: number of the steps that were skipped.
    """
    folder = pathlib.Path(folder).resolve()
    metadata = {"place": place, "skipped": skipped}
    ocp.save_pytree(folder / f"step_{step}", state, overwrite=True, custom_metadata=metadata)
    if jax.process_index() == 0:
        for old in _steps(folder):
            if old < step:
                shutil.rmtree(folder / f"step_{old}")


def _steps(folder):
    names = [p.name for p in pathlib.Path(folder).glob("step_*") if p.name[5:].isdigit()]
    return sorted(int(name[5:]) for name in names)


def latest(folder: pathlib.Path | str) -> int | None:
    """Step of the latest state in `folder`; None without one."""
    return max(_steps(folder), default=None)


def load_state(folder: pathlib.Path | str, like: Any) -> tuple[int, Any, Any, int] | None:
    """The latest state in `folder` as the arguments of `save_state`; None without one.

    Args:
      like: a pytree of arrays with the state's shapes, types and shardings.
    Returns:
      (step, state, place, skipped).
    """
    folder = pathlib.Path(folder).resolve()
    step = latest(folder)
    if step is None:
        return None
    path = folder / f"step_{step}"
    metadata = ocp.metadata(path).custom_metadata or {}
    return (
        step,
        ocp.load_pytree(path, jax.tree.map(models.abstract, like)),
        metadata.get("place"),
        metadata.get("skipped", 0),
    )
