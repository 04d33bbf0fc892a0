"""Batches of a pair store for training: shuffled, endless, read ahead by threads, and with a position that can be saved."""

import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping

import numpy as np

from data_pipelines.pairs import pair_store
from radgs_jax import errors

STATE_FORMAT = "radgs-loader/1"
BUFFERED_BATCHES = 4
"""Number of batches read ahead of the training step; chosen by hand. Half may starve a step after a slow read, twice takes
twice the memory."""


class Loader:
    """An iterator of endless batches whose position can be saved and restored.

    The batch of a step is a function of (store, seed, batch, step): each epoch is a new shuffle of all examples, epochs follow
    one another without a gap, and process p of P holds the p-th of P equal parts of the batch. P may change at a restart.
    """

    def __init__(
        self,
        source: pair_store.Source,
        seed: int,
        batch: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 2,
    ) -> None:
        """Starts the reading threads.

        Args:
          seed: of the shuffles.
          batch: number of examples per step over all processes.
          process_index, process_count: this process and the number of processes, as jax counts them.
          workers: number of reading threads.

        Raises:
          ValueError: a batch that does not divide by the number of processes.
        """
        import grain  # takes a second to import, which only training needs

        if batch < 1 or batch % process_count:
            raise ValueError(f"batch {batch} does not divide by {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        self._stream = {"format": STATE_FORMAT, "store": source.digest(), "seed": int(seed), "batch": int(batch)}
        self.batch = batch // process_count
        # Grain adds 1 to a shuffle's seed in each epoch. Seeds are mixed first, so that neighbouring ones share no epochs.
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        own = slice(process_index * self.batch, (process_index + 1) * self.batch)

        def read(indices: np.ndarray) -> dict[str, np.ndarray]:
            examples = [source[int(index)] for index in indices[own]]
            return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

        self._iterator = iter(
            grain.MapDataset.range(len(source))
            .shuffle(seed=mixed)
            .repeat()
            .batch(batch, drop_remainder=True)
            .map(read)
            .to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=BUFFERED_BATCHES))
        )

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Arrays (batch / process_count, ...) of the store's types, by name."""
        return next(self._iterator)

    def get_state(self) -> dict:
        """The position in the stream as plain JSON values, for a checkpoint."""
        return {**self._stream, "step": int(self._iterator.get_state()["next_index"])}

    def set_state(self, state: dict) -> None:
        """Goes to a position from `get_state` of this loader or of one with another number of processes.

        Raises:
          InputError: a state of another store, seed or batch, or not a state at all.
        """
        wanted = {**self._stream, "step": 0}
        if not isinstance(state, dict) or set(state) != set(wanted):
            errors.fail("loader state", "content", state, f"the keys {sorted(wanted)}")
        for key, value in self._stream.items():
            if state[key] != value:
                errors.fail("loader state", key, state[key], value)
        if type(state["step"]) is not int or state["step"] < 0:
            errors.fail("loader state", "step", state["step"], "a whole number from 0 up")
        self._iterator.set_state({"next_index": state["step"]})

    def close(self) -> None:
        """Ends the threads."""
        self._iterator.close()


def throughput(
    batches: Iterator[Mapping[str, np.ndarray]], steps: int, step: Callable[[Mapping], object] = lambda batch: None
) -> dict[str, float]:
    """Measures how fast batches come, and whether a training step waits for them.

    Args:
      steps: number of batches to take, after one that starts the threads.
      step: called with each batch; the training step, to see whether the loader starves it.

    Returns:
      examples_per_s, and waiting_share, the share of the time spent in waiting for a batch.
    """
    examples, waited = 0, 0.0
    step(next(batches))
    start = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        examples += len(next(iter(batch.values())))
        step(batch)
    seconds = time.perf_counter() - start
    return {"examples_per_s": examples / seconds, "waiting_share": waited / seconds}
