"""Radial distortion against the formula, and its inverse."""

import numpy as np
import pytest

from radgs_jax.geometry import distortion
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay

COEFFICIENTS = np.array([0.05, -0.02, 0.01])
HEIGHT, WIDTH = 96, 130
CAMERA = Camera(np.array([300.0, 310.0, 60.5, 51.0]), np.eye(4), HEIGHT, WIDTH)


def smooth(u, v):
    return 2.0 + np.sin(0.11 * u + 0.05 * v) + np.cos(0.07 * v - 0.03 * u)


def pixels():
    v, u = np.indices((HEIGHT, WIDTH), float)
    return u, v


def test_a_pixel_shows_what_the_polynomial_says():
    """An off-centre camera with oblong pixels; the reference goes pixel by pixel."""
    u, v = pixels()
    shown = distortion.distorted(XRay(smooth(u, v), None, CAMERA), COEFFICIENTS)
    fx, fy, cx, cy = CAMERA.intrinsics
    field = 0.5 * HEIGHT / fy
    for row, column in ((10, 20), (51, 60), (80, 100), (30, 118)):
        x, y = (column - cx) / fx, (row - cy) / fy
        square = (x * x + y * y) / field**2
        factor = 1.0 + 0.05 * square - 0.02 * square**2 + 0.01 * square**3
        wanted = smooth(cx + fx * x * factor, cy + fy * y * factor)
        assert shown.line_integrals[row, column] == pytest.approx(wanted, abs=3e-3)


def test_places_that_a_strong_pincushion_folds_over_are_invalid():
    """With k1 = -0.2 a flat panel's pixels beyond 0.86 field radii are shown nowhere."""
    given = XRay(np.ones((HEIGHT, WIDTH)), None, CAMERA)
    straight = distortion.straightened(given, np.array([-0.2, 0.0, 0.0]))
    fx, fy, cx, cy = CAMERA.intrinsics
    u, v = pixels()
    radius = np.hypot((u - cx) / fx, (v - cy) / fy) / distortion.field(CAMERA)
    assert not straight.valid[radius > 0.87].any() and straight.valid[radius < 0.7].all()


def test_straightening_inverts_it_where_pixels_stay_in_the_image():
    u, v = pixels()
    valid = (u - 60.5) ** 2 + (v - 51.0) ** 2 < 40.0**2
    given = XRay(smooth(u, v), valid, CAMERA)
    back = distortion.straightened(distortion.distorted(given, COEFFICIENTS), COEFFICIENTS)
    inner = (u - 60.5) ** 2 + (v - 51.0) ** 2 < 36.0**2
    assert back.valid[inner].all() and not back.valid[~valid].any()
    np.testing.assert_allclose(back.line_integrals[inner], given.line_integrals[inner], atol=8e-3)
    none = distortion.straightened(given, np.zeros(3))
    np.testing.assert_allclose(none.line_integrals, given.line_integrals, atol=1e-5)
