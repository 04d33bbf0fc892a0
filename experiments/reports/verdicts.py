"""What a registration's outcome means, in words: whether its pose may be used, why not, and what to try."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import confidence
from radgs_jax.registration import plausibility
from radgs_jax.registration.pipeline import Outcome
from radgs_jax.registration.prepared import Prepared

ALONG_AXIS_DEG = 25.0
"""A view within this angle of the patient's front-back or left-right axis, degrees, is called AP, PA or lateral, any other one
oblique. Chosen by hand: a C-arm's AP is tilted by up to 20 degrees; at half, tilted views are called oblique; at twice, views
in the middle between the two have both names."""
APART_MM = 0.5
"""Disagreement of the views, mm, from which a refusal names it. Chosen by hand: right cameras give 0.01 to 0.1 mm, cameras that are
off by 2 mm more than 0.2 mm."""
TRY = (
    "check that the start is on this vertebra and within about 5 cm, that cameras and X-rays belong together, and that no metal "
    "covers the vertebra"
)
"""What to try after a refusal that has no better explanation."""
EXACT = "the cameras are taken as exact (else --camera_sd)"
"""What an accepted pose rests on where nothing was said of the cameras' errors: wrong cameras do not always show."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a pose may be used.

    Attributes:
      accepted: None where nothing was judged.
      headline: one line: 'accepted, within 0.3 mm' or 'REFUSED, do not use this pose'.
      why: what led to a refusal, or what an accepted pose rests on; may be empty.
      advice: what to try; empty where the pose is accepted.
    """

    accepted: bool | None
    headline: str
    why: str = ""
    advice: str = ""

    def line(self, name: str) -> str:
        """The verdict on the case called `name`, as one line."""
        return "; ".join(part for part in (f"{name}: {self.headline}", self.why, self.advice) if part)


def view_name(xray: XRay, world_from_ct: np.ndarray) -> str:
    """Name of a view by the direction in which its rays pass the patient: 'AP', 'PA', 'lateral', or 'oblique' with an angle.

    Args:
      world_from_ct: (4, 4); its rotation says where the patient's front is, so a start pose is good enough.
    """
    forward = (xray.camera.camera_from_world[:3, :3] @ world_from_ct[:3, :3])[2]
    front, side = forward[1], forward[0]
    from_front = math.degrees(math.acos(min(1.0, abs(front) / np.linalg.norm(forward))))
    from_side = math.degrees(math.acos(min(1.0, abs(side) / np.linalg.norm(forward))))
    if from_front <= ALONG_AXIS_DEG:
        return "AP" if front < 0 else "PA"
    return "lateral" if from_side <= ALONG_AXIS_DEG else f"oblique ({from_front:.0f} degrees from AP)"


def rounded_up(mm: float) -> str:
    """A length in mm for people: no smaller than it is, to 0.01 mm below 1 mm and to 0.1 mm above."""
    step = 0.01 if mm < 1 else 0.1
    return f"{math.ceil(mm / step - 1e-6) * step:.{2 if step < 0.1 else 1}f}"


def verdict(
    outcome: Outcome,
    prepared: Prepared,
    xrays: Sequence[XRay],
    start_found: bool = False,
    camera_sd: tuple[float, float] | None = None,
) -> Verdict:
    """The verdict on an outcome.

    Args:
      outcome: result of `pipeline.register` for `prepared` and `xrays`.
      start_found: whether the start pose was found in these X-rays.
      camera_sd: as in the registration's options; where it is zero, an acceptance says so. None says nothing of the cameras.
    """
    judged, refined = outcome.confidence, outcome.refined
    if judged is None or refined is None:
        return Verdict(
            None,
            "NOT JUDGED",
            advice="without a refinement and an acceptance rule nothing says how far off this pose is",
        )
    if judged.accepted:
        rests_on = EXACT if camera_sd is not None and not any(camera_sd) else ""
        return Verdict(True, f"accepted, within {rounded_up(judged.uncertainty_mm)} mm", rests_on)
    if judged.trusted:
        return Verdict(
            False,
            f"REFUSED in the world, where it is known to {rounded_up(judged.uncertainty_mm)} mm",
            "the cameras leave that open; relative to other bones of these X-rays it may be used",
            "use relative poses (--together), or calibrate the C-arm (--cameras)",
        )
    refused, advice, reasons = "REFUSED, do not use this pose", TRY, []
    if len(xrays) < confidence.MIN_VIEWS:
        return Verdict(False, refused, "a single view does not show depth", "add a view from another side")
    centre = (outcome.world_from_ct @ prepared.vertebra.ct_from_box)[:3, 3]
    angle = confidence.view_angle(outcome.camera_from_world, centre) or 0.0
    if angle < confidence.MIN_VIEW_ANGLE_RAD:
        least = f"{math.degrees(confidence.MIN_VIEW_ANGLE_RAD):.0f} or more"
        why = f"the views are only {math.degrees(angle):.0f} degrees apart, wanted {least}"
        return Verdict(False, refused, why, "take the second X-ray from another side")
    apart = float(refined.view_disagreement_mm)
    if apart > APART_MM:
        reasons.append(f"the views place it {rounded_up(apart)} mm apart")
        advice = "check that the cameras are those of these X-rays, in their order, and that the patient did not move between them"
    names = [view_name(xray, outcome.trajectory[0]) for xray in xrays]
    support = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, np.asarray(refined.support)))
    reasons.append(f"the vertebra explains too little of the X-rays (correlation {support}; 1 is all)")
    # A start pose that was found in the X-rays has the frames that it was looked for in.
    if not start_found and (meant := plausibility.hint(prepared.vertebra, xrays, outcome.trajectory[0])):
        advice = f"{advice}; {meant}"
    return Verdict(False, refused, " and ".join(reasons), advice)
