"""Second-order refinement of a vertebra's pose against the raw X-rays of a patient who has moved since the CT.

An X-ray is modelled as two rigid parts of the CT, each with its own pose: the vertebra, as its attenuation above the muscle that
fills its hole, and the rest of the body. Both are projected exactly and with analytic derivatives (`kernels.drr`). A
Gauss-Newton step moves both at once, so that neighbouring vertebrae and ribs are modelled instead of biasing the pose. Images
are compared by their derivatives, in which scatter and drifts of the panel are small, under a gain that models beam hardening and
scatter and is eliminated from every step (`gains`). Residuals have Student's t distribution (Lange et al. 1989), so that metal and
other things that the CT lacks have little weight.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int32

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.geometry import rigid_host
from radgs_jax.registration.edges import correlation
from radgs_jax.registration.edges import derivatives
from radgs_jax.registration.edges import einsum
from radgs_jax.registration.edges import interior
from radgs_jax.registration.edges import noise_energy
from radgs_jax.registration.edges import T_FREEDOM
from radgs_jax.registration.gains import eliminate_gains
from radgs_jax.registration.gains import fit_gains
from radgs_jax.registration.parts import on_device
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.projection import project
from radgs_jax.registration.projection import project_near

STEP_MM = 5.0
"""Maximum step of any parameter, mm; rotations are multiplied by `rigid.LEVER_MM`. Chosen by hand: at half, distant starts need
more steps than a level takes; at twice, the linearisation at a distant start may throw the pose past its optimum."""
EDGE_FREE = 1e-4
"""Pixels whose squared gradient is at or below this fraction of the image's maximum are treated as edge-free. Chosen by hand: it
separates air from tissue in X-rays of a bone in air; too large a value would drop the weak edges behind a thick body."""
EDGE_OF_VERTEBRA = 0.01
"""`Refined.support` is computed where the squared gradient of the modelled vertebra is above this fraction of its maximum. Chosen
by hand: smaller values add pixels that hold more noise than vertebra, larger ones leave only its strongest edges. Changing it
changes what `support` means, so that the acceptance rule must be fitted again."""
FIRST_VARIANCE = 4.0
"""Variance of the residuals that the first weights assume, in units of the median squared gradient of the image's edges. Chosen
by hand: smaller values keep strong edges, of bone as well as of metal, out of the first fit; larger ones let them decide it."""
DISTINCT_MM = 2.0
"""Minimum distance of two different answers, mm, as `rigid.distance` defines it: that of a right pose from the truth,
`metrics.SUCCESS_MM`. At half, starts that have not converged are taken for rivals; at twice, near rivals go unreported."""
MAX_MARGIN = 2.0
"""Margin of an answer without a rival: the largest possible `Refined.fit`, since it is the sum of two correlations."""
COUPLING = (0.1, 4.0)
"""Standard deviation, rad and mm, of the motion of the vertebra relative to the rest of the body since the CT. Chosen by hand: a
small value helps distant starts, a large one leaves the vertebra free. Motions of 0 to 3 times those of `experiments.study` all end
with a median error of 0.01 to 0.02 mm (docs/accuracy.md), so that half or twice should change little. `Level.tie` scales it."""
RIM = 1.0
"""Pixels nearer than this many standard deviations of the derivative filter to one that is invalid do not count. Invalid pixels are
filled smoothly (`geometry.fill`), so that the filter sees no edge of theirs; on 12 simulated scenes with metal, 1 leaves all in
reach of their starts, and 3 loses three of them, since it leaves out most of a vertebra with screws at 3 mm pixels."""
RECUT_MM = 8.0
"""A level is not gone through again where all poses have settled within this distance of the middle of their windows, mm. Chosen
by hand, a seventh of the smallest window: half repeats levels in vain, twice lets a vertebra leave its window."""
REUSE_PX = 0.1
"""The rest of the body is projected anew where it has moved by this much since, pixels, turns by their lever; within it, its image
moves by its derivatives. Chosen by hand: half projects it in more steps; at 2.5 times, a neighbour's place at the coarsest level
looked worse than it was, and a vertebra two levels off was not found (tests of the search)."""
FEW = 8
"""Most starts that are refined one after the other, each until it has settled; more go in step, and project the rest each time.
Measured on two cores: in step, 32 starts take a fifth less time, and 8 take a tenth more. So half costs little, and at four times
the wider search takes longer."""
MIN_CURVATURE = 1e-3
"""Added to the diagonal of every normal matrix, 1/mm^2 in the parameters' common scale: it keeps directions that no pixel
constrains solvable. Chosen by hand, to be far below the curvature that pixels contribute; half or twice should not matter."""


@dataclasses.dataclass(frozen=True)
class Level:
    """One resolution of a refinement.

    The defaults of `RefineConfig` were chosen by hand on simulated scenes; each value trades time for accuracy or reach.

    Attributes:
      pixel_mm: pixel at the isocentre, mm. The coarsest sets the capture range, the finest the accuracy: half the value is
        finer and reaches less far.
      size: pixels along the square window. The window should hold the vertebra and its neighbours' edges: at half it cuts the
        vertebra, at twice a step takes four times as long.
      iterations: largest number of Gauss-Newton steps. Too few leave a distant start unsettled, which `SearchConfig` then repeats.
      vertebra_step_mm, rest_step_mm: sample distance along rays through the two parts, mm. Projections take time in inverse
        proportion; a step much larger than a voxel aliases.
      tie: factor on `COUPLING` at this level, no unit. A small one moves both parts nearly as one body, which reaches further.
      keep: number of candidates that go on to the next level.
      settled_mm: length of the step after which no more are taken, mm, rotations by their lever. At twice, the next level starts
        further off; at half, it takes a step more.
    """

    pixel_mm: float
    size: int
    iterations: int
    vertebra_step_mm: float
    rest_step_mm: float
    tie: float = 1.0
    keep: int = 1
    settled_mm: float = 0.02


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """How poses are refined. The acceptance rule is fitted with it: `confidence.method_digest`.

    Attributes:
      levels: `Level`s, coarse to fine.
      blur_px: standard deviation of the derivative filter, pixels. Chosen by hand: at half, noise dominates the derivatives; at
        twice, fine edges are lost, and the border that the filter invalidates is twice as wide.
      gain_ridge: penalty that draws all gains but the constant one to 0, as a fraction of the constant gain's information.
        Chosen by hand: weaker penalties let gains imitate motion, stronger ones leave hardening and scatter unmodelled.
      damping: increase of the normal matrix's diagonal, as a fraction of it (Marquardt 1963). Chosen by hand: small, since
        `STEP_MM` bounds the step; larger values slow the last steps down.
      relaxation: factor on every step. Weights that follow the residuals make plain steps about half as long as needed (as in all
        of EM), so that errors fall to a half with each; at 1.7, to about a sixth. At 2, poses may swing about their optimum.
    """

    levels: tuple[Level, ...] = (
        Level(3.0, 48, 8, 1.5, 3.0, 0.1, settled_mm=0.4),
        Level(1.5, 64, 8, 1.0, 2.0, settled_mm=0.08),
        Level(0.75, 80, 3, 0.5, 1.0, settled_mm=0.03),
    )
    blur_px: float = 1.0
    gain_ridge: float = 0.01
    damping: float = 1e-3
    relaxation: float = 1.7


FINEST_STEP_MM = 0.4
"""Smallest sample distance of `levels_of`, mm: about the voxels of a CT of a hand or foot. Half takes twice as long."""


def levels_of(pixels_mm: Sequence[float]) -> tuple[Level, ...]:
    """Levels of given resolutions, from coarse to fine, with the other values as in `RefineConfig` or carried on from there.

    Args:
      pixels_mm: pixel of each level at the isocentre, mm, each smaller than the one before.
    """
    known, levels = RefineConfig().levels[::-1], []
    for index, pixel_mm in enumerate(pixels_mm):
        window_mm = np.interp(pixel_mm, [k.pixel_mm for k in known], [k.pixel_mm * k.size for k in known])
        size = 16 * int(np.ceil(window_mm / pixel_mm / 16))
        step_mm = float(np.clip(pixel_mm / 1.5, FINEST_STEP_MM, 1.5))
        last = index == len(pixels_mm) - 1
        iterations = 3 if last and index else 8
        settled_mm = 0.13 * pixel_mm if index == 0 else 0.05 * pixel_mm
        rest_step_mm, tie = 1.0 if last else 2.0 if index else 3.0, 1.0 if index else 0.1
        levels.append(Level(float(pixel_mm), size, iterations, step_mm, rest_step_mm, tie, settled_mm=settled_mm))
    return tuple(levels)


@flax.struct.dataclass
class LevelViews:
    """V X-rays at one resolution, which may differ in size.

    Attributes:
      images: V line-integral images (H_v, W_v), no unit.
      valid: V arrays (H_v, W_v) bool, the pixels that count.
      intrinsics: (V, 4) fx, fy, cx, cy in pixels.
    """

    images: list[Leaf]
    valid: list[Leaf]
    intrinsics: Leaf


@flax.struct.dataclass
class Refined:
    """A refined pose and what the refinement reports about itself.

    Attributes:
      world_from_box: (4, 4) pose of the vertebra, mm.
      world_from_rest: (4, 4) pose of the rest of the body, of points in the box frame, mm.
      information: (6, 6) of the vertebra's twist about its centre in world axes (rad, mm), with the rest's pose and the gains
        eliminated, as if pixels were independent.
      misfit: (6, 6) covariance of the same twist, as squares of `gains.BLOCK` pixels disagree about it.
      similarity: (V,) correlation of the derivatives of image and model, corrected for the image's noise.
      support: (V,) the same of the image minus the rest with the vertebra alone, where the vertebra has edges.
      step_mm: length of the last step, rotations by their lever.
      view_disagreement_mm: how far the views' own steps differ in the direction that all views see.
      rival_mm: distance of the best other answer, the last time that several starts were left; 0 without one.
      margin: by how much that answer fits worse; `MAX_MARGIN` without one.
      trajectory: (levels, 4, 4) world_from_box after each level that was gone through, the last time.
      fit: (levels,) mean similarity plus mean support then.
    """

    world_from_box: Leaf
    world_from_rest: Leaf
    information: Leaf
    misfit: Leaf
    similarity: Leaf
    support: Leaf
    step_mm: Leaf
    view_disagreement_mm: Leaf
    rival_mm: Leaf
    margin: Leaf
    trajectory: Leaf
    fit: Leaf


@flax.struct.dataclass
class Candidates:
    """N poses after one level.

    Attributes:
      poses: (N, 2, 4, 4) world_from_box of the vertebra and of the rest, mm.
      fit: (N,) mean similarity plus mean support.
      information, misfit, similarity, support, step_mm, view_disagreement_mm: as in `Refined`, of each, from its last step.
    """

    poses: Leaf
    fit: Leaf
    information: Leaf
    misfit: Leaf
    similarity: Leaf
    support: Leaf
    step_mm: Leaf
    view_disagreement_mm: Leaf


REPORTED = ("information", "misfit", "similarity", "support", "step_mm", "view_disagreement_mm")
"""Fields of `Refined` that its last step reports."""


@flax.struct.dataclass
class Window:
    """What stays the same from step to step, for V crops of one level.

    Attributes:
      target: (V, S, S, 2) derivatives of the image.
      inside: (V, S, S) 1 where they count.
      weights: (V, S, S) those of the first fit of gains.
      edge_count: (V, 1, 1) number of pixels with edges.
      noise: (V,) of `noise_energy`.
      intrinsics: (V, 4); camera_from_world: (V, 4, 4).
    """

    target: Leaf
    inside: Leaf
    weights: Leaf
    edge_count: Leaf
    noise: Leaf
    intrinsics: Leaf
    camera_from_world: Leaf


def make_window(
    images: Float[Array, "views size size"],
    valid: Bool[Array, "views size size"],
    intrinsics: Float[Array, "views 4"],
    camera_from_world: Float[Array, "views 4 4"],
    config: RefineConfig,
) -> Window:
    """The `Window` of crops (V, S, S)."""
    target = derivatives(images[..., None], config.blur_px)[..., 0, :]
    inside = interior(valid, int(np.ceil(RIM * config.blur_px)))
    # Much stronger edges than the median, of metal or a collimator, would dominate the first fit. Pixels of air are left out
    # of the median, since they would make all of a bone in air an outlier.
    square = jnp.sum(target**2, -1)
    has_edge = (inside > 0) & (square > EDGE_FREE * jnp.max(inside * square, (1, 2), keepdims=True))
    edge_count = jnp.maximum(jnp.sum(has_edge, (1, 2), keepdims=True), 1.0)
    typical = jnp.nan_to_num(jnp.nanmedian(jnp.where(has_edge, square, jnp.nan), (1, 2), keepdims=True)) + 1e-12
    weights = inside * (T_FREEDOM + 2.0) / (T_FREEDOM + square / (FIRST_VARIANCE * typical))
    noise = noise_energy(images, valid, config.blur_px)
    cameras = jnp.asarray(intrinsics), jnp.asarray(camera_from_world)
    return Window(target, inside, weights, edge_count, noise, *cameras)


def _damped(normal, damping):
    """Normal matrices (..., 12, 12) with larger diagonals: by a fraction, and by `MIN_CURVATURE`."""
    return normal * (1.0 + damping * jnp.eye(12)) + MIN_CURVATURE * jnp.eye(12)


def _view_disagreement(normals, rights, camera_from_world, damping):
    """Range, mm, of the shifts that each view alone would give the vertebra, along the direction that all views see best.

    Args:
      normals, rights: (V, 12, 12) and (V, 12) of each view's own Gauss-Newton step, in mm.
    """
    axes = camera_from_world[:, 2, :3]
    _, directions = jnp.linalg.eigh(einsum("vi,vj->ij", axes, axes))
    steps = jnp.linalg.solve(_damped(normals, damping), rights[..., None])[..., 0]
    along = einsum("vi,i->v", steps[:, 3:6], directions[:, 0])
    return jnp.max(along) - jnp.min(along)


def _step(parts, window, poses, rest, level, config):
    """One Gauss-Newton step from poses (2, 4, 4): the new poses, and those fields of `Refined` that the linearisation gives.

    rest: a `Projection` of the rest near its pose.
    """
    camera_from_world, target, inside = window.camera_from_world, window.target, window.inside
    centre = poses[0, :3, 3]
    vertebra = project(
        parts.excess,
        parts.box_from_excess,
        poses[0],
        centre,
        window.intrinsics,
        camera_from_world,
        level.size,
        level.vertebra_step_mm,
        config.blur_px,
    )
    rest_image, rest_filtered = project_near(rest, poses[1], centre)
    of_rest, of_excess = rest_filtered[..., 0, :], vertebra.filtered[..., 0, :]
    gain_rest, gain_excess, columns, gains, weights = fit_gains(
        target,
        inside,
        window.weights,
        window.edge_count,
        of_rest,
        of_excess,
        rest_image + vertebra.image,
        config.gain_ridge,
    )
    scale = jnp.asarray(rigid.TWIST_SCALE, jnp.float32)[:, None]
    of_parts = ((vertebra.filtered, gain_excess), (rest_filtered, gain_rest))
    jacobian = [filtered[..., 1:, :] * scale * gain[..., None, None] for filtered, gain in of_parts]
    jacobian = jnp.concatenate(jacobian, -2)
    model_rest, model_excess = gain_rest[..., None] * of_rest, gain_excess[..., None] * of_excess
    residual = target - model_rest - model_excess
    normals, rights, blocks = eliminate_gains(columns, gains, jacobian, residual, weights, config.gain_ridge)
    normal, right = jnp.sum(normals, 0), jnp.sum(rights, 0)
    # The prior: the vertebra has moved little relative to the rest of the body.
    relative = rigid.twist_about(centre, rigid.matmul(poses[1], rigid.inverse(poses[0]))) / rigid.TWIST_SCALE
    size = level.tie * np.array([COUPLING[0] * rigid.LEVER_MM] * 3 + [COUPLING[1]] * 3)
    coupling = np.kron(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.diag(size**-2.0))
    normal = normal + coupling
    right = right - coupling @ jnp.concatenate([jnp.zeros(6), relative])
    step = jnp.linalg.solve(_damped(normal, config.damping), right)
    # What each square of pixels does to the step, whose squares sum to its covariance (White 1980).
    pulls = (
        jnp.linalg.solve(_damped(normal, 0.0), blocks.reshape(-1, blocks.shape[-1]).T)[:6] * rigid.TWIST_SCALE[:, None]
    )
    step = config.relaxation * step
    step = step / jnp.maximum(1.0, jnp.max(jnp.abs(step)) / STEP_MM)
    moved = rigid.matmul(rigid.motion_about(centre, step.reshape(2, 6) * rigid.TWIST_SCALE), poses)
    schur = normal[:6, :6] - normal[:6, 6:] @ jnp.linalg.solve(normal[6:, 6:] + 1e-6 * jnp.eye(6), normal[6:, :6])
    edges = jnp.sum(model_excess**2, -1)
    edges = window.weights * (edges > EDGE_OF_VERTEBRA * jnp.max(inside * edges, (1, 2), keepdims=True))
    return moved, {
        "information": schur / rigid.TWIST_SCALE[:, None] / rigid.TWIST_SCALE,
        "misfit": einsum("ib,jb->ij", pulls, pulls),
        "similarity": correlation(target, model_rest + model_excess, window.weights, window.noise),
        "support": correlation(target - model_rest, model_excess, edges, window.noise),
        "step_mm": jnp.linalg.norm(step[:6]),
        "view_disagreement_mm": _view_disagreement(normals + coupling, rights, camera_from_world, config.damping),
    }


def refine_level(
    parts: Parts,
    views: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    poses: Float[Array, "starts 2 4 4"],
    iterations: Int32[Array, ""],
    level: Level,
    config: RefineConfig,
) -> Candidates:
    """Gauss-Newton steps at one level from every one of several poses, until each has settled or `iterations` are taken.

    Args:
      views: X-rays at the level's resolution; poses: world_from_box of the vertebra and of the rest, mm; iterations: 1 or more.
      level: its own numbers of steps and of candidates are not used.
    """
    few = len(poses) <= FEW

    def run(poses):
        camera_from_box = rigid.matmul(camera_from_world, poses[0])
        images, valid, intrinsics = camera.windows(
            views.images, views.valid, views.intrinsics, camera_from_box, level.size
        )
        window = make_window(images, valid, intrinsics, camera_from_world, config)

        def project_rest(poses):
            rest = parts.rest, parts.box_from_rest, poses[1], poses[0, :3, 3], intrinsics, camera_from_world
            return project(*rest, level.size, level.rest_step_mm, config.blur_px)

        def step(poses, near):
            if near is None:
                return *_step(parts, window, poses, project_rest(poses), level, config), None
            motion = rigid.matmul(poses[1], rigid.inverse(near.world_from_box))
            moved = jnp.abs(rigid.twist_about(poses[0, :3, 3], motion)) / rigid.TWIST_SCALE
            has_moved = jnp.max(moved) > REUSE_PX * level.pixel_mm
            near = jax.lax.cond(has_moved, project_rest, lambda _: near, poses)
            return *_step(parts, window, poses, near, level, config), near

        # `vmap` would compute both branches of the condition.
        near = project_rest(poses) if few else None
        shapes = jax.eval_shape(lambda poses: step(poses, None)[1], poses)
        unknown = jax.tree.map(lambda a: jnp.full(a.shape, jnp.inf, a.dtype), shapes)

        def goes_on(carry):
            count, _, found, _ = carry
            return (count < iterations) & (found["step_mm"] > level.settled_mm)

        def body(carry):
            count, poses, _, near = carry
            return count + 1, *step(poses, near)

        last: Any = jax.lax.while_loop(goes_on, body, (jnp.int32(0), poses, unknown, near))
        _, poses, found, _ = last
        fit = jnp.mean(found["similarity"], -1) + jnp.mean(found["support"], -1)
        return Candidates(poses=poses, fit=fit, **found)

    every = functools.partial(jax.lax.map, run) if few else jax.vmap(run)
    return every(poses)


def level_arguments(
    parts: Parts,
    views: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    poses: Float[Array, "starts 2 4 4"],
    level: Level,
    config: RefineConfig,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and static keywords of `refine_level`, which are the same for any number of steps and of candidates."""
    count = np.asarray(level.iterations, np.int32)
    shared = dataclasses.replace(level, iterations=0, keep=0)
    return (parts, views, camera_from_world, on_device(poses), count), {"level": shared, "config": config}


def refine(
    program: Callable[..., Candidates],
    parts: Parts,
    pyramid: Sequence[LevelViews],
    camera_from_world: Float[Array, "views 4 4"],
    starts: Float[Array, "starts 4 4"],
    config: RefineConfig,
    levels: Sequence[Level] | None = None,
    least_fit: float = -math.inf,
) -> Refined:
    """Refines the best of several start poses, level by level.

    Every start runs through the first level. After each level, the `Level.keep` candidates that fit best go on.

    Args:
      program: `refine_level`, compiled.
      pyramid: X-rays at the resolution of each level; starts: world_from_box, mm, which is also where the rest of the body starts.
      levels: in place of config's; least_fit: the last one is left out where the best candidate fits worse.
    Returns:
      `Refined` in numpy.
    """
    poses, after = np.stack([starts] * 2, 1), {}
    rival_mm, margin, settled_at, best_fit = 0.0, MAX_MARGIN, None, math.inf
    levels = config.levels if levels is None else levels
    for index, (level, views) in enumerate(zip(levels, pyramid), 1):
        if settled_at == level.pixel_mm:
            continue
        if index == len(levels) and best_fit < least_fit:
            break
        arguments, static = level_arguments(parts, views, camera_from_world, poses, level, config)
        found = jax.device_get(program(*arguments, **static))
        order = np.argsort(-found.fit, kind="stable")
        best, best_fit = order[0], found.fit[order[0]]
        if len(order) > 1:
            away = rigid_host.distance(found.poses[:, 0], found.poses[best, 0])
            elsewhere = [i for i in order if away[i] > DISTINCT_MM]
            # The rival is the best of those that ended elsewhere.
            rival_mm = float(away[elsewhere[0]]) if elsewhere else 0.0
            margin = float(found.fit[best] - found.fit[elsewhere[0]]) if elsewhere else MAX_MARGIN
        kept = order[: level.keep]
        moved_mm = np.linalg.norm((found.poses - poses)[kept, 0, :3, 3], axis=-1)
        is_settled = (found.step_mm[kept] <= level.settled_mm).all() and (moved_mm < RECUT_MM).all()
        settled_at, poses = level.pixel_mm if is_settled else None, found.poses[kept]
        after[level.pixel_mm] = found.poses[best, 0], best_fit
    said: dict[str, Any] = {name: getattr(found, name)[best] for name in REPORTED}
    said |= {"world_from_box": poses[0, 0], "world_from_rest": poses[0, 1]}
    said |= {"rival_mm": np.float32(rival_mm), "margin": np.float32(margin)}
    trajectory, fit = zip(*after.values())
    said |= {"trajectory": np.stack(trajectory), "fit": np.stack(fit)}
    return Refined(**said)
