"""The page of a run: verdicts on all its cases, the spine's curve, how it was made, and the cases' own pages."""

import html
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.io import files
from experiments.reports import document
from experiments.reports import spine_curve
from experiments.reports import verdicts
from radgs_jax import levels
from radgs_jax.registration.prepared import Vertebra

NAME = "report.html"
"""The page's file, and that of each case's own page in the case's folder."""
MOST_INSIDE = 24
"""Most cases whose pages are part of this one; more are linked. A whole spine has 24 vertebrae, and takes 4 MB."""


def write(
    folder: pathlib.Path,
    results: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, str]],
    vertebrae: Mapping[str, Vertebra],
) -> None:
    """Writes `report.html` of a folder that has everything else of a run.

    Args:
      results, failures: entries of results.json; vertebrae: those of one acquisition, by the results' ids, whose curve is shown;
        empty where the cases belong to several.
    """
    judged = [one["accepted"] for one in results if "accepted" in one]
    counts = f"{sum(judged)} accepted, {len(judged) - sum(judged)} refused" if judged else "not judged"
    parts = [_table(folder, results, failures)]
    if (curve := _curve(folder, results, vertebrae)) is not None:
        parts.append(curve)
    if len(results) <= MOST_INSIDE:
        parts += [_folded(folder, one, len(results) == 1) for one in results]
    if (record := folder / "run.json").exists():
        parts.append(document.record(files.read_json(record)))
    document.write(folder / NAME, f"{len(results)} registered: {counts}", "\n".join(parts))


def _table(folder, results, failures):
    head = "".join(f"<th scope='col'>{text}</th>" for text in ("case", "verdict", "radius, mm", "seconds for the pose"))
    rows = []
    for one in results:
        state = document.STATES[one.get("accepted")]
        radius = one.get("uncertainty_mm")
        said = files.read_json(folder / one["id"] / "pose.json")["verdict"].split("; ")[0]
        rows.append(
            f'<tr><th scope="row"><a href="{html.escape(one["id"])}/{NAME}">{html.escape(one["id"])}</a></th>'
            f'<td class="mark {state}">{html.escape(said)}</td>'
            f"<td class=number>{'' if radius is None else verdicts.rounded_up(radius)}</td>"
            f"<td class=number>{one['runtime_s']:.2f}</td></tr>"
        )
    rows += [
        f'<tr><th scope="row">{html.escape(one["id"])}</th><td class="mark refused" colspan="3">failed: '
        f"{html.escape(one['reason'])}</td></tr>"
        for one in failures
    ]
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _curve(folder, results, vertebrae):
    """The spine's curve of poses that may be used relative to each other; None of fewer than two."""
    used = {one["id"]: one for one in results if one.get("trusted", one.get("accepted")) and one["id"] in vertebrae}
    names = sorted(used, key=lambda name: levels.ORDER.index(vertebrae[name].label))
    if len(names) < 2:
        return None
    poses = {name: used[name]["T"] for name in names}
    if (together := folder / "spine.json").exists():
        poses = {one["level"]: one["world_from_ct"] for one in files.read_json(together)["vertebrae"]}
    world_from_ct = np.array([poses[name] for name in names])
    bones = [vertebrae[name] for name in names]
    found = spine_curve.curves(bones, world_from_ct)
    segments = [spine_curve.segment(bones[k : k + 2], world_from_ct[k : k + 2]) for k in range(len(names) - 1)]
    shown = [levels.level_name(bone.label) for bone in bones]
    return (
        f'<section aria-label="The spine">\n<h2>The spine</h2>\n{spine_curve.drawing(shown, found)}\n'
        f"{spine_curve.table(shown, found, segments)}\n<p>Patient's axes are the CT's. The angle between the ends is that between "
        "the directions of the curve through the vertebrae's centres: like Cobb's, without end plates.</p>\n</section>"
    )


def _folded(folder, one, unfolded):
    """A case's own page as a part of this one."""
    inside = document.articles(folder / one["id"] / NAME)
    return f"<details{' open' if unfolded else ''}><summary>{html.escape(one['id'])}</summary>\n{inside}\n</details>"
