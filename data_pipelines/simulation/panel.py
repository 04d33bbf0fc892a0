"""Effects of the panel and of the beam's path on a signal: blur, scatter, gain, offset, noise and collimation.

A signal is (H, W) float32, 1 where the full beam arrives without a body. Each effect takes a signal, a strength and a random
generator and returns a signal; strength 0 leaves it unchanged. Lengths are mm in the panel's plane, `pixel_mm` is the side of
a pixel there.
"""

import numpy as np
import scipy

FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))
"""Full width at half maximum of a Gaussian, in standard deviations."""
BODY = 0.5
"""Line integral above which a pixel counts as behind the body, at 70 keV: about 26 mm of water. Chosen by hand; scatter is
normalized over these pixels, so half or twice the value moves only the border of that region."""
SCATTER_MM, SCATTER_MM_PER_INTEGRAL = 20.0, 8.0
"""Standard deviation of the narrow part of scatter, mm: a constant and a term per unit of the mean line integral behind the
body. Chosen by hand for a broad, nearly flat haze; half of them let scatter follow the anatomy, twice them make it a constant
offset."""
SCATTER_SPREAD = 0.2
"""Largest relative deviation of that width, drawn for each image. Chosen by hand."""
SCATTER_SHARES, SCATTER_WIDE = (0.6, 0.4), 3.0
"""Shares of the narrow and the wide part of scatter, and the ratio of their widths. Chosen by hand."""
CHANCE_IRIS = 0.3
"""Probability that a collimator is an iris instead of two pairs of blades. Chosen by hand."""
LEAD_SHARE = 1e-3
"""Share of the beam that passes the collimator's lead. Chosen by hand: dark enough to be found, above the noise floor at high
dose."""
LEAST_QUANTA = 0.25
"""Lowest signal that a line integral is taken of, in quanta per pixel; noise can make it zero or negative. Chosen by hand: half
or twice the value raises or lowers the line integral of empty pixels by 0.7."""


def blur(signal: np.ndarray, fwhm_mm: float, pixel_mm: float) -> np.ndarray:
    """Gaussian blur of a full width at half maximum, mm; the image is mirrored at its borders."""
    return _gaussian(signal, fwhm_mm / FWHM / pixel_mm) if fwhm_mm > 0 else signal


def _gaussian(image, sigma_px):
    # A cosine transform is exact for every width, at the same cost.
    spectrum = scipy.fft.dctn(image, norm="ortho")
    for axis, n in enumerate(image.shape):
        frequency = np.pi * np.arange(n) / n
        factor = np.exp(-0.5 * (sigma_px * frequency) ** 2).astype(image.dtype)
        spectrum *= factor[:, None] if axis == 0 else factor
    return scipy.fft.idctn(spectrum, norm="ortho")


def scatter(
    signal: np.ndarray, line_integral: np.ndarray, strength: float, rng: np.random.Generator, pixel_mm: float
) -> np.ndarray:
    """Adds scatter.

    Its source is the primary signal times the line integral (Ohnesorge et al., Eur. Radiol. 9 (1999) 563), which is spread
    by two broad Gaussians. They are wider the thicker the body is.

    Args:
      signal: the primary signal.
      line_integral: (H, W) of everything in the beam, at 70 keV.
      strength: ratio of scatter to primary, both averaged over the pixels behind the body.
    """
    behind = line_integral > BODY
    if strength == 0 or not behind.any():
        return signal
    width = SCATTER_MM + SCATTER_MM_PER_INTEGRAL * line_integral[behind].mean()
    width = width * rng.uniform(1.0 - SCATTER_SPREAD, 1.0 + SCATTER_SPREAD) / pixel_mm
    source = signal * np.maximum(line_integral, 0.0)
    narrow, wide = SCATTER_SHARES
    spread = narrow * _gaussian(source, width) + wide * _gaussian(source, SCATTER_WIDE * width)
    return signal + np.maximum(spread, 0.0) * (strength * signal[behind].mean() / spread[behind].mean())


def gain_ramp(signal: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gain that changes linearly across the image in a random direction, by `strength` between its extremes."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    direction = np.array([np.cos(angle), np.sin(angle)])
    v, u = _unit_square(signal.shape)
    return signal * (1.0 + strength * (direction[0] * u + direction[1] * v) / np.abs(direction).sum()).astype(
        np.float32
    )


def vignetting(signal: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gain that falls with the square of the distance from a point near the middle, by about `strength` in the corners."""
    centre = rng.uniform(-0.1, 0.1, 2)
    v, u = _unit_square(signal.shape)
    return signal * (1.0 - strength * 2.0 * ((u - centre[0]) ** 2 + (v - centre[1]) ** 2)).astype(np.float32)


def _unit_square(shape):
    """Rows (H, 1) and columns (1, W) from -0.5 to 0.5."""
    return tuple(np.linspace(-0.5, 0.5, n).reshape(s) for n, s in zip(shape, ((-1, 1), (1, -1))))


def offset(signal: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Drift of the dark level, up or down, uneven across the image, and at most `strength` times the mean signal."""
    v, u = _unit_square(signal.shape)
    level, slope = rng.uniform(-0.7, 0.7), rng.uniform(-0.3, 0.3, 2)
    return signal + (strength * signal.mean() * (level + slope[0] * u + slope[1] * v)).astype(np.float32)


def noise(
    signal: np.ndarray, variance_ratio: np.ndarray, quanta: float, electronic_quanta: float, rng: np.random.Generator
) -> np.ndarray:
    """Poisson noise of the detected quanta, and Gaussian electronic noise.

    Args:
      variance_ratio: (H, W) of `beam.transmit`.
      quanta: number detected in a pixel without a body, at most 1e12.
      electronic_quanta: standard deviation of the electronic noise, in quanta.
    """
    # The signal of quanta of many energies is a compound Poisson variable. The scaled Poisson variable drawn here has the
    # same mean and variance.
    scale = variance_ratio / quanta
    counted = rng.poisson(np.maximum(signal, 0.0) / scale) * scale
    return (counted + rng.normal(0.0, electronic_quanta / quanta, signal.shape)).astype(np.float32)


def air_value(signal: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Divides the signal by an air value that is too high or too low by the factor 1 + `strength`."""
    return signal * np.float32((1.0 + strength) ** rng.choice([-1.0, 1.0]))


def random_collimator(shape: tuple[int, int], strength: float, rng: np.random.Generator, pixel_mm: float) -> np.ndarray:
    """Share of the beam that a random collimator lets through, (H, W) in LEAD_SHARE to 1, with a penumbra 1 mm wide.

    The collimator is two pairs of blades at a random angle, or an iris, at a random place.

    Args:
      shape: (H, W).
      strength: 0 for no collimator; at 1 the opening may be as small as half of the image's sides.
    """
    if strength == 0:
        return np.ones(shape, np.float32)
    v, u = (axis * n for axis, n in zip(_unit_square(shape), shape))
    angle, size = rng.uniform(0.0, np.pi), min(shape)
    half = 0.5 * size * (1.0 - strength * rng.uniform(0.0, 0.5, 2))
    centre = rng.uniform(-1.0, 1.0, 2) * (0.5 * size - half) * 0.5
    u, v = u - centre[0], v - centre[1]
    if rng.uniform() < CHANCE_IRIS:
        inside = half.min() - np.hypot(u, v)
    else:
        along, across = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        inside = np.minimum(half[0] - np.abs(along), half[1] - np.abs(across))
    open_share = np.clip(inside * pixel_mm + 0.5, 0.0, 1.0)
    return (LEAD_SHARE + (1.0 - LEAD_SHARE) * open_share).astype(np.float32)


def line_integrals(signal: np.ndarray, quanta: float) -> np.ndarray:
    """-log (H, W) of a signal, which is raised to LEAST_QUANTA; quanta: number detected in a pixel without a body."""
    return -np.log(np.maximum(signal, np.float32(LEAST_QUANTA / quanta)))


def vendor_picture(line_integrals: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    """An 8-bit picture (H, W) of line integrals as a vendor shows it, 0 to 6.4: a sigmoid, more local contrast, sharper edges.

    Args:
      scale: about a tenth of the range of the line integrals behind the body.
    """
    x = (line_integrals - np.median(line_integrals)) / (scale * rng.uniform(4.0, 12.0) + 1e-6)
    x = 1.0 / (1.0 + np.exp(-np.clip(2.0 * x, -30, 30)))
    wide_px = rng.uniform(1.0, 15.0)
    x = x + rng.uniform(0.0, 2.0) * (x - scipy.ndimage.gaussian_filter(x, wide_px))
    return np.round(255 * np.clip(x, 0, 1)).astype(np.float32) / 40.0


def picture_scale(line_integrals: np.ndarray) -> float:
    """A tenth of the range of line integrals, from the 10th to the 90th percentile; the `scale` of `vendor_picture`."""
    return 0.1 * float(np.quantile(line_integrals, 0.9) - np.quantile(line_integrals, 0.1)) + 1e-3
