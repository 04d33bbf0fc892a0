"""A calibrated X-ray: line integrals, the pixels that count, and the camera."""

import dataclasses

import numpy as np

from radgs_jax.geometry import camera as cameras
from radgs_jax.geometry.camera import Camera


@dataclasses.dataclass(frozen=True, eq=False)
class XRay:
    """One view of the patient.

    Attributes:
      line_integrals: (H, W) -ln(I / I0), no unit.
      valid: (H, W) bool, the pixels that count; None stands for all of them.
      camera: `Camera` with arrays (4,) and (4, 4), of the same height and width.

    Raises:
      ValueError: arrays whose shapes are not the camera's.
    """

    line_integrals: np.ndarray
    valid: np.ndarray | None
    camera: Camera

    def __post_init__(self):
        if self.valid is None:
            object.__setattr__(self, "valid", np.ones(np.shape(self.line_integrals), bool))
        if self.camera is None:
            return
        wanted = (self.camera.height, self.camera.width)
        for name in ("line_integrals", "valid"):
            found = np.shape(getattr(self, name))
            if found != wanted:
                raise ValueError(f"XRay: found {name} of shape {found}, wanted {wanted} as its camera says")


def bin_xray(xray: XRay, pixel_mm: float) -> XRay:
    """Averages pixels to about `pixel_mm` at the isocentre; the camera follows exactly.

    A binned pixel is valid where all pixels that it averages are.
    """
    factor = cameras.binning(xray.camera, pixel_mm)
    return XRay(
        cameras.bin_image(xray.line_integrals, factor),
        cameras.bin_image(xray.valid.astype(np.float32), factor) == 1.0,
        cameras.bin(xray.camera, factor),
    )
