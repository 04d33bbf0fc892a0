"""Checkpoints: training states within a stage and finished models between stages, by Orbax, with a JSON manifest."""

import pathlib
import shutil

import jax
from orbax.checkpoint import v1 as ocp

from experiments.patients import models


def save_state(folder, step, state, place=None, skipped=0):
    """Saves a training state and its place in the data as `folder`/step_N, whole or not at all. Older steps are removed.

    place: plain JSON values, of `batches.Batches.get_state`; None where the step alone says it; skipped: how many of the steps
    left the state as it was. Every one of jax's processes calls this.
    """
    folder = pathlib.Path(folder).resolve()
    beside = {"place": place, "skipped": skipped}
    ocp.save_pytree(folder / f"step_{step}", state, overwrite=True, custom_metadata=beside)
    if jax.process_index() == 0:
        for old in _steps(folder):
            if old < step:
                shutil.rmtree(folder / f"step_{old}")


def _steps(folder):
    names = [p.name for p in pathlib.Path(folder).glob("step_*") if p.name[5:].isdigit()]
    return sorted(int(name[5:]) for name in names)


def latest(folder):
    """Step of the latest state in `folder`, or None."""
    return max(_steps(folder), default=None)


def load_state(folder, like):
    """The latest (step, state, place, skipped) in `folder`, or None; the state is like `like` in shapes, types and shardings."""
    folder = pathlib.Path(folder).resolve()
    step = latest(folder)
    if step is None:
        return None
    path = folder / f"step_{step}"
    beside = ocp.metadata(path).custom_metadata or {}
    return (
        step,
        ocp.load_pytree(path, jax.tree.map(models.abstract, like)),
        beside.get("place"),
        beside.get("skipped", 0),
    )
