"""Postures: rigid and bounded motions, a smooth field that agrees with them and does not fold, and a warp that follows it."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_pipelines.simulation import posture
from radgs_jax.geometry import rigid_host

BEND_DEG, JITTER_DEG, JITTER_MM = (2.5, 2.0, 1.5), 4.0, 2.0


@pytest.fixture(scope="module")
def spine():
    """Twelve vertebrae on a curve, from head to feet, each with its own axes."""
    levels = np.arange(12)
    frames = np.tile(np.eye(4), (12, 1, 1))
    for k, frame in zip(levels, frames):
        frame[:3, :3] = rigid_host.matrix([0.03 * (k - 6), 0.02 * k, -0.05], 0)[:3, :3]
        frame[:3, 3] = [-22 + 0.3 * k**1.5, -50 - 0.4 * (k - 6) ** 2, -285 - 26.0 * k]
    return posture.Spine(tuple(range(9, 21)), frames)


@pytest.fixture(scope="module")
def grid(spine):
    """An oblique grid with three spacings that holds the spine, and its shape."""
    affine = rigid_host.matrix([0.04, -0.03, 0.06], 0) @ np.diag([5.0, 6.0, 4.0, 1.0])
    shape = np.array([48, 40, 90])
    affine[:3, 3] = spine.centres.mean(0) - affine[:3, :3] @ (0.5 * (shape - 1))
    return affine, tuple(int(n) for n in shape)


def _draw(spine, seed=0, anchor=5, jitter=(JITTER_DEG, JITTER_MM), bend=BEND_DEG):
    return posture.draw_posture(np.random.default_rng(seed), spine, anchor, bend, *jitter)


def test_a_posture_repeats_by_seed_and_keeps_its_anchor(spine):
    one, again, other = _draw(spine), _draw(spine), _draw(spine, 1)
    np.testing.assert_array_equal(one.own, again.own)
    assert np.abs(one.own - other.own).max() > 0.01
    np.testing.assert_allclose(one.smooth[5], np.eye(4), atol=1e-12)
    for motions in (one.smooth, one.own):
        R = motions[:, :3, :3]
        np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.tile(np.eye(3), (12, 1, 1)), atol=1e-12)


def test_bends_and_jitters_stay_in_their_bounds_and_use_them(spine):
    largest_bend, jitters = 0.0, []
    for seed in range(40):
        pose = _draw(spine, seed)
        turn = np.einsum("kji,kjl->kil", pose.smooth[:-1, :3, :3], pose.smooth[1:, :3, :3])
        angle = np.degrees(Rotation.from_matrix(turn).magnitude())
        largest_bend = max(largest_bend, angle.max())
        own = np.linalg.inv(pose.smooth) @ pose.own
        moved = np.einsum("kij,kj->ki", own[:, :3, :3], spine.centres) + own[:, :3, 3] - spine.centres
        vectors = np.degrees(Rotation.from_matrix(own[:, :3, :3]).as_rotvec())
        jitters.append(np.concatenate([vectors / JITTER_DEG, moved / JITTER_MM], 1))
        # The point midway between neighbours belongs to both, since they turn about it.
        middle = 0.5 * (spine.centres[:-1] + spine.centres[1:])
        gap = np.einsum("kij,kj->ki", pose.smooth[1:, :3, :3] - pose.smooth[:-1, :3, :3], middle)
        np.testing.assert_allclose(gap + pose.smooth[1:, :3, 3] - pose.smooth[:-1, :3, 3], 0.0, atol=1e-9)
    assert 2.0 < largest_bend <= np.linalg.norm(BEND_DEG)
    jitters = np.abs(np.concatenate(jitters))
    assert (jitters <= 1 + 1e-9).all() and (jitters.max(0) > 0.95).all()


def test_no_vertebra_can_be_read_off_its_neighbours(spine):
    """A motion relative to the neighbours' mean varies as much as the vertebra's own jitter does."""
    relative = []
    for seed in range(200):
        pose = _draw(spine, seed)
        seen = np.linalg.inv(pose.smooth) @ pose.own
        shift = np.einsum("kij,kj->ki", seen[:, :3, :3], spine.centres) + seen[:, :3, 3] - spine.centres
        relative.append(shift[5] - 0.5 * (shift[4] + shift[6]))
    assert (np.std(relative, 0) > JITTER_MM / np.sqrt(3)).all()


def test_tissue_moves_with_the_vertebrae_and_does_not_fold(spine, grid):
    affine, shape = grid
    index_from_ct = np.linalg.inv(affine)
    for seed in range(10):
        pose = _draw(spine, seed)
        matrices = posture.pull_back(spine, pose.smooth, affine, 0, shape[2])
        rest = spine.centres @ index_from_ct[:3, :3].T + index_from_ct[:3, 3]
        posed_ct = np.einsum("kij,kj->ki", pose.smooth[:, :3, :3], spine.centres) + pose.smooth[:, :3, 3]
        posed = posed_ct @ index_from_ct[:3, :3].T + index_from_ct[:3, 3]
        for k in range(1, 11):
            low = int(posed[k, 2])
            places = [matrices[n] @ [posed[k, 0], posed[k, 1], 1.0] for n in (low, low + 1)]
            part = posed[k, 2] - low
            found = (1 - part) * places[0] + part * places[1]
            assert np.abs((found - rest[k]) * [5, 6, 4]).max() < 0.1
        i, j = np.meshgrid([0, shape[0] - 1], [0, shape[1] - 1])
        corners = np.einsum("nab,bp->npa", matrices, np.stack([i.ravel(), j.ravel(), np.ones(4)]))
        assert (np.diff(corners[..., 2], axis=0) > 0.3).all()


def test_warp_samples_where_the_field_points(spine, grid):
    affine, shape = grid
    pose = _draw(spine, 3)
    first, count, margin = 20, 40, 3
    matrices = posture.pull_back(spine, pose.smooth, affine, first, count)

    def smooth_function(x, y, z):
        return 2.0 + 0.3 * x - 0.2 * y + 0.05 * z + 0.01 * x * y

    volume = smooth_function(*np.indices(shape, dtype=np.float64)).astype(np.float32)
    size = (shape[0] + 2 * margin, shape[1] + 2 * margin)
    twice, once = posture.warp((jnp.asarray(2 * volume), jnp.asarray(volume)), jnp.asarray(matrices), size, margin)
    i, j, _ = np.indices((*size, count)) - margin
    places = np.einsum("nab,bijn->aijn", matrices, np.stack([i, j, np.ones_like(i)]))
    inside = np.all([(p >= 0) & (p <= m - 1) for p, m in zip(places, shape)], 0)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(np.asarray(once)[inside], smooth_function(*places)[inside], atol=2e-3)
    np.testing.assert_allclose(twice, 2 * np.asarray(once), rtol=1e-5)


def test_one_vertebra_moves_all_tissue_rigidly(grid):
    affine, shape = grid
    frame = np.eye(4)
    frame[:3, 3] = [-20, -60, -300]
    alone = posture.Spine((20,), frame[None])
    motion = rigid_host.motion_about(frame[:3, 3], np.array([0.1, -0.05, 0.08, 4, -3, 2]))
    matrices = posture.pull_back(alone, motion[None], affine, 0, shape[2])
    expected = np.linalg.inv(affine) @ np.linalg.inv(motion) @ affine @ [7, 9, 11, 1]
    np.testing.assert_allclose(matrices[11] @ [7, 9, 1], expected[:3], atol=1e-9)


def test_a_spine_that_turns_back_is_refused(spine, grid):
    motions = np.tile(np.eye(4), (12, 1, 1))
    motions[6, 2, 3] = 200.0
    with pytest.raises(ValueError, match="do not follow each other"):
        posture.pull_back(spine, motions, grid[0], 0, 10)
