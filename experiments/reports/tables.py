"""Tables of scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from radgs_jax import metrics


def score_table(scores: Mapping[str, Any], variant: str) -> str:
    """The result of `evaluate.evaluate` as text, without times, so that a resumed run prints the same.

    Args:
      scores: that result; variant: array of the X-ray files.
    """
    start, error = scores["start_mm"], scores["error_mm"]
    lines = [
        f"registration, variant {variant}: {len(error)} cases, mTRE in mm",
        f"{'start bin':>12} {'n':>4} {'start median':>13} {'median':>8} {'p90':>8} {'< 2 mm':>8}",
    ]
    edges = np.arange(0.0, np.ceil(start.max() / metrics.BIN_MM) * metrics.BIN_MM + 1, metrics.BIN_MM)
    for low, high in [*zip(edges[:-1], edges[1:]), (0.0, np.inf)]:
        inside = (start >= low) & (start < high)
        if inside.any():
            name = "all" if np.isinf(high) else f"{low:.0f}-{high:.0f}"
            e = error[inside]
            lines.append(
                f"{name:>12} {inside.sum():4d} {np.median(start[inside]):13.2f} {np.median(e):8.2f} {np.percentile(e, 90):8.2f} "
                f"{100 * np.mean(e < metrics.SUCCESS_MM):6.1f} %"
            )
    lines.append(f"capture range: {metrics.capture_range(start, error):.0f} mm")
    if scores["volumes"]:
        share, _, area = scores["attention"].mean(0)
        lines += [
            "",
            f"attention (CAL): {100 * share:.0f} % of it on the vertebra, which takes {100 * area:.0f} % of the crops",
            "",
            "reconstruction, mean over cases: honest (range [0, 0.06] 1/mm, mask + 5 mm) and the paper's protocol",
            f"{'':>20} {'SSIM honest':>12} {'PSNR honest':>12} {'SSIM paper':>12} {'PSNR paper':>12}",
        ]
        for name, t in scores["volumes"].items():
            lines.append(
                f"{name:>20} {100 * t['ssim_honest'].mean():10.2f} % {t['psnr_honest'].mean():9.2f} dB "
                f"{100 * t['ssim_paper'].mean():10.2f} % {t['psnr_paper'].mean():9.2f} dB"
            )
    return "\n".join(lines)
