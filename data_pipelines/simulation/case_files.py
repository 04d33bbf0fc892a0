"""Writes case files with simulated X-rays whose true poses are known."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from data_pipelines import cases
from data_pipelines import simulation
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.simulation import carm
from data_pipelines.simulation import crude_masks
from data_pipelines.simulation import quick
from radgs_jax import levels
from radgs_jax.geometry import camera
from radgs_jax.geometry import distortion
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay

POSTURES = {"rigid": cases.VARIANTS, "bent": ("artic", "real")}
"""How a body may have moved since its CT, and the variants of X-rays that exist for each."""
BENT_WINDOW = 240
"""Pixels along each side of a bent scene's X-rays, which are centred on the vertebra: 180 mm at the isocentre of the default
C-arm, as much as the whole panel shows. Half of it shows little more than the vertebra."""
BINNING = 4
"""Panel pixels along each side of an image's pixel, chosen by hand; half of it takes four times the time and disk space."""


@dataclasses.dataclass(frozen=True)
class InputErrors:
    """What a case file says wrong about its patient and X-rays, beyond what the X-rays themselves show.

    Attributes:
      mask_mm: each mask's border wanders by up to this or less (`crude_masks.wandering`); 0 leaves it.
      camera_sd: root mean square shift, mm, and turn about the isocentre, degrees, of the cameras.
      distortion: X-rays are stretched, as an image intensifier's, by up to this or less at the field's border, relative to it.
    """

    mask_mm: float = 0.0
    camera_sd: tuple[float, float] = (0.0, 0.0)
    distortion: float = 0.0


def simulated_cases(
    path: pathlib.Path | str,
    subjects: Sequence[tuple[str, pathlib.Path | str, pathlib.Path | str]],
    labels: Sequence[int],
    scenes: int,
    starts_mm: Sequence[tuple[float, float]],
    seed: int,
    faults: quick.PanelFaults,
    variants: Sequence[str] | None = None,
    posture: str = "rigid",
    articulation: float = 1.0,
    errors: InputErrors = InputErrors(),
    apart_deg: float | None = None,
    on_done: Callable[[], object] = lambda: None,
) -> pathlib.Path:
    """Writes a case file whose X-rays are simulated from scans, with points, true poses and start poses.

    The X-rays are rendered at a finer resolution than simulated pairs. An existing case file is kept, whatever it was made
    from.

    Args:
      path: of the case file; the X-ray files are written into the same folder.
      subjects: (name, CT path, mask path) of each scan.
      labels: VerSe numbers of the vertebrae.
      scenes: number of acquisitions of each vertebra.
      starts_mm: bins (low, high) of the start poses' mTRE; each scene has one case per bin.
      seed: of all random draws.
      faults: faults of the panel in the variant 'real' of a rigid posture.
      variants: arrays of the X-ray files, from `POSTURES[posture]`; None for all.
      posture: 'rigid': everything except the vertebra moves as one, with the physics of `quick`; 'bent': every vertebra moves
        by itself, with the postures, implants and physics of `simulation.simulate`, and `faults` and `articulation` are
        unused.
      articulation: strength of `carm.sample_articulation` in a rigid posture.
      errors: of what the case file says; a scene keeps its true cameras as `views_true`, and `distortions` of its views.
      apart_deg: angle between the views, as in `carm.sample_views`.
      on_done: called after each scene.

    Returns:
      The case file's path.

    Raises:
      InputError: an unreadable scan, an absent or cut vertebra.
      ValueError: an unknown posture or variant.
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
            given_mask = mask
            if errors.mask_mm:
                given_mask = path.with_name(f"{path.stem}_{name}_mask.nii.gz")
                _write_crude_mask(given_mask, scan, label, errors.mask_mm, np.random.default_rng([seed, number, label]))
            document["volumes"][name] = {
                "patient": subject,
                "vertebra": levels.level_name(label),
                "full_ct": _relative(ct, path.parent),
                "full_mask": _relative(given_mask, path.parent),
                "full_label": int(label),
                "centre": centre.tolist(),
                "points": vertebra.points.round(3).tolist(),
            }
            if posture == "rigid":
                acquire = functools.partial(
                    _rigid_scene, quick.RigidBody(whole, vertebra), faults, articulation, apart_deg, variants
                )
            else:
                acquire = functools.partial(_bent_scene, whole, vertebra, apart_deg, variants)
            for index in range(scenes):
                scene = f"{name}_s{index}"
                images, intrinsics, extrinsics, world_from_ct, more = acquire(
                    np.random.default_rng([seed, number, label, index])
                )
                if errors.distortion:
                    rng = np.random.default_rng([seed, number, label, index, 3])
                    images, more["distortions"] = _stretched(images, intrinsics, extrinsics, errors.distortion, rng)
                xray_path = path.with_name(f"{path.stem}_{scene}.npz")
                files.write_npz(xray_path, **{v: image.astype(np.float16) for v, image in images.items()})
                if any(errors.camera_sd):
                    more["views_true"] = _views(intrinsics, extrinsics, images)
                    rng = np.random.default_rng([seed, number, label, index, 2])
                    off_mm, off_deg = np.abs(rng.normal(size=2)) * errors.camera_sd
                    extrinsics = carm.cameras_off(extrinsics, off_mm, off_deg, rng, about_source=False)
                document["scenes"].append(
                    {
                        "id": scene,
                        "volume": name,
                        "T_gt": world_from_ct.tolist(),
                        **more,
                        "views": _views(intrinsics, extrinsics, images),
                        "xrays": xray_path.name,
                    }
                )
                # A generator of their own gives start poses that do not depend on how the scene was made.
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


def _views(intrinsics, extrinsics, images):
    """The entries of a scene's views in the case file, of images {variant: (V, H, W)}."""
    size = next(iter(images.values())).shape[1:]
    return [
        camera_files.camera_json(camera.Camera(K, E, *size), view)
        for K, E, view in zip(intrinsics, extrinsics, carm.VIEWS)
    ]


def _stretched(images, intrinsics, extrinsics, most, rng):
    """The images (V, H, W) of each variant, each view stretched by a pincushion of its own, and its coefficients."""
    coefficients = [np.array([-most, most * rng.uniform(0.0, 0.3), 0.0]) * rng.uniform(0.5, 1.0) for _ in intrinsics]
    stretch = lambda image, K, E, k: (
        distortion.distorted(XRay(image, None, camera.Camera(K, E, *image.shape)), k).line_integrals
    )
    changed = {
        v: np.stack(list(map(stretch, stack, intrinsics, extrinsics, coefficients))) for v, stack in images.items()
    }
    return changed, [k.tolist() for k in coefficients]


def _write_crude_mask(path, scan, label, most_mm, rng):
    """Writes the scan's masks with a border of one vertebra that wanders by up to half of `most_mm` to all of it."""
    wandering = functools.partial(crude_masks.wandering, most_mm=most_mm * rng.uniform(0.5, 1.0), rng=rng)
    nifti.write_nifti(path, crude_masks.changed(scan, label, wandering).labels, scan.ct_from_index)


def _rigid_scene(body, faults, articulation, apart_deg, variants, rng):
    """A scene in which everything except the vertebra moves as one.

    Returns:
      Images (V, H, W) by variant, intrinsics (V, 4), camera_from_world (V, 4, 4), world_from_ct (4, 4), and further entries
      of the scene in the case file.
    """
    device = carm.CArm()
    intrinsics = np.stack([carm.intrinsics(device, BINNING)] * len(carm.VIEWS))
    size = (device.detector_px // BINNING,) * 2
    centre = body.vertebra.ct_from_box[:3, 3]
    world_from_ct = carm.sample_world_from_ct(rng, centre)
    centre_world = world_from_ct[:3, :3] @ centre + world_from_ct[:3, 3]
    world_from_rest = rigid_host.motion_about(centre_world, carm.sample_articulation(rng, articulation)) @ world_from_ct
    extrinsics = carm.sample_views(rng, device, apart_deg=apart_deg)
    images = _variants(body, world_from_ct, world_from_rest, intrinsics, extrinsics, size, faults, rng, variants)
    return images, intrinsics, extrinsics, world_from_ct, {"T_rest": world_from_rest.tolist()}


def _bent_scene(body, vertebra, apart_deg, variants, rng):
    """As `_rigid_scene`, of a `simulation.ArticulatedBody` whose vertebrae each move by themselves."""
    geometry = simulation.Geometry(
        window=BENT_WINDOW, binning=BINNING, apart_deg=apart_deg, vertebra_step_mm=0.75, rest_step_mm=1.5
    )
    sample = simulation.simulate(
        body,
        vertebra.label,
        rng,
        simulation.Preset(chance_collimator=0.3, chance_hardware=0.5, chance_picture=0.25),
        geometry,
    )
    images = {"artic": sample.rest + sample.excess, "real": sample.measured}
    world_from_ct = rigid_host.nearest_rigid(
        sample.world_from_box.astype(np.float64) @ np.linalg.inv(vertebra.ct_from_box)
    )
    cameras = (a.astype(np.float64) for a in (sample.intrinsics, sample.camera_from_world))
    metal = bool(sample.metal.max() > 0)
    return {v: images[v] for v in variants}, *cameras, world_from_ct, {"metal": metal}


def _relative(target, folder):
    """A path relative to a folder that contains it; otherwise absolute."""
    with contextlib.suppress(ValueError):
        return str(pathlib.Path(target).resolve().relative_to(pathlib.Path(folder).resolve()))
    return str(pathlib.Path(target).resolve())


def _variants(body, world_from_ct, world_from_rest, intrinsics, extrinsics, size, faults, rng, wanted):
    """Images (V, H, W) of the wanted variants of a rigid scene."""
    excess, alone = body.render_vertebra(world_from_ct, intrinsics, extrinsics, size)
    images = {
        "easy": lambda: alone,
        "full": lambda: body.render_rest(world_from_ct, intrinsics, extrinsics, size, 1.5) + excess,
        "artic": lambda: body.render_rest(world_from_rest, intrinsics, extrinsics, size, 1.5) + excess,
    }
    made = {v: images[v]() for v in wanted if v in images}
    if "real" in wanted:
        ideal = made["artic"] if "artic" in made else images["artic"]()
        made["real"] = quick.degrade(ideal, rng, faults)
    return made
