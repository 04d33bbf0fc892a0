"""The search for a pose: neighbouring levels, and a wider search where an answer is not trusted.

Vertebrae look alike. So the places of an answer's neighbours along the spine are tried too, and an answer that is refused is
searched for anew: turned about its axes, shifted along the rays, and from where the body fits.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.geometry import rigid_host
from radgs_jax.levels import neighbours_mm
from radgs_jax.registration import gauss_newton
from radgs_jax.registration.gauss_newton import Level
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.gauss_newton import Refined
from radgs_jax.registration.overview import OverviewConfig
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.programs import Programs
from radgs_jax.registration.pyramid import Pyramid

_Pose = Float[Array, "4 4"]


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a pose is searched for. The acceptance rule is fitted with it: `confidence.method_digest`.

    The numbers were chosen on the simulated scenes that the rule is fitted to (`experiments.calibrate`), T6 to T9 of one chest
    CT and four vertebrae of a phantom.

    Attributes:
      turn_rad: by how much starts are turned, about each axis, against an answer that is refused or `uneven`. Most answers that are
        wrong by less than 5 mm sit in a wrong orientation; at half the turn they stay there, at twice they find a neighbour. The
        places of neighbouring levels lie along arcs of this turn, to the front and back: at twice, straight spines are missed.
      depth_mm: shifts along the rays of a view that are tried: where one view fits, it fits in other depths as well.
      uneven: ratio of the views' least and largest support below which the answer is also tried turned, and in other depths of the
        view with the largest. Wrong answers that one view shows well have up to 0.77; right ones 0.8 and more where the body has
        moved as one piece, 0.67 and more where it has bent, and less with metal in the vertebra. At half, wrong ones stay and are
        accepted; at 1, every answer is tried.
      one_sided: ratio below which an answer is searched for wider, even where it is trusted: below that of right ones without metal
        in the vertebra. At half, wrong ones are accepted; at 1, every answer is searched for.
      overview: how a wider search looks for the body.
      starts: how many starts a wider search has. Half loses right poses; twice takes twice as long.
      glance_iterations: steps of the coarsest level taken in a neighbour's place before it is compared.
      promising: fit, a sum of two correlations, below which an answer is not refined any further before a wider search: right ones
        have above 1.5, in cluttered pictures above 1. At half, distant starts take twice as long; at twice, all are searched for.
      near_fit: by how much a neighbour's place may fit worse at a glance and still be refined. At half, bodies whose levels look
        alike are left one level off; at twice, every third answer takes a second longer.
      max_walk: how often, at most, the answer moves to a neighbouring level.
      settled_mm: a refinement whose last step was longer goes on from where it is.
      max_settlings: how often, at most, it goes on.
      contenders: how many of a wider search's starts go on after `glance_iterations`, in windows that are cut anew. Starts 15 mm
        off and more need it: at half, right ones are lost to wrong ones that settle sooner; at twice, it takes half as long again.
      contender_iterations: steps of the coarsest level that they take.
      survivors: how many of them go on from the coarsest level.
      bare_line_integral: median line integral below which an X-ray shows a bone in air; behind a body it is above 1.
    """

    turn_rad: float = math.radians(15.0)
    depth_mm: tuple[float, ...] = (-24.0, -12.0, 12.0, 24.0)
    uneven: float = 0.8
    one_sided: float = 0.65
    overview: OverviewConfig = OverviewConfig()
    starts: int = 32
    glance_iterations: int = 4
    promising: float = 1.0
    near_fit: float = 0.1
    max_walk: int = 4
    settled_mm: float = 0.2
    max_settlings: int = 3
    contenders: int = 8
    contender_iterations: int = 8
    survivors: int = 3
    bare_line_integral: float = 0.3


def glance(config: RefineConfig, search: SearchConfig) -> tuple[Level, ...]:
    """The levels of a short look at a neighbour's place."""
    return (dataclasses.replace(config.levels[0], iterations=search.glance_iterations),)


def twice(config: RefineConfig, survivors: int = 1) -> tuple[Level, ...]:
    """The levels of a first refinement: the coarsest one twice, since starts that are turned by 20 degrees need new windows.

    Args:
      survivors: how many starts go on from the coarsest level.
    """
    first, *others = config.levels
    first = dataclasses.replace(first, keep=survivors)
    return (first, first, *others)


def halving(config: RefineConfig, search: SearchConfig) -> tuple[Level, ...]:
    """The levels of a wider search: the coarsest one twice, with fewer starts and windows cut anew the second time."""
    first, *others = config.levels
    short = dataclasses.replace(first, iterations=search.glance_iterations, keep=search.contenders)
    return (short, dataclasses.replace(first, iterations=search.contender_iterations, keep=search.survivors), *others)


def evenness(refined: Refined) -> float:
    """Ratio of the views' least and largest support; small where a pose is at a wrong depth of the view that shows it better."""
    support = np.asarray(refined.support)
    return float(np.min(support) / max(np.max(support), 1e-6))


def _shift(shift_mm):
    motion = np.eye(4)
    motion[:3, 3] = shift_mm
    return motion


def _turn(axis, angle):
    return rigid_host.matrix(angle * axis, [0.0, 0.0, 0.0])


def _turned(world_from_box, search):
    """The pose turned about each of its axes, both ways."""
    angles = -search.turn_rad, search.turn_rad
    return [world_from_box @ _turn(axis, angle) for axis in np.eye(3) for angle in angles]


def along_arcs(world_from_box: _Pose, along_mm: float, turns_rad: Sequence[float]) -> list[_Pose]:
    """Poses of a neighbouring level, `along_mm` up the spine, for each turn that the spine bends forwards or back on the way."""
    halves = [_turn(np.eye(3)[0], 0.5 * turn) for turn in turns_rad]
    return [world_from_box @ half @ _shift((0.0, 0.0, along_mm)) @ half for half in halves]


def _apart_mm(a, b):
    return np.linalg.norm(a.world_from_box[:3, 3] - b.world_from_box[:3, 3])


def _along_rays(world_from_box, camera_from_world, shifts_mm):
    """The pose shifted along each view's ray through its origin."""
    found = []
    for E in np.asarray(camera_from_world, np.float64):
        ray = world_from_box[:3, 3] + E[:3, :3].T @ E[:3, 3]
        for shift in shifts_mm:
            moved = np.array(world_from_box)
            moved[:3, 3] += shift * ray / np.linalg.norm(ray)
            found.append(moved)
    return found


def refine_pose(
    programs: Programs,
    parts: Parts,
    seen: Pyramid,
    starts: Sequence[_Pose],
    config: RefineConfig,
    search: SearchConfig,
    places_mm: Sequence[float],
    levels: Sequence[Level],
    least_fit: float = -math.inf,
) -> Refined:
    """Refines several starts, goes on until the best has settled, and compares it with the places of neighbouring levels.

    Args:
      seen: X-rays at the resolutions of config's levels; starts: poses world_from_box.
      places_mm: where its two neighbours lie along the spine, from `levels.neighbours_mm`; none of a bone without neighbours.
      levels: of the first refinement, from these starts: those of `twice` or of `halving`.
      least_fit: an answer that fits worse is returned as it is, before its last level.
    Returns:
      `Refined` in numpy. Its rival is the best other answer, neighbours included.
    """
    sizes = [level.pixel_mm for level in config.levels]

    def run(poses, levels, least_fit=-math.inf):
        views = [seen.levels[sizes.index(level.pixel_mm)] for level in levels]
        given = parts, views, seen.camera_from_world, np.stack(poses)
        return gauss_newton.refine(programs.refine_level, *given, config, levels, least_fit)

    def again(refined):
        # From the second level on; what the first one said stays.
        further = run([refined.world_from_box], config.levels[1:] or config.levels)
        fit = np.concatenate([refined.fit[:1], further.fit])
        return dataclasses.replace(further, fit=fit, rival_mm=refined.rival_mm, margin=refined.margin)

    def settled(refined):
        for _ in range(search.max_settlings):
            # At a wrong depth the other view's edges count little, so that short steps are no sign of the optimum.
            is_uneven = evenness(refined) < search.uneven
            if not refined.step_mm > (config.levels[-1].settled_mm if is_uneven else search.settled_mm):
                break
            refined = again(refined)
        return refined

    def moved_where_uneven(refined):
        if evenness(refined) >= search.uneven:
            return refined
        best = int(np.argmax(refined.support))
        pose, cameras = (np.asarray(a, np.float64) for a in (refined.world_from_box, seen.camera_from_world))
        moved = [*_along_rays(pose, cameras[best : best + 1], search.depth_mm), *_turned(pose, search)]
        other = settled(run(moved, config.levels))
        if not other.fit[-1] > refined.fit[-1]:
            return refined
        away_mm = _apart_mm(other, refined)
        margin = other.fit[-1] - refined.fit[-1]
        if away_mm < gauss_newton.DISTINCT_MM or margin > other.margin:
            return other
        return dataclasses.replace(other, rival_mm=away_mm, margin=margin)

    refined = run(starts, levels, least_fit)
    if refined.fit[-1] < least_fit:
        return refined
    refined = moved_where_uneven(settled(refined))
    for _ in range(search.max_walk if places_mm else 0):
        places = [refined.world_from_box @ _shift((0.0, 0.0, along)) for along in places_mm]
        other = run(places, glance(config, search))
        away_mm = _apart_mm(other, refined)
        if away_mm < gauss_newton.DISTINCT_MM:
            break
        margin = refined.fit[0] - other.fit[0]
        # A place that at a glance fits nearly as well as the answer did, or does in detail, is refined, too.
        if other.fit[0] < min(refined.fit[0], refined.fit[-1]) - search.near_fit:
            if margin < refined.margin:
                refined = dataclasses.replace(refined, rival_mm=away_mm, margin=margin)
            break
        # Each by itself: at the coarsest level, the wrong one of two may fit better.
        turns = -search.turn_rad, search.turn_rad
        others = [run(along_arcs(refined.world_from_box, along, turns), config.levels) for along in places_mm]
        others = [o for o in others if _apart_mm(o, refined) >= gauss_newton.DISTINCT_MM]
        if not others:
            break
        other = settled(max(others, key=lambda o: o.fit[-1]))
        if other.fit[-1] > refined.fit[-1]:
            # Once more in windows that are cut where it ended, far from where it started.
            other = max(other, settled(again(other)), key=lambda o: o.fit[-1])
        away_mm = _apart_mm(other, refined)
        if away_mm < gauss_newton.DISTINCT_MM:
            break
        better, worse = (other, refined) if other.fit[-1] > refined.fit[-1] else (refined, other)
        margin = better.fit[-1] - worse.fit[-1]
        refined = dataclasses.replace(better, rival_mm=away_mm, margin=min(margin, better.margin))
        if better is not other:
            break
    return refined


def searches(
    programs: Programs,
    parts: Parts,
    seen: Pyramid,
    start: _Pose,
    wider_starts: Callable[[], Sequence[_Pose]],
    config: RefineConfig,
    search: SearchConfig,
    label: int,
) -> Iterator[Refined]:
    """The refined pose, then the best pose after each of the `confidence.SEARCHES` wider searches, which bones do not have.

    A shaft fits half as well in many places, and nothing there says which is right; its turn about itself is what a start often has
    wrong, so that turned starts are tried at once.

    Args:
      seen: as in `refine_pose`; start: world_from_box; wider_starts: gives further starts of the wider search, where one is made;
        label: VerSe number.
    """
    places_mm = neighbours_mm(label)
    if not places_mm:
        starts = [start, *_turned(start, search)]
        levels = twice(config, search.survivors)
        yield refine_pose(programs, parts, seen, starts, config, search, places_mm, levels)
        return
    refined = refine_pose(programs, parts, seen, [start], config, search, places_mm, twice(config), search.promising)
    yield refined
    near = [*_turned(refined.world_from_box, search), *_turned(start, search)]
    near += _along_rays(refined.world_from_box, seen.camera_from_world, search.depth_mm)
    wide = [*near, *wider_starts()][: search.starts]
    # Always as many, so that one program takes them.
    wide += [start] * (search.starts - len(wide))
    again = refine_pose(programs, parts, seen, wide, config, search, places_mm, halving(config, search))
    yield again if again.fit[-1] > refined.fit[-1] else refined
