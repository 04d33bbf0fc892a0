"""Other registration methods on the cases of a study."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import cases
from data_pipelines.io import files
from experiments import configs
from experiments.patients import preparing
from experiments.reports import tables
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from experiments.scoring import conditions
from experiments.scoring import evaluate
from experiments.training import loop
from radgs_jax import gaussians
from radgs_jax import metrics
from radgs_jax.baselines import plain
from radgs_jax.baselines import refiners
from radgs_jax.registration import pipeline
from radgs_jax.registration import pyramid
from radgs_jax.registration.prepared import bare_parts
from radgs_jax.registration.prepared import FINE_GAUSSIANS
from radgs_jax.training import sharding
from radgs_jax.training.update import state_of

OVERLAP_GAUSSIANS, OVERLAP_BLUR_MM = 256, 2.0
"""Number and blur of the Gaussians whose overlap is compared, chosen by hand: their cost grows with the square of the number; a
smaller blur compares detail, a larger one makes the optimum flat."""
RAW_LEVELS = ((1.5, 64), (0.75, 112))
"""(pixel size at the isocentre in mm, pixels per side) of the windows on the raw images, coarse to fine, chosen by hand to cover a
vertebra (96 and 84 mm)."""


def train_plain(
    patient: conditions.Patient, config: configs.Config, minutes: float, out: pathlib.Path, seed: int
) -> dict[str, Any]:
    """Trains the plain 2D network on the pairs that the patient was prepared with.

    Args:
      config: of the training; minutes: training time; out: folder of the study; seed: of everything random.
    Returns:
      its parameters.
    Raises:
      DivergedError: as `loop.run_steps`.
    """
    targets = [patient.target(label) for label in patient.labels]
    model_config = patient.prepared[patient.labels[0]].model.config
    folder = patient.workdir / patient.digests.of(targets[0])
    pair_set = preparing.pairs_of(config, folder, targets, model_config.gaussians)
    mesh, shape = sharding.make_mesh(), plain.PlainConfig()
    state = sharding.made(mesh, lambda: state_of(plain.init(shape, model_config, jax.random.key(seed)), ("plain",)))
    update, batches = plain.make_update(mesh, shape, model_config), pair_set.batches(seed, config.batch)
    state = loop.scheduled(
        out / "checkpoints" / "plain",
        out,
        mesh,
        state,
        update,
        batches,
        seed=seed,
        learning_rate=config.p3.learning_rate,
        budget_s=60.0 * minutes,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    return state["params"]


def compare(
    patient: conditions.Patient,
    params: dict[str, Any] | None,
    condition: conditions.Condition,
    count: int,
    seed: int,
    out: pathlib.Path,
    passes: int,
) -> dict[str, list[float]]:
    """Registers the same cases by every method, unless the results are there already.

    Args:
      params: of the plain network; None leaves it out.
      condition, count, seed, out, passes: as in `conditions.register_condition`.
    Returns:
      method -> mTRE of each case, mm, kept in `out`/methods_VARIANT.json.
    """
    path = out / f"methods_{condition.variant}{'' if params is None else '_plain'}.json"
    if path.exists():
        return files.read_json(path)
    case_file = conditions.scenes_of(patient, condition, count, seed, out)
    chosen, found = list(case_file.cases), {}
    with progress.Bar(len(chosen), f"methods: {condition.variant}") as bar:
        for case in chosen:
            scene = case_file.scenes[case.scene]
            prepared = patient.prepared[case_file.volumes[scene.volume].full_label]
            xrays = cases.read_xrays(scene, condition.variant)
            points, truth = cases.points(case_file, scene.volume), cases.truth(case_file, scene)
            box_from_ct = np.linalg.inv(prepared.vertebra.ct_from_box)
            start = case.world_from_ct @ prepared.vertebra.ct_from_box
            outcome = pipeline.register(
                prepared, xrays, case.world_from_ct, pipeline.RegisterOptions(passes, reconstruct=True), kept
            )
            poses = {
                "start pose": case.world_from_ct,
                "network": outcome.trajectory[passes],
                "ours": outcome.world_from_ct,
            }
            for name, pose in _otherwise_refined(prepared, xrays, case.world_from_ct, passes).items():
                poses[f"network, {name}"] = pose @ box_from_ct
            alone, _ = pipeline.refine_until_trusted(prepared, xrays, start, compile=kept)
            poses["refinement without a network"] = alone.world_from_box @ box_from_ct
            if params is not None:
                estimate = _plain_pose(params, prepared, xrays, start, passes)
                poses["plain 2D network"] = estimate @ box_from_ct
                refined, _ = pipeline.refine_until_trusted(prepared, xrays, estimate, lambda: [start], kept)
                poses["plain 2D network, our refinement"] = refined.world_from_box @ box_from_ct
            for name, pose in poses.items():
                found.setdefault(name, []).append(metrics.mtre(points, np.asarray(pose, np.float64), truth))
            bar.update()
    files.write_json(path, found)
    return found


def reconstructions(patient: conditions.Patient, count: int, seed: int, out: pathlib.Path, passes: int) -> str:
    """Table of the reconstructions' and the attention's scores on the 'real' X-rays of `compare`, kept in `out`.

    Args:
      count, seed, out, passes: as in `conditions.register_condition`.
    """
    path = out / "reconstructions.txt"
    if not path.exists():
        case_file = conditions.scenes_of(patient, conditions.Condition("methods", "real", "real"), count, seed, out)
        found = evaluate.evaluate(case_file, "real", lambda target: patient.prepared[target.label], passes)
        with files.replacing(path) as temporary:
            temporary.write_text(tables.score_table(found, "real"))
    return path.read_text()


def _otherwise_refined(prepared, xrays, start_world_from_ct, passes):
    """Method of `refiners` -> world_from_box of the network's pose refined by it."""
    options = pipeline.RegisterOptions(passes, refine=False, reconstruct=True)
    network = pipeline.register(prepared, xrays, start_world_from_ct, options, kept)
    seen = network.reconstructed
    bare = bare_parts(prepared)
    start = jnp.asarray(network.world_from_ct @ prepared.vertebra.ct_from_box, jnp.float32)
    cameras = jnp.asarray(network.camera_from_world, jnp.float32)
    intrinsics, size = jnp.asarray(seen.intrinsics), seen.crops.shape[-1]
    clouds = gaussians.views(seen.gaussians, len(xrays))
    clean = gaussians.project(clouds, cameras, intrinsics, size, size)
    pose = refiners.to_clean_image(bare, clean, intrinsics, cameras, start)
    poses = {"then the clean image": pose}
    raw = pose
    for pixel_mm, pixels in RAW_LEVELS:
        views = pyramid.at_resolution(xrays, pixel_mm)
        raw = refiners.to_raw_gradients(bare, views, cameras, raw, pixels)
    poses["then that and raw gradients"] = raw
    # Both clouds get the same number of Gaussians and the same blur, so that the overlap compares places and not detail.
    few = [
        gaussians.blur(
            jax.tree.map(lambda a: a[:: FINE_GAUSSIANS // OVERLAP_GAUSSIANS], cloud),
            OVERLAP_BLUR_MM,
        )
        for cloud in (prepared.fine_cloud, seen.gaussians)
    ]
    poses["then overlap in 3D"] = refiners.to_gaussians(*few, start)
    return {name: np.asarray(pose, np.float64) for name, pose in poses.items()}


def _plain_pose(params, prepared, xrays, start, passes):
    config = prepared.model.config
    seen = pyramid.at_resolution(xrays, config.pixel_mm)
    cameras = jnp.asarray(np.stack([xray.camera.camera_from_world for xray in xrays]), jnp.float32)
    first = jnp.asarray(start, jnp.float32)
    shape = plain.PlainConfig()
    poses = plain.register_plain(params, shape, config, seen, cameras, first, prepared.vertebra.cloud, passes)
    return np.asarray(poses[-1], np.float64)
