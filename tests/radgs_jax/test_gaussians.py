"""Clouds of Gaussians: projection against voxelisation, gradients against finite differences, fits to a density."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from kernels.drr import drr
from radgs_jax import gaussians
from radgs_jax.geometry import grid as grids
from radgs_jax.geometry import rigid

HEIGHT, WIDTH = 24, 31
INTRINSICS = np.array([[330.0, 360.0, 13.4, 12.9], [290.0, 270.0, 17.8, 9.6]])
CENTRE = np.array([3.0, -5.0, 8.0])


def _cloud(seed, n, scales, spread=(14.0, 9.0, 12.0)):
    """Anisotropic, rotated, off the origin; float64 under x64, float32 else."""
    rng = np.random.default_rng(seed)
    quaternion = Rotation.random(n, rng).as_quat(scalar_first=True)
    density, mean = rng.uniform(0.004, 0.03, n), rng.normal(size=(n, 3)) * spread + CENTRE
    scale = rng.uniform(*scales, (n, 3))
    return gaussians.Gaussians(*map(jnp.asarray, (density, mean, scale, quaternion)))


def _poses():
    """Two cameras 700 mm off, from different sides and not along an axis."""
    T = np.tile(np.eye(4), (2, 1, 1))
    T[:, :3, :3] = Rotation.from_rotvec([[0.6, -0.9, 0.3], [-0.2, 1.4, 0.8]]).as_matrix()
    T[:, :3, 3] = [[2.0, -4.0, 700.0], [-6.0, 3.0, 640.0]]
    return jnp.asarray(T)


def _rotated_grid(shape, spacing, middle=CENTRE):
    """A voxel grid whose axes are turned against the frame's."""
    A = Rotation.from_rotvec([-0.4, 0.7, 0.5]).as_matrix() @ np.diag(spacing)
    frame_from_index = np.eye(4)
    frame_from_index[:3, :3] = A
    frame_from_index[:3, 3] = middle - A @ (np.array(shape) - 1) / 2
    return grids.VoxelGrid(jnp.asarray(frame_from_index), tuple(shape))


@functools.partial(jax.jit, static_argnames="size")
def _render(volume, frame_from_index, camera_from_frame, intrinsics, size=(HEIGHT, WIDTH)):
    index_from_camera = jnp.linalg.inv(frame_from_index) @ rigid.inverse(camera_from_frame)
    return drr(volume, index_from_camera[:, :3], intrinsics, *size, step_mm=0.5)


def _relative(actual, wanted):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)


@jax.jit
def _project_views(cloud, poses, intrinsics):
    return gaussians.project(gaussians.views(cloud, 2), poses, intrinsics, HEIGHT, WIDTH)


def _centres(grid):
    affine = np.asarray(grid.frame_from_index, np.float64)
    return np.moveaxis(np.indices(grid.shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def _project(cloud, poses=None, intrinsics=INTRINSICS):
    return _project_views(cloud, _poses() if poses is None else poses, jnp.asarray(intrinsics))


_voxelize = jax.jit(gaussians.voxelize)


def test_precision_is_the_inverse_covariance(x64):
    cloud = _cloud(0, 6, (1.0, 5.0))
    R = Rotation.from_quat(np.asarray(cloud.quaternion), scalar_first=True).as_matrix()
    covariance = np.einsum("nij,nj,nkj->nik", R, np.asarray(cloud.scale) ** 2, R)
    np.testing.assert_allclose(gaussians.precision(cloud), np.linalg.inv(covariance), rtol=0, atol=1e-12)


def test_voxelize_samples_the_field_at_voxel_centres(x64):
    """On an anisotropic rotated grid, where the rule does not cut: the plain sum at the grid's own points."""
    cloud, grid = _cloud(1, 3, (9.0, 15.0), (2.0, 1.0, 3.0)), _rotated_grid((5, 8, 4), (0.7, 0.9, 2.5))
    r = _centres(grid)[..., None, :] - np.asarray(cloud.mean)
    q = np.einsum("...ni,nij,...nj->...n", r, np.asarray(gaussians.precision(cloud)), r)
    np.testing.assert_allclose(_voxelize(cloud, grid), np.sum(cloud.density * np.exp(-0.5 * q), -1), rtol=1e-9)


@pytest.mark.parametrize("seed", [2, 3])
def test_projected_cloud_is_its_voxels_marched(seed):
    """Two independent ways to one image: sigma from 1.5 voxels of the coarsest axis, grid anisotropic and rotated."""
    cloud, grid = _cloud(seed, 40, (3.75, 8.0)), _rotated_grid((120, 118, 40), (0.7, 0.7, 2.5))
    poses, intrinsics = _poses(), jnp.asarray(INTRINSICS, jnp.float32)
    marched = _render(_voxelize(cloud, grid), grid.frame_from_index, poses, intrinsics)
    image = _project(cloud)
    for one, other in zip(marched, image):
        assert _relative(one, other) < 0.01


def test_leading_axes_are_only_a_batch():
    """Any number of them, in the gradient too: three once crashed XLA's CPU backend."""
    cloud = jax.tree.map(
        lambda *a: jnp.stack(a).reshape(2, 2, 2, *a[0].shape), *[_cloud(i, 24, (2.0, 5.0)) for i in range(8)]
    )
    poses, intrinsics = (
        jnp.tile(jnp.asarray(a, jnp.float32), (4,) + (1,) * (a.ndim - 1)) for a in (_poses(), INTRINSICS)
    )

    def energy(cloud, poses, intrinsics):
        return jnp.sum(gaussians.project(cloud, poses, intrinsics, HEIGHT, WIDTH) ** 2)

    gradient = jax.jit(jax.grad(energy))
    deep = gradient(cloud, poses.reshape(2, 2, 2, 4, 4), intrinsics.reshape(2, 2, 2, 4))
    flat = gradient(jax.tree.map(lambda a: a.reshape(8, *a.shape[3:]), cloud), poses, intrinsics)
    for one, other in zip(jax.tree.leaves(deep), jax.tree.leaves(flat)):
        assert float(jnp.abs(other).max()) > 0
        np.testing.assert_allclose(one.reshape(other.shape), other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


# Gradients.


def _finite_differences(function, x, step):
    """Central differences of a scalar function at a flat x, each entry with its own step."""
    eye = np.eye(x.size) * step
    return np.array([(float(function(x + e)) - float(function(x - e))) / (2 * h) for e, h in zip(eye, np.diag(eye))])


def _check_gradient(function, parameters, steps):
    """All entries of every parameter of `parameters` (name -> array) within 1e-3 of central differences."""
    # One compilation serves both: it costs more than the spare gradients.
    value_and_gradients = jax.jit(jax.value_and_grad(function))
    gradients = value_and_gradients(parameters)[1]
    for name, x in parameters.items():

        def of_one(flat):
            return value_and_gradients({**parameters, name: jnp.asarray(flat).reshape(x.shape)})[0]

        numeric = _finite_differences(of_one, np.asarray(x).ravel(), steps[name]).reshape(x.shape)
        exact = np.asarray(gradients[name])
        assert np.linalg.norm(exact - numeric) < 1e-3 * np.linalg.norm(numeric), name
        # Entry by entry too; an entry may be small beside the largest, so the floor is 1e-6 of that.
        np.testing.assert_allclose(exact, numeric, rtol=1e-3, atol=1e-6 * np.max(np.abs(numeric)), err_msg=name)


STEPS = {"density": 1e-6, "mean": 1e-4, "scale": 1e-4, "quaternion": 1e-5, "intrinsics": 1e-3, "twist": 1e-5}


def _fields(cloud):
    return {name: getattr(cloud, name) for name in ("density", "mean", "scale", "quaternion")}


def test_gradients_of_project(x64):
    """Cloud, intrinsics, and the pose as a twist about the centre, through two views at once."""
    weights = np.random.default_rng(5).normal(size=(2, HEIGHT, WIDTH)) + 0.2
    twist = jnp.asarray([0.03, -0.05, 0.02, 1.0, -2.0, 0.5])
    parameters = {**_fields(_cloud(4, 5, (2.0, 6.0))), "intrinsics": jnp.asarray(INTRINSICS), "twist": twist}

    def function(p):
        poses = _poses() @ rigid.motion_about(jnp.asarray(CENTRE), p["twist"])
        cloud = gaussians.Gaussians(*(p[name] for name in ("density", "mean", "scale", "quaternion")))
        return jnp.sum(weights * _project(cloud, poses, p["intrinsics"]))

    _check_gradient(function, parameters, STEPS)


def test_gradients_of_voxelize(x64):
    """Spacing (0.7, 0.7, 2.5) on a rotated grid, where a voxel size on the wrong side of a gradient shows."""
    grid = _rotated_grid((18, 21, 9), (0.7, 0.7, 2.5))
    weights = np.random.default_rng(6).normal(size=grid.shape) + 0.2
    parameters = _fields(_cloud(7, 4, (2.0, 5.0), (4.0, 3.0, 5.0)))

    def function(p):
        return jnp.sum(weights * _voxelize(gaussians.Gaussians(*(p[name] for name in parameters)), grid))

    _check_gradient(function, parameters, STEPS)


def test_pose_gradient_at_the_identity(x64):
    """The twist's gradient at 0 is the sum of moments of the mean's and covariance's; finite differences know."""
    weights = np.random.default_rng(8).normal(size=(2, HEIGHT, WIDTH)) + 0.2
    cloud = _cloud(9, 5, (2.0, 6.0))

    def function(p):
        return jnp.sum(weights * _project(gaussians.move(cloud, rigid.motion_about(jnp.asarray(CENTRE), p["twist"]))))

    _check_gradient(function, {"twist": jnp.zeros(6)}, STEPS)


def test_a_bad_gaussian_leaves_the_others_alone():
    cloud = _cloud(10, 5, (2.0, 6.0))
    bad = cloud.replace(mean=cloud.mean.at[2, 1].set(jnp.nan))
    good = cloud.replace(density=cloud.density.at[2].set(0.0))
    np.testing.assert_allclose(_project(bad), _project(good), rtol=0, atol=1e-6)
    gradient_of = jax.jit(jax.grad(lambda c: jnp.sum(_project(c) ** 2)))
    gradient, wanted = gradient_of(bad), gradient_of(good)
    keep = np.array([0, 1, 3, 4])
    for a, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted)):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a[keep], w[keep], rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(w))))


def test_a_bad_gaussian_leaves_the_pose_gradient_finite():
    cloud = _cloud(10, 5, (2.0, 6.0))
    bad = cloud.replace(mean=cloud.mean.at[2, 1].set(jnp.nan))

    def function(twist):
        return jnp.sum(_project(bad, _poses() @ rigid.motion_about(jnp.asarray(CENTRE, jnp.float32), twist)) ** 2)

    assert np.all(np.isfinite(jax.jit(jax.grad(function))(jnp.zeros(6))))


# Motion, blur, storage.


def test_moving_the_cloud_is_moving_the_camera(x64):
    cloud = _cloud(11, 5, (2.0, 6.0))
    motion = rigid.motion_about(jnp.asarray(CENTRE), jnp.asarray([0.5, -0.3, 0.9, 7.0, -4.0, 2.0]))
    wanted = _project(cloud, _poses() @ motion)
    np.testing.assert_allclose(_project(gaussians.move(cloud, motion)), wanted, rtol=0, atol=1e-9 * float(wanted.max()))
    assert _relative(_project(cloud), wanted) > 0.1
    back = gaussians.move(gaussians.move(cloud, motion), rigid.inverse(motion))
    np.testing.assert_allclose(back.mean, cloud.mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(gaussians.precision(back), gaussians.precision(cloud), rtol=0, atol=1e-12)


def _mass(cloud):
    volume = (2 * np.pi) ** 1.5 * np.prod(np.asarray(cloud.scale, np.float64), -1)
    return float(np.sum(np.asarray(cloud.density, np.float64) * volume))


def test_blur_keeps_the_mass_and_adds_the_variance(x64):
    cloud = _cloud(12, 20, (0.5, 6.0))
    wide = gaussians.blur(cloud, 2.5)
    assert _mass(wide) == pytest.approx(_mass(cloud), rel=1e-12)
    added = np.linalg.inv(np.asarray(gaussians.precision(wide))) - np.linalg.inv(np.asarray(gaussians.precision(cloud)))
    np.testing.assert_allclose(added, np.tile(6.25 * np.eye(3), (20, 1, 1)), rtol=0, atol=1e-9)


def test_arrays_round_trip(tmp_path):
    cloud = _cloud(13, 7, (1.0, 5.0))
    np.savez(tmp_path / "cloud.npz", **gaussians.to_arrays(cloud))
    with np.load(tmp_path / "cloud.npz") as arrays:
        back = gaussians.from_arrays(arrays)
    chex.assert_trees_all_equal(back, cloud, strict=True)


def test_unknown_format_is_refused():
    arrays = {**gaussians.to_arrays(_cloud(13, 7, (1.0, 5.0))), "format": np.asarray("radgs-gaussians/2")}
    with pytest.raises(ValueError, match="radgs-gaussians/2.*radgs-gaussians/1"):
        gaussians.from_arrays(arrays)


def test_views_repeats_the_cloud():
    cloud = _cloud(14, 6, (1.0, 5.0))
    pair = gaussians.views(cloud, 2)
    chex.assert_shape(jax.tree.leaves(pair), [(2, 6), (2, 6, 3), (2, 6, 3), (2, 6, 4)])
    for i in range(2):
        chex.assert_trees_all_equal(jax.tree.map(lambda a: a[i], pair), cloud)


# A cloud fitted to a density.


def _vertebra():
    """An asymmetric bone-like density on a rotated anisotropic grid: body, canal, two processes, off the middle; mm."""
    grid = _rotated_grid((64, 56, 36), (0.9, 1.1, 1.7))
    frame = _centres(grid) - CENTRE - [2.0, -4.0, 1.5]
    x, y, z = np.moveaxis(frame, -1, 0)
    body = (x / 17) ** 2 + ((y - 8) / 12) ** 2 + np.abs(z / 13) ** 4 < 1
    arch = (((x - 2) / 14) ** 2 + ((y + 9) / 8) ** 2 + (z / 9) ** 2 < 1) & ((x / 7) ** 2 + ((y + 6) / 6) ** 2 > 1)
    process = ((x + 1.5) / 3.5) ** 2 + ((y + 18) / 9) ** 2 + ((z + 5 + 0.3 * y) / 6) ** 2 < 1
    transverse = ((x - 15) / 11) ** 2 + ((y + 6) / 3.5) ** 2 + ((z - 3) / 4) ** 2 < 1
    shell = (x / 15) ** 2 + ((y - 8) / 10.5) ** 2 + np.abs(z / 11.5) ** 4 > 1
    density = np.where(body | arch | process | transverse, 0.022 + 0.02 * shell + 0.0002 * x, 0.0)
    return density.astype(np.float32), np.asarray(grid.frame_from_index)


@pytest.fixture(scope="module")
def fitted():
    density, frame_from_index = _vertebra()
    return density, frame_from_index, gaussians.from_density(density, frame_from_index, 512)


def test_from_density_keeps_mass_and_centre(fitted):
    density, frame_from_index, cloud = fitted
    index = np.argwhere(density > 0)
    points, mass = index @ frame_from_index[:3, :3].T + frame_from_index[:3, 3], density[density > 0].astype(np.float64)
    voxel_mm3 = abs(np.linalg.det(frame_from_index[:3, :3]))
    assert _mass(cloud) == pytest.approx(mass.sum() * voxel_mm3, rel=0.003)
    weight = cloud.density.astype(np.float64) * cloud.scale.prod(-1)
    centre = weight @ cloud.mean / weight.sum()
    size = np.sqrt(np.mean(np.sum((points - points.mean(0)) ** 2, -1)))
    assert np.linalg.norm(centre - mass @ points / mass.sum()) < 0.003 * size


def test_from_density_is_a_valid_cloud(fitted):
    _, _, cloud = fitted
    assert cloud.density.shape == (512,) and all(np.all(np.isfinite(a)) for a in jax.tree.leaves(cloud))
    assert np.all(cloud.density >= 0) and np.all(cloud.scale > 0) and np.count_nonzero(cloud.density) > 256
    np.testing.assert_allclose(np.linalg.norm(cloud.quaternion, axis=-1), 1.0, atol=1e-5)
    mass = cloud.density.astype(np.float64) * cloud.scale.prod(-1)
    assert np.all(np.diff(mass) <= 1e-6 * mass[0])


def test_from_density_projects_like_the_density(fitted):
    density, frame_from_index, cloud = fitted
    size, intrinsics = (48, 62), jnp.asarray(2.0 * INTRINSICS + [0.0, 0.0, 0.5, 0.5], jnp.float32)
    image = gaussians.project(gaussians.views(jax.tree.map(jnp.asarray, cloud), 2), _poses(), intrinsics, *size)
    marched = _render(jnp.asarray(density), jnp.asarray(frame_from_index, jnp.float32), _poses(), intrinsics, size)
    for one, other in zip(image, marched):
        assert _relative(one, other) < 0.15


def test_from_density_refuses_an_empty_volume():
    with pytest.raises(ValueError, match="no positive voxel"):
        gaussians.from_density(np.zeros((5, 6, 7), np.float32), np.eye(4), 64)


def test_from_density_refuses_fewer_gaussians_than_cells_at_a_voxel():
    density = np.pad(np.ones((3, 4, 2), np.float32), 2)
    assert np.count_nonzero(gaussians.from_density(density, np.eye(4), 27).density)
    with pytest.raises(ValueError, match="count is 26"):
        gaussians.from_density(density, np.eye(4), 26)
