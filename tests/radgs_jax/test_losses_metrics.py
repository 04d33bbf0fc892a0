"""Losses, scores and attenuation against direct numpy implementations and hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from radgs_jax import attenuation
from radgs_jax import losses
from radgs_jax import metrics
from radgs_jax.geometry import rigid


def _ssim_direct(a, b, data_range, window=11, sigma=1.5):
    """Mean SSIM of two arrays of any dimension, window by window."""
    g = np.exp(-0.5 * ((np.arange(window) - window // 2) / sigma) ** 2)
    kernel = g
    for _ in range(a.ndim - 1):
        kernel = kernel[..., None] * g
    kernel = kernel / kernel.sum()
    axes = tuple(range(-a.ndim, 0))
    pa, pb = (np.lib.stride_tricks.sliding_window_view(x, kernel.shape) for x in (a, b))
    mean_a, mean_b = ((kernel * p).sum(axes) for p in (pa, pb))
    ra, rb = (p - m.reshape(*m.shape, *(1,) * a.ndim) for p, m in ((pa, mean_a), (pb, mean_b)))
    var_a, var_b, cov = ((kernel * p).sum(axes) for p in (ra * ra, rb * rb, ra * rb))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return np.mean((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))


def _pair(shape, scale, seed=0):
    """Two related random arrays, smooth by different amounts along each axis."""
    rng = np.random.default_rng(seed)
    base = ndimage.gaussian_filter(rng.uniform(size=shape), 0.5 + 0.5 * np.arange(len(shape))) * scale
    return base, base + 0.1 * scale * rng.normal(size=shape)


def test_ssim2d_is_the_direct_one(x64):
    pairs = [_pair((17, 26), 2.0, seed) for seed in (1, 2)]
    a, b = (np.stack(arrays) for arrays in zip(*pairs))
    wanted = 1 - np.mean([_ssim_direct(*pair, losses.IMAGE_RANGE) for pair in pairs])
    assert float(losses.ssim2d(jnp.asarray(a), jnp.asarray(b))) == pytest.approx(wanted, abs=1e-9)
    other = 1 - np.mean([_ssim_direct(*pair, 0.7) for pair in pairs])
    assert float(losses.ssim2d(jnp.asarray(a), jnp.asarray(b), 0.7)) == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("window", [11, 7])
def test_ssim3d_is_the_direct_one(x64, window):
    a, b = _pair((13, 19, 15), 0.06)
    wanted = 1 - _ssim_direct(a, b, losses.DENSITY_RANGE, window)
    assert float(losses.ssim3d(jnp.asarray(a), jnp.asarray(b), window=window)) == pytest.approx(wanted, abs=1e-9)


def test_float32_ssim_is_close_to_float64():
    a, b = _pair((13, 19, 15), 0.06)
    value = losses.ssim3d(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    assert float(value) == pytest.approx(1 - _ssim_direct(a, b, losses.DENSITY_RANGE), abs=1e-4)


def test_identical_arrays_have_no_loss():
    image, volume = jnp.asarray(_pair((14, 22), 2.0)[0]), jnp.asarray(_pair((13, 12, 17), 0.06)[0])
    for loss, x in ((losses.l1, image), (losses.ssim2d, image), (losses.ssim3d, volume), (losses.ncc3d, volume)):
        assert float(loss(x, x)) == pytest.approx(0.0, abs=1e-5)


def test_ssim_refuses_an_image_smaller_than_its_window():
    with pytest.raises(ValueError, match="window of 11"):
        losses.ssim2d(jnp.zeros((10, 30)), jnp.zeros((10, 30)))


def test_segmentation_is_entropy_and_dice_over_valid_pixels():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 2, 4, 4))
    bone = (rng.uniform(size=(2, 2, 16, 16)) > 0.4) & (np.arange(16) > 5)
    valid = rng.uniform(size=bone.shape) > 0.2

    def direct(z, bone, w):
        z = np.kron(z, np.ones((4, 4)))
        p = 1 / (1 + np.exp(-z))
        entropy = -(w * (bone * np.log(p) + ~bone * np.log(1 - p))).sum() / w.sum()
        common, both = (w * p * bone).sum((2, 3)) / 16, (w * (p + bone)).sum((2, 3)) / 16
        return entropy + np.mean(1 - (2 * common + 1) / (both + 1))

    expected = direct(logits, bone, valid)
    logits = jnp.asarray(logits, jnp.float32)
    np.testing.assert_allclose(losses.segmentation(logits, bone, valid), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.segmentation(logits, bone | ~valid, valid), expected, rtol=1e-5)
    assert np.isfinite(losses.segmentation(logits, np.zeros_like(bone), np.zeros_like(valid)))


def test_tv_of_a_ramp(x64):
    i, j, k = np.mgrid[:5, :8, :6]
    ramp = jnp.asarray(np.stack([0.3 * i - 0.02 * j + 0.005 * k, 0.1 * k]))
    assert float(losses.tv3d(ramp[0])) == pytest.approx(0.325, abs=1e-12)
    assert float(losses.tv3d(ramp)) == pytest.approx(0.5 * (0.325 + 0.1), abs=1e-12)
    assert float(losses.tv3d(ramp, jnp.ones(3))) == float(losses.tv3d(ramp))
    assert float(losses.tv3d(jnp.full((4, 5, 6), 0.7))) == 0.0


def test_ncc_ignores_gain_and_offset():
    a, b = (jnp.asarray(x, jnp.float32) for x in _pair((9, 12, 7), 0.06))
    assert float(losses.ncc3d(3.0 * a + 0.2, a)) == pytest.approx(0.0, abs=1e-4)
    assert float(losses.ncc3d(-0.5 * a, a)) == pytest.approx(2.0, abs=1e-4)
    assert float(losses.ncc3d(2.0 * a + 0.1, b)) == pytest.approx(float(losses.ncc3d(a, b)), abs=1e-4)
    assert float(losses.ncc3d(a, b)) == pytest.approx(1 - np.corrcoef(np.ravel(a), np.ravel(b))[0, 1], abs=1e-4)


def test_ncc_averages_over_the_batch():
    a, b = (jnp.asarray(x, jnp.float32) for x in _pair((9, 12, 7), 0.06))
    batch = losses.ncc3d(jnp.stack([a, a]), jnp.stack([a, b]))
    assert float(batch) == pytest.approx(0.5 * float(losses.ncc3d(a, b)), abs=1e-4)


def test_empty_volumes_have_finite_losses_and_gradients():
    empty, full = jnp.zeros((12, 13, 14)), jnp.asarray(_pair((12, 13, 14), 0.06)[1], jnp.float32)
    for loss in (losses.ncc3d, losses.ssim3d, losses.tv3d, losses.l1):
        for target in (empty, full):
            value, gradient = jax.jit(jax.value_and_grad(loss))(empty, target)
            assert np.isfinite(value) and np.all(np.isfinite(gradient)), loss.__name__


def test_a_pose_counts_less_where_its_start_is_far():
    """A miss of 3 mm after a motion of 4 mm and of 40 mm, by the formula."""
    target, prediction = np.tile(np.eye(4, dtype=np.float32), (2, 2, 1, 1))
    target[:, 0, 3], prediction[:, 0, 3] = (4.0, 40.0), (4.0, 40.0)
    prediction[:, 2, 3] = 3.0
    expected = np.mean(3.0 / np.sqrt(1.0 + 0.15 * np.array([4.0, 40.0])))
    np.testing.assert_allclose(losses.pose_from_start(prediction, target), expected, rtol=1e-5)


def test_geodesic_of_known_motions(x64):
    centre = jnp.asarray([20.0, -180.0, 300.0])
    turn = 0.1 * jnp.asarray([0.48, -0.6, 0.64])
    geodesic, motion_about = jax.jit(losses.geodesic), jax.jit(rigid.motion_about)

    def motion(rotation, shift):
        return motion_about(centre, jnp.concatenate([rotation, jnp.asarray(shift)]))

    still = jnp.eye(4)
    assert float(geodesic(still, still, centre)) == 0.0
    assert float(geodesic(motion(turn, [0.0, 0.0, 0.0]), still, centre)) == pytest.approx(2.5, abs=1e-9)
    assert float(geodesic(motion(0 * turn, [3.0, 0.0, -4.0]), still, centre)) == pytest.approx(5.0, abs=1e-9)
    assert float(geodesic(motion(turn, [0.0, 6.0, 0.0]), still, centre)) == pytest.approx(6.5, abs=1e-9)
    batch = jnp.stack([motion(turn, [0.0, 6.0, 0.0]), still])
    assert float(geodesic(batch, jnp.stack([still, still]), centre)) == pytest.approx(3.25, abs=1e-9)
    about_origin = rigid.exp_se3(jnp.concatenate([turn, jnp.zeros(3)]))
    assert float(geodesic(about_origin, still)) == pytest.approx(2.5, abs=1e-9)
    assert np.all(np.isfinite(jax.jit(jax.grad(losses.geodesic))(still, still)))


def _reconstruction_inputs():
    images = [jnp.asarray(x, jnp.float32) for seed in (3, 4) for x in _pair((2, 15, 21), 2.0, seed)]
    volumes = [jnp.asarray(x, jnp.float32) for x in _pair((2, 13, 12, 14), 0.06)]
    return images[:3], volumes


def test_equations_compose_with_the_documented_weights():
    (effect, factual, target), (effect_volume, factual_volume) = _reconstruction_inputs()

    @jax.jit
    def branch(image, volume, ssim=0.2, tv=0.05):
        return losses.l1(image, target) + ssim * losses.ssim2d(image, target) + tv * losses.tv3d(volume)

    wanted = branch(effect, effect_volume) + branch(factual, factual_volume)
    eq2 = jax.jit(losses.cal_reconstruction)(effect, effect_volume, factual, factual_volume, target)
    assert float(eq2) == pytest.approx(float(wanted), rel=1e-6)
    wanted = branch(effect, effect_volume, 0.5, 3.0) + branch(factual, factual_volume, 0.5, 3.0)
    other = jax.jit(losses.cal_reconstruction)(effect, effect_volume, factual, factual_volume, target, 0.5, 3.0)
    assert float(other) == pytest.approx(float(wanted), rel=1e-6)
    pose = jax.jit(rigid.exp_se3)(jnp.asarray([[0.1, -0.2, 0.05, 3.0, -1.0, 2.0], [0.0, 0.1, 0.0, 0.0, 1.0, 0.0]]))
    truth = jnp.stack([jnp.eye(4), jnp.eye(4)])
    eq3 = jax.jit(losses.registration)(effect_volume, factual_volume, pose, truth)
    ncc, ssim = (jax.jit(loss)(effect_volume, factual_volume) for loss in (losses.ncc3d, losses.ssim3d))
    wanted = ncc + ssim + 0.02 * jax.jit(losses.geodesic)(pose, truth)
    assert float(eq3) == pytest.approx(float(wanted), rel=1e-6)
    assert float(losses.total(eq3, eq2)) == pytest.approx(float(eq3 + eq2), rel=1e-7)


def test_a_new_loss_is_three_lines():
    a, b = (jnp.asarray(x, jnp.float32) for x in _pair((12, 14, 13), 0.06))
    terms = [(losses.l1, 1.0), (losses.ssim3d, 0.3), (losses.tv3d, 0.1)]
    loss = lambda volume, target: sum(weight * term(volume, target) for term, weight in terms)
    value, gradient = jax.jit(jax.value_and_grad(loss))(a, b)
    assert float(value) == pytest.approx(sum(float(w * term(a, b)) for term, w in terms), rel=1e-6)
    parts = sum(w * jax.jit(jax.grad(term))(a, b) for term, w in terms)
    np.testing.assert_allclose(gradient, parts, rtol=1e-4, atol=1e-6 * float(jnp.max(jnp.abs(parts))))


@pytest.mark.parametrize(
    "hu,wanted",
    [
        (-5000, 0.0),
        (-1000, 0.0),
        (-500, 0.0096),
        (0, 0.0192),
        (500, 0.03825),
        (1000, 0.0573),
        (3000, 0.1335),
        (9000, 0.1335),
    ],
)
def test_attenuation(hu, wanted):
    assert float(attenuation.from_hounsfield(jnp.asarray(float(hu)))) == pytest.approx(wanted, abs=1e-7)


def test_attenuation_rises_and_is_continuous():
    mu = np.asarray(attenuation.from_hounsfield(jnp.linspace(-1000.0, 3000.0, 4001)))
    assert np.all(np.diff(mu) > 0) and np.max(np.diff(mu)) < 4e-5


def _surface(n=500):
    return np.random.default_rng(5).normal(size=(n, 3)) * [15.0, 9.0, 22.0] + [30.0, -250.0, 410.0]


def test_mtre_of_known_motions():
    points, truth = _surface(), np.eye(4)
    truth[:3, :3] = Rotation.from_rotvec([0.5, -0.2, 0.9]).as_matrix()
    truth[:3, 3] = [9.0, 4.0, -30.0]
    assert metrics.mtre(points, truth, truth) == 0.0
    shifted = truth.copy()
    shifted[:3, 3] += [2.0, -3.0, 6.0]
    assert metrics.mtre(points, shifted, truth) == pytest.approx(7.0, abs=1e-9)
    angle, spin = 0.3, np.eye(4)
    spin[:3, :3] = Rotation.from_rotvec([0.0, angle, 0.0]).as_matrix()
    radius = np.hypot(points[:, 0], points[:, 2])
    wanted = np.mean(2 * radius * np.sin(angle / 2))
    assert metrics.mtre(points, truth @ spin, truth) == pytest.approx(wanted, rel=1e-9)


def _runs(*bins, per_bin=20):
    """Starts and errors with `successes` of `per_bin` runs below 2 mm, for (lower edge, successes) pairs."""
    start = np.concatenate([edge + np.linspace(0.0, 4.99, per_bin) for edge, _ in bins])
    error = np.concatenate([np.where(np.arange(per_bin) < successes, 0.4, 30.0) for _, successes in bins])
    order = np.random.default_rng(6).permutation(len(start))
    return start[order], error[order]


@pytest.mark.parametrize(
    "bins,wanted",
    [
        ([(0, 20), (5, 20), (10, 20)], 15.0),
        ([(0, 20), (5, 19), (10, 18), (15, 20)], 10.0),
        ([(0, 20), (10, 20)], 5.0),
        ([(0, 10), (5, 20)], 0.0),
        ([(5, 20)], 0.0),
    ],
)
def test_capture_range(bins, wanted):
    """Success everywhere, exactly 95 %, a gap without starts, a first bin that fails, no start in the first bin."""
    assert metrics.capture_range(*_runs(*bins)) == wanted


def test_capture_range_at_the_edges():
    assert metrics.capture_range([1.0, 5.0], [0.1, 9.0]) == 5.0
    assert metrics.capture_range([1.0], [2.0]) == 0.0
    assert metrics.capture_range([1.0, 4.0], [np.nan, np.nan]) == 0.0


def _vertebra():
    """Density and mask of an asymmetric body off the middle of the grid, empty space round it."""
    shape = (44, 48, 40)
    x, y, z = (np.arange(n, dtype=float).reshape([-1 if i == a else 1 for i in range(3)]) for a, n in enumerate(shape))
    radius = ((x - 19) / 8) ** 2 + ((y - 26) / 6) ** 2 + ((z - 18) / 10) ** 2 + 0.3 * (x - 19) * (y - 26) / 48
    mask = radius < 1
    texture = ndimage.gaussian_filter(np.random.default_rng(7).normal(size=shape), [1.0, 1.5, 2.0])
    density = np.where(mask, 0.028 + 0.02 * radius + 0.02 * texture, 0.0)
    return np.clip(density, 0.0, 0.06), mask


def test_a_perfect_reconstruction_scores_one():
    density, mask = _vertebra()
    scores = metrics.reconstruction_scores(density, density, metrics.near(mask))
    assert scores["ssim_honest"] == pytest.approx(1.0, abs=1e-5)
    assert scores["ssim_paper"] == pytest.approx(1.0, abs=1e-5)
    assert min(scores["psnr_honest"], scores["psnr_paper"]) > 100.0


def test_worse_shifts_score_worse():
    density, mask = _vertebra()
    scores = [
        metrics.reconstruction_scores(np.roll(density, shift, 1), density, metrics.near(mask)) for shift in (1, 2, 4)
    ]
    for name in scores[0]:
        assert scores[0][name] > scores[1][name] > scores[2][name], name
    # Empty space lifts the paper's protocol: the same shift looks better there.
    assert scores[1]["ssim_paper"] > scores[1]["ssim_honest"] + 0.1
    assert scores[1]["psnr_paper"] > scores[1]["psnr_honest"]


def test_the_paper_protocol_forgives_a_wrong_gain():
    density, mask = _vertebra()
    scores = metrics.reconstruction_scores(0.5 * density, density, metrics.near(mask))
    assert scores["ssim_paper"] == pytest.approx(1.0, abs=1e-4) and scores["psnr_paper"] > 100.0
    assert scores["ssim_honest"] < 0.95
    near = ndimage.distance_transform_edt(~mask) <= 5.0
    wanted = 10 * np.log10(0.06**2 / np.mean((0.5 * density[near]) ** 2))
    assert scores["psnr_honest"] == pytest.approx(wanted, abs=1e-3)


def test_the_honest_protocol_looks_only_near_the_mask():
    density, mask = _vertebra()
    far = ndimage.distance_transform_edt(~mask) > 12.0
    clutter = density + np.where(far, 0.03, 0.0)
    clean = metrics.reconstruction_scores(density, density, metrics.near(mask))
    scores = metrics.reconstruction_scores(clutter, density, metrics.near(mask))
    assert scores["ssim_honest"] == pytest.approx(clean["ssim_honest"], abs=1e-5)
    assert scores["psnr_honest"] == clean["psnr_honest"]
    assert scores["ssim_paper"] < 0.9 and scores["psnr_paper"] < 30.0
