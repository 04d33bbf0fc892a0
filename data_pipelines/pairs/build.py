"""Data on disk: phantom patients, stores of training pairs, and case files with simulated X-rays. Resumable, deterministic."""

import functools
import pathlib

import jax
from jax.experimental import multihost_utils

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.pairs import batches
from data_pipelines.pairs import examples
from data_pipelines.pairs import identity
from data_pipelines.pairs import pair_store

A_SHARD = 128
"""Most pairs in a shard, and four times the vertebrae in one: a loader holds the files of all shards open."""


def simulated_pairs(
    folder, vertebrae, count, seed, config, gaussian_count, ct_count=1, label_map=None, on_done=lambda records: None
):
    """`count` simulated pairs and `ct_count` CT pairs of every vertebra, made where they are not there yet.

    Args:
      folder: where such sets lie, each in a folder named by its content, so that none is ever taken for another.
      vertebrae: [(patient, ct path, mask path, label)]; seed: of everything random; config: `examples.PairConfig`.
      label_map: what numbers the masks hold, as `scans.read_scan`.
      on_done: called with the number of records that are there now, of 1 + count + ct_count a vertebra.
    Returns:
      a `batches.PairSet`.
    Raises:
      InputError: an unreadable scan, an absent or cut vertebra, or a damaged store.
    """
    names, places = _named(vertebrae, label_map)
    which = examples.OfEach(examples.Vertebrae(names, gaussian_count), int(count), config)
    # Whole vertebrae in a shard where they fit, so that a process prepares each once.
    shard_size = A_SHARD // which.count * which.count or A_SHARD
    return _pair_set(folder, which, seed, examples.simulated, ct_count, shard_size, identity.Archive(places), on_done)


def measured_pairs(
    folder, case_file, names, variant, config, gaussian_count, pixel_mm, ct_count=1, on_done=lambda records: None
):
    """One pair of each scene of known pose in `names`, made where they are not there yet.

    Args:
      folder, ct_count, on_done: as in `simulated_pairs`, of 1 + ct_count records a vertebra and one a scene.
      case_file: `cases.CaseFile`; names: of scenes; variant: which array of their X-ray files.
      config: `examples.PairConfig`; pixel_mm: what X-rays are binned to, at the isocentre.
    Returns:
      a `batches.PairSet`.
    Raises:
      InputError: unreadable files, a scene without a true pose, an absent or cut vertebra, or a damaged store.
    """
    chosen = [case_file.scenes[name] for name in names]
    volumes = [v for v in case_file.volumes.values() if any(scene.volume == v.name for scene in chosen)]
    vertebrae, places = _named([(v.patient, v.full_ct, v.full_mask, v.full_label) for v in volumes])
    archive = identity.Archive(places, {scene.name: (scene, cases.truth(case_file, scene)) for scene in chosen})
    # One volume after the other, so that each is prepared once.
    scenes = tuple(
        (scene.name, owner, files.sha256(scene.xrays))
        for owner, volume in enumerate(volumes)
        for scene in chosen
        if scene.volume == volume.name
    )
    which = examples.Measured(
        examples.Vertebrae(vertebrae, gaussian_count), files.sha256(case_file.path), scenes, variant, pixel_mm, config
    )
    return _pair_set(folder, which, 0, examples.measured, ct_count, A_SHARD, archive, on_done)


def _named(vertebrae, label_map=None):
    """((digest, label), ...) and the scans of a `identity.Archive`, of [(patient, ct path, mask path, label)]."""
    digests = {}
    for _, ct, mask, _ in vertebrae:
        if (ct, mask) not in digests:
            digests[ct, mask] = identity.scan_digest(ct, mask, label_map)
    names = tuple((digests[ct, mask], int(label)) for _, ct, mask, label in vertebrae)
    return names, {digests[ct, mask]: (patient, ct, mask, label_map) for patient, ct, mask, _ in vertebrae}


def _pair_set(folder, which, seed, make_pair, ct_count, shard_size, archive, on_done):
    """The `batches.PairSet` of `which`, a `examples.OfEach` or `examples.Measured`, in a folder below `folder`."""
    ct_pairs = examples.OfEach(which.vertebrae, int(ct_count), which.config)
    folder = pathlib.Path(folder) / identity.config_hash(which, ct_count, seed)
    shared = dict(context=archive, on_done=on_done)
    # The vertebrae first: one that is absent or cut is found before hours of simulation.
    count = len(which.vertebrae.names)
    vertebrae = _store(
        folder / "vertebrae", examples.vertebra, count, which.vertebrae, shard_size=A_SHARD // 4, **shared
    )
    moved = _store(
        folder / "ct_pairs", examples.moved, len(ct_pairs), ct_pairs, seed, shard_size=16 * A_SHARD, **shared
    )
    source = _store(folder / "pairs", make_pair, len(which), which, seed, shard_size=shard_size, **shared)
    return batches.PairSet(source, moved, vertebrae)


def _store(folder, make_example, count, config, seed=0, *, on_done, **rest):
    """`pair_store.write` by all of jax's processes together, on one file system."""
    write = functools.partial(
        pair_store.write, folder, make_example, count, config, seed, processes=_workers(count), **rest
    )
    if jax.process_count() > 1:
        write(process_index=jax.process_index(), process_count=jax.process_count(), on_done=on_done)
        multihost_utils.sync_global_devices(str(folder))
        return write()
    return write(on_done=on_done)


def _workers(count):
    """How many processes make `count` examples.

    One keeps 1.5 cores busy, since rendering is parallel in itself, and starting one takes as long as 60 pairs: one for
    two cores and 256 pairs. An accelerator that renders is not shared.
    """
    if jax.default_backend() != "cpu":
        return 1
    return max(1, min(pair_store.usable_cores() // 2, count // 256))
