"""Batches of pairs for training, and the three stores that they are read from."""

import dataclasses
import functools

import jax
import numpy as np

from data_pipelines.pairs import examples
from data_pipelines.pairs import loader
from data_pipelines.pairs import pair_store
from radgs_jax import gaussians
from radgs_jax.training.batches import CtBatch
from radgs_jax.training.batches import PairBatch


class Batches(loader.Loader):
    """Endless batches of numpy arrays: this process's share of each, joined with the Gaussians of its vertebrae."""

    def __init__(self, source: pair_store.Source, clouds: gaussians.Gaussians, seed: int, batch: int) -> None:
        """Starts the reading threads.

        Args:
          source: pairs or CT pairs.
          clouds: Gaussians of their vertebrae, (vertebrae, N).
          seed, batch: as in `loader.Loader`.
        """
        super().__init__(source, seed, batch, jax.process_index(), jax.process_count())
        self._clouds = clouds

    def __next__(self) -> PairBatch | CtBatch:
        """The next batch, of the kind of the store's examples."""
        values = super().__next__()
        cloud = jax.tree.map(lambda a: a[values["owner"]], self._clouds)
        if "motion" in values:
            return CtBatch(values["motion"], cloud)
        return PairBatch(**{name: values[name] for name in examples.ARRAYS}, cloud=cloud)


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs on disk.

    Attributes:
      source: the pairs.
      moved: the CT pairs.
      vertebrae: the vertebrae that both show, by the pairs' `owner`.
    """

    source: pair_store.Source
    moved: pair_store.Source
    vertebrae: pair_store.Source

    def __len__(self) -> int:
        return len(self.source)

    @functools.cached_property
    def clouds(self) -> gaussians.Gaussians:
        """Gaussians of the vertebrae, (vertebrae, N), box frame."""
        records = [self.vertebrae[index] for index in range(len(self.vertebrae))]
        return gaussians.Gaussians(**{name: np.stack([record[name] for record in records]) for name in examples.CLOUD})

    def batches(self, seed: int, batch: int, phase: str = "rec") -> Batches:
        """Endless batches, to be closed after use.

        Args:
          seed: of the shuffles.
          batch: number of pairs per step over all processes.
          phase: of training; 'reg' takes CT pairs, 'rec' and 'joint' take pairs.

        Raises:
          ValueError: a batch that does not divide by the number of jax's processes.
        """
        return Batches(self.moved if phase == "reg" else self.source, self.clouds, seed, batch)

    def mean_shapes(self) -> dict[int, np.ndarray]:
        """Mean density of the vertebrae by VerSe number, and of all of them under 0: MEAN_SHAPE, 1/mm, box frame, float16."""
        by_label = {}
        for index in range(len(self.vertebrae)):
            record = self.vertebrae[index]
            for key in (int(record["label"]), 0):
                by_label.setdefault(key, []).append(record["shape"].astype(np.float32))
        return {label: np.mean(shapes, 0).astype(np.float16) for label, shapes in by_label.items()}
