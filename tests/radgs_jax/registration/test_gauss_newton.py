"""Refinement: a vertebra found to a tenth of a millimetre in a body that has moved, whatever the beam; and how far to trust it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.drr import drr
from radgs_jax.geometry import rigid
from radgs_jax.registration import confidence
from radgs_jax.registration import edges
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import prepared
from radgs_jax.registration.gains import eliminate_gains

CONFIG = gauss_newton.RefineConfig(
    levels=(
        gauss_newton.Level(4.0, 24, 6, 2.0, 4.0, 0.3, 2),
        gauss_newton.Level(2.0, 40, 5, 1.5, 3.0),
    )
)
CAMERA_FROM_WORLD = np.zeros((2, 4, 4))
CAMERA_FROM_WORLD[0, :3, :3] = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
CAMERA_FROM_WORLD[1, :3, :3] = [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
CAMERA_FROM_WORLD[:, 2, 3], CAMERA_FROM_WORLD[:, 3, 3] = 700.0, 1.0


def _smooth_noise(rng, shape, width):
    """Smooth blobs of random sign, about 1 in size."""
    spectrum = np.fft.rfftn(rng.normal(size=shape))
    frequency = np.meshgrid(*[np.fft.fftfreq(n) for n in shape[:-1]], np.fft.rfftfreq(shape[-1]), indexing="ij")
    field = np.fft.irfftn(spectrum * np.exp(-2 * (np.pi * width) ** 2 * sum(f**2 for f in frequency)), shape)
    return field / field.std()


@pytest.fixture(scope="module")
def parts():
    """A vertebra-sized lump with structure, anisotropic and off-centre, in a larger body with structure of its own."""
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(np.arange(30) * 1.5, np.arange(26) * 1.5, np.arange(14) * 2.5, indexing="ij")
    inside = ((x - 24) / 19) ** 2 + ((y - 17) / 14) ** 2 + ((z - 15) / 13) ** 2 < 1
    excess = np.where(inside, 0.02 + 0.01 * _smooth_noise(rng, x.shape, 1.2), 0.0)
    rest = np.maximum(0.02 + 0.008 * _smooth_noise(rng, (60, 48, 56), 1.5), 0.0)
    rest[:4], rest[-4:], rest[:, :4], rest[:, -4:] = 0, 0, 0, 0
    of_excess = np.diag([1.5, 1.5, 2.5, 1.0])
    of_excess[:3, 3] = [-22.0, -18.0, -15.0]
    of_rest = np.diag([3.0, 3.0, 3.0, 1.0])
    of_rest[:3, 3] = [-85.0, -75.0, -80.0]
    return prepared.Parts(*(jnp.asarray(a, jnp.float32) for a in (excess, of_excess, rest, of_rest)))


def _xrays(parts, world_from_box, world_from_rest, pixel_mm, size, gains=(1.0, 1.0)):
    """Line integrals at a resolution, and the intrinsics."""
    focal = 700.0 / pixel_mm
    k = jnp.asarray([[focal, focal, 0.5 * (size - 1), 0.5 * (size - 1)]] * 2, jnp.float32)
    images = 0.0
    for volume, grid, pose, gain in (
        (parts.excess, parts.box_from_excess, world_from_box, gains[0]),
        (parts.rest, parts.box_from_rest, world_from_rest, gains[1]),
    ):
        index_from_camera = jnp.linalg.inv(jnp.asarray(CAMERA_FROM_WORLD @ pose, jnp.float32) @ grid)[:, :3]
        images = images + gain * drr(volume, index_from_camera, k, size, size, step_mm=1.0)
    return np.asarray(images), k


def _pyramid(images_of, levels=CONFIG.levels):
    pyramid = []
    for level in levels:
        images, k = images_of(level.pixel_mm, round(150 / level.pixel_mm))
        pyramid.append(
            gauss_newton.LevelViews(list(map(jnp.asarray, images)), [jnp.ones(i.shape, bool) for i in images], k)
        )
    return pyramid


def _pose(*twist):
    return np.asarray(rigid.motion_about(jnp.zeros(3), jnp.asarray(twist)), np.float64)


TRUTH = _pose(0.1, -0.15, 0.2, 4.0, -3.0, 6.0)
REST = _pose(0.17, -0.1, 0.13, 6.0, -1.0, 4.5)
refine = jax.jit(gauss_newton.refine, static_argnames="config")


def _error_mm(pose, truth=TRUTH):
    return float(rigid.distance(jnp.asarray(pose, jnp.float32), jnp.asarray(truth, jnp.float32), jnp.zeros(3)))


def _starts(*twists):
    return jnp.asarray(np.stack([TRUTH @ _pose(*twist) for twist in twists]), jnp.float32)


def test_the_vertebra_and_the_rest_are_both_found(parts):
    """From 5 mm and 6 degrees off, with the rest of the body another 5 degrees and 3 mm away; other gains change nothing."""
    near = (0.06, -0.05, 0.07, 3.0, 2.0, -3.0)
    for gains in ((1.0, 1.0), (0.7, 0.8)):
        pyramid = _pyramid(lambda mm, size: _xrays(parts, TRUTH, REST, mm, size, gains))
        found = refine(parts, pyramid, jnp.asarray(CAMERA_FROM_WORLD, jnp.float32), _starts(near), CONFIG)
        assert _error_mm(found.world_from_box) < 0.3 and _error_mm(found.world_from_rest, REST) < 1.0
        assert found.similarity.min() > 0.98 and found.support.min() > 0.9 and found.step_mm < 0.2
        assert found.trajectory.shape == (2, 4, 4)


def test_scatter_noise_and_metal_cost_little(parts):
    """Intensities with scatter over the whole field, noise, and an implant that the CT does not know."""
    rng = np.random.default_rng(1)

    def measured(mm, size):
        images, k = _xrays(parts, TRUTH, REST, mm, size)
        primary = np.exp(-images)
        intensity = primary + 0.5 * primary.mean((1, 2), keepdims=True)
        images = -np.log(intensity) + rng.normal(size=images.shape) * 0.005
        rows = slice(size // 2 - round(12 / mm), size // 2 - round(12 / mm) + max(2, round(5 / mm)))
        images[:, rows, : size // 3] += 1.5
        return images, k

    start = _starts((0.03, -0.04, 0.02, 1.5, 1.0, -1.0))
    found = refine(parts, _pyramid(measured), jnp.asarray(CAMERA_FROM_WORLD, jnp.float32), start, CONFIG)
    assert _error_mm(found.world_from_box) < 0.8


def test_noise_is_told_from_structure():
    """The energy that noise leaves in derivatives, whatever smooth structure, edges or invalid pixels it lies on."""
    rng = np.random.default_rng(0)
    v, u = np.meshgrid(np.arange(96.0), np.arange(96.0), indexing="ij")
    clean = np.stack([0.02 * u + np.sin(v / 9.0), np.where(u + 2 * v > 130, 3.0, 1.0)])
    valid = np.ones(clean.shape, bool)
    valid[:, :, :20] = False
    noise = rng.normal(size=clean.shape) * np.array([0.05, 0.2])[:, None, None]
    noisy = np.where(valid, clean + noise, 50.0)
    found = edges.noise_energy(jnp.asarray(noisy, jnp.float32), jnp.asarray(valid), 1.0)
    left = edges.derivatives(jnp.asarray(noise, jnp.float32)[..., None], 1.0)[:, 8:-8, 28:-8]
    np.testing.assert_allclose(found, jnp.mean(jnp.sum(left**2, (-1, -2)), (1, 2)), rtol=0.15)
    assert jnp.all(edges.noise_energy(jnp.asarray(clean, jnp.float32), jnp.asarray(valid), 1.0) < 1e-4)


def test_correlations_are_those_that_images_would_have_without_noise(parts):
    start = _starts((0.02, -0.02, 0.02, 1.0, 1.0, -1.0))
    rng, found = np.random.default_rng(4), []
    for sigma in (0.0, 0.05):

        def measured(mm, size, sigma=sigma):
            images, k = _xrays(parts, TRUTH, REST, mm, size)
            return images + sigma * rng.normal(size=images.shape), k

        found.append(refine(parts, _pyramid(measured), jnp.asarray(CAMERA_FROM_WORLD, jnp.float32), start, CONFIG))
    clean, noisy = found
    assert _error_mm(noisy.world_from_box) < 1.0
    np.testing.assert_allclose(noisy.similarity, clean.similarity, atol=0.05)
    np.testing.assert_allclose(noisy.support, clean.support, atol=0.1)


def test_the_best_of_several_starts_goes_on(parts):
    """Whatever their order; and a start that ended elsewhere is reported as a rival that fits worse."""
    pyramid = _pyramid(lambda mm, size: _xrays(parts, TRUTH, REST, mm, size))
    cameras = jnp.asarray(CAMERA_FROM_WORLD, jnp.float32)
    good, bad = (0.03, 0.0, -0.04, 2.0, -1.0, 1.0), (0.5, -0.6, 0.4, 20.0, -25.0, 18.0)
    one, other = (refine(parts, pyramid, cameras, _starts(*order), CONFIG) for order in ((good, bad), (bad, good)))
    assert _error_mm(one.world_from_box) < 0.3 and _error_mm(other.world_from_box) < 0.3
    assert one.rival_mm > gauss_newton.APART_MM and one.margin > 0.1


def test_what_is_not_valid_does_not_count(parts):
    pyramid = _pyramid(lambda mm, size: _xrays(parts, TRUTH, REST, mm, size))
    masked = []
    for views in pyramid:
        valid = [v.at[:, : v.shape[1] // 3].set(False) for v in views.valid]
        images = [jnp.where(v, i, 50.0) for i, v in zip(views.images, valid)]
        masked.append(views.replace(images=images, valid=valid))
    start = _starts((0.02, -0.02, 0.02, 1.0, 1.0, -1.0))
    found = refine(parts, masked, jnp.asarray(CAMERA_FROM_WORLD, jnp.float32), start, CONFIG)
    assert _error_mm(found.world_from_box) < 0.5


def test_projections_move_as_their_derivatives_say(parts):
    """A part's derivative to a twist about the vertebra's centre in world axes, against central differences."""
    k = jnp.asarray([[350.0, 350.0, 19.5, 19.5]] * 2)
    cameras = (k, jnp.asarray(CAMERA_FROM_WORLD, jnp.float32), 40, 0.5)
    centre = jnp.asarray(TRUTH[:3, 3], jnp.float32)
    project = jax.jit(
        lambda pose: gauss_newton.project_part(parts.excess, parts.box_from_excess, pose, centre, *cameras)
    )
    _, derivative = project(jnp.asarray(TRUTH, jnp.float32))
    for axis, h in ((0, 0.003), (2, 0.003), (3, 0.1), (5, 0.1)):
        e = jnp.zeros(6).at[axis].set(h)
        ahead, behind = (
            project(rigid.matmul(rigid.motion_about(centre, s * e), jnp.asarray(TRUTH, jnp.float32)))[0]
            for s in (1, -1)
        )
        difference = (ahead - behind) / (2 * h)
        miss = jnp.linalg.norm(difference - derivative[..., axis]) / jnp.linalg.norm(difference)
        assert miss < 0.06


def _refined(support, step, error_scale, seed):
    rng = np.random.default_rng(seed)
    root = (0.2 * rng.normal(size=(6, 6)) + np.eye(6)) * ([25.0] * 3 + [1.0] * 3)
    information = root.T @ root / error_scale**2
    like = np.array([support, support])
    return gauss_newton.Refined(
        np.eye(4),
        np.eye(4),
        information,
        like,
        like - 0.05,
        np.float32(step),
        np.float32(0.01),
        np.float32(0),
        np.float32(2),
        np.eye(4)[None],
        np.mean(like, keepdims=True),
    )


def test_calibrated_confidence_refuses_what_is_wrong_and_covers_what_is_right():
    """On cases drawn like those it was calibrated on."""
    rng = np.random.default_rng(3)
    points = rng.normal(size=(200, 3)) * [20, 15, 12]

    def cases(count, seed):
        rng, found, errors = np.random.default_rng(seed), [], []
        for i in range(count):
            right, scale = rng.uniform() < 0.7, np.exp(rng.normal() * 0.5)
            found.append(
                _refined(rng.normal(0.8 if right else 0.4, 0.06), 0.05 if right else 0.4, scale, seed * 1000 + i)
            )
            predicted = confidence.spread_mm(found[-1].information, points)
            errors.append(min(1.9, 0.2 * predicted * np.exp(0.3 * rng.normal())) if right else rng.uniform(3, 20))
        return found, np.array(errors)

    found, errors = cases(300, 1)
    calibration = confidence.fit_rule(found, [points] * 300, errors, "a method")
    fresh, truth = cases(300, 2)
    judged = [confidence.judge(r, points, calibration) for r in fresh]
    accepted, radius = np.array([j.accepted for j in judged]), np.array([j.uncertainty_mm for j in judged])
    right = truth < 2
    assert (accepted & ~right).sum() <= 1 and (~accepted & right).mean() < 0.05
    assert 0.9 < (truth[right] <= radius[right]).mean() <= 1.0 and np.median(radius[right]) < 3 * np.median(
        truth[right]
    )
    assert all(np.linalg.eigvalsh(j.covariance).min() > 0 for j in judged)


def test_a_pose_that_says_nothing_is_refused():
    calibration = confidence.AcceptanceRule((0.0,) * 8, (0.6, 0.4, 0.4), (0.0, 1.0, 0.0, 0.0, 0.0), 2.0, "")
    points = np.random.default_rng(0).normal(size=(50, 3)) * 10
    good = _refined(0.9, 0.01, 0.3, 0)
    assert confidence.judge(good, points, calibration, 1).accepted
    assert not confidence.judge(good, points, calibration).accepted
    for spoilt in (np.full((6, 6), np.nan), np.zeros((6, 6)), -np.eye(6)):
        judged = confidence.judge(dataclasses.replace(good, information=spoilt), points, calibration, 1)
        assert not judged.accepted and judged.uncertainty_mm >= 100
    apart = dataclasses.replace(good, apart_mm=np.float32(1.0))
    judged = confidence.judge(apart, points, calibration, 1)
    assert not judged.accepted and judged.uncertainty_mm >= 2.0
    alone = dataclasses.replace(good, support=good.support[:1], similarity=good.similarity[:1])
    assert not confidence.judge(alone, points, calibration, 1).accepted


def test_spread_is_the_motion_of_points():
    """By drawing twists from the covariance."""
    rng = np.random.default_rng(0)
    covariance = np.diag(np.array([0.02, 0.01, 0.03, 0.5, 0.2, 0.9]) ** 2)
    points = rng.normal(size=(100, 3)) * [20, 10, 5] + [3, -4, 2]
    twists = rng.multivariate_normal(np.zeros(6), covariance, 20000)
    motions = np.cross(twists[:, None, :3], points[None]) + twists[:, None, 3:]
    wanted = np.sqrt((motions**2).sum(-1).mean())
    assert abs(confidence.spread_mm(np.linalg.inv(covariance), points) / wanted - 1) < 0.02


@pytest.mark.parametrize("apart_mm", [0.0, 0.05, 0.4, 1.0])
def test_the_covariance_knows_what_the_radius_knows(apart_mm):
    """However far apart the views are, the radius is one multiple of the covariance's root mean square."""
    rule = confidence.AcceptanceRule((0.0,) * 8, (0.6, 0.4, 0.4), (0.0, 1.0, 0.0, 0.0, 0.0), 2.0, "")
    points = np.random.default_rng(0).normal(size=(50, 3)) * [10, 8, 12] + [2, 0, -1]
    refined = dataclasses.replace(_refined(0.9, 0.01, 0.3, 0), apart_mm=np.float32(apart_mm))
    judged = confidence.judge(refined, points, rule)
    rms = confidence.spread_mm(np.linalg.inv(judged.covariance), points)
    assert judged.uncertainty_mm == pytest.approx(2.0 * rms, rel=1e-6)


def test_gains_are_eliminated_as_the_objective_says(x64):
    """Against the joint Gauss-Newton step over pose and gains, written out in float64 as one least-squares problem."""
    rng = np.random.default_rng(4)
    views, side, count, params, ridge = 2, 9, 4, 6, 0.3
    columns = rng.normal(size=(views, side, side, count, 2)) * np.array([3.0, 1.0, 0.5, 2.0])[:, None]
    jacobian = rng.normal(size=(views, side, side, params, 2))
    residual, gains = rng.normal(size=(views, side, side, 2)), rng.normal(size=(views, count))
    weights = rng.uniform(0.0, 2.0, (views, side, side)) * (rng.uniform(size=(views, side, side)) > 0.2)
    normals, rights = eliminate_gains(*map(jnp.asarray, (columns, gains, jacobian, residual, weights)), ridge=ridge)
    for v in range(views):
        root = np.sqrt(weights[v])[..., None]
        A = [(root * a).reshape(-1) for a in np.moveaxis(jacobian[v], 2, 0)]
        C = [(root * c).reshape(-1) for c in np.moveaxis(columns[v], 2, 0)]
        penalty = ridge * np.array([0.01, 1.0, 1.0, 1.0]) * (C[0] @ C[0]) + 1e-9
        # Rows of pixels, then a row for the penalty on each gain: sqrt(penalty) (gains + d) -> 0.
        design = np.concatenate([np.stack(A + C, 1), np.eye(count, params + count, params) * np.sqrt(penalty)[:, None]])
        wanted = np.concatenate([(root * residual[v]).reshape(-1), -np.sqrt(penalty) * gains[v]])
        joint, *_ = np.linalg.lstsq(design, wanted, rcond=None)
        np.testing.assert_allclose(np.linalg.solve(normals[v], rights[v]), joint[:params], rtol=1e-9, atol=1e-12)
        covariance = np.linalg.inv(design.T @ design)[:params, :params]
        np.testing.assert_allclose(np.linalg.inv(normals[v]), covariance, rtol=1e-8)
