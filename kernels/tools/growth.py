"""How the time of an operator grows with one size."""

import os
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.tools import process
from kernels.tools import timing
from kernels.tools.operators import Spec


def measure_growth(
    op: str, axis: str, specs: Sequence[Spec], implementation: str | None, seconds: float
) -> dict[str, Any]:
    """Times of `op` on a series of specs that grow along `axis` (gaussians, pixels or voxels).

    Args:
      seconds: time given to each measurement.
    Returns:
      `sizes`; `forward_ms` and `both_ms`, a time per size; `slope_forward` and `slope_both`, of log(time) against log(size).
    """
    sizes = [size_along(spec, axis) for spec in specs]
    process.say(f"{op}: {len(sizes)} sizes from {sizes[0]:,} to {sizes[-1]:,} {axis}")
    result: dict[str, Any] = {"sizes": sizes}
    quantities: tuple[timing.Quantity, ...] = ("forward", "both")
    for what in quantities:
        timers = {}
        for index, spec in enumerate(specs):
            timers[index] = timing.timer(op, spec, implementation, what)
        medians = timing.take_turns(timers, seconds)
        times = [medians[index] for index in range(len(specs))]
        result[f"{what}_ms"] = [1e3 * t for t in times]
        result[f"slope_{what}"] = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
    return result


def size_along(spec: Spec, axis: str) -> int:
    """Number of Gaussians, pixels or voxels of a spec, as `axis` says."""
    if axis == "gaussians":
        return spec.gaussians  # pyright: ignore[reportAttributeAccessIssue]: only clouds grow along this axis
    if axis == "pixels":
        return spec.height * spec.width  # pyright: ignore[reportAttributeAccessIssue]: as above, images
    return int(np.prod(spec.shape))  # pyright: ignore[reportAttributeAccessIssue]: as above, volumes


def plot(path: pathlib.Path | str, title: str, axis: str, curve: Mapping[str, Any]) -> None:
    """Writes a PNG of time against size, log-log, with a line of slope 1; `curve` is a result of `measure_growth`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.0), layout="constrained")
    axes = figure.subplots()
    sizes = np.array(curve["sizes"], float)
    for what, label in (("forward", "value"), ("both", "value and gradients")):
        axes.loglog(sizes, curve[f"{what}_ms"], "o-", label=f"{label}, slope {curve[f'slope_{what}']:.2f}")
    axes.loglog(sizes, curve["both_ms"][-1] * sizes / sizes[-1], "--", color="grey", label="slope 1")
    axes.set(title=title, xlabel=axis, ylabel="ms")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=150)
    os.replace(partial, path)


def plot_all(folder: pathlib.Path | str, op: str, implementation: str, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes one PNG per axis, `<op>_<axis>_<implementation>.png`; `curves` maps an axis to its `measure_growth`."""
    for axis, curve in curves.items():
        path = pathlib.Path(folder) / f"{op}_{axis}_{implementation}.png"
        plot(path, f"{op}, {implementation}, {process.threads()} thread(s)", axis, curve)
        process.say(f"wrote {path}")
