"""Registration of a case: a pure function that compiles once, and searches that widen until an answer is trusted."""

import builtins
import dataclasses
import io
import os

import chex
import jax
import numpy as np
import pytest
import tiny_cases

from radgs_jax import levels
from radgs_jax.geometry import rigid_host
from radgs_jax.registration import confidence
from radgs_jax.registration import pipeline
from radgs_jax.registration import search

OPTIONS = pipeline.RegisterOptions(passes=2, reconstruct=True)


@pytest.fixture(scope="module")
def prepared():
    return tiny_cases.tiny_prepared()


def _host(outcome):
    """The numbers of an `Outcome`, in numpy."""
    return jax.device_get([vars(outcome) | {"reconstructed": vars(outcome.reconstructed)}])


def test_register_is_a_function_of_its_arguments(prepared, monkeypatch):
    """Twice the same bits, with the arguments left as they were, and the second time without opening a file."""
    xrays, start = tiny_cases.two_xrays(), tiny_cases.start()
    given = jax.tree.map(np.array, (prepared.parts, prepared.vertebra.cloud, start, [x.line_integrals for x in xrays]))
    first = pipeline.register(prepared, xrays, start, OPTIONS)

    def refuse(*arguments, **options):
        raise AssertionError(f"register opened {arguments[0]}")

    with monkeypatch.context() as patched:
        for place in (builtins, io, os):
            patched.setattr(place, "open", refuse)
        second = pipeline.register(prepared, xrays, start, OPTIONS)
    chex.assert_trees_all_equal(_host(first), _host(second))
    after = prepared.parts, prepared.vertebra.cloud, start, [x.line_integrals for x in xrays]
    chex.assert_trees_all_equal(given, jax.tree.map(np.array, after))
    assert first.trajectory.shape == (1 + OPTIONS.passes + 1, 4, 4)
    np.testing.assert_array_equal(first.trajectory[0], start)


def test_a_second_case_of_the_same_shapes_compiles_nothing(prepared, compilations):
    # Where views differ, as these of noise do by chance, other depths are tried, by a program of their own.
    prepared = dataclasses.replace(prepared, search=search.SearchConfig(uneven=0.0, one_sided=0.0))
    pipeline.register(prepared, tiny_cases.two_xrays(), tiny_cases.start(), OPTIONS)
    compilations.clear()
    start = tiny_cases.start() @ rigid_host.matrix([0.0, 0.0, 0.0], (1.0, 1.0, 1.0))
    pipeline.register(prepared, tiny_cases.two_xrays(seed=1), start, OPTIONS, compile=jax.jit)
    assert not compilations


def test_warm_up_returns_nothing_and_without_a_rule_nothing_is_judged(prepared):
    assert pipeline.warm_up(prepared, tiny_cases.two_xrays(), OPTIONS) is None
    outcome = pipeline.register(prepared, tiny_cases.two_xrays(), tiny_cases.start(), OPTIONS)
    assert np.isfinite(outcome.world_from_ct).all() and outcome.confidence is None


def test_a_search_widens_where_an_answer_is_not_trusted(prepared, monkeypatch):
    """First the start pose, then many starts; six of them are turned against the first answer, and the better answer counts."""
    asked, fits = [], []

    def pose_of(number):
        return rigid_host.matrix([0.1 * number, 0.2, -0.3], (10.0 * number, 2.0, 3.0))

    def refine_pose(programs, parts, seen, starts, config, how, places_mm, found_at, least_fit=-np.inf):
        assert places_mm == levels.neighbours_mm(20) and how == search.SearchConfig()
        asked.append((len(starts), found_at[0].keep))
        if len(asked) > 1:
            turns = np.array([np.linalg.inv(pose_of(0)) @ start for start in starts[:6]])
            np.testing.assert_allclose(turns[:, :3, 3], 0.0, atol=1e-12)
            np.testing.assert_allclose(np.trace(turns[:, :3, :3], axis1=1, axis2=2), 1 + 2 * np.cos(np.radians(15.0)))
            assert len(np.unique(turns.round(6), axis=0)) == 6
        number = len(asked)
        refined = tiny_cases.refined_like(0.5, 0.1, 1.0, number)
        return dataclasses.replace(refined, fit=np.array([fits[number - 1]]), world_from_box=pose_of(number - 1))

    def judge(refined, points, rule, searches, view_angle_rad, camera_error_mm, camera_covariance):
        assert (
            rule is judged_by
            and 1.5 < view_angle_rad <= np.pi / 2
            and camera_error_mm == 0.0
            and camera_covariance is None
        )
        accepted = bool(refined.fit[0] > (0.9, 0.8)[searches])
        return confidence.Confidence(0.5, accepted, np.eye(6), 1.0, accepted, 1.0)

    monkeypatch.setattr(search, "refine_pose", refine_pose)
    monkeypatch.setattr(confidence, "judge", judge)
    fitted_for = confidence.method_digest(prepared.refine, prepared.search)
    judged_by = confidence.AcceptanceRule((0.0,) * 9, (0.5,) * 2, (0.0,) * 2, 2.0, fitted_for)
    ruled = dataclasses.replace(prepared, rule=judged_by)
    body = tiny_cases.two_xrays()
    for given, stages, best, accepted in (
        ((0.95,), 1, 1, True),
        ((0.2, 0.95), 2, 2, True),
        ((0.85, 0.2), 2, 1, True),
        ((0.5, 0.6), 2, 2, False),
    ):
        asked.clear()
        fits[:] = given
        refined, judged = pipeline.refine_until_trusted(ruled, body, np.eye(4))
        assert asked == [(1, 1), (search.SearchConfig().starts, search.SearchConfig().contenders)][:stages]
        np.testing.assert_array_equal(refined.world_from_box, pose_of(best - 1))
        assert judged.accepted == accepted
    for given, stages in (((1.5,), 1), ((0.1, 0.2), 2)):  # without a rule, an answer that fits is taken
        asked.clear()
        fits[:] = given
        assert pipeline.refine_until_trusted(prepared, body, np.eye(4))[1] is None and len(asked) == stages


def test_cameras_that_are_off_are_corrected_and_their_error_joins_the_radius(prepared, monkeypatch):
    """Both answers are there; the pose, the crops and the verdict are of the corrected cameras."""
    given, xrays = [], tiny_cases.two_xrays()

    def judge(refined, points, rule, searches, view_angle_rad, camera_error_mm, camera_covariance):
        given.append(camera_covariance)
        return confidence.Confidence(0.9, True, np.eye(6), 1.0, True, 1.0)

    monkeypatch.setattr(confidence, "judge", judge)
    digest = confidence.method_digest(prepared.refine, prepared.search)
    rule = confidence.AcceptanceRule((0.0,) * 9, (0.5,) * 2, (0.0,) * 2, 2.0, digest)
    ruled = dataclasses.replace(prepared, rule=rule)
    off = dataclasses.replace(OPTIONS, camera_sd=(0.005, 1.0))
    outcome = pipeline.register(ruled, xrays, tiny_cases.start(), off, compile=jax.jit)
    assert outcome.together.motions.shape == (2, 4, 4) and outcome.as_calibrated.shape == (4, 4)
    for xray, motion, used in zip(xrays, outcome.together.motions, outcome.camera_from_world):
        np.testing.assert_allclose(used, xray.camera.camera_from_world @ motion)
    assert given and all(np.linalg.eigvalsh(c).min() > 0 for c in given)
    assert all(np.sqrt(np.trace(c[3:, 3:])) > 0.4 for c in given)
    assert pipeline.register(ruled, xrays, tiny_cases.start(), OPTIONS).together is None
