"""The C-arm: its angles by convention, and start poses of a wanted error."""

import numpy as np

from data_pipelines.simulation import carm
from radgs_jax import metrics
from radgs_jax.geometry import rigid


def test_carm_angles_are_those_of_the_convention():
    """At 0, 0 the beam runs posteriorly, columns to the patient's left, rows to the feet; at 90 the source is on the left."""
    ap, lateral = carm.extrinsics(0, 0, 700.0), carm.extrinsics(90, 0, 700.0)
    np.testing.assert_allclose(ap[:3, :3], [[-1, 0, 0], [0, 0, -1], [0, -1, 0]], atol=1e-12)
    np.testing.assert_allclose(lateral[:3, :3], [[0, -1, 0], [0, 0, -1], [1, 0, 0]], atol=1e-12)
    tilted = carm.extrinsics(-10.01, 3.507, 700.0)
    np.testing.assert_allclose(tilted[2, :3], [-0.17349, -0.98293, -0.06117], atol=1e-4)
    source = -tilted[:3, :3].T @ tilted[:3, 3]
    np.testing.assert_allclose(np.linalg.norm(source), 700.0)


def test_start_poses_have_the_wanted_mtre():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 3)) * [20, 15, 10] + [-22, -50, -285]
    truth = carm.sample_world_from_ct(rng, points.mean(0))
    for wanted in (0.5, 7.0, 24.0) * 10:
        start = carm.start_of_mtre(rng, truth, points.mean(0), points, wanted)
        assert abs(metrics.mtre(points, start, truth) - wanted) < 0.02
        assert rigid.rotation_angle(start[:3, :3], truth[:3, :3]) < np.radians(25.0) + 1e-5
