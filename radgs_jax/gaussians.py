"""Radiative Gaussians: a density field that is projected, voxelised and moved rigidly in closed form.

The field is the sum of `density * exp(-1/2 (x - mean)' S^-1 (x - mean))`, S = R(quaternion) diag(scale)^2 R', with the
support rule of `kernels.common.support`. Lengths are in mm, densities in 1/mm.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Float
from jaxtyping import Real

from kernels.common import symmetric
from kernels.common.types import Array
from kernels.common.types import Implementation
from kernels.common.types import Leaf
from kernels.splat import splat
from kernels.voxelize import voxelize as voxelize_index
from radgs_jax.geometry import rigid
from radgs_jax.geometry.grid import VoxelGrid

FORMAT = "radgs-gaussians/1"
CELLS_PER_POINT = 27
"""Number of cells of a quadratic B-spline lattice that share a point: 3 along each axis."""
FIRST_CELL = 1.15
"""Side of the first cell that `from_density` tries, in units of the cube root of the volume per Gaussian. Chosen by hand: the cell
only grows, so a first cell that is too large (twice) uses fewer Gaussians than there are, and one that is too small (half) costs
more rounds."""
MIN_GROWTH = 1.005
"""Smallest factor by which `from_density` enlarges its cell from one round to the next. Chosen by hand: closer to 1 the cloud may
use a few more of its Gaussians, after more rounds."""
MIN_CELL_MASS = 1e-4
"""Fraction of the heaviest cell's mass below which a cell is dropped. Chosen by hand: the mass that it carries (a B-spline's tail)
is negligible, and half or twice of it hardly changes the number of cells."""
MIN_SCALE = 0.15
"""Smallest standard deviation that `from_density` gives, in cells. Chosen by hand: half of it allows thinner Gaussians, which need
finer pixels; twice of it thickens thin bone."""


@flax.struct.dataclass
class Gaussians:
    """A cloud of N Gaussians, or a batch of clouds.

    Attributes:
      density: (..., N) peak, 1/mm.
      mean: (..., N, 3), mm.
      scale: (..., N, 3) standard deviations along the Gaussian's own axes, mm.
      quaternion: (..., N, 4) unit, order w, x, y, z.
    """

    density: Leaf
    mean: Leaf
    scale: Leaf
    quaternion: Leaf


def precision(gaussians: Gaussians) -> Float[jax.Array, "... n 3 3"]:
    """Inverse covariance, 1/mm^2."""
    R = rigid.matrix_from_quaternion(gaussians.quaternion)
    axes = R / gaussians.scale[..., None, :]
    return _sum_outer(axes, axes)


def _sum_outer(a, b):
    """a b' of (..., 3, 3) as three outer products, at full float32 precision on every device.

    It avoids reductions, because XLA's CPU backend (jaxlib 0.10.2, YNN fusions) crashes on reductions of rank 7.
    """
    return cast(jax.Array, sum(a[..., :, None, k] * b[..., None, :, k] for k in range(3)))


def move(gaussians: Gaussians, target_from_source: Float[Array, "*batch 4 4"]) -> Gaussians:
    """The same field in another rigid frame. Exact: nothing is resampled."""
    q = rigid.quaternion_from_matrix(target_from_source[..., :3, :3])
    return dataclasses.replace(
        gaussians,
        mean=rigid.apply(target_from_source, gaussians.mean),
        quaternion=rigid.multiply_quaternions(q[..., None, :], gaussians.quaternion),
    )


def _harmless(gaussians):
    # A pose is shared by all Gaussians, so one that is not finite would make its gradient nan, even at weight 0.
    parts = (gaussians.mean, gaussians.scale, gaussians.quaternion)
    usable = jnp.isfinite(gaussians.density) & jnp.all(jnp.stack([jnp.all(jnp.isfinite(p), -1) for p in parts]), 0)
    mean, scale, quaternion = (jnp.where(usable[..., None], p, 1.0) for p in parts)
    return Gaussians(jnp.where(usable, gaussians.density, 0.0), mean, scale, quaternion)


def _congruent(matrix, symmetric_matrix):
    return symmetric.from_matrix(_sum_outer(_sum_outer(matrix, symmetric_matrix), matrix))


def project(
    gaussians: Gaussians,
    camera_from_frame: Float[Array, "*batch 4 4"],
    intrinsics: Float[Array, "*batch 4"],
    height: int,
    width: int,
    *,
    implementation: Implementation = None,
) -> Float[Array, "*batch {height} {width}"]:
    """Line integrals of a cloud, differentiable in the cloud, the pose and the intrinsics.

    Gaussians with a parameter that is not finite add nothing.

    Args:
      gaussians: with the batch axes of the cameras.
      camera_from_frame: rigid, from the cloud's frame to the camera's.
      intrinsics: fx, fy, cx, cy in pixels.
      height, width: static size of the image, pixels.
      implementation: as in `kernels.splat`.

    Raises:
      ValueError: batch axes that do not agree, or an unknown implementation.
    """
    gaussians = _harmless(gaussians)
    mean = rigid.apply(camera_from_frame, gaussians.mean)
    K = _congruent(camera_from_frame[..., None, :3, :3], precision(gaussians))
    return splat(gaussians.density, mean, K, intrinsics, height, width, implementation=implementation)


def voxelize(
    gaussians: Gaussians, grid: VoxelGrid, *, implementation: Implementation = None
) -> Float[Array, "... x y z"]:
    """Density in 1/mm at the voxel centres of an affine grid in the cloud's frame, differentiable.

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


def blur(gaussians: Gaussians, sigma_mm: float) -> Gaussians:
    """The field convolved with an isotropic Gaussian of `sigma_mm`, for sampling on a coarse grid. Its mass is kept."""
    scale = jnp.sqrt(gaussians.scale**2 + sigma_mm**2)
    density = gaussians.density * jnp.prod(gaussians.scale / scale, -1)
    return dataclasses.replace(gaussians, density=density, scale=scale)


def views(gaussians: Gaussians, count: int) -> Gaussians:
    """The cloud repeated along a new view axis, (..., N) -> (..., count, N), for `project` with several cameras."""

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


def uniform_cloud(side: int, spacing_mm: float, density: float) -> Gaussians:
    """side^3 isotropic Gaussians on a regular grid around the origin: the anchors of a reconstruction without a prior.

    Every peak is `density`, 1/mm; standard deviations are half of `spacing_mm`.
    """
    axis = (np.arange(side) - 0.5 * (side - 1)) * spacing_mm
    mean = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    n = len(mean)
    quaternion = np.tile([1.0, 0, 0, 0], (n, 1))
    arrays = (np.full(n, density), mean, np.full((n, 3), 0.5 * spacing_mm), quaternion)
    return Gaussians(*(jnp.asarray(a, jnp.float32) for a in arrays))


def from_density(
    density: Real[np.ndarray, "x y z"], frame_from_index: Real[np.ndarray, "4 4"], count: int
) -> Gaussians:
    """Fits Gaussians to a voxel density, cell by cell, by mass, centre and second moments.

    Quadratic B-splines (a partition of unity) distribute the density over overlapping cells of a cubic lattice. Each cell's share,
    including the extent of the voxels, becomes the Gaussian with the same mass, centre and covariance, so the mass and the centre
    of the whole are kept. The cell is enlarged until at most `count` Gaussians are needed.

    Args:
      density: non-negative, 1/mm.
      frame_from_index: affine, mm.
      count: number of Gaussians, at least `CELLS_PER_POINT`. Unused ones have density 0.

    Returns:
      Gaussians of numpy float32 arrays, sorted by mass.

    Raises:
      ValueError: no positive density, or too few Gaussians.
    """
    if count < CELLS_PER_POINT:
        raise ValueError(f"from_density: count is {count}, wanted {CELLS_PER_POINT} or more")
    index = np.argwhere(density > 0)
    if len(index) == 0:
        raise ValueError("from_density: the density has no positive voxel")
    frame_from_index = np.asarray(frame_from_index, np.float64)
    voxel_mm3 = abs(np.linalg.det(frame_from_index[:3, :3]))
    points = index @ frame_from_index[:3, :3].T + frame_from_index[:3, 3]
    mass = density[tuple(index.T)].astype(np.float64) * voxel_mm3
    cell = FIRST_CELL * (np.count_nonzero(density) * voxel_mm3 / count) ** (1 / 3)
    while (used := np.count_nonzero(_heavy(_cell_sums(points, mass, cell, [np.ones_like(mass)])[0]))) > count:
        cell *= max(MIN_GROWTH, (used / count) ** (1 / 3))
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
    scale = np.sqrt(np.maximum(variance, (MIN_SCALE * cell) ** 2))
    peak = m / ((2 * np.pi) ** 1.5 * scale.prod(1))
    n = len(m)
    arrays: dict[str, Any] = {
        "density": np.zeros(count, np.float32),
        "mean": np.zeros((count, 3), np.float32),
        "scale": np.full((count, 3), 0.5 * cell, np.float32),
        "quaternion": np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1)),
    }
    arrays["density"][:n], arrays["mean"][:n], arrays["scale"][:n] = peak, mean, scale
    arrays["quaternion"][:n] = scipy.spatial.transform.Rotation.from_matrix(axes).as_quat(scalar_first=True)
    return Gaussians(**arrays)


def _heavy(cell_mass):
    return cell_mass > MIN_CELL_MASS * cell_mass.max()


def _cell_sums(points, mass, cell, moments):
    """Sums of mass * moment over quadratic B-spline cells with sides of `cell` mm: (len(moments), cells)."""
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


def to_arrays(gaussians: Gaussians) -> dict[str, np.ndarray]:
    """Numpy arrays by name, with a format version, for `np.savez`."""
    arrays = {name: np.asarray(getattr(gaussians, name)) for name in ("density", "mean", "scale", "quaternion")}
    return {"format": np.asarray(FORMAT), **arrays}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Gaussians:
    """Inverse of `to_arrays`.

    Raises:
      ValueError: another format version.
    """
    if str(arrays["format"]) != FORMAT:
        raise ValueError(f"Gaussians format {str(arrays['format'])!r}, wanted {FORMAT!r}")
    return Gaussians(*(jax.device_put(arrays[name]) for name in ("density", "mean", "scale", "quaternion")))
