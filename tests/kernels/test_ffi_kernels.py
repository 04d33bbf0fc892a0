"""The C++ backends of `splat`, `voxelize` and `drr` against the float64 oracles."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.drr import api as drr_api
from kernels.drr import oracle as drr_oracle
from kernels.splat import api as splat_api
from kernels.splat import oracle as splat_oracle
from kernels.voxelize import api as voxelize_api
from kernels.voxelize import oracle as voxelize_oracle

HEIGHT, WIDTH = 45, 61
SHAPE = (11, 21, 26)
DRR_SHAPE, DRR_SIZE = (37, 25, 30), (19, 35)


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    try:
        splat_api.splat(*_splat_inputs(4), 8, 8, implementation="ffi_cpu")
        voxelize_api.voxelize(*_voxelize_inputs(4), (4, 4, 4), implementation="ffi_cpu")
        drr_api.drr(*_drr_inputs(), 8, 8, implementation="ffi_cpu")
    except NotImplementedError as reason:
        pytest.skip(f"ffi_cpu: {reason}")


def _precision(sigma, rng):
    """Packed precisions (..., 6) of randomly rotated ellipsoids with half-axes sigma (..., 3)."""
    rotation = np.linalg.qr(rng.normal(size=(*sigma.shape[:-1], 3, 3)))[0]
    K = np.einsum("...ij,...j,...kj->...ik", rotation, sigma**-2.0, rotation)
    return K[..., [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]


def _splat_inputs(n, seed=0):
    """Two clouds under two cameras; pixels are 0.8 to 1 mm wide at the clouds, 600 to 760 mm from the source."""
    rng = np.random.default_rng(seed)
    mean = np.stack([rng.uniform(-45, 40, (2, n)), rng.uniform(-30, 35, (2, n)), rng.uniform(600, 760, (2, n))], -1)
    density = rng.uniform(0.002, 0.03, (2, n))
    sigma = rng.uniform(0.6, 5.0, (2, n, 3))
    mean[:, 0] = 0.0, 3.0, -650.0  # behind the source
    mean[:, 1] = 400.0, 0.0, 700.0  # off the image
    density[:, 2] = 0.0
    intrinsics = np.array([[820.0, 760.0, 33.3, 20.2], [700.0, 905.0, 24.9, 27.0]])
    sigma[:, 3] = 0.08, 0.1, 0.12  # below a pixel, and near the centre of pixel (12, 40)
    mean[:, 3] = [((40.05 - cx) / fx * 650, (11.97 - cy) / fy * 650, 650) for fx, fy, cx, cy in intrinsics]
    sigma[:, 4:6], mean[:, 4:6] = (60.0, 90.0, 40.0), (5.0, -8.0, 690.0)  # larger than the image
    if n > 6:
        sigma[:, 6] = 0.7, 0.9, 14.0  # a needle
        mean[:, 7] = 1.0, 2.0, 10.0  # reaches behind the source
        sigma[:, 7] = 6.0
    return tuple(jnp.asarray(a, jnp.float32) for a in (density, mean, _precision(sigma, rng), intrinsics))


def _voxelize_inputs(n, seed=1):
    rng = np.random.default_rng(seed)
    mean = rng.uniform(-2.0, np.array(SHAPE) + 1.0, (2, n, 3))
    density = rng.uniform(0.002, 0.03, (2, n))
    sigma = rng.uniform(0.4, 2.0, (2, n, 3))
    mean[:, 0] = -90.0, 4.0, 5.0  # off the grid
    density[:, 1] = 0.0
    sigma[:, 2] = 0.05, 0.1, 0.08  # below a voxel
    mean[:, 2] = 5.02, 9.97, 11.03
    sigma[:, 3] = 30.0, 50.0, 40.0  # larger than the grid
    if n > 4:
        sigma[:, 4] = 0.5, 0.6, 9.0  # a needle
    return tuple(jnp.asarray(a, jnp.float32) for a in (density, mean, _precision(sigma, rng)))


def _drr_inputs():
    """A smooth volume of voxels of 0.8, 1.1 and 1.9 mm, rotated, off the axis, before two cameras of different pixels."""
    axes = np.meshgrid(*[np.arange(n, dtype=float) for n in DRR_SHAPE], indexing="ij")
    x, y, z = ((a - c) / s for a, c, s in zip(axes, (15.2, 14.1, 13.3), (0.2 * n for n in DRR_SHAPE)))
    volume = 0.03 * np.exp(-0.5 * (x**2 + y**2 + z**2 + 0.6 * x * y - 0.5 * y * z))
    rng = np.random.default_rng(2)
    affines = []
    for shift in ([4.0, -3.0, 690.0], [-5.0, 2.0, 655.0]):
        A = np.diag([1 / 0.8, 1 / 1.1, 1 / 1.9]) @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
        affines.append(np.concatenate([A, ((np.array(DRR_SHAPE) - 1) / 2 - A @ shift)[:, None]], 1))
    intrinsics = np.array([[540.0, 480.0, 17.3, 8.2], [450.0, 505.0, 15.9, 10.0]])
    return tuple(jnp.asarray(a, jnp.float32) for a in (volume, np.stack(affines), intrinsics))


def _with_nan(arrays):
    """Copies in which mean 5 of cloud 1 is NaN and precision 8 of cloud 0 is infinite, and which Gaussians are fine."""
    density, mean, precision, *rest = (np.array(a) for a in arrays)
    mean[1, 5, 1], precision[0, 8, 0] = np.nan, np.inf
    fine = np.isfinite(mean).all(-1) & np.isfinite(precision).all(-1)
    return (density, mean, precision, *rest), fine


def _relative(value, truth):
    value, truth = np.asarray(value, np.float64), np.asarray(truth)
    return np.linalg.norm(value - truth) / np.linalg.norm(truth)


def _value_and_gradients(function, arrays, seed):
    def both(*arrays):
        value, pull = jax.vjp(function, *arrays)
        weights = np.random.default_rng(seed).normal(1.0, 1.0, value.shape)
        return value, pull(jnp.asarray(weights, value.dtype))

    return jax.tree.map(np.asarray, jax.jit(both)(*arrays))


def _truth(oracle, arrays, fine, seed):
    """float64 value and gradients by the oracle, with harmless values for Gaussians that are not finite."""
    density, mean, precision, *rest = arrays
    safe = (
        np.where(fine, density, 0),
        np.where(fine[..., None], mean, (0, 0, 650)),
        np.where(fine[..., None], precision, (1, 0, 0, 1, 0, 1)),
        *rest,
    )
    with jax.enable_x64(True):
        value, gradients = _value_and_gradients(oracle, tuple(np.asarray(a, np.float64) for a in safe), seed)
    masked = [np.where(fine.reshape(fine.shape + (1,) * (g.ndim - 2)), g, 0) for g in gradients[:3]]
    return value, [*masked, *gradients[3:]]


def _check(operator, oracle, arrays):
    arrays, fine = _with_nan(arrays)
    value, gradients = _value_and_gradients(operator, arrays, 7)
    true_value, true_gradients = _truth(oracle, arrays, fine, 7)
    assert np.linalg.norm(true_value) > 0
    assert _relative(value, true_value) < 1e-5
    for ours, truth in zip(gradients, true_gradients, strict=True):
        assert _relative(ours, truth) < 1e-4
    for gradient in gradients[:3]:
        assert np.all(gradient[~fine] == 0)
    for _ in range(3):
        again, more = _value_and_gradients(operator, arrays, 7)
        assert np.array_equal(again, value)
        assert all(np.array_equal(a, b) for a, b in zip(more, gradients, strict=True))


def test_splat_agrees_with_the_oracle_and_repeats_bitwise():
    _check(
        lambda *a: splat_api.splat(*a, HEIGHT, WIDTH, implementation="ffi_cpu"),
        lambda *a: splat_oracle.splat(*a, HEIGHT, WIDTH),
        _splat_inputs(150),
    )


def test_voxelize_agrees_with_the_oracle_and_repeats_bitwise():
    _check(
        lambda *a: voxelize_api.voxelize(*a, SHAPE, implementation="ffi_cpu"),
        lambda *a: voxelize_oracle.voxelize(*a, SHAPE),
        _voxelize_inputs(150),
    )


def test_drr_agrees_with_the_oracle_and_repeats_bitwise():
    arrays = _drr_inputs()
    run = lambda *a: drr_api.drr(*a, *DRR_SIZE, step_mm=0.7, implementation="ffi_cpu")
    value, gradients = _value_and_gradients(run, arrays, 7)
    with jax.enable_x64(True):
        exact = tuple(np.asarray(a, np.float64) for a in arrays)
        true_value, true_gradients = _value_and_gradients(
            lambda *a: drr_oracle.drr(*a, *DRR_SIZE, 0.7, 760.0), exact, 7
        )
    assert _relative(value, true_value) < 1e-5
    for ours, truth in zip(gradients, true_gradients, strict=True):
        assert _relative(ours, truth) < 1e-4
    for _ in range(3):
        again, more = _value_and_gradients(run, arrays, 7)
        assert np.array_equal(again, value)
        assert all(np.array_equal(a, b) for a, b in zip(more, gradients, strict=True))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a processor")
def test_drr_bits_do_not_depend_on_threads(tmp_path):
    """One processor cuts the volume into other slabs than two or more do."""
    script = (
        "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
        "import jax, numpy as np; from kernels.drr import api\n"
        "d = np.load(sys.argv[1]); a = [jax.numpy.asarray(d[f'arr_{i}']) for i in range(4)]\n"
        "value, pull = jax.vjp(lambda *x: api.drr(*x, 19, 35, implementation='ffi_cpu'), *a[:3])\n"
        "np.savez(sys.argv[2], value, *pull(a[3]))"
    )
    arrays = _drr_inputs()
    cotangent = np.random.default_rng(5).normal(1.0, 1.0, (2, *DRR_SIZE)).astype(np.float32)
    np.savez(tmp_path / "in.npz", *arrays, cotangent)
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "in.npz", tmp_path / "out.npz"],
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
    )
    value, pull = jax.vjp(lambda *a: drr_api.drr(*a, *DRR_SIZE, implementation="ffi_cpu"), *arrays)
    with np.load(tmp_path / "out.npz") as out:
        for i, ours in enumerate((value, *pull(jnp.asarray(cotangent)))):
            assert np.any(ours) and np.array_equal(out[f"arr_{i}"], ours)


@pytest.mark.parametrize("argument,kept,dropped", [(0, "volume", "per_ray"), (1, "per_ray", "volume")])
def test_drr_pays_only_for_the_gradient_it_needs(argument, kept, dropped):
    total = lambda *a: jnp.sum(drr_api.drr(*a, *DRR_SIZE, implementation="ffi_cpu"))
    program = jax.jit(jax.grad(total, argument)).lower(*_drr_inputs()).compile().as_text()
    assert f"radgs_drr_{kept}" in program and f"radgs_drr_{dropped}" not in program


def test_drr_of_a_padded_volume_is_that_of_the_volume():
    """Shapes are padded for the sake of few programs."""
    volume, *view = _drr_inputs()
    padded = jnp.pad(volume, [(0, 9), (0, 0), (0, 20)])
    for function in (drr_api.drr, drr_api.drr_and_motion):
        ours = function(padded, *view, *DRR_SIZE, implementation="ffi_cpu")
        truth = function(volume, *view, *DRR_SIZE, implementation="ffi_cpu")
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
            assert _relative(one, other) < 1e-6


@pytest.mark.parametrize("place", [(0, 0, 0), (11, 14, 9), (11, 0, 0), (0, 14, 3), (5, 7, 9), (6, 8, 1)])
def test_drr_sees_a_voxel_wherever_it_lies(place):
    """Zeros at the ends of a volume are passed over."""
    volume, *view = _drr_inputs()
    single = jnp.zeros_like(volume).at[place].set(1.0)
    ours = drr_api.drr(single, *view, *DRR_SIZE, implementation="ffi_cpu")
    # Places along a ray of 700 mm are rounded to about 1e-4 of a voxel, whose slope is steep here.
    assert _relative(ours, drr_api.drr(single, *view, *DRR_SIZE, implementation="xla")) < 1e-4


@pytest.mark.parametrize("arguments,kept", [((0, 1, 2), "backward_of_cloud"), ((3,), "backward")])
def test_splat_pays_for_a_camera_gradient_only_where_it_is_needed(arguments, kept):
    arrays = _splat_inputs(40)
    total = lambda *a: jnp.sum(splat_api.splat(*a, HEIGHT, WIDTH, implementation="ffi_cpu") ** 2)
    some = jax.jit(jax.grad(total, arguments))
    assert re.findall(r'"radgs_splat_(backward\w*)"', some.lower(*arrays).compile().as_text()) == [kept]
    every = jax.grad(total, (0, 1, 2, 3))(*arrays)
    for gradient, i in zip(some(*arrays), arguments, strict=True):
        assert _relative(gradient, every[i]) < 1e-6


@pytest.mark.parametrize("index", [3, 4, 6])
def test_splat_gradients_of_a_single_gaussian(index):
    """Smaller than a pixel, larger than the image, a needle: each alone, so that no other hides its error."""
    density, mean, precision, intrinsics = _splat_inputs(12)
    arrays = density[:, index : index + 1], mean[:, index : index + 1], precision[:, index : index + 1], intrinsics
    value, gradients = _value_and_gradients(
        lambda *a: splat_api.splat(*a, HEIGHT, WIDTH, implementation="ffi_cpu"), arrays, 3
    )
    true_value, true_gradients = _truth(
        lambda *a: splat_oracle.splat(*a, HEIGHT, WIDTH), arrays, np.ones((2, 1), bool), 3
    )
    assert _relative(value, true_value) < 1e-5
    for ours, truth in zip(gradients, true_gradients, strict=True):
        assert _relative(ours, truth) < 1e-4


def test_bits_do_not_depend_on_how_an_image_is_split():
    """One image is cut into bands over threads; a batch of forty is not."""
    arrays = tuple(a[:1] for a in _splat_inputs(150))
    many = tuple(np.repeat(a, 40, 0) for a in arrays)
    draw = lambda *a: splat_api.splat(*a, HEIGHT, WIDTH, implementation="ffi_cpu")
    assert np.array_equal(np.broadcast_to(draw(*arrays), (40, HEIGHT, WIDTH)), draw(*many))
    arrays = tuple(a[:1] for a in _voxelize_inputs(150))
    many = tuple(np.repeat(a, 40, 0) for a in arrays)
    fill = lambda *a: voxelize_api.voxelize(*a, SHAPE, implementation="ffi_cpu")
    assert np.array_equal(np.broadcast_to(fill(*arrays), (40, *SHAPE)), fill(*many))


def test_vmap_is_a_batch_axis():
    arrays = _splat_inputs(40)
    draw = lambda *a: splat_api.splat(*a, HEIGHT, WIDTH, implementation="ffi_cpu")
    assert np.array_equal(jax.vmap(draw)(*arrays), draw(*arrays))
    shared = lambda d: draw(d, *(a[0] for a in arrays[1:]))
    assert np.array_equal(jax.vmap(shared)(arrays[0])[0], draw(*arrays)[0])


def test_drr_vmap_is_a_loop():
    volume, affine, intrinsics = _drr_inputs()
    run = lambda *a: drr_api.drr(*a, *DRR_SIZE, implementation="ffi_cpu")
    poses = jnp.stack([affine, affine[::-1]])
    images = jax.vmap(lambda pose: run(volume, pose, intrinsics))(poses)
    assert np.array_equal(images, np.stack([run(volume, pose, intrinsics) for pose in poses]))
    volumes = jnp.stack([volume, 2.0 * volume[::-1]])
    total = lambda *a: jnp.sum(run(*a) ** 2)
    gradients = jax.vmap(jax.grad(total, (0, 1)), (0, 0, None))(volumes, poses, intrinsics)
    for i in range(2):
        wanted = jax.grad(total, (0, 1))(volumes[i], poses[i], intrinsics)
        assert all(_relative(g[i], w) < 1e-6 for g, w in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("inside", ["jit", "checkpoint", "scan", "vmap"])
@pytest.mark.parametrize("name", ["splat", "voxelize", "drr"])
def test_no_vmap_reaches_the_call_itself(name, inside):
    """The C++ calls have no rule for vmap: it becomes the operators' batch axis, through any other transformation."""
    operator, arrays, place = {
        "splat": (lambda *a: splat_api.splat(*a, HEIGHT, WIDTH, implementation="ffi_cpu"), _splat_inputs(12), 1),
        "voxelize": (lambda *a: voxelize_api.voxelize(*a, SHAPE, implementation="ffi_cpu"), _voxelize_inputs(12), 1),
        "drr": (lambda *a: drr_api.drr(*a, *DRR_SIZE, implementation="ffi_cpu"), _drr_inputs(), 0),
    }[name]
    total = lambda x: jnp.sum(operator(*arrays[:place], x, *arrays[place + 1 :]) ** 2)
    wrapped = {
        "jit": jax.jit(total),
        "checkpoint": jax.checkpoint(total),
        "scan": lambda x: jax.lax.scan(lambda so_far, _: (so_far + total(x), None), 0.0, None, length=1)[0],
        "vmap": lambda x: jax.vmap(total)(x[None])[0],
    }[inside]
    both = jnp.stack([arrays[place], 1.01 * arrays[place]])
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(wrapped)))(both)
    for value, gradient, x in zip(values, gradients, both, strict=True):
        # Compiled as well: drr's rays round otherwise where each operation is run by itself.
        true_value, true_gradient = jax.jit(jax.value_and_grad(total))(x)
        assert _relative(value, true_value) < 1e-6 and _relative(gradient, true_gradient) < 1e-6


def test_no_gaussians_and_no_images():
    for batch, n in (((2,), 0), ((0,), 5), ((), 0)):
        zeros = [np.zeros((*batch, n, *tail), np.float32) for tail in ((), (3,), (6,))]
        camera = np.ones((*batch, 4), np.float32)
        value, gradients = _value_and_gradients(
            lambda *a: splat_api.splat(*a, 9, 7, implementation="ffi_cpu"), (*zeros, camera), 0
        )
        assert value.shape == (*batch, 9, 7) and not value.any()
        assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, (*zeros, camera), strict=True))
        value, gradients = _value_and_gradients(
            lambda *a: voxelize_api.voxelize(*a, (3, 4, 5), implementation="ffi_cpu"), zeros, 0
        )
        assert value.shape == (*batch, 3, 4, 5) and not value.any()
        assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, zeros, strict=True))


def test_other_dtypes_are_left_to_xla():
    with jax.enable_x64(True):
        arrays = tuple(a.astype(jnp.float64) for a in _splat_inputs(8))
        with pytest.raises(NotImplementedError, match="float32 only"):
            splat_api.splat(*arrays, 8, 8, implementation="ffi_cpu")
        assert splat_api.splat(*arrays, 8, 8).dtype == np.float64
        volume, affine, intrinsics = (a.astype(jnp.float64) for a in _drr_inputs())
        with pytest.raises(NotImplementedError, match="float32 only"):
            drr_api.drr(volume, affine, intrinsics, 8, 8, implementation="ffi_cpu")
        to_pose = jax.grad(lambda pose: jnp.sum(drr_api.drr(volume, pose, intrinsics, 8, 8)))
        assert jax.eval_shape(to_pose, affine).dtype == np.float64


def test_without_ffi_xla_gives_the_same(tmp_path):
    script = (
        "import sys, jax, numpy as np\n"
        "from kernels.splat import api as s; from kernels.voxelize import api as v\n"
        "d = np.load(sys.argv[1]); a = [jax.numpy.asarray(d[f'arr_{i}']) for i in range(7)]\n"
        "refused = 0\n"
        "try: s.splat(*a[:4], 45, 61, implementation='ffi_cpu')\n"
        "except NotImplementedError: refused = 1\n"
        "np.savez(sys.argv[2], refused, s.splat(*a[:4], 45, 61), v.voxelize(*a[4:], (11, 21, 26)))"
    )
    splats, volumes = _splat_inputs(60), _voxelize_inputs(60)
    np.savez(tmp_path / "in.npz", *splats, *volumes)
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "in.npz", tmp_path / "out.npz"],
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "RADGS_NO_FFI": "1"},
    )
    with np.load(tmp_path / "out.npz") as out:
        refused, image, volume = (out[f"arr_{i}"] for i in range(3))
    assert refused == 1
    assert _relative(splat_api.splat(*splats, HEIGHT, WIDTH), image) < 1e-5
    assert _relative(voxelize_api.voxelize(*volumes, SHAPE), volume) < 1e-5
