"""The beam: the spectrum of a tungsten tube as a scintillator detects it, at few energies, and its signal behind a body."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_pipelines.simulation import materials

ANODE_DEG = 12.0
"""Angle of the anode, degrees; chosen by hand within the usual range. Half of it hardens the beam, twice it softens it."""
SCINTILLATOR_MM = 0.5
"""Thickness of a solid layer of caesium iodide, mm; chosen by hand. All absorbed energy becomes signal (no K escape). Half of
it weighs low energies more, twice it weighs high energies more."""
NODES = 8
"""Number of energies of the quadrature: the signal is within 0.3 % of direct integration down to 1e-5 of the beam
(`test_a_step_wedge_is_that_of_direct_integration`). Rendering time grows with it."""
_LOWEST_KEV = 12.0
"""Lowest energy of a spectrum, keV; the filters absorb nearly everything below."""
_TUNGSTEN_DENSITY = 19.3
"""g/cm^3."""

# Energy loss of electrons in tungsten, T0^2 - T^2 = C x: T0 in keV, C in keV^2 cm^2 / g (Thomson-Whiddington; values as
# in Poludniowski and Evans, Med. Phys. 34 (2007) 2164). Electrons are deflected, so their depth is about half of their path x.
_LOSS_KEV = (50.0, 80.0, 100.0, 120.0, 150.0)
_LOSS = (565e3, 710e3, 792e3, 865e3, 964e3)
_DEPTH = 0.5
# Bremsstrahlung of a thin layer by (photon energy / electron energy)^i: Birch and Marshall, Phys. Med. Biol. 24 (1979) 505.
_THIN = (0.5034, -0.9469, 0.1550, 1.1633, -0.6818)
# K lines of tungsten and their shares: K alpha 1, K alpha 2, K beta 1 and 3, K beta 2.
_K_EDGE_KEV = 69.525
_LINES_KEV, _LINE_SHARES = (59.318, 57.981, 67.1, 69.1), (0.50, 0.29, 0.165, 0.045)
# Nearly all K photons follow the absorption of bremsstrahlung above the edge (same authors), so their number is proportional
# to its number. The factor gives about 7 % of all photons at 100 kVp and 11 % at 120 kVp.
_K_YIELD = 0.6


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A beam as it is detected.

    Attributes:
      energies_kev: (N,).
      weights: (N,) share of each energy in the signal without a body; their sum is 1.
    """

    energies_kev: np.ndarray
    weights: np.ndarray


def tube_photons(kvp: float, aluminium_mm: float, copper_mm: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Spectrum of a filtered tungsten tube.

    It is the bremsstrahlung of each layer in which the electrons slow down, attenuated by the tungsten above it (Birch and
    Marshall), plus K lines, behind the filters. Half-value layers agree with IEC 61267 within 6 %
    (`test_beam_quality_is_that_of_the_standard_beams`).

    Args:
      kvp: peak voltage, kV.
      aluminium_mm, copper_mm: thickness of the filters.

    Returns:
      energies (N,), keV, 1 keV apart, and photons per keV (N,) on an arbitrary scale.

    Raises:
      ValueError: a peak voltage outside 40 to 150 kV.
    """
    if not 40.0 <= kvp <= 150.0:
        raise ValueError(f"kvp is {kvp}, wanted 40 to 150")
    energies = np.arange(_LOWEST_KEV + 0.5, kvp, 1.0)
    T = (np.arange(480) + 0.5) * (kvp / 480)
    depth_g = _DEPTH * (kvp**2 - T**2) / np.interp(kvp, _LOSS_KEV, _LOSS)
    path_mm = 10.0 * depth_g / _TUNGSTEN_DENSITY / np.tan(np.radians(ANODE_DEG))
    escape = np.exp(-materials.attenuation_per_mm("tungsten", energies)[:, None] * path_mm)
    part = energies[:, None] / T
    layers = np.where(
        part < 1.0, np.polynomial.polynomial.polyval(np.minimum(part, 1.0), _THIN) * (1.0 + T / 511.0), 0.0
    )
    photons = np.sum(layers * escape, 1) / energies
    if kvp > _K_EDGE_KEV:
        bins = np.floor(np.array(_LINES_KEV) - _LOWEST_KEV).astype(int)
        np.add.at(photons, bins, _K_YIELD * photons[energies > _K_EDGE_KEV].sum() * np.array(_LINE_SHARES))
    for metal, thickness in (("aluminium", aluminium_mm), ("copper", copper_mm)):
        photons = photons * np.exp(-thickness * materials.attenuation_per_mm(metal, energies))
    return energies, photons


def detected(energies_kev: np.ndarray, photons: np.ndarray) -> Spectrum:
    """The spectrum of numbers of photons (N,) at energies (N,), keV, as an energy-integrating scintillator detects it."""
    absorbed = 1.0 - np.exp(-SCINTILLATOR_MM * materials.attenuation_per_mm("caesium iodide", energies_kev))
    weights = photons * energies_kev * absorbed
    return Spectrum(energies_kev, weights / weights.sum())


def monochromatic(energy_kev: float = materials.REFERENCE_KEV) -> Spectrum:
    """A spectrum of one energy, keV."""
    return Spectrum(np.array([energy_kev]), np.ones(1))


def few(spectrum: Spectrum) -> Spectrum:
    """Gauss quadrature of a spectrum of at least NODES energies by one of NODES energies.

    It is exact for polynomials of degree 2 NODES - 1 in the energy (Golub and Welsch, Math. Comp. 23 (1969) 221). These
    approximate the transmission well, since no tissue or implant has an absorption edge within the spectrum.
    """
    x = spectrum.energies_kev
    # Lanczos iterations with full reorthogonalization give the Jacobi matrix of the discrete measure.
    basis, diagonal, off_diagonal = [np.sqrt(spectrum.weights)], [], []
    for _ in range(NODES):
        diagonal.append(basis[-1] @ (x * basis[-1]))
        residual = x * basis[-1]
        for _ in range(2):
            residual = residual - np.array(basis).T @ (np.array(basis) @ residual)
        off_diagonal.append(np.linalg.norm(residual))
        basis.append(residual / off_diagonal[-1])
    energies, vectors = np.linalg.eigh(
        np.diag(diagonal) + np.diag(off_diagonal[:-1], 1) + np.diag(off_diagonal[:-1], -1)
    )
    return Spectrum(energies, vectors[0] ** 2)


def tube(kvp: float, aluminium_mm: float, copper_mm: float = 0.0) -> Spectrum:
    """The detected spectrum of a tube at NODES energies; arguments and errors as in `tube_photons`."""
    return few(detected(*tube_photons(kvp, aluminium_mm, copper_mm)))


def transmit(spectrum: Spectrum, line_integrals: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Signal behind a body, relative to that without one, and the variance of its quantum noise.

    Args:
      line_integrals: (H, W) at the reference energy by material. Negative values, which sums of parts may leave in air, count
        as 0.

    Returns:
      signal (H, W): sum over energies of weight exp(-sum over materials of L relative(E)).
      variance_ratio (H, W): the signal's variance divided by signal / (number of quanta detected without a body), which is 1
        for quanta of a single energy; see `panel.noise`.

    Raises:
      ValueError: an unknown material.
    """
    exponent = 0.0
    for material, image in line_integrals.items():
        ratio = materials.relative(material, spectrum.energies_kev).astype(np.float32)
        exponent = exponent + ratio[:, None, None] * np.maximum(image, 0.0)
    passed = np.exp(-exponent) * spectrum.weights.astype(np.float32)[:, None, None]
    signal = passed.sum(0)
    # Of Q quanta without a body, Q w / (E sum(w / E)) have energy E and each adds E to the signal. The mean and the variance
    # of the sum follow.
    mean_energy = np.tensordot(spectrum.energies_kev.astype(np.float32), passed, 1) / np.maximum(signal, 1e-30)
    return signal, mean_energy * np.sum(spectrum.weights / spectrum.energies_kev)
