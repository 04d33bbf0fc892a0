"""Where a body lies in its X-rays, roughly, from nothing but the CT's orientation.

Both parts of the CT are projected at a few turns and distances, and their derivative images are correlated with those of every
X-ray over all shifts at once, by Fourier transforms. A shift in space moves the projections by a known number of pixels, so that
the correlations of all views are read off a grid of shifts and added up.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kernels.common.types import Array
from kernels.drr import drr
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration.edges import derivatives
from radgs_jax.registration.gauss_newton import LevelViews
from radgs_jax.registration.gauss_newton import make_window
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.parts import on_device
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.pyramid import at_resolution

PEAKS = 24
"""Best shifts of each turn that are kept. Half loses right ones where vertebrae look alike; twice keeps more of the same place."""
LEAST_ENERGY = 0.05
"""Least energy of a projection in the X-ray's valid pixels, as a fraction of the largest over all shifts. Chosen by hand: below it,
so little of the body is seen that its correlation says nothing."""
SHAPE_MULTIPLE = 16
"""Sides of projections are multiples of this, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class OverviewConfig:
    """How a body is looked for. The acceptance rule is fitted with it: `confidence.method_digest`.

    Attributes:
      pixel_mm: pixel at the isocentre, mm. At half, turns between those that are tried are missed, and it takes four times as long;
        at twice, vertebrae cannot be told apart.
      turn_rad: largest turn that is tried against the given orientation.
      turn_step_rad: distance of the turns that are tried.
      reach_mm: largest shift along each axis that is tried from a start pose.
      spacing_mm: distance of the shifts that are tried.
      depth_mm: how far apart the distances from the source are at which the body is projected.
    """

    pixel_mm: float = 6.0
    turn_rad: float = math.radians(20.0)
    turn_step_rad: float = math.radians(10.0)
    reach_mm: float = 60.0
    spacing_mm: float = 6.0
    depth_mm: float = 60.0


def turns(config: OverviewConfig) -> Float[np.ndarray, "turns 3"]:
    """Rotation vectors on a cubic lattice in a ball, radians."""
    count = round(config.turn_rad / config.turn_step_rad)
    places = np.array(list(itertools.product(range(-count, count + 1), repeat=3)))
    return config.turn_step_rad * places[np.linalg.norm(places, axis=1) <= count + 1e-9]


def grid(reach_mm: float, spacing_mm: float) -> Float[np.ndarray, "side side side 3"]:
    """Shifts on a cubic lattice, mm."""
    count = round(reach_mm / spacing_mm)
    axis = spacing_mm * np.arange(-count, count + 1)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)


def best_shifts(
    parts: Parts,
    views: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    poses: Float[Array, "turns 4 4"],
    shifts: Float[Array, "side side side 3"],
    size: int,
    depths: tuple[float, ...],
    config: RefineConfig,
) -> tuple[Float[Array, "turns peaks"], Float[Array, "turns peaks 3"]]:
    """The shifts of each pose at which projections of the body correlate best with the X-rays.

    Args:
      views: X-rays; poses: world_from_box, mm, all with the same origin; shifts: of that origin in the world, mm.
      size: pixels along the square projections; depths: mm, distances from the source at which the body is projected, against that
        of the poses' origin.
    Returns:
      sums over views of correlations, PEAKS of each turn from best to worst, and their shifts.
    """
    full = max(max(image.shape) for image in views.images)
    pad = lambda a, mode, **how: jnp.pad(a, [(0, full - n) for n in a.shape], mode=mode, **how)
    images = jnp.stack([pad(image, "edge") for image in views.images])
    valid = jnp.stack([pad(mask, "constant", constant_values=False) for mask in views.valid])
    window = make_window(images, valid, views.intrinsics, camera_from_world, config)
    span = size + full
    transform = lambda a: jnp.fft.rfft2(a, (span, span), axes=(1, 2))
    of_target = transform(window.weights[..., None] * window.target)
    of_weights = transform(window.weights)
    energy = jnp.sum(window.weights[..., None] * window.target**2, (1, 2, 3))
    origin = rigid.apply(camera_from_world, poses[:1, :3, 3])[:, 0]
    middle = 0.5 * (size - 1)
    intrinsics = views.intrinsics.at[:, 2:].set(middle)
    frames = jnp.asarray([[image.shape[1], image.shape[0]] for image in views.images], jnp.float32)

    def projected(pose, depth):
        """Correlations (V, span, span) with shifts of the body's projection in pixels, at one distance from the source."""
        camera_from_box = rigid.matmul(camera_from_world, pose)
        at = jnp.zeros_like(origin).at[:, 2].set(origin[:, 2] + depth)
        camera_from_box = camera_from_box.at[:, :3, 3].set(at)
        image = 0.0
        for volume, box_from_index in ((parts.rest, parts.box_from_rest), (parts.excess, parts.box_from_excess)):
            index_from_camera = jnp.linalg.inv(rigid.matmul(camera_from_box, box_from_index))[:, :3]
            image = image + drr(
                volume, index_from_camera, intrinsics, size, size, step_mm=config.levels[0].rest_step_mm
            )
        slope = derivatives(image[..., None], config.blur_px)[..., 0, :]
        product = jnp.sum(of_target * jnp.conj(transform(slope)), -1)
        seen = of_weights * jnp.conj(transform(jnp.sum(slope**2, -1)))
        product, seen = (jnp.fft.irfft2(a, (span, span), axes=(1, 2)) for a in (product, seen))
        least = LEAST_ENERGY * jnp.max(seen, (1, 2), keepdims=True)
        return product * jax.lax.rsqrt(energy[:, None, None] * jnp.maximum(seen, least) + 1e-20)

    def of_turn(pose):
        maps = jnp.stack([projected(pose, depth) for depth in depths])
        total = jnp.zeros(shifts[..., 0].size)
        for view, E in enumerate(camera_from_world):
            points = rigid.apply(E, (pose[:3, 3] + shifts).reshape(-1, 3))
            pixels = camera.project_camera(views.intrinsics[view], points)
            offset = jnp.round(pixels - middle).astype(jnp.int32) % span
            away = jnp.abs(points[:, 2:] - origin[view, 2] - jnp.asarray(depths))
            score = maps[jnp.argmin(away, -1), view, offset[:, 1], offset[:, 0]]
            inside = jnp.all((pixels > -0.5) & (pixels < frames[view] - 0.5), -1)
            total = total + jnp.where(inside, score, -1.0)
        total = total.reshape(shifts.shape[:3])
        highest = jax.lax.reduce_window(total, -jnp.inf, jax.lax.max, (3, 3, 3), (1, 1, 1), "SAME")
        peaks = jnp.where(total == highest, total, -jnp.inf).ravel()
        score, index = jax.lax.top_k(peaks, PEAKS)
        return score, shifts.reshape(-1, 3)[index]

    return jax.lax.map(of_turn, poses)


def candidates(
    program: Callable[..., tuple[Array, Array]],
    parts: Parts,
    xrays: Sequence[XRay],
    world_from_box: Float[Array, "4 4"],
    config: OverviewConfig,
    refine: RefineConfig,
    count: int,
    reach_mm: float | None = None,
) -> tuple[list[Float[np.ndarray, "4 4"]], list[float]]:
    """Poses at which the body fits X-rays roughly, from best to worst, all of different turns or places, and their fits.

    A fit is the sum over views of correlations of derivative images.

    Args:
      program: `best_shifts`, compiled; world_from_box: the pose whose orientation is trusted to config.turn_rad.
      count: of poses, at most; reach_mm: in place of config's.
    """
    reach_mm = config.reach_mm if reach_mm is None else reach_mm
    views = at_resolution(xrays, config.pixel_mm)
    cameras = np.stack([xray.camera.camera_from_world for xray in xrays])
    poses = np.stack([world_from_box @ rigid_host.matrix(turn, 0.0) for turn in turns(config)])
    half = max(1, round(reach_mm / config.depth_mm))
    depths = tuple(config.depth_mm * (np.arange(half + 1) - 0.5 * half))
    full = max(max(image.shape) for image in views.images)
    size = SHAPE_MULTIPLE * math.ceil((full + 2.0 * reach_mm / config.pixel_mm) / SHAPE_MULTIPLE)
    arguments = parts, views, on_device(cameras), on_device(poses), on_device(grid(reach_mm, config.spacing_mm))
    score, shift = jax.device_get(program(*arguments, size=size, depths=depths, config=refine))
    chosen, fits = [], []
    for turn, peak in zip(*np.unravel_index(np.argsort(-score, axis=None), score.shape)):
        if not score[turn, peak] > 0.0 or len(chosen) == count:
            break
        pose = poses[turn].copy()
        pose[:3, 3] += shift[turn, peak]
        chosen.append(pose)
        fits.append(float(score[turn, peak]))
    return chosen, fits
