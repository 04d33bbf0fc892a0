"""Scores a prepared patient on a case file with known poses: registration and reconstruction, beside trivial baselines."""

import dataclasses
import pathlib

import numpy as np

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pairs
from data_pipelines import scan as scans
from data_pipelines import xray
from experiments import patients
from experiments import pictures
from experiments import progress
from experiments import registering
from radgs_jax import camera
from radgs_jax import metrics


def _volume_scores(one, mean_cloud, passes):
    """Reconstruction scores of ours and of the baselines on the evaluation grid in CT axes, of a `Registered`."""
    outcome, prepared, start, truth = one.outcome, one.prepared, one.case.world_from_ct, one.truth
    vertebra = prepared.vertebra
    ct_from_grid, shape = scans.evaluation_grid(vertebra), scans.GRID_SHAPE
    density = scans.resample(vertebra.density, vertebra.ct_from_index, ct_from_grid, shape)
    mask = scans.resample(vertebra.mask, vertebra.ct_from_index, ct_from_grid, shape, order=0) > 0.5
    mean_shape = prepared.model.mean_shape(vertebra.label)
    without = registering.reconstruct_without_ct(prepared, mean_cloud, one.scene.views, one.images, start, passes)

    def carried(volume, ct_from_index, world_from_ct):
        """A volume at a pose, seen from the true CT frame."""
        return scans.resample(volume, np.linalg.inv(truth) @ world_from_ct @ ct_from_index, ct_from_grid, shape)

    mean_shape_grid = vertebra.ct_from_box @ pairs.mean_shape_grid()
    volumes = {
        "reconstruction": registering.reconstruction_in_ct(outcome.reconstruction, truth, ct_from_grid, shape),
        "the CT withheld": registering.reconstruction_in_ct(without, truth, ct_from_grid, shape),
        "mean shape": carried(mean_shape, mean_shape_grid, outcome.world_from_ct),
        "CT at the start": carried(vertebra.density, vertebra.ct_from_index, start),
        "CT at the estimate": carried(vertebra.density, vertebra.ct_from_index, outcome.world_from_ct),
    }
    near = metrics.near(mask)
    return {name: metrics.reconstruction_scores(volume, density, near) for name, volume in volumes.items()}


def _attention_shares(one):
    """Of a `Registered`: the share of the network's attention on the vertebra at the truth, and its share of the crops."""
    outcome, vertebra = one.outcome, one.prepared.vertebra
    size, cameras = outcome.xrays.shape[1:], (outcome.intrinsics, outcome.camera_from_world)
    drawn = xray.render(vertebra.density, vertebra.ct_from_index, one.truth, *cameras, size, 1.0) > 0.02
    attention = outcome.attention
    factor = size[0] // attention.shape[1]
    silhouette = camera.bin_image(drawn.astype(np.float32), factor)
    share = (attention * silhouette).sum((1, 2)) / (attention.sum((1, 2)) + 1e-9)
    return float(share.mean()), float(silhouette.mean())


@dataclasses.dataclass(frozen=True)
class Registered:
    """One registered case; truth is world_from_ct (4, 4)."""

    case: cases.Case
    scene: cases.Scene
    prepared: patients.Prepared
    images: list
    truth: np.ndarray
    outcome: registering.Outcome


def _registered(case_file, case_list, variant, passes, prepare, refine=True):
    """Registers cases one by one; `prepare` makes the `patients.Prepared` of a `cases.Volume`, once for each."""
    prepared = {}
    for case in case_list:
        scene = case_file.scenes[case.scene]
        volume, images = case_file.volumes[scene.volume], cases.read_xrays(scene, variant)
        if volume.name not in prepared:
            prepared[volume.name] = prepare(volume)
            # Loading programs is no part of a case's time.
            registering.warm_up(prepared[volume.name], scene.views, images, refine=refine)
        ready = prepared[volume.name]
        outcome = registering.register(ready, scene.views, images, case.world_from_ct, passes, refine=refine)
        yield Registered(case, scene, ready, images, cases.truth(case_file, scene), outcome)


def evaluate(case_file, variant, prepare, passes, picture_folder=None, score_volumes=True, refine=True):
    """Registers every case and scores it.

    Args:
      case_file: `cases.CaseFile` with truth and points; passes: network passes; refine: as `registering.register`.
      prepare: makes the `patients.Prepared` of a `cases.Volume`, called once for each; `patients.loader` of a workdir.
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
            results.append({"id": one.case.name, **registering.answer(outcome)})
            if score_volumes:
                attention.append(_attention_shares(one))
                if one.scene.volume not in mean_clouds:
                    mean_clouds[one.scene.volume] = registering.mean_cloud(one.prepared)
                for name, scores in _volume_scores(one, mean_clouds[one.scene.volume], passes).items():
                    for score, value in scores.items():
                        volumes.setdefault(name, {}).setdefault(score, []).append(value)
            if picture_folder is not None and one.scene.volume not in shown:
                shown.add(one.scene.volume)
                registering.write(
                    picture_folder, one.case.name, outcome, one.prepared, one.scene.views, one.images, start, one.truth
                )
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


def table(scores, variant):
    """What `evaluate` returns as text; without times, so that a resumed run prints the same."""
    start, error = scores["start_mm"], scores["error_mm"]
    lines = [
        f"registration, variant {variant}: {len(error)} cases, mTRE in mm",
        f"{'start bin':>12} {'n':>4} {'start median':>13} {'median':>8} {'p90':>8} {'< 2 mm':>8}",
    ]
    edges = np.arange(0.0, np.ceil(start.max() / metrics.BIN_MM) * metrics.BIN_MM + 1, metrics.BIN_MM)
    for low, high in [*zip(edges[:-1], edges[1:]), (0.0, np.inf)]:
        inside = (start >= low) & (start < high)
        if inside.any():
            name = "all" if np.isinf(high) else f"{low:.0f}-{high:.0f}"
            e = error[inside]
            lines.append(
                f"{name:>12} {inside.sum():4d} {np.median(start[inside]):13.2f} {np.median(e):8.2f} {np.percentile(e, 90):8.2f} "
                f"{100 * np.mean(e < metrics.SUCCESS_MM):6.1f} %"
            )
    lines.append(f"capture range: {metrics.capture_range(start, error):.0f} mm")
    if scores["volumes"]:
        share, area = scores["attention"].mean(0)
        lines += [
            "",
            f"attention (CAL): {100 * share:.0f} % of it on the vertebra, which takes {100 * area:.0f} % of the crops",
            "",
            "reconstruction, mean over cases: honest (range [0, 0.06] 1/mm, mask + 5 mm) and the paper's protocol",
            f"{'':>20} {'SSIM honest':>12} {'PSNR honest':>12} {'SSIM paper':>12} {'PSNR paper':>12}",
        ]
        for name, t in scores["volumes"].items():
            lines.append(
                f"{name:>20} {100 * t['ssim_honest'].mean():10.2f} % {t['psnr_honest'].mean():9.2f} dB "
                f"{100 * t['ssim_paper'].mean():10.2f} % {t['psnr_paper'].mean():9.2f} dB"
            )
    return "\n".join(lines)


def report(case_file, variant, workdir, passes, out, score_volumes=True):
    """Evaluates, and writes `out`/results_VARIANT.json, table_VARIANT.txt, errors_VARIANT.png and the first cases' files.

    Args:
      workdir: of `patients.prepare`; out: a folder, made if need be; the rest as in `evaluate`, which says what is raised.
    Returns:
      the table, and a line with the times.
    """
    out = pathlib.Path(out)
    scores = evaluate(case_file, variant, patients.loader(workdir), passes, out / variant, score_volumes)
    cases.write_results(out / f"results_{variant}.json", registering.PROGRAM, variant, scores["results"])
    pictures.errors(
        out / f"errors_{variant}.png", f"variant {variant}", scores["start_mm"], scores["error_mm"], scores["passes_mm"]
    )
    text = table(scores, variant)
    with files.replacing(out / f"table_{variant}.txt") as temporary:
        temporary.write_text(text + "\n")
    return text, (
        f"time a case, median: {np.median(scores['runtime_s']):.2f} s wall, {np.median(scores['cpu_s']):.2f} s CPU"
    )


def held_out(model, case_file, names, variant, passes, refine):
    """Start and final mTRE, mm, (C,) each, of a model that was not prepared for the patients, on the scenes `names`.

    Args:
      model: `checkpoint.Model`; case_file: `cases.CaseFile` with truth; passes: of the network; refine: `refinement.RefineConfig`.
    Raises:
      InputError: an unreadable scan or X-ray, an absent or cut vertebra, a scene without its true pose.
    """
    prepare = patients.unprepared_loader(model, refine)
    chosen = [case for case in case_file.cases if case.scene in names]
    errors = [
        [metrics.mtre(one.prepared.vertebra.points, T, one.truth) for T in one.outcome.trajectory]
        for one in _registered(case_file, chosen, variant, passes, prepare)
    ]
    return np.array(errors)[:, 0], np.array(errors)[:, -1]
