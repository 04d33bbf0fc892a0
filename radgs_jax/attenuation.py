"""Attenuation from Hounsfield units at an effective energy of 70 keV."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array

WATER_PER_MM = 0.0192
"""Attenuation of water, 1/mm at 70 keV. It scales every simulated image; the gains that refinement fits absorb a common factor."""
BONE_PER_MM = 0.0573
"""Attenuation of bone at 1000 HU, 1/mm at 70 keV. Its ratio to water sets the contrast of bone against soft tissue: half of it
leaves hardly any contrast (1.5 times water instead of 3), twice of it gives 6 times water."""


def from_hounsfield(hu: Real[Array, "*shape"]) -> Float[Array, "*shape"] | np.floating:
    """Attenuation in 1/mm: 0.0192 (1 + HU / 1000) below 0 HU, then linear through 0.0573 at 1000 HU.

    HU are clipped to [-1000, 3000]. Numpy arrays give numpy arrays, because XLA would compile a program for every shape of scan.
    """
    xp = np if isinstance(hu, np.ndarray) else jnp
    hu = xp.clip(hu.astype(xp.float32) if xp.issubdtype(hu.dtype, xp.integer) else hu, -1000.0, 3000.0)
    slope = xp.where(hu < 0, WATER_PER_MM, BONE_PER_MM - WATER_PER_MM).astype(hu.dtype)
    return WATER_PER_MM + slope * hu / 1000.0
