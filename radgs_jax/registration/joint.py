"""Several vertebrae, the rest of the body and the errors of the views, refined together.

Each vertebra moves by itself. Around each a window of every X-ray is modelled as the vertebra, its two neighbours and the rest of
the body, which bends: in each window it is a rigid piece of its own, tied to those in the windows beside it. One Gauss-Newton step
moves all bodies and all cameras, whose errors have a known size: what a camera sees depends on the bodies' poses relative to it, so
that two views of one body show how the cameras are off relative to each other, and nothing shows how they are off together. That
part stays in the covariance. A view's radial distortion has a known size, too, and is fitted in the same way.

The terms are those of `gauss_newton`, window by window: derivatives of images, gains, and t-distributed residuals.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax.geometry import camera
from radgs_jax.geometry import distortion
from radgs_jax.geometry import resample
from radgs_jax.geometry import rigid
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.distortion import COEFFICIENTS
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import projection
from radgs_jax.registration.edges import derivatives
from radgs_jax.registration.gains import eliminate_gains
from radgs_jax.registration.gains import fit_gains
from radgs_jax.registration.gauss_newton import Level
from radgs_jax.registration.gauss_newton import LevelViews
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.parts import on_device
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.pyramid import Pyramid

BEND = (math.radians(4.0), 2.0)
"""Standard deviation, rad and mm, of the motion of neighbouring vertebrae relative to each other since the CT. From supine to prone
or standing a lumbar segment turns by 2 to 6 degrees, of at most 8 to 20 about one axis (White and Panjabi, "Clinical Biomechanics
of the Spine", 1990, table 2-5). Half ties spines that bend; twice leaves vertebrae to themselves that are hard to see."""
NO_ERROR_MM = 1e-3
"""Standard deviation of an error that is stated to be 0, mm, of turns by their lever: small, and large enough to be divided by."""
WIDE = ((128, 12), (112, 6))
"""Pixels along the windows, and most steps, of the last two levels where one vertebra has to correct views. Chosen by hand: the
first window shows 190 mm of the body, since a camera's depth shows only in how the picture grows from its middle to its border;
half of it leaves more of that error."""
NARROW = (96, 5)
"""The same of the last level, where vertebrae in right views are near their places already. Chosen by hand on the bent scenes
of the operating room (docs/accuracy.md): larger windows show more of what has bent by itself, smaller ones less of the vertebra."""
SAMPLES_PX = (4.0 / 3.0, 8.0 / 3.0)
"""Sample distances along rays through a vertebra and through the rest, pixels of the last level. Chosen by hand, longer than those
of a single refinement, since all parts are projected in every step here. Half takes longer; twice is longer than voxels."""
SETTLED_MM = 1e-2
"""Step of the vertebra that moves most at which a level ends, mm. Chosen by hand, half of the best accuracy: a step leaves at most
as much as it took."""
DISCREPANCY = ((math.radians(0.3), 0.1, 1.0), (math.radians(1.0), 0.6, 2.0))
"""Standard deviations of what each view by itself is wrong by about the pose of a window's vertebra, and of the other bodies there,
which its border cuts: a turn, rad, a shift across the rays and one along them, mm. Crude masks, bent bodies and unknown pixels
cause it, in all pixels alike, so that no pixel shows it (Kennedy and O'Hagan 2001). Taken from 48 scenes of two patients of the
rule's fit with every fault at random: views disagree about a vertebra by 0.3 to 0.5 degrees, 0.1 and 0.8 mm. At half, cameras are
corrected by what is not theirs, and poses are as bad as without a correction; twice changes poses by a twentieth."""
NO_DISCREPANCY = ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
"""Of views that are right: pixels alone decide. With right cameras it is the better model of a bent spine (docs/accuracy.md)."""
LEAST_CURVATURE = 1e-6
"""Added to the diagonal of the normal matrix, 1/mm^2 in the parameters' common scale, far below any prior: it keeps it solvable."""
PARTS_SEEN = 4
"""Bodies in a window: the vertebra, the one above, the one below, the rest."""
OF_BODIES, OF_WINDOW = 6 * PARTS_SEEN, 6 * PARTS_SEEN + COEFFICIENTS
"""Parameters of a window in one view: twists of its bodies, then the view's distortion."""
DISTORTION_SCALE = 0.01
"""Change of a coefficient of distortion that moves pixels at the field's border by about 1 mm. It makes a step of a coefficient as
long as one of a pose; half or twice changes how far a first step goes."""
STRAIGHTENINGS = 2
"""How often the levels are gone through where views are distorted. At half, 5 % at the border is still half a pixel off; twice
takes twice the time and changes nothing."""
NO_DISTORTION = 1e-6
"""Standard deviation of coefficients of views without distortion: a thousandth of a pixel, and large enough to be divided by; half
or twice does not matter."""


@flax.struct.dataclass
class Bodies:
    """K vertebrae and the rest of their body, as volumes of attenuation in 1/mm, padded to common shapes.

    Attributes:
      excess: (K, X, Y, Z) each vertebra above the muscle that fills its hole; ct_from_excess: (K, 4, 4) from its voxel index.
      rest: (K, X', Y', Z') around each vertebra, everything but it and its two neighbours; ct_from_rest: (K, 4, 4).
      centres: (K, 3) of the vertebrae, CT mm.
      neighbours: (K, 2) places in this list of the vertebrae above and below; -1 where it is not in the list.
      steps_apart: (K, 2) number of levels between the two, where there is one.
    """

    excess: Leaf
    ct_from_excess: Leaf
    rest: Leaf
    ct_from_rest: Leaf
    centres: Leaf
    neighbours: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)
    steps_apart: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Stretched:
    """What is known of the radial distortion of views.

    Attributes:
      sd: size of the relative displacement at the field's border.
      fields: (V,) of `distortion.field`.
      straightened: the X-rays, as in `refine_together`, with a distortion of coefficients (V, 3) taken out.
    """

    sd: float
    fields: Sequence[float]
    straightened: Callable[[Float[np.ndarray, "views 3"]], Pyramid]


@dataclasses.dataclass(frozen=True)
class Together:
    """Poses and views that were refined together, float64; N = 12 K + 9 V parameters.

    Attributes:
      world_from_ct: (2 K, 4, 4) of each vertebra, then of the rest around each, mm.
      motions: (V, 4, 4) of the world before each camera: a corrected camera_from_world is the given one times its motion.
      distortions: (V, 3) coefficients of `distortion`.
      information: (N, N) normal matrix of the views, with their own errors eliminated; doubt: (N, N) covariance of its right
        side; prior: (N, N), likewise a normal matrix. Parameters are twists in world axes, rad and mm, of the vertebrae and of
        the rest around each about the vertebrae's centres, and of the cameras about their mean; then the views' distortions.
      step_mm: length of the last step of the vertebra that moved most, rotations by their lever.
    """

    world_from_ct: Float[np.ndarray, "bodies 4 4"]
    motions: Float[np.ndarray, "views 4 4"]
    distortions: Float[np.ndarray, "views 3"]
    information: Float[np.ndarray, "parameters parameters"]
    doubt: Float[np.ndarray, "parameters parameters"]
    prior: Float[np.ndarray, "parameters parameters"]
    step_mm: float

    @property
    def of_cameras(self) -> slice:
        """Where the cameras' twists are among the parameters."""
        first = _place_of_camera(len(self.world_from_ct) // 2, 0).start
        return slice(first, first + 6 * len(self.motions))


def _place_of_camera(vertebrae, view):
    """Where the twist of a view's camera is among the parameters of `Together`."""
    first = 12 * vertebrae + 6 * view
    return slice(first, first + 6)


def _place_of_distortion(vertebrae, views, view):
    """Where the coefficients of a view's distortion are among them."""
    first = _place_of_camera(vertebrae, views).start + COEFFICIENTS * view
    return slice(first, first + COEFFICIENTS)


def bodies_of(
    ct_from_box: Sequence[Float[Array, "4 4"]], parts: Sequence[Parts], levels_between: Sequence[int]
) -> Bodies:
    """`Bodies` of vertebrae of one scan, from head to feet.

    Args:
      ct_from_box, parts: K of each; levels_between: K - 1 numbers of levels from each to the next, 1 for neighbours.
    """
    boxes = [np.asarray(box, np.float64) for box in ct_from_box]
    ct_from_excess = [box @ np.asarray(p.box_from_excess, np.float64) for box, p in zip(boxes, parts)]
    ct_from_rest = [box @ np.asarray(p.box_from_rest, np.float64) for box, p in zip(boxes, parts)]
    excess, rest = _stacked([p.excess for p in parts]), _stacked([p.rest for p in parts])
    neighbours, apart = [], []
    for k, p in enumerate(parts):
        near = [j if 0 <= j < len(parts) else -1 for j in (k - 1, k + 1)]
        neighbours.append(tuple(near))
        apart.append(tuple(levels_between[min(j, k)] if j >= 0 else 1 for j in near))
        for j in near:
            if j >= 0:
                own = rest[k][tuple(slice(n) for n in p.rest.shape)]
                own -= resample.resample(excess[j], ct_from_excess[j], ct_from_rest[k], own.shape)
    return Bodies(
        on_device(excess),
        on_device(ct_from_excess),
        on_device(rest),
        on_device(ct_from_rest),
        on_device([box[:3, 3] for box in boxes]),
        tuple(neighbours),
        tuple(apart),
    )


def _stacked(volumes):
    found = np.zeros((len(volumes), *np.max([v.shape for v in volumes], axis=0)), np.float32)
    for k, volume in enumerate(volumes):
        found[(k, *(slice(n) for n in volume.shape))] = volume
    return found


def fine_levels(config: RefineConfig, vertebrae: int, corrects: bool) -> tuple[Level, ...]:
    """The levels of a joint refinement: the last two of a single one's where it corrects the views, the last where not."""
    vertebra_mm, rest_mm = (pixels * config.levels[-1].pixel_mm for pixels in SAMPLES_PX)
    last = tuple(
        dataclasses.replace(level, vertebra_step_mm=vertebra_mm, rest_step_mm=rest_mm)
        for level in config.levels[-len(WIDE) :]
    )
    if not corrects:
        size, iterations = NARROW
        return (dataclasses.replace(last[-1], size=min(size, last[-1].size), iterations=iterations),)
    if vertebrae > 1:
        return last
    chosen = WIDE[-len(last) :]
    return tuple(dataclasses.replace(level, size=size, iterations=n) for level, (size, n) in zip(last, chosen))


def _carried(centre, about):
    """The matrix (6, 6) that turns a twist about `centre` into that of the same motion about `about`."""
    x, y, z = centre - about
    found = np.eye(6)
    found[3:, :3] = [[0, -z, y], [z, 0, -x], [-y, x, 0]]
    return found


def linearised(
    bodies: Bodies,
    views: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    at: Float[Array, "windows 4 4"],
    world_from_ct: Float[Array, "bodies 4 4"],
    distortions: Float[Array, "views 3"],
    fields: Float[Array, " views"],
    config: RefineConfig,
) -> tuple[
    Float[jax.Array, "windows views 27 27"],
    Float[jax.Array, "windows views 27"],
    Float[jax.Array, "windows views blocks 27"],
]:
    """Normal equations of each window in each view, over the twists of its bodies about their own centres and its distortion.

    Args:
      camera_from_world: (V, 4, 4) corrected; at: (K, 4, 4) poses world_from_ct that windows are cut at, which stay the same from
        step to step; world_from_ct: (2 K, 4, 4) current poses; distortions: (V, 3), small; fields: (V,) of `distortion.field`;
        config: of one level, that of `views`.
    Returns:
      normal matrices (K, V, 27, 27), right sides (K, V, 27), and what each square of pixels adds to those (K, V, B, 27), rad and
      mm; bodies are the vertebra, the one above, the one below and the rest, and 0 where there is none; then the distortion's
      coefficients, which have no unit.
    """
    (level,) = config.levels
    count = len(bodies.neighbours)
    seen = jnp.asarray([[k, max(a, 0), max(b, 0), count + k] for k, (a, b) in enumerate(bodies.neighbours)])
    present = jnp.asarray(np.array(bodies.neighbours) >= 0, jnp.float32)
    centres = jnp.tile(rigid.apply(world_from_ct[:count], bodies.centres[:, None])[:, 0], (2, 1))

    def of_window(k):
        parts = seen[k]
        box = jnp.eye(4).at[:3, 3].set(bodies.centres[k])
        camera_from_box = rigid.matmul(camera_from_world, rigid.matmul(at[k], box))
        crops = camera.windows(views.images, views.valid, views.intrinsics, camera_from_box, level.size)
        window = gauss_newton.make_window(*crops, camera_from_world, config)
        images, motions = [], []
        for part in range(PARTS_SEEN):
            rest = part == PARTS_SEEN - 1
            there = present[k, part - 1] if part in (1, 2) else 1.0
            image, motion = projection.project_part(
                bodies.rest[k] if rest else bodies.excess[parts[part]],
                bodies.ct_from_rest[k] if rest else bodies.ct_from_excess[parts[part]],
                world_from_ct[parts[part]],
                centres[parts[part]],
                window.intrinsics,
                camera_from_world,
                level.size,
                level.rest_step_mm if rest else level.vertebra_step_mm,
            )
            images.append(image * there)
            motions.append(motion * there)
        total = jnp.sum(jnp.stack(images), 0)
        stretch = distortion.stretch(total, window.intrinsics, fields)
        filtered = derivatives(jnp.concatenate([jnp.stack(images, -1), *motions, stretch], -1), config.blur_px)
        # What the distortion moves is mostly the rest's, and has its gain.
        stretched = jnp.sum(filtered[..., -COEFFICIENTS:, :] * distortions[:, None, None, :, None], -2)
        of_excess, of_rest = filtered[..., 0, :], jnp.sum(filtered[..., 1:PARTS_SEEN, :], -2) + stretched
        gain_rest, gain_excess, columns, gains, weights = fit_gains(
            window.target,
            window.inside,
            window.weights,
            window.edge_count,
            of_rest,
            of_excess,
            total,
            config.gain_ridge,
        )
        own, others = filtered[..., PARTS_SEEN : PARTS_SEEN + 6, :], filtered[..., PARTS_SEEN + 6 :, :]
        jacobian = [own * gain_excess[..., None, None], others * gain_rest[..., None, None]]
        residual = window.target - gain_rest[..., None] * of_rest - gain_excess[..., None] * of_excess
        return eliminate_gains(columns, gains, jnp.concatenate(jacobian, -2), residual, weights, config.gain_ridge)

    return jax.lax.map(of_window, jnp.arange(count))


def _prior(bodies, poses, centres, motions, distortions, camera_sd, distortion_sd):
    """Normal matrix (N, N) and right side (N,) of what is known beforehand, at the current poses."""
    count, middle = len(bodies.neighbours), centres.mean(0)
    views = len(motions)
    size = _place_of_distortion(count, views, views).start
    normal, right = np.zeros((size, size)), np.zeros(size)

    def tie(i, j, sd, factor=1.0):
        """Bodies i and j move as one, but for a twist of standard deviation sd (rad, mm) about the centre of i."""
        relative = rigid_host.twist_about(centres[i], poses[j] @ np.linalg.inv(poses[i]))
        columns = np.zeros((6, size))
        columns[:, 6 * i : 6 * i + 6] = -np.eye(6)
        columns[:, 6 * j : 6 * j + 6] = _carried(centres[j], centres[i])
        weighted = columns / np.repeat(np.square(sd) * factor, 3)[:, None]
        normal[:] += weighted.T @ columns
        right[:] -= weighted.T @ relative

    for k, (_, below) in enumerate(bodies.neighbours):
        tie(k, count + k, gauss_newton.COUPLING)
        if below >= 0:
            tie(k, below, BEND, bodies.steps_apart[k][1])
            tie(count + k, count + below, BEND, bodies.steps_apart[k][1])
    # The stated sizes are lengths; each of three axes has a third of the variance.
    variance = np.maximum(np.repeat(np.square(camera_sd) / 3.0, 3), np.square(NO_ERROR_MM * rigid.TWIST_SCALE))
    for v, motion in enumerate(motions):
        place = _place_of_camera(count, v)
        normal[place, place] += np.diag(1.0 / variance)
        right[place] -= rigid_host.twist_about(middle, motion) / variance
    # The stated size is that of all coefficients' sum, at the border.
    precision = 1.0 / max(distortion_sd**2 / COEFFICIENTS, NO_DISTORTION**2)
    for v, coefficients in enumerate(distortions):
        place = _place_of_distortion(count, views, v)
        normal[place, place] = precision * np.eye(COEFFICIENTS)
        right[place] = -precision * coefficients
    return normal, right


def errors_of_views(
    discrepancy: Sequence[Sequence[float]], camera_from_world: Float[Array, "views 4 4"]
) -> Float[np.ndarray, "views 27 27"]:
    """Covariances of each view's own errors of the bodies in a window, rad and mm; of its distortion there is none.

    Args:
      discrepancy: as `DISCREPANCY`; camera_from_world: (V, 4, 4), whose third axis is the ray.
    """
    found = np.zeros((len(camera_from_world), OF_WINDOW, OF_WINDOW))
    for errors, R in zip(found, camera_from_world[:, :3, :3]):
        for part in range(PARTS_SEEN):
            turn, across_mm, along_mm = discrepancy[part > 0]
            first = 6 * part
            errors[first : first + 3, first : first + 3] = turn**2 * np.eye(3)
            shift = R.T @ np.diag(np.square([across_mm, across_mm, along_mm])) @ R
            errors[first + 3 : first + 6, first + 3 : first + 6] = shift
    return found


def assembled(
    neighbours: Sequence[tuple[int, int]],
    normals: Float[Array, "windows views 27 27"],
    rights: Float[Array, "windows views 27"],
    blocks: Float[Array, "windows views blocks 27"],
    centres: Float[Array, "bodies 3"],
    view_errors: Float[Array, "views 27 27"],
    growth: float,
) -> tuple[
    Float[np.ndarray, "parameters parameters"],
    Float[np.ndarray, " parameters"],
    Float[np.ndarray, "parameters parameters"],
]:
    """The windows' equations over all parameters, and the covariance of their right side: a camera's motion moves all that it sees.

    A view's equations N x = r hold of the poses as that view sees them, which differ from the true ones by errors of covariance C
    that no pixel shows. With these eliminated they are N' x = W r, where W = (1 + N C)^-1 and N' = W N.

    Args:
      neighbours: as in `Bodies`; normals, rights, blocks: from `linearised`.
      centres: of the vertebrae and of the rest around each, world mm.
      view_errors: from `errors_of_views`; growth: as in `refine_together`.
    Returns:
      (N, N) normal matrix, (N,) right side and (N, N) covariance of that, of the parameters of `Together`.
    """
    count, views = normals.shape[:2]
    size, middle = _place_of_distortion(count, views, views).start, centres.mean(0)
    normal, right, doubt = np.zeros((size, size)), np.zeros(size), np.zeros((size, size))
    for k, (above, below) in enumerate(neighbours):
        for v in range(views):
            matrix = np.zeros((OF_WINDOW, size))
            matrix[OF_BODIES:, _place_of_distortion(count, views, v)] = np.eye(COEFFICIENTS)
            for part, body in enumerate((k, above, below, count + k)):
                if body >= 0:
                    rows = slice(6 * part, 6 * part + 6)
                    matrix[rows, 6 * body : 6 * body + 6] = np.eye(6)
                    matrix[rows, _place_of_camera(count, v)] = _carried(middle, centres[body])
            weight = np.linalg.inv(np.eye(OF_WINDOW) + normals[k, v] @ view_errors[v])
            seen = weight @ normals[k, v]
            normal += matrix.T @ seen @ matrix
            right += matrix.T @ (weight @ rights[k, v])
            pulls = growth * blocks[k, v] @ weight.T
            doubt += matrix.T @ (pulls.T @ pulls + seen @ view_errors[v] @ seen.T) @ matrix
    return normal, right, doubt


def refine_together(
    program: Callable,
    bodies: Bodies,
    seen: Pyramid,
    world_from_ct: Float[Array, "bodies 4 4"],
    camera_sd: Sequence[float],
    config: RefineConfig,
    discrepancy: Sequence[Sequence[float]] = DISCREPANCY,
    growth: float = 1.0,
    stretched: Stretched | None = None,
) -> Together:
    """Refines the poses of all bodies and the views together.

    What the cameras have in common with all bodies is seen by nothing but the prior, which is a million times weaker than
    pixels: the equations are solved in float64, on the host.

    Args:
      program: `linearised`, compiled; seen: X-rays at the resolution of each of config.levels.
      world_from_ct: start poses of the K vertebrae, and of the rest around each.
      camera_sd: sizes of the cameras' errors: root mean square angle of turn, rad, and length of shift, mm; 0 for none.
      discrepancy: as `DISCREPANCY`; growth: ratio of an error to what squares of pixels say of it by their disagreement.
      stretched: what is known of the views' distortion; None where there is none.
    """
    count, poses = len(bodies.neighbours), np.array(world_from_ct, np.float64)
    given = np.asarray(seen.camera_from_world, np.float64)
    motions = np.tile(np.eye(4), (len(given), 1, 1))
    distortions = np.zeros((len(given), COEFFICIENTS))
    distortion_sd, fields = (0.0, np.ones(len(given))) if stretched is None else (stretched.sd, stretched.fields)
    scale = _scale(count, len(given))
    view_errors = errors_of_views(discrepancy, given)
    seen_normal = doubt = prior = np.zeros(0)
    moved_mm = 0.0
    # Errors of views are held by their prior alone, whose optimum longer steps would swing about.
    relaxation = config.relaxation if stretched is None and not np.any(camera_sd) else 1.0
    # The equations know small distortions, so that the X-rays are straightened between levels.
    rounds = 1 if stretched is None else STRAIGHTENINGS
    for number, level in list(enumerate(config.levels)) * rounds:
        if stretched is not None and distortions.any():
            seen = stretched.straightened(distortions)
        views, taken_out = seen.levels[number], distortions.copy()
        one, at = dataclasses.replace(config, levels=(level,)), on_device(poses[:count])
        for _ in range(level.iterations):
            left = on_device(distortions - taken_out)
            arguments = bodies, views, on_device(given @ motions), at, on_device(poses), left, on_device(fields)
            found = jax.device_get(program(*arguments, config=one))
            normals, rights, blocks = (np.asarray(a, np.float64) for a in found)
            places = np.einsum("kij,kj->ki", poses[:count, :3, :3], bodies.centres) + poses[:count, :3, 3]
            centres = np.tile(places, (2, 1))
            seen_normal, right, doubt = assembled(
                bodies.neighbours, normals, rights, blocks, centres, view_errors, growth
            )
            prior, prior_right = _prior(bodies, poses, centres, motions, distortions, camera_sd, distortion_sd)
            normal = (seen_normal + prior) * scale[:, None] * scale
            step = np.linalg.solve(normal + LEAST_CURVATURE * np.eye(len(normal)), (right + prior_right) * scale)
            step *= relaxation / max(1.0, relaxation * np.abs(step).max() / gauss_newton.STEP_MM)
            if stretched is not None:
                distortions += (step * scale)[-distortions.size :].reshape(distortions.shape)
            twists = (step * scale)[: -distortions.size].reshape(-1, 6)
            for i, (centre, twist) in enumerate(zip(centres, twists)):
                poses[i] = rigid_host.motion_about(centre, twist) @ poses[i]
            for v, twist in enumerate(twists[2 * count :]):
                motions[v] = motions[v] @ rigid_host.motion_about(centres.mean(0), twist)
            moved_mm = float(np.linalg.norm(step[: 6 * count].reshape(-1, 6), axis=1).max())
            if moved_mm < SETTLED_MM:
                break
    return Together(poses, motions, distortions, seen_normal, doubt, prior, moved_mm)


def _scale(vertebrae, views):
    """Sizes (N,) of parameters that move what is seen by about 1 mm."""
    return np.concatenate(
        [np.tile(rigid.TWIST_SCALE, 2 * vertebrae + views), np.full(COEFFICIENTS * views, DISTORTION_SCALE)]
    )


def relative_covariance(
    covariance: Float[Array, "12 12"], upper_centre: Float[Array, "3"], lower_centre: Float[Array, "3"]
) -> Float[np.ndarray, "6 6"]:
    """Covariance of the twist of one vertebra relative to another, about the first one's centre, rad and mm.

    Args:
      covariance: of the twists of both about their centres, the first one's first; upper_centre, lower_centre: world mm.
    """
    apart = np.concatenate([np.eye(6), -_carried(np.asarray(lower_centre), np.asarray(upper_centre))], 1)
    return apart @ covariance @ apart.T


def covariance(together: Together) -> Float[np.ndarray, "parameters parameters"]:
    """Covariance of all parameters, rad and mm: what pixels and views disagree about, and what the prior leaves open."""
    scale = _scale(len(together.world_from_ct) // 2, len(together.motions))
    scaled = lambda matrix: matrix * scale[:, None] * scale
    total = scaled(together.information + together.prior) + LEAST_CURVATURE * np.eye(len(scale))
    middle = scaled(together.doubt + together.prior) + LEAST_CURVATURE * np.eye(len(scale))
    return scaled(np.linalg.solve(total, np.linalg.solve(total, middle).T))
