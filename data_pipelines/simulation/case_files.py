"""Case files with simulated X-rays of known pose."""

import contextlib
import functools
import pathlib

import numpy as np

from data_pipelines import cases
from data_pipelines import simulation
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.simulation import carm
from data_pipelines.simulation import quick
from radgs_jax import levels
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid_host

POSTURES = {"rigid": cases.VARIANTS, "bent": ("artic", "real")}
"""How bodies in case files have moved, and the variants that there are of each."""
BENT_WINDOW = 240
"""Pixels along a bent scene's X-rays, round the vertebra."""


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
      starts_mm: bins [(low, high)] of start mTRE, one case each per scene; detector: `quick.PanelFaults` of the 'real' variant.
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
        whole = whole_body.WholeBody(scan, 2.0) if posture == "rigid" else simulation.ArticulatedBody(scan, 2.0, 1.0)
        for label in labels:
            name = f"{subject}_{levels.level_name(label)}"
            vertebra = extraction.extract(scan, label, 64, mask)
            centre = vertebra.ct_from_box[:3, 3]
            document["volumes"][name] = {
                "patient": subject,
                "vertebra": levels.level_name(label),
                "full_ct": _relative(ct, path.parent),
                "full_mask": _relative(mask, path.parent),
                "full_label": int(label),
                "centre": centre.tolist(),
                "points": vertebra.points.round(3).tolist(),
            }
            if posture == "rigid":
                acquire = functools.partial(
                    _rigid_scene, quick.RigidBody(whole, vertebra), detector, articulation, variants
                )
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
                    camera_files.view_json(camera.Camera(K, E, *size), view)
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
    world_from_rest = rigid_host.motion_about(centre_world, carm.sample_articulation(rng, articulation)) @ world_from_ct
    extrinsics = carm.sample_views(rng, device)
    images = _variants(body, world_from_ct, world_from_rest, intrinsics, extrinsics, size, detector, rng, variants)
    return images, intrinsics, extrinsics, world_from_ct, {"T_rest": world_from_rest.tolist()}


def _bent_scene(body, vertebra, variants, rng):
    """As `_rigid_scene`, of a `simulator.Body`."""
    geometry = simulation.Geometry(window=BENT_WINDOW, binning=4, vertebra_step_mm=0.75, rest_step_mm=1.5)
    # Case files do not say which pixels count, so nothing is collimated.
    sample = simulation.simulate(body, vertebra.label, rng, simulation.Preset(chance_collimator=0.0), geometry)
    images = {"artic": sample.rest + sample.excess, "real": sample.measured}
    world_from_ct = rigid_host.nearest_rigid(
        sample.world_from_box.astype(np.float64) @ np.linalg.inv(vertebra.ct_from_box)
    )
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
        made["real"] = quick.degrade(ideal, rng, detector)
    return made
