"""Stores of examples on disk: array_record shards with a manifest, written once and read in any order.

An example is a dict of numeric arrays and a function of (config, seed, index) alone; all examples of a store have the same
names, types and shapes. A store therefore holds the same records whatever number of processes made it and however often it was
interrupted.

A store is a folder with `manifest.json` and shards of records (`codec`). A shard gets its name when it is complete. The manifest
holds checksums of the shards and of itself; each record has one as well, which is checked whenever the record is read.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Callable

import numpy as np
from absl import logging
from array_record.python import array_record_data_source
from array_record.python import array_record_module

from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.io import workers
from data_pipelines.pairs import codec
from data_pipelines.pairs.identity import content_hash
from data_pipelines.pairs.identity import plain_values
from radgs_jax import errors

FORMAT = "radgs-pair-store/1"
MANIFEST = "manifest.json"
LIBRARIES = ("radgs_jax", "numpy", "scipy", "jax", "jaxlib", "array_record")
"""Libraries whose versions a manifest records, where installed: examples are equal to the last bit only if these are."""
WRITER = "group_size:1,zstd:1"
"""Options of array_record: one record per chunk, so that a random access decompresses one record. Each chunk has checksums."""
REMEDY = "copy the store again, or delete this file and run the same command again: it goes on"
"""What helps where a shard was damaged."""
REMAKE = "copy the store again, or delete its folder and run the same command again"
"""What helps where a manifest was damaged."""

Maker = Callable[..., codec.Arrays]
"""make_example(config, seed, index) or make_example(config, seed, index, context), see `write`."""


def named(name: str, *aliases: str) -> Callable[[Maker], Maker]:
    """A decorator that names a maker of examples in manifests, independently of the module that it is defined in.

    Args:
      name: such as 'pairs.simulated/1'; its number is raised when the maker's examples change.
      aliases: names in older manifests.
    """

    def mark(make_example):
        make_example.store_name, make_example.store_aliases = name, aliases
        return make_example

    return mark


def write(
    folder: pathlib.Path | str,
    make_example: Maker,
    count: int,
    config: object,
    seed: int | list[int] = 0,
    processes: int | None = None,
    shard_size: int = 128,
    process_index: int = 0,
    process_count: int = 1,
    on_done: Callable[[int], object] = lambda records: None,
    context: object = None,
) -> "Source | None":
    """Makes the shards that are missing, and completes the manifest when all exist.

    Args:
      folder: of the store; created if missing.
      make_example: a `named` function of a module, which worker processes import. It returns a dict of numeric arrays that
        depends on its arguments alone. Within a shard it is called with increasing indices, so that it may cache what
        neighbouring examples share.
      count: number of examples.
      config: a frozen dataclass or a dict of plain values.
      processes: number of processes on this host; None for all cores.
      shard_size: number of examples per shard.
      process_index, process_count: this host and the number of hosts that share the file system; each makes every
        process_count-th shard.
      on_done: called with the number of examples of each of this host's shards, when it exists.
      context: fourth argument of make_example, if not None. The store's content must not depend on it; it may say where the
        files are that `config` names by their digests. It is sent to the workers with each shard.

    Returns:
      The opened store, or None while shards of other hosts are missing.

    Raises:
      InputError: the folder holds another store, one begun with other library versions, or shards without a manifest; another
        process writes it; or it cannot be written.
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
    stray = next(folder.glob("*.array_record"), None)  # before the manifest, which other hosts write first
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
        files.write_json(manifest, checksums.sealed({**plan, "arrays": None, "shards": None}))
    jobs = _jobs(folder, count, shard_size)
    more = () if context is None else (context,)
    make = functools.partial(_make_shard, make_example=make_example, config=config, seed=seed, more=more)
    own = jobs[process_index::process_count]
    # Hosts that share the work have locks of their own, and whoever finds all shards there needs none.
    lock = folder / f"{locks.LOCK}-{process_index}-of-{process_count}"
    writes = any(not path.exists() for path, _, _ in own)
    with locks.hold(lock, folder) if writes else contextlib.nullcontext():
        for (_, first, last), _ in _run(make, own, processes):
            on_done(last - first)
    if all(path.exists() for path, _, _ in jobs):
        entries = [entry for _, entry in _run(_describe, jobs, processes)]
        for entry in entries:
            if entry["arrays"] != entries[0]["arrays"]:
                raise ValueError(f"{entry['file']}: arrays {entry['arrays']}, elsewhere {entries[0]['arrays']}")
        arrays = entries[0]["arrays"]
        shards = [{key: entry[key] for key in ("file", "records", "bytes", "sha256")} for entry in entries]
        files.write_json(manifest, checksums.sealed({**plan, "arrays": arrays, "shards": shards}))
        return open(folder)
    return None


def usable_cores() -> int:
    """Number of cores that this process may use, or of all cores where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open(folder: pathlib.Path | str) -> "Source":
    """Opens a finished store.

    Raises:
      InputError: no store, an unfinished one, a damaged manifest, a shard that is missing or cut short, or, in a store of an
        older version, one that differs from what was written.
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
    source = Source(folder, manifest)
    if checksums.FIELD not in manifest:
        logging.warning("%s: no checksum of the manifest, as in older versions; all shards are checked", folder)
        verify(source)
    return source


def verify(source: "Source") -> None:
    """Reads a whole store and compares it with the digests in the manifest, for example after it was copied.

    Raises:
      InputError: a shard that differs from what was written.
    """
    for shard in source.manifest["shards"]:
        found = files.sha256(source.folder / shard["file"])
        if found != shard["sha256"]:
            errors.fail(source.folder / shard["file"], "sha256", found, shard["sha256"])


class Source:
    """A finished store as a random-access sequence of examples, which `grain.MapDataset.source` accepts.

    Attributes:
      folder: of the store.
      manifest: content of its manifest.
      arrays: {name: {"dtype", "shape"}} of each example.
    """

    def __init__(self, folder: pathlib.Path, manifest: dict) -> None:
        self.folder, self.manifest, self.arrays = folder, manifest, manifest["arrays"]
        self._codec = codec.Codec(self.arrays)
        # With a range in the name, the library need not open all files at once.
        self._records = array_record_data_source.ArrayRecordDataSource(
            [f"{folder / shard['file']}[0:{shard['records']}]" for shard in manifest["shards"]]
        )

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The example `index`, whose arrays are read-only.

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
            errors.fail(self.folder / shard, f"example {index}", error, f"an intact record: {REMEDY}")

    def __repr__(self) -> str:
        return f"Source({str(self.folder)!r})"

    def digest(self) -> str:
        """Digest of the store's content."""
        digests = [shard["sha256"] for shard in self.manifest["shards"]]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


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
    with workers.pool(processes) as pool:
        yield from zip(jobs, pool.map(task, jobs))


def _make_shard(job, make_example, config, seed, more):
    """Writes one shard unless it exists."""
    path, first, last = job
    if path.exists() and _count(path) == last - first:
        return
    first_codec = None
    with files.replacing(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER)
        try:
            for index in range(first, last):
                example = make_example(config, seed, index, *more)
                own = codec.Codec.of(example)
                first_codec = first_codec or own
                if own.arrays != first_codec.arrays:
                    raise ValueError(f"example {index}: arrays {own.arrays}, before it {first_codec.arrays}")
                with _as_os_errors():
                    writer.write(first_codec.encode(example))
        finally:
            with _as_os_errors():
                writer.close()


@contextlib.contextmanager
def _as_os_errors():
    """The library reports a full disk as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(None, str(error)) from error


def _count(path):
    """Number of records of a shard; None where it is damaged."""
    try:
        return _reader(path).num_records()
    except (RuntimeError, ValueError, IndexError) as error:
        logging.warning("%s: made again: %s", path, " ".join(str(error).split()))
        return None


def _describe(job):
    """A shard's entry in the manifest, and the arrays of its first record."""
    path, first, last = job
    try:
        record = _reader(path).read([0])[0]
    except (RuntimeError, ValueError, IndexError) as error:
        errors.fail(path, "content", error, f"intact records: {REMEDY}")
    return {
        "file": path.name,
        "records": last - first,
        "bytes": path.stat().st_size,
        "sha256": files.sha256(path),
        "arrays": codec.Codec.of_record(record).arrays,
    }


def _reader(path):
    return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


def _same_plan(path, found, plan):
    """Refuses to continue a store whose manifest differs from the plan."""
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
    """Reads a manifest and checks everything that later code relies on."""
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
    if checksums.FIELD in manifest:  # stores of older versions have none
        checksums.check_sealed(path, manifest, REMAKE)
    return manifest


def _check_shards(path, manifest):
    """Checks the entries of shards and arrays of a finished store."""
    wanted = _jobs(pathlib.Path(), manifest["count"], manifest["shard_size"])
    shards = manifest["shards"]
    if not isinstance(shards, list) or len(shards) != len(wanted):
        errors.fail(path, "shards", len(shards) if isinstance(shards, list) else shards, f"a list of {len(wanted)}")
    for number, (shard, (name, first, last)) in enumerate(zip(shards, wanted)):
        # The format fixes the names, so a manifest cannot refer to files outside its folder.
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
