"""The scores, each defined once: registration and reconstruction, by the case format's section 'Scores'.

Plain numpy on arrays of one case or of many cases; SSIM shares `losses.ssim_map`.
"""

import jax
import numpy as np
import scipy

from radgs_jax import losses

SUCCESS_MM = 2.0
BIN_MM = 5.0


def mtre(points, estimate, truth):
    """Mean over points (N, 3) of |T_est x - T_gt x| in mm, for 4x4 poses (Penney et al. 1998; success below 2 mm)."""
    delta = np.asarray(estimate, np.float64) - np.asarray(truth, np.float64)
    return float(np.linalg.norm(np.asarray(points, np.float64) @ delta[:3, :3].T + delta[:3, 3], axis=1).mean())


def capture_range(start_mm, error_mm):
    """Upper edge in mm of the last of the consecutive 5 mm bins of start mTRE (C,), from 0 up, with success >= 95 %; 0 for none."""
    start_mm, error_mm = np.asarray(start_mm), np.asarray(error_mm)
    edge = 0.0
    while True:
        inside = (start_mm >= edge) & (start_mm < edge + BIN_MM)
        if not inside.any() or np.mean(error_mm[inside] < SUCCESS_MM) < 0.95:
            return edge
        edge += BIN_MM


def _minmax(volume):
    low, high = volume.min(), volume.max()
    return (volume - low) / (high - low) if high > low else np.zeros_like(volume)


def _psnr(squared_error, data_range):
    return float(10 * np.log10(data_range**2 / max(float(squared_error), 1e-20)))


_ssim_map = jax.jit(losses.ssim_map, static_argnums=(2, 3))


def near(mask):
    """Voxels of 1 mm (X, Y, Z) within 5 mm of a mask (X, Y, Z): where the honest protocol looks."""
    return scipy.ndimage.distance_transform_edt(~np.asarray(mask, bool)) <= 5.0


def reconstruction_scores(estimate, truth, near):
    """SSIM and PSNR of a density volume by both protocols.

    Args:
      estimate, truth: (X, Y, Z) density of the vertebra alone, 1/mm, on the 96^3 grid of 1 mm in CT axes.
      near: (X, Y, Z) bool, of the vertebra's mask.
    Returns:
      dict: `ssim_honest`, `psnr_honest` with the fixed range [0, 0.06] 1/mm, averaged over the mask dilated by 5 mm;
      `ssim_paper`, `psnr_paper` on the whole grid after min-max normalisation of each volume. 11^3 Gaussian window, sigma 1.5.
    """
    estimate, truth = np.asarray(estimate, np.float32), np.asarray(truth, np.float32)
    clipped = np.clip(estimate, 0.0, losses.DENSITY_RANGE)
    clipped_truth = np.clip(truth, 0.0, losses.DENSITY_RANGE)
    inner = (slice(5, -5),) * 3  # where the unpadded 11^3 window is defined
    honest = np.asarray(_ssim_map(clipped, clipped_truth, losses.DENSITY_RANGE, 3))
    a, b = _minmax(estimate), _minmax(truth)
    return {
        "ssim_honest": float(honest[near[inner]].mean()),
        "psnr_honest": _psnr(((clipped - clipped_truth) ** 2)[near].mean(), losses.DENSITY_RANGE),
        "ssim_paper": float(np.asarray(_ssim_map(a, b, 1.0, 3)).mean()),
        "psnr_paper": _psnr(((a - b) ** 2).mean(), 1.0),
    }
