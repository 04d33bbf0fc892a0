"""The search for a pose: two starts, neighbouring levels, and wider searches where an answer is not trusted.

Vertebrae look alike. So the places of an answer's neighbours along the spine are tried too, and an answer that is refused is
searched for anew: turned about its axes, shifted along the spine, and at last all round the start.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.geometry import rigid_host
from radgs_jax.levels import neighbours_mm
from radgs_jax.registration import gauss_newton
from radgs_jax.registration.gauss_newton import Level
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.gauss_newton import Refined
from radgs_jax.registration.parts import on_device
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
      turn_rad: by how much starts are turned against a refused answer about each of its axes. Most answers that are wrong by
        less than 5 mm sit in a wrong orientation; at half the turn they stay there, at twice they find a neighbour.
      wide_along_mm: shifts along the spine tried first, from where it started: up to the neighbours' places and between.
      far_across_mm, far_along_mm: shifts across and along the spine tried last, in all combinations. Their spacing is about
        the capture range of the coarsest level; at half it the search takes eight times as long, at twice it has gaps.
      glance_iterations: steps of the coarsest level taken in a neighbour's place before it is compared.
      max_walk: how often, at most, the answer moves to a neighbouring level.
      settled_mm: a refinement whose last step was longer goes on from where it is.
      max_settlings: how often, at most, it goes on.
      survivors: how many of a wider search's starts go on from the coarsest level.
      bare_line_integral: median line integral below which an X-ray shows a bone in air; behind a body it is above 1.
    """

    turn_rad: float = math.radians(15.0)
    wide_along_mm: tuple[float, ...] = (-24.0, -12.0, 12.0, 24.0)
    far_across_mm: tuple[float, ...] = (-24.0, 0.0, 24.0)
    far_along_mm: tuple[float, ...] = (-48.0, -24.0, 0.0, 24.0, 48.0)
    glance_iterations: int = 5
    max_walk: int = 4
    settled_mm: float = 0.2
    max_settlings: int = 3
    survivors: int = 3
    bare_line_integral: float = 0.3


def refine_arguments(
    parts: Parts, seen: Pyramid, starts: Sequence[_Pose], config: RefineConfig, levels: Sequence[Level]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords of `gauss_newton.refine` for the first levels of a pyramid, with `levels` in place of config's."""
    poses = on_device(starts)
    chosen = dataclasses.replace(config, levels=tuple(levels))
    return (parts, seen.levels[: len(levels)], seen.camera_from_world, poses), {"config": chosen}


def glance(config: RefineConfig, search: SearchConfig) -> tuple[Level, ...]:
    """The levels of a short look at a neighbour's place."""
    return (dataclasses.replace(config.levels[0], iterations=search.glance_iterations),)


def keeping(config: RefineConfig, survivors: int) -> tuple[Level, ...]:
    """The levels of a refinement in which that many starts go on from the coarsest one."""
    first, *others = config.levels
    return (dataclasses.replace(first, keep=survivors), *others)


def _shift(shift_mm):
    motion = np.eye(4)
    motion[:3, 3] = shift_mm
    return motion


def refine_pose(
    programs: Programs,
    parts: Parts,
    seen: Pyramid,
    starts: Sequence[_Pose],
    config: RefineConfig,
    search: SearchConfig,
    places_mm: Sequence[float],
    survivors: int = 1,
) -> Refined:
    """Refines several starts, goes on until the best has settled, and compares it with the places of neighbouring levels.

    Args:
      seen: X-rays at the resolutions of config's levels; starts: at least 2 poses world_from_box.
      places_mm: where its two neighbours lie along the spine, from `levels.neighbours_mm`; none of a bone without neighbours.
      survivors: number of starts that go on from the coarsest level.
    Returns:
      `Refined` in numpy. Its rival is the best other answer, neighbours included.
    """

    def run(poses, levels):
        arguments, options = refine_arguments(parts, seen, poses, config, levels)
        return jax.device_get(programs.refine(*arguments, **options))

    def settled(refined):
        for _ in range(search.max_settlings):
            if not refined.step_mm > search.settled_mm:
                break
            # The same pose twice reuses the program that is compiled for two starts. The rival stays the same.
            rival = {name: getattr(refined, name) for name in ("rival_mm", "margin")}
            refined = dataclasses.replace(run([refined.world_from_box] * 2, config.levels), **rival)
        return refined

    refined = settled(run(starts, keeping(config, survivors)))
    for _ in range(search.max_walk if places_mm else 0):
        places = [refined.world_from_box @ _shift((0.0, 0.0, along)) for along in places_mm]
        other = run(places, glance(config, search))
        away_mm = np.linalg.norm(other.world_from_box[:3, 3] - refined.world_from_box[:3, 3])
        if away_mm < gauss_newton.DISTINCT_MM:
            break
        margin = refined.fit[0] - other.fit[0]
        # A place that fits better at a glance than the answer does in detail is refined, too.
        if other.fit[0] < refined.fit[-1]:
            if margin < refined.margin:
                refined = dataclasses.replace(refined, rival_mm=away_mm, margin=margin)
            break
        other = settled(run(places, config.levels))
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
    estimate: _Pose,
    start: _Pose,
    config: RefineConfig,
    search: SearchConfig,
    label: int,
) -> Iterator[Refined]:
    """The refined pose, then the best pose after each of the `confidence.SEARCHES` wider searches, which bones do not have.

    The wider searches look along the spine. A shaft fits half as well in many places, and nothing there says which is right; its
    turn about itself is what a start often has wrong, so that turned starts are tried at once.

    Args:
      seen: as in `refine_pose`; estimate, start: world_from_box, the network's and the one that it started from; label: VerSe
        number.
    """
    places_mm = neighbours_mm(label)
    angles = (-search.turn_rad, search.turn_rad)
    turns = [rigid_host.matrix(angle * axis, [0.0, 0.0, 0.0]) for axis in np.eye(3) for angle in angles]
    if not places_mm:
        starts = [estimate, start, *(start @ turn for turn in turns)]
        yield refine_pose(programs, parts, seen, starts, config, search, places_mm, search.survivors)
        return
    refined = refine_pose(programs, parts, seen, [estimate, start], config, search, places_mm)
    yield refined
    wide = [(0.0, 0.0, along) for along in search.wide_along_mm]
    far = list(itertools.product(search.far_across_mm, search.far_across_mm, search.far_along_mm))
    for poses, shifts_mm in (((estimate, start), wide), ((start,), far)):
        starts = [refined.world_from_box @ turn for turn in turns]
        starts += [pose @ _shift(shift) for pose in poses for shift in shifts_mm]
        again = refine_pose(programs, parts, seen, starts, config, search, places_mm, search.survivors)
        if again.fit[-1] > refined.fit[-1]:
            refined = again
        yield refined
