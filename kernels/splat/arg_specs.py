"""Named realistic arguments of `splat` for tests and benchmarks: clouds around the isocentre of a C-arm."""

import dataclasses

import numpy as np

from kernels.common import rays


@dataclasses.dataclass(frozen=True)
class SplatSpec:
    """One cloud in front of one camera.

    Attributes:
      gaussians: number of Gaussians, N.
      height, width: image size, px.
      pixel_mm: size of a pixel at the isocentre.
      radius_mm: range of the larger 3-sigma half-axis of a Gaussian's outline, scaled to the isocentre; the smaller half-axis
        is 0.5 to 1 of it.
      blob_mm: standard deviation of the means in camera x, y and z.
    """

    gaussians: int
    height: int
    width: int
    pixel_mm: float = 0.75
    radius_mm: tuple[float, float] = (1.5, 4.5)
    blob_mm: tuple[float, float, float] = (29.0, 29.0, 29.0)

    @property
    def size(self) -> tuple[int, int]:
        """Positional arguments of `splat` after the arrays."""
        return self.height, self.width

    @property
    def options(self) -> dict[str, float]:
        """Keyword arguments of `splat`."""
        return {}

    def describe(self) -> str:
        """A phrase for reports."""
        return f"{self.gaussians:,} Gaussians, {self.height} x {self.width} px of {self.pixel_mm:g} mm at the isocentre"

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Random float32 arrays: density (N,) 1/mm, mean (N, 3) mm, precision (N, 6) 1/mm^2, intrinsics (4,) px."""
        rng, n = np.random.default_rng(seed), self.gaussians
        mean = rng.normal(size=(n, 3)) * self.blob_mm + [0.0, 0.0, rays.SOURCE_ISOCENTRE_MM]
        major = rng.uniform(*self.radius_mm, n) / 3.0 * mean[:, 2] / rays.SOURCE_ISOCENTRE_MM
        minor = major * rng.uniform(0.5, 1.0, n)
        angle = rng.uniform(0.0, np.pi, n)
        # A square root of the covariance in (x, y, depth). The first two rows set the outline that the camera sees; the last
        # gives each Gaussian a depth and a tilt that do not change the outline.
        root = np.zeros((n, 3, 3))
        root[:, 0, 0], root[:, 0, 1] = major * np.cos(angle), -minor * np.sin(angle)
        root[:, 1, 0], root[:, 1, 1] = major * np.sin(angle), minor * np.cos(angle)
        root[:, 2] = major[:, None] * np.stack([*rng.uniform(-0.5, 0.5, (2, n)), rng.uniform(0.5, 1.0, n)], -1)
        # Depth runs along the ray through the mean, so that the outline is right off the optical axis too.
        root[:, :2] += mean[:, :2, None] / mean[:, 2, None, None] * root[:, 2:]
        inverse = np.linalg.inv(root)
        K = np.swapaxes(inverse, -1, -2) @ inverse
        precision = np.stack([K[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))], -1)
        focal = rays.SOURCE_ISOCENTRE_MM / self.pixel_mm
        intrinsics = np.array([focal, focal, 0.5 * (self.width - 1), 0.5 * (self.height - 1)])
        arrays = rng.uniform(0.004, 0.02, n), mean, precision, intrinsics
        return tuple(a.astype(np.float32) for a in arrays)


SPECS = {
    "tiny": SplatSpec(200, 32, 40, blob_mm=(6.0, 5.0, 6.0)),
    "paper_10k": SplatSpec(10_000, 256, 256),
    "paper_50k": SplatSpec(50_000, 256, 256),
    "vertebra_10k": SplatSpec(10_000, 128, 128, blob_mm=(13.0, 11.0, 9.0)),
}

_VIEW_MM = 96.0  # side of the image at the isocentre in the series of pixels

GROWTH = {
    "gaussians": tuple(SplatSpec(n, 256, 256) for n in (10_000, 31_623, 100_000, 316_228, 1_000_000)),
    # The same cloud on finer and finer pixels.
    "pixels": tuple(SplatSpec(10_000, n, n, _VIEW_MM / n, blob_mm=(13.0, 11.0, 9.0)) for n in (64, 114, 202, 360, 640)),
}
"""Series of specs in which one size grows a hundredfold; all else is constant, including footprints in mm."""
