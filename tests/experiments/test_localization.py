"""Finding vertebrae: the chain of levels against brute force, the network's input, and geometry of one and two views."""

import dataclasses
import itertools
import types

import jax
import numpy as np
import pytest

from data_pipelines.simulation import carm
from experiments.patients import starts
from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry import triangulation
from radgs_jax.geometry.camera import Camera
from radgs_jax.localization import agreement
from radgs_jax.localization import network
from radgs_jax.localization import upright
from radgs_jax.localization.chain import Chain
from radgs_jax.localization.chain import decode
from radgs_jax.localization.chain import Lattice
from radgs_jax.models.standardise import standardise

TINY = network.DetectorConfig(levels=(18, 19, 20, 21), widths=(4, 4, 6, 6), blocks=(0, 0, 0, 0), features=4)


def _log_levels(rng, count, shape, sharpness=3.0):
    flat = sharpness * rng.normal(size=(count, shape[0] * shape[1] + 1))
    flat -= np.log(np.exp(flat).sum(1, keepdims=True))
    return flat[:, :-1].reshape(count, *shape), flat[:, -1]


def _chain(count, spacing=18.0, spread=(9.0, 7.0), weight=0.8, link=1.5, trained=None):
    trained = np.ones(count, bool) if trained is None else np.array(trained)
    return Chain(np.full(count - 1, spacing), np.array(spread), weight, link, trained)


def _all_answers(count, shape):
    """Every joint answer: cells of a run of levels without a gap, None elsewhere."""
    cells = list(itertools.product(range(shape[0]), range(shape[1])))
    yield (None,) * count
    for first in range(count):
        for last in range(first, count):
            for chosen in itertools.product(cells, repeat=last - first + 1):
                yield (None,) * first + chosen + (None,) * (count - 1 - last)


def _log_score(answer, log_cells, log_absent, chain, step_mm):
    score = 0.0
    for level, cell in enumerate(answer):
        score += chain.weight * (log_absent[level] if cell is None else log_cells[level][cell])
        above = answer[level - 1] if level else None
        if cell is not None and above is not None:
            down, across = (cell[0] - above[0]) * step_mm, (cell[1] - above[1]) * step_mm
            if down <= 0:
                return -np.inf
            score += chain.link - 0.5 * (across / chain.spread_mm[0]) ** 2
            score -= 0.5 * ((down - chain.spacing_mm[level - 1]) / chain.spread_mm[1]) ** 2
    return score


@pytest.mark.parametrize("seed", range(4))
def test_the_chain_is_the_sum_and_the_maximum_over_all_joint_answers(seed):
    count, shape, step_mm = 3, (4, 3), 6.0
    rng = np.random.default_rng(seed)
    log_cells, log_absent = _log_levels(rng, count, shape)
    chain = dataclasses.replace(_chain(count), spacing_mm=rng.uniform(6, 15, count - 1))
    lattice = Lattice(log_cells, log_absent, chain, step_mm)
    cells, absent, z = lattice.marginals()
    answers = list(_all_answers(count, shape))
    scores = np.array([_log_score(a, log_cells, log_absent, chain, step_mm) for a in answers])
    np.testing.assert_allclose(z, np.log(np.exp(scores).sum()), atol=1e-9)
    share = np.exp(scores - z)
    wanted_cells, wanted_absent = np.zeros((count, *shape)), np.zeros(count)
    for answer, p in zip(answers, share):
        for level, cell in enumerate(answer):
            if cell is None:
                wanted_absent[level] += p
            else:
                wanted_cells[level][cell] += p
    np.testing.assert_allclose(cells, wanted_cells, atol=1e-9)
    np.testing.assert_allclose(absent, wanted_absent, atol=1e-9)
    assert tuple(lattice.best()) == answers[int(scores.argmax())]


def test_the_order_mends_a_level_that_its_own_heatmap_puts_one_too_low():
    count, shape = 5, (24, 9)
    log_cells, log_absent = np.full((count, *shape), -9.0), np.full(count, -9.0)
    for level in range(count):
        log_cells[level, 3 + 4 * level, 4] = np.log(0.6)
        log_cells[level, 3 + 4 * (level + 1) if level < 4 else 2, 4] = np.log(0.3)
    log_cells[2, 11, 4], log_cells[2, 15, 4] = np.log(0.2), np.log(0.7)
    found = decode(log_cells, log_absent, _chain(count, 24.0), 6.0)
    np.testing.assert_array_equal(found.levels, range(count))
    np.testing.assert_allclose(found.uv[:, 1], (3 + 4 * np.arange(count)) * 4 + 1.5, atol=0.5)
    assert (found.confidence > 0.8).all()


def test_a_tie_between_two_numberings_is_reported_as_doubt_and_untrained_levels_are_never_answered():
    count, shape = 6, (24, 9)
    log_cells, log_absent = np.full((count, *shape), -9.0), np.full(count, np.log(0.4))
    for place in range(4):  # four vertebrae that could be levels 0-3 or 1-4
        for level in (place, place + 1):
            log_cells[level, 2 + 5 * place, 4] = np.log(0.3)
    chain = _chain(count, 30.0, trained=[True] * 5 + [False])
    found = decode(log_cells, log_absent, chain, 6.0)
    assert len(found.levels) == 4 and found.levels.max() <= 4
    assert (found.confidence < 0.75).all()
    assert found.evidence.shape == (4, 5)


def test_subpixel_places_come_from_the_four_cells_that_share_a_centre():
    centres = np.array([[[37.3, 21.8], [40.1, 44.6]]])
    truth = network.target(centres, np.ones((1, 2), bool), (64, 80))
    log_cells = np.log(np.asarray(truth.cells[0]) + 1e-9)
    found = decode(log_cells, np.full(2, -20.0), _chain(2, 34.0, weight=1.0, spread=(200.0, 200.0)), 6.0)
    np.testing.assert_allclose(found.uv, centres[0], atol=0.1)


def test_loss_is_least_at_the_truth_and_ignores_levels_whose_truth_is_unknown():
    rng = np.random.default_rng(0)
    centres, seen = rng.uniform(5, 40, (3, 4, 2)), rng.uniform(size=(3, 4)) < 0.6
    truth = network.target(centres, seen, (48, 64))
    np.testing.assert_allclose(truth.cells.sum((-1, -2)) + truth.absent, 1.0, atol=1e-6)
    known = rng.uniform(size=(3, 4)) < 0.7
    perfect = network.Levels(np.log(truth.cells + 1e-9), np.log(truth.absent + 1e-9))
    other = network.target(centres + 6.0, seen, (48, 64))
    wrong = network.Levels(np.log(other.cells + 1e-9), np.log(other.absent + 1e-9))
    best = float(network.loss(perfect, truth, known))
    assert best + 1.0 < float(network.loss(wrong, truth, known))
    mixed = jax.tree.map(lambda p, w: np.where(known.reshape(known.shape + (1,) * (p.ndim - 2)), p, w), perfect, wrong)
    assert float(network.loss(mixed, truth, known)) == pytest.approx(best, abs=1e-5)


def test_the_network_sees_neither_gain_nor_air_value_nor_what_lies_under_the_collimator():
    rng = np.random.default_rng(1)
    image = rng.normal(3.0, 0.7, (2, 48, 64)).astype(np.float32)
    valid = np.ones(image.shape, bool)
    valid[:, :, :20] = False
    seen = standardise(image, valid)
    np.testing.assert_allclose(network.standardise(1.7 * image - 4.0, valid), seen, atol=2e-3)
    np.testing.assert_allclose(network.standardise(np.where(valid, image, 30.0), valid), seen, atol=1e-5)
    assert np.isfinite(network.standardise(image, np.zeros_like(valid))).all()
    params = network.init(TINY, jax.random.key(0))
    levels = network.Detector(TINY).apply(params, image, valid, np.zeros((2, 3), np.float32))
    total = np.exp(levels.cells).sum((-1, -2)) + np.exp(levels.absent)
    np.testing.assert_allclose(total, 1.0, atol=1e-4)
    assert np.exp(levels.cells)[..., :5].sum() < 1e-3
    with pytest.raises(ValueError, match="multiples of 16"):
        network.Detector(TINY).apply(params, image[:, :40], valid[:, :40], np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("roll_deg, pixel", [(0.0, 0.6), (90.0, 0.4), (-160.0, 0.9), (33.0, 0.6)])
def test_an_upright_view_shows_a_point_where_its_camera_says_and_knows_where_it_came_from(roll_deg, pixel):
    """Oblique, off-centre, rolled views with rows and columns of different number and pitch."""
    E = rigid_host.matrix([0, 0, np.radians(roll_deg)], 0) @ carm.extrinsics(35.0, -12.0, 700.0)
    intrinsics = np.array([1124.0 / pixel, 1124.0 / (0.8 * pixel), 210.0, 300.0])
    point = np.array([14.0, -9.0, 21.0])
    p = E[:3, :3] @ point + E[:3, 3]
    uv = intrinsics[:2] * p[:2] / p[2] + intrinsics[2:]
    v, u = np.mgrid[:520, :470]
    size = 6.0 / pixel
    image = np.exp(-0.5 * (((u - uv[0]) / size) ** 2 + ((v - uv[1]) / (size / 0.8)) ** 2))
    view = upright.upright(image, np.ones(image.shape, bool), intrinsics, E, 1.5)
    assert not (np.array(view.image.shape) % network.MULTIPLE).any()
    rows, columns = np.mgrid[: view.image.shape[0], : view.image.shape[1]]
    weight = np.where(view.valid, view.image, 0.0)
    seen = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
    q = view.camera_from_world[:3, :3] @ point + view.camera_from_world[:3, 3]
    np.testing.assert_allclose(view.intrinsics[:2] * q[:2] / q[2] + view.intrinsics[2:], seen, atol=0.05)
    np.testing.assert_allclose(view.matrix @ seen + view.offset, uv, atol=0.2)
    # The head is up, and a pixel is 1.5 mm at the isocentre.
    head = view.camera_from_world[:3, :3] @ (point + [0, 0, 10.0]) + view.camera_from_world[:3, 3]
    step = view.intrinsics[:2] * (head[:2] / head[2] - q[:2] / q[2])
    assert step[1] < 0
    np.testing.assert_allclose(700.0 / view.intrinsics[:2], 1.5)


def test_a_beam_along_the_patient_is_refused():
    with pytest.raises(ValueError, match="along the patient"):
        upright.upright(
            np.zeros((32, 32)),
            np.ones((32, 32), bool),
            np.array([500.0, 500, 16, 16]),
            carm.extrinsics(0.0, 80.0, 700.0),
            1.5,
        )


def test_rays_of_one_point_meet_and_its_covariance_is_that_of_repeated_measurements():
    rng = np.random.default_rng(3)
    E = carm.sample_views(rng, carm.CArm())
    intrinsics = np.array([[900.0, 900.0, 61.0, 50.0], [800.0, 800.0, 40.0, 70.0]])
    point = np.array([12.0, -20.0, 33.0])
    camera = np.einsum("vij,j->vi", E[:, :3, :3], point) + E[:, :3, 3]
    uv = intrinsics[:, :2] * camera[:, :2] / camera[:, 2:] + intrinsics[:, 2:]
    lines = [triangulation.rays(p[None], k, e) for p, k, e in zip(uv, intrinsics, E)]
    sources, directions = np.stack([s for s, _ in lines]), np.stack([d[0] for _, d in lines])
    assert triangulation.ray_distance(*lines[0], *lines[1]) < 1e-9
    spread_px = np.array([0.5, 1.0])
    mm = spread_px * camera[:, 2] / intrinsics[:, 0]
    found, covariance = triangulation.triangulate(sources, directions, mm)
    np.testing.assert_allclose(found, point, atol=1e-9)
    points = []
    for _ in range(4000):
        noisy = uv + spread_px[:, None] * rng.normal(size=(2, 2))
        moved = [triangulation.rays(p[None], k, e)[1][0] for p, k, e in zip(noisy, intrinsics, E)]
        points.append(triangulation.triangulate(sources, np.stack(moved), mm)[0])
    np.testing.assert_allclose(np.cov(np.array(points).T), covariance, atol=0.12 * np.abs(covariance).max())
    with pytest.raises(ValueError, match="two rays"):
        triangulation.triangulate(sources[[0, 0]], directions[[0, 0]], mm)
    with pytest.raises(ValueError, match="meet before their sources"):
        triangulation.triangulate(sources[[0, 0]], np.stack([directions[0], moved[0]]), mm)


def test_a_start_from_clicked_points_is_the_middle_between_the_rays():
    """Two skew rays: the middle of their common perpendicular, and half its length as the rms distance."""
    E = carm.sample_views(np.random.default_rng(4), carm.CArm())
    views = [Camera(np.array([900.0, 880.0, 61.0, 50.0]), e, 120, 130) for e in E]
    clicked = []
    for point, view in zip(([12.0, -20.0, 33.0], [13.0, -18.0, 34.5]), views):
        p = view.camera_from_world[:3, :3] @ point + view.camera_from_world[:3, 3]
        clicked.append(view.intrinsics[:2] * p[:2] / p[2] + view.intrinsics[2:])
    (a, u), (b, v) = (
        (-e[:3, :3].T @ e[:3, 3], triangulation.rays(c[None], views[0].intrinsics, e)[1][0]) for c, e in zip(clicked, E)
    )
    s, t, _ = np.linalg.solve(np.stack([u, -v, np.cross(u, v)], 1), b - a)
    ends = a + s * u, b + t * v
    frame = rigid_host.matrix(np.radians([5.0, -9.0, 20.0]), [4.0, -60.0, -210.0])
    vertebra = types.SimpleNamespace(ct_from_box=frame)
    start, miss = starts.start_from_points(views, clicked, vertebra)
    np.testing.assert_allclose(start[:3, :3], np.eye(3))
    np.testing.assert_allclose((start @ frame)[:3, 3], 0.5 * (ends[0] + ends[1]), atol=1e-9)
    assert miss == pytest.approx(0.5 * np.linalg.norm(ends[0] - ends[1]), rel=1e-9) and miss > 0.5
    for chosen, pixels, found in (
        (views[:1], clicked[:1], "a single view"),
        ([views[0]] * 2, [clicked[0]] * 2, "rays that are parallel or meet in a source"),
        ([views[0]] * 2, [clicked[0], clicked[0] + 3.0], "rays that are parallel or meet in a source"),
    ):
        with pytest.raises(errors.InputError, match=f"flags: --points: found {found}, wanted the vertebra's centre"):
            starts.start_from_points(chosen, pixels, vertebra)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_level_mix_up_of_one_view_is_seen_in_the_rays_and_mended(shift, two_views):
    seen = [1, 2, 3, 4, 5]
    mixed = [n + shift for n in seen]
    found, k, E, points = two_views([(seen, seen), (seen, mixed)], (4.0, 2.0), np.random.default_rng(5))
    together = agreement.agree(found, k, E)
    assert together.shifts == (0, -shift) and together.probability > 0.9
    assert min(together.own_apart_mm.values()) > 15.0 and max(together.apart_mm.values()) < 3.0
    assert sorted(together.centres) == seen
    for level in seen:
        assert np.linalg.norm(together.centres[level] - points[level]) < 2.0


def test_views_that_agree_are_left_alone_and_views_without_a_common_level_say_so(two_views):
    found, k, E, _ = two_views(
        [([1, 2, 3, 4], [1, 2, 3, 4]), ([2, 3, 4, 5], [2, 3, 4, 5])], (4.0, 4.0), np.random.default_rng(6)
    )
    together = agreement.agree(found, k, E)
    assert together.shifts == (0, 0) and together.apart_mm == together.own_apart_mm
    assert sorted(together.centres) == [2, 3, 4]
    found, k, E, _ = two_views([([0], [0]), ([6], [6])], (9.0, 9.0), np.random.default_rng(7))
    assert agreement.agree(found, k, E) is None


def test_a_start_pose_follows_the_spine_and_leaves_the_twist_to_the_ct():
    rng = np.random.default_rng(8)
    z = -27.0 * np.arange(6)
    centres_ct = {n: np.array([-22.0 + 0.05 * n, -50 - 0.004 * z[n] ** 2, -285 + z[n]]) for n in range(6)}
    T = rigid_host.matrix(np.radians([9.0, -7.0, 8.0]), [30.0, -10.0, 250.0])
    world = {n: T[:3, :3] @ c + T[:3, 3] + rng.normal(0, 0.3, 3) for n, c in centres_ct.items() if n != 5}
    pose = agreement.pose_from_centres(world, centres_ct, 3)
    np.testing.assert_allclose(pose[:3, :3] @ centres_ct[3] + pose[:3, 3], world[3], atol=1e-9)
    along = T[:3, :3] @ [0, 0, 1.0]
    assert np.degrees(np.arccos(along @ pose[:3, 2])) < 4.0 < np.degrees(np.arccos(along @ [0, 0, 1.0]))
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1.0)
    alone = agreement.pose_from_centres({3: world[3]}, centres_ct, 3)
    np.testing.assert_allclose(alone[:3, :3], np.eye(3), atol=1e-12)
