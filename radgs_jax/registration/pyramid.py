"""X-rays on the device, binned to several resolutions."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.geometry.fill import fill
from radgs_jax.geometry.xray import bin_xray
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration.gauss_newton import LevelViews
from radgs_jax.registration.parts import on_device


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """X-rays of one case on the device.

    Attributes:
      levels: `LevelViews` at each resolution.
      camera_from_world: (V, 4, 4), mm.
    """

    levels: list[LevelViews]
    camera_from_world: Float[Array, "views 4 4"]


def at_resolution(xrays: Sequence[XRay], pixel_mm: float) -> LevelViews:
    """X-rays binned to about `pixel_mm` at the isocentre, with what is invalid filled so that it makes no edges."""
    binned = [bin_xray(xray, pixel_mm) for xray in xrays]
    return LevelViews(
        [on_device(fill(xray.line_integrals, np.asarray(xray.valid))) for xray in binned],
        [jax.device_put(xray.valid) for xray in binned],
        on_device(np.stack([xray.camera.intrinsics for xray in binned])),
    )


def make_pyramid(xrays: Sequence[XRay], pixels_mm: Sequence[float]) -> Pyramid:
    """X-rays binned to about each of `pixels_mm` at the isocentre."""
    levels = [at_resolution(xrays, pixel_mm) for pixel_mm in pixels_mm]
    return Pyramid(levels, on_device([xray.camera.camera_from_world for xray in xrays]))
