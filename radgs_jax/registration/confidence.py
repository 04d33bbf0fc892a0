"""How far to trust a refined pose: the chance that it is right, its covariance, and a radius that holds its error.

Three calibrated maps of what a refinement says of itself: a logistic model for the chance of an mTRE below 2 mm, a log-linear
one for the size of the error where it is right, and one factor for the radius. `experiments.calibrate` fits them on simulated
patients.
"""

import dataclasses
import hashlib
import json

import numpy as np

from radgs_jax import metrics

FLOOR_MM = 0.02
"""Least radius: float32 and the samples along a ray are no finer."""
VIEWS = 2
"""Fewest views of a pose that may be accepted: one shows depth by its magnification alone, and a misfit of that it hides."""
SEARCHES = 2
"""Wider searches that may follow a refinement; poses that have come through one are other than those that needed none."""
FEATURES = ("support", "least_support", "similarity", "least_similarity", "log_step", "margin", "log_apart")
APART_FACTOR = 4.0
"""Error of a pose over how far its views are apart, about the median where cameras are not quite where they are said to be."""


@dataclasses.dataclass(frozen=True)
class AcceptanceRule:
    """chance: weights of a constant and of FEATURES in the log odds of a right pose; thresholds (1 + SEARCHES,): chance from which
    it is accepted at once and after each search.

    size: weights of a constant, the log of the predicted error, the support, the log step and the log of how far the views are
    apart in the log of the error;
    radius: how many times that size holds the error in 95 of 100 cases;
    fitted_for: `method_digest` of the refinement and search whose answers it was fitted to. It says nothing of another's.
    """

    chance: tuple
    thresholds: tuple
    size: tuple
    radius: float
    fitted_for: str


@dataclasses.dataclass(frozen=True)
class Confidence:
    """chance of a right pose; accepted; covariance (6, 6) of the twist about the vertebra's centre in world axes, rad and mm;
    uncertainty_mm: radius that holds the mTRE in 95 of 100 cases."""

    chance: float
    accepted: bool
    covariance: np.ndarray
    uncertainty_mm: float


def method_digest(refine, search):
    """Short digest of how poses are refined and searched for, as frozen dataclasses of plain values."""
    plain = [dataclasses.asdict(config) for config in (refine, search)]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def features(refined):
    """FEATURES (7,) of a `gauss_newton.Refined` in numpy: correlations, last step, margin over the rival, views' disagreement."""
    return np.array(
        [
            np.mean(refined.support),
            np.min(refined.support),
            np.mean(refined.similarity),
            np.min(refined.similarity),
            np.log(float(refined.step_mm) + 1e-3),
            min(float(refined.margin), 0.5),
            np.log(float(refined.apart_mm) + 1e-2),
        ]
    )


def spread_mm(information, points):
    """Root mean square motion, mm, of points (N, 3) about the vertebra's centre in world axes, for a twist of `information`^-1.

    Args:
      information: (6, 6), positive definite.
    """
    covariance = np.linalg.inv(information)
    x, y, z = np.asarray(points, np.float64).T
    o, one = np.zeros_like(x), np.ones_like(x)
    # d (w x p + t) / d (w, t)
    rows = [[o, z, -y, one, o, o], [-z, o, x, o, one, o], [y, -x, o, o, o, one]]
    jacobian = np.moveaxis(np.array(rows), -1, 0)
    return float(np.sqrt(np.einsum("nij,jk,nik->", jacobian, covariance, jacobian) / len(x)))


def _size_terms(refined, predicted_mm):
    values = dict(zip(FEATURES, features(refined)))
    return np.array([1.0, np.log(predicted_mm), *(values[name] for name in ("support", "log_step", "log_apart"))])


def judge(refined, points, rule, searches=0):
    """`Confidence` in a `gauss_newton.Refined`, of numpy arrays; a pose whose radius is beyond a right one's error is not accepted.

    Args:
      points: (N, 3) of the vertebra, about its centre in world axes, mm; rule: `AcceptanceRule`; searches: that it has come
        through.
    """
    information = np.asarray(refined.information, np.float64)
    values = features(refined)
    usable = (
        np.isfinite(information).all() and np.isfinite(values).all() and (np.linalg.eigvalsh(information) > 0).all()
    )
    if not usable:
        large = np.diag([(np.pi / 2) ** 2] * 3 + [100.0**2] * 3)
        return Confidence(0.0, False, large, 100.0)
    odds = float(np.dot(rule.chance, [1.0, *values]))
    chance = 1.0 / (1.0 + np.exp(-np.clip(odds, -50.0, 50.0)))
    predicted = spread_mm(information, points)
    size = float(np.exp(np.clip(np.dot(rule.size, _size_terms(refined, predicted)), -5.0, 5.0)))
    apart_mm = APART_FACTOR * float(refined.apart_mm)
    covariance = np.linalg.inv(information) * (size / predicted) ** 2
    # What views disagree by, their cameras may be off by in any direction. As a variance, so that the radius is the same
    # multiple of the covariance's root mean square, `rule.radius`, however far apart they are.
    covariance[3:, 3:] += np.eye(3) * (apart_mm / rule.radius) ** 2 / 3.0
    radius = max(FLOOR_MM, float(np.hypot(rule.radius * size, apart_mm)))
    sure = chance >= rule.thresholds[searches] and radius <= metrics.SUCCESS_MM
    accepted = sure and len(refined.support) >= VIEWS
    return Confidence(chance, bool(accepted), covariance, radius)


def _logistic(x, y, ridge=1e-2, steps=100):
    """Weights of a ridge logistic regression of labels y (N,) on x (N, K), the first column constant and free of the ridge."""
    weights = np.zeros(x.shape[1])
    penalty = ridge * len(y) * np.diag([0.0] + [1.0] * (x.shape[1] - 1)) / x.shape[1]
    for _ in range(steps):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ weights, -30, 30)))
        hessian = (x * (p * (1 - p) + 1e-6)[:, None]).T @ x + penalty
        step = np.linalg.solve(hessian, x.T @ (y - p) - penalty @ weights)
        weights = weights + step / max(1.0, np.abs(step).max())
    return weights


def threshold(chance, right):
    """The chance (N,) of the surest pose that is not `right` (N,), and a trifle; no less than even odds."""
    return max(0.5, float(np.max(chance[~right], initial=0.0))) + 1e-6


def fit_rule(refined, points, error_mm, fitted_for, coverage=0.965):
    """The `AcceptanceRule` of simulated cases, with the threshold of poses that have come through no search for each of them.

    Args:
      refined: N `gauss_newton.Refined` in numpy; points: N arrays as in `judge`; error_mm: (N,) mTRE.
      fitted_for: `method_digest` of what refined them; coverage: share of the right poses whose error the radius holds.
    Raises:
      ValueError: no right pose or no wrong one among them.
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
    terms = np.array([_size_terms(r, spread_mm(r.information, p)) for r, p in zip(refined, points)])
    fitted, *_ = np.linalg.lstsq(terms[right], np.log(error_mm[right] + 1e-3), rcond=None)
    apart = APART_FACTOR * np.array([r.apart_mm for r in refined])
    ratio = np.sqrt(np.maximum(error_mm**2 - apart**2, 0.0))[right] / np.exp(terms[right] @ fitted)
    return AcceptanceRule(
        tuple(map(float, chance)),
        (first,) * (1 + SEARCHES),
        tuple(map(float, fitted)),
        float(np.quantile(ratio, coverage)),
        fitted_for,
    )
