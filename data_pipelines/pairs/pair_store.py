"""Examples on disk: array_record shards with a manifest, made once, read at random by grain.

An example is a dict of numeric arrays, a function of (config, seed, index) alone, and all examples of a store have the
same names, types and shapes. So a store holds the same records however many processes made it and however often it was
interrupted, and a batch is a function of (seed, step) alone, however many processes read it.

A store is a folder: `manifest.json` and its shards. A shard appears under its name once it is whole, never before.

A record is `RGPR`, the header's length as uint32, a JSON header {name: [type, shape]} filled up with spaces, then the
arrays in the header's order, little-endian, in C order, each at a multiple of 16 bytes from the record's start.
"""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import platform
import time

import numpy as np
from array_record.python import array_record_data_source
from array_record.python import array_record_module

from data_pipelines.io import files
from data_pipelines.pairs.identity import content_hash
from data_pipelines.pairs.identity import plain_values
from radgs_jax import errors

FORMAT = "radgs-pair-store/1"
STATE_FORMAT = "radgs-loader/1"
MANIFEST = "manifest.json"
LIBRARIES = ("radgs_jax", "numpy", "scipy", "jax", "jaxlib", "array_record")
"""Whose versions a manifest names, where installed: examples are the same bit for bit only where these are."""
WRITER = "group_size:1,zstd:1"
"""One record a chunk, as random access wants it; every chunk carries its own checksums."""
ALIGN = 16
MAGIC = b"RGPR"
BUFFERED_BATCHES = 4
"""Batches made ahead of the training step."""


class Codec:
    """Turns examples of one kind into records and back.

    arrays: {name: {"dtype": numpy's name such as "<f2", "shape": [...]}}; size: bytes of a record.
    """

    def __init__(self, arrays):
        self.arrays = {name: arrays[name] for name in sorted(arrays)}
        header = json.dumps(
            {n: [a["dtype"], a["shape"]] for n, a in self.arrays.items()}, separators=(",", ":")
        ).encode()
        header += b" " * (-(len(header) + 8) % ALIGN)
        self.prefix = MAGIC + len(header).to_bytes(4, "little") + header
        self._fields, position = [], len(self.prefix)
        for name, array in self.arrays.items():
            dtype, shape = np.dtype(array["dtype"]), tuple(array["shape"])
            self._fields.append((name, dtype, shape, position))
            position += dtype.itemsize * math.prod(shape)
            position += -position % ALIGN
        self.size = position

    @classmethod
    def of(cls, example):
        """The codec of an example.

        Raises:
          ValueError: no arrays, or one that does not hold plain numbers.
        """
        arrays = {}
        for name, value in example.items():
            value = np.asarray(value)
            if value.dtype.kind not in "biuf":
                raise ValueError(f"array '{name}': found type {value.dtype}, wanted booleans, integers or floats")
            arrays[name] = {"dtype": value.dtype.newbyteorder("<").str, "shape": list(value.shape)}
        if not arrays:
            raise ValueError("an example without arrays")
        return cls(arrays)

    @classmethod
    def of_record(cls, record):
        """The codec that the header of a record, as `encode` makes it, describes.

        Raises:
          ValueError: a header that is not JSON.
        """
        length = int.from_bytes(record[len(MAGIC) : len(MAGIC) + 4], "little")
        header = json.loads(record[len(MAGIC) + 4 : len(MAGIC) + 4 + length])
        return cls({name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in header.items()})

    def encode(self, example):
        """The record of an example that has this codec's names, types and shapes; numpy casts and broadcasts what differs.

        Raises:
          KeyError, ValueError: an array that is missing, or of a shape that does not broadcast.
        """
        record = bytearray(self.size)
        record[: len(self.prefix)] = self.prefix
        for name, dtype, shape, position in self._fields:
            np.frombuffer(record, dtype, math.prod(shape), position).reshape(shape)[...] = example[name]
        return bytes(record)

    def decode(self, record):
        """The arrays of a record: read-only views of its bytes.

        Raises:
          ValueError: a record of another kind.
        """
        if len(record) != self.size or not record.startswith(self.prefix):
            raise ValueError(f"{len(record)} bytes that start with {record[:48]!r}")
        return {
            name: np.frombuffer(record, dtype, math.prod(shape), position).reshape(shape)
            for name, dtype, shape, position in self._fields
        }


def named(name, *aliases):
    """A decorator that gives a maker of examples the name that manifests know it by, which stays when code moves.

    Args:
      name: such as 'examples.simulated/1'; a new number says that other examples are made.
      aliases: what manifests written before called it.
    """

    def mark(make_example):
        make_example.store_name, make_example.store_aliases = name, aliases
        return make_example

    return mark


def write(
    folder,
    make_example,
    count,
    config,
    seed=0,
    processes=None,
    shard_size=128,
    process_index=0,
    process_count=1,
    on_done=lambda records: None,
    context=None,
):
    """Makes the shards that are not there yet, and the manifest once all are.

    Args:
      folder: the store's; made if need be.
      make_example: make_example(config, seed, index) -> dict of numeric arrays, a function of its arguments alone, `named`, and
        of a module, since other processes import it. Within a shard indices come in order: what neighbours share may be kept.
      count: how many examples; config: a frozen dataclass or a dict of plain values; seed: an integer or a list of them.
      processes: how many work here, all cores if None; shard_size: examples a file.
      process_index, process_count: for several hosts with one file system: this one makes every process_count-th shard.
      on_done: called with the number of examples of every shard of this host's share that is there.
      context: what else make_example takes, as its fourth argument, where the store's content does not depend on it: where
        the files lie that `config` names by their digests, say. It is sent to every worker with every shard.
    Returns:
      the opened `Source`; None while shards of other hosts are missing.
    Raises:
      InputError: the folder holds another store, one begun with other library versions, or shards without a manifest.
      ValueError: examples of different kinds.
    """
    folder = pathlib.Path(folder)
    plan = {
        "format": FORMAT,
        "example": make_example.store_name,
        "config": plain_values(config),
        "config_hash": content_hash(config, FORMAT),
        "seed": plain_values(seed),
        "count": int(count),
        "shard_size": int(shard_size),
        "versions": _versions(),
    }
    manifest = folder / MANIFEST
    stray = next(folder.glob("*.array_record"), None)  # looked for first: another host writes the manifest, then shards
    if manifest.exists():
        found = _read_manifest(manifest)
        if found["example"] in make_example.store_aliases:
            found = {**found, "example": plan["example"]}
        _same_plan(manifest, found, plan)
        if found["shards"] is not None:
            on_done(count)
            return open(folder)
    else:
        if stray:
            errors.fail(stray, "manifest", "none beside it", "an empty folder")
        files.write_json(manifest, {**plan, "arrays": None, "shards": None})
    jobs = _jobs(folder, count, shard_size)
    more = () if context is None else (context,)
    make = functools.partial(_make_shard, make_example=make_example, config=config, seed=seed, more=more)
    for (_, first, last), _ in _run(make, jobs[process_index::process_count], processes):
        on_done(last - first)
    if all(path.exists() for path, _, _ in jobs):
        entries = [entry for _, entry in _run(_describe, jobs, processes)]
        for entry in entries:
            if entry["arrays"] != entries[0]["arrays"]:
                raise ValueError(f"{entry['file']}: arrays {entry['arrays']}, elsewhere {entries[0]['arrays']}")
        arrays = entries[0]["arrays"]
        shards = [{key: entry[key] for key in ("file", "records", "bytes", "sha256")} for entry in entries]
        files.write_json(manifest, {**plan, "arrays": arrays, "shards": shards})
        for leftover in folder.glob(".*.array_record"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        return open(folder)
    return None


def usable_cores():
    """Cores that this process may use; of all the machine's where the system cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open(folder):
    """The `Source` of a finished store.

    Raises:
      InputError: no store, an unfinished one, a damaged manifest, a shard that is missing or cut short.
    """
    folder = pathlib.Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    if manifest["shards"] is None:
        there = sum(path.exists() for path, _, _ in _jobs(folder, manifest["count"], manifest["shard_size"]))
        wanted = f"all {-(-manifest['count'] // manifest['shard_size'])} (run the same command again: it goes on)"
        errors.fail(folder / MANIFEST, "shards", f"{there} finished", wanted)
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            errors.fail(path, "size", "no file" if size is None else f"{size} bytes", f"{shard['bytes']} bytes")
    return Source(folder, manifest)


def verify(source):
    """Reads every byte of a store and compares it with the manifest's digests, after a copy from elsewhere say.

    Raises:
      InputError: a shard that is not what was written.
    """
    for shard in source.manifest["shards"]:
        found = files.sha256(source.folder / shard["file"])
        if found != shard["sha256"]:
            errors.fail(source.folder / shard["file"], "sha256", found, shard["sha256"])


class Source:
    """A finished store as a random-access sequence of examples, as `grain.MapDataset.source` takes it.

    folder, manifest: where it lies, what it says; arrays: {name: {"dtype", "shape"}} of every example.
    """

    def __init__(self, folder, manifest):
        self.folder, self.manifest, self.arrays = folder, manifest, manifest["arrays"]
        self._codec = Codec(self.arrays)
        # A range in the name spares the library from opening every file at once.
        self._records = array_record_data_source.ArrayRecordDataSource(
            [f"{folder / shard['file']}[0:{shard['records']}]" for shard in manifest["shards"]]
        )

    def __len__(self):
        return self.manifest["count"]

    def __getitem__(self, index):
        """The example `index` as a dict of read-only arrays.

        Raises:
          IndexError: an index outside [0, len).
          InputError: a damaged record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        try:
            return self._codec.decode(self._records[index])
        except (RuntimeError, ValueError, IndexError) as error:
            shard = self.manifest["shards"][index // self.manifest["shard_size"]]["file"]
            errors.fail(self.folder / shard, f"example {index}", error, "an intact record")

    def __repr__(self):
        return f"Source({str(self.folder)!r})"

    def identity(self):
        """What tells this store from others, for states that must not be used with another one."""
        digests = [shard["sha256"] for shard in self.manifest["shards"]]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


class Loader:
    """Endless batches of a store, made ahead by threads: an iterator whose place can be saved and restored.

    The batch of a step is a function of (store, seed, batch, step): every epoch is a new shuffle of all examples, epochs
    follow one another without a gap, and process p of P holds every P-th example of the batch. P may change at a restart.
    """

    def __init__(self, source, seed, batch, process_index=0, process_count=1, workers=2):
        import grain  # a second to import, and needed for training only

        if batch < 1 or batch % process_count:
            raise ValueError(f"batch {batch} does not divide by {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        self._identity = {"format": STATE_FORMAT, "store": source.identity(), "seed": int(seed), "batch": int(batch)}
        self.batch = batch // process_count
        # Grain counts a shuffle's seed up by one each epoch: mixed first, neighbouring seeds do not share epochs.
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._iterator = iter(
            grain.MapDataset.source(source)
            .shuffle(seed=mixed)
            .repeat()[process_index::process_count]
            .batch(self.batch, drop_remainder=True)
            .to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=BUFFERED_BATCHES))
        )

    def __iter__(self):
        return self

    def __next__(self):
        """Dict of arrays (batch / process_count, ...) of the store's types."""
        return next(self._iterator)

    def get_state(self):
        """The place in the stream as plain JSON values: what to keep in a checkpoint."""
        return {**self._identity, "step": int(self._iterator.get_state()["next_index"])}

    def set_state(self, state):
        """Goes to a place from `get_state`, of this loader or of one with another process count.

        Raises:
          InputError: a state of another store, seed or batch, or not a state at all.
        """
        wanted = {**self._identity, "step": 0}
        if not isinstance(state, dict) or set(state) != set(wanted):
            errors.fail("loader state", "content", state, f"the keys {sorted(wanted)}")
        for key, value in self._identity.items():
            if state[key] != value:
                errors.fail("loader state", key, state[key], value)
        if type(state["step"]) is not int or state["step"] < 0:
            errors.fail("loader state", "step", state["step"], "a whole number from 0 up")
        self._iterator.set_state({"next_index": state["step"]})

    def close(self):
        """Ends the threads."""
        self._iterator.close()


def loader(source, seed, batch, process_index=0, process_count=1, workers=2):
    """Endless training batches of a store.

    Args:
      source: what `open` gave; seed: of the shuffles; batch: examples a step over all processes.
      process_index, process_count: which part of every batch is wanted here, as jax.process_index() and
        jax.process_count() say.
      workers: reading threads.
    Returns:
      a `Loader`.
    Raises:
      ValueError: a batch that does not divide by the processes.
    """
    return Loader(source, seed, batch, process_index, process_count, workers)


def measure(batches, steps, step=lambda batch: None):
    """How fast batches come, and whether a training step waits for them.

    Args:
      batches: an iterator of dicts of arrays; steps: how many to take, after one that starts the threads.
      step: what is done with each batch; the training step, to see whether the loader starves it.
    Returns:
      {"examples_per_s", "waiting_share"}: with everything counted, and the part of the time spent in waiting for a batch.
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


def _versions():
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _jobs(folder, count, shard_size):
    """[(path, first index, index past the last)] of every shard."""
    starts = range(0, count, shard_size)
    return [
        (folder / f"examples-{number:05d}-of-{len(starts):05d}.array_record", first, min(first + shard_size, count))
        for number, first in enumerate(starts)
    ]


def _run(task, jobs, processes):
    """Yields (job, result) in the order of the jobs, from this process or from spawned ones."""
    processes = min(len(jobs), processes or usable_cores())
    if processes <= 1:
        for job in jobs:
            yield job, task(job)
        return
    # Spawned, not forked: the parent may hold jax's threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            yield from zip(jobs, pool.map(task, jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make_shard(job, make_example, config, seed, more):
    path, first, last = job
    if path.exists() and _reader(path).num_records() == last - first:
        return
    codec = None
    with files.replacing(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER)
        try:
            for index in range(first, last):
                example = make_example(config, seed, index, *more)
                codec = codec or Codec.of(example)
                if Codec.of(example).arrays != codec.arrays:
                    raise ValueError(f"example {index}: arrays {Codec.of(example).arrays}, before it {codec.arrays}")
                writer.write(codec.encode(example))
        finally:
            writer.close()


def _describe(job):
    path, first, last = job
    return {
        "file": path.name,
        "records": last - first,
        "bytes": path.stat().st_size,
        "sha256": files.sha256(path),
        "arrays": Codec.of_record(_reader(path).read([0])[0]).arrays,
    }


def _reader(path):
    return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


def _same_plan(path, found, plan):
    """Refuses to go on with a store that would not become what `plan` says."""
    hint = "the store is another one: name another folder, or delete this one"
    for key, value in plan.items():
        if key == "versions" and found["shards"] is not None:
            continue
        if found[key] == value:
            continue
        if isinstance(value, dict) and isinstance(found[key], dict):
            names = sorted(set(value) | set(found[key]))
            inner = next(n for n in names if found[key].get(n) != value.get(n))
            errors.fail(path, f"{key}.{inner}", found[key].get(inner), f"{value.get(inner)} ({hint})")
        errors.fail(path, key, found[key], f"{value} ({hint})")


def _read_manifest(path):
    """The manifest, checked as far as later code relies on it."""
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        errors.fail(path, "format", found, repr(FORMAT))
    for key in ("example", "config", "config_hash", "seed", "versions", "arrays", "shards"):
        if key not in manifest:
            errors.fail(path, key, "nothing", "a value")
    for key in ("count", "shard_size"):
        if type(manifest.get(key)) is not int or manifest[key] < 1:
            errors.fail(path, key, manifest.get(key), "a whole number from 1 up")
    if manifest["shards"] is not None:
        _check_shards(path, manifest)
    return manifest


def _check_shards(path, manifest):
    wanted = _jobs(pathlib.Path(), manifest["count"], manifest["shard_size"])
    shards = manifest["shards"]
    if not isinstance(shards, list) or len(shards) != len(wanted):
        errors.fail(path, "shards", len(shards) if isinstance(shards, list) else shards, f"a list of {len(wanted)}")
    for number, (shard, (name, first, last)) in enumerate(zip(shards, wanted)):
        # The name is fixed by the format, so a manifest cannot point outside its folder.
        fixed = {"file": str(name), "records": last - first}
        if not isinstance(shard, dict) or any(shard.get(key) != value for key, value in fixed.items()):
            errors.fail(path, f"shards[{number}]", shard, fixed)
        if type(shard.get("bytes")) is not int or not isinstance(shard.get("sha256"), str):
            errors.fail(path, f"shards[{number}]", shard, "bytes and sha256 beside file and records")
    arrays = manifest["arrays"]
    if not isinstance(arrays, dict) or not arrays:
        errors.fail(path, "arrays", arrays, "names with dtype and shape")
    for name, array in arrays.items():
        try:
            plain = np.dtype(array["dtype"]).kind in "biuf" and all(type(n) is int and n >= 0 for n in array["shape"])
        except (TypeError, KeyError, ValueError):
            plain = False
        if not plain:
            errors.fail(path, f"arrays.{name}", array, "a numeric dtype and a shape")
