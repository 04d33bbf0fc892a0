"""The study's arithmetic: intervals, and masks and cameras that are wrong by a known amount."""

import dataclasses
import types

import numpy as np
import pytest

from data_pipelines.ct import scans
from data_pipelines.simulation import carm
from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick
from experiments.reports import statistics
from experiments.runtime import cli
from experiments.scoring import conditions
from radgs_jax import errors
from radgs_jax.geometry import rigid_host


def test_intervals_of_shares_and_of_medians():
    low, high = statistics.wilson(40, 40)
    np.testing.assert_allclose((low, high), (0.9124, 1.0), atol=1e-4)  # z^2 / (n + z^2) from below
    np.testing.assert_allclose(statistics.wilson(5, 10), (0.2366, 0.7634), atol=1e-4)
    rng = np.random.default_rng(0)
    level = rng.uniform(0.5, 1.5, 30)
    rows = [{"scene": s, "error_mm": level[s] + 0.01 * k} for s in range(30) for k in range(5)]
    low, high = statistics.median_interval(rows)
    assert low < np.median([r["error_mm"] for r in rows]) < high
    # Starts of one scene are not independent: the interval is that of 30 numbers.
    assert high - low > 0.15


def test_masks_that_are_wrong_by_a_known_distance():
    """A ball of 9 mm in voxels of 1 x 1.5 x 2 mm, next to a neighbour that must keep its mask."""
    spacing = np.array([1.0, 1.5, 2.0])
    place = np.stack(np.meshgrid(*[np.arange(n) * s for n, s in zip((40, 28, 24), spacing)], indexing="ij"), -1)
    radius = np.linalg.norm(place - [18.0, 19.0, 22.0], axis=-1)
    labels = np.where(radius < 9.0, 20, 0)
    labels[:, :, 18:] = 21
    affine = np.diag([*spacing, 1.0])
    scan = scans.Scan("x", np.zeros(labels.shape, np.float32), labels, affine)
    assert conditions.scan_with_mask(scan, 20, "as it is") is scan
    size = lambda s: (s.labels == 20).sum() * spacing.prod()
    for kind, wanted in (("eroded 1 mm", 8.0), ("dilated 1 mm", 10.0), ("dilated 2 mm", 11.0)):
        changed = conditions.scan_with_mask(scan, 20, kind)
        assert abs((size(changed) / size(scan)) ** (1 / 3) * 9.0 - wanted) < 0.6
        np.testing.assert_array_equal(changed.labels == 21, labels == 21)
    coarse = conditions.scan_with_mask(scan, 20, "spacing 3 mm").labels == 20
    assert 0.8 < coarse.sum() / (labels == 20).sum() < 1.2 and (coarse != (labels == 20)).sum() > 50


def test_cameras_are_off_by_the_given_amount():
    for shift, turn in ((2.0, 0.0), (0.0, 0.5)):
        moved = carm.cameras_off([np.eye(4)] * 3, shift, turn, np.random.default_rng(1))
        for one in moved:
            R = one[:3, :3]
            angle = np.degrees(np.arccos(np.clip((np.trace(R) - 1) / 2, -1, 1)))
            np.testing.assert_allclose(np.linalg.norm(one[:3, 3]), shift, atol=1e-9)
            np.testing.assert_allclose(angle, turn, atol=1e-5)
        assert not np.allclose(moved[0], moved[1])


def test_every_sweep_has_a_point_that_is_as_usual():
    by_group = {}
    for condition in conditions.sweeps():
        by_group.setdefault(condition.group, []).append(condition)
    usual = conditions.Condition("", "")
    for group in ("articulation", "photons a pixel", "detector strength", "cameras off, mm", "mask", "views"):
        same = [dataclasses.replace(c, group="", name="", variant="artic") == usual for c in by_group[group]]
        assert sum(same) == 1, group


def test_a_guess_without_a_start_pose_is_off_by_no_more_than_is_said():
    truth = rigid_host.matrix(np.array([0.2, -0.3, 0.1]), [5.0, -20.0, 40.0])
    centre, off = np.array([10.0, -60.0, 300.0]), []
    for number in range(200):
        motion = conditions.lost_guess(truth, centre, [5, number]) @ np.linalg.inv(truth)
        place = (truth @ [*centre, 1.0])[:3]
        twist = rigid_host.twist_about(place, motion)
        off.append([np.linalg.norm(twist[3:]), np.degrees(np.linalg.norm(twist[:3]))])
    most = np.max(off, axis=0)
    assert (most <= conditions.LOST).all() and (most > 0.9 * np.array(conditions.LOST)).all()


def test_bad_bins_are_refused():
    assert cli.bins("--starts_mm", ["0", "5", "25"]) == [(0.0, 5.0), (5.0, 25.0)]
    for edges in (["5"], ["0", "x"], ["5", "5"], ["-1", "2"]):
        with pytest.raises(errors.InputError, match="--starts_mm: found .*, wanted ascending numbers"):
            cli.bins("--starts_mm", edges)
    with pytest.raises(ValueError, match="posture: found 'odd', wanted one of rigid, bent"):
        case_files.simulated_cases("x", [], (), 1, (), 0, quick.PanelFaults(), posture="odd")
    with pytest.raises(ValueError, match="variants: found 'easy', wanted some of artic, real"):
        case_files.simulated_cases("x", [], (), 1, (), 0, quick.PanelFaults(), ("easy",), posture="bent")


def test_scenes_of_fewer_vertebrae_are_other_scenes(monkeypatch, tmp_path):
    """For example where only the first vertebra was prepared anew: cases of another one could not be registered."""
    made = []
    monkeypatch.setattr(conditions.case_files, "simulated_cases", lambda path, *rest, **options: made.append(path))
    monkeypatch.setattr(conditions.cases, "read", lambda path: None)
    for labels in ([20, 19], [20], [20, 19]):
        patient = types.SimpleNamespace(labels=labels, subject=None)
        conditions.scenes_of(patient, conditions.Condition("", ""), 2, 5, tmp_path)
    assert made[0] == made[2] != made[1]
