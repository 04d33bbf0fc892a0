"""The vertebrae of one acquisition as rows to register: what is given of their start poses, and what the X-rays say themselves."""

import dataclasses
import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from data_pipelines.cameras import checks
from data_pipelines.cameras import conventions
from data_pipelines.io import pose_files
from data_pipelines.xrays import view_geometry
from data_pipelines.xrays.radiograph import Radiograph
from experiments.patients import starts
from experiments.patients.registering import Row
from experiments.patients.workdir import Target
from experiments.runtime.kept_programs import kept
from radgs_jax import errors
from radgs_jax import levels
from radgs_jax.levels import level_name
from radgs_jax.registration import plausibility
from radgs_jax.registration.prepared import Prepared
from radgs_jax.registration.prepared import Vertebra

BESIDE = 3
"""Levels to each side that the surroundings of a vertebra hold (`whole_body.PART_REACH_MM`). Without a start pose, the body is
looked for so that all targets are in some surroundings: half takes twice as long, twice leaves gaps."""
LEAST_SHARE = 0.5
"""Share of a vertebra that each X-ray shows, where only those that are shown are wanted. Chosen by hand: half registers vertebrae
that are cut; twice leaves out all that touch the frame."""
MAX_CAMERA_SD = (20.0, 5.0)
"""Largest errors of cameras that can be stated, mm and degrees. Chosen by hand: beyond, the first refinement finds nothing to
correct them by."""

Localize = Callable[[Target, Sequence[Radiograph], Vertebra], tuple[np.ndarray, dict[str, Any]]]
"""Start pose (4, 4) and report of the vertebra that a localizer finds."""


@dataclasses.dataclass(frozen=True)
class GivenStart:
    """What is given of the start pose. Where nothing is, it is found in the X-rays.

    Attributes:
      pose: a file for `pose_files.read_pose`, for all targets.
      points: (u, v) of the one vertebra's centre in each view, pixels.
      axis: with points, (u, v) of a second point on the bone's axis in each view.
    """

    pose: pathlib.Path | str | None = None
    points: Sequence[Sequence[float]] | None = None
    axis: Sequence[Sequence[float]] | None = None


def rows(
    targets: Sequence[Target],
    xrays: Sequence[Radiograph],
    load: Callable[[Target], Prepared],
    given: GivenStart = GivenStart(),
    cameras: pathlib.Path | str | None = None,
    localize: Localize | None = None,
    say: Callable[[str], None] = lambda line: None,
    only_shown: bool = False,
    distortion_fitted: bool = False,
) -> tuple[list[Row], dict[str, Any]]:
    """A `Row` for each target, and reports of what was found: 'body', or row name -> report.

    Args:
      load: as in `register_rows`.
      cameras: the file of the cameras, named in errors.
      localize: finds start poses where none is given; None looks for the CT's whole body.
      say: takes a line about how a start pose was made.
      only_shown: leave out vertebrae that an X-ray shows less than half of.
      distortion_fitted: whether the distortion of a round field is fitted, so that nothing is said of it.
    Raises:
      InputError: no start pose is found, or no vertebra is shown.
    """
    if not distortion_fitted and any(x.origin["collimator"] == "circle found" for x in xrays):
        logging.warning(
            "X-rays: a round field; if it is an image intensifier's, fit its distortion: --distortion_sd=0.03"
        )
    found_rows, reports, found = [], {}, None
    by_body = not (given.pose or given.points or localize)
    if by_body:
        if targets[0].label > levels.FIRST_BONE:
            errors.fail("flags", "--init, --points", "neither", "one of them, for a bone beyond the spine")
        seen = [conventions.of_camera(xray.camera) for xray in xrays]
        # What a camera by itself shows costs nothing; a search with wrong ones takes minutes and may find something.
        for number, view in enumerate(seen, 1):
            _blame(checks.view_fault(f"view {number}", view, mirrored=False), cameras)
        try:
            found, reports["body"] = starts.start_from_body([load(t) for t in _looked_for(targets)], xrays, kept)
        except errors.InputError:
            _blame(checks.fault(seen, mirrored=False), cameras)
            raise
        say(
            f"start from the whole body in the X-rays, whose correlations sum to {reports['body']['fit']:.2f} of {len(xrays)}"
        )
    for target in targets:
        name = "case" if len(targets) == 1 else level_name(target.label)
        if given.pose:
            start = pose_files.read_pose(given.pose)
        elif by_body:
            start = found
        elif given.points:
            start = _start_from_points(given, xrays, load(target), say)
        else:
            assert localize is not None
            start, reports[name] = localize(target, xrays, load(target).vertebra)
        made_from = "--points" if given.points else "the localizer" if localize else "the body"
        sources = cameras or "cameras", given.pose or made_from
        found_rows.append(Row(name, target, xrays, start, None, *sources, start_found=not (given.pose or given.points)))
    if only_shown:
        found_rows = [row for row in found_rows if _in_view(row, load, ": left out")]
        if not found_rows:
            errors.fail("flags", "--label", "all, of which no X-ray shows one", "a start pose in the X-rays' field")
    elif by_body:
        for row in found_rows:
            _in_view(row, load, " where the body was found")
    return found_rows, reports


def assumed_camera_sd(xrays: Sequence[Radiograph]) -> tuple[float, float]:
    """How far cameras are taken to be off, mm and degrees, where nothing is said: not at all, unless they are DICOM's nominal ones.

    It warns of nominal ones.
    """
    if not any(view.origin["camera"] == view_geometry.NOMINAL for view in xrays):
        return 0.0, 0.0
    mm, degrees = view_geometry.NOMINAL_SD
    logging.warning("cameras: DICOM's nominal ones, taken to be off by about %g mm and %g degrees", mm, degrees)
    return mm, degrees


def _blame(wrong, cameras):
    """Raises an InputError of what is wrong with cameras, where anything is."""
    if wrong is not None:
        mend = "`python -m experiments.cameras` knows other conventions: docs/cameras.md"
        errors.fail(cameras or "cameras", wrong.field, wrong.found, f"{wrong.wanted}; {mend}")


def _start_from_points(given, xrays, prepared, say):
    if given.axis:
        start, miss = starts.start_from_axis(xrays, given.points, given.axis, prepared, kept)
    else:
        start, miss = starts.start_from_points([x.camera for x in xrays], given.points, prepared.vertebra)
    say(f"start from the given points: the rays miss each other by {miss:.2f} mm")
    return start


def _looked_for(targets):
    """Targets whose surroundings hold all of them: few, and as far apart as that allows."""
    place = lambda target: levels.ORDER.index(target.label)
    left, chosen = sorted(targets, key=place), []
    while left:
        chosen.append([target for target in left if place(target) <= place(left[0]) + BESIDE][-1])
        left = [target for target in left if place(target) > place(chosen[-1]) + BESIDE]
    return chosen


def _in_view(row, load, otherwise):
    """Whether every X-ray shows most of a row's vertebra at its start pose; `otherwise` says what follows if not."""
    shown = plausibility.least_share(load(row.target).vertebra, row.xrays, row.start) >= LEAST_SHARE
    if not shown:
        logging.warning("%s: an X-ray shows less than half of it%s", level_name(row.target.label), otherwise)
    return shown
