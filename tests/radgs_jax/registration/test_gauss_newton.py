"""Refinement: a vertebra found to a tenth of a millimetre in a body that has moved, whatever the beam."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.drr import drr
from radgs_jax.geometry import rigid
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import projection
from radgs_jax.registration.parts import Parts

CONFIG = gauss_newton.RefineConfig(
    levels=(
        gauss_newton.Level(4.0, 24, 6, 2.0, 4.0, 0.3, 2),
        gauss_newton.Level(2.0, 40, 8, 1.5, 3.0),
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
    return Parts(*(jnp.asarray(a, jnp.float32) for a in (excess, of_excess, rest, of_rest)))


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
refine = functools.partial(gauss_newton.refine, jax.jit(gauss_newton.refine_level, static_argnames=("level", "config")))


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
    assert one.rival_mm > gauss_newton.DISTINCT_MM and one.margin > 0.1


def test_invalid_pixels_do_not_count(parts):
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
    project = jax.jit(lambda pose: projection.project_part(parts.excess, parts.box_from_excess, pose, centre, *cameras))
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


def test_a_projection_moved_by_its_derivatives_is_that_of_the_near_pose(parts):
    """To first order, so that half the motion leaves half the relative error, with derivatives by twists about the new centre."""
    k = jnp.asarray([[350.0, 350.0, 19.5, 19.5]] * 2)
    pose, centre = jnp.asarray(REST, jnp.float32), jnp.asarray([12.0, -9.0, 20.0])

    @jax.jit
    def project(pose, centre):
        rest = parts.rest, parts.box_from_rest, pose, centre
        return projection.project(*rest, k, jnp.asarray(CAMERA_FROM_WORLD, jnp.float32), 40, 0.5, 1.0)

    miss = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    here, other = project(pose, centre), centre + 5.0

    def moved(size):
        twist = size * jnp.asarray([0.02, -0.03, 0.01, 0.8, -0.5, 0.6])
        near = rigid.matmul(rigid.motion_about(centre, twist), pose)
        return projection.project_near(here, near, other), project(near, other)

    for size, least in ((0.5, 0.25), (0.25, 0.13)):
        (image, filtered), wanted = moved(size)
        assert miss(image - here.image, wanted.image - here.image) < least
        filtered_there, filtered_here = wanted.filtered[..., 0, :], here.filtered[..., 0, :]
        assert miss(filtered[..., 0, :] - filtered_here, filtered_there - filtered_here) < least
    (_, filtered), wanted = moved(0.0)
    assert miss(filtered, wanted.filtered) < 1e-5
