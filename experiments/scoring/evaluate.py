"""Scores a prepared patient on a case file with known poses: registration and reconstruction, beside trivial baselines."""

import dataclasses
import pathlib

import numpy as np

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.simulation import quick
from experiments.patients.workdir import loader
from experiments.patients.workdir import untrained_loader
from experiments.reports import case_folder
from experiments.reports import pictures
from experiments.reports import tables
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from experiments.runtime.kept_programs import Stopwatch
from radgs_jax import metrics
from radgs_jax.geometry import camera
from radgs_jax.geometry import resample
from radgs_jax.models import trained
from radgs_jax.registration import pipeline
from radgs_jax.registration import reconstruct
from radgs_jax.registration.pipeline import RegisterOptions
from radgs_jax.registration.prepared import Prepared


def _volume_scores(one, mean_cloud, passes):
    """Reconstruction scores of ours and of the baselines on the evaluation grid in CT axes, of a `Registered`."""
    outcome, prepared, start, truth = one.outcome, one.prepared, one.case.world_from_ct, one.truth
    vertebra = prepared.vertebra
    ct_from_grid, shape = resample.evaluation_grid(vertebra), resample.GRID_SHAPE
    density = resample.resample(vertebra.density, vertebra.ct_from_index, ct_from_grid, shape)
    mask = resample.resample(vertebra.mask, vertebra.ct_from_index, ct_from_grid, shape, order=0) > 0.5
    mean_shape = prepared.model.mean_shape(vertebra.label)
    without = pipeline.reconstruct_without_ct(prepared, mean_cloud, one.xrays, start, passes, kept)

    def carried(volume, ct_from_index, world_from_ct):
        """A volume at a pose, seen from the true CT frame."""
        return resample.resample(volume, np.linalg.inv(truth) @ world_from_ct @ ct_from_index, ct_from_grid, shape)

    mean_shape_grid = vertebra.ct_from_box @ trained.mean_shape_grid()
    volumes = {
        "reconstruction": reconstruct.in_ct(outcome.reconstruction, truth, ct_from_grid, shape),
        "the CT withheld": reconstruct.in_ct(without, truth, ct_from_grid, shape),
        "mean shape": carried(mean_shape, mean_shape_grid, outcome.world_from_ct),
        "CT at the start": carried(vertebra.density, vertebra.ct_from_index, start),
        "CT at the estimate": carried(vertebra.density, vertebra.ct_from_index, outcome.world_from_ct),
    }
    near = metrics.near(mask)
    return {name: metrics.reconstruction_scores(volume, density, near) for name, volume in volumes.items()}


def _attention_shares(one):
    """Of a `Registered`: the share of the network's attention on the vertebra at the truth, and its share of the crops."""
    outcome, vertebra = one.outcome, one.prepared.vertebra
    size, cameras = outcome.crops.shape[1:], (outcome.intrinsics, outcome.camera_from_world)
    drawn = quick.render(vertebra.density, vertebra.ct_from_index, one.truth, *cameras, size, 1.0) > 0.02
    attention = outcome.attention
    factor = size[0] // attention.shape[1]
    silhouette = camera.bin_image(drawn.astype(np.float32), factor)
    share = (attention * silhouette).sum((1, 2)) / (attention.sum((1, 2)) + 1e-9)
    return float(share.mean()), float(silhouette.mean())


@dataclasses.dataclass(frozen=True)
class Registered:
    """One registered case; truth is world_from_ct (4, 4); times: as `Stopwatch.times`."""

    case: cases.Case
    scene: cases.Scene
    prepared: Prepared
    xrays: list
    truth: np.ndarray
    outcome: pipeline.Outcome
    times: dict


def _registered(case_file, case_list, variant, passes, prepare, refine=True):
    """Registers cases one by one; `prepare` makes the `prepared.Prepared` of a `cases.Volume`, once for each."""
    prepared, options = {}, RegisterOptions(passes, refine)
    for case in case_list:
        scene = case_file.scenes[case.scene]
        volume, xrays = case_file.volumes[scene.volume], cases.read_xrays(scene, variant)
        if volume.name not in prepared:
            prepared[volume.name] = prepare(volume)
            pipeline.warm_up(prepared[volume.name], xrays, options, kept)
        ready = prepared[volume.name]
        with Stopwatch() as watch:
            outcome = pipeline.register(ready, xrays, case.world_from_ct, options, kept)
        yield Registered(case, scene, ready, xrays, cases.truth(case_file, scene), outcome, watch.times())


def evaluate(case_file, variant, prepare, passes, picture_folder=None, score_volumes=True, refine=True):
    """Registers every case and scores it.

    Args:
      case_file: `cases.CaseFile` with truth and points; passes: network passes; refine: as `pipeline.register`.
      prepare: makes the `prepared.Prepared` of a `cases.Volume`, called once for each; `workdir.loader` of a workdir.
      picture_folder: where to write the files of the first case of each vertebra, or None.
      score_volumes: also score the reconstructions, which takes longer than registering.
    Returns:
      dict of arrays over cases: start_mm, error_mm, passes_mm (C, 1 + passes + levels), runtime_s, cpu_s; 'volumes': name ->
      score -> (C,); 'attention': (C, 2), its share on the vertebra and the vertebra's share of the crops, with the volumes;
      and 'results' for `cases.write_results`.
    Raises:
      InputError: a vertebra that was not prepared or has no points, unreadable X-rays, or a scene without its true pose.
    """
    passes_mm, results, volumes, attention, mean_clouds, shown = [], [], {}, [], {}, set()
    scored = {case_file.scenes[case.scene].volume for case in case_file.cases}
    points = {name: cases.points(case_file, name) for name in sorted(scored)}

    with progress.bar(len(case_file.cases), f"evaluate {variant}") as bar:
        for one in _registered(case_file, case_file.cases, variant, passes, prepare, refine):
            start, outcome = one.case.world_from_ct, one.outcome
            passes_mm.append([metrics.mtre(points[one.scene.volume], T, one.truth) for T in outcome.trajectory])
            results.append({"id": one.case.name, **case_folder.answer(outcome), **one.times})
            if score_volumes:
                attention.append(_attention_shares(one))
                if one.scene.volume not in mean_clouds:
                    mean_clouds[one.scene.volume] = reconstruct.mean_cloud(one.prepared)
                for name, scores in _volume_scores(one, mean_clouds[one.scene.volume], passes).items():
                    for score, value in scores.items():
                        volumes.setdefault(name, {}).setdefault(score, []).append(value)
            if picture_folder is not None and one.scene.volume not in shown:
                shown.add(one.scene.volume)
                case_folder.write(picture_folder, one.case.name, outcome, one.prepared, one.xrays, start, one.truth)
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
    }


def report(case_file, variant, workdir, passes, out, score_volumes=True):
    """Evaluates, and writes `out`/results_VARIANT.json, table_VARIANT.txt, errors_VARIANT.png and the first cases' files.

    Args:
      workdir: of `preparing.prepare`; out: a folder, made if need be; the rest as in `evaluate`, which says what is raised.
    Returns:
      the table, and a line with the times.
    """
    out = pathlib.Path(out)
    scores = evaluate(case_file, variant, loader(workdir), passes, out / variant, score_volumes)
    cases.write_results(out / f"results_{variant}.json", case_folder.PROGRAM, variant, scores["results"])
    pictures.errors(
        out / f"errors_{variant}.png", f"variant {variant}", scores["start_mm"], scores["error_mm"], scores["passes_mm"]
    )
    text = tables.table(scores, variant)
    with files.replacing(out / f"table_{variant}.txt") as temporary:
        temporary.write_text(text + "\n")
    return text, (
        f"time a case, median: {np.median(scores['runtime_s']):.2f} s wall, {np.median(scores['cpu_s']):.2f} s CPU"
    )


def held_out(model, case_file, names, variant, passes, refine):
    """Start and final mTRE, mm, (C,) each, of a model that was not prepared for the patients, on the scenes `names`.

    Args:
      model: `trained.Model`; case_file: `cases.CaseFile` with truth; passes: of the network; refine: `gauss_newton.RefineConfig`.
    Raises:
      InputError: an unreadable scan or X-ray, an absent or cut vertebra, a scene without its true pose.
    """
    prepare = untrained_loader(model, refine)
    chosen = [case for case in case_file.cases if case.scene in names]
    errors = [
        [metrics.mtre(one.prepared.vertebra.points, T, one.truth) for T in one.outcome.trajectory]
        for one in _registered(case_file, chosen, variant, passes, prepare)
    ]
    return np.array(errors)[:, 0], np.array(errors)[:, -1]
