"""Simulated X-rays that localizers are trained, calibrated and scored on."""

import dataclasses
import pathlib

import jax
import numpy as np

from data_pipelines import simulation
from data_pipelines.ct import scans
from data_pipelines.pairs import identity
from data_pipelines.pairs import pair_store
from data_pipelines.phantom import generate
from data_pipelines.simulation.acquisition import LABELS
from experiments.runtime import progress

ARRAYS = ("clean", "measured", "valid", "intrinsics", "camera_from_world", "centroids", "in_sight")
GEOMETRY = simulation.Geometry(window=160, binning=8)
"""Wider than a training crop, so that crops can be anywhere in it."""
HELD_OUT = 1_000_000
"""What seeds of held-out acquisitions are above those of training, which has fewer bodies."""
BODIES_A_SHARD = 6
"""Of a patient: a process reads the scan again for each shard. A phantom is a shard of its own."""


@dataclasses.dataclass(frozen=True)
class AcquisitionSet:
    """Which acquisitions: `count` of each of `bodies`, one body after the other.

    scan: digest of one patient's scan, who is every body; None: bodies are phantoms `spine` of seeds that count up.
    """

    scan: str | None
    bodies: int
    count: int
    geometry: simulation.Geometry = GEOMETRY
    preset: simulation.Preset = simulation.Preset()
    spine: generate.PhantomConfig = generate.PhantomConfig()

    def __len__(self):
        return self.bodies * self.count


def phantom_body(archive, seed, config):
    made = generate.make_phantom(seed, config)
    return simulation.ArticulatedBody(scans.Scan(f"phantom{seed}", made.hu.astype(np.float32), made.mask, made.affine))


def patient_body(archive, digest):
    return simulation.ArticulatedBody(identity.scan(archive, digest))


@pair_store.named("localizers.acquisition/1", "experiments.detectors.acquisition")
def acquisition(which, seed, index, archive):
    """Acquisition `index` of `Views`, a function of (which, seed, index) and of what the scan holds.

    Its target, which the cameras aim at, is any of the body's vertebrae.

    Args:
      archive: `identity.Archive`.
    Returns:
      dict of clean, measured (V, S, S) float16, line integrals; valid (V, S, S) bool; intrinsics (V, 4);
      camera_from_world (V, 4, 4); centroids (V, 29, 2) pixels; in_sight (V, 29) bool; known (29,) bool, labels whose truth
      is told; target, its label; world_from_box (4, 4), its pose.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra.
    """
    number, own = divmod(index, which.count)
    if which.scan is None:
        body, stream = archive.keep(phantom_body, seed + number, which.spine), [seed + number, own]
    else:
        body, stream = archive.keep(patient_body, which.scan), [seed, number, own]
    rng = np.random.default_rng(stream)
    target = int(rng.choice(body.spine.labels))
    sample = simulation.simulate(body, target, rng, which.preset, which.geometry)
    images = {"clean": sample.rest + sample.excess, "measured": sample.measured}
    return {
        **{name: np.clip(image, -30.0, 60.0).astype(np.float16) for name, image in images.items()},
        **{name: getattr(sample, name) for name in ARRAYS[2:]},
        "known": np.isin(np.arange(LABELS), body.spine.labels),
        "target": np.int32(target),
        "world_from_box": sample.world_from_box,
    }


def simulated_views(folder, which, seed, archive, on_done=lambda acquisitions: None):
    """The `pair_store.Source` of `Views`, made where it is not there yet.

    Args:
      folder: where such stores lie, each in a folder named by its content; seed: of everything random.
      archive: `identity.Archive` that knows where the scan lies.
      on_done: called with the number of acquisitions of every shard that is there.
    Raises:
      InputError: as `acquisition`; a damaged store.
    """
    # One process for two cores, since rendering is parallel in itself; an accelerator that renders is not shared.
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


def gather(acquisitions):
    """One pool of the X-rays of all acquisitions: dict of `ARRAYS` (N, ...) and `known` (N, 29)."""
    acquisitions = list(acquisitions)
    pool = {name: np.concatenate([a[name] for a in acquisitions]) for name in ARRAYS}
    return {**pool, "known": np.concatenate([np.tile(a["known"], (len(a["valid"]), 1)) for a in acquisitions])}


def held_out_views(workdir, config, bodies, ct=None, mask=None, label_map=None):
    """Acquisitions that no training with `config` has seen: of other phantoms, or of one scan in other postures.

    Returns:
      `pair_store.Source` of `config.count` acquisitions of each of `bodies`, kept in `workdir`.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra.
    """
    digest, places = None, {}
    if ct is not None:
        digest = identity.scan_digest(ct, mask, label_map)
        places[digest] = (str(ct), ct, mask, label_map)
    which = AcquisitionSet(digest, bodies, config.count)
    with progress.bar(len(which), "X-rays") as bar:
        folder = pathlib.Path(workdir) / "detector" / "held_out"
        return simulated_views(folder, which, config.seed + HELD_OUT, identity.Archive(places), bar.update)
