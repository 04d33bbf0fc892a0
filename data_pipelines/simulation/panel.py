"""What the C-arm does to a beam's signal: pure functions of a signal, a strength and a generator; strength 0 does nothing.

A signal is (H, W), 1 where the full beam arrives without a body, and what a function gives is (H, W) too. Lengths are mm in
the detector's plane; `rng` is an np.random.Generator.
"""

import numpy as np
import scipy

FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))
"""Full width at half maximum of a Gaussian, in standard deviations."""
BODY = 0.5
"""Line integral above which a pixel counts as behind the body."""


def blur(signal, fwhm_mm, pixel_mm):
    """A Gaussian point spread of the given full width at half maximum; the image goes on as its mirror."""
    return _gaussian(signal, fwhm_mm / FWHM / pixel_mm) if fwhm_mm > 0 else signal


def _gaussian(image, sigma_px):
    # By cosine transform: exact for every width, at one price.
    spectrum = scipy.fft.dctn(image, norm="ortho")
    for axis, n in enumerate(image.shape):
        frequency = np.pi * np.arange(n) / n
        factor = np.exp(-0.5 * (sigma_px * frequency) ** 2).astype(image.dtype)
        spectrum *= factor[:, None] if axis == 0 else factor
    return scipy.fft.idctn(spectrum, norm="ortho")


def scatter(signal, line_integral, strength, rng, pixel_mm):
    """Adds scatter of `strength` times the primary signal, both averaged over the pixels behind the body.

    Scatter starts from primary times line integral (Ohnesorge et al., Eur. Radiol. 9 (1999) 563) and spreads as two broad
    Gaussians, the broader the thicker the body: 20 mm and 8 mm for each unit of the mean line integral, and three times
    that, within a random fifth.

    Args:
      signal: the primary; line_integral: (H, W) at 70 keV, of everything.
    """
    behind = line_integral > BODY
    if strength == 0 or not behind.any():
        return signal
    width = (20.0 + 8.0 * line_integral[behind].mean()) * rng.uniform(0.8, 1.2) / pixel_mm
    source = signal * np.maximum(line_integral, 0.0)
    spread = 0.6 * _gaussian(source, width) + 0.4 * _gaussian(source, 3.0 * width)
    return signal + np.maximum(spread, 0.0) * (strength * signal[behind].mean() / spread[behind].mean())


def gain_ramp(signal, strength, rng):
    """Gain that changes linearly across the image in a random direction, by `strength` between its extremes."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    direction = np.array([np.cos(angle), np.sin(angle)])
    v, u = _unit_square(signal.shape)
    return signal * (1.0 + strength * (direction[0] * u + direction[1] * v) / np.abs(direction).sum()).astype(
        np.float32
    )


def vignetting(signal, strength, rng):
    """Gain that falls with the square of the distance from a point near the middle, by about `strength` in the corners."""
    centre = rng.uniform(-0.1, 0.1, 2)
    v, u = _unit_square(signal.shape)
    return signal * (1.0 - strength * 2.0 * ((u - centre[0]) ** 2 + (v - centre[1]) ** 2)).astype(np.float32)


def _unit_square(shape):
    """Rows (H, 1) and columns (1, W) from -0.5 to 0.5."""
    return tuple(np.linspace(-0.5, 0.5, n).reshape(s) for n, s in zip(shape, ((-1, 1), (1, -1))))


def offset(signal, strength, rng):
    """A dark level that has drifted up or down by up to `strength` of the mean signal, unevenly across the image."""
    v, u = _unit_square(signal.shape)
    level, slope = rng.uniform(-0.7, 0.7), rng.uniform(-0.3, 0.3, 2)
    return signal + (strength * signal.mean() * (level + slope[0] * u + slope[1] * v)).astype(np.float32)


def noise(signal, variance_ratio, quanta, electronic_quanta, rng):
    """Poisson noise of the detected quanta, and electronic noise.

    Args:
      variance_ratio: (H, W) of `beam.transmit`; quanta: detected in a pixel without a body, at most 1e12.
      electronic_quanta: standard deviation of the electronic noise, in quanta of the beam without a body.
    """
    # Quanta of many energies add up to a compound Poisson variable. This has its mean and its variance.
    scale = variance_ratio / quanta
    counted = rng.poisson(np.maximum(signal, 0.0) / scale) * scale
    return (counted + rng.normal(0.0, electronic_quanta / quanta, signal.shape)).astype(np.float32)


def air_value(signal, strength, rng):
    """Divides by an air value that is too high or too low by the factor 1 + `strength`."""
    return signal * np.float32((1.0 + strength) ** rng.choice([-1.0, 1.0]))


def collimator(shape, strength, rng, pixel_mm):
    """Share (H, W) of the beam that a random collimator lets through, with a penumbra of 1 mm; 0.1 % pass its lead.

    Two pairs of blades at a random angle, or an iris, at a random place. At `strength` 1 they may close to half of the
    image's sides; at 0 they are away.
    """
    if strength == 0:
        return np.ones(shape, np.float32)
    v, u = (axis * n for axis, n in zip(_unit_square(shape), shape))
    angle, size = rng.uniform(0.0, np.pi), min(shape)
    half = 0.5 * size * (1.0 - strength * rng.uniform(0.0, 0.5, 2))
    centre = rng.uniform(-1.0, 1.0, 2) * (0.5 * size - half) * 0.5
    u, v = u - centre[0], v - centre[1]
    if rng.uniform() < 0.3:
        inside = half.min() - np.hypot(u, v)
    else:
        along, across = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        inside = np.minimum(half[0] - np.abs(along), half[1] - np.abs(across))
    open_share = np.clip(inside * pixel_mm + 0.5, 0.0, 1.0)
    return (1e-3 + (1.0 - 1e-3) * open_share).astype(np.float32)


def line_integrals(signal, quanta):
    """-log (H, W) of a signal, taken to be a quarter of a quantum at least; `quanta`: detected in a pixel without a body."""
    return -np.log(np.maximum(signal, np.float32(0.25 / quanta)))
