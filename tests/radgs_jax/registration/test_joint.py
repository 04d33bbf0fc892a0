"""Vertebrae and cameras together: found where each view alone is wrong, and honest about what no view shows."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.drr import drr
from radgs_jax.geometry import distortion
from radgs_jax.geometry import resample
from radgs_jax.geometry import rigid
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import joint
from radgs_jax.registration.bodies import bodies_of
from radgs_jax.registration.bodies import cut
from radgs_jax.registration.bodies import linearised
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.pyramid import Pyramid

CONFIG = gauss_newton.RefineConfig(levels=(gauss_newton.Level(2.0, 48, 12, 1.5, 3.0),))
GIVEN = np.zeros((2, 4, 4))
GIVEN[0, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
GIVEN[1, :3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
GIVEN[:, 2, 3], GIVEN[:, 3, 3] = 700.0, 1.0
PLACES = np.array([[-3.0, 2.0, 31.0], [0.0, 0.0, 0.0], [2.0, -1.0, -30.0]])
PROGRAMS = [jax.jit(function, static_argnames="config") for function in (cut, linearised)]


def motion(*twist):
    return rigid_host.motion_about(np.zeros(3), np.array(twist, float))


@pytest.fixture(scope="module")
def spine():
    """`Parts` of three lumps in one body, as they are prepared: each one's rest holds the other two; and their frames."""
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(np.arange(30) * 1.5, np.arange(26) * 1.5, np.arange(12) * 2.0, indexing="ij")
    inside = ((x - 24) / 19) ** 2 + ((y - 17) / 14) ** 2 + ((z - 11) / 10) ** 2 < 1
    grid, lumps = np.diag([1.5, 1.5, 2.0, 1.0]), []
    grid[:3, 3] = [-24.0, -17.0, -11.0]
    for _ in PLACES:
        noise = rng.normal(size=inside.shape)
        noise = sum(np.roll(noise, s, axis) for s in (-1, 0, 1) for axis in range(3)) / 3.0
        lumps.append(np.where(inside, 0.02 + 0.01 * noise, 0.0).astype(np.float32))
    coarse = rng.normal(size=(20, 16, 28))
    rest = np.clip(0.015 + 0.012 * np.repeat(np.repeat(np.repeat(coarse, 3, 0), 3, 1), 3, 2), 0.0, None)
    rest = sum(np.roll(rest, s, axis) for s in (-1, 0, 1) for axis in range(3)).astype(np.float32) / 9.0
    of_rest = np.diag([3.0, 3.0, 3.0, 1.0])
    of_rest[:3, 3] = [-88.0, -72.0, -126.0]
    boxes = [rigid_host.matrix(np.zeros(3), place) for place in PLACES]
    held = [resample.resample(lump, box @ grid, of_rest, rest.shape) for lump, box in zip(lumps, boxes)]
    parts = []
    for k, (lump, box) in enumerate(zip(lumps, boxes)):
        whole = rest + sum(h for j, h in enumerate(held) if j != k)
        parts.append(Parts(lump, grid, whole, np.linalg.inv(box) @ of_rest))
    return parts, boxes, rest, of_rest


def xrays(spine, poses, cameras, pixel_mm=2.0, size=90):
    """`Pyramid` of one level of the bodies at world_from_ct poses (three lumps, then the rest) before cameras."""
    parts, boxes, rest, of_rest = spine
    focal = 700.0 / pixel_mm
    k = jnp.asarray([[focal, focal, 0.5 * (size - 1), 0.5 * (size - 1)]] * 2, jnp.float32)
    images = 0.0
    volumes = [*((p.excess, box @ p.box_from_excess) for p, box in zip(parts, boxes)), (rest, of_rest)]
    for (volume, grid), pose in zip(volumes, poses):
        index_from_camera = np.linalg.inv(cameras @ pose @ grid)[:, :3]
        images = images + drr(
            jnp.asarray(volume), jnp.asarray(index_from_camera, jnp.float32), k, size, size, step_mm=1.0
        )
    views = gauss_newton.LevelViews(list(images), [jnp.ones((size, size), bool)] * 2, k)
    return Pyramid([views], jnp.asarray(GIVEN, jnp.float32))


def away_mm(pose, truth, point):
    return float(np.linalg.norm((pose @ [*point, 1.0] - truth @ [*point, 1.0])[:3]))


def test_bodies_hold_each_voxel_once(spine):
    parts, boxes, rest, of_rest = spine
    bodies = bodies_of(boxes, parts, [1, 1])
    assert bodies.neighbours == ((-1, 1), (0, 2), (1, -1)) and bodies.seen(0) == [0, 0, 1, 3]
    # The middle one has both neighbours taken out of its rest; the first keeps the third, which it does not touch.
    np.testing.assert_allclose(bodies.around[1].volumes[-1], rest, atol=2e-3)
    assert np.abs(np.asarray(bodies.around[0].volumes[-1]) - rest).max() > 5e-3


def test_each_vertebra_is_found_in_a_bent_spine(spine):
    parts, boxes, _, _ = spine
    bends = [
        motion(0.03, -0.02, 0.04, 1.0, -0.5, 1.5),
        motion(0, 0, 0, 0, 0, 0),
        motion(-0.03, 0.03, 0.02, -1, 1.0, 0.5),
    ]
    truth = np.stack([*bends, motion(0.01, 0.0, 0.01, 0.5, -1.0, 0.5)])
    seen = xrays(spine, truth, GIVEN)
    start = np.stack([motion(0, 0, 0, 0, 0, 0)] * 6)
    found = joint.refine_together(*PROGRAMS, bodies_of(boxes, parts, [1, 1]), seen, start, (0.0, 0.0), CONFIG)
    for pose, true, place in zip(found.world_from_ct, truth, PLACES):
        assert away_mm(pose, true, place) < 0.15
    np.testing.assert_allclose(found.motions, [np.eye(4)] * 2, atol=1e-2)


def test_cameras_are_corrected_relative_to_each_other(spine):
    parts, boxes, _, _ = spine
    off = [motion(0.004, -0.003, 0.002, 0.5, -0.3, 0.8), motion(-0.003, 0.002, 0.004, -0.4, 0.2, -0.9)]
    truth = np.stack([motion(0.02, 0.01, -0.02, 1.0, 1.0, -1.0)] * 4)
    seen = xrays(spine, truth, GIVEN @ np.stack(off))
    start, sd = np.stack([np.eye(4)] * 6), (math.radians(0.4), 1.5)
    bodies = bodies_of(boxes, parts, [1, 1])
    blind = joint.refine_together(*PROGRAMS, bodies, seen, start, (0.0, 0.0), CONFIG)
    found = joint.refine_together(*PROGRAMS, bodies, seen, start, sd, CONFIG, joint.NO_DISCREPANCY)
    relative = np.linalg.inv(off[1]) @ off[0]
    left = np.linalg.inv(found.motions[1]) @ found.motions[0] @ np.linalg.inv(relative)
    turn, shift = left[:3, :3], left[:3, 3]
    assert np.degrees(np.arccos((np.trace(turn) - 1) / 2)) < 0.05
    assert abs(shift[2]) < 0.1  # both views see the height; each other axis is the depth of one of them

    def spread(poses):
        """How far the first and the last are from where they should be relative to each other, mm."""
        return away_mm(np.linalg.inv(poses[0]) @ poses[2], np.eye(4), PLACES[2])

    assert spread(found.world_from_ct) < 0.1 and spread(found.world_from_ct) < 0.5 * spread(blind.world_from_ct)


def test_views_that_are_wrong_by_themselves_correct_cameras_by_no_more_than_they_know(spine):
    """The first view sees another pose of all bodies than the second: by its camera's error, or by what the model lacks."""
    parts, boxes, _, _ = spine
    shown = np.stack([motion(0.006, 0.0, 0.004, 0.0, 0.0, 0.6)] * 4)
    seen, other = xrays(spine, np.stack([np.eye(4)] * 4), GIVEN), xrays(spine, shown, GIVEN)
    (views,) = seen.levels
    seen = Pyramid([views.replace(images=[other.levels[0].images[0], views.images[1]])], seen.camera_from_world)
    bodies, start, sd = bodies_of(boxes, parts, [1, 1]), np.stack([np.eye(4)] * 6), (math.radians(0.1), 0.3)

    def relative(discrepancy):
        found = joint.refine_together(*PROGRAMS, bodies, seen, start, sd, CONFIG, discrepancy)
        twist = rigid_host.twist_about(np.zeros(3), np.linalg.inv(found.motions[1]) @ found.motions[0])
        return np.abs(twist[[0, 5]]), joint.covariance(found)

    (turn, height_mm), small = relative(joint.NO_DISCREPANCY)
    assert turn > 0.005 and height_mm > 0.5
    (turn, height_mm), large = relative(((0.05, 1.0, 5.0), (0.05, 1.0, 5.0)))
    assert turn < 0.001 and height_mm < 0.2
    of_cameras = slice(36, 48)
    assert np.trace(large[of_cameras, of_cameras]) > np.trace(small[of_cameras, of_cameras])


def test_distortion_is_fitted_with_the_poses(spine):
    """Pincushion of 3 % and barrel of 2 % at the border: blind to it, vertebrae are off by what it moves them."""
    parts, boxes, _, _ = spine
    bends = [motion(0.02, -0.01, 0.02, 1.0, -0.5, 1.0), motion(0, 0, 0, 0, 0, 0), motion(-0.02, 0.01, 0, -1, 1.0, 0.5)]
    truth = np.stack([*bends, np.eye(4)])
    coefficients = np.array([[0.03, 0.0, 0.0], [-0.03, 0.01, 0.0]])
    exact, size = xrays(spine, truth, GIVEN), 90
    (views,) = exact.levels
    cameras = [Camera(k, E, size, size) for k, E in zip(np.asarray(views.intrinsics), GIVEN)]
    shown = [
        distortion.distorted(XRay(np.asarray(image), None, camera), k)
        for image, camera, k in zip(views.images, cameras, coefficients)
    ]

    def straightened(k):
        made = [distortion.straightened(x, one) for x, one in zip(shown, k)]
        images, valid = [jnp.asarray(x.line_integrals) for x in made], [jnp.asarray(x.valid) for x in made]
        return Pyramid([gauss_newton.LevelViews(images, valid, views.intrinsics)], exact.camera_from_world)

    bodies, start = bodies_of(boxes, parts, [1, 1]), np.stack([np.eye(4)] * 6)
    stretched = joint.Stretched(0.03, [distortion.field(camera) for camera in cameras], straightened)
    fixed = straightened(np.zeros((2, 3))), start, (0.0, 0.0), CONFIG, joint.NO_DISCREPANCY
    blind = joint.refine_together(*PROGRAMS, bodies, *fixed)
    found = joint.refine_together(*PROGRAMS, bodies, *fixed, stretched=stretched)
    error = lambda poses: max(away_mm(pose, true, place) for pose, true, place in zip(poses, truth, PLACES))
    assert error(found.world_from_ct) < min(0.05, 0.7 * error(blind.world_from_ct))
    # What counts is where pixels go: at half the field's radius and near its border.
    for radius in (0.5, 0.8):
        powers = radius ** np.array([2, 4, 6])
        np.testing.assert_allclose(found.distortions @ powers, coefficients @ powers, atol=4e-3)
    assert not blind.distortions.any()


def test_errors_of_a_view_are_eliminated_as_further_unknowns():
    """One vertebra in its rest, seen by two views with exact cameras, against the equations with the views' errors in them."""
    rng, size = np.random.default_rng(4), joint.OF_WINDOW
    root = rng.normal(size=(1, 2, size, 40))
    root[:, :, 6:18] = 0.0
    rights = rng.normal(size=(1, 2, size))
    rights[:, :, 6:18] = 0.0
    discrepancy = ((0.1, 0.2, 0.5), (0.3, 0.4, 0.6))
    errors = joint.errors_of_views(discrepancy, GIVEN)
    root[:, :, joint.OF_BODIES :], rights[:, :, joint.OF_BODIES :] = 0.0, 0.0
    normals, blocks = root @ root.swapaxes(-1, -2), rights[:, :, None]
    normal, right, _ = joint.assembled([(-1, -1)], normals, rights, blocks, np.zeros((2, 3)), errors, 1.0)
    there = [*range(6), *range(18, 24)]
    wanted_normal, wanted_right = np.zeros((12, 12)), np.zeros(12)
    for v in range(2):
        N, r = normals[0, v][np.ix_(there, there)], rights[0, v][there]
        free = np.linalg.inv(N + np.linalg.inv(errors[v][np.ix_(there, there)]))
        wanted_normal += N - N @ free @ N
        wanted_right += r - N @ free @ r
    np.testing.assert_allclose(normal[:12, :12], wanted_normal, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(right[:12], wanted_right, rtol=1e-8, atol=1e-8)


def test_the_covariance_holds_what_no_view_shows(spine):
    parts, boxes, _, _ = spine
    truth = np.stack([np.eye(4)] * 6)
    seen, bodies = xrays(spine, truth, GIVEN), bodies_of(boxes, parts, [1, 1])
    sd = (math.radians(0.3), 1.0)
    found = joint.refine_together(*PROGRAMS, bodies, seen, truth, sd, CONFIG)
    covariance = joint.covariance(found)
    # Two cameras that are off by 1 mm move a body by 1 / sqrt(2) together, of which nothing is seen.
    assert np.sqrt(np.trace(covariance[9:12, 9:12])) > 0.8 / math.sqrt(2)
    right = joint.refine_together(*PROGRAMS, bodies, seen, truth, (0.0, 0.0), CONFIG, joint.NO_DISCREPANCY)
    exact = joint.covariance(right)
    assert np.sqrt(np.trace(exact[9:12, 9:12])) < 0.05
    # What two vertebrae have in common with the cameras cancels in their relative motion.
    relative = np.zeros((3, len(covariance)))
    relative[:, 3:6], relative[:, 9:12] = np.eye(3), -np.eye(3)
    relative[:, :3] = np.asarray(rigid.skew(jnp.asarray(PLACES[0] - PLACES[1])))
    assert np.sqrt(np.trace(relative @ covariance @ relative.T)) < 0.3


def test_the_relative_covariance_is_that_of_drawn_motions():
    """Twists of two vertebrae about their own centres: how points of the first move in the frame of the second."""
    rng = np.random.default_rng(2)
    upper, lower = np.array([3.0, -2.0, 35.0]), np.array([-1.0, 4.0, 0.0])
    root = rng.normal(size=(12, 12)) * np.tile([1e-4] * 3 + [0.01] * 3, 2)[:, None]
    twists = rng.normal(size=(20000, 12)) @ root.T
    point = upper + [10.0, -6.0, 4.0]
    moved = []
    for a, b in ((t[:6], t[6:]) for t in twists[:4000]):
        relative = np.linalg.inv(rigid_host.motion_about(lower, b)) @ rigid_host.motion_about(upper, a)
        moved.append((relative @ [*point, 1.0])[:3] - point)
    covariance = joint.relative_covariance(root @ root.T, upper, lower)
    x, y, z = point - upper
    jacobian = np.concatenate([[[0, z, -y], [-z, 0, x], [y, -x, 0]], np.eye(3)], 1)
    wanted = np.cov(np.array(moved).T)
    np.testing.assert_allclose(jacobian @ covariance @ jacobian.T, wanted, atol=0.1 * np.abs(wanted).max())


def test_near_the_truth_a_bodys_own_equations_ask_for_what_it_is_off_by(spine):
    parts, boxes, _, _ = spine
    bodies = bodies_of(boxes, parts, [1, 1])
    rest = motion(0, 0.01, 0, 0.3, 0, 0)
    poses = np.stack([motion(0.01, 0.02, -0.01, 0.5, -0.4, 0.3), np.eye(4), np.eye(4), rest, rest, rest])
    seen = xrays(spine, poses, GIVEN)
    off = poses.copy()
    off[1] = motion(0.0, 0.0, 0.0, 0.4, 0.0, 0.0)
    one = dataclasses.replace(CONFIG, levels=(dataclasses.replace(CONFIG.levels[0], iterations=1),))
    on_device = lambda values: jnp.asarray(values, jnp.float32)
    cameras, centre = seen.camera_from_world, on_device(bodies.centres[1])
    window, near = PROGRAMS[0](seen.levels[0], cameras, on_device(poses[1]), centre, config=one)
    moving = jnp.array(True), cameras, on_device(off[bodies.seen(1)]), jnp.zeros((2, 3)), jnp.ones(2)
    normals, rights, _, near = PROGRAMS[1](bodies.around[1], window, near, *moving, config=one)
    normal, right = np.asarray(normals).sum(0)[:6, :6], np.asarray(rights).sum(0)[:6]
    step = np.linalg.solve(normal, right)
    np.testing.assert_allclose(step[3:], [-0.4, 0.0, 0.0], atol=0.12)
