"""Radiative Gaussians: a density field that projects, voxelises and moves rigidly in closed form.

The field is the sum of `density * exp(-1/2 (x - mean)' S^-1 (x - mean))`, S = R(quaternion) diag(scale)^2 R', with the
support rule of `kernels.support`. Lengths in mm, density in 1/mm.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from kernels.common import symmetric
from kernels.splat import splat
from kernels.voxelize import voxelize as voxelize_index
from radgs_jax.geometry import rigid

FORMAT = "radgs-gaussians/1"


@flax.struct.dataclass
class Gaussians:
    """density (..., N) 1/mm; mean (..., N, 3) mm; scale (..., N, 3) mm; quaternion (..., N, 4) w, x, y, z (unit)."""

    density: jax.Array
    mean: jax.Array
    scale: jax.Array
    quaternion: jax.Array


def precision(gaussians):
    """Inverse covariance (..., N, 3, 3), 1/mm^2."""
    R = rigid.matrix_from_quaternion(gaussians.quaternion)
    axes = R / gaussians.scale[..., None, :]
    return _sum_outer(axes, axes)


def _sum_outer(a, b):
    """a b' of (..., 3, 3) as three outer products: float32 at full precision on every device.

    Nothing here is a reduction: XLA's CPU backend (jaxlib 0.10.2, YNN fusions) crashes on those of rank 7.
    """
    return sum(a[..., :, None, k] * b[..., None, :, k] for k in range(3))


def move(gaussians, target_from_source):
    """The same field in another rigid frame; target_from_source (..., 4, 4). Exact, nothing is resampled."""
    q = rigid.quaternion_from_matrix(target_from_source[..., :3, :3])
    return gaussians.replace(
        mean=rigid.apply(target_from_source, gaussians.mean),
        quaternion=rigid.multiply_quaternions(q[..., None, :], gaussians.quaternion),
    )


def _harmless(gaussians):
    # One bad Gaussian must not poison the gradient of a pose that all of them share: 0 * nan is nan.
    parts = (gaussians.mean, gaussians.scale, gaussians.quaternion)
    usable = jnp.isfinite(gaussians.density) & jnp.all(jnp.stack([jnp.all(jnp.isfinite(p), -1) for p in parts]), 0)
    mean, scale, quaternion = (jnp.where(usable[..., None], p, 1.0) for p in parts)
    return Gaussians(jnp.where(usable, gaussians.density, 0.0), mean, scale, quaternion)


def _congruent(matrix, symmetric_matrix):
    return symmetric.from_matrix(_sum_outer(_sum_outer(matrix, symmetric_matrix), matrix))


def project(gaussians, camera_from_frame, intrinsics, height, width, *, implementation=None):
    """Line integrals (..., height, width) of a cloud, differentiable in the cloud, the pose and the intrinsics.

    Gaussians with a parameter that is not finite add nothing.

    Args:
      gaussians: batch axes (...) as the cameras'.
      camera_from_frame: (..., 4, 4) rigid, the cloud's frame to the camera's.
      intrinsics: (..., 4) fx, fy, cx, cy; height, width: static pixels; implementation: as `kernels.splat`.
    Raises:
      ValueError: batch axes that do not agree, or an unknown implementation.
    """
    gaussians = _harmless(gaussians)
    mean = rigid.apply(camera_from_frame, gaussians.mean)
    K = _congruent(camera_from_frame[..., None, :3, :3], precision(gaussians))
    return splat(gaussians.density, mean, K, intrinsics, height, width, implementation=implementation)


def voxelize(gaussians, grid, *, implementation=None):
    """Density (..., *grid.shape) in 1/mm at the voxel centres of any affine `VoxelGrid` in the cloud's frame, differentiable.

    Gaussians with a parameter that is not finite add nothing.

    Raises:
      ValueError: an unknown implementation (see `kernels.voxelize`).
    """
    gaussians = _harmless(gaussians)
    A = grid.frame_from_index[..., :3, :3]
    index_from_frame = jnp.linalg.inv(A)
    mean = rigid.apply_rotation(
        index_from_frame[..., None, :, :], gaussians.mean - grid.frame_from_index[..., None, :3, 3]
    )
    K = _congruent(jnp.swapaxes(A, -1, -2)[..., None, :, :], precision(gaussians))
    return voxelize_index(gaussians.density, mean, K, grid.shape, implementation=implementation)


def blur(gaussians, sigma_mm):
    """The field convolved with an isotropic Gaussian of `sigma_mm`: mass is kept, so a coarse grid can sample it."""
    scale = jnp.sqrt(gaussians.scale**2 + sigma_mm**2)
    density = gaussians.density * jnp.prod(gaussians.scale / scale, -1)
    return gaussians.replace(density=density, scale=scale)


def views(gaussians, count):
    """The cloud repeated along a new view axis: (..., N) -> (..., count, N), for `project` under several cameras."""

    def repeat(array, event):
        axis = array.ndim - event
        shape = (*array.shape[:axis], count, *array.shape[axis:])
        return jnp.broadcast_to(jnp.expand_dims(array, axis), shape)

    return Gaussians(
        repeat(gaussians.density, 1),
        repeat(gaussians.mean, 2),
        repeat(gaussians.scale, 2),
        repeat(gaussians.quaternion, 2),
    )


def uniform_cloud(side, spacing_mm, density):
    """side^3 isotropic Gaussians on a regular grid round the origin: the anchors of a reconstruction without a prior.

    Peaks are `density`, 1/mm, standard deviations half of `spacing_mm`.
    """
    axis = (np.arange(side) - 0.5 * (side - 1)) * spacing_mm
    mean = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    n = len(mean)
    quaternion = np.tile([1.0, 0, 0, 0], (n, 1))
    arrays = (np.full(n, density), mean, np.full((n, 3), 0.5 * spacing_mm), quaternion)
    return Gaussians(*(jnp.asarray(a, jnp.float32) for a in arrays))


def from_density(density, frame_from_index, count):
    """Gaussians with the mass, centre and second moments of a voxel density, cell by cell.

    The density is shared out to overlapping cells of a cubic lattice by quadratic B-splines (a partition of unity) and
    each cell's share, the voxels' own extent included, becomes the Gaussian with its mass, centre and covariance, so the
    mass and the centre of the whole are kept. The lattice is the finest one that needs no more than `count` Gaussians.

    Args:
      density: (X, Y, Z) non-negative, 1/mm; frame_from_index: (4, 4) affine, mm; numpy arrays.
      count: number of Gaussians, 27 or more: so many cells share a voxel, however large they are. Unused ones have density 0.
    Returns:
      Gaussians of numpy float32 arrays, sorted by mass.
    Raises:
      ValueError: no positive density, or too few Gaussians.
    """
    if count < 27:
        raise ValueError(f"from_density: count is {count}, wanted 27 or more")
    index = np.argwhere(density > 0)
    if len(index) == 0:
        raise ValueError("from_density: the density has no positive voxel")
    frame_from_index = np.asarray(frame_from_index, np.float64)
    voxel_mm3 = abs(np.linalg.det(frame_from_index[:3, :3]))
    points = index @ frame_from_index[:3, :3].T + frame_from_index[:3, 3]
    mass = density[tuple(index.T)].astype(np.float64) * voxel_mm3
    # A first guess near the answer: as many cells as the volume fills, and half as many again on its surface.
    cell = 1.15 * (np.count_nonzero(density) * voxel_mm3 / count) ** (1 / 3)
    while (used := np.count_nonzero(_heavy(_cell_sums(points, mass, cell, [np.ones_like(mass)])[0]))) > count:
        cell *= max(1.005, (used / count) ** (1 / 3))
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    sums = _cell_sums(
        points, mass, cell, [np.ones_like(mass), *points.T, *(points[:, i] * points[:, j] for i, j in pairs)]
    )
    sums = sums[:, _heavy(sums[0])]
    m, first, second = sums[0], sums[1:4].T, sums[4:].T[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)
    order = np.argsort(-m, kind="stable")
    m, first, second = m[order], first[order], second[order]
    mean = first / m[:, None]
    voxel = frame_from_index[:3, :3] @ frame_from_index[:3, :3].T / 12
    covariance = second / m[:, None, None] - mean[:, :, None] * mean[:, None, :] + voxel
    variance, axes = np.linalg.eigh(covariance)
    axes[np.linalg.det(axes) < 0, :, 0] *= -1
    scale = np.sqrt(np.maximum(variance, (0.15 * cell) ** 2))
    peak = m / ((2 * np.pi) ** 1.5 * scale.prod(1))
    n = len(m)
    result = Gaussians(
        np.zeros(count, np.float32),
        np.zeros((count, 3), np.float32),
        np.full((count, 3), 0.5 * cell, np.float32),
        np.tile(np.float32([1, 0, 0, 0]), (count, 1)),
    )
    result.density[:n], result.mean[:n], result.scale[:n] = peak, mean, scale
    result.quaternion[:n] = scipy.spatial.transform.Rotation.from_matrix(axes).as_quat(scalar_first=True)
    return result


def _heavy(cell_mass):
    # Cells that a B-spline's tail barely touches are dropped: they would cost Gaussians and carry no mass.
    return cell_mass > 1e-4 * cell_mass.max()


def _cell_sums(points, mass, cell, moments):
    """Sums of mass * moment over quadratic B-spline cells of size `cell` mm: (len(moments), cells)."""
    position = points / cell
    nearest = np.rint(position).astype(np.int64)
    f = position - nearest
    weights = np.stack([0.5 * (0.5 - f) ** 2, 0.75 - f**2, 0.5 * (0.5 + f) ** 2])
    low = nearest.min(0) - 1
    shape = nearest.max(0) - low + 2
    sums = np.zeros((len(moments), int(np.prod(shape))))
    for i, j, k in np.ndindex(3, 3, 3):
        at = nearest - low + np.array([i, j, k]) - 1
        flat = (at[:, 0] * shape[1] + at[:, 1]) * shape[2] + at[:, 2]
        w = mass * weights[i, :, 0] * weights[j, :, 1] * weights[k, :, 2]
        for row, moment in enumerate(moments):
            sums[row] += np.bincount(flat, w * moment, minlength=sums.shape[1])
    return sums


def to_arrays(gaussians):
    """Dict of numpy arrays with a format version, for `np.savez`."""
    arrays = {name: np.asarray(getattr(gaussians, name)) for name in ("density", "mean", "scale", "quaternion")}
    return {"format": np.asarray(FORMAT), **arrays}


def from_arrays(arrays):
    """Inverse of `to_arrays`.

    Raises:
      ValueError: another format version.
    """
    if str(arrays["format"]) != FORMAT:
        raise ValueError(f"Gaussians format {str(arrays['format'])!r}, wanted {FORMAT!r}")
    return Gaussians(*(jax.device_put(arrays[name]) for name in ("density", "mean", "scale", "quaternion")))
