"""Several vertebrae, the rest of the body and the errors of the views, refined together.

Each vertebra moves by itself, and the rest of the body bends: in the window around each vertebra (`bodies`) it is a rigid piece of
its own, tied to those in the windows beside it. One Gauss-Newton step
moves all bodies and all cameras, whose errors have a known size: what a camera sees depends on the bodies' poses relative to it, so
that two views of one body show how the cameras are off relative to each other, and nothing shows how they are off together. That
part stays in the covariance. A view's radial distortion has a known size, too, and is fitted in the same way.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.geometry import rigid
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.distortion import COEFFICIENTS
from radgs_jax.registration import gauss_newton
from radgs_jax.registration.bodies import Bodies
from radgs_jax.registration.bodies import OF_BODIES
from radgs_jax.registration.bodies import OF_WINDOW
from radgs_jax.registration.bodies import PARTS_SEEN
from radgs_jax.registration.gauss_newton import Level
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.parts import on_device
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
DISTORTION_SCALE = 0.01
"""Change of a coefficient of distortion that moves pixels at the field's border by about 1 mm. It makes a step of a coefficient as
long as one of a pose; half or twice changes how far a first step goes."""
STRAIGHTENINGS = 2
"""How often the levels are gone through where views are distorted. At half, 5 % at the border is still half a pixel off; twice
takes twice the time and changes nothing."""
NO_DISTORTION = 1e-6
"""Standard deviation of coefficients of views without distortion: a thousandth of a pixel, and large enough to be divided by; half
or twice does not matter."""


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
      neighbours: as in `Bodies`; normals, rights, blocks: from `bodies.linearised`.
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
    cut: Callable,
    linearised: Callable,
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
      cut, linearised: of `bodies`, compiled; seen: X-rays at the resolution of each of config.levels.
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
    corrects = stretched is not None or np.any(camera_sd)
    relaxation = 1.0 if corrects else config.relaxation
    # The equations know small distortions, so that the X-rays are straightened between levels.
    rounds = 1 if stretched is None else STRAIGHTENINGS
    for number, level in list(enumerate(config.levels)) * rounds:
        if stretched is not None and distortions.any():
            seen = stretched.straightened(distortions)
        taken_out, one = distortions.copy(), dataclasses.replace(config, levels=(level,))
        start = seen.levels[number], on_device(given @ motions)
        windows = [
            cut(*start, on_device(poses[k]), on_device(centre), config=one) for k, centre in enumerate(bodies.centres)
        ]
        for iteration in range(level.iterations):
            # What is seen of the rest moves with the cameras, too.
            again = jax.device_put(np.array(iteration == 0 or corrects))
            cameras, left = on_device(given @ motions), on_device(distortions - taken_out)
            equations = []
            for k, (window, near) in enumerate(windows):
                moving = again, cameras, on_device(poses[bodies.seen(k)]), left, on_device(fields)
                *found, near = linearised(bodies.around[k], window, near, *moving, config=one)
                equations.append(found)
                windows[k] = window, near
            normals, rights, blocks = (np.stack(a).astype(np.float64) for a in zip(*jax.device_get(equations)))
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
