"""Where a body lies, roughly: correlations over all shifts, against sums over pixels in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cases

from kernels.drr import drr
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.camera import project
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import edges
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import overview
from radgs_jax.registration.pyramid import at_resolution

TRUTH = rigid_host.matrix([0.06, -0.09, 0.05], (9.0, -14.0, 11.0))
CONFIG = overview.OverviewConfig(reach_mm=36.0)
PROGRAM = jax.jit(overview.best_shifts, static_argnames=("size", "depths", "config"))


@pytest.fixture(scope="module")
def prepared():
    return tiny_cases.tiny_prepared()


def _projected(parts, world_from_box, intrinsics, camera_from_world, height, width, step_mm):
    image = 0.0
    for volume, grid in ((parts.rest, parts.box_from_rest), (parts.excess, parts.box_from_excess)):
        index_from_camera = np.linalg.inv(camera_from_world @ world_from_box @ np.asarray(grid, np.float64))[:3]
        arguments = (jnp.asarray(a, jnp.float32)[None] for a in (index_from_camera, intrinsics))
        image = image + np.asarray(drr(volume, *arguments, height, width, step_mm=step_mm))[0]
    return image


@pytest.fixture(scope="module")
def xrays(prepared):
    """X-rays of the body at TRUTH; a corner of the second one is not valid."""
    made = []
    for number, xray in enumerate(tiny_cases.two_xrays()):
        camera = xray.camera
        size = camera.height, camera.width
        image = _projected(prepared.parts, TRUTH, camera.intrinsics, camera.camera_from_world, *size, 2.0)
        valid = np.ones(size, bool)
        valid[:12, :20] = number == 0
        made.append(XRay(np.where(valid, image, 9.0), valid, camera))
    return made


@pytest.mark.parametrize("off", [(0.0, 0.0, 0.0), (30.0, -24.0, 18.0), (-20.0, 33.0, -30.0)])
def test_a_body_is_found_whatever_the_shift(prepared, xrays, off):
    """From a start that is also turned by 12 degrees, to within a pixel and the distance of turns."""
    start = TRUTH @ rigid_host.matrix([0.15, -0.1, 0.12], 0.0)
    start[:3, 3] += off
    poses, fits = overview.candidates(PROGRAM, prepared.parts, xrays, start, CONFIG, prepared.refine, 4)
    assert len(poses) == len(fits) == 4 and fits == sorted(fits, reverse=True) and 1.0 < fits[0] <= 2.0
    assert np.linalg.norm(poses[0][:3, 3] - TRUTH[:3, 3]) < 10.0
    turn = np.arccos(0.5 * (np.trace(poses[0][:3, :3].T @ TRUTH[:3, :3]) - 1.0))
    assert turn < np.radians(12.0)


def test_fits_are_sums_of_correlations(prepared, xrays):
    """The best fit of a turn, recomputed pixel by pixel in float64 from the same projections."""
    start = TRUTH @ rigid_host.matrix([0.05, 0.03, -0.02], 0.0)
    one = dataclasses.replace(CONFIG, turn_rad=0.0, depth_mm=1e3)
    (pose, *_), (fit, *_) = overview.candidates(PROGRAM, prepared.parts, xrays, start, one, prepared.refine, 1)
    views = at_resolution(xrays, one.pixel_mm)
    full = max(views.images[0].shape)
    size = 16 * int(np.ceil((full + 2 * one.reach_mm / one.pixel_mm) / 16))
    middle, total = 0.5 * (size - 1), 0.0
    cameras = jnp.asarray(np.stack([x.camera.camera_from_world for x in xrays]), jnp.float32)
    window = gauss_newton.make_window(
        jnp.stack(views.images), jnp.stack(views.valid), views.intrinsics, cameras, prepared.refine
    )
    target, weights = np.asarray(window.target, np.float64), np.asarray(window.weights, np.float64)
    for view, xray in enumerate(xrays):
        k = np.array([*views.intrinsics[view][:2], middle, middle])
        E = xray.camera.camera_from_world
        on_axis = E @ start
        # Depths at which the body is projected are half of `depth_mm` to each side.
        depths = on_axis[2, 3] + np.array([-0.5, 0.5]) * one.depth_mm
        depth = depths[np.argmin(np.abs(depths - (E @ pose)[2, 3]))]
        on_axis[:3, 3] = 0.0, 0.0, depth
        image = _projected(prepared.parts, on_axis, k, np.eye(4), size, size, prepared.refine.levels[0].rest_step_mm)
        slope = edges.derivatives(jnp.asarray(image)[None, ..., None], prepared.refine.blur_px)[0, :, :, 0]
        slope = np.asarray(slope, np.float64)
        binned = dataclasses.replace(xray.camera, intrinsics=np.asarray(views.intrinsics[view], np.float64))
        u, v = np.rint(np.asarray(project(binned, pose[None, :3, 3]))[0] - middle).astype(int)
        products, energies = 0.0, 0.0
        for y in range(full):
            for x in range(full):
                if 0 <= y - v < size and 0 <= x - u < size:
                    products += weights[view, y, x] * target[view, y, x] @ slope[y - v, x - u]
                    energies += weights[view, y, x] * slope[y - v, x - u] @ slope[y - v, x - u]
        own = (weights[view, ..., None] * target[view] ** 2).sum()
        total += products / np.sqrt(own * energies)
    assert abs(fit - total) < 1e-3


def test_turns_fill_a_ball():
    found = overview.turns(CONFIG)
    lengths = np.linalg.norm(found, axis=1)
    assert len(found) == 33 and lengths.max() <= CONFIG.turn_rad + 1e-9 and (lengths == 0).sum() == 1
    nearest = functools.partial(lambda v: np.linalg.norm(found - v, axis=1).min())
    rng = np.random.default_rng(0)
    inside = rng.normal(size=(200, 3))
    inside *= (CONFIG.turn_rad * rng.uniform(size=(200, 1))) / np.linalg.norm(inside, axis=1, keepdims=True)
    assert max(nearest(v) for v in inside) < CONFIG.turn_step_rad
