"""The vertebrae of one acquisition, refined together: the spine's curve against the CT's, and the cameras' corrections."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from experiments.patients.registering import Row
from experiments.patients.workdir import Target
from experiments.reports import case_folder
from experiments.reports import spine_curve
from experiments.runtime.kept_programs import kept
from radgs_jax import levels
from radgs_jax import metrics
from radgs_jax.registration import confidence
from radgs_jax.registration import joint
from radgs_jax.registration import pipeline
from radgs_jax.registration.pipeline import RegisterOptions
from radgs_jax.registration.prepared import Prepared

FORMAT = "radgs-spine/1"
MIN_VERTEBRAE = 2
"""Fewest trusted vertebrae that are refined together."""


def spine(
    rows: Sequence[Row],
    load: Callable[[Target], Prepared],
    results: Sequence[dict[str, Any]],
    options: RegisterOptions,
) -> dict[str, Any] | None:
    """The trusted vertebrae of a run, refined together, as plain values for spine.json; None of fewer than `MIN_VERTEBRAE`.

    Args:
      rows: of one acquisition; load: as in `registering.register_rows`; results: their entries of results.json.
      options: of the registrations.
    """
    answers = {one["id"]: one for one in results if one.get("trusted", one.get("accepted"))}
    used = sorted((row for row in rows if row.name in answers), key=lambda row: levels.ORDER.index(row.target.label))
    if len(used) < MIN_VERTEBRAE:
        logging.warning(
            "no spine.json: %d of %d poses are trusted, wanted %d or more", len(used), len(rows), MIN_VERTEBRAE
        )
        return None
    prepared = [load(row.target) for row in used]
    poses = [np.array(answers[row.name].get("as_calibrated", answers[row.name]["T"])) for row in used]
    together, vertebrae = pipeline.refine_spine(prepared, used[0].xrays, poses, options, kept), []
    rule = prepared[0].rule
    factor = 1.0 if rule is None else rule.radius
    covariance, centres, surfaces = joint.covariance(together), [], []
    for k, (row, ready) in enumerate(zip(used, prepared)):
        own = covariance[6 * k : 6 * k + 6, 6 * k : 6 * k + 6]
        centre, T = ready.vertebra.ct_from_box[:3, 3], together.world_from_ct[k]
        points = (ready.vertebra.points - centre) @ T[:3, :3].T
        radius_mm = factor * confidence.spread_mm(own, points)
        vertebrae.append(
            {
                "level": levels.level_name(row.target.label),
                "world_from_ct": T.tolist(),
                "rest_world_from_ct": together.world_from_ct[len(used) + k].tolist(),
                "accepted": radius_mm <= metrics.SUCCESS_MM,
                "uncertainty_mm": radius_mm,
                "covariance": own.tolist(),
            }
        )
        centres.append(T[:3, :3] @ centre + T[:3, 3])
        surfaces.append(points)
    segments = []
    for k in range(len(used) - 1):
        pair = slice(k, k + 2)
        relative = joint.relative_covariance(covariance[6 * k : 6 * k + 12, 6 * k : 6 * k + 12], *centres[pair])
        radius = {"uncertainty_mm": factor * confidence.spread_mm(relative, surfaces[k])}
        segments.append(
            spine_curve.segment([ready.vertebra for ready in prepared[pair]], together.world_from_ct[pair]) | radius
        )
    return {
        "format": FORMAT,
        "vertebrae": vertebrae,
        "segments": segments,
        **case_folder.corrections(together, covariance),
        "units": "mm, degrees; covariances: rad and mm",
    }
