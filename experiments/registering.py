"""Registers one case with a prepared vertebra, and writes everything a case leaves behind."""

import dataclasses
import functools
import itertools
import pathlib
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import carm
from data_pipelines import files
from data_pipelines import pairs
from data_pipelines import scan as scans
from experiments import detectors
from experiments import programs
from radgs_jax import confidence
from radgs_jax import detection
from radgs_jax import gaussians
from radgs_jax import grid
from radgs_jax import refinement
from radgs_jax import rigid
from radgs_jax.models import matching
from radgs_jax.models import radgs_reg
from radgs_jax.models import recm

PROGRAM = "radgs_jax"
POSE_BLUR_MM = 1.0
"""Blur of a reported reconstruction: two views do not say more about where its edges are."""
BARE = 0.3
"""Median line integral below which an X-ray shows a bone in air: behind a body it is above 1."""
TURN = np.radians(15.0)
"""Where an answer is not trusted, further starts are turned by so much against it about each of the vertebra's axes: most
answers that are wrong by less than 5 mm are caught in a wrong orientation."""
WIDE_MM = tuple((0.0, 0.0, along) for along in (-24.0, -12.0, 12.0, 24.0))
"""And others lie so far along the spine from where it started: up to the neighbours' places and between."""
FAR_MM = tuple(itertools.product((-24.0, 0.0, 24.0), (-24.0, 0.0, 24.0), (-48.0, -24.0, 0.0, 24.0, 48.0)))
"""Where it still is not trusted, starts all round the given one, in the vertebra's axes."""
PITCH_MM = {3: 17.0, 8: 19.0, 12: 21.0, 16: 23.5, 18: 27.0, 20: 32.5, 22: 35.5, 24: 35.5}
"""Distance from a vertebra's centre to the next one's below, of adults on average, by VerSe number; between them, in proportion."""
GLANCE = 5
"""Steps of the coarsest level that are taken in a neighbour's place."""
WALK = 4
"""An answer's neighbours are asked whether the vertebra is theirs, and theirs in turn, so many times at most."""
SETTLED_MM, SETTLINGS = 0.2, 3
"""A refinement whose last step was longer goes on from where it is, so many times at most."""
SEARCH_KEEP = 3
"""Of a search's starts, so many go on from the coarsest level."""
DEFORMATION_MM = 0.5
"""What a bone may differ from its CT by: of the rest of what the views say, registration is the reason."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What registering a case gives.

    world_from_ct: (4, 4) estimate, float64; trajectory: (1 + passes + levels, 4, 4) world_from_ct, the start first, then after
    each pass of the network and each level of the refinement; reconstruction: Gaussians in the world frame (effect branch);
    xrays, intrinsics, camera_from_world, attention (V, h, w): of the last crops; refined: `refinement.Refined` in numpy, None
    without refinement; confidence: `confidence.Confidence`, None without refinement or calibration; times in s.
    """

    world_from_ct: np.ndarray
    trajectory: np.ndarray
    reconstruction: gaussians.Gaussians
    xrays: np.ndarray
    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    attention: np.ndarray
    refined: refinement.Refined | None
    confidence: confidence.Confidence | None
    runtime_s: float
    cpu_s: float


def register(prepared, views, images, start_world_from_ct, passes, valid=None, refine=True):
    """Registers one case: nothing enters but the prepared vertebra, X-rays, cameras and the start pose.

    Args:
      prepared: `patients.Prepared`; views: `cases.View`s; images: (H_v, W_v) line integrals; start_world_from_ct: (4, 4).
      valid: (H_v, W_v) bool, the pixels that count; None: all.
      refine: False for the network's passes alone.
    Returns:
      `Outcome`.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    vertebra, config = prepared.vertebra, prepared.model.config
    valid = [np.ones(image.shape, bool) for image in images] if valid is None else valid
    seen = pyramid(views, images, valid, [config.pixel_mm])
    start = start_world_from_ct @ vertebra.ct_from_box
    result = _network(prepared, seen, start, vertebra.cloud, passes)
    boxes, refined = list(result.trajectory[1:]), None
    judged = None
    if refine:
        refined, judged = refine_until_trusted(prepared, views, images, valid, result.world_from_box, start)
        boxes += list(refined.trajectory)
    box_from_ct = np.linalg.inv(vertebra.ct_from_box)
    poses = [start_world_from_ct, *(carm.nearest_rigid(T) @ box_from_ct for T in np.asarray(boxes, np.float64))]
    if refine:
        result = _network(prepared, seen, boxes[-1], vertebra.cloud, 1)
    reconstruction = _in_world(prepared, result, refine)
    runtime, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Outcome(
        poses[-1],
        np.stack(poses),
        reconstruction,
        result.xrays,
        result.intrinsics,
        np.stack([view.camera_from_world for view in views]),
        result.reconstruction.attention[0].mean(-1),
        refined,
        judged,
        runtime,
        cpu,
    )


def _in_world(prepared, result, refined):
    """The reconstruction of a `radgs_reg.Registration` as Gaussians in the world frame; refined: as in `_as_bone`."""
    if prepared.model.config.head == "anchored":
        clouds = prepared.vertebra.cloud, prepared.fine_cloud
        effect = _as_bone(*clouds, result.reconstruction.matches, registered=refined)
    else:
        effect = jax.tree.map(lambda a: a[0], result.reconstruction.effect)
    return jax.block_until_ready(_move(effect, result.trajectory[-2]))


def warm_up(prepared, views, images, valid=None, refine=True):
    """Loads or compiles what `register` runs of a case, as far as no wider search is needed; nothing is registered.

    Arguments as in `register`.
    """
    vertebra, config = prepared.vertebra, prepared.refine
    with futures.ThreadPoolExecutor() as pool:
        compiling = []
        if refine:
            seen = pyramid(views, images, valid, [level.pixel_mm for level in config.levels])
            starts = [vertebra.ct_from_box] * 2
            for levels in (_keeping(config, 1), _glance(config)):
                arguments, options = _refine_arguments(prepared.parts, seen, starts, config, levels)
                compiling.append(pool.submit(_refine.lower(*arguments, **options).compile))
        # XLA compiles and loads what others compute beside.
        seen = pyramid(views, images, valid, [prepared.model.config.pixel_mm])
        network = _network(prepared, seen, vertebra.ct_from_box, vertebra.cloud, passes=1)
        _in_world(prepared, network, refine)
        for program in compiling:
            program.result()


def mean_cloud(prepared):
    """The mean shape of the vertebra's level as Gaussians (N,), box frame."""
    mean_shape = prepared.model.mean_shape(prepared.vertebra.label)
    return gaussians.from_density(mean_shape, pairs.mean_shape_grid(), prepared.model.config.gaussians)


def reconstruct_without_ct(prepared, cloud, views, images, start_world_from_ct, passes):
    """What the X-rays give where the CT gives nothing: another shape stands in for it, from the start pose on, unrefined.

    Args:
      prepared: `patients.Prepared`, of which the network is used; cloud: Gaussians (N,), box frame, as of `mean_cloud`;
        the others as in `register`.
    Returns:
      Gaussians (N,) in the world frame.
    """
    seen = pyramid(views, images, None, [prepared.model.config.pixel_mm])
    start = start_world_from_ct @ prepared.vertebra.ct_from_box
    result = _network(prepared, seen, start, cloud, passes)
    effect = jax.tree.map(lambda a: a[0], result.reconstruction.effect)
    return gaussians.move(effect, jnp.asarray(result.trajectory[-2]))


def answer(outcome):
    """What the result format says of an `Outcome`, but for the case's id."""
    found = {"T": outcome.world_from_ct.tolist(), "runtime_s": outcome.runtime_s, "cpu_s": outcome.cpu_s}
    if outcome.confidence is not None:
        judged = outcome.confidence
        found |= {"accepted": judged.accepted, "uncertainty_mm": judged.uncertainty_mm}
        found["covariance"] = judged.covariance.tolist()
    return found


def at_resolution(views, images, valid, pixel_mm):
    """`refinement.Views` of a case's X-rays, binned to about `pixel_mm` at the isocentre; arguments as in `register`."""
    small, inside, intrinsics, _ = pairs.binned_views(views, images, valid, pixel_mm)
    return refinement.Views(
        [programs.on_device(image) for image in small],
        [jax.device_put(mask) for mask in inside],
        programs.on_device(intrinsics),
    )


@functools.partial(programs.kept, static="config")
def _pass(params, images, valid, intrinsics, camera_from_world, world_from_box, cloud, config):
    return radgs_reg.register(
        params, config, images, valid, intrinsics, camera_from_world, world_from_box, cloud, passes=1
    )


def _network(prepared, seen, world_from_box, cloud, passes):
    """`radgs_reg.register` in numpy, of a pass that is one program, however many there are of it; seen: `Pyramid` of one level."""
    params, config, (level,) = prepared.model.params, prepared.model.config, seen.levels
    views = level.images, level.valid, level.intrinsics, seen.camera_from_world
    trajectory = [np.asarray(world_from_box, np.float32)]
    for _ in range(passes):
        found = _pass(params, *views, trajectory[-1], cloud, config=config)
        trajectory.append(np.asarray(found.world_from_box))
    return jax.device_get(found).replace(trajectory=np.stack(trajectory))


_refine = programs.kept(refinement.refine, static="config")
_move = programs.kept(gaussians.move)


def neighbours_mm(label):
    """Where along the spine the vertebrae below and above one of VerSe number `label` lie, by `PITCH_MM`, mm."""
    below, above = np.interp([label, label - 1], list(PITCH_MM), list(PITCH_MM.values()))
    return -below, above


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """A case's X-rays on the device. levels: `refinement.Views` at each resolution; camera_from_world: (V, 4, 4)."""

    levels: list
    camera_from_world: jax.Array


def pyramid(views, images, valid, pixels_mm):
    """The `Pyramid` of a case's X-rays, binned to about each of `pixels_mm` at the isocentre; the others as in `register`."""
    valid = [np.ones(image.shape, bool) for image in images] if valid is None else valid
    levels = [at_resolution(views, images, valid, pixel_mm) for pixel_mm in pixels_mm]
    return Pyramid(levels, programs.on_device([view.camera_from_world for view in views]))


def _refine_arguments(parts, seen, starts, config, levels):
    """Arguments and options of `_refine` at the first so many levels, which these stand in for."""
    starts = programs.on_device(starts)
    chosen = dataclasses.replace(config, levels=tuple(levels))
    return (parts, seen.levels[: len(levels)], seen.camera_from_world, starts), {"config": chosen}


def _glance(config):
    """The levels of a look into a neighbour's place."""
    return (dataclasses.replace(config.levels[0], iterations=GLANCE),)


def _keeping(config, keep):
    """The levels of a refinement of which so many starts go on from the coarsest."""
    first, *others = config.levels
    return (dataclasses.replace(first, keep=keep), *others)


def _shift(shift_mm):
    """A translation (4, 4)."""
    motion = np.eye(4)
    motion[:3, 3] = shift_mm
    return motion


def refine_pose(parts, seen, starts, config, places_mm, keep=1):
    """`refinement.refine` from several starts, and again from its end until it has settled; numpy.

    Vertebrae look alike: the places of the answer's neighbours along the spine are tried too, and the best is its rival.

    Args:
      parts: `refinement.Parts`; seen: `Pyramid`; starts: K >= 2 poses (4, 4) of the vertebra's box.
      config: `refinement.RefineConfig`; places_mm: two, as of `neighbours_mm`; keep: of the starts, how many go on from the
        coarsest level.
    """

    def run(poses, levels):
        arguments, options = _refine_arguments(parts, seen, poses, config, levels)
        return jax.device_get(_refine(*arguments, **options))

    def settled(refined):
        for _ in range(SETTLINGS):
            if not refined.step_mm > SETTLED_MM:
                break
            # Two starts, as most cases have, are one program; what had been a rival still is one.
            rival = {name: getattr(refined, name) for name in ("rival_mm", "margin")}
            refined = run([refined.world_from_box] * 2, config.levels).replace(**rival)
        return refined

    refined = settled(run(starts, _keeping(config, keep)))
    for _ in range(WALK):
        places = [refined.world_from_box @ _shift((0.0, 0.0, along)) for along in places_mm]
        other = run(places, _glance(config))
        away_mm = np.linalg.norm(other.world_from_box[:3, 3] - refined.world_from_box[:3, 3])
        if away_mm < refinement.APART_MM:
            break
        margin = refined.fit[0] - other.fit[0]
        # A place that fits better at a glance than the answer does in detail is looked into.
        if other.fit[0] < refined.fit[-1]:
            if margin < refined.margin:
                refined = refined.replace(rival_mm=away_mm, margin=margin)
            break
        other = settled(run(places, config.levels))
        better, worse = (other, refined) if other.fit[-1] > refined.fit[-1] else (refined, other)
        margin = better.fit[-1] - worse.fit[-1]
        refined = better.replace(rival_mm=away_mm, margin=min(margin, better.margin))
        if better is not other:
            break
    return refined


def searches(parts, views, images, valid, estimate, start, config, label):
    """`refinement.Refined` of a network's pose, then the best after each wider search, of `confidence.SEARCHES`: an iterator.

    Args:
      parts, config: as in `refine_pose`; views, images, valid: as in `register`; estimate, start: (4, 4) world_from_box, the
        network's and its start; label: VerSe number.
    """
    seen, places_mm = pyramid(views, images, valid, [level.pixel_mm for level in config.levels]), neighbours_mm(label)
    refined = refine_pose(parts, seen, [estimate, start], config, places_mm)
    yield refined
    turns = [carm.matrix(angle * axis, [0.0, 0.0, 0.0]) for axis in np.eye(3) for angle in (-TURN, TURN)]
    for poses, shifts_mm in (((estimate, start), WIDE_MM), ((start,), FAR_MM)):
        starts = [refined.world_from_box @ turn for turn in turns]
        starts += [pose @ _shift(shift) for pose in poses for shift in shifts_mm]
        again = refine_pose(parts, seen, starts, config, places_mm, SEARCH_KEEP)
        if again.fit[-1] > refined.fit[-1]:
            refined = again
        yield refined


def centred_points(refined, vertebra):
    """Points (N, 3), mm, of a `scan.Vertebra` at its `refinement.Refined` pose, about its centre in world axes."""
    in_box = (vertebra.points - vertebra.ct_from_box[:3, 3]) @ vertebra.ct_from_box[:3, :3]
    return in_box @ refined.world_from_box[:3, :3].T


def refine_until_trusted(prepared, views, images, valid, estimate, start):
    """`refinement.Refined` and `confidence.Confidence` of a network's pose, with wider searches where that is not trusted.

    Without a calibration nothing is judged, and the first refinement is all.

    Args:
      prepared, views, images, valid: as in `register`; estimate, start: (4, 4) world_from_box, the network's and its start.
    """
    bare = max(np.median(image[v]) if v.any() else np.inf for image, v in zip(images, valid)) < BARE
    parts, calibration, vertebra = prepared.bare if bare else prepared.parts, prepared.calibration, prepared.vertebra
    judged = None
    found = searches(parts, views, images, valid, estimate, start, prepared.refine, vertebra.label)
    for count, refined in enumerate(found):
        if calibration is None:
            break
        judged = confidence.judge(refined, centred_points(refined, vertebra), calibration, count)
        if judged.accepted:
            break
    return refined, judged


@functools.partial(programs.kept, static="registered")
def _as_bone(anchors, fine, matches, registered):
    """The reconstruction in fine Gaussians (M,) of a bone that is its CT's but for `DEFORMATION_MM`.

    Where the pose has been refined, the rigid part of what the matches say is the network's error, not the bone's place.
    """
    motion, _ = matching.align(matches)
    motion = motion[0]
    # Each match's part beyond the rigid motion, drawn back as far as it is less certain than that the bone is its CT.
    beyond = matches.target[0] - rigid.apply(motion, matches.source[0])
    known = matches.information[0]
    inverse = jnp.linalg.inv(known + DEFORMATION_MM**-2 * jnp.eye(3))
    own = rigid.apply_rotation(inverse, rigid.apply_rotation(known, beyond))
    inner = jnp.eye(4) if registered else motion
    chosen = jax.tree.map(lambda a: a[0], matching.subset(jax.tree.map(lambda a: a[None], anchors), len(own)))
    bone = gaussians.move(chosen, inner)
    bone = bone.replace(mean=bone.mean + own)
    return gaussians.blur(recm.carry_detail(bone, chosen, fine), POSE_BLUR_MM)


def reconstruction_in_ct(reconstruction, world_from_ct, ct_from_index, shape):
    """The density, 1/mm, of Gaussians in the world frame, carried to CT axes by the inverse of `world_from_ct` (4, 4).

    ct_from_index (4, 4), shape: the grid there that it is sampled on.
    """
    ct = gaussians.move(reconstruction, jnp.asarray(np.linalg.inv(world_from_ct), jnp.float32))
    # Centred first: CT coordinates of hundreds of mm would cost float32 its digits.
    middle = ct_from_index[:3, :3] @ (0.5 * (np.array(shape) - 1)) + ct_from_index[:3, 3]
    affine = np.array(ct_from_index)
    affine[:3, 3] -= middle
    ct = ct.replace(mean=ct.mean - jnp.asarray(middle, jnp.float32))
    return np.asarray(gaussians.voxelize(ct, grid.VoxelGrid(jnp.asarray(affine, jnp.float32), tuple(shape))))


def itk_transform(world_from_ct):
    """The pose (4, 4) as the text of an ITK transform (LPS) that 3D Slicer loads.

    ITK stores the map from the fixed frame (world) back to the moving one (CT); Slicer shows its inverse, which carries the CT
    into the C-arm's frame.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    T = lps @ np.linalg.inv(world_from_ct) @ lps
    numbers = " ".join(f"{v:.17g}" for v in [*T[:3, :3].ravel(), *T[:3, 3]])
    return (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
    )


def write(folder, name, outcome, prepared, views, images, start_world_from_ct, true_world_from_ct=None):
    """Writes a case's files into `folder`/`name`, made if need be: pose, ITK transform, volumes, Gaussians and the picture.

    Args:
      outcome: `Outcome`; prepared, views, images, start_world_from_ct: as in `register`.
      true_world_from_ct: (4, 4), to be drawn; None without one.
    """
    # Half a second of imports that registering does without.
    from experiments import pictures

    folder = pathlib.Path(folder) / name
    vertebra = prepared.vertebra
    files.write_json(
        folder / "pose.json",
        {
            "world_from_ct": outcome.world_from_ct.tolist(),
            "start_world_from_ct": np.asarray(start_world_from_ct).tolist(),
            "passes_world_from_ct": outcome.trajectory.tolist(),
            **{k: v for k, v in answer(outcome).items() if k in ("accepted", "uncertainty_mm", "covariance")},
            "units": "mm",
            "frames": "CT: RAS+ mm; world: the C-arm's",
        },
    )
    with files.replacing(folder / "pose.tfm") as temporary:
        temporary.write_text(itk_transform(outcome.world_from_ct))
    centre = outcome.world_from_ct[:3, :3] @ vertebra.ct_from_box[:3, 3] + outcome.world_from_ct[:3, 3]
    world_from_index = np.eye(4)
    world_from_index[:3, 3] = np.round(centre) - 0.5 * (np.array(scans.GRID_SHAPE) - 1)
    moved = scans.resample(
        vertebra.density, outcome.world_from_ct @ vertebra.ct_from_index, world_from_index, scans.GRID_SHAPE
    )
    files.write_nifti(folder / "ct_vertebra_in_world.nii.gz", moved, world_from_index)
    reconstruction = reconstruction_in_ct(outcome.reconstruction, np.eye(4), world_from_index, scans.GRID_SHAPE)
    files.write_nifti(folder / "reconstruction_in_world.nii.gz", reconstruction, world_from_index)
    files.write_npz(folder / "gaussians.npz", **gaussians.to_arrays(outcome.reconstruction))
    poses = {"start": start_world_from_ct, "estimate": outcome.world_from_ct}
    if true_world_from_ct is not None:
        poses["truth"] = true_world_from_ct
    pictures.registration(folder / "picture.png", name, views, images, vertebra, poses, outcome, reconstruction, moved)


def start_from_points(views, pixels, vertebra):
    """A start pose from the vertebra's centre clicked in every view, with the CT's own orientation.

    Args:
      views: `cases.View`s; pixels: one (u, v) per view; vertebra: `scan.Vertebra`.
    Returns:
      world_from_ct (4, 4) and the rms distance of the rays from their common point, mm.
    Raises:
      InputError: a single view, or rays that do not meet.
    """
    lines = [detection.rays(np.array([p]), v.intrinsics, v.camera_from_world) for v, p in zip(views, pixels)]
    sources, directions = np.stack([source for source, _ in lines]), np.concatenate([d for _, d in lines])
    try:
        centre, _ = detection.triangulate(sources, directions, np.ones(len(lines)))
    except ValueError:
        found = "a single view" if len(lines) == 1 else "rays that are parallel or meet in a source"
        files.fail("flags", "--points", found, "the vertebra's centre in views from two sides")
    away = centre - sources
    miss = away - (away * directions).sum(1, keepdims=True) * directions
    world_from_ct = np.eye(4)
    world_from_ct[:3, 3] = centre - vertebra.ct_from_box[:3, 3]
    return world_from_ct, float(np.sqrt((miss**2).sum(1).mean()))


def start_from_detector(detector, xrays, vertebra):
    """A start pose from the vertebra found in the X-rays.

    Args:
      detector: `detectors.Model`; xrays: `radiograph.Radiograph` of each view, with its camera; vertebra: `scan.Vertebra`.
    Returns:
      world_from_ct (4, 4) and `detectors.Located`.
    Raises:
      InputError: as `detectors.locate`.
    """
    images, views, valid = zip(*((x.line_integrals, x.view, x.valid) for x in xrays))
    located = detectors.locate(detector, images, views, vertebra.label, valid)
    return detectors.start_pose(detector, located, vertebra.label, vertebra.ct_from_box[:3, 3]), located
