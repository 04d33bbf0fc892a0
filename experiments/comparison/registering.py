"""The registering systems of Table 1: how each is prepared, and what it answers."""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.pairs.batches import PairSet
from data_pipelines.simulation import carm
from data_pipelines.simulation import quick
from experiments.comparison import training
from experiments.comparison.subjects import Answer
from experiments.comparison.subjects import Cost
from experiments.comparison.subjects import Given
from experiments.comparison.subjects import Pose
from experiments.comparison.subjects import Prepare
from experiments.comparison.subjects import Sizes
from experiments.comparison.subjects import Subject
from experiments.patients import preparing
from experiments.patients import workdir
from experiments.patients.workdir import Target
from experiments.runtime.kept_programs import kept
from kernels.common.types import Array
from radgs_jax.baselines import ddgs
from radgs_jax.baselines import diffpose
from radgs_jax.baselines import plain
from radgs_jax.baselines import ts_sar
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import pipeline
from radgs_jax.registration import pyramid
from radgs_jax.registration.prepared import Prepared

THREE = "crop_volume", "crop_volume", "vertebra_volume"
"""Volumes that render-and-compare moves one after the other where it works best: the crop shows most of what X-rays of a body show;
the vertebra alone, at last, is free of neighbours that have moved."""
TARGET_STEP_MM = 0.5
"""Distance of samples along rays of DDGS-CT's targets, mm. Half changes them by less than its own error."""
TRAINING_DEG, TURN_DEG, TRAINING_VIEWS = 15.0, 10.0, 30
"""Range of the C-arm's angles about AP and lateral that DDGS-CT's targets are drawn from, of the patient's turn about each axis,
degrees, and number of targets round each. Those of the simulator; the paper has 60 targets."""


def start(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Pose:
    """The start pose."""
    return given.world_from_ct


def ours(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Pose:
    """What `experiments.register` answers."""
    return pipeline.register(subject.prepared, given.xrays, given.world_from_ct, compile=kept).world_from_ct


def start_alone(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Pose:
    """Our refinement from the start pose: nothing is judged, and no wider search is made of an answer that fits."""
    prepared = dataclasses.replace(subject.prepared, rule=None)
    return pipeline.register(prepared, given.xrays, given.world_from_ct, compile=kept).world_from_ct


def network(subject: Subject, given: Given, params: Any, sizes: Sizes, key: jax.Array) -> Pose:
    """The pose of RadGS-Reg's network alone; params: the subject's `Prepared` with a trained one, or None for the base's."""
    prepared = subject.prepared if params is None else params
    options = pipeline.RegisterOptions(subject.config.passes, refine=False)
    return pipeline.register(prepared, given.xrays, given.world_from_ct, options, kept).world_from_ct


def from_box(register: Callable[..., Array]) -> Answer:
    """The answer of a system that moves the vertebra's box.

    Args:
      register: (subject, params, sizes, xrays, cameras, start) -> world_from_box, of V X-rays, their (V, 4, 4) and a start pose.
    """

    def answer(subject, given, params, sizes, key):
        prepared = subject.prepared
        cameras = jnp.asarray(np.stack([x.camera.camera_from_world for x in given.xrays]), jnp.float32)
        start = jnp.asarray(given.world_from_ct @ prepared.vertebra.ct_from_box, jnp.float32)
        found = np.asarray(register(subject, params, sizes, given.xrays, cameras, start), np.float64)
        return rigid_host.nearest_rigid(found) @ np.linalg.inv(prepared.vertebra.ct_from_box)

    return answer


def plain_pose(
    subject: Subject, params: Any, sizes: Sizes, xrays: Sequence[XRay], cameras: Array, start: Array
) -> Array:
    """Of the plain 2D network, after as many passes as ours; for `from_box`, as are the next ones."""
    prepared, shape = subject.prepared, plain.PlainConfig()
    config, cloud = prepared.model.config, prepared.vertebra.cloud
    seen = pyramid.at_resolution(xrays, config.pixel_mm)
    return plain.register_plain(params, shape, config, seen, cameras, start, cloud, subject.config.passes)[-1]


def ts_sar_pose(
    subject: Subject, params: Any, sizes: Sizes, xrays: Sequence[XRay], cameras: Array, start: Array
) -> Array:
    """Of both steps of TS-SAR."""
    prepared = subject.prepared
    config = prepared.model.config
    seen = pyramid.at_resolution(xrays, config.pixel_mm)
    return ts_sar.register(params, sizes.ts_sar, config, seen, cameras, start, prepared.vertebra.cloud)


def diffpose_moving(*moving: str, network: bool = True) -> Answer:
    """The answer of DiffPose.

    Args:
      moving: names of a `Subject`'s volumes; a refinement with each follows the network, which is asked with the first.
      network: whether to ask it.
    """

    def register(subject, params, sizes, xrays, cameras, start):
        pose, config, model_config = start, sizes.diffpose, subject.prepared.model.config
        seen = pyramid.at_resolution(xrays, model_config.pixel_mm)
        if network:
            volume = getattr(subject, moving[0])
            pose = diffpose.estimate(params, config, model_config, *volume, seen, cameras, pose)
        for name in moving:
            pose = diffpose.refine(config, *getattr(subject, name), seen, cameras, pose)
        return pose

    return from_box(register)


def ddgs_pose(
    subject: Subject, params: Any, sizes: Sizes, xrays: Sequence[XRay], cameras: Array, start: Array
) -> Array:
    """Of DDGS-CT."""
    seen = pyramid.at_resolution(xrays, sizes.ddgs.pixel_mm)
    return ddgs.register(params, sizes.ddgs, seen, cameras, start)


def pairs_of(subject: Subject, targets: Sequence[Target], count: int, other: int = 0) -> PairSet:
    """Simulated pairs, `count` of each target, made where they are not there yet.

    Args:
      other: added to the seed of their acquisitions: with another number they are others.
    """
    config = subject.config
    stage = dataclasses.replace(config.p3, pairs=count, ct_pairs=1)
    config = dataclasses.replace(config, p3=stage, seed=config.seed + other)
    return preparing.pairs_of(config, subject.folder, targets, subject.prepared.model.config.gaussians)


def _trained(subject, sizes, seed, tree, name, size, targets, init, update, steps, batch, rate):
    """Parameters of a network that is trained on pairs of `targets`, and their cost; init: (key) -> {tree: parameters}."""
    path, first = training.place(subject.folder, name, (size, sizes.pairs), seed), lambda: init(jax.random.key(seed))
    pairs, settings = lambda: pairs_of(subject, targets, sizes.pairs), (steps, batch, rate, seed, subject.config)
    return training.trained_params(path, first, update, tree, pairs, *settings)


def prepare_diffpose(subject: Subject, sizes: Sizes, seed: int) -> tuple[Any, Cost]:
    """Trains DiffPose's network on pairs of this vertebra."""
    config, model_config = sizes.diffpose, subject.prepared.model.config
    init = lambda key: diffpose.init(config, model_config, key)
    update = lambda mesh: diffpose.make_update(mesh, *subject.vertebra_volume, config, model_config)
    what = "diffpose", f"diffpose_{subject.target.label}", config, [subject.target]
    return _trained(subject, sizes, seed, *what, init, update, config.steps, config.batch, config.learning_rate)


def prepare_ts_sar(subject: Subject, sizes: Sizes, seed: int) -> tuple[Any, Cost]:
    """Trains both steps of TS-SAR on pairs of this vertebra."""
    config, model_config = sizes.ts_sar, subject.prepared.model.config
    init = lambda key: ts_sar.init(config, model_config, key)
    update = lambda mesh: ts_sar.make_update(mesh, config, model_config)
    what = "ts_sar", f"ts_sar_{subject.target.label}", config, [subject.target]
    return _trained(subject, sizes, seed, *what, init, update, config.steps, config.batch, config.rate)


def prepare_plain(subject: Subject, sizes: Sizes, seed: int) -> tuple[Any, Cost]:
    """Trains the plain network on pairs of all the scan's vertebrae."""
    config, model_config, own = plain.PlainConfig(), subject.prepared.model.config, subject.config
    init = lambda key: plain.init(config, model_config, key)
    update = lambda mesh: plain.make_update(mesh, config, model_config)
    what = "plain", "plain", (config, sizes.plain_steps), subject.targets
    return _trained(subject, sizes, seed, *what, init, update, sizes.plain_steps, own.batch, own.p3.learning_rate)


def prepare_ours(subject: Subject, sizes: Sizes, seed: int) -> tuple[Prepared, Cost]:
    """The subject's `Prepared` with a network that was trained on its scan, and the cost of that."""
    folder = subject.folder / "baselines" / f"ours_{sizes.ours_minutes:g}"
    cost = folder.with_name(f"{folder.name}.json")

    def make():
        preparing.prepare(subject.config, folder, subject.targets, subject.base, sizes.ours_minutes)
        return subject.prepared.model.params

    with locks.hold(files.make_folder(folder.parent) / f".{folder.name}.lock", folder, wait=True):
        if not cost.exists():
            training.with_cost(cost, folder.exists(), make)
    return workdir.loader(folder)(subject.target), training.kept_cost(cost)


def _turned(rng):
    """A turn of the patient, (4, 4)."""
    return rigid_host.matrix(np.radians(rng.uniform(-TURN_DEG, TURN_DEG, 3)), 0.0)


def projections(
    config: ddgs.Config, volume: Float[Array, "x y z"], box_from_index: Float[Array, "4 4"], rng: np.random.Generator
) -> ddgs.Views:
    """Line integrals of a volume, 1/mm, from `TRAINING_VIEWS` random angles round AP and as many round lateral."""
    machine = carm.CArm()
    cameras = np.concatenate([carm.sample_views(rng, machine, TRAINING_DEG) for _ in range(TRAINING_VIEWS)])
    cameras = cameras @ [_turned(rng) for _ in cameras]
    focal, middle = machine.source_isocentre_mm / config.pixel_mm, 0.5 * (config.target_px - 1)
    intrinsics = np.tile([focal, focal, middle, middle], (len(cameras), 1))
    size, placed = (config.target_px,) * 2, (np.asarray(volume), np.asarray(box_from_index, np.float64), np.eye(4))
    return quick.render(*placed, intrinsics, cameras, size, TARGET_STEP_MM), intrinsics, cameras


def prepare_ddgs(name: str) -> Prepare:
    """Fits DDGS-CT to projections of one of a `Subject`'s volumes, from angles round AP and lateral.

    It takes a minute, so that a run that is stopped begins it again.
    """

    def prepare(subject, sizes, seed):
        config, (volume, box_from_index) = sizes.ddgs, getattr(subject, name)
        path = training.place(subject.folder, f"ddgs_{name}_{subject.target.label}", config, seed)
        key = jax.random.key(seed)
        density, affine = np.asarray(volume), np.asarray(box_from_index, np.float64)
        first = ddgs.init(config, density, affine, key)
        like = jax.device_get({**first, "scale": np.zeros((), np.float32)})

        def make():
            views = projections(config, density, affine, np.random.default_rng(seed))
            return ddgs.fit(config, first, views, jax.random.fold_in(key, 1))

        return training.kept_params(path, lambda: like, make)

    return prepare
