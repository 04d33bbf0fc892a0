"""Training of vertebra localizers: on simulated X-rays of phantoms, and adapted to a patient."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
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

CHECKPOINT_SECONDS = 60.0
"""Minimum time between checkpoints, s, chosen by hand: work lost when stopped against time spent writing."""
CHAIN_WEIGHTS, CHAIN_LINKS = (0.25, 0.35, 0.5, 0.7, 1.0), (0.0, 2.0, 4.0)
"""Candidates for `Chain.weight` and `Chain.link`, chosen by hand; a finer grid takes longer, one evaluation per pair."""
LOG_FLOOR = 1e-9
"""Added to probabilities before their logarithm, so that an impossible truth costs about 21 instead of infinity."""


@dataclasses.dataclass(frozen=True)
class LocalizerTraining:
    """How a localizer is trained. The values were chosen by hand: training time against the scores in docs/data.md.

    Attributes:
      bodies: number of bodies that are simulated: phantoms, or postures of one patient.
      held_out: number of the last bodies, which fit the chain and are not trained on.
      count: number of acquisitions per body.
      steps: number of training steps.
      batch: number of crops per step.
      crop_px: side of a crop, pixels.
      turn_deg: maximum rotation of a crop, degrees.
      scale: maximum relative change of a crop's scale, which simulates patients of other sizes.
      learning_rate: peak of a cosine schedule.
      seed: of everything random.
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


GENERIC = LocalizerTraining()
"""For `--do=generic`: 15 minutes (docs/performance.md)."""
PATIENT = LocalizerTraining(bodies=24, held_out=2, turn_deg=3.0, scale=0.02, steps=1200)
"""For adapting to a patient: smaller changes of the crops, because the patient's size is known; ten minutes."""


def _objective(params, key, batch, config):
    images, valid, beam, centres, seen, known = batch
    prediction = network.Detector(config).apply(params, images, valid, beam)
    return network.loss(prediction, network.target(centres, seen, images.shape[1:]), known), {}


def train_localizer(
    pool: Mapping[str, np.ndarray],
    folder: pathlib.Path | str,
    config: network.DetectorConfig,
    train_config: LocalizerTraining,
    params: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains the network of a localizer, continuing from the last checkpoint in `folder`.

    Args:
      pool: X-rays, as `acquisitions.gather` returns them.
      folder: of checkpoints and logs.
      config: of the network.
      train_config: how it is trained.
      params: parameters to start from; None initialises them.
    Returns:
      the trained parameters.
    Raises:
      DivergedError: as `loop.run_steps`.
    """
    params = network.init(config, jax.random.key(train_config.seed)) if params is None else params
    return loop.train_network(
        pathlib.Path(folder) / "detector",
        pathlib.Path(folder),
        "detector",
        params,
        functools.partial(_objective, config=config),
        lambda rng, size: crops.batch_of(pool, config.levels, rng, train_config, size),
        batch=train_config.batch,
        steps=train_config.steps,
        learning_rate=train_config.learning_rate,
        seed=train_config.seed,
        checkpoint_seconds=CHECKPOINT_SECONDS,
    )


def fit_localizer_chain(
    params: dict[str, Any],
    config: network.DetectorConfig,
    pool: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray],
    train_config: LocalizerTraining,
    images: int = 48,
    prior: Chain | None = None,
) -> Chain:
    """Fits the chain of a localizer's levels.

    Spacings are measured in `pool`. Weight and link are those of the candidates that give the true cells and absences of crops of
    `held_out` the largest mean log-probability in the chain's marginals.

    Args:
      params, config: of the network.
      pool, held_out: X-rays that were, and were not, trained on, as `acquisitions.gather` returns them.
      train_config: how the network was trained, for the size of crops and the seed.
      images: number of crops.
      prior: chain whose spacings are used where no X-ray of `pool` shows two neighbouring levels.
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
    for weight in CHAIN_WEIGHTS:
        for link in CHAIN_LINKS:
            chain = Chain(spacing, spread, weight, link, trained)
            value = np.mean([_likelihood(prediction, truth, batch[5], chain, i, pixel_mm) for i in range(images)])
            if best is None or value > best[0]:
                best = value, chain
    return best[1]


def _likelihood(prediction, truth, known, chain, i, pixel_mm):
    lattice = Lattice(prediction.cells[i], prediction.absent[i], chain, network.STRIDE * pixel_mm)
    cells, absent, _ = lattice.marginals()
    labelled = known[i][chain.trained]
    score = (truth.cells[i][chain.trained] * np.log(cells + LOG_FLOOR)).sum((1, 2))
    score += truth.absent[i][chain.trained] * np.log(absent + LOG_FLOOR)
    return score[labelled].sum()


def make_generic_localizer(
    workdir: pathlib.Path | str,
    config: LocalizerTraining = GENERIC,
    network_config: network.DetectorConfig = network.DetectorConfig(),
) -> pathlib.Path:
    """Trains a localizer on phantoms; writes `workdir`/detector.npz and returns its path."""
    which = acquisitions.AcquisitionSet(None, config.bodies, config.count)
    start = locate.Localizer(None, network_config, None)
    return _make(workdir, which, identity.Archive({}), config, start, f"{config.bodies} phantoms")


def make_patient_localizer(
    workdir: pathlib.Path | str,
    ct: pathlib.Path | str,
    mask: pathlib.Path | str,
    base: locate.Localizer,
    config: LocalizerTraining = PATIENT,
    label_map: str | None = None,
) -> pathlib.Path:
    """Adapts a localizer to X-rays simulated from a patient's scan; writes `workdir`/detector.npz and returns its path.

    Args:
      ct, mask, label_map: as `scans.read_scan`; base: the localizer to start from.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra; nothing is written then.
    """
    digest = identity.scan_digest(ct, mask, label_map)
    archive = identity.Archive({digest: identity.FileScan(str(ct), ct, mask, label_map)})
    spine = archive.keep(acquisitions.patient_body, digest).spine
    start = dataclasses.replace(base, centres_ct=dict(zip(spine.labels, spine.centres)))
    which = acquisitions.AcquisitionSet(digest, config.bodies, config.count)
    return _make(workdir, which, archive, config, start, "one patient")


def patient_recipe(path: pathlib.Path | str, config: LocalizerTraining = PATIENT) -> str:
    """Digest of everything but the scan that an adapted localizer depends on.

    Args:
      path: file of the localizer to start from; config: how it is adapted.
    """
    return identity.config_hash(
        files.sha256(path), config, acquisitions.AcquisitionSet(None, config.bodies, config.count)
    )


def _make(workdir, which, archive, config, start, note):
    """Trains from the localizer `start`, whose parameters may be None, on the acquisitions `which`, and writes the result."""
    folder = pathlib.Path(workdir) / "detector"
    with progress.Bar(len(which), "X-rays") as bar:
        source = acquisitions.simulated_views(folder / "views", which, config.seed, archive, bar.update)
    cut = len(which) - config.held_out * config.count
    pool, held_out = (acquisitions.gather(source[i] for i in part) for part in (range(cut), range(cut, len(which))))
    # The folder is named by everything the state depends on, so a changed input starts anew.
    leaves = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(start.params))
    name = identity.config_hash(config, start.config, source.digest(), hashlib.sha256(leaves).hexdigest())
    params = train_localizer(pool, folder / "state" / name, start.config, config, start.params)
    chain = fit_localizer_chain(params, start.config, pool, held_out, config, prior=start.chain)
    path = folder.with_name("detector.npz")
    localizer_files.write_localizer(path, dataclasses.replace(start, params=params, chain=chain), note)
    return path
