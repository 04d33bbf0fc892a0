"""Data on disk: phantom patients, stores of training pairs, and case files with simulated X-rays. Resumable, deterministic."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines import carm
from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pair_store
from data_pipelines import pairs
from data_pipelines import phantom
from data_pipelines import scan as scans
from data_pipelines import simulator
from data_pipelines import xray

ORIENTATIONS = ("RAS", "LPS", "PIR", "LAS")
"""Storage orders that phantoms are written in, in turn: everything downstream must cope with any."""
POSTURES = {"rigid": cases.VARIANTS, "bent": ("artic", "real")}
"""How bodies in case files have moved, and the variants that there are of each."""
BENT_WINDOW = 240
"""Pixels along a bent scene's X-rays, round the vertebra."""
A_SHARD = 128
"""Most pairs in a shard, and four times the vertebrae in one: a loader holds the files of all shards open."""


def scan_paths(folder, subject):
    """Paths (ct, mask) of a subject in the VerSe layout; nothing is opened."""
    return (
        pathlib.Path(folder) / f"sub-{subject}_ct.nii.gz",
        pathlib.Path(folder) / f"sub-{subject}_seg-vert_msk.nii.gz",
    )


def phantoms(folder, seeds, config, on_done=lambda: None):
    """Writes the phantoms that are not there yet, on all cores; returns [(subject, ct path, mask path)].

    The centroid JSON is written last, so its presence means that a subject is complete, of whatever config: names tell
    seeds only.

    Args:
      folder: made if need be; seeds: one a subject; config: `phantom.PhantomConfig`; on_done: called after each subject.
    Raises:
      ValueError: a config that makes no spine.
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


def simulated_pairs(
    folder, vertebrae, count, seed, config, gaussian_count, ct_count=1, label_map=None, on_done=lambda records: None
):
    """`count` simulated pairs and `ct_count` CT pairs of every vertebra, made where they are not there yet.

    Args:
      folder: where such sets lie, each in a folder named by its content, so that none is ever taken for another.
      vertebrae: [(patient, ct path, mask path, label)]; seed: of everything random; config: `pairs.PairConfig`.
      label_map: what numbers the masks hold, as `scan.read_scan`.
      on_done: called with the number of records that are there now, of 1 + count + ct_count a vertebra.
    Returns:
      a `pairs.PairSet`.
    Raises:
      InputError: an unreadable scan, an absent or cut vertebra, or a damaged store.
    """
    names, places = _named(vertebrae, label_map)
    which = pairs.OfEach(pairs.Vertebrae(names, gaussian_count), int(count), config)
    # Whole vertebrae in a shard where they fit, so that a process prepares each once.
    shard_size = A_SHARD // which.count * which.count or A_SHARD
    return _pair_set(folder, which, seed, pairs.simulated, ct_count, shard_size, pairs.Archive(places), on_done)


def measured_pairs(
    folder, case_file, names, variant, config, gaussian_count, pixel_mm, ct_count=1, on_done=lambda records: None
):
    """One pair of each scene of known pose in `names`, made where they are not there yet.

    Args:
      folder, ct_count, on_done: as in `simulated_pairs`, of 1 + ct_count records a vertebra and one a scene.
      case_file: `cases.CaseFile`; names: of scenes; variant: which array of their X-ray files.
      config: `pairs.PairConfig`; pixel_mm: what X-rays are binned to, at the isocentre.
    Returns:
      a `pairs.PairSet`.
    Raises:
      InputError: unreadable files, a scene without a true pose, an absent or cut vertebra, or a damaged store.
    """
    chosen = [case_file.scenes[name] for name in names]
    volumes = [v for v in case_file.volumes.values() if any(scene.volume == v.name for scene in chosen)]
    vertebrae, places = _named([(v.patient, v.full_ct, v.full_mask, v.full_label) for v in volumes])
    archive = pairs.Archive(places, {scene.name: (scene, cases.truth(case_file, scene)) for scene in chosen})
    # One volume after the other, so that each is prepared once.
    scenes = tuple(
        (scene.name, owner, files.sha256(scene.xrays))
        for owner, volume in enumerate(volumes)
        for scene in chosen
        if scene.volume == volume.name
    )
    which = pairs.Measured(
        pairs.Vertebrae(vertebrae, gaussian_count), files.sha256(case_file.path), scenes, variant, pixel_mm, config
    )
    return _pair_set(folder, which, 0, pairs.measured, ct_count, A_SHARD, archive, on_done)


def _named(vertebrae, label_map=None):
    """((digest, label), ...) and the scans of a `pairs.Archive`, of [(patient, ct path, mask path, label)]."""
    digests = {}
    for _, ct, mask, _ in vertebrae:
        if (ct, mask) not in digests:
            digests[ct, mask] = pairs.scan_digest(ct, mask, label_map)
    names = tuple((digests[ct, mask], int(label)) for _, ct, mask, label in vertebrae)
    return names, {digests[ct, mask]: (patient, ct, mask, label_map) for patient, ct, mask, _ in vertebrae}


def _pair_set(folder, which, seed, make_pair, ct_count, shard_size, archive, on_done):
    """The `pairs.PairSet` of `which`, a `pairs.OfEach` or `pairs.Measured`, in a folder below `folder`."""
    ct_pairs = pairs.OfEach(which.vertebrae, int(ct_count), which.config)
    folder = pathlib.Path(folder) / pairs.config_hash(which, ct_count, seed)
    shared = dict(context=archive, on_done=on_done)
    # The vertebrae first: one that is absent or cut is found before hours of simulation.
    count = len(which.vertebrae.names)
    vertebrae = _store(folder / "vertebrae", pairs.vertebra, count, which.vertebrae, shard_size=A_SHARD // 4, **shared)
    moved = _store(folder / "ct_pairs", pairs.moved, len(ct_pairs), ct_pairs, seed, shard_size=16 * A_SHARD, **shared)
    source = _store(folder / "pairs", make_pair, len(which), which, seed, shard_size=shard_size, **shared)
    return pairs.PairSet(source, moved, vertebrae)


def _store(folder, make_example, count, config, seed=0, *, on_done, **rest):
    """`pair_store.write` by all of jax's processes together, on one file system."""
    write = functools.partial(
        pair_store.write, folder, make_example, count, config, seed, processes=_workers(count), **rest
    )
    if jax.process_count() > 1:
        write(process_index=jax.process_index(), process_count=jax.process_count(), on_done=on_done)
        multihost_utils.sync_global_devices(str(folder))
        return write()
    return write(on_done=on_done)


def _workers(count):
    """How many processes make `count` examples.

    One keeps 1.5 cores busy, since rendering is parallel in itself, and starting one takes as long as 60 pairs: one for
    two cores and 256 pairs. An accelerator that renders is not shared.
    """
    if jax.default_backend() != "cpu":
        return 1
    return max(1, min(pair_store.usable_cores() // 2, count // 256))


def simulated_cases(
    path,
    subjects,
    labels,
    scenes,
    starts_mm,
    seed,
    detector,
    variants=None,
    posture="rigid",
    articulation=1.0,
    on_done=lambda: None,
):
    """Writes a case file whose X-rays are simulated from scans, with points, truth and start poses; returns its path.

    Rendered finer than simulated pairs. A case file that is there is kept, whatever it was made from.

    Args:
      subjects: [(subject, ct path, mask path)]; labels: VerSe numbers; scenes: acquisitions per vertebra; seed: of all draws.
      starts_mm: bins [(low, high)] of start mTRE, one case each per scene; detector: `xray.Detector` of the 'real' variant.
      variants: arrays of the X-ray files, among `POSTURES[posture]`, None for all; on_done: called after each scene.
      posture: 'rigid', everything but the vertebra moved as one and `detector`'s physics; or 'bent', every vertebra at a place
        of its own, with `simulator`'s postures, metal and physics: `detector` and `articulation` have no say.
      articulation: of 'rigid', as `carm.sample_articulation` has it.
    Raises:
      InputError: an unreadable scan, an absent or cut vertebra.
      ValueError: a posture or a variant that is none.
    """
    if posture not in POSTURES:
        raise ValueError(f"posture: found {posture!r}, wanted one of {', '.join(POSTURES)}")
    known = POSTURES[posture]
    variants = known if variants is None else variants
    if unknown := [v for v in variants if v not in known]:
        raise ValueError(f"variants: found {unknown[0]!r}, wanted some of {', '.join(known)}")
    path = pathlib.Path(path)
    if path.exists():
        return path
    document = {"format": cases.CASES_FORMAT, "seed": seed, "volumes": {}, "scenes": [], "cases": []}
    for number, (subject, ct, mask) in enumerate(subjects):
        scan = scans.read_scan(ct, mask, subject)
        whole = scans.WholeBody(scan, 2.0) if posture == "rigid" else simulator.Body(scan, 2.0, 1.0)
        for label in labels:
            name = f"{subject}_{scans.level_name(label)}"
            vertebra = scans.extract(scan, label, 64, mask)
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
            if posture == "rigid":
                acquire = functools.partial(_rigid_scene, xray.Body(whole, vertebra), detector, articulation, variants)
            else:
                acquire = functools.partial(_bent_scene, whole, vertebra, variants)
            for index in range(scenes):
                scene = f"{name}_s{index}"
                images, intrinsics, extrinsics, world_from_ct, more = acquire(
                    np.random.default_rng([seed, number, label, index])
                )
                xray_path = path.with_name(f"{path.stem}_{scene}.npz")
                files.write_npz(xray_path, **{v: image.astype(np.float16) for v, image in images.items()})
                size = next(iter(images.values())).shape[1:]
                views = [
                    cases.view_json(cases.View(K, E, *size), view)
                    for K, E, view in zip(intrinsics, extrinsics, carm.VIEWS)
                ]
                document["scenes"].append(
                    {
                        "id": scene,
                        "volume": name,
                        "T_gt": world_from_ct.tolist(),
                        **more,
                        "views": views,
                        "xrays": xray_path.name,
                    }
                )
                # Of their own generator: scenes that differ in how they were made have the same starts.
                rng = np.random.default_rng([seed, number, label, index, 1])
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


def _rigid_scene(body, detector, articulation, variants, rng):
    """Images by variant, intrinsics (V, 4), camera_from_world (V, 4, 4), world_from_ct, and what else the case file says."""
    device, k = carm.CArm(), 4
    intrinsics = np.stack([carm.intrinsics(device, k)] * len(carm.VIEWS))
    size = (device.detector_px // k,) * 2
    centre = body.vertebra.ct_from_box[:3, 3]
    world_from_ct = carm.sample_world_from_ct(rng, centre)
    centre_world = world_from_ct[:3, :3] @ centre + world_from_ct[:3, 3]
    world_from_rest = carm.motion_about(centre_world, carm.sample_articulation(rng, articulation)) @ world_from_ct
    extrinsics = carm.sample_views(rng, device)
    images = _variants(body, world_from_ct, world_from_rest, intrinsics, extrinsics, size, detector, rng, variants)
    return images, intrinsics, extrinsics, world_from_ct, {"T_rest": world_from_rest.tolist()}


def _bent_scene(body, vertebra, variants, rng):
    """As `_rigid_scene`, of a `simulator.Body`."""
    geometry = simulator.Geometry(window=BENT_WINDOW, binning=4, vertebra_step_mm=0.75, rest_step_mm=1.5)
    # Case files do not say which pixels count, so nothing is collimated.
    sample = simulator.simulate(body, vertebra.label, rng, simulator.Preset(chance_collimator=0.0), geometry)
    images = {"artic": sample.rest + sample.excess, "real": sample.measured}
    world_from_ct = carm.nearest_rigid(sample.world_from_box.astype(np.float64) @ np.linalg.inv(vertebra.ct_from_box))
    cameras = (a.astype(np.float64) for a in (sample.intrinsics, sample.camera_from_world))
    metal = bool(sample.metal.max() > 0)
    return {v: images[v] for v in variants}, *cameras, world_from_ct, {"metal": metal}


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
