"""A program that trains `tiny.config` with one vertebra, and prints a line of JSON for what happens.

Lines: ["resumed", step] at the start of a phase that goes on, and [stage, step, loss, norm of the gradient].
"""

import dataclasses
import json

import jax
import tiny
from absl import flags

from experiments import train
from experiments.runtime import cli
from experiments.runtime import cluster
from experiments.runtime import progress
from experiments.training import checkpoint
from experiments.training import loop


class _Log(progress.Log):
    """Scalars as lines."""

    def __init__(self, folder, name):
        super().__init__(folder, name)
        self._name = name

    def scalars(self, step, values):
        _say(self._name, step, float(values["loss"]), float(values["gradient_norm"]))


def _say(*values):
    if jax.process_index() == 0:
        print(json.dumps(values), flush=True)


def _define():
    cluster.define()
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("stage", "full", "As in train.")
    flags.DEFINE_integer("steps", 3, "Of P1's first phase.")
    flags.DEFINE_integer("log_steps", 1, "Steps between lines, and between checkpoints.")
    flags.DEFINE_float("rate", 1e-5, "Learning rate.")


def _main():
    given = flags.FLAGS
    few = dataclasses.replace(tiny.config().p1, learning_rate=given.rate)
    first = dataclasses.replace(few, steps=(given.steps, *few.steps[1:]))
    config = tiny.config(batch=4, labels=(21,), patient_labels=(21,), p1=first, p2=few, p3=few)
    load_state = checkpoint.load_state

    def loading(folder, like):
        found = load_state(folder, like)
        if found:
            _say("resumed", found[0])
        return found

    loop.checkpoint.load_state, loop.LOG_STEPS, progress.Log = loading, given.log_steps, _Log
    with cluster.joined():
        train.train(config, given.workdir, given.stage)


if __name__ == "__main__":
    cli.run(_main, _define)
