"""Scores of a trained patient: tables, a study that continues, cases that cannot be scored."""

import pathlib

import numpy as np
import pytest

from data_pipelines import cases
from experiments import configs
from experiments.reports import statistics
from experiments.reports import tables
from experiments.scoring import conditions
from experiments.scoring import evaluate
from radgs_jax import errors
from radgs_jax.geometry import rigid_host

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def test_a_case_file_without_points_is_refused_before_it_is_scored(trained):
    case_file = cases.read(trained[0] / "eval" / "cases.json")
    name, volume = next(iter(case_file.raw["volumes"].items()))
    del volume["points"]
    with pytest.raises(errors.InputError, match=f"cases.json: volumes.{name}.points: found None, wanted a list"):
        evaluate.evaluate(case_file, "real", trained[0] / "p3", 1)


def test_a_study_goes_on_from_what_it_has_registered(trained, tmp_path, first_case):
    _, _, _, target = first_case
    patient = conditions.Patient(target.ct, target.mask, [21], trained[0] / "p3")
    condition = conditions.Condition("cameras", "off", "real", shift_mm=1.0, mask="dilated 1 mm", every_start=True)
    rows = conditions.register_condition(patient, condition, 1, 3, tmp_path, 2)
    assert [5 * i <= row["start_mm"] < 5 * (i + 1) for i, row in enumerate(rows)] == [True] * 5
    assert all(np.isfinite(row["error_mm"]) and row["accepted"] is None for row in rows)
    lines = statistics.by_start(rows, configs.STARTS_MM)
    assert len(lines) == 7 and lines[-1].startswith("1 scenes; 95 % interval of the median")
    patient.with_mask = None  # nothing is registered again
    assert conditions.register_condition(patient, condition, 1, 3, tmp_path, 2) == rows


def test_chi_square_of_errors_drawn_from_a_covariance_is_six_on_average():
    rng = np.random.default_rng(4)
    factor = rng.normal(size=(6, 6)) * np.repeat([0.01, 1.0], 3)[:, None]
    covariance, centre = factor @ factor.T, np.array([20.0, -35.0, 410.0])
    truth = rigid_host.motion_about([1.0, 2.0, 3.0], np.array([0.4, -0.8, 0.3, 30.0, -10.0, 50.0]))
    place = truth[:3, :3] @ centre + truth[:3, 3]
    poses = [rigid_host.motion_about(place, factor @ rng.normal(size=6)) @ truth for _ in range(2000)]
    found = [conditions.chi_square(covariance, pose, truth, centre) for pose in poses]
    assert abs(np.mean(found) / statistics.FREEDOM - 1.0) < 0.05
    rows = [
        {"error_mm": 1.0, "uncertainty_mm": 2.0, "accepted": True, "network_mm": 1.0, "chi_square": c} for c in found
    ]
    assert float(statistics.line("drawn", rows).split()[-1]) == round(np.mean(found) / 6.0, 2)


def test_table_bins_and_baselines():
    scores = {"start_mm": np.array([1.0, 7.0, 8.0]), "error_mm": np.array([0.5, 1.0, 3.0]), "volumes": {}}
    text = tables.score_table(scores, "real")
    assert "0-5" in text and "5-10" in text and "capture range: 5 mm" in text and "50.0 %" in text
