"""Attenuation by material and energy, and the division of a CT into soft tissue and bone.

Line integrals of each material are rendered once, at the reference energy. `relative` scales them to the other energies of a
beam.
"""

import functools
from collections.abc import Sequence

import numpy as np

from radgs_jax import attenuation

REFERENCE_KEV = 70.0
"""Energy of line integrals in the case format and in `radgs_jax.attenuation`, keV."""
SOFT_TISSUE, BONE = "soft tissue", "bone"
METALS = ("titanium", "stainless steel", "cobalt-chrome")
ONLY_SOFT_HU, ONLY_BONE_HU = 100.0, 1000.0
"""HU up to which a voxel is soft tissue alone, and from which it is bone alone; in between it is a mixture by volume. Chosen by
hand. Lower values take more for bone, so that bodies harden the beam more."""

# By material: the name of a compound in xraylib's copy of NIST's list, or mass fractions by atomic number; density, g/cm^3.
# Alloys: Ti-6Al-4V (ASTM F136), 316L steel (ASTM F138), Co-28Cr-6Mo (ASTM F1537), nominal compositions.
_TABLE = {
    "air": ("Air, Dry (near sea level)", 0.001205),
    "water": ("Water, Liquid", 1.0),
    "adipose": ("Adipose Tissue (ICRP)", 0.95),
    SOFT_TISSUE: ("Tissue, Soft (ICRU four-component)", 1.0),
    BONE: ("Bone, Cortical (ICRP)", 1.92),
    "titanium": (((22, 0.90), (13, 0.06), (23, 0.04)), 4.43),
    "stainless steel": (((26, 0.655), (24, 0.17), (28, 0.12), (42, 0.025), (25, 0.02), (14, 0.01)), 8.0),
    "cobalt-chrome": (((27, 0.66), (24, 0.28), (42, 0.06)), 8.3),
    "aluminium": (((13, 1.0),), 2.699),
    "copper": (((29, 1.0),), 8.96),
    "tungsten": (((74, 1.0),), 19.3),
    "caesium iodide": ("Cesium Iodide", 4.51),
}


def attenuation_per_mm(material: str, energies_kev: Sequence[float] | np.ndarray) -> np.ndarray:
    """Linear attenuation (N,), 1/mm, of a material at its nominal density and at energies (N,), keV.

    The coefficients include coherent scatter and come from xraylib: Schoonjans et al., Spectrochim. Acta B 66 (2011) 776.

    Raises:
      ValueError: an unknown material.
    """
    if material not in _TABLE:
        raise ValueError(f"material {material!r}: wanted one of {sorted(_TABLE)}")
    composition, density = _TABLE[material]
    energies = np.asarray(energies_kev, np.float64).tolist()
    import xraylib  # an extra of the package, needed only where X-rays are simulated with all of their physics

    if isinstance(composition, str):
        per_gram = np.array([xraylib.CS_Total_CP(composition, e) for e in energies])
    else:
        share = sum(f for _, f in composition)
        per_gram = np.array([sum(f / share * xraylib.CS_Total(z, e) for z, f in composition) for e in energies])
    return 0.1 * density * per_gram


@functools.cache
def _reference(material):
    return float(attenuation_per_mm(material, [REFERENCE_KEV])[0])


def relative(material: str, energies_kev: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ratio (N,) of a material's attenuation at energies (N,), keV, to that at 70 keV; raises as `attenuation_per_mm`."""
    return attenuation_per_mm(material, energies_kev) / _reference(material)


def bone_from_hounsfield(hu: np.ndarray) -> np.ndarray:
    """The part of `attenuation.from_hounsfield` that bone contributes, 1/mm at 70 keV; soft tissue contributes the rest.

    Between ONLY_SOFT_HU and ONLY_BONE_HU a voxel is the mixture of both, by volume, that has its attenuation. Above, it is
    denser bone.

    Args:
      hu: any shape, HU.
    """
    ends = attenuation.from_hounsfield(np.array([ONLY_SOFT_HU, ONLY_BONE_HU], np.float32))
    mu = attenuation.from_hounsfield(np.asarray(hu, np.float32))
    mixed = (mu - ends[0]) * (ends[1] / (ends[1] - ends[0]))
    return np.where(mu > ends[1], mu, np.maximum(mixed, 0.0))
