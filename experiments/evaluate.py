"""Scores a prepared patient on a case file with known poses: registration and reconstruction, beside trivial baselines."""

import pathlib

import numpy as np

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pairs
from data_pipelines import scan as scans
from experiments import patients
from experiments import pictures
from experiments import progress
from experiments import registering
from radgs_jax import metrics


def _volume_scores(outcome, prepared, start, truth):
    """Reconstruction scores of ours and of the baselines on the evaluation grid in CT axes."""
    vertebra = prepared.vertebra
    ct_from_grid, shape = scans.evaluation_grid(vertebra), scans.GRID_SHAPE
    density = scans.resample(vertebra.density, vertebra.ct_from_index, ct_from_grid, shape)
    mask = scans.resample(vertebra.mask, vertebra.ct_from_index, ct_from_grid, shape, order=0) > 0.5
    mean_shape = prepared.model.mean_shapes.get(vertebra.label, prepared.model.mean_shapes[0]).astype(np.float32)

    def carried(volume, ct_from_index, world_from_ct):
        """A volume at a pose, seen from the true CT frame."""
        return scans.resample(volume, np.linalg.inv(truth) @ world_from_ct @ ct_from_index, ct_from_grid, shape)

    mean_shape_grid = vertebra.ct_from_box @ pairs.mean_shape_grid()
    volumes = {
        "reconstruction": registering.reconstruction_in_ct(outcome, truth, ct_from_grid, shape),
        "mean shape": carried(mean_shape, mean_shape_grid, outcome.world_from_ct),
        "CT at the start": carried(vertebra.density, vertebra.ct_from_index, start),
        "CT at the estimate": carried(vertebra.density, vertebra.ct_from_index, outcome.world_from_ct),
    }
    return {name: metrics.reconstruction_scores(volume, density, mask) for name, volume in volumes.items()}


def evaluate(case_file, variant, workdir, passes, picture_folder=None, score_volumes=True):
    """Registers every case and scores it.

    Args:
      case_file: `cases.CaseFile` with truth and points; workdir: of `patients.prepare`; passes: network passes.
      picture_folder: where to write the files of the first case of each vertebra, or None.
      score_volumes: also score the reconstructions, which takes longer than registering.
    Returns:
      dict of arrays over cases: start_mm, error_mm, passes_mm (C, passes + 1), runtime_s, cpu_s; 'volumes': name -> score ->
      (C,); and 'results' for `cases.write_results`.
    """
    identity = patients.Identity()
    rows = {k: [] for k in ("start_mm", "error_mm", "passes_mm", "runtime_s", "cpu_s", "results")}
    volumes, prepared, shown = {}, {}, set()
    with progress.bar(len(case_file.cases), f"evaluate {variant}") as bar:
        for case in case_file.cases:
            scene = case_file.scenes[case.scene]
            volume = case_file.volumes[scene.volume]
            if volume.name not in prepared:
                target = patients.Target(volume.patient, volume.full_ct, volume.full_mask, volume.full_label)
                prepared[volume.name] = patients.load(workdir, target, identity)
            ready, images = prepared[volume.name], cases.read_xrays(scene, variant)
            if not rows["results"]:  # the first call compiles; it is not timed
                registering.register(ready, scene.views, images, case.world_from_ct, passes)
            outcome = registering.register(ready, scene.views, images, case.world_from_ct, passes)
            truth = cases.truth(case_file, scene)
            points = np.asarray(case_file.raw["volumes"][volume.name]["points"])
            errors = [metrics.mtre(points, T, truth) for T in outcome.trajectory]
            for key, value in (
                ("start_mm", errors[0]),
                ("error_mm", errors[-1]),
                ("passes_mm", errors),
                ("runtime_s", outcome.runtime_s),
                ("cpu_s", outcome.cpu_s),
                (
                    "results",
                    {
                        "id": case.name,
                        "T": outcome.world_from_ct.tolist(),
                        "runtime_s": outcome.runtime_s,
                        "cpu_s": outcome.cpu_s,
                    },
                ),
            ):
                rows[key].append(value)
            if score_volumes:
                for name, scores in _volume_scores(outcome, ready, case.world_from_ct, truth).items():
                    for score, value in scores.items():
                        volumes.setdefault(name, {}).setdefault(score, []).append(value)
            if picture_folder is not None and volume.name not in shown:
                shown.add(volume.name)
                registering.write(
                    picture_folder, case.name, outcome, ready, scene.views, images, case.world_from_ct, truth
                )
            bar.update()
    result = {k: np.array(v) for k, v in rows.items() if k != "results"}
    return {
        **result,
        "results": rows["results"],
        "volumes": {n: {s: np.array(v) for s, v in t.items()} for n, t in volumes.items()},
    }


def table(scores, variant):
    """The scores as text; without times, so that a resumed run prints the same."""
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
        lines += [
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

    Returns:
      the table, and a line with the times.
    """
    out = pathlib.Path(out)
    scores = evaluate(case_file, variant, workdir, passes, out / variant, score_volumes)
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


def held_out(model, case_file, names, variant, passes):
    """Start and final mTRE, mm, (C,) each, of a model that was not prepared for the patients, on the scenes `names`."""
    start, error, ready = [], [], {}
    for case in case_file.cases:
        if case.scene not in names:
            continue
        scene = case_file.scenes[case.scene]
        volume = case_file.volumes[scene.volume]
        if volume.name not in ready:
            scan = scans.read_scan(volume.full_ct, volume.full_mask, volume.patient)
            vertebra = scans.extract(scan, volume.full_label, model.config.gaussians, volume.full_mask)
            ready[volume.name] = patients.Prepared(model, vertebra, patients.fine_cloud(vertebra), volume.patient)
        prepared, truth = ready[volume.name], cases.truth(case_file, scene)
        images = cases.read_xrays(scene, variant)
        outcome = registering.register(prepared, scene.views, images, case.world_from_ct, passes)
        for kept, pose in ((start, case.world_from_ct), (error, outcome.world_from_ct)):
            kept.append(metrics.mtre(prepared.vertebra.points, pose, truth))
    return np.array(start), np.array(error)
