"""Checkpoints of training states, by Orbax, each with checksums. The one before the latest is kept, for when that is damaged."""

import pathlib
import shutil
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import processes
from experiments.patients import models
from radgs_jax import errors

KEPT = 2
"""Checkpoints that are kept. With one, a damaged checkpoint loses the run; a third would only help where two are damaged."""
REMEDY = "delete this folder, to train the stage from its start"
"""What helps where no checkpoint is left."""
SHOWN_CHARACTERS = 160
"""Maximum length of another library's message in a warning, so that it stays one line."""


def save_state(folder: pathlib.Path | str, step: int, state: Any, place: Any = None, skipped: int = 0) -> None:
    """Saves a training state atomically as `folder`/step_N, and removes others but the latest before it.

    All of jax's processes must call this.

    Args:
      step: number of steps taken.
      state: a pytree of arrays.
      place: plain JSON values that `set_state` of the batches takes; None where the step determines the place.
      skipped: number of the steps that were skipped.
    Raises:
      InputError: it cannot be written.
    """
    folder = pathlib.Path(folder).resolve()
    path, metadata = folder / f"step_{step}", {"place": place, "skipped": skipped}
    # It gets its name when its checksums are there: a checkpoint of a killed run is complete, or none.
    partial = folder / f".step_{step}.partial"
    if processes.is_first():
        _clear(folder, but=partial.name)
    try:
        with models.writing(path, "checkpoint"):
            ocp.save_pytree(partial, state, overwrite=True, custom_metadata=metadata)
    except errors.InputError:
        _clear(folder)
        raise
    with files.writing(path, "checkpoint"):
        if processes.is_first():
            for file in files.listed(partial):
                files.synchronise(file)
            checksums.seal(partial)
            steps = _steps(folder)
            # Later ones were damaged, or the run would have gone on from them.
            _remove(folder, [other for other in steps if other >= step])
            partial.rename(path)
            files.synchronise(folder)
            _remove(folder, [other for other in steps if other < step][: 1 - KEPT])


def _remove(folder, steps):
    """Removes states; one that a kill leaves half removed has no name that is read."""
    for step in steps:
        hidden = folder / f".step_{step}.partial_removed"
        shutil.rmtree(hidden, ignore_errors=True)
        (folder / f"step_{step}").rename(hidden)
        shutil.rmtree(hidden)


def _clear(folder, but=None):
    """Removes what killed runs have left, Orbax's own folders included."""
    for path in folder.glob(".step_*.partial*"):
        if path.name != but:
            shutil.rmtree(path, ignore_errors=True)


def _steps(folder):
    names = [p.name for p in pathlib.Path(folder).glob("step_*") if p.name[5:].isdigit()]
    return sorted(int(name[5:]) for name in names)


def latest(folder: pathlib.Path | str) -> int | None:
    """Step of the latest state in `folder`, whether it can be read or not; None without one."""
    return max(_steps(folder), default=None)


def load_state(folder: pathlib.Path | str, like: Any) -> tuple[int, Any, Any, int] | None:
    """The latest state in `folder` that is as it was written, as the arguments of `save_state`; None where there is no state.

    A damaged state is mentioned in a warning, and the one before it is taken.

    Args:
      like: a pytree of arrays with the state's shapes, types and shardings.
    Returns:
      (step, state, place, skipped).
    Raises:
      InputError: no state is left that is as it was written.
    """
    folder = pathlib.Path(folder).resolve()
    steps = _steps(folder)
    for step in reversed(steps):
        path = folder / f"step_{step}"
        try:
            checksums.verify(path, "an older or damaged checkpoint")
            metadata = ocp.metadata(path).custom_metadata or {}
            state = ocp.load_pytree(path, jax.tree.map(models.abstract, like))
            return step, state, metadata.get("place"), metadata.get("skipped", 0)
        except Exception as error:  # Orbax and its libraries raise many kinds
            text = str(error) if isinstance(error, errors.InputError) else f"{path}: {type(error).__name__}: {error}"
            logging.warning("%s; the checkpoint before it is taken", " ".join(text[:SHOWN_CHARACTERS].split()))
    if steps:
        found = f"none of {len(steps)} that is as it was written (step {', '.join(map(str, steps))})"
        errors.fail(folder, "checkpoints", found, f"one that is: {REMEDY}")
    return None
