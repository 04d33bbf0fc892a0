"""Parameters of the systems of Table 1: trained once, kept in the workdir, with what they cost."""

import hashlib
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax

from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.io import parameter_files
from data_pipelines.pairs.batches import PairSet
from experiments import configs
from experiments.comparison.subjects import Cost
from experiments.training import loop
from radgs_jax.models import backbones
from radgs_jax.training import sharding
from radgs_jax.training.update import state_of

FORMAT = "radgs-baseline/1"
DIGEST_CHARACTERS = 8
"""Length of the digest in a file's name: 32 bits, for the few sizes that a person tries."""


def with_cost(path: pathlib.Path, resumed: bool, make: Callable[[], Any]) -> Any:
    """What `make` makes, parameters; what it cost is kept at `path`. resumed: whether it goes on where it was stopped."""
    began = time.process_time()
    params = jax.block_until_ready(make())
    spent = None if resumed else time.process_time() - began
    files.write_json(path, {"cpu_s": spent, "parameters": backbones.count_parameters(params)})
    return params


def kept_cost(path: pathlib.Path) -> Cost:
    """What is kept by `with_cost`."""
    kept = files.read_json(path)
    return Cost(math.nan if kept["cpu_s"] is None else kept["cpu_s"], kept["parameters"])


def kept_params(path: pathlib.Path, init: Callable[[], Any], make: Callable[[], Any]) -> tuple[Any, Cost]:
    """Parameters in a file, which `make` makes where it is not there, and their cost; `init` gives their names and shapes."""
    cost = path.with_suffix(".json")
    # What all of a scan's vertebrae share may be asked for by several processes at once: one makes it, the others wait.
    with locks.hold(files.make_folder(path.parent) / f".{path.stem}.lock", path, wait=True):
        if not path.exists():
            params = with_cost(cost, path.with_suffix("").exists(), make)
            parameter_files.write(path, {"format": FORMAT}, parameter_files.flat(params))
    return flax.traverse_util.unflatten_dict(parameter_files.read(path, init), sep="."), kept_cost(cost)


def place(folder: pathlib.Path, name: str, size: object, seed: int) -> pathlib.Path:
    """The file of a system's parameters, by a digest of all that they depend on besides a patient: `size` and the seed."""
    mark = hashlib.sha256(repr((size, seed)).encode()).hexdigest()[:DIGEST_CHARACTERS]
    return folder / "baselines" / f"{name}_{mark}.npz"


def trained_params(
    path: pathlib.Path,
    init: Callable[[], Any],
    update: Callable[[jax.sharding.Mesh], Callable[..., Any]],
    tree: str,
    pairs: Callable[[], PairSet],
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    config: configs.Config,
) -> tuple[Any, Cost]:
    """Parameters of a network that is trained on pairs, kept at `path`; training goes on where it was stopped.

    Args:
      init: makes {tree: parameters}; update: makes the training step of a mesh, as `update.update_of`.
      pairs: makes what it is trained on; called where the parameters are not there.
      steps, batch, rate: their number, pairs in each, and the peak of the learning rate; config: how often to save.
    Raises:
      DivergedError: as `loop.run_steps`.
    """

    def make():
        mesh = sharding.make_mesh()
        state = sharding.made(mesh, lambda: state_of(init(), (tree,)))
        folder = path.with_suffix("")
        found = loop.scheduled(
            folder / "checkpoints",
            folder,
            mesh,
            state,
            update(mesh),
            pairs().batches(seed, batch),
            seed=seed,
            learning_rate=rate,
            steps=steps,
            checkpoint_seconds=config.checkpoint_seconds,
        )
        return sharding.gathered(found["params"], mesh)

    return kept_params(path, init, make)
