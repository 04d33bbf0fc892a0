"""Named realistic arguments of `voxelize` for tests and benchmarks: clouds in a cube of 96 mm."""

import dataclasses

import numpy as np
from scipy.spatial.transform import Rotation

SIDE_MM = 96.0
"""Side of the cube, of the order of a vertebra's crop. Chosen by hand."""


@dataclasses.dataclass(frozen=True)
class VoxelizeSpec:
    """One cloud on one grid.

    Attributes:
      gaussians: number of Gaussians, N.
      shape: number of voxels per axis.
      voxel_mm: side of a voxel.
      radius_mm: range of the 3-sigma half-axes, each drawn independently.
      blob_mm: standard deviation of the means per axis.
    """

    gaussians: int
    shape: tuple[int, int, int]
    voxel_mm: float
    radius_mm: tuple[float, float] = (2.25, 5.25)
    blob_mm: tuple[float, float, float] = (14.0, 14.0, 14.0)

    @property
    def size(self) -> tuple[tuple[int, int, int]]:
        """Positional arguments of `voxelize` after the arrays."""
        return (self.shape,)

    @property
    def options(self) -> dict[str, float]:
        """Keyword arguments of `voxelize`."""
        return {}

    def describe(self) -> str:
        """A phrase for reports."""
        return f"{self.gaussians:,} Gaussians, {' x '.join(map(str, self.shape))} voxels of {self.voxel_mm:g} mm"

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Random float32 arrays: density (N,) 1/mm, mean (N, 3) in voxel indices, precision (N, 6) 1/voxel^2."""
        rng, n = np.random.default_rng(seed), self.gaussians
        mean_mm = rng.normal(size=(n, 3)) * self.blob_mm
        axes = Rotation.random(n, rng).as_matrix() / (rng.uniform(*self.radius_mm, (n, 1, 3)) / 3.0 / self.voxel_mm)
        K = axes @ np.swapaxes(axes, -1, -2)
        precision = np.stack([K[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))], -1)
        mean = mean_mm / self.voxel_mm + 0.5 * (np.array(self.shape) - 1)
        return tuple(a.astype(np.float32) for a in (rng.uniform(0.004, 0.02, n), mean, precision))


def _cube(gaussians, side):
    return VoxelizeSpec(gaussians, (side, side, side), SIDE_MM / side)


SPECS = {
    "tiny": VoxelizeSpec(200, (16, 20, 12), 1.5, blob_mm=(5.0, 6.0, 4.0)),
    "paper_50k_64": _cube(50_000, 64),
    "paper_50k_128": _cube(50_000, 128),
}

GROWTH = {
    "gaussians": tuple(_cube(n, 64) for n in (10_000, 31_623, 100_000, 316_228, 1_000_000)),
    "voxels": tuple(_cube(10_000, side) for side in (28, 41, 60, 88, 130)),
}
"""Series of specs in which one size grows a hundredfold; all else is constant, including footprints in mm."""
