"""One simulated acquisition of a scan: geometry, posture, projections by material, and the images of the panel."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_pipelines.simulation import beam
from data_pipelines.simulation import carm
from data_pipelines.simulation import hardware
from data_pipelines.simulation import materials
from data_pipelines.simulation import panel
from data_pipelines.simulation import posture
from data_pipelines.simulation.articulated_body import ArticulatedBody
from radgs_jax import errors

LABELS = 29
"""Length of arrays that are indexed by VerSe number, the highest of which is 28."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Ranges (low, high) of everything that is drawn for an acquisition, and three probabilities.

    A range that spans a factor of ten or more is drawn log-uniformly, others uniformly. (0, 0) switches an effect off. The
    defaults were chosen by hand to cover fluoroscopy to radiography; a test holds them to the ranges that were asked for.
    Wider ranges make the pairs harder and more varied.

    Attributes:
      flexion_deg, lateral_bend_deg, twist_deg: largest angle between neighbouring vertebrae.
      jitter_deg, jitter_mm: largest turn about and shift along each axis of a single vertebra, beyond the spine's bend.
      kvp: peak voltage of the tube, kV.
      aluminium_mm, copper_mm: filters.
      scatter_to_primary: ratio of the two signals behind the body.
      quanta_per_mm2: quanta detected without a body.
      electronic_quanta: standard deviation of the electronic noise, in quanta per pixel.
      focal_blur_mm, detector_blur_mm: full widths at half maximum of the two blurs, in the panel's plane.
      gain_ramp: relative difference of the gain across the image.
      vignetting: relative loss of gain in the corners.
      offset_drift: largest drift of the dark level, relative to the mean signal.
      air_value: relative error of the air value.
      collimation: strength of `panel.random_collimator`.
      chance_collimator, chance_hardware: probabilities of a collimator, drawn for each view, and of implants.
      chance_picture: probability, for each view, of a vendor's 8-bit picture in place of line integrals.
    """

    flexion_deg: tuple[float, float] = (0.0, 2.5)
    lateral_bend_deg: tuple[float, float] = (0.0, 2.0)
    twist_deg: tuple[float, float] = (0.0, 1.5)
    jitter_deg: tuple[float, float] = (0.0, 6.0)
    jitter_mm: tuple[float, float] = (0.0, 3.0)
    kvp: tuple[float, float] = (70.0, 120.0)
    aluminium_mm: tuple[float, float] = (2.5, 4.0)
    copper_mm: tuple[float, float] = (0.0, 0.3)
    scatter_to_primary: tuple[float, float] = (0.1, 2.0)
    quanta_per_mm2: tuple[float, float] = (2e4, 2e6)
    electronic_quanta: tuple[float, float] = (2.0, 20.0)
    focal_blur_mm: tuple[float, float] = (0.2, 1.5)
    detector_blur_mm: tuple[float, float] = (0.2, 1.5)
    gain_ramp: tuple[float, float] = (0.0, 0.1)
    vignetting: tuple[float, float] = (0.0, 0.15)
    offset_drift: tuple[float, float] = (0.0, 0.05)
    air_value: tuple[float, float] = (0.0, 0.2)
    collimation: tuple[float, float] = (0.2, 1.0)
    chance_collimator: float = 0.4
    chance_hardware: float = 0.25
    chance_picture: float = 0.0


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Cameras and images.

    Attributes:
      device: the C-arm.
      window: pixels along each side of an image.
      binning: panel pixels along each side of an image's pixel.
      apart_deg: angle between the views, as in `carm.sample_views`.
      aim_mm: largest distance between the target and the image's centre along each axis, at the target's depth.
      vertebra_step_mm, rest_step_mm: sample distances along rays through vertebrae and through the rest of the body. Half of
        them take twice the time; twice of them blur the vertebrae along the rays.
    """

    device: carm.CArm = carm.CArm()
    window: int = 128
    binning: int = 8
    apart_deg: float | None = None
    aim_mm: float = 0.0
    vertebra_step_mm: float = 1.5
    rest_step_mm: float = 2.5


@dataclasses.dataclass(frozen=True)
class Sample:
    """One acquisition of V views of S x S pixels. All line integrals except `measured` are at 70 keV.

    Attributes:
      rest: (V, S, S) line integrals of everything except the target vertebra.
      excess: (V, S, S) what the target adds to `rest`; their sum is the clean X-ray.
      vertebra: (V, S, S) line integrals of the target alone.
      metal: (V, S, S) line integrals of implants, which are in none of the above.
      measured: (V, S, S) -log of the flat-field corrected signal.
      valid: (V, S, S) bool, inside the collimator and above the noise floor.
      intrinsics: (V, 4) fx, fy, cx, cy in pixels.
      camera_from_world: (V, 4, 4).
      world_from_box: (4, 4) the target's true pose.
      centroids: (V, LABELS, 2) pixel coordinates u, v of each movable vertebra's centroid by VerSe number, 0 where absent.
      in_sight: (V, LABELS) bool, present and inside the image.
    """

    rest: np.ndarray
    excess: np.ndarray
    vertebra: np.ndarray
    metal: np.ndarray
    measured: np.ndarray
    valid: np.ndarray
    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    world_from_box: np.ndarray
    centroids: np.ndarray
    in_sight: np.ndarray


@dataclasses.dataclass(frozen=True)
class Stance:
    """A body in a posture in front of a C-arm: what several exposures share.

    They differ in the target's own motion, the beam, the implants and the panel.

    Attributes:
      body: the body.
      target: index of the target vertebra in `body.spine.labels`.
      preset, geometry: as given to `stand`.
      intrinsics: (V, 4).
      camera_from_world: (V, 4, 4).
      world_from_ct: (4, 4) the patient's place.
      posture: of the spine.
      jitter: largest turn, degrees, and largest shift, mm, of the target about its place in the posture.
      rest, bone: (V, S, S) line integrals at 70 keV of everything except the target, and of the bone in it.
    """

    body: ArticulatedBody
    target: int
    preset: Preset
    geometry: Geometry
    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    world_from_ct: np.ndarray
    posture: posture.Posture
    jitter: tuple[float, float]
    rest: np.ndarray
    bone: np.ndarray


def stand(
    body: ArticulatedBody,
    label: int,
    rng: np.random.Generator,
    preset: Preset = Preset(),
    geometry: Geometry = Geometry(),
) -> Stance:
    """Draws cameras, the patient's place and a posture, and projects everything except the vertebra `label`.

    Raises:
      InputError: a label whose vertebra is absent or incomplete.
      ValueError: as `posture.pull_back`.
    """
    if label not in body.spine.labels:
        errors.fail("simulate", "label", label, f"a complete vertebra of the scan, one of {body.spine.labels}")
    # Each part has its own generator, so that a part that draws more numbers does not change the others.
    place, bend = rng.spawn(2)
    target = body.spine.labels.index(label)
    camera_from_world = carm.sample_views(place, geometry.device, apart_deg=geometry.apart_deg)
    world_from_ct = carm.sample_world_from_ct(place, body.spine.centres[target])
    bends = [_draw(bend, r) for r in (preset.flexion_deg, preset.lateral_bend_deg, preset.twist_deg)]
    jitter = _draw(bend, preset.jitter_deg), _draw(bend, preset.jitter_mm)
    pose = posture.draw_posture(bend, body.spine, target, bends, *jitter)
    centre = world_from_ct[:3, :3] @ body.spine.centres[target] + world_from_ct[:3, 3]
    intrinsics = _aim(place, geometry, camera_from_world, centre)
    cameras = intrinsics, camera_from_world, geometry.window
    rest, bone = body.render_rest(pose.smooth, world_from_ct, *cameras, geometry.rest_step_mm)
    rest, bone = rest.copy(), bone.copy()
    for level, motion in zip(body.spine.labels, pose.own):
        if level != label:
            images = body.render_vertebra(
                level, world_from_ct @ motion, *cameras, geometry.vertebra_step_mm, alone=False
            )
            rest += images[0]
            bone += images[1]
    return Stance(body, target, preset, geometry, *cameras[:2], world_from_ct, pose, jitter, rest, bone)


def expose(stance: Stance, rng: np.random.Generator) -> Sample:
    """One acquisition of a stance: draws the target's own motion, implants, and for each view a beam and a panel."""
    body, preset, geometry = stance.body, stance.preset, stance.geometry
    own, metal_rng, *views_rng = rng.spawn(2 + len(stance.intrinsics))
    label = body.spine.labels[stance.target]
    cameras = stance.intrinsics, stance.camera_from_world, geometry.window
    motions = stance.posture.own.copy()
    # The posture leaves the target, which is its anchor, in place: only this motion moves it.
    motions[stance.target] = posture.jitter(own, body.spine.centres[stance.target], *stance.jitter)
    world_from_box = stance.world_from_ct @ motions @ body.spine.ct_from_box
    excess, bone, vertebra = body.render_vertebra(
        label, stance.world_from_ct @ motions[stance.target], *cameras, geometry.vertebra_step_mm
    )
    bone = bone + stance.bone
    implants, metal = [], str(metal_rng.choice(materials.METALS))
    if metal_rng.uniform() < preset.chance_hardware:
        implants = hardware.draw_implants(metal_rng, world_from_box, np.stack(body.extents), stance.target)
    chords = hardware.chords(implants, *cameras, geometry.window)
    chords *= materials.attenuation_per_mm(metal, [materials.REFERENCE_KEV])[0].astype(np.float32)

    clean = stance.rest + excess
    parts = [
        {materials.SOFT_TISSUE: whole - bony, materials.BONE: bony, **({metal: iron} if implants else {})}
        for whole, bony, iron in zip(clean, bone, chords)
    ]
    pixel_mm = geometry.device.pixel_mm * geometry.binning
    measured = [measure(part, g, preset, pixel_mm) for part, g in zip(parts, views_rng)]
    centroids, in_sight = _label_places(body.spine.labels, world_from_box, *cameras)
    return Sample(
        stance.rest,
        excess,
        vertebra,
        chords,
        np.stack([image for image, _ in measured]),
        np.stack([valid for _, valid in measured]),
        stance.intrinsics.astype(np.float32),
        stance.camera_from_world.astype(np.float32),
        world_from_box[stance.target].astype(np.float32),
        centroids,
        in_sight,
    )


def simulate(
    body: ArticulatedBody,
    label: int,
    rng: np.random.Generator,
    preset: Preset = Preset(),
    geometry: Geometry = Geometry(),
) -> Sample:
    """One acquisition with the vertebra `label` as its target.

    Args:
      rng: source of everything random, for example default_rng([seed, label, index]).

    Raises:
      InputError, ValueError: as `stand`.
    """
    return expose(stand(body, label, rng, preset, geometry), rng)


def _draw(rng, bounds):
    """A number between two bounds; log-uniform where they are a factor of ten or more apart."""
    low, high = bounds
    if low > 0 and high >= 10.0 * low:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(rng.uniform(low, high))


def _aim(rng, geometry, camera_from_world, centre):
    """Intrinsics (V, 4) of windows at whole pixels of the panel, with a world point near their middles."""
    intrinsics = np.repeat(carm.intrinsics(geometry.device, geometry.binning)[None], len(camera_from_world), 0)
    for k, E in zip(intrinsics, camera_from_world):
        p = E[:3, :3] @ centre + E[:3, 3]
        aside = rng.uniform(-1.0, 1.0, 2) * geometry.aim_mm * k[0] / p[2]
        k[2:] -= np.rint(k[:2] * p[:2] / p[2] + k[2:] + aside) - geometry.window // 2
    return intrinsics


def _label_places(labels, world_from_box, intrinsics, camera_from_world, size):
    """`Sample.centroids` and `Sample.in_sight` of vertebrae at poses (K, 4, 4)."""
    points = np.einsum("vij,kj->vki", camera_from_world[:, :3, :3], world_from_box[:, :3, 3])
    points += camera_from_world[:, None, :3, 3]
    uv = points[..., :2] / points[..., 2:] * intrinsics[:, None, :2] + intrinsics[:, None, 2:]
    centroids = np.zeros((len(intrinsics), LABELS, 2), np.float32)
    in_sight = np.zeros(centroids.shape[:2], bool)
    centroids[:, list(labels)] = uv
    in_sight[:, list(labels)] = ((uv > -0.5) & (uv < size - 0.5)).all(-1)
    return centroids, in_sight


def measure(
    line_integrals: Mapping[str, np.ndarray], rng: np.random.Generator, preset: Preset, pixel_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """One view as the panel measures it.

    Args:
      line_integrals: (H, W) at 70 keV by material.
      pixel_mm: side of a pixel in the panel's plane.

    Returns:
      line integrals (H, W) after flat-field correction, and (H, W) bool, where they are valid.

    Raises:
      ValueError: an unknown material, or a peak voltage that `beam.tube_photons` refuses.
    """
    drawn = {
        field.name: _draw(rng, getattr(preset, field.name))
        for field in dataclasses.fields(preset)
        if not field.name.startswith("chance_")
    }
    spectrum = beam.tube(drawn["kvp"], drawn["aluminium_mm"], drawn["copper_mm"])
    signal, variance_ratio = beam.transmit(spectrum, line_integrals)
    blades = drawn["collimation"] if rng.uniform() < preset.chance_collimator else 0.0
    open_share = panel.random_collimator(signal.shape, blades, rng, pixel_mm)
    total = sum(line_integrals.values())
    signal = panel.blur(signal * open_share, drawn["focal_blur_mm"], pixel_mm)
    signal = panel.scatter(signal, total, drawn["scatter_to_primary"], rng, pixel_mm)
    signal = panel.blur(signal, drawn["detector_blur_mm"], pixel_mm)
    quanta = drawn["quanta_per_mm2"] * pixel_mm**2
    signal = panel.noise(signal, variance_ratio, quanta, drawn["electronic_quanta"], rng)
    signal = panel.gain_ramp(signal, drawn["gain_ramp"], rng)
    signal = panel.vignetting(signal, drawn["vignetting"], rng)
    signal = panel.offset(signal, drawn["offset_drift"], rng)
    signal = panel.air_value(signal, drawn["air_value"], rng)
    valid = (open_share > 0.5) & (signal > 1.0 / quanta)
    image = panel.line_integrals(signal, quanta)
    if rng.uniform() < preset.chance_picture:
        inside = image[valid] if valid.any() else image
        image = panel.vendor_picture(image, panel.picture_scale(inside), rng)
    return image, valid
