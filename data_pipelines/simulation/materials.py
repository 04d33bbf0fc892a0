"""Attenuation by material and energy, and a CT's split into soft tissue and bone.

Line integrals of every material are kept at the reference energy of the case format, 70 keV. At another energy each is
multiplied by `relative`, so a volume is rendered once per material, whatever the beam.
"""

import functools

import numpy as np
import xraylib

from radgs_jax import attenuation

REFERENCE_KEV = 70.0
"""The energy at which line integrals are kept: that of `radgs_jax.attenuation`."""
SOFT_TISSUE, BONE = "soft tissue", "bone"
METALS = ("titanium", "stainless steel", "cobalt-chrome")
ONLY_SOFT_HU, ONLY_BONE_HU = 100.0, 1000.0
"""Between these a voxel is a mixture: of marrow and soft tissue at the first, and of compact bone at the second."""

# A compound of NIST's list in xraylib, or mass fractions of elements by atomic number; the density in g/cm^3.
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


def attenuation_per_mm(material, energies_kev):
    """Linear attenuation (N,) in 1/mm of a named material at its nominal density, at energies (N,) in keV.

    The coefficients, with coherent scatter, are xraylib's: Schoonjans et al., Spectrochim. Acta B 66 (2011) 776.

    Raises:
      ValueError: an unknown material.
    """
    if material not in _TABLE:
        raise ValueError(f"material {material!r}: wanted one of {sorted(_TABLE)}")
    composition, density = _TABLE[material]
    energies = np.asarray(energies_kev, np.float64).tolist()
    if isinstance(composition, str):
        per_gram = np.array([xraylib.CS_Total_CP(composition, e) for e in energies])
    else:
        share = sum(f for _, f in composition)
        per_gram = np.array([sum(f / share * xraylib.CS_Total(z, e) for z, f in composition) for e in energies])
    return 0.1 * density * per_gram


@functools.cache
def _reference(material):
    return float(attenuation_per_mm(material, [REFERENCE_KEV])[0])


def relative(material, energies_kev):
    """Attenuation (N,) of a material at energies (N,) in keV, over that at the reference energy; raises as `attenuation_per_mm`."""
    return attenuation_per_mm(material, energies_kev) / _reference(material)


def bone_from_hounsfield(hu):
    """The part (any shape, 1/mm at 70 keV) of `attenuation.from_hounsfield` that is bone's; soft tissue is the remainder.

    A voxel is the mixture, by volume, of what `ONLY_SOFT_HU` and `ONLY_BONE_HU` stand for that has its attenuation. Above,
    it is bone, only denser. So the two parts add up to the case format's attenuation.
    """
    ends = attenuation.from_hounsfield(np.array([ONLY_SOFT_HU, ONLY_BONE_HU], np.float32))
    mu = attenuation.from_hounsfield(np.asarray(hu, np.float32))
    mixed = (mu - ends[0]) * (ends[1] / (ends[1] - ends[0]))
    return np.where(mu > ends[1], mu, np.maximum(mixed, 0.0))
