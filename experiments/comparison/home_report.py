"""What the home tests of Table 1's systems say: tables, and what must hold."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.comparison import tables
from experiments.comparison.at_home import Result
from experiments.comparison.at_home import STEPS_MM

LEAST_DB, LEAST_DRAWN_DB, NEAR_MM = 25.0, 35.0, 1.0
"""What a system must reach: honest PSNR from the most X-rays, dB; PSNR of unseen projections, dB; mTRE, mm. Chosen by hand."""

Results = Mapping[str, Mapping[str, Result]]
"""Title of a system -> name of a test -> its result, of one part."""
Check = tuple[str, str, bool]
"""What must hold, what was found, and whether it holds."""


def _each(found):
    return [(title, name, value) for title, named in found.items() for name, value in named.items()]


def _count(name):
    """The number of X-rays in the name of a test."""
    return name.removeprefix("views_")


def _reconstruction_rows(found):
    head = [
        "system",
        "views",
        "SSIM %, honest",
        "PSNR dB, honest",
        "SSIM %, paper's",
        "PSNR dB, paper's",
        "RT s",
        "CPU s",
    ]
    scales, cells = ((100.0, 1), (1.0, 2), (100.0, 1), (1.0, 2)), []
    for title, name, value in _each(found):
        scores = [f"{k * value[score]:.{n}f}" for score, (k, n) in zip(tables.VOLUME_SCORES, scales)]
        cells.append([title, _count(name), *scores, f"{value['runtime_s']:.1f}", f"{value['cpu_s']:.1f}"])
    return head, cells


def _reconstruction_checks(named) -> list[Check]:
    psnr = [value["psnr_honest"] for value in named.values()]
    words = ", ".join(f"{value:.2f}" for value in psnr)
    most = f"honest PSNR above {LEAST_DB:g} dB from {_count(list(named)[-1])} X-rays"
    return [
        ("honest PSNR rises with the number of X-rays", f"{words} dB", bool(np.all(np.diff(psnr) > 0))),
        (most, f"{psnr[-1]:.2f} dB", psnr[-1] > LEAST_DB),
    ]


def _registration_rows(found):
    head = ["system", "n", "start mm", "mTRE mm", "median mm", f"below {NEAR_MM:g} mm, %", "RT s", "CPU s"]
    cells = []
    for title, _, value in _each(found):
        start, error = (np.array(value["scores"][name]) for name in ("start_mm", "error_mm"))
        share = f"{100.0 * np.mean(error < NEAR_MM):.0f}"
        medians = [f"{np.median(value[name]):.2f}" for name in ("runtime_s", "cpu_s")]
        spreads = tables.spread(start, 1.0, 2), tables.spread(error, 1.0, 2)
        cells.append([title, str(len(error)), *spreads, f"{np.median(error):.2f}", share, *medians])
    return head, cells


def _registration_checks(named) -> list[Check]:
    error = np.array(named["registration"]["scores"]["error_mm"])
    words = f"{np.sum(error < NEAR_MM)} of {len(error)}, the largest {error.max():.2f} mm"
    return [(f"all errors below {NEAR_MM:g} mm", words, bool(np.all(error < NEAR_MM)))]


def _projections_rows(found):
    early = _each(found)[0][2]["early_steps"]
    head = ["system", "views", "PSNR dB", f"after {early} steps", f"after {early} from a uniform start"]
    names = "psnr", "early_aware_psnr", "early_uniform_psnr"
    return head, [[title, str(value["views"]), *(f"{value[n]:.2f}" for n in names)] for title, _, value in _each(found)]


def _projections_checks(named) -> list[Check]:
    value = named["projections"]
    gained = value["early_aware_psnr"] - value["early_uniform_psnr"]
    return [
        (f"PSNR above {LEAST_DRAWN_DB:g} dB", f"{value['psnr']:.2f} dB", value["psnr"] > LEAST_DRAWN_DB),
        (f"better after {value['early_steps']} steps than from a uniform start", f"by {gained:.2f} dB", gained > 0),
    ]


def _steps_rows(found):
    head = ["system", "pairs", "start mm", "after the first step mm", "after the second step mm"]
    return head, [
        [title, str(value["pairs"]), *(f"{value[n]:.2f}" for n in STEPS_MM)] for title, _, value in _each(found)
    ]


def _steps_checks(named) -> list[Check]:
    errors = [named["steps"][name] for name in STEPS_MM]
    words = ", ".join(f"{error:.2f}" for error in errors)
    return [("each step lowers the error", f"{words} mm", bool(np.all(np.diff(errors) < 0)))]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
      title: its name there; rows: column names and cells of its results.
      checks: what must hold of a system's results.
    """

    title: str
    rows: Callable[[Results], tuple[list[str], list[list[str]]]]
    checks: Callable[[Mapping[str, Result]], list[Check]]


PARTS = {
    "reconstruction": Part("a vertebra alone, reconstructed", _reconstruction_rows, _reconstruction_checks),
    "registration": Part("a body that has moved as one, registered", _registration_rows, _registration_checks),
    "projections": Part("DDGS-CT's images from unseen angles", _projections_rows, _projections_checks),
    "steps": Part("both steps of TS-SAR on unseen pairs", _steps_rows, _steps_checks),
}
"""By `at_home.PARTS`."""


def report(found: Mapping[str, Results]) -> tuple[list[tuple[str, list[str], list[list[str]]]], dict[str, Any]]:
    """Tables of all parts and of what must hold, for `tables.write`, and the same as plain values."""
    parts = [(PARTS[part].title, *PARTS[part].rows(results)) for part, results in found.items()]
    checks = [
        (title, *check)
        for part, results in found.items()
        for title, named in results.items()
        for check in PARTS[part].checks(named)
    ]
    head = ["system", "wanted", "found", "holds"]
    cells = [[title, wanted, words, "yes" if holds else "no"] for title, wanted, words, holds in checks]
    values = {**found, "holds": [dict(zip(head, check)) for check in checks]}
    return [*parts, ("what must hold", head, cells)], values
