"""Data on disk: phantom patients, shards of training pairs, and case files with simulated X-rays. Resumable, deterministic."""

import concurrent.futures
import contextlib
import multiprocessing
import pathlib

import numpy as np

from data_pipelines import carm
from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pairs
from data_pipelines import phantom
from data_pipelines import scan as scans
from data_pipelines import xray

ORIENTATIONS = ("RAS", "LPS", "PIR", "LAS")
"""Storage orders that phantoms are written in, in turn: everything downstream must cope with any."""


def scan_paths(folder, subject):
    """CT and label map of a subject in the VerSe layout."""
    return (
        pathlib.Path(folder) / f"sub-{subject}_ct.nii.gz",
        pathlib.Path(folder) / f"sub-{subject}_seg-vert_msk.nii.gz",
    )


def phantoms(folder, seeds, config, on_done=lambda: None):
    """Writes the phantoms that are not there yet, on all cores; returns [(subject, ct path, mask path)].

    The centroid JSON is written last, so its presence means that a subject is complete.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    subjects = {f"phantom{seed:05d}": seed for seed in seeds}
    missing = {s: seed for s, seed in subjects.items() if not (folder / f"sub-{s}_seg-subreg_ctd.json").exists()}
    for _ in range(len(subjects) - len(missing)):
        on_done()
    jobs = [(seed, config, folder, s, ORIENTATIONS[seed % len(ORIENTATIONS)]) for s, seed in missing.items()]
    if len(jobs) <= 2:
        for job in jobs:
            phantom.make_and_write(*job)
            on_done()
    else:
        # Spawned, not forked: the parent may hold jax's threads.
        context = multiprocessing.get_context("spawn")
        workers = min(len(jobs), multiprocessing.cpu_count())
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            for job in concurrent.futures.as_completed([pool.submit(phantom.make_and_write, *job) for job in jobs]):
                job.result()
                on_done()
    return [(subject, *scan_paths(folder, subject)) for subject in subjects]


def simulated_pairs(folder, subjects, labels, count, seed, config, gaussian_count, on_done=lambda: None):
    """Shards of simulated pairs of every (subject, label), made where they are not there yet; returns the shards.

    Args:
      subjects: [(subject, ct path, mask path)].
    """
    folder = pathlib.Path(folder) / pairs.config_hash(config, count, seed, gaussian_count)
    shards = []
    for number, (subject, ct, mask) in enumerate(subjects):
        scan = whole = None
        for label in labels:
            path = folder / f"{subject}_{label}.npz"
            if not path.exists():
                if scan is None:
                    scan = scans.read_scan(ct, mask, subject)
                    whole = scans.WholeBody(scan, config.rest_spacing_mm)
                # The subject's number keeps two patients from sharing random draws.
                made = pairs.simulate(scan, whole, label, count, [seed, number], config, gaussian_count, mask)
                pairs.save(path, made)
            shards.append(pairs.load(path))
            on_done()
    return shards


def simulated_cases(
    path, subjects, labels, scenes, starts_mm, seed, detector, variants=cases.VARIANTS, on_done=lambda: None
):
    """Writes a case file whose X-rays are simulated from scans, with points, truth and start poses; returns its path.

    Rendered finer than training pairs, from the native scan, with a detector that training never saw.

    Args:
      subjects: [(subject, ct path, mask path)]; labels: VerSe numbers; scenes: acquisitions per vertebra.
      starts_mm: bins [(low, high)] of start mTRE, one case each per scene; detector: `xray.Detector` of the 'real' variant.
    """
    path = pathlib.Path(path)
    if path.exists():
        return path
    device = carm.CArm()
    k = 4
    intrinsics = np.stack([carm.intrinsics(device, k)] * len(carm.VIEWS))
    size = (device.detector_px // k,) * 2
    document = {"format": cases.CASES_FORMAT, "seed": seed, "volumes": {}, "scenes": [], "cases": []}
    for number, (subject, ct, mask) in enumerate(subjects):
        scan = scans.read_scan(ct, mask, subject)
        whole = scans.WholeBody(scan, 2.0)
        for label in labels:
            name = f"{subject}_{scans.level_name(label)}"
            vertebra = scans.extract(scan, label, 64, mask)
            body = xray.Body(whole, vertebra)
            centre = vertebra.ct_from_box[:3, 3]
            document["volumes"][name] = {
                "patient": subject,
                "vertebra": scans.level_name(label),
                "full_ct": _relative(ct, path.parent),
                "full_mask": _relative(mask, path.parent),
                "full_label": int(label),
                "centre": centre.tolist(),
                "points": vertebra.points.round(3).tolist(),
            }
            for index in range(scenes):
                rng = np.random.default_rng([seed, number, label, index])
                scene = f"{name}_s{index}"
                world_from_ct = carm.sample_world_from_ct(rng, centre)
                centre_world = world_from_ct[:3, :3] @ centre + world_from_ct[:3, 3]
                world_from_rest = carm.motion_about(centre_world, carm.sample_articulation(rng)) @ world_from_ct
                extrinsics = carm.sample_views(rng, device)
                images = _variants(
                    body, world_from_ct, world_from_rest, intrinsics, extrinsics, size, detector, rng, variants
                )
                xray_path = path.parent / f"{scene}.npz"
                files.write_npz(xray_path, **{v: image.astype(np.float16) for v, image in images.items()})
                views = [
                    cases.view_json(cases.View(K, E, *size), view)
                    for K, E, view in zip(intrinsics, extrinsics, carm.VIEWS)
                ]
                document["scenes"].append(
                    {
                        "id": scene,
                        "volume": name,
                        "T_gt": world_from_ct.tolist(),
                        "T_rest": world_from_rest.tolist(),
                        "views": views,
                        "xrays": xray_path.name,
                    }
                )
                for bin_index, (low, high) in enumerate(starts_mm):
                    start = carm.start_of_mtre(rng, world_from_ct, centre, vertebra.points, rng.uniform(low, high))
                    document["cases"].append(
                        {
                            "id": f"{scene}_b{bin_index}",
                            "scene": scene,
                            "T_init": start.tolist(),
                            "bin_mm": [float(low), float(high)],
                        }
                    )
                on_done()
    files.write_json(path, document)
    return path


def _relative(target, folder):
    with contextlib.suppress(ValueError):
        return str(pathlib.Path(target).resolve().relative_to(pathlib.Path(folder).resolve()))
    return str(pathlib.Path(target).resolve())


def _variants(body, world_from_ct, world_from_rest, intrinsics, extrinsics, size, detector, rng, wanted):
    excess, alone = body.render_vertebra(world_from_ct, intrinsics, extrinsics, size)
    images = {
        "easy": lambda: alone,
        "full": lambda: body.render_rest(world_from_ct, intrinsics, extrinsics, size, 1.5) + excess,
        "artic": lambda: body.render_rest(world_from_rest, intrinsics, extrinsics, size, 1.5) + excess,
    }
    made = {v: images[v]() for v in wanted if v in images}
    if "real" in wanted:
        ideal = made["artic"] if "artic" in made else images["artic"]()
        made["real"] = xray.degrade(ideal, rng, detector)
    return made
