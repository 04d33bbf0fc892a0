"""Table 1 of the paper on one's own cases: text, JSON and Markdown from what the systems answered."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from data_pipelines.io import files
from radgs_jax import metrics

VOLUME_SCORES = ("ssim_honest", "psnr_honest", "ssim_paper", "psnr_paper")
"""Keys of `metrics.reconstruction_scores`; SSIM from 0 to 1, PSNR in dB."""
DRAWS = 2000
"""Number of bootstrap samples. Chosen by hand: half changes the intervals' last digit, twice takes twice the time."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One system on one variant.

    Attributes:
      title: its name in the table.
      scenes: the scene of each answer, in their order.
      scores: name -> (answers,) of `VOLUME_SCORES` or of `start_mm` and `error_mm`.
      runtime_s, cpu_s: (answers,); both empty where nothing is computed.
      preparation_s: CPU seconds of preparing it for a vertebra, or of training it, for one of several; nan where that was
        interrupted. parameters: their number.
      paper: the paper's own row, on its own data; empty where it has none.
    """

    title: str
    scenes: tuple[str, ...]
    scores: Mapping[str, Float[np.ndarray, " answers"]]
    runtime_s: Float[np.ndarray, " times"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    cpu_s: Float[np.ndarray, " times"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    preparation_s: float = 0.0
    parameters: int = 0
    paper: str = ""


def _by_scene(row, score):
    """Scene -> values."""
    found: dict[str, list[float]] = {}
    for scene, value in zip(row.scenes, row.scores[score]):
        found.setdefault(scene, []).append(float(value))
    return found


def interval(
    row: Row, score: str, statistic: Callable[[np.ndarray], Any], seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of a score; whole scenes are drawn, since answers of one are not independent."""
    groups, rng = [np.array(v) for v in _by_scene(row, score).values()], np.random.default_rng(seed)
    found = [
        statistic(np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])) for _ in range(draws)
    ]
    return float(np.percentile(found, 2.5)), float(np.percentile(found, 97.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction of p-values for having made all these tests; nan stays nan and does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected


def differences(row: Row, other: Row, score: str) -> Float[np.ndarray, " scenes"]:
    """Scene means of a score of `row` minus those of `other`, of the scenes that both have."""
    own, its = (_by_scene(one, score) for one in (row, other))
    return np.array([np.mean(own[scene]) - np.mean(its[scene]) for scene in its if scene in own])


def signed_rank(differences: Float[np.ndarray, " scenes"]) -> float:
    """p-value of Wilcoxon's (1945) signed-rank test, two-sided; nan where no scene differs."""
    return float(scipy.stats.wilcoxon(differences).pvalue) if np.any(differences != 0.0) else math.nan


def against(ours: Row, others: Sequence[Row], score: str) -> list[float]:
    """Holm-corrected p-values of `signed_rank` of each system against ours."""
    return holm([signed_rank(differences(row, ours, score)) for row in others])


def spread(values: Float[np.ndarray, " values"], scale: float, digits: int) -> str:
    """Mean and standard deviation of values times a scale, as a cell."""
    return f"{scale * np.mean(values):.{digits}f} ± {scale * np.std(values, ddof=len(values) > 1):.{digits}f}"


def _times(row):
    if not len(row.runtime_s):
        return ["-", "-"]
    return [f"{np.median(row.runtime_s):.2f}", f"{np.median(row.cpu_s):.2f}"]


def preparation(row: Row) -> str:
    """CPU minutes of preparing a system, as a cell."""
    if math.isnan(row.preparation_s):
        return "not known"
    return f"{row.preparation_s / 60.0:.1f}" if row.preparation_s else "-"


def chance(p: float) -> str:
    """A p-value as a cell."""
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _common(row, p):
    return [
        *_times(row),
        preparation(row),
        f"{row.parameters:,}" if row.parameters else "-",
        chance(p),
        row.paper or "-",
    ]


_COMMON = ["RT s", "CPU s", "prepared, CPU min", "parameters", "p", "the paper, other data"]


def reconstruction(rows: Sequence[Row], ours: str) -> tuple[list[str], list[list[str]]]:
    """Column names and cells of the reconstruction half, ranked by the honest PSNR.

    Args:
      ours: title of the row that the others are tested against, by their honest PSNR.
    """
    head = ["system", "n", "SSIM %, honest", "PSNR dB, honest", "95 % of it", "SSIM %, paper's", "PSNR dB, paper's"]
    ranked = sorted(rows, key=lambda row: -np.mean(row.scores["psnr_honest"]))
    mine = next((row for row in rows if row.title == ours), None)
    p = [math.nan] * len(ranked) if mine is None else against(mine, ranked, "psnr_honest")
    cells = []
    for row, value in zip(ranked, p):
        low, high = interval(row, "psnr_honest", np.mean)
        ssim, psnr, ssim_paper, psnr_paper = (row.scores[name] for name in VOLUME_SCORES)
        cells.append(
            [
                row.title,
                str(len(row.scenes)),
                spread(ssim, 100.0, 1),
                spread(psnr, 1.0, 2),
                f"{low:.2f}-{high:.2f}",
                spread(ssim_paper, 100.0, 1),
                spread(psnr_paper, 1.0, 2),
                *_common(row, value),
            ]
        )
    return head + _COMMON, cells


def registration(rows: Sequence[Row], ours: str) -> tuple[list[str], list[list[str]]]:
    """Column names and cells of the registration half, ranked by the median mTRE; arguments as `reconstruction`."""
    head = ["system", "n", "mTRE mm", "median mm", "95 % of it", "CR mm", "SR %", "95 % of it"]
    ranked = sorted(rows, key=lambda row: np.median(row.scores["error_mm"]))
    mine = next((row for row in rows if row.title == ours), None)
    p = [math.nan] * len(ranked) if mine is None else against(mine, ranked, "error_mm")
    cells = []
    for row, value in zip(ranked, p):
        error, start = row.scores["error_mm"], row.scores["start_mm"]
        low, high = interval(row, "error_mm", np.median)
        share = lambda e: 100.0 * np.mean(e < metrics.SUCCESS_MM)
        least, most = interval(row, "error_mm", share)
        cells.append(
            [
                row.title,
                str(len(error)),
                spread(error, 1.0, 2),
                f"{np.median(error):.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{metrics.capture_range(start, error):.0f}",
                f"{share(error):.0f}",
                f"{least:.0f}-{most:.0f}",
                *_common(row, value),
            ]
        )
    return head + _COMMON, cells


def as_text(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Columns under their names."""
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    line = lambda row: "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:]))])
    return "\n".join(line(row).rstrip() for row in (head, *cells))


def as_markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The same as a table of Markdown."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *cells))


def write(
    folder: pathlib.Path, name: str, parts: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]], values: Any
) -> str:
    """Writes tables to NAME.txt and NAME.md, and values to NAME.json.

    Args:
      parts: name, column names and cells of each.
    Returns:
      the text.
    """
    text = "\n\n".join(f"{title}\n{as_text(head, cells)}" for title, head, cells in parts) + "\n"
    marked = "\n\n".join(f"**{title}**\n\n{as_markdown(head, cells)}" for title, head, cells in parts) + "\n"
    for ending, content in (("txt", text), ("md", marked)):
        with files.replacing(folder / f"{name}.{ending}") as temporary:
            temporary.write_text(content)
    files.write_json(folder / f"{name}.json", values)
    return text


def as_values(row: Row) -> dict[str, Any]:
    """A row as plain values for JSON."""
    value = dataclasses.asdict(row)
    value["scores"] = {name: np.asarray(v).tolist() for name, v in row.scores.items()}
    value["preparation_s"] = None if math.isnan(row.preparation_s) else row.preparation_s
    return value | {"runtime_s": row.runtime_s.tolist(), "cpu_s": row.cpu_s.tolist(), "scenes": list(row.scenes)}
