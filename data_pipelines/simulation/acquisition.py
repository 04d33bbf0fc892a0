"""One simulated acquisition of a scan: geometry, posture, projections by material, and the detector's images."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.ct import extraction
from data_pipelines.ct import segmentation
from data_pipelines.ct import whole_body
from data_pipelines.simulation import beam
from data_pipelines.simulation import carm
from data_pipelines.simulation import hardware
from data_pipelines.simulation import materials
from data_pipelines.simulation import panel
from data_pipelines.simulation import posture
from kernels.drr import drr
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax.geometry import resample

LABELS = 29
"""Length of per-label arrays: VerSe numbers up to 28 index them."""
VERTEBRAE = (*range(1, 20), 28, *range(20, 26))
"""VerSe numbers from head to feet; T13 stands below T12. The sacrum belongs to the rest of the body."""
MARGIN_MM = 16.0
"""How far a body may sway out of its scan's cross-section."""
_SHAPE_STEP, _WINDOW_STEP, _SLICE_STEP = 8, 8, 32  # sizes are rounded up to these: few shapes, few compilations
_DIRECTIONS = np.stack(np.meshgrid(*[np.linspace(-1.0, 1.0, 5)] * 3)).reshape(3, -1)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Ranges (low, high) of everything that is drawn; those that span a factor of ten or more are drawn by their logarithm.

    The strengths of the parts of `detector` with 0 as both ends switch a part off; `chance_*` are probabilities.
    """

    flexion_deg: tuple = (0.0, 2.5)  # largest angle between neighbouring vertebrae
    lateral_bend_deg: tuple = (0.0, 2.0)
    twist_deg: tuple = (0.0, 1.5)
    jitter_deg: tuple = (0.0, 6.0)  # largest motion of a vertebra of its own about each axis
    jitter_mm: tuple = (0.0, 3.0)
    kvp: tuple = (70.0, 120.0)
    aluminium_mm: tuple = (2.5, 4.0)
    copper_mm: tuple = (0.0, 0.3)
    scatter_to_primary: tuple = (0.1, 2.0)
    quanta_per_mm2: tuple = (2e4, 2e6)  # detected without a body: fluoroscopy to radiography
    electronic_quanta: tuple = (2.0, 20.0)
    focal_blur_mm: tuple = (0.2, 1.5)  # full widths at half maximum, in the detector's plane
    detector_blur_mm: tuple = (0.2, 1.5)
    gain_ramp: tuple = (0.0, 0.1)
    vignetting: tuple = (0.0, 0.15)
    offset_drift: tuple = (0.0, 0.05)  # of the mean signal
    air_value: tuple = (0.0, 0.2)
    collimation: tuple = (0.2, 1.0)
    chance_collimator: float = 0.4
    chance_hardware: float = 0.25


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Cameras and images: `window` pixels a side of `binning` detector pixels each, the target within `aim_mm` of the middle.

    vertebra_step_mm, rest_step_mm: sample distances of the projections.
    """

    device: carm.CArm = carm.CArm()
    window: int = 128
    binning: int = 8
    aim_mm: float = 0.0
    vertebra_step_mm: float = 1.5
    rest_step_mm: float = 2.5


@dataclasses.dataclass(frozen=True)
class Sample:
    """One acquisition of V views of S x S pixels. Line integrals are at 70 keV, but for `measured`.

    rest, excess: everything but the target vertebra, and what the target adds (their sum is the clean X-ray);
    vertebra: the target alone; metal: implants (in neither); all (V, S, S).
    measured: -log of the flat-field corrected signal; valid: (V, S, S) bool, inside the collimator and above the noise floor.
    intrinsics: (V, 4); camera_from_world: (V, 4, 4); world_from_box: (4, 4) the target's true pose.
    centroids: (V, 29, 2) pixel coordinates u, v of every articulated vertebra's centroid by VerSe number, 0 where absent;
    in_sight: (V, 29) bool, present and inside the image.
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


class ArticulatedBody:
    """A scan in parts that move: every complete vertebra on a fine crop, and the rest, muscle in their place, on a coarse grid.

    Vertebrae that the scan cuts stay with the rest. Where a moved vertebra meets more than the muscle that it is an excess
    over (another vertebra, a rib) attenuations add; where it meets lung, muscle comes short.
    """

    def __init__(self, scan, rest_mm=3.0, vertebra_mm=1.5):
        """rest_mm, vertebra_mm: largest voxel sides of the two; whole voxels of the scan are averaged.

        Raises:
          InputError: a scan without a complete vertebra.
        """
        whole = segmentation.complete_labels(scan.labels)
        labels = [label for label in VERTEBRAE if label in whole]
        if not labels:
            errors.fail(scan.patient, "labels", sorted(scan.boxes), "a complete vertebra among them")
        frames = np.stack([extraction.ct_from_box(scan, label) for label in labels])
        self.spine = posture.Spine(tuple(labels), frames)
        mu = attenuation.from_hounsfield(scan.hu)
        bone = materials.bone_from_hounsfield(scan.hu)
        fill = float(attenuation.from_hounsfield(np.array(whole_body.FILL_HU, np.float32)))
        crops, self.extents = [], []
        for label, frame in zip(labels, frames):
            box = tuple(slice(s.start - 1, s.stop + 1) for s in scan.boxes[label])
            mask = scan.labels[box] == label
            crop_from = resample.part_from_index(scan.ct_from_index, [s.start for s in box])
            parts = [
                resample.block_average(np.where(mask, a, 0), crop_from, vertebra_mm) for a in (mu[box], bone[box], 1)
            ]
            ct = np.argwhere(mask) @ crop_from[:3, :3].T + crop_from[:3, 3]
            self.extents.append(np.percentile((ct - frame[:3, 3]) @ frame[:3, :3], [1, 99], axis=0))
            outermost = ct[np.unique(np.argmax(ct @ _DIRECTIONS, axis=0))]
            crops.append(([volume.astype(np.float32) for volume, _ in parts], parts[0][1], outermost))
            mu[box][mask], bone[box][mask] = fill, 0.0
        self._crops = []
        for (alone, bony, filled), affine, outermost in crops:
            volumes = [alone - fill * filled, bony, alone]
            padded = [np.pad(v, [(0, -n % _SHAPE_STEP) for n in v.shape]) for v in volumes]
            self._crops.append((tuple(jnp.asarray(v) for v in padded), affine, outermost))
        (rest, self.ct_from_index), (rest_bone, _) = (_coarse(a, scan.ct_from_index, rest_mm) for a in (mu, bone))
        self._rest = jnp.asarray(rest), jnp.asarray(rest_bone)

    def render_rest(self, smooth, world_from_ct, intrinsics, camera_from_world, size, step_mm=2.5):
        """Line integrals at 70 keV of the rest of the body in a posture: two arrays (V, S, S), all of it and its bone.

        Args:
          smooth: (K, 4, 4) motions of `posture.Posture`; world_from_ct: (4, 4).
          intrinsics: (V, 4); camera_from_world: (V, 4, 4); size: S; step_mm: sample distance.
        Raises:
          ValueError: as `posture.pull_back`.
        """
        spacing = np.linalg.norm(self.ct_from_index[:3, :3], axis=0)
        margin = int(MARGIN_MM / spacing[:2].max())
        X, Y, _ = self._rest[0].shape
        first, count = self._slices_in_sight(world_from_ct, intrinsics, camera_from_world, size, margin)
        affines = posture.pull_back(self.spine, smooth, self.ct_from_index, first, count)
        volumes = posture.warp(self._rest, jnp.asarray(affines, jnp.float32), (X + 2 * margin, Y + 2 * margin), margin)
        ct_from_warped = resample.part_from_index(self.ct_from_index, [-margin, -margin, first])
        voxel_from_camera = np.linalg.inv(camera_from_world @ world_from_ct @ ct_from_warped)[:, :3]
        images = _project(volumes, *_float32(voxel_from_camera, intrinsics), size, step_mm, 1)
        return tuple(np.asarray(image) for image in images)

    def _slices_in_sight(self, world_from_ct, intrinsics, camera_from_world, size, margin):
        """First and number of the rest's slices that the images' rays meet, rounded up to few different numbers."""
        X, Y, Z = self._rest[0].shape
        u, v = np.meshgrid(*[np.linspace(-0.5, size - 0.5, 3)] * 2)
        low, high = [], []
        for k, E in zip(intrinsics, camera_from_world):
            index_from_camera = np.linalg.inv(E @ world_from_ct @ self.ct_from_index)
            d = np.stack([(u.ravel() - k[2]) / k[0], (v.ravel() - k[3]) / k[1], np.ones(9)], 1)
            depth = np.linspace(0.0, 2.0 * E[2, 3], 129)[1:, None, None]
            index = (depth * d) @ index_from_camera[:3, :3].T + index_from_camera[:3, 3]
            sides = (index[..., :2] > -margin - 1) & (index[..., :2] < [X + margin, Y + margin])
            place = index[..., 2][sides.all(-1)]
            if len(place):
                low.append(place.min())
                high.append(place.max())
        first = int(np.clip(math.floor(min(low, default=0)) - 2, 0, Z - 2))
        last = int(np.clip(math.ceil(max(high, default=0)) + 2, first + 2, Z))
        count = min(_round_up(last - first, _SLICE_STEP), Z)
        return min(first, Z - count), count

    def render_vertebra(self, label, world_from_ct, intrinsics, camera_from_world, size, step_mm=1.5, alone=True):
        """Line integrals of one vertebra at its pose: excess over muscle, its bone, and (if `alone`) itself; (V, S, S) each.

        Each pixel is the mean of four rays, as a detector integrates.

        Args:
          label: VerSe number; world_from_ct: (4, 4), of the vertebra; the rest as in `render_rest`.
        Raises:
          ValueError: a label that the body has no complete vertebra of.
        """
        volumes, ct_from_index, outermost = self._crops[self.spine.labels.index(label)]
        volumes = volumes if alone else volumes[:2]
        camera_from_ct = camera_from_world @ world_from_ct
        points = camera_from_ct[:, :3, :3] @ outermost.T + camera_from_ct[:, :3, 3:]
        uv = points[:, :2] / points[:, 2:] * intrinsics[:, :2, None] + intrinsics[:, 2:, None]
        # Interpolation reaches a voxel beyond the outermost voxels' centres, block averages half a voxel more.
        reach = 2.0 * np.linalg.norm(ct_from_index[:3, :3], axis=0).max() * intrinsics[:, 0] / points[:, 2].min(-1) + 1
        corner = np.floor(uv.min(-1) - reach[:, None]).astype(int)
        side = _round_up(np.ceil(uv.max(-1) + reach[:, None] - corner).max() + 1, _WINDOW_STEP)
        if side >= _round_up(size, _WINDOW_STEP):
            side, corner = _round_up(size, _WINDOW_STEP), np.zeros_like(corner)
        if (corner >= size).any(1).all() or (corner + side <= 0).any(1).all():
            return [np.zeros((len(intrinsics), size, size), np.float32) for _ in volumes]
        moved = np.array(intrinsics, np.float64)
        moved[:, 2:] -= corner
        index_from_camera = np.linalg.inv(camera_from_ct @ ct_from_index)[:, :3]
        windows = _project(volumes, *_float32(index_from_camera, moved), side, step_mm, 2)
        return [_place(np.asarray(window), corner, size) for window in windows]


def _place(windows, corners, size):
    """Windows (V, side, side) with their corners (V, 2) in images (V, size, size) that are 0 elsewhere."""
    images = np.zeros((len(corners), size, size), np.float32)
    for image, window, (column, row) in zip(images, windows, corners):
        window = window[max(-row, 0) :, max(-column, 0) :]
        target = image[max(row, 0) :, max(column, 0) :][: window.shape[0], : window.shape[1]]
        target += window[: target.shape[0], : target.shape[1]]
    return images


def _float32(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def _round_up(n, step):
    return -(-int(n) // step) * step


def _coarse(array, ct_from_index, spacing_mm):
    """`whole_body.coarse_body` with a voxel of air around its cross-section, and its affine."""
    array, affine, _ = whole_body.coarse_body(array, ct_from_index, spacing_mm)
    affine[:3, 3] -= affine[:3, :3] @ [1, 1, 0]
    return np.pad(array, ((1, 1), (1, 1), (0, 0))).astype(np.float32, copy=False), affine


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _project(volumes, voxel_from_camera, intrinsics, size, step_mm, oversample):
    """Line integrals (V, size, size) of each volume, each pixel the mean of oversample^2 rays."""
    scale = jnp.asarray([oversample] * 4, jnp.float32)
    fine = intrinsics * scale + 0.5 * (oversample - 1) * jnp.asarray([0.0, 0.0, 1.0, 1.0])
    side = size * oversample
    images = [drr(volume, voxel_from_camera, fine, side, side, step_mm=step_mm) for volume in volumes]
    return tuple(i.reshape(-1, size, oversample, size, oversample).mean((2, 4)) for i in images)


@dataclasses.dataclass(frozen=True)
class Stance:
    """A body in a posture before a C-arm: what exposures share that differ in the target's own place, the beam and the detector.

    target: the vertebra's place in `body.spine.labels`; jitter: largest turn and shift of its own, degrees and mm.
    rest, bone: (V, S, S) line integrals at 70 keV of everything but the target, all of it and its bone.
    """

    body: ArticulatedBody
    target: int
    preset: Preset
    geometry: Geometry
    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    world_from_ct: np.ndarray
    posture: posture.Posture
    jitter: tuple
    rest: np.ndarray
    bone: np.ndarray


def stand(body, label, rng, preset=Preset(), geometry=Geometry()):
    """Draws cameras, the patient's place and a posture, and projects all but the vertebra `label`: a `Stance`.

    Args:
      body: `Body`; rng: np.random.Generator, which drives all of it.
    Raises:
      InputError: the body has no complete vertebra of that label.
      ValueError: as `posture.pull_back`.
    """
    if label not in body.spine.labels:
        errors.fail("simulate", "label", label, f"a complete vertebra of the scan, one of {body.spine.labels}")
    # Parts have generators of their own, so that one that draws more does not change the others.
    place, bend = rng.spawn(2)
    target = body.spine.labels.index(label)
    camera_from_world = carm.sample_views(place, geometry.device)
    world_from_ct = carm.sample_world_from_ct(place, body.spine.centres[target])
    bends = [_draw(bend, r) for r in (preset.flexion_deg, preset.lateral_bend_deg, preset.twist_deg)]
    jitter = _draw(bend, preset.jitter_deg), _draw(bend, preset.jitter_mm)
    pose = posture.draw(bend, body.spine, target, bends, *jitter)
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


def expose(stance, rng):
    """One acquisition (`Sample`) of a `Stance`: the target at a place of its own, a beam, implants and a detector.

    Args:
      rng: np.random.Generator, which drives all of it.
    """
    body, preset, geometry = stance.body, stance.preset, stance.geometry
    own, metal_rng, *views_rng = rng.spawn(2 + len(stance.intrinsics))
    label = body.spine.labels[stance.target]
    cameras = stance.intrinsics, stance.camera_from_world, geometry.window
    motions = stance.posture.own.copy()
    # The posture leaves its anchor, the target, where it is: what moves the target is this alone.
    motions[stance.target] = posture.jitter(own, body.spine.centres[stance.target], *stance.jitter)
    world_from_box = stance.world_from_ct @ motions @ body.spine.ct_from_box
    excess, bone, vertebra = body.render_vertebra(
        label, stance.world_from_ct @ motions[stance.target], *cameras, geometry.vertebra_step_mm
    )
    bone = bone + stance.bone
    implants, metal = [], str(metal_rng.choice(materials.METALS))
    if metal_rng.uniform() < preset.chance_hardware:
        implants = hardware.draw(metal_rng, world_from_box, np.stack(body.extents), stance.target)
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


def simulate(body, label, rng, preset=Preset(), geometry=Geometry()):
    """One acquisition (`Sample`) with the vertebra `label` as its target: a function of the generator's state alone.

    Args:
      body: `Body`; rng: np.random.Generator, for example default_rng([seed, label, index]).
    Raises:
      InputError, ValueError: as `stand`.
    """
    return expose(stand(body, label, rng, preset, geometry), rng)


def _draw(rng, bounds):
    low, high = bounds
    if low > 0 and high >= 10.0 * low:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))
    return float(rng.uniform(low, high))


def _aim(rng, geometry, camera_from_world, centre):
    """Intrinsics (V, 4) of windows of the detector, at whole pixels of it, with a point near their middles."""
    intrinsics = np.repeat(carm.intrinsics(geometry.device, geometry.binning)[None], len(camera_from_world), 0)
    for k, E in zip(intrinsics, camera_from_world):
        p = E[:3, :3] @ centre + E[:3, 3]
        aside = rng.uniform(-1.0, 1.0, 2) * geometry.aim_mm * k[0] / p[2]
        k[2:] -= np.rint(k[:2] * p[:2] / p[2] + k[2:] + aside) - geometry.window // 2
    return intrinsics


def _label_places(labels, world_from_box, intrinsics, camera_from_world, size):
    points = np.einsum("vij,kj->vki", camera_from_world[:, :3, :3], world_from_box[:, :3, 3])
    points += camera_from_world[:, None, :3, 3]
    uv = points[..., :2] / points[..., 2:] * intrinsics[:, None, :2] + intrinsics[:, None, 2:]
    centroids = np.zeros((len(intrinsics), LABELS, 2), np.float32)
    in_sight = np.zeros(centroids.shape[:2], bool)
    centroids[:, list(labels)] = uv
    in_sight[:, list(labels)] = ((uv > -0.5) & (uv < size - 0.5)).all(-1)
    return centroids, in_sight


def measure(line_integrals, rng, preset, pixel_mm):
    """One view as the detector gives it: line integrals (H, W) after flat-field correction, and where they are valid (H, W).

    Args:
      line_integrals: dict from material to (H, W) at 70 keV; rng: drives all of it; preset: `Preset`.
      pixel_mm: in the detector's plane.
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
    open_share = panel.collimator(signal.shape, blades, rng, pixel_mm)
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
    return panel.line_integrals(signal, quanta), valid
