"""Radial distortion: an image intensifier's picture is stretched towards its border, since its input screen is curved.

A pixel at the distance r from the principal point, in units of the field's radius, would be at r (1 + k1 r^2 + k2 r^4 + k3 r^6) on
a flat panel (Brown 1971). The field's radius is half the smaller side of the image.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay

COEFFICIENTS = 3
"""Number of k1, k2, k3."""
_NEWTON_STEPS = 10
"""Steps that invert the polynomial. It is nearly linear within the field, where five reach float64; twice changes nothing."""
MOST = 0.1
"""Largest relative displacement at the field's border that is considered. Image intensifiers have some percent (IEC
61262-4 says how it is measured); half excludes strong ones, and at twice, pixels near an image's corners would have two places."""
_WHOLE = 0.999
"""Share of a sampled pixel's neighbours, by their weights, from which it is valid: all, but for float32."""
_CLOSE = 1e-6
"""Relative error up to which a pixel's place counts as found: far below a pixel. Half or twice parts the same pixels."""


def field(camera: Camera) -> float:
    """Radius of a camera's field, half the smaller side of its image, as the tangent of an angle."""
    return 0.5 * min(camera.width / float(camera.intrinsics[0]), camera.height / float(camera.intrinsics[1]))


def _factor(square, coefficients):
    """1 + k1 r^2 + k2 r^4 + k3 r^6 of r^2."""
    return 1.0 + sum(k * square ** (j + 1) for j, k in enumerate(coefficients))


def _slope(square, coefficients):
    """Derivative of r (1 + k1 r^2 + k2 r^4 + k3 r^6) by r, of r^2."""
    return 1.0 + sum((2 * j + 3) * k * square ** (j + 1) for j, k in enumerate(coefficients))


def _radii(xray):
    """u and v of each pixel from the principal point, px, and its distance in units of the field's radius."""
    camera = xray.camera
    v, u = np.indices((camera.height, camera.width), np.float64)
    fx, fy, cx, cy = np.asarray(camera.intrinsics, np.float64)
    u, v = u - cx, v - cy
    return u, v, np.hypot(u / fx, v / fy) / field(camera)


def _sampled(xray, u, v, there=True):
    """The X-ray's pixels at (u, v) from the principal point; valid where it is `there`, and all four neighbours are."""
    assert xray.valid is not None
    at = np.stack([v + float(xray.camera.intrinsics[3]), u + float(xray.camera.intrinsics[2])])
    sample = lambda image: scipy.ndimage.map_coordinates(np.asarray(image, np.float32), at, order=1, mode="nearest")
    inside = np.all([(c >= 0) & (c <= n - 1) for c, n in zip(at, at.shape[1:])], 0)
    return dataclasses.replace(
        xray, line_integrals=sample(xray.line_integrals), valid=inside & there & (sample(xray.valid) > _WHOLE)
    )


def distorted(xray: XRay, coefficients: Float[Array, "3"]) -> XRay:
    """A flat panel's X-ray as an image intensifier shows it. Pixels that come from outside the image are invalid."""
    u, v, radius = _radii(xray)
    factor = _factor(radius**2, coefficients)
    return _sampled(xray, u * factor, v * factor)


def straightened(xray: XRay, coefficients: Float[Array, "3"]) -> XRay:
    """An image intensifier's X-ray as a flat panel would show it; the inverse of `distorted`, but for its interpolation.

    Pixels that come from outside the image are invalid, and those that no place of the image shows: in the corners, where a strong
    pincushion folds over.
    """
    u, v, radius = _radii(xray)
    seen = radius.copy()
    for _ in range(_NEWTON_STEPS):
        seen -= (seen * _factor(seen**2, coefficients) - radius) / _slope(seen**2, coefficients)
    found = np.abs(seen * _factor(seen**2, coefficients) - radius) <= _CLOSE
    there = found & (seen >= 0) & (_slope(seen**2, coefficients) > 0)
    factor = np.where(there, seen / np.maximum(radius, 1e-12), 1.0)
    return _sampled(xray, u * factor, v * factor, there)


def stretch(
    images: Float[Array, "views size size"], intrinsics: Float[Array, "views 4"], fields: Float[Array, " views"]
) -> Float[jax.Array, "views size size coefficients"]:
    """Derivatives of images by the coefficients of a small distortion; fields: of `field`."""
    along_v, along_u = jnp.gradient(images, axis=(1, 2))
    fx, fy, cx, cy = (part[:, None, None] for part in intrinsics.T)
    place = jnp.arange(images.shape[-1], dtype=images.dtype)
    u, v = place[None, None, :] - cx, place[None, :, None] - cy
    square = ((u / fx) ** 2 + (v / fy) ** 2) / fields[:, None, None] ** 2
    outwards = along_u * u + along_v * v
    return jnp.stack([outwards * square ** (j + 1) for j in range(COEFFICIENTS)], -1)
