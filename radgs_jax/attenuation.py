"""Attenuation from Hounsfield units at an effective energy of 70 keV."""

import jax.numpy as jnp
import numpy as np

WATER_PER_MM = 0.0192
BONE_PER_MM = 0.0573
"""Attenuation of water, and of bone at 1000 HU, 1/mm at 70 keV."""


def from_hounsfield(hu):
    """HU (any shape) -> attenuation in 1/mm: 0.0192 (1 + HU / 1000) below 0 HU, then linear through 0.0573 at 1000 HU.

    HU are clipped to [-1000, 3000]. Numpy in, numpy out: scans of every shape pass here, and each would be compiled for.
    """
    xp = np if isinstance(hu, np.ndarray) else jnp
    hu = xp.clip(hu, -1000.0, 3000.0)
    slope = xp.where(hu < 0, WATER_PER_MM, BONE_PER_MM - WATER_PER_MM).astype(hu.dtype)
    return WATER_PER_MM + slope * hu / 1000.0
