"""The beam: a tungsten tube's spectrum as a scintillator weighs it, in few energies, and what it leaves behind a body."""

import dataclasses

import numpy as np

from data_pipelines.simulation import materials

ANODE_DEG = 12.0
SCINTILLATOR_MM = 0.5
"""Caesium iodide, as if it were solid; all absorbed energy is taken to become signal (no K escape)."""
NODES = 8
"""Energies of the quadrature: the signal is within 0.3 % of direct integration down to 1e-5 of the beam (see the tests)."""
_LOWEST_KEV = 12.0
_TUNGSTEN_DENSITY = 19.3

# Energy loss of electrons in tungsten, T0^2 - T^2 = C x: T0 in keV, C in keV^2 cm^2 / g (Thomson-Whiddington; values as
# in Poludniowski and Evans, Med. Phys. 34 (2007) 2164). Electrons turn, so their depth is about half of their path x.
_LOSS_KEV = (50.0, 80.0, 100.0, 120.0, 150.0)
_LOSS = (565e3, 710e3, 792e3, 865e3, 964e3)
_DEPTH = 0.5
# Bremsstrahlung of a thin layer by (photon energy / electron energy)^i: Birch and Marshall, Phys. Med. Biol. 24 (1979) 505.
_THIN = (0.5034, -0.9469, 0.1550, 1.1633, -0.6818)
# K lines of tungsten and their shares: K alpha 1, K alpha 2, K beta 1 and 3, K beta 2.
_K_EDGE_KEV = 69.525
_LINES_KEV, _LINE_SHARES = (59.318, 57.981, 67.1, 69.1), (0.50, 0.29, 0.165, 0.045)
# Nearly all K photons follow the absorption of bremsstrahlung from above the edge (same authors), so they go with its
# number. The factor gives about 7 % of all photons at 100 kVp and 11 % at 120.
_K_YIELD = 0.6


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """energies_kev (N,); weights (N,): share of each energy in the detector's signal without a body, sum 1."""

    energies_kev: np.ndarray
    weights: np.ndarray


def tube_photons(kvp, aluminium_mm, copper_mm=0.0):
    """Photons per keV (arbitrary scale) that leave a filtered tungsten tube: energies (N,) in keV, 1 keV apart, and numbers (N,).

    Bremsstrahlung of every layer that the electrons pass while they slow down, less what the tungsten above absorbs (Birch
    and Marshall), K lines, and filters. Half-value layers come within 6 % of those of IEC 61267 (see the tests).

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


def detected(energies_kev, photons):
    """The `Spectrum` of photon numbers (N,) at energies (N,) in keV, as an energy-integrating scintillator weighs them."""
    absorbed = 1.0 - np.exp(-SCINTILLATOR_MM * materials.attenuation_per_mm("caesium iodide", energies_kev))
    weights = photons * energies_kev * absorbed
    return Spectrum(energies_kev, weights / weights.sum())


def monochromatic(energy_kev=materials.REFERENCE_KEV):
    """The `Spectrum` of one energy, keV."""
    return Spectrum(np.array([energy_kev]), np.ones(1))


def few(spectrum):
    """Gauss quadrature of a spectrum of `NODES` energies or more: a `Spectrum` of `NODES` energies.

    Nodes and weights are exact for polynomials of degree 2 NODES - 1 in the energy (Golub and Welsch, Math. Comp. 23 (1969)
    221), which follow what passes a body: no tissue or implant has an edge within the spectrum.
    """
    x = spectrum.energies_kev
    # Lanczos with full reorthogonalisation gives the Jacobi matrix of the discrete measure.
    basis, diagonal, beside = [np.sqrt(spectrum.weights)], [], []
    for _ in range(NODES):
        diagonal.append(basis[-1] @ (x * basis[-1]))
        residual = x * basis[-1]
        for _ in range(2):
            residual = residual - np.array(basis).T @ (np.array(basis) @ residual)
        beside.append(np.linalg.norm(residual))
        basis.append(residual / beside[-1])
    energies, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
    return Spectrum(energies, vectors[0] ** 2)


def tube(kvp, aluminium_mm, copper_mm=0.0):
    """The `Spectrum`, in `NODES` energies, of a tube at `kvp` kV behind mm of filters; raises as `tube_photons`."""
    return few(detected(*tube_photons(kvp, aluminium_mm, copper_mm)))


def transmit(spectrum, line_integrals):
    """Signal behind a body, 1 without one, and how much noisier than single-energy quanta its quanta are.

    Args:
      line_integrals: dict from material to (H, W) line integrals at the reference energy. Negative ones (additive parts
        may leave some in air) count as 0.
    Returns:
      signal (H, W): sum over energies of weight exp(-sum over materials of L relative(E)).
      variance_ratio (H, W): the signal's variance over signal / (quanta detected without a body); see `panel.noise`.
    Raises:
      ValueError: an unknown material.
    """
    exponent = 0.0
    for material, image in line_integrals.items():
        ratio = materials.relative(material, spectrum.energies_kev).astype(np.float32)
        exponent = exponent + ratio[:, None, None] * np.maximum(image, 0.0)
    passed = np.exp(-exponent) * spectrum.weights.astype(np.float32)[:, None, None]
    signal = passed.sum(0)
    # Of Q quanta without a body, Q w / (E sum(w / E)) have energy E. Each adds E: mean and variance of the sum follow.
    mean_energy = np.tensordot(spectrum.energies_kev.astype(np.float32), passed, 1) / np.maximum(signal, 1e-30)
    return signal, mean_energy * np.sum(spectrum.weights / spectrum.energies_kev)
