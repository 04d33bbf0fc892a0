"""Vertebra detection: the chain of levels against brute force, exact geometry of one and two views, and a detector's making."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines import simulation
from data_pipelines.ct import scans
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.pairs import identity
from data_pipelines.phantom import generate
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import carm
from experiments.localizers import acquisitions
from experiments.localizers import crops
from experiments.localizers import localizer_files
from experiments.localizers import scoring
from experiments.localizers import training
from experiments.patients import starts
from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry import triangulation
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.localization import agreement
from radgs_jax.localization import locate
from radgs_jax.localization import network
from radgs_jax.localization import upright
from radgs_jax.localization.chain import Chain
from radgs_jax.localization.chain import decode
from radgs_jax.localization.chain import Found
from radgs_jax.localization.chain import Lattice
from radgs_jax.registration import prepared

TINY = network.DetectorConfig(levels=(18, 19, 20, 21), widths=(4, 4, 6, 6), blocks=(0, 0, 0, 0), features=4)
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


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


def test_loss_is_least_at_the_truth_and_ignores_levels_whose_truth_is_not_told():
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
    seen = network.standardise(image, valid)
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
    vertebra = prepared.Vertebra(21, None, None, None, frame, None, None)
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


def _two_views(levels_seen, sure, rng):
    """`Found` of an AP and a lateral view of a spine of seven levels: what each calls its places, and how sure it is."""
    z = 90.0 - 28.0 * np.arange(7)
    points = np.stack([6 * np.sin(z / 40), -0.002 * z**2, z], -1)
    E = carm.sample_views(rng, carm.CArm())
    intrinsics = np.array([[466.7, 466.7, 70.0, 64.0], [466.7, 466.7, 60.0, 75.0]])
    found = []
    for e, k, seen, names, certainty in zip(E, intrinsics, *zip(*levels_seen), sure):
        camera = points[seen] @ e[:3, :3].T + e[:3, 3]
        uv = k[:2] * camera[:, :2] / camera[:, 2:] + k[2:] + 0.3 * rng.normal(size=(len(seen), 2))
        evidence = np.full((len(seen), 7), -6.0)
        evidence[np.arange(len(seen)), names] = -6.0 + certainty
        true = np.array(seen)
        evidence[np.arange(len(seen)), true] = np.maximum(evidence[np.arange(len(seen)), true], -6.5 + certainty)
        n = len(seen)
        found.append(Found(np.array(names), uv, np.full(n, 0.9), np.full(n, 0.5), evidence, np.full(7, -1.0)))
    return found, intrinsics, E, points


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_level_mix_up_of_one_view_is_seen_in_the_rays_and_mended(shift):
    seen = [1, 2, 3, 4, 5]
    mixed = [n + shift for n in seen]
    found, k, E, points = _two_views([(seen, seen), (seen, mixed)], (4.0, 2.0), np.random.default_rng(5))
    together = agreement.agree(found, k, E)
    assert together.shifts == (0, -shift) and together.probability > 0.9
    assert min(together.own_apart_mm.values()) > 15.0 and max(together.apart_mm.values()) < 3.0
    assert sorted(together.centres) == seen
    for level in seen:
        assert np.linalg.norm(together.centres[level] - points[level]) < 2.0


def test_views_that_agree_are_left_alone_and_views_without_a_common_level_say_so():
    found, k, E, _ = _two_views(
        [([1, 2, 3, 4], [1, 2, 3, 4]), ([2, 3, 4, 5], [2, 3, 4, 5])], (4.0, 4.0), np.random.default_rng(6)
    )
    together = agreement.agree(found, k, E)
    assert together.shifts == (0, 0) and together.apart_mm == together.own_apart_mm
    assert sorted(together.centres) == [2, 3, 4]
    found, k, E, _ = _two_views([([0], [0]), ([6], [6])], (9.0, 9.0), np.random.default_rng(7))
    assert agreement.agree(found, k, E) is None


def _pool(seed, count=4, size=56):
    """X-rays with a bright spot for each of four levels, on which a network could learn."""
    rng = np.random.default_rng(seed)
    centroids = np.zeros((count, 29, 2), np.float32)
    in_sight = np.zeros((count, 29), bool)
    images = rng.normal(3.0, 0.05, (count, size, size)).astype(np.float16)
    for n in range(count):
        for i, label in enumerate((18, 19, 20, 21)):
            centroids[n, label] = 28 + rng.uniform(-3, 3), 6 + 14 * i + rng.uniform(-2, 2)
            u, v = np.rint(centroids[n, label]).astype(int)
            images[n, v - 1 : v + 2, u - 1 : u + 2] += 1 + i
            in_sight[n, label] = True
    E = np.tile(carm.extrinsics(0.0, 0.0, 700.0).astype(np.float32), (count, 1, 1))
    known = np.isin(np.arange(29), (18, 19, 20, 21))
    return {
        "clean": images,
        "measured": images,
        "valid": np.ones(images.shape, bool),
        "intrinsics": np.tile(np.float32([467, 467, 28, 28]), (count, 1)),
        "camera_from_world": E,
        "centroids": centroids,
        "in_sight": in_sight,
        "known": known,
    }


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    pool = acquisitions.gather([_pool(0), _pool(1)])
    config = training.TrainConfig(steps=4, batch=2, crop_px=48)
    params = training.train(pool, folder / "state", TINY, config)
    chain = training.calibrate(params, TINY, pool, pool, config, images=2)
    return pool, config, folder, locate.Localizer(params, TINY, chain)


def test_training_goes_on_from_its_checkpoint_to_the_same_parameters(tiny_model, tmp_path):
    pool, config, _, model = tiny_model

    # The schedule belongs to the configuration, so the first half is cut off, not configured shorter.
    class Stop(Exception):
        pass

    def stop(pool, levels, rng, config, size, real=crops.batch_of, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 3:
            raise Stop
        return real(pool, levels, rng, config, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crops, "batch_of", stop)
        patch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
        with pytest.raises(Stop):
            training.train(pool, tmp_path, TINY, config)
    resumed = training.train(pool, tmp_path, TINY, config)
    jax.tree.map(np.testing.assert_array_equal, resumed, model.params)


def test_a_batch_tells_where_the_spots_are(tiny_model):
    pool, config = tiny_model[:2]
    rng = np.random.default_rng(2)
    images, valid, beam, centres, seen, known = crops.batch_of(pool, TINY.levels, rng, config, 12)
    np.testing.assert_allclose(beam, np.tile([0.0, -1.0, 0.0], (12, 1)), atol=1e-6)
    hits = 0
    for n in range(12):
        for level in np.flatnonzero(seen[n] & known[n]):
            u, v = np.rint(centres[n, level]).astype(int)
            if 4 < u < 43 and 4 < v < 43:
                around = images[n, v - 4 : v + 5, u - 4 : u + 5]
                hits += 1
                assert around[3:6, 3:6].mean() > around.mean() + 0.2
    assert hits > 15 and (valid | (images == images)).all()


def test_a_detector_file_comes_back_as_it_went_and_a_damaged_one_is_refused(tiny_model, tmp_path):
    model = tiny_model[3]
    path = tmp_path / "detector.npz"
    localizer_files.save(path, model, "a test")
    back = localizer_files.load(path)
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    assert back.config == TINY and back.levels == TINY.levels
    np.testing.assert_array_equal(back.chain.spacing_mm, model.chain.spacing_mm)
    assert (back.chain.weight, back.chain.link) == (model.chain.weight, model.chain.link)
    arrays = dict(np.load(path))
    for name, value in (
        ("header", np.array("[]")),
        ("header", np.array("{")),
        ("header", np.array(str(arrays["header"]).replace("detector/1", "detector/9"))),
        ("params.Dense_0.bias", np.zeros(3, np.float32)),
        ("params.Dense_0.bias", np.full(4, np.nan, np.float32)),
    ):
        files.write_npz(path, **{**arrays, name: value})
        with pytest.raises(errors.InputError, match="detector.npz"):
            localizer_files.load(path)


def test_locate_says_in_one_line_why_there_is_no_answer(tiny_model):
    model = tiny_model[3]
    view = Camera(np.array([467.0, 467, 28, 28]), carm.extrinsics(0.0, 0.0, 700.0), 56, 56)
    image = np.zeros((56, 56), np.float32)
    with pytest.raises(errors.InputError, match="label: found T9, wanted one of T11 to L2"):
        locate.locate(model, [XRay(image, None, view)] * 2, 16)
    with pytest.raises(errors.InputError, match="that level in two views"):
        locate.locate(model, [XRay(image, None, view)], 20)


def test_one_camera_twice_is_refused_in_one_line(tiny_model, monkeypatch):
    found, k, E, _ = _two_views([([1, 2, 3], [1, 2, 3])] * 2, (6.0, 6.0), np.random.default_rng(9))
    model = dataclasses.replace(tiny_model[3], config=network.DetectorConfig(levels=tuple(range(18, 25))))
    model = dataclasses.replace(model, chain=dataclasses.replace(model.chain, trained=np.ones(7, bool)))
    image = np.zeros((56, 56), np.float32)
    view = Camera(k[0], E[0], 56, 56)
    moved = dataclasses.replace(found[0], uv=found[0].uv + 2.0)
    for second in (found[0], moved):
        answers = iter((found[0], second))
        same = upright.Upright(image, image > 0, k[0], E[0], np.eye(2), np.zeros(2))
        monkeypatch.setattr(locate, "look", lambda *_: (same, next(answers)))
        with pytest.raises(
            errors.InputError, match="X-rays: cameras: found rays that are parallel or meet in a source"
        ):
            locate.locate(model, [XRay(image, None, view)] * 2, 20)


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


@pytest.fixture(scope="module")
def patient_files(tmp_path_factory):
    """A coarse phantom on disk, stored in another order than RAS: the phantom, its CT and its mask."""
    made = generate.make_phantom(5, generate.PhantomConfig(spacing_mm=(2.5, 2.5, 3.0), levels=(20, 21, 22, 23, 24)))
    paths = scan_files.write_verse(made, tmp_path_factory.mktemp("patient"), "phantom", "PIR")
    return made, paths["ct"], paths["mask"]


def test_views_are_a_function_of_the_scan_its_labels_and_the_seed(patient_files, tmp_path):
    """A store's acquisitions are those of its seeds, are kept, and another label map of the same bones shows the same."""
    _, ct, mask = patient_files
    values, affine = nifti.read_nifti(mask)
    counted_up = np.array(values)
    for number in (20, 21, 22, 23, 24):
        counted_up[values == number] = 51 - number  # as TotalSegmentator counts: L5 is 27, L1 is 31
    counted_up[values == 26] = 25
    other = tmp_path / "other.nii.gz"
    nifti.write_nifti(other, counted_up, affine)
    geometry, stores = simulation.Geometry(window=48, binning=16), []
    for path, labels in ((mask, None), (other, "totalsegmentator")):
        digest = identity.scan_digest(ct, path, labels)
        which = acquisitions.AcquisitionSet(digest, bodies=2, count=2, geometry=geometry)
        done = []
        archive = identity.Archive({digest: ("phantom", ct, path, labels)})
        stores.append(acquisitions.simulated_views(tmp_path / "views", which, 3, archive, done.append))
        assert sum(done) == len(stores[-1]) == 4
    assert stores[0].folder != stores[1].folder
    for index in range(4):
        for name, array in stores[0][index].items():
            np.testing.assert_array_equal(array, stores[1][index][name])
    body = simulation.ArticulatedBody(scans.read_scan(ct, mask))
    rng = np.random.default_rng([3, 1, 0])
    label = int(rng.choice(body.spine.labels))
    sample, stored = simulation.simulate(body, label, rng, simulation.Preset(), geometry), stores[0][2]
    assert stored["target"] == label
    np.testing.assert_array_equal(stored["measured"], np.clip(sample.measured, -30, 60).astype(np.float16))
    pool = acquisitions.gather(stores[0][i] for i in (1, 2))
    assert pool["valid"].shape == (4, 48, 48) and pool["known"].shape == (4, 29)
    np.testing.assert_array_equal(pool["clean"][2:], stored["clean"])
    np.testing.assert_array_equal(np.flatnonzero(pool["known"][3]), body.spine.labels)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "views").rglob("*")}
    again = acquisitions.simulated_views(tmp_path / "views", which, 3, archive)
    assert again.identity() == stores[1].identity()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "views").rglob("*")} == written


def test_a_chain_of_a_scan_without_neighbours_keeps_the_spacings_that_it_started_from(tiny_model):
    pool, config, _, model = tiny_model
    alone = {**pool, "known": pool["known"] & np.isin(np.arange(29), (19, 21))}
    chain = training.calibrate(model.params, TINY, alone, alone, config, images=1, prior=model.chain)
    np.testing.assert_array_equal(chain.spacing_mm, model.chain.spacing_mm)
    assert chain.trained.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "shift_px, wrong_level, wanted",
    [(0.0, False, (1.0, 0.5, 1.0)), (0.0, True, (0.0, 0.5, 0.0)), (4.0, False, (1.0, 6.5, 1.0))],
)
def test_scores_of_answers_whose_error_is_known(tiny_model, monkeypatch, shift_px, wrong_level, wanted):
    """Two views that say the truth, another level's name, or places 4 px of 1.5 mm to one side."""
    rng, seen = np.random.default_rng(8), [1, 2, 3, 4, 5]
    names = [n + 1 for n in seen] if wrong_level else seen
    found, k, E, points = _two_views([(seen, names), (seen, names)], (6.0, 6.0), rng)
    for f in found:
        f.uv[:, 0] += shift_px
    model = dataclasses.replace(tiny_model[3], config=network.DetectorConfig(levels=tuple(range(18, 25))))
    model = dataclasses.replace(model, chain=dataclasses.replace(model.chain, trained=np.ones(7, bool)))
    centroids = np.zeros((2, 29, 2), np.float32)
    for view in range(2):
        camera = points @ E[view, :3, :3].T + E[view, :3, 3]
        centroids[view, 18:25] = k[view, :2] * camera[:, :2] / camera[:, 2:] + k[view, 2:]
    acquisition = {
        "measured": np.zeros((2, 140, 140), np.float16),
        "valid": np.ones((2, 140, 140), bool),
        "intrinsics": k,
        "camera_from_world": E,
        "centroids": centroids,
        "in_sight": np.isin(np.arange(29), [18 + n for n in seen])[None].repeat(2, 0),
        "known": np.isin(np.arange(29), range(18, 25)),
        "target": 21,
        "world_from_box": rigid_host.matrix(np.zeros(3), points[3]),
    }
    looks = {tuple(e[:3, 3]) + tuple(e[2, :3]): f for e, f in zip(E, found)}

    def look(model, image, valid, intrinsics, camera_from_world):
        same = upright.Upright(image, valid, intrinsics, camera_from_world, np.eye(2), np.zeros(2))
        return same, looks[tuple(camera_from_world[:3, 3]) + tuple(camera_from_world[2, :3])]

    monkeypatch.setattr(locate, "look", look)
    figures = scoring.score(model, [acquisition])
    assert (figures["levels"], figures["targets"]) == (10, 1)
    assert (figures["level_right"], figures["target_right"]) == wanted[::2]
    assert figures["centre_mm"] == pytest.approx(wanted[1], abs=0.7)
    assert figures["sure_and_wrong"] == (1.0 if wrong_level and figures["refused"] == 0 else 0.0)


@pytest.mark.slow
def test_a_detector_is_made_adapted_and_used_end_to_end(patient_files, tmp_path):
    """Phantoms, then one of them as the patient, then a command on X-rays that it has not seen; nothing is made twice."""
    config = training.TrainConfig(bodies=2, held_out=1, count=1, steps=2, batch=2, crop_px=64)
    generic = localizer_files.load(training.make_generic(tmp_path / "generic", config, network.DetectorConfig()))
    assert generic.levels == tuple(range(16, 25)) and not generic.centres_ct
    made, ct, mask = patient_files
    path = training.make_patient(tmp_path / "patient", ct, mask, generic, config)
    patient = localizer_files.load(path)
    assert patient.levels == (20, 21, 22, 23, 24) == tuple(patient.centres_ct)
    for label, centre in patient.centres_ct.items():
        assert np.linalg.norm(centre - made.centroids[label]) < 25.0
    views = sorted(tmp_path.rglob("*.array_record"))
    before = {p: p.stat().st_mtime_ns for p in views}
    first = path.read_bytes()
    assert training.make_patient(tmp_path / "patient", ct, mask, generic, config).read_bytes() == first
    assert len(before) == 3 and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record")} == before
    cameras = tmp_path / "cameras.json"
    view = Camera(np.array([467.0, 467, 60, 60]), carm.extrinsics(0.0, 0.0, 700.0), 122, 122)
    files.write_json(cameras, [camera_files.view_json(view, "AP")])
    np.save(tmp_path / "ap.npy", np.random.default_rng(0).normal(3.0, 1.0, (122, 122)).astype(np.float32))
    command = [sys.executable, "-m", "experiments.detect", "--do=find", f"--detector={path}", f"--cameras={cameras}"]
    command += [f"--xrays={tmp_path / 'ap.npy'}", "--label=21", f"--out={tmp_path / 'found.json'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "that level in two views" in done.stderr
    assert not (tmp_path / "found.json").exists()
