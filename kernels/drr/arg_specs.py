"""Named realistic arguments of `drr` for tests and benchmarks: a vertebra's crop of a CT in front of a C-arm."""

import dataclasses

import numpy as np
from scipy.spatial.transform import Rotation

from kernels.common.rays import SOURCE_ISOCENTRE_MM


@dataclasses.dataclass(frozen=True)
class DrrSpec:
    """One volume in front of one camera, with its centre at the isocentre, rotated so that no ray is parallel to its axes.

    Attributes:
      shape: number of voxels per axis.
      spacing_mm: side of a voxel.
      height, width: image size, px.
      pixel_mm: size of a pixel at the isocentre.
      step_mm: distance of samples along a ray.
    """

    shape: tuple[int, int, int]
    spacing_mm: float
    height: int
    width: int
    pixel_mm: float
    step_mm: float

    @property
    def size(self) -> tuple[int, int]:
        """Positional arguments of `drr` after the arrays."""
        return self.height, self.width

    @property
    def options(self) -> dict[str, float]:
        """Keyword arguments of `drr`."""
        return {"step_mm": self.step_mm}

    def describe(self) -> str:
        """A phrase for reports."""
        volume = f"{' x '.join(map(str, self.shape))} voxels of {self.spacing_mm:g} mm"
        return f"{volume}, {self.height} x {self.width} px, a sample every {self.step_mm:g} mm"

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Random float32 arrays: volume (X, Y, Z) 1/mm, voxel_from_camera (1, 3, 4), intrinsics (1, 4) px.

        The volume is an ellipsoid of bone in soft tissue, both with smooth random texture.
        """
        rng = np.random.default_rng(seed)
        axes = np.meshgrid(*(np.linspace(-1.0, 1.0, n) for n in self.shape), indexing="ij", sparse=True)
        waves = rng.normal(size=(8, 3)) * 4.0
        phases = rng.uniform(0.0, 2.0 * np.pi, 8)
        texture = (
            sum(np.sin(sum(w * a for w, a in zip(wave, axes)) + phase) for wave, phase in zip(waves, phases)) / 8.0
        )
        radius2 = sum((a / half) ** 2 for a, half in zip(axes, (0.5, 0.4, 0.3)))
        bone = 1.0 / (1.0 + np.exp(np.minimum(12.0 * (radius2 - 1.0), 60.0)))
        volume = (0.02 + 0.03 * bone) * (1.0 + 0.3 * texture)
        R = Rotation.from_rotvec([0.15, -0.25, 0.1]).as_matrix() / self.spacing_mm
        shift = 0.5 * (np.array(self.shape) - 1) - R @ [0.0, 0.0, SOURCE_ISOCENTRE_MM]
        focal = SOURCE_ISOCENTRE_MM / self.pixel_mm
        intrinsics = np.array([[focal, focal, 0.5 * (self.width - 1), 0.5 * (self.height - 1)]])
        arrays = volume, np.concatenate([R, shift[:, None]], 1)[None], intrinsics
        return tuple(a.astype(np.float32) for a in arrays)


def _crop(pixels):
    """A cube of 96 mm that fills the image; 128 samples for a ray through its middle."""
    return DrrSpec((96, 96, 96), 1.0, pixels, pixels, 96.0 / pixels, 0.75)


SPECS = {
    "tiny": DrrSpec((12, 14, 10), 1.5, 16, 20, 1.2, 1.0),
    "crop_96": _crop(128),
}

GROWTH = {"pixels": tuple(_crop(n) for n in (32, 57, 101, 180, 320))}
"""Series of specs in which one size grows a hundredfold and all else is constant."""
