"""Acceptance and uncertainty of a refined pose, from what the refinement reports about itself.

The size of a pose's error is taken from how much squares of pixels disagree about it (`Refined.misfit`), which noise, a spine that
has bent, a crude mask and a vendor's picture all add to. An `AcceptanceRule` holds what is fitted: a logistic model of the chance
of an mTRE below 2 mm, a log-linear model from that disagreement to the error of a right pose, and the ratio of radius to its size.
`experiments.calibrate` fits them to simulated patients.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import metrics
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.gauss_newton import Refined
from radgs_jax.registration.search import SearchConfig

MIN_RADIUS_MM = 0.02
"""Minimum radius, mm. Chosen by hand, about the resolution of float32 poses and of the samples along a ray; half or twice matters
to noise-free simulated X-rays alone, whose errors are 0.01 to 0.02 mm."""
MIN_VIEWS = 2
"""Minimum number of views for acceptance. A single view constrains depth only through magnification, so its error would go
unnoticed."""
MIN_VIEW_ANGLE_RAD = math.radians(20.0)
"""Minimum angle between the views at the vertebra for acceptance, radians. Set by hand from reports: of poses from views 0 to 10
degrees apart most were accepted and half of them wrong, by up to 15.7 mm with radii near 0.1 mm. C-arms in use are 45 to 90 degrees
apart. Half lets such pairs through; twice would refuse oblique pairs that register well."""
LEAST_SUPPORT = 0.2
"""Smallest `Refined.support` of any view for acceptance, no unit: below it that view does not see the vertebra where the pose has
it, and the other alone cannot say how far away it is. Of 317 right poses of the fit none was below 0.39; of a pose that was wrong
along the other view's rays, in small collimated pictures, 0.04. At half, such poses pass by chance; twice refuses right ones."""
MIN_SINE = math.sin(math.radians(1.0))
"""Smallest sine that the radius is divided by, no unit. It only keeps radii of views of one direction finite, which are refused in
any case; half or twice changes nothing that is accepted."""
SEARCHES = 1
"""Number of wider searches that may follow a refinement. Each has a threshold of its own, since poses that needed a search differ
from those that did not."""
FEATURES = (
    "support",
    "least_support",
    "similarity",
    "least_similarity",
    "log_step",
    "margin",
    "log_disagreement",
    "log_misfit",
)
ERROR_PER_DISAGREEMENT = 4.0
"""Ratio of pose error to view disagreement, no unit: roughly the median in simulated scenes with displaced cameras. At half, the
radius is too small where cameras are off; at twice, views that disagree by more than 0.25 mm are refused, by 0.5 mm today."""
COVERAGE = 0.965
"""Fraction of the right poses of the fit whose error the radius holds. Chosen with the study's 280 scenes in sight, of which it
holds 95.3 %; at 0.97, the median radius was 3.02 times the median error (docs/accuracy.md, "How the rule does on other scenes")."""
STEP_OFFSET_MM = 1e-3
"""Added to the last step before its logarithm, mm, so that a step of 0 is finite. Chosen by hand, below any step that tells right
from wrong; like the next three constants it belongs to the fitted rule, which must be fitted again when it changes."""
DISAGREEMENT_OFFSET_MM = 1e-2
"""Added to the view disagreement before its logarithm, mm. Chosen by hand: disagreements below it are noise."""
TYPICAL_MM = 0.1
"""Misfit at which `error_per_misfit` is taken, mm: that of measured X-rays."""
SMALLEST_MM = 1e-4
"""Smallest motion whose logarithm is taken, mm. Chosen by hand, below any that matters: it keeps perfect pictures finite."""
LARGE_MARGIN = 0.5
"""Margins above this count as this, no unit. Chosen by hand: a rival that fits so much worse is as good as none."""
ERROR_OFFSET_MM = 1e-3
"""Added to the error before its logarithm in the fit, mm. Chosen by hand, below any error that matters."""
NEARLY_NONE = 0.02
"""Fraction of the right poses of the fit that do not count in where the gap to the wrong ones ends. At half, a single odd
pose closes the gap; at twice, more right poses are refused. Chosen by hand."""
REFUSED_SD = (np.pi / 2, 100.0)
"""Standard deviations, rad and mm, and radius, mm, of a pose whose refinement is not finite or not positive definite. Chosen by
hand: larger than any pose's error, so that the exact value is unimportant."""


@dataclasses.dataclass(frozen=True)
class AcceptanceRule:
    """The fitted models.

    Attributes:
      chance: (1 + len(FEATURES),) weights of a constant and of FEATURES in the log odds of a right pose.
      thresholds: (1 + SEARCHES,) minimum chance of an accepted pose, after the first refinement and after each search.
      size: (2,) weights in the log of the error's size, of a constant and of the log of the root mean square motion of the
        vertebra's points that `Refined.misfit` says.
      radius: ratio of radius to size that holds the error of about 95 in 100 cases.
      fitted_for: `method_digest` of the refinement and search whose answers it was fitted to; it does not apply to others.
    """

    chance: tuple[float, ...]
    thresholds: tuple[float, ...]
    size: tuple[float, ...]
    radius: float
    fitted_for: str


@dataclasses.dataclass(frozen=True)
class Confidence:
    """What is known about the error of a pose.

    Attributes:
      chance: that the pose is right, 0 to 1.
      accepted: whether the pose may be used.
      covariance: (6, 6) of the twist about the vertebra's centre in world axes, rad and mm.
      uncertainty_mm: radius that holds the mTRE of about 95 in 100 cases.
      trusted: whether the pose may be used relative to other bones in the same X-rays. It differs from `accepted` where cameras
        are stated to be off by so much that the pose in the world is not known to `metrics.SUCCESS_MM`.
      relative_mm: the radius without what the stated errors of the cameras leave open: what `trusted` is decided by.
    """

    chance: float
    accepted: bool
    covariance: Float[np.ndarray, "6 6"]
    uncertainty_mm: float
    trusted: bool
    relative_mm: float


def method_digest(refine: RefineConfig, search: SearchConfig) -> str:
    """Short digest of the names and values of both configs' fields."""
    plain = [dataclasses.asdict(config) for config in (refine, search)]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def features(refined: Refined) -> Float[np.ndarray, " features"]:
    """FEATURES of a refinement in numpy."""
    return np.array(
        [
            np.mean(refined.support),
            np.min(refined.support),
            np.mean(refined.similarity),
            np.min(refined.similarity),
            np.log(float(refined.step_mm) + STEP_OFFSET_MM),
            min(float(refined.margin), LARGE_MARGIN),
            np.log(float(refined.view_disagreement_mm) + DISAGREEMENT_OFFSET_MM),
            0.5 * np.log(max(float(np.trace(np.asarray(refined.misfit)[3:, 3:])), SMALLEST_MM**2)),
        ]
    )


def spread_mm(covariance: Float[Array, "6 6"], points: Float[Array, "n 3"]) -> float:
    """Root mean square motion, mm, of points under a random twist.

    Args:
      covariance: of the twist, rad and mm; points: mm, about the twist's centre and in its axes.
    """
    x, y, z = np.asarray(points, np.float64).T
    o, one = np.zeros_like(x), np.ones_like(x)
    # Derivative of w x p + t by (w, t).
    rows = [[o, z, -y, one, o, o], [-z, o, x, o, one, o], [y, -x, o, o, o, one]]
    jacobian = np.moveaxis(np.array(rows), -1, 0)
    return float(np.sqrt(np.einsum("nij,jk,nik->", jacobian, covariance, jacobian) / len(x)))


def _size_terms(misfit_mm):
    return np.array([1.0, np.log(max(misfit_mm, SMALLEST_MM))])


def _size_mm(rule, misfit_mm):
    """Size of the error of a pose whose misfit moves the vertebra's points by a root mean square of `misfit_mm`."""
    return float(np.exp(np.clip(np.dot(rule.size, _size_terms(misfit_mm)), -5.0, 5.0)))


def error_per_misfit(rule: AcceptanceRule) -> float:
    """Ratio of an error to its misfit, at a misfit of `TYPICAL_MM`."""
    return _size_mm(rule, TYPICAL_MM) / TYPICAL_MM


def view_angle(camera_from_world: Float[Array, "views 4 4"], point: Float[Array, "3"]) -> float | None:
    """Angle between the views at a world point, mm: of the two rays to it that are nearest to a right angle, radians, 0 to pi / 2.

    Opposite views are of one direction, so their angle is 0 as well. None for a single view.
    """
    rays = np.asarray(point, np.float64) + np.array([E[:3, :3].T @ E[:3, 3] for E in np.asarray(camera_from_world)])
    rays /= np.maximum(np.linalg.norm(rays, axis=1, keepdims=True), 1e-9)
    sines = [np.linalg.norm(np.cross(a, b)) for a, b in itertools.combinations(rays, 2)]
    return float(np.arcsin(min(max(sines), 1.0))) if sines else None


def judge(
    refined: Refined,
    points: Float[Array, "n 3"],
    rule: AcceptanceRule,
    searches: int = 0,
    view_angle_rad: float | None = None,
    camera_error_mm: float = 0.0,
    camera_covariance: Float[Array, "6 6"] | None = None,
) -> Confidence:
    """Judges a refinement in numpy.

    A pose is accepted where its chance reaches the threshold, its radius is at most `metrics.SUCCESS_MM`, and it has at least
    `MIN_VIEWS` views that are at least `MIN_VIEW_ANGLE_RAD` apart and all see it: `LEAST_SUPPORT`.

    Radius and covariance grow with the sine of the angle between the views, since what the model lacks is seen wrong in depth, too:
    the rule was fitted to views about 90 degrees apart.
    A view places the vertebra across its rays, with a standard deviation s, and hardly along them. Two views whose rays are an
    angle a apart then have the information (1 - d d^T + 1 - e e^T) / s^2, and the variances s^2 / 2 across both rays,
    s^2 / (2 sin^2(a/2)) along their bisector and s^2 / (2 cos^2(a/2)) across it: together s^2 (1/2 + 2 / sin^2 a). The error's root
    mean square is sqrt(0.2 + 0.8 / sin^2 a) of that at 90 degrees. 1 / sin a is never below that, and above by 12 % at most. (The
    weakest direction alone grows faster, as 1 / (sqrt 2 sin(a/2)), but the radius is one of the whole error.)

    Args:
      points: of the vertebra's surface, about its centre in world axes, mm; searches: number of wider searches before this pose.
      view_angle_rad: `view_angle` at the vertebra; None, for one view or where it is unknown, changes nothing.
      camera_error_mm: what is known of errors of the cameras, as a distance of the vertebra: it joins the radius as one more
        independent error.
      camera_covariance: what the stated errors of the views leave uncertain of the vertebra's twist, rad and mm, with what pixels
        and views disagree about, so that the radius is rather too large; None for none.
    """
    information, misfit = (np.asarray(m, np.float64) for m in (refined.information, refined.misfit))
    values = features(refined)
    finite = all(np.isfinite(numbers).all() for numbers in (information, misfit, values))
    usable = finite and (np.linalg.eigvalsh(information) > 0).all() and (np.linalg.eigvalsh(misfit) > 0).all()
    if not usable:
        turn, shift_mm = REFUSED_SD
        covariance = np.diag([turn**2] * 3 + [shift_mm**2] * 3)
        return Confidence(0.0, False, covariance, shift_mm, False, shift_mm)
    odds = float(np.dot(rule.chance, [1.0, *values]))
    chance = 1.0 / (1.0 + np.exp(-np.clip(odds, -50.0, 50.0)))
    misfit_mm = spread_mm(misfit, points)
    size = _size_mm(rule, misfit_mm)
    camera_mm = math.hypot(ERROR_PER_DISAGREEMENT * float(refined.view_disagreement_mm), camera_error_mm)
    covariance = misfit * (size / misfit_mm) ** 2
    # Errors of the cameras may shift the pose in any direction. They are added as a variance, so that the radius is always
    # `rule.radius` times the covariance's root mean square.
    covariance[3:, 3:] += np.eye(3) * (camera_mm / rule.radius) ** 2 / 3.0
    growth = 1.0 if view_angle_rad is None else 1.0 / max(math.sin(view_angle_rad), MIN_SINE)
    covariance *= growth**2
    relative_mm = max(MIN_RADIUS_MM, growth * float(np.hypot(rule.radius * size, camera_mm)))
    apart = view_angle_rad is None or view_angle_rad >= MIN_VIEW_ANGLE_RAD
    seen = np.min(refined.support) >= LEAST_SUPPORT
    sure = chance >= rule.thresholds[searches] and relative_mm <= metrics.SUCCESS_MM
    trusted = bool(sure and apart and seen and len(refined.support) >= MIN_VIEWS)
    radius = relative_mm
    if camera_covariance is not None:
        covariance = covariance + camera_covariance
        radius = math.hypot(radius, rule.radius * spread_mm(camera_covariance, points))
    return Confidence(chance, trusted and radius <= metrics.SUCCESS_MM, covariance, radius, trusted, relative_mm)


def _logistic(x, y, ridge=1e-2, steps=100):
    """Weights (K,) of a logistic regression of labels y (N,) on x (N, K), whose first column is constant.

    Args:
      ridge: penalty on the other weights, per case and column. Chosen by hand: it keeps the weights of separable cases finite;
        larger values pull the chances towards the mean.
      steps: number of Newton steps, each of at most 1 in any weight; far more than converge.
    """
    weights = np.zeros(x.shape[1])
    penalty = ridge * len(y) * np.diag([0.0] + [1.0] * (x.shape[1] - 1)) / x.shape[1]
    for _ in range(steps):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ weights, -30, 30)))
        hessian = (x * (p * (1 - p) + 1e-6)[:, None]).T @ x + penalty
        step = np.linalg.solve(hessian, x.T @ (y - p) - penalty @ weights)
        weights = weights + step / max(1.0, np.abs(step).max())
    return weights


def threshold(chance: Float[Array, " n"], right: Bool[Array, " n"]) -> float:
    """The chance from which poses are accepted: above that of every wrong pose, and at least one half.

    Where nearly all right poses have a larger chance, it lies in the middle of that gap, in log odds.
    """
    least = max(0.5, float(np.max(chance[~right], initial=0.0))) + 1e-6
    if not right.any():
        return least
    most = max(least, float(np.quantile(chance[right], NEARLY_NONE)))
    odds = [math.log(p / (1.0 - p)) for p in np.minimum([least, most], 1.0 - 1e-9)]
    return 1.0 / (1.0 + math.exp(-0.5 * sum(odds)))


def fit_rule(
    refined: Sequence[Refined],
    points: Sequence[Float[Array, "_ 3"]],
    error_mm: Sequence[float] | Float[Array, " n"],
    fitted_for: str,
    coverage: float = COVERAGE,
) -> AcceptanceRule:
    """Fits a rule to simulated cases, with the threshold of the first refinement for all searches.

    Args:
      refined: of each case, in numpy; points: of each, as in `judge`; error_mm: mTRE of each.
      fitted_for: `method_digest` of what refined them; coverage: fraction of the right poses whose error the radius holds.
    Raises:
      ValueError: no pose is right, or all are.
    """
    error_mm = np.asarray(error_mm)
    right = error_mm < metrics.SUCCESS_MM
    if right.all() or not right.any():
        raise ValueError(f"calibrate: {right.sum()} of {len(right)} poses are right, wanted some and not all")
    x = np.array([[1.0, *features(r)] for r in refined])
    spread = x[:, 1:].std(0)
    scale = np.array([1.0, *np.where(spread > 1e-9, spread, 1.0)])
    chance = _logistic(x / scale, right.astype(float)) / scale
    odds = x @ chance
    first = threshold(1.0 / (1.0 + np.exp(-odds)), right)
    terms = np.array([_size_terms(spread_mm(np.asarray(r.misfit), p)) for r, p in zip(refined, points)])
    fitted, *_ = np.linalg.lstsq(terms[right], np.log(error_mm[right] + ERROR_OFFSET_MM), rcond=None)
    # No less than the predicted size itself: where the views' disagreement covers every error, the rest of it is 0.
    camera_mm = ERROR_PER_DISAGREEMENT * np.array([r.view_disagreement_mm for r in refined])
    ratio = np.sqrt(np.maximum(error_mm**2 - camera_mm**2, 0.0))[right] / np.exp(terms[right] @ fitted)
    return AcceptanceRule(
        tuple(map(float, chance)),
        (first,) * (1 + SEARCHES),
        tuple(map(float, fitted)),
        max(1.0, float(np.quantile(ratio, coverage))),
        fitted_for,
    )
