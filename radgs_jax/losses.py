"""Losses: pure functions from a prediction and a target to a scalar, and Eq. 2 to 4 of the paper composed of them.

Images are line integrals (no unit), volumes are densities in 1/mm. No function normalises its input, so SSIM takes the range of the
data as an argument.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid

IMAGE_RANGE = 2.0
"""Range of vertebra-only line integrals for SSIM's constants, no unit. Chosen by hand. SSIM ignores contrasts well below 3 % of it:
at half, it responds to weaker detail and noise; at twice, only to stronger edges."""
DENSITY_RANGE = 0.06
"""Range of bone density for SSIM's constants and for scores, 1/mm: that of the case format, about water to bone at 1000 HU
(0.0573). At half, dense bone is clipped in scores; at twice, SSIM ignores twice the contrast and PSNR rises by 6 dB."""
FAR_START = 0.15
"""Weight of the start's distance in `pose_from_start`, 1/mm. Chosen by hand: at 25 mm a miss counts 2.2 times less than at the
pose itself; at half 1.7 times, at twice 2.9 times less."""
DICE_PIXELS = 1.0
"""Added to both counts of the Dice coefficient, cells of the segmentation. It keeps a view without the vertebra finite; half or
twice changes only such views."""

Weight = float | Float[Array, ""]
"""Weight of a loss term: a number, traced or not."""


def l1(prediction: Float[Array, "*#shape"], target: Float[Array, "*#shape"]) -> Float[jax.Array, ""]:
    """Mean absolute difference, in the unit of the arrays."""
    return jnp.mean(jnp.abs(prediction - target))


def _blur(x, axes, window, sigma):
    """Separable Gaussian filter over `axes` without padding: each axis shrinks by window - 1."""
    offsets = np.arange(window) - 0.5 * (window - 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / np.sum(kernel)
    for axis in axes:
        size = x.shape[axis]
        # A banded matrix: a product per axis is far cheaper than shifted sums, forward and backward.
        band = np.asarray(sum(np.eye(size - window + 1, size, k) * w for k, w in enumerate(kernel))).astype(x.dtype)
        x = jnp.moveaxis(jnp.matmul(jnp.moveaxis(x, axis, -1), band.T, precision=lax.Precision.HIGHEST), -1, axis)
    return x


def ssim_map(
    prediction: Float[Array, "*shape"],
    target: Float[Array, "*shape"],
    data_range: float,
    dims: int,
    window: int = 11,
    sigma: float = 1.5,
) -> Float[jax.Array, "..."]:
    """Local structural similarity over the last `dims` axes, unpadded.

    Window, sigma, K1 = 0.01 and K2 = 0.03 are those of Wang et al. 2004.

    Args:
      prediction, target: (..., *spatial), with `dims` spatial axes of at least `window` samples.
      data_range: range of the data, in the data's unit.
      window: samples along an axis of the Gaussian window.
      sigma: standard deviation of the Gaussian window, samples.

    Returns:
      (..., *(spatial - window + 1)).

    Raises:
      ValueError: an axis is shorter than the window.
    """
    return 1.0 - _dissimilarity(prediction, target, data_range, dims, window, sigma)


def _dissimilarity(prediction, target, data_range, dims, window=11, sigma=1.5):
    """1 - `ssim_map`, from the difference of both: the usual moments round off more than the loss of images that are alike.

    With the means m and variances v in a window, SSIM's two factors are 1 - (m_p - m_t)^2 / (m_p^2 + m_t^2 + c1) and
    1 - v(p - t) / (v(p) + v(t) + c2).
    """
    if min(prediction.shape[-dims:]) < window:
        raise ValueError(f"ssim: spatial shape {prediction.shape[-dims:]} is smaller than the window of {window}")
    axes = tuple(range(-dims, 0))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    difference = prediction - target
    moments = jnp.stack([prediction, difference, prediction**2 + target**2, difference**2])
    mu_p, mu, squares, square = _blur(moments, axes, window, sigma)
    means = mu_p**2 + (mu_p - mu) ** 2
    first, second = mu**2 / (means + c1), (square - mu**2) / (squares - means + c2)
    return first + second - first * second


def ssim2d(
    prediction: Float[Array, "*batch height width"],
    target: Float[Array, "*batch height width"],
    data_range: float = IMAGE_RANGE,
) -> Float[jax.Array, ""]:
    """1 - mean SSIM of images; raises the errors of `ssim_map`."""
    return jnp.mean(_dissimilarity(prediction, target, data_range, 2))


def ssim3d(
    prediction: Float[Array, "*batch x y z"],
    target: Float[Array, "*batch x y z"],
    data_range: float = DENSITY_RANGE,
    window: int = 11,
) -> Float[jax.Array, ""]:
    """1 - mean SSIM of volumes; raises the errors of `ssim_map`."""
    return jnp.mean(_dissimilarity(prediction, target, data_range, 3, window))


def segmentation(
    logits: Float[Array, "batch views h w"],
    bone: Bool[Array, "batch views height width"],
    valid: Bool[Array, "batch views height width"],
) -> Float[jax.Array, ""]:
    """Binary cross-entropy and 1 - Dice of logits per cell against the share of bone, over valid pixels."""
    cell = bone.shape[-1] // logits.shape[-1]
    counts, bone = camera.bin_image(valid, cell), camera.bin_image(bone & valid, cell)
    entropy = jnp.sum(counts * jax.nn.softplus(logits) - bone * logits) / jnp.maximum(jnp.sum(counts), 1.0)
    found = counts * jax.nn.sigmoid(logits)
    common, both = (jnp.sum(a, (-2, -1)) for a in (jax.nn.sigmoid(logits) * bone, found + bone))
    return entropy + jnp.mean(1.0 - (2.0 * common + DICE_PIXELS) / (both + DICE_PIXELS))


def tv3d(volume: Float[Array, "*batch x y z"], target: object = None) -> Float[jax.Array, ""]:
    """Anisotropic total variation: mean absolute difference of neighbours, summed over the three axes.

    `target` is accepted and ignored, so that this regulariser is called like every other loss.
    """
    del target
    return cast(jax.Array, sum(jnp.mean(jnp.abs(jnp.diff(volume, axis=axis))) for axis in (-3, -2, -1)))


def ncc3d(
    prediction: Float[Array, "*batch x y z"], target: Float[Array, "*batch x y z"], eps: float = 1e-8
) -> Float[jax.Array, ""]:
    """1 - normalised cross-correlation of volumes, averaged over the batch."""
    p, t = (volume.reshape(*volume.shape[:-3], -1) for volume in (prediction, target))
    # As products of vectors, which keep more partial sums than a plain sum, and so round off less: this loss is small.
    mean = lambda a, b: jnp.einsum("...n,...n->...", a, b, precision=lax.Precision.HIGHEST) / a.shape[-1]
    p, t = (a - mean(a, jnp.ones_like(a))[..., None] for a in (p, t))
    # eps is below the variance of any bone (1e-6 1/mm^2) and keeps the result for an empty volume finite.
    return jnp.mean(1.0 - mean(p, t) / jnp.sqrt(mean(p, p) * mean(t, t) + eps**2))


def geodesic(
    prediction: Float[Array, "*#batch 4 4"],
    target: Float[Array, "*#batch 4 4"],
    centre: Float[Array, "*#batch 3"] | None = None,
    lever_mm: float = rigid.LEVER_MM,
) -> Float[jax.Array, ""]:
    """Mean geodesic distance in mm between poses, measured at `centre` (default: the origin of their source frame)."""
    centre = jnp.zeros(3, prediction.dtype) if centre is None else centre
    return jnp.mean(rigid.distance(prediction, target, centre, lever_mm))


def pose_from_start(
    prediction: Float[Array, "*#batch 4 4"], target: Float[Array, "*#batch 4 4"]
) -> Float[jax.Array, ""]:
    """Mean geodesic distance in mm between motions at the origin, weighted less where the true motion is large."""
    error = rigid.distance(prediction, target, jnp.zeros(3))
    start = rigid.distance(jnp.eye(4), target, jnp.zeros(3))
    return jnp.mean(error / jnp.sqrt(1.0 + FAR_START * start))


def reconstruction_branch(
    image: Float[Array, "*batch height width"],
    target_image: Float[Array, "*batch height width"],
    volume: Float[Array, "*volumes x y z"],
    lambda_ssim: Weight = 0.2,
    lambda_tv: Weight = 0.05,
) -> Float[jax.Array, ""]:
    """L_rec of Eq. 2 for one branch: L1 and SSIM of the images, and TV of the volume, with the paper's weights as defaults."""
    return l1(image, target_image) + lambda_ssim * ssim2d(image, target_image) + lambda_tv * tv3d(volume)


def cal_reconstruction(
    effect_image: Float[Array, "*batch height width"],
    effect_volume: Float[Array, "*volumes x y z"],
    factual_image: Float[Array, "*batch height width"],
    factual_volume: Float[Array, "*volumes x y z"],
    target_image: Float[Array, "*batch height width"],
    lambda_ssim: Weight = 0.2,
    lambda_tv: Weight = 0.05,
) -> Float[jax.Array, ""]:
    """Eq. 2: `reconstruction_branch` of the effect plus that of the factual.

    `target_image` is the vertebra alone, projected at the true pose, because one vertebra cannot render a cluttered X-ray.
    """
    return reconstruction_branch(
        effect_image, target_image, effect_volume, lambda_ssim, lambda_tv
    ) + reconstruction_branch(factual_image, target_image, factual_volume, lambda_ssim, lambda_tv)


def registration(
    moved_ct: Float[Array, "*batch x y z"],
    reconstruction: Float[Array, "*batch x y z"],
    pose: Float[Array, "*#poses 4 4"],
    true_pose: Float[Array, "*#poses 4 4"],
    lambda_geodesic: Weight = 0.02,
) -> Float[jax.Array, ""]:
    """Eq. 3: NCC and SSIM of the CT moved by the estimate and the reconstruction, plus the weighted `geodesic` of the poses."""
    return (
        ncc3d(moved_ct, reconstruction) + ssim3d(moved_ct, reconstruction) + lambda_geodesic * geodesic(pose, true_pose)
    )


def total(registration_loss: Float[Array, ""], reconstruction_loss: Float[Array, ""]) -> Float[Array, ""]:
    """Eq. 4: the plain sum."""
    return registration_loss + reconstruction_loss
