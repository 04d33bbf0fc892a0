"""Second-order refinement of a vertebra's pose against the raw X-rays of a patient who has moved since the CT.

An X-ray is modelled as two rigid parts of the CT: the vertebra, in what it attenuates above the muscle that fills its hole, and
everything else, each at a pose of its own. Both are projected exactly and with analytic derivatives (`kernels.drr`); a
Gauss-Newton step moves both at once, so that neighbours and ribs are explained instead of leaned on. Images are compared in
their derivatives, where scatter and detectors' drifts are small, under a gain that varies smoothly and with the thickness, which
stands for hardening and scatter and is eliminated from every step (variable projection, Golub and Pereyra 1973). Residuals have
Student's t distribution (Lange et al. 1989): metal and what the CT does not know weigh little.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kernels.drr import drr_and_motion
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.registration.edges import correlation
from radgs_jax.registration.edges import derivatives
from radgs_jax.registration.edges import einsum
from radgs_jax.registration.edges import interior
from radgs_jax.registration.edges import noise_energy
from radgs_jax.registration.edges import T_FREEDOM
from radgs_jax.registration.gains import eliminate_gains
from radgs_jax.registration.gains import fit_gains

STEP_MM = 5.0
"""Largest step of a parameter, rotations by their lever."""
FAINT = 1e-4
"""Share of the steepest squared slope of an image below which a pixel shows no edge."""
APART_MM = 2.0
"""Distance from which two poses are two answers."""
TIE = (0.1, 4.0)
"""Expected size, rad and mm, of what the rest of the body has turned and shifted against the vertebra since the CT."""


@dataclasses.dataclass(frozen=True)
class Level:
    """One resolution.

    pixel_mm: at the isocentre; size: pixels along the window; iterations: Gauss-Newton steps; *_step_mm: sample distances.
    tie: how far the parts may part, in `TIE`; a tight one looks for both together, which reaches further.
    keep: how many candidates go on to the next level.
    """

    pixel_mm: float
    size: int
    iterations: int
    vertebra_step_mm: float
    rest_step_mm: float
    tie: float = 1.0
    keep: int = 1


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """levels: coarse to fine; blur_px: standard deviation of the derivative filter.

    gain_ridge: how strongly gains are drawn to one number; damping: of Levenberg and Marquardt, relative to the diagonal.
    """

    levels: tuple = (
        Level(3.0, 48, 7, 1.5, 3.0, 0.1),
        Level(1.5, 64, 6, 1.0, 3.0),
        Level(0.75, 112, 3, 1.0, 2.0),
    )
    blur_px: float = 1.0
    gain_ridge: float = 0.01
    damping: float = 1e-3


@flax.struct.dataclass
class LevelViews:
    """V X-rays at one resolution, which may differ in size.

    images, valid: lists of line integrals (H_v, W_v) and of the pixels that count; intrinsics: (V, 4).
    """

    images: list
    valid: list
    intrinsics: jax.Array


@flax.struct.dataclass
class Refined:
    """world_from_box, world_from_rest: (4, 4) poses of the vertebra and of the rest, both of box-frame points.

    information: (6, 6) of the vertebra's twist about its centre in world axes (rad, mm), the rest's pose and gains eliminated,
    as if pixels were independent. similarity: (V,) correlation of image and model derivatives, the image's noise made good;
    support: (V,) the same of what the rest leaves of the image with the vertebra alone, where it has edges; step_mm: size of the
    last step; apart_mm: how far apart the views would have the vertebra in the direction that all see.
    rival_mm, margin: distance of the best other start that ended apart, the last time several were left, and by how much it fits
    worse; 0 and 2 without one. trajectory, fit: (levels, 4, 4) world_from_box after each level, and (levels,) how well it fits,
    mean similarity plus mean support.
    """

    world_from_box: jax.Array
    world_from_rest: jax.Array
    information: jax.Array
    similarity: jax.Array
    support: jax.Array
    step_mm: jax.Array
    apart_mm: jax.Array
    rival_mm: jax.Array
    margin: jax.Array
    trajectory: jax.Array
    fit: jax.Array


@flax.struct.dataclass
class _Window:
    """What does not change from step to step of V crops of one level.

    target: (V, S, S, 2) derivatives of the image; inside, weights: (V, S, S), where they count, and how much at first; told:
    (V, 1, 1) pixels with edges; noise: (V,) as of `noise_energy`; intrinsics: (V, 4); camera_from_world: (V, 4, 4).
    """

    target: jax.Array
    inside: jax.Array
    weights: jax.Array
    told: jax.Array
    noise: jax.Array
    intrinsics: jax.Array
    camera_from_world: jax.Array


def project_part(volume, box_from_index, world_from_box, centre, intrinsics, camera_from_world, size, step_mm):
    """Line integrals (V, S, S) of a part and their derivatives (V, S, S, 6) to a twist in world axes about `centre`.

    Args:
      volume: (X, Y, Z) 1/mm; box_from_index, world_from_box: (4, 4); centre: (3,) world mm; intrinsics: (V, 4);
        camera_from_world: (V, 4, 4); size: S; step_mm: sample distance.
    """
    camera_from_index = rigid.matmul(camera_from_world, rigid.matmul(world_from_box, box_from_index))
    index_from_camera = jnp.linalg.inv(camera_from_index)[:, :3]
    image, motion = drr_and_motion(volume, index_from_camera, intrinsics, size, size, step_mm=step_mm)
    # From a twist about the source in camera axes to one about the centre in world axes.
    arm = rigid.apply(camera_from_world, centre[None])[:, 0]
    turn, shift = motion[..., :3], motion[..., 3:]
    turn = turn - jnp.cross(arm[:, None, None], shift)
    R = camera_from_world[:, :3, :3]
    return image, jnp.concatenate([einsum("vyxi,vij->vyxj", part, R) for part in (turn, shift)], -1)


def _window(images, valid, intrinsics, camera_from_world, config):
    """The `_Window` of crops (V, S, S)."""
    target = derivatives(images[..., None], config.blur_px)[..., 0, :]
    inside = interior(valid, int(np.ceil(3 * config.blur_px)))
    # Edges far beyond the typical, of metal or a collimator, would decide the first fit alone. Pixels without any, of air,
    # say nothing of what is typical: a bone in air would be one outlier.
    square = jnp.sum(target**2, -1)
    telling = (inside > 0) & (square > FAINT * jnp.max(inside * square, (1, 2), keepdims=True))
    told = jnp.maximum(jnp.sum(telling, (1, 2), keepdims=True), 1.0)
    typical = jnp.nan_to_num(jnp.nanmedian(jnp.where(telling, square, jnp.nan), (1, 2), keepdims=True)) + 1e-12
    weights = inside * (T_FREEDOM + 2.0) / (T_FREEDOM + square / (4.0 * typical))
    noise = noise_energy(images, valid, config.blur_px)
    return _Window(target, inside, weights, told, noise, intrinsics, camera_from_world)


def _damped(normal, damping):
    """Normal matrices (..., 12, 12), their diagonals raised: in proportion, and by a little where nothing is known."""
    return normal * (1.0 + damping * jnp.eye(12)) + 1e-3 * jnp.eye(12)


def _apart(normals, rights, camera_from_world, damping):
    """How far apart, mm, the views would move the vertebra along the one direction that all of them see, each by itself.

    Args:
      normals, rights: (V, 12, 12) and (V, 12) of the views' own Gauss-Newton steps, in mm.
    """
    axes = camera_from_world[:, 2, :3]
    _, directions = jnp.linalg.eigh(einsum("vi,vj->ij", axes, axes))
    steps = jnp.linalg.solve(_damped(normals, damping), rights[..., None])[..., 0]
    along = einsum("vi,i->v", steps[:, 3:6], directions[:, 0])
    return jnp.max(along) - jnp.min(along)


def _step(parts, window, poses, level, config):
    """One Gauss-Newton step from poses (2, 4, 4): the new poses, and what `Refined` has of the linearisation."""
    camera_from_world, target, inside = window.camera_from_world, window.target, window.inside
    centre = poses[0, :3, 3]
    cameras = window.intrinsics, camera_from_world, level.size
    excess, d_excess = project_part(
        parts.excess, parts.box_from_excess, poses[0], centre, *cameras, level.vertebra_step_mm
    )
    rest, d_rest = project_part(parts.rest, parts.box_from_rest, poses[1], centre, *cameras, level.rest_step_mm)
    filtered = derivatives(jnp.concatenate([rest[..., None], excess[..., None], d_excess, d_rest], -1), config.blur_px)
    of_rest, of_excess = filtered[..., 0, :], filtered[..., 1, :]
    gain_rest, gain_excess, columns, gains, weights = fit_gains(
        window, of_rest, of_excess, rest + excess, config.gain_ridge
    )
    scaled = filtered[..., 2:, :] * jnp.asarray(np.tile(rigid.TWIST_SCALE, 2), jnp.float32)[:, None]
    jacobian = jnp.concatenate(
        [scaled[..., :6, :] * gain_excess[..., None, None], scaled[..., 6:, :] * gain_rest[..., None, None]], -2
    )
    model_rest, model_excess = gain_rest[..., None] * of_rest, gain_excess[..., None] * of_excess
    residual = target - model_rest - model_excess
    normals, rights = eliminate_gains(columns, gains, jacobian, residual, weights, config.gain_ridge)
    normal, right = jnp.sum(normals, 0), jnp.sum(rights, 0)
    # What is known beforehand: the rest of the body has moved little against the vertebra.
    relative = rigid.twist_about(centre, rigid.matmul(poses[1], rigid.inverse(poses[0]))) / rigid.TWIST_SCALE
    size = level.tie * np.array([TIE[0] * rigid.LEVER_MM] * 3 + [TIE[1]] * 3)
    tie = np.kron(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.diag(size**-2.0))
    normal = normal + tie
    right = right - tie @ jnp.concatenate([jnp.zeros(6), relative])
    step = jnp.linalg.solve(_damped(normal, config.damping), right)
    step = step / jnp.maximum(1.0, jnp.max(jnp.abs(step)) / STEP_MM)
    moved = rigid.matmul(rigid.motion_about(centre, step.reshape(2, 6) * rigid.TWIST_SCALE), poses)
    schur = normal[:6, :6] - normal[:6, 6:] @ jnp.linalg.solve(normal[6:, 6:] + 1e-6 * jnp.eye(6), normal[6:, :6])
    edges = jnp.sum(model_excess**2, -1)
    edges = inside * (edges > 0.01 * jnp.max(edges, (1, 2), keepdims=True))
    return moved, {
        "information": schur / rigid.TWIST_SCALE[:, None] / rigid.TWIST_SCALE,
        "similarity": correlation(target, model_rest + model_excess, inside, window.noise),
        "support": correlation(target - model_rest, model_excess, edges, window.noise),
        "step_mm": jnp.linalg.norm(step[:6]),
        "apart_mm": _apart(normals + tie, rights, camera_from_world, config.damping),
    }


def _start(pose):
    return jnp.stack([pose, pose])


def refine(parts, pyramid, camera_from_world, starts, config):
    """Refines the best of several start poses, level by level; deterministic, of static cost.

    Every start runs through the coarsest level; after each level those go on that fit best, as many as the level keeps.

    Args:
      parts: `Parts`; pyramid: a `Views` for each of config.levels, at its resolution; camera_from_world: (V, 4, 4).
      starts: (K, 4, 4) world_from_box; the rest of the body starts with the vertebra.
    Returns:
      `Refined`.
    """
    poses = jax.vmap(_start)(starts)
    trajectory, fit = [], []
    rival_mm, margin = jnp.float32(0.0), jnp.float32(0.0)
    for level, views in zip(config.levels, pyramid):

        def run(poses, level=level, views=views):
            camera_from_box = rigid.matmul(camera_from_world, poses[0])
            crops = camera.windows(views.images, views.valid, views.intrinsics, camera_from_box, level.size)
            window = _window(*crops, camera_from_world, config)

            def body(poses, _):
                return _step(parts, window, poses, level, config)

            poses, found = jax.lax.scan(body, poses, None, length=level.iterations)
            return poses, jax.tree.map(lambda a: a[-1], found)

        poses, found = jax.vmap(run)(poses)
        score = jnp.mean(found["similarity"], -1) + jnp.mean(found["support"], -1)
        order = jnp.argsort(-score)[: level.keep]
        if len(score) > 1:
            away = rigid.distance(poses[:, 0], poses[order[0], 0][None], jnp.zeros(3))
            # Of those that ended elsewhere, the best: how far off it is and by how much it fits worse.
            other = jnp.argmax(jnp.where(away > APART_MM, score, -jnp.inf))
            elsewhere = away[other] > APART_MM
            rival_mm = jnp.where(elsewhere, away[other], 0.0)
            margin = jnp.where(elsewhere, score[order[0]] - score[other], 2.0)
        poses, found = jax.tree.map(lambda a: a[order], (poses, found))
        trajectory.append(poses[0, 0])
        fit.append(score[order[0]])
    best = jax.tree.map(lambda a: a[0], found)
    history = {"trajectory": jnp.stack(trajectory), "fit": jnp.stack(fit)}
    return Refined(poses[0, 0], poses[0, 1], rival_mm=rival_mm, margin=margin, **history, **best)
