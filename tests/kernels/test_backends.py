"""Every backend of splat, voxelize and drr against the definitions in float64."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from kernels.drr import api as drr_api
from kernels.drr import oracle as drr_oracle
from kernels.splat import api as splat_api
from kernels.voxelize import api as voxelize_api


@pytest.mark.parametrize("seed", [10, 11])
@kernel_cases.over_backends(splat_api.BACKENDS)
def test_splat(implementation, seed):
    arrays, cotangent, (wanted, wanted_gradients) = kernel_cases.splat_case(seed)
    image, gradients = kernel_cases.run_single(
        "splat", implementation, (kernel_cases.HEIGHT, kernel_cases.WIDTH), cotangent, *arrays
    )
    assert image.dtype == np.float32
    assert all(kernel_cases.relative_error(a, w) < kernel_cases.IMAGE_TOLERANCE for a, w in zip(image, wanted))
    kernel_cases.assert_gradients_close(gradients, wanted_gradients)


@kernel_cases.over_backends(splat_api.BACKENDS)
def test_splat_of_a_camera_that_is_not_learned(implementation):
    arrays, cotangent, (_, wanted_gradients) = kernel_cases.splat_case(10)
    *cloud, camera = kernel_cases.to_single(*arrays)
    run = lambda *cloud: splat_api.splat(
        *cloud, camera, kernel_cases.HEIGHT, kernel_cases.WIDTH, implementation=implementation
    )
    try:
        gradients = jax.vjp(run, *cloud)[1](jnp.asarray(cotangent, jnp.float32))
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    kernel_cases.assert_gradients_close(gradients, wanted_gradients[:3])


@pytest.mark.parametrize("seed", [12, 13])
@kernel_cases.over_backends(voxelize_api.BACKENDS)
def test_voxelize(implementation, seed):
    arrays, cotangent, (wanted, wanted_gradients) = kernel_cases.voxelize_case(seed)
    volume, gradients = kernel_cases.run_single("voxelize", implementation, kernel_cases.SHAPE, cotangent, *arrays)
    assert volume.dtype == np.float32
    assert all(kernel_cases.relative_error(a, w) < kernel_cases.IMAGE_TOLERANCE for a, w in zip(volume, wanted))
    kernel_cases.assert_gradients_close(gradients, wanted_gradients)


@kernel_cases.over_backends(splat_api.BACKENDS)
def test_splat_batches_are_independent(implementation):
    """Leading axes (3, 1) and no leading axes give what (3,) gives."""
    arrays, cotangent, (wanted, _) = kernel_cases.splat_case(10)
    images, _ = kernel_cases.run_single(
        "splat",
        implementation,
        (kernel_cases.HEIGHT, kernel_cases.WIDTH),
        cotangent[:, None],
        *(a[:, None] for a in arrays),
    )
    assert (
        images.shape == (3, 1, kernel_cases.HEIGHT, kernel_cases.WIDTH)
        and kernel_cases.relative_error(images[:, 0], wanted) < kernel_cases.IMAGE_TOLERANCE
    )
    alone, _ = kernel_cases.run_single(
        "splat", implementation, (kernel_cases.HEIGHT, kernel_cases.WIDTH), cotangent[1], *(a[1] for a in arrays)
    )
    assert (
        alone.shape == (kernel_cases.HEIGHT, kernel_cases.WIDTH)
        and kernel_cases.relative_error(alone, wanted[1]) < kernel_cases.IMAGE_TOLERANCE
    )


@kernel_cases.over_backends(drr_api.FORWARD)
def test_drr(implementation):
    arrays, cotangent = (
        kernel_cases.to_single(
            kernel_cases.smooth_volume(), kernel_cases.voxel_from_camera(), kernel_cases.DRR_CAMERAS
        ),
        kernel_cases.random_cotangent((2, *kernel_cases.DRR_SIZE)),
    )
    wanted, wanted_gradients = kernel_cases.exact_value_and_gradients("drr", kernel_cases.DRR_SIZE, cotangent, *arrays)
    image, gradients = kernel_cases.run_single("drr", implementation, kernel_cases.DRR_SIZE, cotangent, *arrays)
    assert image.dtype == np.float32
    assert all(kernel_cases.relative_error(a, w) < kernel_cases.IMAGE_TOLERANCE for a, w in zip(image, wanted))
    kernel_cases.assert_gradients_close([g.ravel() for g in gradients], [w.ravel() for w in wanted_gradients])


def test_drr_gradients_of_a_rough_volume():
    """To volume, pose and intrinsics in float64: in float32, samples near a voxel face fall into the next cell, where a
    random volume has another slope."""
    volume = np.random.default_rng(3).uniform(size=(12, 15, 10))
    arrays, cotangent = (
        (volume, kernel_cases.voxel_from_camera(), kernel_cases.DRR_CAMERAS),
        kernel_cases.random_cotangent((2, *kernel_cases.DRR_SIZE)),
    )
    wanted, wanted_gradients = kernel_cases.exact_value_and_gradients("drr", kernel_cases.DRR_SIZE, cotangent, *arrays)
    with jax.enable_x64(True):
        image, gradients = kernel_cases.value_and_gradients(
            "drr", "xla", kernel_cases.DRR_SIZE, *map(jnp.asarray, (cotangent, *arrays))
        )
    np.testing.assert_allclose(image, wanted, rtol=0, atol=1e-10 * wanted.max())
    kernel_cases.assert_gradients_close(
        [g.ravel() for g in gradients], [g.ravel() for g in wanted_gradients], 1e-8, 1e-8
    )


@kernel_cases.over_backends(drr_api.PER_RAY)
@pytest.mark.parametrize("step_mm", [0.3, 2.7])
def test_drr_gradients_of_every_ray(implementation, step_mm):
    """Ray by ray, not summed into a pose; a larger volume and image, which backends cut into parts. The truth is XLA's
    backward in float64, which `test_drr_gradients_of_a_rough_volume` holds to the oracle."""
    size, shape = (21, 37), (31, 22, 27)
    volume, *view = kernel_cases.to_single(
        2.0 * kernel_cases.smooth_volume(shape), kernel_cases.voxel_from_camera(shape), 1.7 * kernel_cases.DRR_CAMERAS
    )
    origin, direction = kernel_cases.drr_rays((volume, *view), size)
    cotangent = np.float32(kernel_cases.random_cotangent((2, *size), 4))
    cotangent[:, 5:8, 9:30] = 0.0
    with jax.enable_x64(True):
        exact = (jnp.asarray(a, jnp.float64) for a in (volume, origin, direction, cotangent))
        wanted_image, wanted = kernel_cases.drr_backend(
            "xla", *(a for a in list(exact)[:3]), step_mm, np.float64(cotangent)
        )
    image, gradients = kernel_cases.drr_backend(implementation, volume, origin, direction, step_mm, cotangent)
    assert kernel_cases.relative_error(image, wanted_image) < kernel_cases.IMAGE_TOLERANCE
    assert [g.shape for g in gradients] == [(31, 22, 27), (2, 3), (2, *size, 3)]
    assert not np.any(gradients[2][cotangent == 0])
    kernel_cases.assert_gradients_close(gradients, wanted)


@pytest.mark.parametrize("frame", [None, kernel_cases.camera_from_frame()], ids=["camera", "frame"])
@kernel_cases.over_backends(drr_api.PER_RAY)
def test_drr_and_motion(implementation, frame):
    """Every pixel's derivative to a turn about a frame's origin and a shift of the volume, by the oracle in float64."""
    camera_from_frame = np.tile(np.eye(4), (2, 1, 1)) if frame is None else frame
    arrays = kernel_cases.to_single(
        kernel_cases.smooth_volume(), kernel_cases.voxel_from_camera(), kernel_cases.DRR_CAMERAS
    )
    with jax.enable_x64(True):
        volume, affine, k = (jnp.asarray(a, jnp.float64) for a in arrays)

        def moved(twist):
            w, t = twist[:3], twist[3:]
            inverse = jnp.eye(4).at[:3, :3].add(jnp.cross(jnp.eye(3), w[None]).T).at[:3, 3].set(-t)  # of a small motion
            motion = camera_from_frame @ inverse @ jnp.linalg.inv(camera_from_frame)
            return kernel_cases.ORACLES["drr"](volume, affine @ motion, k, kernel_cases.DRR_SIZE)

        wanted_image, wanted = moved(jnp.zeros(6)), np.asarray(jax.jacfwd(moved)(jnp.zeros(6)))
    try:
        run = functools.partial(drr_api.drr_and_motion, height=14, width=18, implementation=implementation)
        of_frame = {} if frame is None else {"camera_from_frame": jnp.asarray(frame, jnp.float32)}
        image, motion = jax.jit(run)(*arrays, **of_frame)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert kernel_cases.relative_error(image, np.asarray(wanted_image)) < kernel_cases.IMAGE_TOLERANCE
    kernel_cases.assert_gradients_close([motion], [wanted], 1e-4, 1e-4)
    gradient = jax.grad(lambda volume: jnp.sum(drr_api.drr_and_motion(volume, *arrays[1:], 14, 18)[1]))(arrays[0])
    assert not np.any(gradient)  # said not to be differentiable, and quiet about it


@kernel_cases.over_backends(drr_api.FORWARD)
def test_drr_follows_its_step(implementation):
    arrays = kernel_cases.to_single(
        kernel_cases.smooth_volume(), kernel_cases.voxel_from_camera(), kernel_cases.DRR_CAMERAS
    )
    with jax.enable_x64(True):
        wanted = np.asarray(
            drr_oracle.drr(*(jnp.asarray(a, jnp.float64) for a in arrays), *kernel_cases.DRR_SIZE, 2.7, 730.0)
        )
    try:
        image = jax.jit(
            functools.partial(
                drr_api.drr,
                height=kernel_cases.DRR_SIZE[0],
                width=kernel_cases.DRR_SIZE[1],
                step_mm=2.7,
                implementation=implementation,
            )
        )(*arrays)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert kernel_cases.relative_error(image, wanted) < kernel_cases.IMAGE_TOLERANCE
