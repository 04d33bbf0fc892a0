"""Builds sets of training pairs on disk: resumable, and the same bytes on any number of processes."""

import functools
import pathlib
from collections.abc import Callable
from collections.abc import Sequence

import jax

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.io import processes
from data_pipelines.pairs import batches
from data_pipelines.pairs import examples
from data_pipelines.pairs import identity
from data_pipelines.pairs import pair_store

SHARD_SIZE = 128
"""Largest number of pairs in a shard; shards of vertebrae hold a quarter of it and shards of CT pairs, which are small, 16 times
it. Chosen by hand: half of it doubles the files that a loader keeps open, twice it doubles what an interruption loses."""
PAIRS_A_WORKER = 256
"""Fewest examples for which another process is started. Starting one takes as long as making 60 pairs: a fifth of its time;
at half of the value it is a third, and at twice the value small sets leave cores idle."""
CORES_A_WORKER = 2
"""Cores per process. A process keeps about 1.5 cores busy, since rendering is itself parallel."""

OnDone = Callable[[int], object]
Vertebra = tuple[identity.ScanSource, int]
"""(scan, VerSe number)."""


def simulated_pairs(
    folder: pathlib.Path | str,
    vertebrae: Sequence[Vertebra],
    count: int,
    seed: int,
    config: examples.PairConfig,
    gaussian_count: int,
    ct_count: int = 1,
    on_done: OnDone = lambda records: None,
) -> batches.PairSet:
    """Simulates pairs and CT pairs of vertebrae, as far as they do not exist.

    Args:
      folder: of all sets; each lies in a folder named by its content.
      vertebrae: scan and VerSe number of each.
      count, ct_count: number of pairs and of CT pairs of each vertebra.
      seed: of everything random.
      gaussian_count: number of Gaussians of each vertebra.
      on_done: called with a number of records when they exist; each vertebra has 1 + count + ct_count records.

    Raises:
      InputError: an unreadable scan, an absent or cut vertebra, or a damaged store.
    """
    names, places = _by_digest(vertebrae)
    which = examples.OfEach(examples.Vertebrae(names, gaussian_count), int(count), config)
    # A shard holds all pairs of a vertebra where they fit, so that each vertebra is prepared by one process.
    shard_size = SHARD_SIZE // which.count * which.count or SHARD_SIZE
    return _pair_set(folder, which, seed, examples.simulated, ct_count, shard_size, identity.Archive(places), on_done)


def measured_pairs(
    folder: pathlib.Path | str,
    case_file: cases.CaseFile,
    names: Sequence[str],
    variant: str,
    config: examples.PairConfig,
    gaussian_count: int,
    pixel_mm: float,
    ct_count: int = 1,
    on_done: OnDone = lambda records: None,
) -> batches.PairSet:
    """Makes one pair of each scene, whose true poses are known, and CT pairs of their vertebrae, as far as they do not exist.

    Args:
      folder, config, gaussian_count, ct_count: as in `simulated_pairs`.
      names: of the scenes.
      variant: array of the X-ray files.
      pixel_mm: pixel size that X-rays are binned to, at the isocentre.
      on_done: called with a number of records when they exist; each vertebra has 1 + ct_count records, each scene one.

    Raises:
      InputError: unreadable files, a scene without a true pose, an absent or cut vertebra, or a damaged store.
    """
    chosen = [case_file.scenes[name] for name in names]
    volumes = [v for v in case_file.volumes.values() if any(scene.volume == v.name for scene in chosen)]
    vertebrae, places = _by_digest(
        [(identity.FileScan(v.patient, v.full_ct, v.full_mask), v.full_label) for v in volumes]
    )
    archive = identity.Archive(places, {scene.name: (scene, cases.truth(case_file, scene)) for scene in chosen})
    # Scenes are ordered by volume, so that each volume is prepared once.
    scenes = tuple(
        (scene.name, owner, files.sha256(scene.xrays))
        for owner, volume in enumerate(volumes)
        for scene in chosen
        if scene.volume == volume.name
    )
    which = examples.Measured(
        examples.Vertebrae(vertebrae, gaussian_count), files.sha256(case_file.path), scenes, variant, pixel_mm, config
    )
    return _pair_set(folder, which, 0, examples.measured, ct_count, SHARD_SIZE, archive, on_done)


def _by_digest(vertebrae):
    """The names ((digest, label), ...) of vertebrae, and the scans of an `identity.Archive`."""
    digests = {scan: scan.digest() for scan in dict.fromkeys(scan for scan, _ in vertebrae)}
    names = tuple((digests[scan], int(label)) for scan, label in vertebrae)
    return names, {digest: scan for scan, digest in digests.items()}


def _pair_set(folder, which, seed, make_pair, ct_count, shard_size, archive, on_done):
    """The set of `which`, an `examples.OfEach` or `examples.Measured`, in a folder of its own below `folder`."""
    ct_pairs = examples.OfEach(which.vertebrae, int(ct_count), which.config)
    folder = pathlib.Path(folder) / identity.config_hash(which, ct_count, seed)
    shared = dict(context=archive, on_done=on_done)
    # Vertebrae come first, so that an absent or cut one is reported before hours of simulation.
    count = len(which.vertebrae.names)
    vertebrae = _store(
        folder / "vertebrae", examples.vertebra_record, count, which.vertebrae, shard_size=SHARD_SIZE // 4, **shared
    )
    moved = _store(
        folder / "ct_pairs", examples.moved, len(ct_pairs), ct_pairs, seed, shard_size=16 * SHARD_SIZE, **shared
    )
    source = _store(folder / "pairs", make_pair, len(which), which, seed, shard_size=shard_size, **shared)
    return batches.PairSet(source, moved, vertebrae)


def _store(folder, make_example, count, config, seed=0, *, on_done, **rest):
    """`pair_store.write`, shared by all of jax's processes on one file system."""
    write = functools.partial(
        pair_store.write, folder, make_example, count, config, seed, processes=_workers(count), **rest
    )
    if processes.several():
        write(process_index=jax.process_index(), process_count=jax.process_count(), on_done=on_done)
        processes.wait_for_all(str(folder))
        return write()
    return write(on_done=on_done)


def _workers(count):
    """Number of processes that make `count` examples; one where an accelerator renders, since they would have to share it."""
    if jax.default_backend() != "cpu":
        return 1
    return max(1, min(pair_store.usable_cores() // CORES_A_WORKER, count // PAIRS_A_WORKER))
