"""Second-order refinement of a vertebra's pose against the raw X-rays of a patient who has moved since the CT.

An X-ray is modelled as two rigid parts of the CT: the vertebra, in what it attenuates above the muscle that fills its hole, and
everything else, each at a pose of its own. Both are projected exactly and with analytic derivatives (`kernels.drr`); a
Gauss-Newton step moves both at once, so that neighbours and ribs are explained instead of leaned on. Images are compared in
their derivatives, where scatter and detectors' drifts are small, under a gain that varies smoothly and with the thickness, which
stands for hardening and scatter and is eliminated from every step (variable projection, Golub and Pereyra 1973). Residuals have
Student's t distribution (Lange et al. 1989): metal and what the CT does not know weigh little.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kernels.drr import drr_and_motion
from radgs_jax import camera
from radgs_jax import rigid

STEP_MM = 5.0
"""Largest step of a parameter, rotations by their lever."""
T_FREEDOM = 5.0
"""Degrees of freedom of the residuals' t distribution."""
FAINT = 1e-4
"""Share of the steepest squared slope of an image below which a pixel shows no edge."""
LEAST_SIGNAL = 0.1
"""Share of an image's energy that is never taken for noise."""
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
class Parts:
    """What the X-ray is made of: 1/mm, and affines (4, 4) from voxel indices to the vertebra's box frame, mm.

    excess: (X, Y, Z) of the vertebra over the muscle that fills its hole; rest: (X', Y', Z') of everything else.
    """

    excess: jax.Array
    box_from_excess: jax.Array
    rest: jax.Array
    box_from_rest: jax.Array


@flax.struct.dataclass
class Views:
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


_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _kernels(sigma):
    """Offsets in pixels, and there a Gaussian and its derivative."""
    radius = int(np.ceil(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    smooth = np.exp(-0.5 * (offsets / sigma) ** 2)
    smooth /= smooth.sum()
    return offsets, smooth, offsets / sigma**2 * smooth


@functools.cache
def _bands(size, sigma):
    """Matrices (size, size) of a Gaussian and of its derivative, borders repeated."""
    offsets, *kernels = _kernels(sigma)
    result = []
    for kernel in kernels:
        band = np.zeros((size, size))
        for offset, weight in zip(offsets, kernel):
            np.add.at(band, (np.arange(size), np.clip(np.arange(size) + offset, 0, size - 1)), weight)
        result.append(band.astype(np.float32))
    return result


def derivatives(images, sigma):
    """Derivatives along v and u, per pixel, of images (V, S, S, C) blurred by `sigma` pixels: (V, S, S, C, 2)."""
    smooth, slope = _bands(images.shape[1], sigma)
    pairs = ((slope, smooth), (smooth, slope))
    return jnp.stack([_einsum("ij,vjkc,lk->vilc", a, images, b) for a, b in pairs], -1)


def noise_energy(images, valid, sigma):
    """Expected squared length of what white noise leaves in `derivatives` of a pixel: (V,) for images (V, S, S).

    The noise's variance is told from the mixed second difference, in which smooth structures cancel (Immerkaer 1996), by its
    median, which edges do not move.
    """
    difference = images
    for axis in (1, 2):
        ends = [
            jax.lax.slice_in_dim(difference, start, start + images.shape[axis] - 2, axis=axis) for start in range(3)
        ]
        difference = ends[0] - 2.0 * ends[1] + ends[2]
    inside = interior(valid, 1)[:, 1:-1, 1:-1] > 0
    typical = jnp.nan_to_num(jnp.nanmedian(jnp.where(inside, jnp.abs(difference), jnp.nan), (1, 2)))
    _, smooth, slope = _kernels(sigma)
    # The squares of a normal deviate's median and of the difference's coefficients, (1, -2, 1) along both axes.
    return (typical / 0.6745) ** 2 / 36.0 * 2.0 * np.sum(smooth**2) * np.sum(slope**2)


def interior(valid, margin):
    """Pixels (V, S, S) whose neighbours within `margin` are all valid and in the window."""
    window = (1, 2 * margin + 1, 2 * margin + 1)
    return jax.lax.reduce_window(valid.astype(jnp.float32), jnp.inf, jax.lax.min, window, (1, 1, 1), "SAME")


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
    return image, jnp.concatenate([_einsum("vyxi,vij->vyxj", part, R) for part in (turn, shift)], -1)


def _gain_ridge(normal, ridge):
    """Diagonals (V, K) of the quadratic penalty on gains: `ridge` times the first gain's own normal, a hundredth on that gain."""
    free = jnp.asarray([0.01] + [1.0] * (normal.shape[-1] - 1))
    return ridge * free * normal[:, :1, 0] + 1e-9


def _gain_normal(columns, weights, ridge):
    """The gains' normal matrices (V, K, K) with the penalty, and the penalty's diagonals (V, K)."""
    normal = _einsum("vyxad,vyxbd,vyx->vab", columns, columns, weights)
    penalty = _gain_ridge(normal, ridge)
    return normal + penalty[..., None] * jnp.eye(normal.shape[-1]), penalty


def _solve_gains(columns, target, weights, ridge):
    """Gains (V, K) of columns (V, S, S, K, 2) by weighted, penalised least squares."""
    normal, _ = _gain_normal(columns, weights, ridge)
    right = _einsum("vyxad,vyxd,vyx->va", columns, target, weights)
    return jnp.linalg.solve(normal, right[..., None])[..., 0]


def eliminate_gains(columns, gains, jacobian, residual, weights, ridge):
    """Normal equations of a Gauss-Newton step over P parameters and the gains, the gains eliminated (a Schur complement).

    The objective is sum_pixels weights |residual|^2 + sum_k penalty_k gains_k^2, with the weights and the penalty held at
    their current values; at a step s the residual is residual - jacobian s - columns d, for gains + d.

    Args:
      columns: (V, S, S, K, 2) derivatives of the model by gain; gains: (V, K) where it is linearised.
      jacobian: (V, S, S, P, 2); residual: (V, S, S, 2); weights: (V, S, S); ridge: as in `_gain_ridge`.
    Returns:
      normals (V, P, P), rights (V, P).
    """
    normal, penalty = _gain_normal(columns, weights, ridge)
    cross = _einsum("vyxad,vyxpd,vyx->vap", columns, jacobian, weights)
    right = _einsum("vyxad,vyxd,vyx->va", columns, residual, weights) - penalty * gains
    solved = jnp.linalg.solve(normal, jnp.concatenate([cross, right[..., None]], -1))
    normals = _einsum("vyxpd,vyxqd,vyx->vpq", jacobian, jacobian, weights)
    normals = normals - _einsum("vap,vaq->vpq", cross, solved[..., :-1])
    rights = _einsum("vyxpd,vyxd,vyx->vp", jacobian, residual, weights) - _einsum("vap,va->vp", cross, solved[..., -1])
    return normals, rights


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


def _fit_gains(window, rest, excess, thickness, ridge):
    """The model that fits the image best over all gains, and the residuals' weights.

    Args:
      window: `_Window`; rest, excess: (V, S, S, 2) derivatives; thickness: (V, S, S) line integrals of both parts.
    Returns:
      gain of the rest and of the excess (V, S, S), columns (V, S, S, K, 2), their gains (V, K), weights (V, S, S) in
      1 / residual variance.
    """
    target, inside, weights = window.target, window.inside, window.weights
    total = rest + excess
    counted = jnp.maximum(jnp.sum(inside, (1, 2), keepdims=True), 1.0)
    level = 0.5 * (thickness - jnp.sum(thickness * inside, (1, 2), keepdims=True) / counted)
    u = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, level.shape[-1]), level.shape)
    basis = jnp.stack([jnp.ones_like(level), level, u, jnp.swapaxes(u, 1, 2)], -1)
    columns = jnp.concatenate([basis[..., None] * total[..., None, :], excess[..., None, :]], -2)
    for _ in range(3):
        gains = _solve_gains(columns, target, weights, ridge)
        of_rest = jnp.maximum(_einsum("vyxk,vk->vyx", basis, gains[:, :-1]), 0.02)
        of_excess = jnp.maximum(of_rest + gains[:, -1, None, None], 0.02)
        residual = target - of_rest[..., None] * rest - of_excess[..., None] * excess
        square = jnp.sum(residual**2, -1)
        variance = jnp.sum(weights * square, (1, 2), keepdims=True) / (2.0 * window.told) + 1e-12
        weights = inside * (T_FREEDOM + 2.0) / (T_FREEDOM + square / variance)
    return of_rest, of_excess, columns, gains, weights / variance


def _correlation(a, b, weights, noise):
    """(V,) weighted cosine of (V, S, S, 2) arrays, as it were without the noise of `a`, of energy (V,) a pixel (Spearman 1904)."""

    def dot(x, y):
        return _einsum("vyxd,vyxd,vyx->v", x, y, weights)

    energy = dot(a, a)
    clean = jnp.maximum(energy - noise * jnp.sum(weights, (1, 2)), LEAST_SIGNAL * energy)
    return dot(a, b) * jax.lax.rsqrt(clean * dot(b, b) + 1e-20)


def _damped(normal, damping):
    """Normal matrices (..., 12, 12), their diagonals raised: in proportion, and by a little where nothing is known."""
    return normal * (1.0 + damping * jnp.eye(12)) + 1e-3 * jnp.eye(12)


def _apart(normals, rights, camera_from_world, damping):
    """How far apart, mm, the views would move the vertebra along the one direction that all of them see, each by itself.

    Args:
      normals, rights: (V, 12, 12) and (V, 12) of the views' own Gauss-Newton steps, in mm.
    """
    axes = camera_from_world[:, 2, :3]
    _, directions = jnp.linalg.eigh(_einsum("vi,vj->ij", axes, axes))
    steps = jnp.linalg.solve(_damped(normals, damping), rights[..., None])[..., 0]
    along = _einsum("vi,i->v", steps[:, 3:6], directions[:, 0])
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
    gain_rest, gain_excess, columns, gains, weights = _fit_gains(
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
        "similarity": _correlation(target, model_rest + model_excess, inside, window.noise),
        "support": _correlation(target - model_rest, model_excess, edges, window.noise),
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
