"""The search for a pose: whether a neighbour's place fits better, and where neighbours lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from kernels.drr import drr
from radgs_jax import levels
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import pyramid
from radgs_jax.registration import search
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.programs import programs_of

CONFIG = gauss_newton.RefineConfig(
    levels=(
        gauss_newton.Level(4.0, 24, 6, 2.0, 4.0, 0.3),
        gauss_newton.Level(2.0, 40, 5, 1.5, 3.0),
    )
)
PIXELS, PIXEL_MM, DISTANCE_MM, SOURCE_MM = 140, 2.0, 1000.0, 700.0
PITCH_MM = 31.0
TRUTH = rigid_host.matrix([0.08, -0.1, 0.05], (3.0, -4.0, 5.0))
REST = rigid_host.matrix([0.1, -0.08, 0.03], (4.0, -3.0, 4.0))


@pytest.fixture(scope="module")
def spine():
    """Five vertebrae of one outline, each with a structure of its own, in a body; the middle one is registered."""
    rng = np.random.default_rng(0)

    def structured(shape, width, mean, spread):
        field = ndimage.gaussian_filter(rng.normal(size=shape), width)
        return mean + spread * field / field.std()

    shape = (28, 24, 14)
    x, y, z = (2.0 * (np.indices(shape)[axis] - 0.5 * (shape[axis] - 1)) for axis in range(3))
    inside = (x / 22) ** 2 + ((y - 3) / 17) ** 2 + (z / 12) ** 2 < 1
    bones = [np.where(inside, structured(shape, 1.0, 0.02, 0.006), 0.0) for _ in range(5)]
    box_from_bone = np.diag([2.0, 2.0, 2.0, 1.0])
    box_from_bone[:3, 3] = [-27.0, -23.0, -13.0]
    rest = np.maximum(structured((60, 50, 84), 1.5, 0.015, 0.002), 0.0)
    box_from_rest = np.diag([3.0, 3.0, 3.0, 1.0])
    box_from_rest[:3, 3] = [-88.0, -74.0, -125.0]
    points = 3.0 * np.moveaxis(np.indices(rest.shape), 0, -1) + box_from_rest[:3, 3]
    for place, bone in zip((-2, -1, 1, 2), bones[1:]):
        voxels = (points - [0.0, 0.0, place * PITCH_MM] - box_from_bone[:3, 3]) / 2.0
        rest = rest + ndimage.map_coordinates(bone, np.moveaxis(voxels, -1, 0), order=1)
    parts = (bones[0], box_from_bone, rest, box_from_rest)
    return Parts(*(jnp.asarray(a, jnp.float32) for a in parts))


@pytest.fixture(scope="module")
def xrays(spine):
    """X-rays from the front and the side, with noise."""
    cameras = np.zeros((2, 4, 4))
    cameras[0, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
    cameras[1, :3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    cameras[:, 2, 3], cameras[:, 3, 3] = SOURCE_MM, 1.0
    focal, middle = DISTANCE_MM / PIXEL_MM, 0.5 * (PIXELS - 1)
    intrinsics = np.array([focal, focal, middle, middle])
    images = np.random.default_rng(1).normal(size=(2, PIXELS, PIXELS)) * 0.01
    for volume, grid, pose in (
        (spine.excess, spine.box_from_excess, TRUTH),
        (spine.rest, spine.box_from_rest, REST),
    ):
        index_from_camera = jnp.linalg.inv(jnp.asarray(cameras @ pose, jnp.float32) @ grid)[:, :3]
        k = jnp.asarray(np.stack([intrinsics] * 2), jnp.float32)
        images = images + np.asarray(drr(volume, index_from_camera, k, PIXELS, PIXELS, step_mm=1.0))
    views = [Camera(intrinsics, camera, PIXELS, PIXELS) for camera in cameras]
    return [XRay(image, None, view) for image, view in zip(images, views)]


@pytest.mark.parametrize("levels_off", [0, 1, -2])
def test_an_answer_in_a_neighbours_place_is_given_up(spine, xrays, levels_off):
    """From the vertebra's own place, the one above, and two below; each time a neighbour is the rival, which fits worse."""
    seen = pyramid.make_pyramid(xrays, [level.pixel_mm for level in CONFIG.levels])
    start = TRUTH @ rigid_host.matrix([0.02, -0.03, 0.02], (1.0, -1.0, levels_off * PITCH_MM + 1.5))
    programs = programs_of(jax.jit)
    first, how = search.twice(CONFIG), search.SearchConfig()
    found = search.refine_pose(programs, spine, seen, [start], CONFIG, how, (-34.0, 33.0), first)
    assert np.linalg.norm(found.world_from_box[:3, 3] - TRUTH[:3, 3]) < 0.5
    assert 0.6 * PITCH_MM < found.rival_mm < 1.4 * PITCH_MM and 0.05 < found.margin < 2.0


@pytest.mark.parametrize("axis, mm", [(0, 22.0), (1, -16.0), (1, 12.0)])
def test_an_answer_that_one_view_alone_shows_is_tried_in_other_depths_of_that_view(spine, xrays, axis, mm):
    """The finest level alone stays where it starts, at a wrong depth of the other view; without other depths, far off."""
    fine = dataclasses.replace(CONFIG, levels=(dataclasses.replace(CONFIG.levels[1], iterations=8),))
    seen, start = pyramid.make_pyramid(xrays, [level.pixel_mm for level in fine.levels]), TRUTH.copy()
    start[axis, 3] += mm
    off_mm, found = [], {}
    for limit in (0.0, 0.65):
        how = search.SearchConfig(uneven=limit, max_settlings=0)
        found[limit] = search.refine_pose(programs_of(jax.jit), spine, seen, [start], fine, how, (), fine.levels)
        off_mm.append(np.linalg.norm(found[limit].world_from_box[:3, 3] - TRUTH[:3, 3]))
    assert off_mm[0] > 5.0 and search.evenness(found[0.0]) < search.SearchConfig().one_sided
    assert off_mm[1] < 0.1 and search.evenness(found[0.65]) > search.SearchConfig().uneven
    # The answer that was left is the rival.
    assert found[0.65].rival_mm > gauss_newton.DISTINCT_MM and 0.0 < found[0.65].margin < 1.0


@pytest.mark.parametrize("axis, sign", [(0, 1), (1, -1), (2, 1)])
def test_an_answer_that_one_view_alone_shows_is_tried_in_other_orientations(spine, xrays, axis, sign):
    """In place of the refinement, one that takes no step, and whose second view shows turned poses less well."""
    how = search.SearchConfig()
    start = TRUTH @ rigid_host.matrix(sign * how.turn_rad * np.eye(3)[axis], (0.0, 0.0, 0.0))

    def stays(parts, views, camera_from_world, poses, iterations, level, config):
        off_mm = np.linalg.norm(np.asarray(poses[:, 0]) - TRUTH, axis=(-2, -1))
        support, none = np.stack([np.ones_like(off_mm), 1.0 / (1.0 + off_mm)], -1), np.zeros_like(off_mm)
        found = [np.zeros((len(poses), 6, 6))] * 2 + [support, support, none, none]
        return gauss_newton.Candidates(poses, 2.0 * support.mean(-1), *found)

    seen = pyramid.make_pyramid(xrays, [level.pixel_mm for level in CONFIG.levels])
    programs = dataclasses.replace(programs_of(jax.jit), refine_level=stays)
    found = search.refine_pose(programs, spine, seen, [start], CONFIG, how, (), CONFIG.levels)
    np.testing.assert_allclose(found.world_from_box, TRUTH, atol=1e-4)


def test_arcs_lead_along_a_curved_spine():
    """Vertebrae on a circle in the sagittal plane, each turned about its right axis against the one before."""
    turn, chord_mm = np.radians(17.0), 33.0
    radius_mm = chord_mm / (2.0 * np.sin(0.5 * turn))
    on_circle = lambda angle: rigid_host.motion_about([0.0, -radius_mm, 0.0], np.array([angle, 0, 0, 0, 0, 0]))
    below, above = TRUTH @ on_circle(0.0), TRUTH @ on_circle(turn)
    forwards, back = search.along_arcs(below, chord_mm, (turn, -turn))
    np.testing.assert_allclose(forwards, above, atol=1e-9)
    assert np.linalg.norm(back[:3, 3] - above[:3, 3]) > 5.0
    np.testing.assert_allclose(search.along_arcs(above, -chord_mm, (-turn,))[0], below, atol=1e-9)


def test_neighbours_lie_further_off_down_the_spine():
    """As in published anatomy: about 19 mm in the upper thorax, 35 mm in the lumbar spine, each pair seen alike from both sides."""
    for label in range(2, 25):
        (below, above), (_, above_next) = levels.neighbours_mm(label), levels.neighbours_mm(label + 1)
        assert 15 < above <= -below < 37 and above_next == -below
    assert -19 > levels.neighbours_mm(9)[0] > -20 and -35 > levels.neighbours_mm(23)[0]
