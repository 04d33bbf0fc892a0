"""Losses: pure functions of a prediction and a target, each a scalar, and the paper's Eq. 2 to 4 composed of them.

Images are line integrals (no unit), volumes densities in 1/mm; nothing is normalised behind the caller's back, so SSIM takes
the range of its data explicitly.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from radgs_jax.geometry import rigid

IMAGE_RANGE = 2.0
"""Range of vertebra-only line integrals that SSIM's constants refer to."""
DENSITY_RANGE = 0.06
"""Range of bone density in 1/mm that SSIM's constants refer to."""


def l1(prediction, target):
    """Mean absolute difference of arrays of one shape, in their unit."""
    return jnp.mean(jnp.abs(prediction - target))


def _blur(x, axes, window, sigma):
    """Separable Gaussian filter over `axes`, without padding: each axis shrinks by window - 1."""
    offsets = np.arange(window) - 0.5 * (window - 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / np.sum(kernel)
    for axis in axes:
        size = x.shape[axis]
        # A banded matrix: a product per axis is far cheaper than shifted sums, forward and backward.
        band = sum(np.eye(size - window + 1, size, k) * w for k, w in enumerate(kernel)).astype(x.dtype)
        x = jnp.moveaxis(jnp.matmul(jnp.moveaxis(x, axis, -1), band.T, precision=lax.Precision.HIGHEST), -1, axis)
    return x


def ssim_map(prediction, target, data_range, dims, window=11, sigma=1.5):
    """Local structural similarity (Wang et al. 2004) over the last `dims` axes, K1 = 0.01, K2 = 0.03, unpadded.

    Args:
      prediction, target: (..., *spatial), `dims` spatial axes of at least `window` samples.
      data_range: range of the data, in its own unit.
    Returns:
      (..., *(spatial - window + 1)).
    Raises:
      ValueError: an axis shorter than the window.
    """
    if min(prediction.shape[-dims:]) < window:
        raise ValueError(f"ssim: spatial shape {prediction.shape[-dims:]} is smaller than the window of {window}")
    axes = tuple(range(-dims, 0))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    moments = jnp.stack([prediction, target, prediction**2, target**2, prediction * target])
    mu_p, mu_t, square_p, square_t, product = _blur(moments, axes, window, sigma)
    var_p, var_t, cov = square_p - mu_p**2, square_t - mu_t**2, product - mu_p * mu_t
    return ((2 * mu_p * mu_t + c1) * (2 * cov + c2)) / ((mu_p**2 + mu_t**2 + c1) * (var_p + var_t + c2))


def ssim2d(prediction, target, data_range=IMAGE_RANGE):
    """1 - mean SSIM of images (..., H, W); raises as `ssim_map`."""
    return 1.0 - jnp.mean(ssim_map(prediction, target, data_range, 2))


def ssim3d(prediction, target, data_range=DENSITY_RANGE, window=11):
    """1 - mean SSIM of volumes (..., X, Y, Z); raises as `ssim_map`."""
    return 1.0 - jnp.mean(ssim_map(prediction, target, data_range, 3, window))


def tv3d(volume, target=None):
    """Anisotropic total variation of volumes (..., X, Y, Z): mean absolute neighbour difference, summed over the axes.

    `target` is accepted and ignored, so that the regulariser composes like every other loss.
    """
    del target
    return sum(jnp.mean(jnp.abs(jnp.diff(volume, axis=axis))) for axis in (-3, -2, -1))


def ncc3d(prediction, target, eps=1e-8):
    """1 - normalised cross-correlation, averaged over the batch, of volumes (..., X, Y, Z)."""
    axes = (-3, -2, -1)
    p = prediction - jnp.mean(prediction, axes, keepdims=True)
    t = target - jnp.mean(target, axes, keepdims=True)
    # eps is below any bone's variance (1e-6 1/mm^2) and keeps an empty volume finite.
    variance = jnp.mean(p * p, axes) * jnp.mean(t * t, axes)
    return jnp.mean(1.0 - jnp.mean(p * t, axes) / jnp.sqrt(variance + eps**2))


def geodesic(prediction, target, centre=None, lever_mm=rigid.LEVER_MM):
    """Mean geodesic distance in mm between poses (..., 4, 4), taken at `centre` (..., 3), the origin if None."""
    centre = jnp.zeros(3, prediction.dtype) if centre is None else centre
    return jnp.mean(rigid.distance(prediction, target, centre, lever_mm))


def pose_from_start(prediction, target):
    """Mean geodesic distance in mm between motions (..., 4, 4) at the origin, less where `target` is far from no motion."""
    error = rigid.distance(prediction, target, jnp.zeros(3))
    start = rigid.distance(jnp.eye(4), target, jnp.zeros(3))
    return jnp.mean(error / jnp.sqrt(1.0 + 0.15 * start))


def reconstruction_branch(image, target_image, volume, lambda_ssim=0.2, lambda_tv=0.05):
    """L_rec of Eq. 2 for one branch: L1 + 0.2 SSIM of images (..., H, W), + 0.05 TV of the volume (..., X, Y, Z)."""
    return l1(image, target_image) + lambda_ssim * ssim2d(image, target_image) + lambda_tv * tv3d(volume)


def cal_reconstruction(
    effect_image, effect_volume, factual_image, factual_volume, target_image, lambda_ssim=0.2, lambda_tv=0.05
):
    """Eq. 2: the effect branch's loss plus the same of the factual branch; images (..., H, W), volumes (..., X, Y, Z).

    `target_image` is the vertebra alone, projected at the true pose: one vertebra cannot render a cluttered X-ray.
    """
    return reconstruction_branch(
        effect_image, target_image, effect_volume, lambda_ssim, lambda_tv
    ) + reconstruction_branch(factual_image, target_image, factual_volume, lambda_ssim, lambda_tv)


def registration(moved_ct, reconstruction, pose, true_pose, lambda_geodesic=0.02):
    """Eq. 3: NCC and SSIM between the CT moved by the estimate and the reconstruction (..., X, Y, Z), + 0.02 geodesic (mm).

    pose, true_pose: (..., 4, 4), whose distance is taken at the origin of their source frame.
    """
    return (
        ncc3d(moved_ct, reconstruction) + ssim3d(moved_ct, reconstruction) + lambda_geodesic * geodesic(pose, true_pose)
    )


def total(registration_loss, reconstruction_loss):
    """Eq. 4: the plain sum."""
    return registration_loss + reconstruction_loss
