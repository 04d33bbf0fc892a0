"""A calibrated X-ray: line integrals, valid pixels and camera."""

import dataclasses

import numpy as np
from jaxtyping import Bool
from jaxtyping import Shaped

from kernels.common.types import Array
from radgs_jax.geometry import camera as cameras
from radgs_jax.geometry.camera import Camera


@dataclasses.dataclass(frozen=True, eq=False)
class XRay:
    """One view of the patient.

    Attributes:
      line_integrals: -ln(I / I0), no unit.
      valid: pixels that may be used; None, which becomes an array of True, for all of them.
      camera: one view, of the same height and width.

    Raises:
      ValueError: an array's shape is not the camera's.
    """

    line_integrals: Shaped[Array, "..."]
    valid: Bool[Array, "..."] | None
    camera: Camera

    def __post_init__(self):
        if self.valid is None:
            object.__setattr__(self, "valid", np.ones(np.shape(self.line_integrals), bool))
        wanted = (self.camera.height, self.camera.width)
        for name in ("line_integrals", "valid"):
            found = np.shape(getattr(self, name))
            if found != wanted:
                raise ValueError(f"XRay: found {name} of shape {found}, wanted {wanted} as its camera says")


def bin_xray(xray: XRay, pixel_mm: float) -> XRay:
    """Averages pixels to about `pixel_mm` at the isocentre, with the exact camera.

    A binned pixel is valid if all the pixels in its block are.
    """
    assert xray.valid is not None
    factor = cameras.binning(xray.camera, pixel_mm)
    return XRay(
        cameras.bin_image(xray.line_integrals, factor),
        cameras.bin_image(xray.valid.astype(np.float32), factor) == 1.0,
        cameras.bin(xray.camera, factor),
    )
