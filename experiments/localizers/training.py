"""Vertebra detectors: made on simulated X-rays, adapted to a patient, kept as one file, and used on calibrated X-rays."""

import dataclasses
import functools
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.io import files
from data_pipelines.pairs import identity
from experiments.localizers import acquisitions
from experiments.localizers import crops
from experiments.localizers import localizer_files
from experiments.runtime import progress
from experiments.training import loop
from radgs_jax.localization import locate
from radgs_jax.localization import network
from radgs_jax.localization.chain import Chain
from radgs_jax.localization.chain import fit_spacing
from radgs_jax.localization.chain import Lattice
from radgs_jax.training import sharding
from radgs_jax.training import update

CHECKPOINT_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Acquisitions simulated (as `Views`; those of the last `held_out` bodies calibrate the chain), and `steps` of `batch`
    crops of `crop_px` at a cosine `learning_rate`; seed: of all of it.

    Crops are turned by up to `turn_deg` and scaled by up to the share `scale`, which makes patients of other sizes.
    """

    bodies: int = 36
    held_out: int = 4
    count: int = 12
    steps: int = 1000
    batch: int = 16
    crop_px: int = 128
    turn_deg: float = 6.0
    scale: float = 0.1
    learning_rate: float = 2e-3
    seed: int = 20000


GENERIC = TrainConfig()
PATIENT = TrainConfig(bodies=24, held_out=2, turn_deg=3.0, scale=0.02, steps=1200)


def _objective(params, key, batch, config):
    images, valid, beam, centres, seen, known = batch
    prediction = network.Detector(config).apply(params["detector"], images, valid, beam)
    return network.loss(prediction, network.target(centres, seen, images.shape[1:]), known), {}


def train(pool, folder, config, train_config, params=None):
    """Trains a detector on a pool, going on from the last checkpoint in `folder`; returns its parameters.

    Args:
      params: what to start from; None: fresh parameters.
    """
    mesh = sharding.make_mesh()
    size = -(-train_config.batch // mesh.size) * mesh.size
    key = jax.random.key(train_config.seed)
    params = network.init(config, key) if params is None else params
    state = update.state_of({"detector": jax.tree.map(jnp.array, params)}, ("detector",))
    state = loop.loop(
        pathlib.Path(folder) / "detector",
        pathlib.Path(folder),
        mesh,
        sharding.replicate(state, mesh),
        update.update_of(mesh, functools.partial(_objective, config=config), ("detector",)),
        crops.Crops(pool, config.levels, train_config, size),
        key=key,
        rate=lambda step: update.cosine(step, train_config.steps, train_config.learning_rate),
        steps=train_config.steps,
        checkpoint_seconds=CHECKPOINT_SECONDS,
    )
    return jax.device_get(state["params"]["detector"])


def calibrate(params, config, pool, held_out, train_config, images=48, prior=None):
    """The `chain.Chain` of a detector: spacings from `pool`, weight and link that suit crops of `held_out` best.

    The best gives the true cells and absences the largest log-probability in the chain's marginals.

    Args:
      prior: the chain whose spacings stand where no neighbouring levels of `pool` are in sight together.
    """
    levels, pixel_mm = list(config.levels), config.pixel_mm
    known = pool["known"][:, levels]
    trained = known.any(0)
    seen = pool["in_sight"][:, levels] & known
    if prior is not None and not (seen[:, 1:] & seen[:, :-1]).any():
        spacing, spread = prior.spacing_mm, prior.spread_mm
    else:
        spacing, spread = fit_spacing(pool["centroids"][:, levels], seen, pixel_mm)
    batch = crops.batch_of(held_out, levels, np.random.default_rng(train_config.seed), train_config, images)
    prediction = jax.device_get(locate.predict(params, config, *batch[:3]))
    truth = jax.device_get(network.target(*batch[3:5], batch[0].shape[1:]))
    best = None
    for weight in (0.25, 0.35, 0.5, 0.7, 1.0):
        for link in (0.0, 2.0, 4.0):
            chain = Chain(spacing, spread, weight, link, trained)
            value = np.mean([_likelihood(prediction, truth, batch[5], chain, i, pixel_mm) for i in range(images)])
            if best is None or value > best[0]:
                best = value, chain
    return best[1]


def _likelihood(prediction, truth, known, chain, i, pixel_mm):
    lattice = Lattice(prediction.cells[i], prediction.absent[i], chain, network.STRIDE * pixel_mm)
    cells, absent, _ = lattice.marginals()
    told = known[i][chain.trained]
    score = (truth.cells[i][chain.trained] * np.log(cells + 1e-9)).sum((1, 2))
    score += truth.absent[i][chain.trained] * np.log(absent + 1e-9)
    return score[told].sum()


def make_generic(workdir, config=GENERIC, detector_config=network.DetectorConfig()):
    """Trains a detector on phantoms; writes `workdir`/detector.npz and returns its path."""
    which, start = (
        acquisitions.AcquisitionSet(None, config.bodies, config.count),
        locate.Localizer(None, detector_config, None),
    )
    return _make(workdir, which, identity.Archive({}), config, start, f"{config.bodies} phantoms")


def make_patient(workdir, ct, mask, base, config=PATIENT, label_map=None):
    """Adapts a detector to X-rays simulated from a patient's scan; writes `workdir`/detector.npz and returns its path.

    Args:
      ct, mask, label_map: as `scans.read_scan`; base: the `Model` to start from.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra; nothing is written then.
    """
    digest = identity.scan_digest(ct, mask, label_map)
    archive = identity.Archive({digest: (str(ct), ct, mask, label_map)})
    spine = archive.keep(acquisitions.patient_body, digest).spine
    start = dataclasses.replace(base, centres_ct=dict(zip(spine.labels, spine.centres)))
    which = acquisitions.AcquisitionSet(digest, config.bodies, config.count)
    return _make(workdir, which, archive, config, start, "one patient")


def patient_recipe(path, config=PATIENT):
    """Digest of what a patient's detector is made of besides the scan: the detector in file `path`, and how it is adapted."""
    return identity.config_hash(
        files.sha256(path), config, acquisitions.AcquisitionSet(None, config.bodies, config.count)
    )


def _make(workdir, which, archive, config, start, note):
    """Trains from the `Model` `start`, whose parameters may be None, on `Views`, and writes what comes of it."""
    folder = pathlib.Path(workdir) / "detector"
    with progress.bar(len(which), "X-rays") as bar:
        source = acquisitions.simulated_views(folder / "views", which, config.seed, archive, bar.update)
    cut = len(which) - config.held_out * config.count
    pool, held_out = (acquisitions.gather(source[i] for i in part) for part in (range(cut), range(cut, len(which))))
    # A state is gone on with only where all is the same that it was made from.
    leaves = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(start.params))
    name = identity.config_hash(config, start.config, source.identity(), hashlib.sha256(leaves).hexdigest())
    params = train(pool, folder / "state" / name, start.config, config, start.params)
    chain = calibrate(params, start.config, pool, held_out, config, prior=start.chain)
    path = folder.with_name("detector.npz")
    localizer_files.save(path, dataclasses.replace(start, params=params, chain=chain), note)
    return path
