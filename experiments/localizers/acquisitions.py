"""Simulated X-rays that localizers are trained, calibrated and scored on."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines import simulation
from data_pipelines.pairs import identity
from data_pipelines.pairs import pair_store
from data_pipelines.phantom import generate
from data_pipelines.simulation import phantom_bodies
from data_pipelines.simulation.acquisition import LABELS
from experiments.runtime import progress

if typing.TYPE_CHECKING:
    from experiments.localizers.training import LocalizerTraining

ARRAYS = ("clean", "measured", "valid", "intrinsics", "camera_from_world", "centroids", "in_sight")
GEOMETRY = simulation.Geometry(window=160, binning=8)
"""Simulated panel: 160 pixels of 8 binned ones, wider than a training crop of 128, so that crops vary in place. Chosen by hand: a
smaller window varies less, a larger one takes longer to simulate."""
HELD_OUT = 1_000_000
"""Added to the seed for held-out acquisitions; larger than any number of bodies, so that none is trained on."""
BODIES_A_SHARD = 6
"""Number of a patient's bodies per shard. Every shard reads the scan again, so half of it reads twice as often; twice of it gives
processes fewer shards to share. Chosen by hand. A phantom is a shard of its own."""


@dataclasses.dataclass(frozen=True)
class AcquisitionSet:
    """Which acquisitions to simulate, one body after the other. Its hash names the store, so no field may be renamed.

    Attributes:
      scan: digest of the patient's scan, of whom every body is one posture; None for phantoms with consecutive seeds.
      bodies: number of bodies.
      count: number of acquisitions per body.
      geometry, preset: of the simulation.
      spine: of the phantoms.
    """

    scan: str | None
    bodies: int
    count: int
    geometry: simulation.Geometry = GEOMETRY
    preset: simulation.Preset = simulation.Preset()
    spine: generate.PhantomConfig = generate.PhantomConfig()

    def __len__(self) -> int:
        return self.bodies * self.count


def patient_body(archive: identity.Archive, digest: str) -> simulation.ArticulatedBody:
    """The body of the patient whose scan has that digest.

    Raises:
      InputError: an unreadable scan, or one without a complete vertebra.
    """
    return simulation.ArticulatedBody(identity.scan(archive, digest))


@pair_store.named("localizers.acquisition/1", "experiments.detectors.acquisition")
def acquisition(which: AcquisitionSet, seed: int, index: int, archive: identity.Archive) -> dict[str, np.ndarray]:
    """Acquisition `index` of a set, a function of (which, seed, index) and the scan's content.

    The cameras aim at the target, which is drawn from the body's vertebrae.

    Args:
      archive: knows where the scan is.
    Returns:
      a dict with
        clean, measured: (V, S, S) float16, line integrals.
        valid: (V, S, S) bool.
        intrinsics: (V, 4); camera_from_world: (V, 4, 4).
        centroids: (V, 29, 2), pixels, by VerSe number; in_sight: (V, 29) bool.
        known: (29,) bool, whether the true place of a label is known.
        target: label of the target; world_from_box: (4, 4), its pose, mm.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra.
    """
    number, own = divmod(index, which.count)
    if which.scan is None:
        body, stream = archive.keep(phantom_bodies.phantom_body, seed + number, which.spine), [seed + number, own]
    else:
        body, stream = archive.keep(patient_body, which.scan), [seed, number, own]
    rng = np.random.default_rng(stream)
    target = int(rng.choice(body.spine.labels))
    sample = simulation.simulate(body, target, rng, which.preset, which.geometry)
    images = {"clean": sample.rest + sample.excess, "measured": sample.measured}
    return {
        **{name: phantom_bodies.stored(image) for name, image in images.items()},
        **{name: getattr(sample, name) for name in ARRAYS[2:]},
        "known": np.isin(np.arange(LABELS), body.spine.labels),
        "target": np.int32(target),
        "world_from_box": sample.world_from_box,
    }


def simulated_views(
    folder: pathlib.Path | str,
    which: AcquisitionSet,
    seed: int,
    archive: identity.Archive,
    on_done: Callable[[int], Any] = lambda acquisitions: None,
) -> pair_store.Source:
    """The acquisitions of a set, simulated where they are not there yet.

    Args:
      folder: of all stores, each in a folder named by its content.
      seed: of everything random.
      archive: knows where the scan is.
      on_done: called with the number of acquisitions in every finished shard.
    Raises:
      InputError: as `acquisition`; a damaged store.
    """
    # Rendering on a CPU uses several cores, so one process per two cores; an accelerator is not shared.
    processes = pair_store.usable_cores() // 2 if jax.default_backend() == "cpu" else 1
    return pair_store.write(
        pathlib.Path(folder) / identity.config_hash(which, seed),
        acquisition,
        len(which),
        which,
        seed,
        processes=max(1, processes),
        shard_size=which.count * (1 if which.scan is None else BODIES_A_SHARD),
        context=archive,
        on_done=on_done,
    )


def gather(acquisitions: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Pools the X-rays of acquisitions: a dict of `ARRAYS`, (N, ...), and known, (N, 29)."""
    acquisitions = list(acquisitions)
    pool = {name: np.concatenate([a[name] for a in acquisitions]) for name in ARRAYS}
    return {**pool, "known": np.concatenate([np.tile(a["known"], (len(a["valid"]), 1)) for a in acquisitions])}


def held_out_views(
    workdir: pathlib.Path | str,
    config: LocalizerTraining,
    bodies: int,
    ct: pathlib.Path | str | None = None,
    mask: pathlib.Path | str | None = None,
    label_map: str | None = None,
) -> pair_store.Source:
    """Acquisitions that no training with `config` has seen: of other phantoms, or of one scan in other postures.

    Args:
      workdir: where they are kept.
      config: of the training; its `count` is the number of acquisitions per body.
      bodies: number of bodies.
      ct, mask, label_map: as `scans.read_scan`; None for phantoms.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra.
    """
    digest, places = None, {}
    if ct is not None:
        digest = identity.scan_digest(ct, mask, label_map)
        places[digest] = identity.FileScan(str(ct), ct, mask, label_map)
    which = AcquisitionSet(digest, bodies, config.count)
    with progress.Bar(len(which), "X-rays") as bar:
        folder = pathlib.Path(workdir) / "detector" / "held_out"
        return simulated_views(folder, which, config.seed + HELD_OUT, identity.Archive(places), bar.update)
