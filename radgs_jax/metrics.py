"""Scores of registration and reconstruction, as section 'Scores' of the case format defines them.

Plain numpy on arrays of one case or of many cases; SSIM is `losses.ssim_map`.
"""

from collections.abc import Sequence

import jax
import numpy as np
import scipy
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array
from radgs_jax import losses

SUCCESS_MM = 2.0
"""mTRE below which a pose counts as right, mm (the paper). At half and twice fewer and more poses do."""
BIN_MM = 5.0
"""Width of the bins of start mTRE, mm (the paper's interval). Half resolves the capture range twice as finely from half the cases a
bin; twice does the opposite."""
SUCCESS_SHARE = 0.95
"""Fraction of poses in a bin that must be right for the capture range to include the bin (the case format)."""
NEAR_MM = 5.0
"""Distance from the mask within which the masked scores compare, mm (the case format). At half they see less of the surroundings,
where spurious density lies; at twice more empty space, which raises them."""


def mtre(
    points: Float[Array, "n 3"] | Sequence[Sequence[float]], estimate: Real[Array, "4 4"], truth: Real[Array, "4 4"]
) -> float:
    """Mean target registration error: the mean over points x of |T_est x - T_gt x|, mm (Penney et al. 1998)."""
    delta = np.asarray(estimate, np.float64) - np.asarray(truth, np.float64)
    return float(np.linalg.norm(np.asarray(points, np.float64) @ delta[:3, :3].T + delta[:3, 3], axis=1).mean())


def capture_range(
    start_mm: Real[Array, " cases"] | Sequence[float], error_mm: Real[Array, " cases"] | Sequence[float]
) -> float:
    """Upper edge, mm, of the last bin of start mTRE up to which every bin, from 0 mm, reaches `SUCCESS_SHARE`; 0 if none does."""
    start_mm, error_mm = np.asarray(start_mm), np.asarray(error_mm)
    edge = 0.0
    while True:
        inside = (start_mm >= edge) & (start_mm < edge + BIN_MM)
        if not inside.any() or np.mean(error_mm[inside] < SUCCESS_MM) < SUCCESS_SHARE:
            return edge
        edge += BIN_MM


def _minmax(volume):
    low, high = volume.min(), volume.max()
    return (volume - low) / (high - low) if high > low else np.zeros_like(volume)


def psnr(squared_error: float | np.floating, data_range: float) -> float:
    """Peak signal-to-noise ratio, dB, of a mean squared error; both in one unit."""
    return float(10 * np.log10(data_range**2 / max(float(squared_error), 1e-20)))


_ssim_map = jax.jit(losses.ssim_map, static_argnums=(2, 3))


def near(mask: Bool[Array, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """Voxels of 1 mm within `NEAR_MM` of a mask, where the masked scores are taken."""
    return np.asarray(scipy.ndimage.distance_transform_edt(~np.asarray(mask, bool))) <= NEAR_MM


def reconstruction_scores(
    estimate: Real[Array, "x y z"], truth: Real[Array, "x y z"], near: Bool[Array, "x y z"]
) -> dict[str, float]:
    """SSIM and PSNR of a density volume by both protocols.

    Args:
      estimate, truth: density of the vertebra alone, 1/mm, on the 96^3 grid of 1 mm in CT axes.
      near: the result of `near` for the vertebra's mask.

    Returns:
      `ssim_honest` and `psnr_honest`, with the fixed range [0, 0.06] 1/mm, averaged over `near`; `ssim_paper` and `psnr_paper`, on
      the whole grid after min-max normalisation of each volume.
    """
    estimate, truth = np.asarray(estimate, np.float32), np.asarray(truth, np.float32)
    clipped = np.clip(estimate, 0.0, losses.DENSITY_RANGE)
    clipped_truth = np.clip(truth, 0.0, losses.DENSITY_RANGE)
    inner = (slice(5, -5),) * 3  # the unpadded window of 11 voxels leaves 5 of them off each end
    honest = np.asarray(_ssim_map(clipped, clipped_truth, losses.DENSITY_RANGE, 3))
    a, b = _minmax(estimate), _minmax(truth)
    return {
        "ssim_honest": float(honest[near[inner]].mean()),
        "psnr_honest": psnr(((clipped - clipped_truth) ** 2)[near].mean(), losses.DENSITY_RANGE),
        "ssim_paper": float(np.asarray(_ssim_map(a, b, 1.0, 3)).mean()),
        "psnr_paper": psnr(((a - b) ** 2).mean(), 1.0),
    }
