"""Batches for training, and the three stores that they come from."""

import dataclasses
import functools

import jax
import numpy as np

from data_pipelines.pairs import examples
from data_pipelines.pairs import pair_store
from radgs_jax import gaussians
from radgs_jax.training.batches import CtBatch
from radgs_jax.training.batches import PairBatch


class Batches(pair_store.Loader):
    """Endless batches in numpy, this process's part of each, as `pair_store.Loader` deals them out."""

    def __init__(self, source, clouds, seed, batch):
        """source: of pairs or of CT pairs; clouds: their vertebrae's Gaussians (vertebrae, N)."""
        super().__init__(source, seed, batch, jax.process_index(), jax.process_count())
        self._clouds = clouds

    def __next__(self):
        """A `batches.PairBatch` or a `batches.CtBatch`."""
        values = super().__next__()
        cloud = jax.tree.map(lambda a: a[values["owner"]], self._clouds)
        if "motion" in values:
            return CtBatch(values["motion"], cloud)
        types = {name: np.float32 if name in examples.IMAGES else values[name].dtype for name in examples.ARRAYS}
        arrays = {name: values[name].astype(dtype) for name, dtype in types.items()}
        return PairBatch(**arrays, cloud=cloud)


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs on disk: `pair_store.Source`s of the pairs, of the CT pairs, and of the vertebrae that both show."""

    source: pair_store.Source
    moved: pair_store.Source
    vertebrae: pair_store.Source

    def __len__(self):
        return len(self.source)

    @functools.cached_property
    def clouds(self):
        """The vertebrae's Gaussians (vertebrae, N), box frame."""
        records = [self.vertebrae[index] for index in range(len(self.vertebrae))]
        return gaussians.Gaussians(**{name: np.stack([record[name] for record in records]) for name in examples.CLOUD})

    def batches(self, seed, batch, module="rec"):
        """`Batches` of `batch` pairs over all processes, of CT pairs for the module stage 'reg'; close them when done.

        Args:
          seed: of the shuffles; module: 'rec', 'reg' or 'joint'.
        Raises:
          ValueError: a batch that does not divide by jax's processes.
        """
        return Batches(self.moved if module == "reg" else self.source, self.clouds, seed, batch)

    def mean_shapes(self):
        """Mean density by VerSe label, and under key 0 that of all: {label: MEAN_SHAPE array}, 1/mm, vertebra's frame."""
        by_label = {}
        for index in range(len(self.vertebrae)):
            record = self.vertebrae[index]
            for key in (int(record["label"]), 0):
                by_label.setdefault(key, []).append(record["shape"].astype(np.float32))
        return {label: np.mean(shapes, 0).astype(np.float16) for label, shapes in by_label.items()}
