"""Acceptance and uncertainty of refined poses."""

import dataclasses

import numpy as np
import pytest
from tiny_cases import refined_like

from radgs_jax.registration import confidence


def test_a_fitted_rule_refuses_wrong_poses_and_covers_right_ones():
    """On cases drawn like those that it was fitted to."""
    rng = np.random.default_rng(3)
    points = rng.normal(size=(200, 3)) * [20, 15, 12]

    def cases(count, seed):
        rng, found, errors = np.random.default_rng(seed), [], []
        for i in range(count):
            right, scale = rng.uniform() < 0.7, np.exp(rng.normal() * 0.5)
            found.append(
                refined_like(rng.normal(0.8 if right else 0.4, 0.06), 0.05 if right else 0.4, scale, seed * 1000 + i)
            )
            predicted = confidence.spread_mm(found[-1].misfit, points)
            errors.append(min(1.9, 0.2 * predicted * np.exp(0.3 * rng.normal())) if right else rng.uniform(3, 20))
        return found, np.array(errors)

    found, errors = cases(300, 1)
    rule = confidence.fit_rule(found, [points] * 300, errors, "a method")
    fresh, truth = cases(300, 2)
    judged = [confidence.judge(r, points, rule) for r in fresh]
    accepted, radius = np.array([j.accepted for j in judged]), np.array([j.uncertainty_mm for j in judged])
    right = truth < 2
    assert (accepted & ~right).sum() <= 1 and (~accepted & right).mean() < 0.05
    assert 0.9 < (truth[right] <= radius[right]).mean() <= 1.0 and np.median(radius[right]) < 3 * np.median(
        truth[right]
    )
    assert all(np.linalg.eigvalsh(j.covariance).min() > 0 for j in judged)


def test_an_unusable_refinement_is_refused():
    rule = confidence.AcceptanceRule((0.0,) * 9, (0.6, 0.4), (0.0, 1.0), 2.0, "")
    points = np.random.default_rng(0).normal(size=(50, 3)) * 10
    good = refined_like(0.9, 0.01, 0.3, 0)
    assert confidence.judge(good, points, rule, 1).accepted
    assert not confidence.judge(good, points, rule).accepted
    for spoilt in (np.full((6, 6), np.nan), np.zeros((6, 6)), -np.eye(6)):
        for field in ("information", "misfit"):
            judged = confidence.judge(dataclasses.replace(good, **{field: spoilt}), points, rule, 1)
            assert not judged.accepted and not judged.trusted and judged.uncertainty_mm >= 100
    divided = dataclasses.replace(good, view_disagreement_mm=np.float32(1.0))
    judged = confidence.judge(divided, points, rule, 1)
    assert not judged.accepted and judged.uncertainty_mm >= 2.0
    alone = dataclasses.replace(good, support=good.support[:1], similarity=good.similarity[:1])
    assert not confidence.judge(alone, points, rule, 1).accepted


def test_spread_is_the_motion_of_points():
    """Against twists drawn from the covariance."""
    rng = np.random.default_rng(0)
    covariance = np.diag(np.array([0.02, 0.01, 0.03, 0.5, 0.2, 0.9]) ** 2)
    points = rng.normal(size=(100, 3)) * [20, 10, 5] + [3, -4, 2]
    twists = rng.multivariate_normal(np.zeros(6), covariance, 20000)
    motions = np.cross(twists[:, None, :3], points[None]) + twists[:, None, 3:]
    wanted = np.sqrt((motions**2).sum(-1).mean())
    assert abs(confidence.spread_mm(covariance, points) / wanted - 1) < 0.02


@pytest.mark.parametrize("disagreement_mm", [0.0, 0.05, 0.4, 1.0])
def test_the_radius_is_a_multiple_of_the_covariance(disagreement_mm):
    """However much the views disagree, the radius is the same multiple of the covariance's root mean square."""
    rule = confidence.AcceptanceRule((0.0,) * 9, (0.6, 0.4), (0.0, 1.0), 2.0, "")
    points = np.random.default_rng(0).normal(size=(50, 3)) * [10, 8, 12] + [2, 0, -1]
    refined = dataclasses.replace(refined_like(0.9, 0.01, 0.3, 0), view_disagreement_mm=np.float32(disagreement_mm))
    judged = confidence.judge(refined, points, rule)
    rms = confidence.spread_mm(judged.covariance, points)
    assert judged.uncertainty_mm == pytest.approx(2.0 * rms, rel=1e-6)


def test_a_rule_fitted_where_disagreement_covers_every_error_can_judge():
    """A handful of cases, views that disagree by more than the poses are wrong: the radius still is one size or more."""
    points = np.random.default_rng(0).normal(size=(50, 3)) * [20, 15, 12]
    found = [refined_like(0.8 if i % 3 else 0.4, 0.05, 1.0, i) for i in range(9)]
    found = [dataclasses.replace(r, view_disagreement_mm=np.float32(0.5)) for r in found]
    errors = [0.1 if i % 3 else 9.0 for i in range(9)]
    rule = confidence.fit_rule(found, [points] * 9, errors, "a method")
    judged = confidence.judge(found[1], points, rule)
    assert rule.radius >= 1.0 and judged.uncertainty_mm >= 2.0 and np.isfinite(judged.covariance).all()


def _judged(refined, **known):
    rule = confidence.AcceptanceRule((0.0,) * 9, (0.4, 0.4), (0.0, 1.0), 2.0, "")
    points = np.random.default_rng(0).normal(size=(50, 3)) * [10, 8, 12]
    return confidence.judge(refined, points, rule, **known)


def test_a_view_that_does_not_see_the_vertebra_is_never_outvoted():
    good = refined_like(0.9, 0.01, 0.02, 0)
    assert _judged(good).accepted
    assert not _judged(dataclasses.replace(good, support=np.array([0.99, 0.1]))).trusted


def test_views_less_than_20_degrees_apart_are_never_accepted():
    good = refined_like(0.9, 0.01, 0.02, 0)
    for degrees, accepted in ((0.0, False), (5.0, False), (19.9, False), (20.1, True), (60.0, True), (90.0, True)):
        judged = _judged(good, view_angle_rad=np.radians(degrees))
        assert (
            judged.accepted == accepted and np.isfinite(judged.covariance).all() and np.isfinite(judged.uncertainty_mm)
        )


@pytest.mark.parametrize("degrees", [1.0, 15.0, 30.0, 45.0, 70.0, 90.0])
def test_radius_and_covariance_grow_as_the_angle_between_views_shrinks(degrees):
    """By 1 / sin, however much the views disagree; unchanged at a right angle and where the angle is unknown."""
    for disagreement_mm in (0.0, 0.1):
        refined = refined_like(0.9, 0.01, 0.1, 0)
        refined = dataclasses.replace(refined, view_disagreement_mm=np.float32(disagreement_mm))
        plain, judged = _judged(refined), _judged(refined, view_angle_rad=np.radians(degrees))
        growth = 1.0 / np.sin(np.radians(degrees))
        assert judged.uncertainty_mm == pytest.approx(growth * plain.uncertainty_mm, rel=1e-9)
        np.testing.assert_allclose(judged.covariance, growth**2 * plain.covariance, rtol=1e-9)
        assert judged.chance == plain.chance


@pytest.mark.parametrize("degrees", [2.0, 10.0, 25.0, 45.0, 80.0])
def test_the_growth_holds_the_error_of_two_views(degrees):
    """Of points that two views place, each across its rays: 1 / sin is the growth of their error or more, by 12 % at most."""

    def error(angle):
        rays = [np.array([np.cos(a), np.sin(a), 0.0]) for a in (0.0, angle)]
        return np.sqrt(np.trace(np.linalg.inv(sum(np.eye(3) - np.outer(d, d) for d in rays))))

    growth = error(np.radians(degrees)) / error(np.pi / 2)
    assert growth <= 1 / np.sin(np.radians(degrees)) <= 1.12 * growth


def test_known_camera_errors_join_the_radius():
    """As one more independent error: the radius is never below it, and stays the same multiple of the covariance."""
    refined = refined_like(0.9, 0.01, 0.1, 0)
    plain, judged = _judged(refined), _judged(refined, camera_error_mm=0.32)
    assert judged.uncertainty_mm == pytest.approx(np.hypot(plain.uncertainty_mm, 0.32))
    points = np.random.default_rng(0).normal(size=(50, 3)) * [10, 8, 12]
    rms = confidence.spread_mm(judged.covariance, points)
    assert judged.uncertainty_mm == pytest.approx(2.0 * rms, rel=1e-6)


def test_a_pose_that_cameras_leave_open_is_trusted_relative_to_other_bones_and_not_accepted():
    refined = refined_like(0.9, 0.01, 0.02, 0)
    left_open = np.diag([1e-4] * 3 + [4.0] * 3)
    plain, judged = _judged(refined), _judged(refined, camera_covariance=left_open)
    assert plain.accepted and plain.trusted and plain.relative_mm == plain.uncertainty_mm
    assert judged.trusted and not judged.accepted
    assert judged.relative_mm == plain.relative_mm and judged.uncertainty_mm > 2.0 * np.sqrt(12.0)
    np.testing.assert_allclose(judged.covariance, plain.covariance + left_open)
    slight = _judged(refined, camera_covariance=1e-4 * left_open)
    assert slight.accepted and slight.uncertainty_mm > plain.uncertainty_mm


def test_the_radius_follows_what_pixels_disagree_about():
    """Not what independent noise would leave: the misfit alone is made four times as large."""
    refined = refined_like(0.9, 0.01, 0.05, 0)
    plain = _judged(refined)
    larger = _judged(dataclasses.replace(refined, misfit=16.0 * refined.misfit))
    surer = _judged(dataclasses.replace(refined, information=16.0 * refined.information))
    assert larger.relative_mm == pytest.approx(np.hypot(4.0 * np.sqrt(plain.relative_mm**2 - 0.04**2), 0.04), rel=1e-6)
    assert surer.relative_mm == plain.relative_mm


def test_the_threshold_is_above_every_wrong_pose_and_in_the_middle_of_a_gap():
    logistic = lambda odds: 1.0 / (1.0 + np.exp(-np.asarray(odds, float)))
    odds = np.array([-3.0, 1.0, 5.0, 5.0, 6.0, 7.0])
    right = np.array([False, False, True, True, True, True])
    assert confidence.threshold(logistic(odds), right) == pytest.approx(float(logistic(3.0)), rel=1e-4)
    # One wrong pose among the right ones: just above it.
    found = confidence.threshold(logistic([5.5, *odds]), np.array([False, *right]))
    assert float(logistic(5.5)) < found < float(logistic(5.51))
    # Nothing wrong above one half, and nothing right at all.
    assert confidence.threshold(logistic([-9.0, 0.1, 0.1]), np.array([False, True, True])) >= 0.5
    assert confidence.threshold(logistic([2.0]), np.array([False])) > float(logistic(2.0))
