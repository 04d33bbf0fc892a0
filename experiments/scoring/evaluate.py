"""Scores registration and reconstruction on a case file with known poses, and trivial baselines for comparison."""

import dataclasses
import pathlib
from collections.abc import Callable
from collections.abc import Collection
from typing import Any

import numpy as np

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.simulation import quick
from experiments.patients.untrained import untrained_loader
from experiments.patients.workdir import loader
from experiments.patients.workdir import Target
from experiments.patients.workdir import target_of
from experiments.reports import case_folder
from experiments.reports import plots
from experiments.reports import tables
from experiments.reports import verdicts
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from experiments.runtime.kept_programs import Stopwatch
from radgs_jax import metrics
from radgs_jax.geometry import camera
from radgs_jax.geometry import resample
from radgs_jax.geometry.xray import XRay
from radgs_jax.models import trained
from radgs_jax.registration import pipeline
from radgs_jax.registration import reconstruct
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.pipeline import RegisterOptions
from radgs_jax.registration.prepared import Prepared

SILHOUETTE, SILHOUETTE_STEP_MM = 0.02, 1.0
"""Line integral above which a pixel belongs to the vertebra's silhouette, and the step of its ray, mm; chosen by hand: a lower
threshold adds pixels that the vertebra's edge barely covers, a higher one loses thin parts of the arch."""
ATTENTION_FLOOR = 1e-9
"""Added to the sum of a map, so that one that is zero everywhere has a share of 0."""


def _volume_scores(one, mean_cloud, passes):
    """Scores of our reconstruction of a `Registered` on the evaluation grid in CT axes, and of the baselines where there is a cloud
    of the mean shape."""
    outcome, prepared, start, truth = one.outcome, one.prepared, one.case.world_from_ct, one.truth
    vertebra = prepared.vertebra
    ct_from_grid, shape = resample.evaluation_grid(vertebra), resample.GRID_SHAPE
    density = resample.resample(vertebra.density, vertebra.ct_from_index, ct_from_grid, shape)
    mask = resample.resample(vertebra.mask, vertebra.ct_from_index, ct_from_grid, shape, order=0) > 0.5

    def carried(volume, ct_from_index, world_from_ct):
        """A volume at a pose, resampled in the true CT frame."""
        return resample.resample(volume, np.linalg.inv(truth) @ world_from_ct @ ct_from_index, ct_from_grid, shape)

    volumes = {"reconstruction": reconstruct.in_ct(outcome.reconstructed.gaussians, truth, ct_from_grid, shape)}
    if mean_cloud is not None:
        mean_shape, grid = prepared.model.mean_shape(vertebra.label), vertebra.ct_from_box @ trained.mean_shape_grid()
        without = pipeline.reconstruct_without_ct(prepared, mean_cloud, one.xrays, start, passes, kept)
        volumes |= {
            "the CT withheld": reconstruct.in_ct(without, truth, ct_from_grid, shape),
            "mean shape": carried(mean_shape, grid, outcome.world_from_ct),
            "CT at the start": carried(vertebra.density, vertebra.ct_from_index, start),
            "CT at the estimate": carried(vertebra.density, vertebra.ct_from_index, outcome.world_from_ct),
        }
    near = metrics.near(mask)
    return {name: metrics.reconstruction_scores(volume, density, near) for name, volume in volumes.items()}


def _attention_shares(one):
    """Fractions on the vertebra at its true pose of the network's attention, of its activity, and of the crops' area."""
    seen, vertebra = one.outcome.reconstructed, one.prepared.vertebra
    size, cameras = seen.crops.shape[1:], (seen.intrinsics, one.outcome.camera_from_world)
    drawn = (
        quick.render(vertebra.density, vertebra.ct_from_index, one.truth, *cameras, size, SILHOUETTE_STEP_MM)
        > SILHOUETTE
    )
    silhouette = camera.bin_image(drawn.astype(np.float32), size[0] // seen.attention.shape[1])
    share = lambda of: float(np.mean((of * silhouette).sum((1, 2)) / (of.sum((1, 2)) + ATTENTION_FLOOR)))
    return share(seen.attention), share(seen.activity), float(silhouette.mean())


@dataclasses.dataclass(frozen=True)
class Registered:
    """One registered case.

    Attributes:
      case, scene: of the case file.
      prepared, xrays: what was registered.
      truth: (4, 4) the true world_from_ct, mm.
      outcome: the result; times: as `Stopwatch.times`.
    """

    case: cases.Case
    scene: cases.Scene
    prepared: Prepared
    xrays: list[XRay]
    truth: np.ndarray
    outcome: pipeline.Outcome
    times: dict[str, float]


def _registered(case_file, case_list, variant, passes, prepare, refine=True):
    """Yields a `Registered` per case; arguments as `evaluate`."""
    prepared, options = {}, RegisterOptions(passes, refine, reconstruct=True)
    for case in case_list:
        scene = case_file.scenes[case.scene]
        volume, xrays = case_file.volumes[scene.volume], cases.read_xrays(scene, variant)
        if volume.name not in prepared:
            prepared[volume.name] = prepare(target_of(volume))
            pipeline.warm_up(prepared[volume.name], xrays, options, kept)
        ready = prepared[volume.name]
        with Stopwatch() as watch:
            outcome = pipeline.register(ready, xrays, case.world_from_ct, options, kept)
        yield Registered(case, scene, ready, xrays, cases.truth(case_file, scene), outcome, watch.times())


def evaluate(
    case_file: cases.CaseFile,
    variant: str,
    prepare: Callable[[Target], Prepared],
    passes: int,
    picture_folder: pathlib.Path | None = None,
    score_volumes: bool = True,
    refine: bool = True,
    baselines: bool = True,
) -> dict[str, Any]:
    """Registers every case and scores it.

    Args:
      case_file: cases with true poses and points.
      variant: array of the X-ray files.
      prepare: prepares a target, such as `workdir.loader(...)`; called once per volume.
      passes, refine: as in `RegisterOptions`.
      picture_folder: where to write the files of each vertebra's case that starts farthest off; None writes none.
      score_volumes: also score the reconstructions, which takes longer than registering; baselines: and what they are to be held
        against, which takes most of that time.
    Returns:
      a dict with, for C cases,
        start_mm, error_mm: (C,) mTRE of start and result.
        passes_mm: (C, 1 + passes + levels) mTRE along the trajectory.
        runtime_s, cpu_s: (C,).
        volumes: name -> score -> (C,); attention: (C, 3), the fractions of it and of the activity on the vertebra, and of the
          crops that the vertebra covers; both empty without `score_volumes`.
        seen: name of a volume -> `Reconstructed` of its first case.
        results: as `cases.write_results` takes them.
    Raises:
      InputError: a vertebra that was not prepared or has no points, unreadable X-rays, or a scene without its true pose.
    """
    passes_mm, results, volumes, attention, mean_clouds, seen = [], [], {}, [], {}, {}
    scored = {case_file.scenes[case.scene].volume for case in case_file.cases}
    points = {name: cases.points(case_file, name) for name in sorted(scored)}
    drawn = _farthest(case_file, points) if picture_folder is not None else ()

    with progress.Bar(len(case_file.cases), f"evaluate {variant}") as bar:
        for one in _registered(case_file, case_file.cases, variant, passes, prepare, refine):
            start, outcome = one.case.world_from_ct, one.outcome
            passes_mm.append([metrics.mtre(points[one.scene.volume], T, one.truth) for T in outcome.trajectory])
            results.append({"id": one.case.name, **case_folder.answer(outcome), **one.times})
            if score_volumes:
                attention.append(_attention_shares(one))
                if baselines and one.scene.volume not in mean_clouds:
                    mean_clouds[one.scene.volume] = reconstruct.mean_cloud(
                        one.prepared.model, one.prepared.vertebra.label
                    )
                for name, scores in _volume_scores(one, mean_clouds.get(one.scene.volume), passes).items():
                    for score, value in scores.items():
                        volumes.setdefault(name, {}).setdefault(score, []).append(value)
            if picture_folder is not None and one.case.name in drawn:
                said = verdicts.verdict(outcome, one.prepared, one.xrays)
                case_folder.write(
                    picture_folder, one.case.name, outcome, one.prepared, one.xrays, start, said, one.truth
                )
            seen.setdefault(one.scene.volume, outcome.reconstructed)
            bar.update()
    passes_mm = np.array(passes_mm)
    return {
        "start_mm": passes_mm[:, 0],
        "error_mm": passes_mm[:, -1],
        "passes_mm": passes_mm,
        **{k: np.array([r[k] for r in results]) for k in ("runtime_s", "cpu_s")},
        "results": results,
        "attention": np.array(attention),
        "volumes": {n: {s: np.array(v) for s, v in t.items()} for n, t in volumes.items()},
        "seen": seen,
    }


def _farthest(case_file, points):
    """Names of the cases that start farthest off, one for each volume."""
    found = {}
    for case in case_file.cases:
        scene = case_file.scenes[case.scene]
        off = metrics.mtre(points[scene.volume], case.world_from_ct, cases.truth(case_file, scene))
        found[scene.volume] = max(found.get(scene.volume, (-1.0, "")), (float(off), case.name))
    return {name for _, name in found.values()}


def report(
    case_file: cases.CaseFile,
    variant: str,
    workdir: pathlib.Path | str,
    passes: int,
    out: pathlib.Path | str,
    score_volumes: bool = True,
) -> tuple[str, str]:
    """Evaluates, and writes `out`/results_VARIANT.json, table_VARIANT.txt, errors_VARIANT.png and files of cases.

    The cases are, for each vertebra, the one that starts farthest off.

    Args:
      workdir: folder that `preparing.prepare` made.
      out: folder to write to.
      case_file, variant, passes, score_volumes: as in `evaluate`.
    Returns:
      the table, and a line with the times.
    Raises:
      InputError: as `evaluate`.
    """
    out = pathlib.Path(out)
    scores = evaluate(case_file, variant, loader(workdir), passes, out / variant, score_volumes)
    cases.write_results(out / f"results_{variant}.json", case_folder.PROGRAM, variant, scores["results"])
    plots.error_plot(
        out / f"errors_{variant}.png", f"variant {variant}", scores["start_mm"], scores["error_mm"], scores["passes_mm"]
    )
    text = tables.score_table(scores, variant)
    with files.replacing(out / f"table_{variant}.txt") as temporary:
        temporary.write_text(text + "\n")
    return text, (
        f"time a case, median: {np.median(scores['runtime_s']):.2f} s wall, {np.median(scores['cpu_s']):.2f} s CPU"
    )


def held_out(
    model: trained.Model,
    case_file: cases.CaseFile,
    names: Collection[str],
    variant: str,
    passes: int,
    refine: RefineConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Registers cases of some scenes with a model that was not prepared for their patients.

    Args:
      case_file: cases with true poses; names: of the scenes; variant: array of the X-ray files.
      passes: number of the network's passes; refine: the refinement after them.
    Returns:
      start and final mTRE, mm, (C,) each.
    Raises:
      InputError: an unreadable scan or X-ray, an absent or cut vertebra, a scene without its true pose.
    """
    prepare = untrained_loader(model, refine)
    chosen = [case for case in case_file.cases if case.scene in names]
    errors_mm = [
        [metrics.mtre(one.prepared.vertebra.points, T, one.truth) for T in one.outcome.trajectory]
        for one in _registered(case_file, chosen, variant, passes, prepare)
    ]
    return np.array(errors_mm)[:, 0], np.array(errors_mm)[:, -1]
