"""The reconstructing systems of Table 1: from X-rays and a start pose to densities."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from data_pipelines.pairs import build
from data_pipelines.pairs import identity
from data_pipelines.phantom import scan_files
from experiments import data_stages
from experiments.comparison import registering
from experiments.comparison import training
from experiments.comparison.subjects import Answer
from experiments.comparison.subjects import Cost
from experiments.comparison.subjects import Densities
from experiments.comparison.subjects import Given
from experiments.comparison.subjects import Sizes
from experiments.comparison.subjects import Subject
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from kernels.common.types import Array
from radgs_jax.baselines import box
from radgs_jax.baselines import gr_car
from radgs_jax.geometry import resample
from radgs_jax.models import trained
from radgs_jax.registration import pipeline
from radgs_jax.registration import reconstruct

PREDICTOR_BATCH, PREDICTOR_RATE = 8, 1e-3
"""Pairs in a step of training 3DGR-CAR's predictor, and the peak of its learning rate. Chosen by hand: half and twice of the rate
end as well."""


def in_box(fit: Callable[..., Array], name: str, own_body: bool = True, **changes: Any) -> Answer:
    """The answer of a system that reconstructs what is in the box.

    Args:
      fit: (config, views, key, params) -> densities; name: of the config in `Sizes`; own_body: whether the body around the box is
        reconstructed, too, where the X-rays show one; changes: to the config.
    """

    def answer(subject, given, params, sizes, key):
        frame = box.world_from_box(given.world_from_ct, subject.prepared.vertebra.ct_from_box[:3, 3])
        body = box.BodyConfig(air=given.variant == "real") if own_body and given.variant != "easy" else None
        config = dataclasses.replace(getattr(sizes, name), body=body, **changes)
        found = fit(config, box.box_views(given.xrays, frame), key, params)
        return found, frame @ np.asarray(box.box_grid(box.SIDE).frame_from_index, np.float64)

    return answer


def unprepared(fit: Callable[..., Array]) -> Callable[..., Array]:
    """A `fit` without parameters, as one that takes them."""
    return lambda config, views, key, params: fit(config, views, key)


def zero(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Densities:
    """No density at all."""
    frame = box.world_from_box(given.world_from_ct, subject.prepared.vertebra.ct_from_box[:3, 3])
    return np.zeros((2,) * 3), frame


def mean_shape(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Densities:
    """The mean density of the training vertebrae of the level, at the start pose."""
    vertebra = subject.prepared.vertebra
    shape = subject.prepared.model.mean_shape(vertebra.label)
    return shape, given.world_from_ct @ vertebra.ct_from_box @ trained.mean_shape_grid()


def ct_at_start(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Densities:
    """The CT's vertebra at the start pose."""
    return subject.prepared.vertebra.density, given.world_from_ct @ subject.prepared.vertebra.ct_from_index


def ct_at_estimate(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Densities:
    """The CT's vertebra where we register it."""
    pose = registering.ours(subject, given, params, sizes, key)
    return subject.prepared.vertebra.density, pose @ subject.prepared.vertebra.ct_from_index


def _of_gaussians(cloud, subject, world_from_ct):
    world_from_grid = world_from_ct @ resample.evaluation_grid(subject.prepared.vertebra)
    return reconstruct.in_ct(cloud, np.eye(4), world_from_grid, resample.GRID_SHAPE), world_from_grid


def ours_reconstructed(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Densities:
    """What RadGS-Reg reconstructs of the CT's vertebra at the pose that it finds."""
    options = pipeline.RegisterOptions(subject.config.passes, reconstruct=True)
    outcome = pipeline.register(subject.prepared, given.xrays, given.world_from_ct, options, kept)
    assert outcome.reconstructed is not None
    return _of_gaussians(outcome.reconstructed.gaussians, subject, outcome.world_from_ct)


def ours_withheld(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Densities:
    """What RadGS-Reg's network reconstructs without the patient's CT, from the mean shape at the start pose."""
    prepared, passes = subject.prepared, subject.config.passes
    cloud = reconstruct.mean_cloud(prepared.model, prepared.vertebra.label)
    found = pipeline.reconstruct_without_ct(prepared, cloud, given.xrays, given.world_from_ct, passes, kept)
    return _of_gaussians(found, subject, given.world_from_ct)


def prepare_predictor(subject: Subject, sizes: Sizes, seed: int) -> tuple[Any, Cost]:
    """3DGR-CAR's predictor of centres, trained once for all patients, on phantoms."""
    config, model_config, own = sizes.gr_car, subject.prepared.model.config, subject.config
    folder, size = subject.shared_folder, (config, sizes.pairs, sizes.phantoms, sizes.predictor_steps)

    def pairs():
        seeds = [data_stages.P1_SEED + data_stages.SEEDS_PER_RUN * own.seed + i for i in range(sizes.phantoms)]
        with progress.Bar(len(seeds), "phantoms") as bar:
            scans_made = scan_files.phantoms(folder / "scans", seeds, own.phantom, bar.update)
        vertebrae = [(identity.FileScan(*one), label) for one in scans_made for label in own.labels]
        count = max(1, sizes.pairs // len(own.labels))
        with progress.Bar(len(vertebrae) * (2 + count), "pairs") as bar:
            settings = count, seed, own.pairs, model_config.gaussians
            return build.simulated_pairs(folder / "pairs", vertebrae, *settings, on_done=bar.update)

    init = lambda: gr_car.init(config, jax.random.key(seed))
    update = lambda mesh: gr_car.make_update(mesh, config, model_config)
    settings = sizes.predictor_steps, PREDICTOR_BATCH, PREDICTOR_RATE, seed, own
    return training.trained_params(training.place(folder, "gr_car", size, seed), init, update, "gcp", pairs, *settings)
