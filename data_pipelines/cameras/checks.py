"""Whether cameras can be those of X-rays, by what they do to the space that they see, and which mistake explains it if not. numpy.

`register` compares cameras with X-rays and a start pose before it searches (`radgs_jax.registration.view_checks`). Here there are
only cameras, so that the views are compared with each other: their central rays must pass near each other, in front of the sources.
"""

import dataclasses
import itertools
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from data_pipelines.cameras.conventions import Options
from data_pipelines.cameras.conventions import Pinhole
from radgs_jax import errors
from radgs_jax.geometry import triangulation
from radgs_jax.registration import view_checks

SOURCE_MM = (200.0, 2000.0)
"""Distances from a source to where the central rays meet, mm. C-arms have 600 to 900, biplane rooms 750 to 1100, long images up to
1800. Half of the lower end takes 10 cm for a C-arm in other units, twice of the upper one is in no room."""
MISS_MM = 100.0
"""Largest distance between the central rays of two views, mm. Isocentric arms have some mm, moved ones some cm. Chosen by hand:
half refuses two free exposures, twice lets rays pass that share no part of a body."""
PARALLEL_DEG = 5.0
"""Angle between central rays, degrees, below which where they meet says nothing; the world's origin is taken instead. Chosen by
hand: at half, a miss of 5 mm moves the meeting point by 10 cm, twice trusts the origin where rays would do."""
SAME_MM = 1.0
"""Distance of two sources, mm, below which views that also look the same way are one view. Chosen by hand: far below any motion."""
MM_SQUARE, MM_ANGLE_DEG = 0.15, 20.0
"""A K in mm is recognised by a principal point at shares of the image's middle along both axes that agree to this relative
difference, in an angle of view above this. Chosen by hand: true principal points are some percent off the middle, and whole panels
have 13 to 24 degrees, which mm for pixels of 0.3 to 0.6 make 25 to 50. Half of the first or twice the second finds fewer; the other
way round takes windows cut out of an image for it."""
PANEL_DEG = 10.0
"""Angle of view of a whole panel, degrees, in which a principal point in a corner is counted from elsewhere. Chosen by hand:
panels have 13 to 24; half refuses windows that end at the principal point, twice takes every panel for one."""
HALF_PX = 0.01
"""Distance, px, from half the image's size at which a principal point is taken for the middle of pixels that are counted from the
corner. Chosen by hand: rounded numbers are nearer, and measured ones rarely."""
ALONG = 0.5
"""Shortest part of a patient axis in the image, relative to its length, that is named: 60 degrees out of the image's plane."""
LETTERS = (("R", "L"), ("A", "P"), ("H", "F"))
"""The patient's directions along +x, -x, +y, -y, +z and -z of the world."""
SIDES = {"R": "right", "L": "left", "A": "front", "P": "back", "H": "head", "F": "feet"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What no set-up has: the field, what was found there, what is wanted, and the one flag that can mend it, or None for any."""

    field: str
    found: str
    wanted: str
    flag: str | None = None


def source_of(view: Pinhole) -> Float[np.ndarray, "3"]:
    """The X-ray source in the world, mm."""
    return -view.E[:3, :3].T @ view.E[:3, 3]


def central_ray(view: Pinhole) -> Float[np.ndarray, "3"]:
    """Unit direction, in the world, of the ray through the image's middle, away from the source."""
    middle = np.array([(view.width - 1) / 2, (view.height - 1) / 2, 1.0])
    d = view.E[:3, :3].T @ np.linalg.solve(view.K, middle)
    return d / np.linalg.norm(d)


def angle_deg(a: Float[np.ndarray, "3"], b: Float[np.ndarray, "3"]) -> float:
    """Angle between two lines of unit directions, 0 to 90 degrees."""
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b)), abs(a @ b))))


def meeting(views: Sequence[Pinhole]) -> Float[np.ndarray, "3"] | None:
    """The point nearest to the views' central rays, mm; None of rays that are all parallel. It may be behind a source."""
    rays = np.stack([central_ray(view) for view in views])
    if max((angle_deg(a, b) for a, b in itertools.combinations(rays, 2)), default=0.0) < PARALLEL_DEG:
        return None
    across = np.eye(3) - rays[:, :, None] * rays[:, None]
    sources = np.stack([source_of(view) for view in views])
    return np.linalg.solve(across.sum(0), np.einsum("vij,vj->i", across, sources))


def miss_mm(a: Pinhole, b: Pinhole) -> float:
    """The distance between two views' central rays, mm; that of their sources from each other's rays where they are parallel."""
    rays, apart = (central_ray(a), central_ray(b)), source_of(b) - source_of(a)
    if angle_deg(*rays) < PARALLEL_DEG:
        return float(np.linalg.norm(apart - apart @ rays[0] * rays[0]))
    return float(triangulation.ray_distance(source_of(a), rays[0][None], source_of(b), rays[1][None])[0, 0])


def fault(views: Sequence[Pinhole], mirrored: bool) -> Fault | None:
    """The first thing of the cameras of one acquisition that no set-up has.

    Args:
      mirrored: the images are the mirror images of what their sources see.
    """
    for number, view in enumerate(views, 1):
        if (found := view_fault(f"view {number}", view, mirrored)) is not None:
            return found
    centre = meeting(views)
    for number, view in enumerate(views, 1):
        depth = view.E[2, 3]
        if depth <= 0:
            found = f"the world's origin {abs(depth):.4g} mm behind the source"
            return Fault(f"view {number}: E", found, "it in front of the source; --origin moves it")
        distance = np.linalg.norm(source_of(view) - (0.0 if centre is None else centre))
        front = centre is None or (centre - source_of(view)) @ central_ray(view) > 0
        if not front or not SOURCE_MM[0] <= distance <= SOURCE_MM[1]:
            at = "the world's origin" if centre is None else "where the central rays meet"
            found = f"{at} {distance:.4g} mm {'from' if front else 'behind'} the source"
            return Fault(
                f"view {number}: E", found, f"it {SOURCE_MM[0]:g} to {SOURCE_MM[1]:g} mm in front of the source"
            )
        if view.pixel_mm is not None:
            length = abs(view.K[0, 0]) * view.pixel_mm[0]
            low, high = view_checks.SOURCE_DETECTOR_MM
            if not max(low, distance) <= length <= high:
                found = f"{length:.4g} mm from source to detector, by fx and a pitch of {view.pixel_mm[0]:g} mm"
                return Fault(
                    f"view {number}: K", found, f"{max(low, distance):.0f} to {high:g} mm, beyond the isocentre"
                )
    for (i, a), (j, b) in itertools.combinations(enumerate(views, 1), 2):
        same = central_ray(a) @ central_ray(b) > np.cos(np.radians(0.1))
        if same and np.linalg.norm(source_of(a) - source_of(b)) < SAME_MM:
            return Fault(f"views {i} and {j}", "one source that looks one way", "two views")
        if (miss := miss_mm(a, b)) > MISS_MM:
            found = f"central rays that pass {miss:.4g} mm from each other"
            return Fault(f"views {i} and {j}", found, f"{MISS_MM:g} mm at most: views of one body")
    return None


def view_fault(name: str, view: Pinhole, mirrored: bool) -> Fault | None:
    """The first thing of one view by itself that no set-up has; name: what the fault calls the view."""
    if (view.K[0, 0] < 0) != mirrored:
        if mirrored:
            return Fault(name, "a camera that does not mirror, with --mirrored", "a mirrored one, or no --mirrored")
        return Fault(
            name, "a mirrored detector (determinant -1)", "+x along columns, +y along rows, +z to the detector"
        )
    seen = _seen(view, mirrored)
    k, wide = seen.k, _angle_of_view(seen)
    for check, value, unit in (("angle of view", wide, " degrees"), ("fx / fy", k[0] / k[1], "")):
        if view_checks.outside(check, value, "possible"):
            return Fault(f"{name}: K", f"{check} {value:.3g}{unit}", view_checks.CHECKS[check].wanted)
    if pitch := pitch_of_mm(view, mirrored):
        found = f"fx {k[0]:.4g}, cx {k[2]:.4g} in {view.width} pixels: mm, at a pitch near {pitch:.3g} mm"
        return Fault(f"{name}: K", found, "pixels", "--K=mm")
    from_edge = np.minimum(np.abs(k[2:]), np.abs(seen.size - 1 - k[2:]))
    corner = (from_edge <= view_checks.CORNER * seen.size).all() and wide > PANEL_DEG
    if corner or view_checks.in_corner(seen):
        wanted = "one near the middle; if K is in mm about the panel's middle, --K=mm --pixel_mm=PITCH --pixels=middle"
        return Fault(f"{name}: K", f"a principal point at ({k[2]:.4g}, {k[3]:.4g}), a corner", wanted)
    return None


def _seen(view, mirrored=False):
    """A view as `view_checks` has it, with its columns mirrored back."""
    k = np.array([abs(view.K[0, 0]), view.K[1, 1], *view.K[:2, 2]])
    if mirrored:
        k[2] = view.width - 1 - k[2]
    return view_checks.View(k, view.E, np.array([view.width, view.height], np.float64))


def _angle_of_view(seen):
    return float(np.degrees(2 * np.arctan(0.5 * (seen.size / seen.k[:2]).max())))


def pitch_of_mm(view: Pinhole, mirrored: bool = False) -> float:
    """The pixel pitch, mm, of a K that looks as if it were in mm; 0 if it does not.

    Such a principal point is the same share of the image's middle in both directions, but for what the true one is off it.
    """
    seen = _seen(view, mirrored)
    if pitch := view_checks.pitch_of_mm(seen):
        return pitch
    (u, v), (low, high) = 2 * seen.k[2:] / (seen.size - 1 + 1e-9), view_checks.PITCH_MM
    square = v > 0 and abs(u / v - 1) <= MM_SQUARE and low <= u <= high and low <= v <= high
    length = view_checks.SOURCE_DETECTOR_MM[0] <= seen.k[0] <= view_checks.SOURCE_DETECTOR_MM[1]
    return float(0.5 * (u + v)) if square and length and _angle_of_view(seen) > MM_ANGLE_DEG else 0.0


def refuse(
    convert: Callable[[Options], list[Pinhole]],
    options: Options,
    alternatives: Sequence[tuple[str, str, Mapping[str, Any]]],
    source: object,
) -> list[Pinhole]:
    """The cameras that `convert` makes with `options`, if they can be those of X-rays.

    Args:
      alternatives: flag, what it says, and the options that it changes; of these the error names those that would pass.
      source: the file that errors name.
    Raises:
      InputError: they cannot.
    """
    views = convert(options)
    found = fault(views, options.mirrored)
    if found is None:
        return views
    mends = []
    for flag, meaning, change in alternatives:
        other = dataclasses.replace(options, **change)
        if other == options or found.flag not in (None, flag):
            continue
        try:
            mended = convert(other)
            # What a flag may be proposed for is not only possible, but usual.
            wide = max(_angle_of_view(_seen(view, other.mirrored)) for view in mended)
            passes = fault(mended, other.mirrored) is None and not view_checks.outside("angle of view", wide, "usual")
        except (errors.InputError, np.linalg.LinAlgError):
            passes = False
        if passes:
            mends.append(f"{flag} if {meaning}")
    if len(mends) == 1:
        mend = f"; only one flag mends it: {mends[0]}"
    else:
        mend = f"; what mends it: {', or '.join(mends)}" if mends else ""
    errors.fail(source, found.field, found.found, f"{found.wanted}{mend}")


def named(direction: Float[np.ndarray, "3"]) -> str:
    """A direction in the patient's words: the largest of its parts, and the second with its angle from the first."""
    order = np.argsort(-np.abs(direction))
    first, second = (SIDES[LETTERS[i][int(direction[i] < 0)]] for i in order[:2])
    turn = np.degrees(np.arctan2(abs(direction[order[1]]), abs(direction[order[0]])))
    return first if turn < 0.5 else f"{first}, {turn:.1f} degrees to the {second}"


def letters(view: Pinhole) -> list[tuple[str, Float[np.ndarray, "2"]]]:
    """The patient's letters that the image's plane shows, with their unit directions in pixels (right, down)."""
    shown = []
    for axis, pair in enumerate(LETTERS):
        across = view.E[:2, axis] * [np.sign(view.K[0, 0]), 1.0]
        if np.linalg.norm(across) >= ALONG:
            shown += [(letter, sign * across / np.linalg.norm(across)) for letter, sign in zip(pair, (1, -1))]
    return shown


def described(views: Sequence[Pinhole]) -> list[str]:
    """A line for each view and each pair of views, in words that a user can compare with the room."""
    centre, lines = meeting(views), []
    for number, view in enumerate(views, 1):
        place = source_of(view) - (0.0 if centre is None else centre)
        seen = letters(view)
        up, right = (max(seen, key=lambda item: item[1] @ d)[0] for d in (np.array([0, -1]), np.array([1, 0])))
        lines.append(
            f"view {number}: source {np.linalg.norm(place):.1f} mm from the isocentre, at the patient's "
            f"{named(place / np.linalg.norm(place))}; in the image up is {up}, right is {right}"
        )
        if np.abs(np.abs(view.K[:2, 2]) - [view.width / 2, view.height / 2]).max() < HALF_PX:
            lines.append(
                f"view {number}: its principal point is half the image's size: --pixels=corner if that is its middle"
            )
    for (i, a), (j, b) in itertools.combinations(enumerate(views, 1), 2):
        angle = angle_deg(central_ray(a), central_ray(b))
        lines.append(
            f"views {i} and {j}: {angle:.1f} degrees apart, central rays {miss_mm(a, b):.1f} mm from each other"
        )
    if centre is not None:
        lines.append(f"the central rays meet {np.linalg.norm(centre):.1f} mm from the world's origin")
    return lines
