"""Start poses from clicked points and from a localizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry import triangulation
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.localization import locate
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import overview
from radgs_jax.registration import pipeline
from radgs_jax.registration.prepared import Prepared
from radgs_jax.registration.prepared import Vertebra
from radgs_jax.registration.programs import Compile
from radgs_jax.registration.programs import programs_of
from radgs_jax.registration.pyramid import make_pyramid

TURNS = 24
"""Turns about a bone's axis that are tried: 15 degrees apart, which is about what a refinement recovers. Half leaves gaps, twice
takes twice as long."""
BODY_REACH_MM = 150.0
"""How far from where the X-rays' centres meet a vertebra is looked for along each axis, mm: half leaves out the edges of large
pictures; twice takes three times as long and is beyond them."""
MIN_AXIS_MM = 5.0
"""Shortest distance of the two points that give an axis, mm. Chosen by hand: clicks are off by a millimetre, which turns so short
an axis by 10 degrees; half turns it by 20, twice refuses small bones."""


def start_from_points(
    cameras: Sequence[Camera], pixels: Sequence[Sequence[float]], vertebra: Vertebra
) -> tuple[np.ndarray, float]:
    """A start pose from the vertebra's centre clicked in every view, with the CT's own orientation.

    Args:
      cameras: one per view; pixels: one (u, v) per view; vertebra: whose centre was clicked.
    Returns:
      world_from_ct (4, 4), mm, and the rms distance of the rays from their common point, mm.
    Raises:
      InputError: a single view, or rays that do not meet.
    """
    centre, miss_mm = _meeting_point(cameras, pixels, "--points", "the vertebra's centre")
    world_from_ct = np.eye(4)
    world_from_ct[:3, 3] = centre - vertebra.ct_from_box[:3, 3]
    return world_from_ct, miss_mm


def _meeting_point(cameras, pixels, flag, wanted):
    """The world point (3,) that a pixel in every view shows, mm, and the rms distance of the rays from it."""
    lines = [triangulation.rays(np.array([p]), v.intrinsics, v.camera_from_world) for v, p in zip(cameras, pixels)]
    sources, directions = np.stack([source for source, _ in lines]), np.concatenate([d for _, d in lines])
    try:
        point, _ = triangulation.triangulate(sources, directions, np.ones(len(lines)))
    except ValueError:
        found = "a single view" if len(lines) == 1 else "rays that are parallel or meet in a source"
        errors.fail("flags", flag, found, f"{wanted} in views from two sides")
    away = point - sources
    miss = away - (away * directions).sum(1, keepdims=True) * directions
    return point, float(np.sqrt((miss**2).sum(1).mean()))


def start_from_body(
    prepared: Sequence[Prepared], xrays: Sequence[XRay], compile: Compile
) -> tuple[np.ndarray, dict[str, Any]]:
    """A start pose from the whole body, which is looked for around where the X-rays' centres meet, near the CT's own orientation.

    Which level is which follows from the CT's labels.

    Args:
      prepared: vertebrae of one scan; the body is looked for around each of them, and the best place is taken.
      compile: as in `pipeline.register`.
    Returns:
      world_from_ct (4, 4), mm, and what was found.
    Raises:
      InputError: a single view, views whose centres do not meet, or X-rays that show nothing of the body.
    """
    cameras = [xray.camera for xray in xrays]
    middles = [(0.5 * (camera.width - 1), 0.5 * (camera.height - 1)) for camera in cameras]
    centre, _ = _meeting_point(cameras, middles, "--init, --points", "a start pose, or X-rays whose centres meet")
    seen, best = pipeline.without_metal(prepared[0], xrays, compile), None
    for one in prepared:
        guess = np.eye(4)
        guess[:3, 3] = centre - one.vertebra.ct_from_box[:3, 3]
        found = find_body(one, seen, guess, compile)
        if found is not None and (best is None or found[1] > best[1]):
            best = found
    if best is None:
        errors.fail("X-rays", "content", "nothing of the CT's body", "a start pose by --init or --points")
    pose, fit = best
    return pose, {"found": "the body", "fit": fit, "start_world_from_ct": pose.tolist()}


def find_body(
    prepared: Prepared, xrays: Sequence[XRay], guess: np.ndarray, compile: Compile
) -> tuple[np.ndarray, float] | None:
    """The pose at which the body around a vertebra fits X-rays best, roughly, near a guess.

    Args:
      xrays: without their metal.
      guess: world_from_ct, which may be off by BODY_REACH_MM along each axis, and in its turn by the search's `OverviewConfig`.
      compile: as in `pipeline.register`.
    Returns:
      world_from_ct (4, 4), mm, and the sum over views of the correlations there; None where nothing fits.
    """
    config, box = prepared.search.overview, prepared.vertebra.ct_from_box
    around = pipeline.parts_in(prepared, xrays), xrays, guess @ box, config, prepared.refine
    poses, fits = overview.candidates(programs_of(compile).best_shifts, *around, 1, BODY_REACH_MM)
    return (rigid_host.nearest_rigid(poses[0] @ np.linalg.inv(box)), fits[0]) if poses else None


def start_from_axis(
    xrays: Sequence[XRay],
    pixels: Sequence[Sequence[float]],
    towards: Sequence[Sequence[float]],
    prepared: Prepared,
    compile: Compile,
) -> tuple[np.ndarray, float]:
    """A start pose from a bone's centre and a second point on its axis, clicked in every view; nothing is assumed of its turn.

    TURNS poses about the axis are refined, and the one that fits best is the start.

    Args:
      pixels: one (u, v) per view, of the centre; towards: the same of a point from there along the +z axis of the bone's box,
        which is the CT's where the bone has no neighbours.
      compile: as in `pipeline.register`.
    Returns:
      world_from_ct (4, 4), mm, and the larger rms distance of the rays from their common point, mm.
    Raises:
      InputError: a single view, rays that do not meet, or points that are too near to each other.
    """
    cameras = [xray.camera for xray in xrays]
    (centre, miss), (tip, other) = (
        _meeting_point(cameras, pixels, "--points", "the vertebra's centre"),
        _meeting_point(cameras, towards, "--axis", "one point of the axis"),
    )
    length = np.linalg.norm(tip - centre)
    if length < MIN_AXIS_MM:
        errors.fail(
            "flags", "--axis", f"a point {length:.1f} mm from the centre", f"one {MIN_AXIS_MM:g} mm or more away"
        )
    z = (tip - centre) / length
    x = np.cross(np.eye(3)[np.argmin(np.abs(z))], z)
    x /= np.linalg.norm(x)
    upright = np.stack([x, np.cross(z, x), z], 1)
    poses = []
    for angle in np.arange(TURNS) * 2.0 * np.pi / TURNS:
        pose = rigid_host.matrix(np.array([0.0, 0.0, angle]), [0.0, 0.0, 0.0])
        pose[:3, :3], pose[:3, 3] = upright @ pose[:3, :3], centre
        poses.append(pose)
    seen = make_pyramid(xrays, [level.pixel_mm for level in prepared.refine.levels])
    # Turns of a shaft differ in detail only, so that the coarse levels may not choose between them.
    last = len(prepared.refine.levels) - 1
    levels = [
        dataclasses.replace(level, keep=1 if index == last else max(2, TURNS // 2 ** (index + 1)))
        for index, level in enumerate(prepared.refine.levels)
    ]
    program, parts = programs_of(compile).refine_level, pipeline.parts_in(prepared, xrays)
    found = gauss_newton.refine(
        program, parts, seen.levels, seen.camera_from_world, np.stack(poses), prepared.refine, levels
    )
    world_from_box = rigid_host.nearest_rigid(np.asarray(found.world_from_box, np.float64))
    return world_from_box @ np.linalg.inv(prepared.vertebra.ct_from_box), max(miss, other)


def start_from_localizer(
    localizer: locate.Localizer, xrays: Sequence[XRay], vertebra: Vertebra
) -> tuple[np.ndarray, locate.Located]:
    """A start pose from the vertebra that a localizer finds in the X-rays.

    Returns:
      world_from_ct (4, 4), mm, and what was found.
    Raises:
      InputError: as `locate.locate`.
    """
    located = locate.locate(localizer, xrays, vertebra.label)
    return locate.start_pose(localizer, located, vertebra.label, vertebra.ct_from_box[:3, 3]), located
