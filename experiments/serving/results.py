"""A result as the page shows it: the verdict, outlines on the X-rays, slices of the CT, and files to download."""

import dataclasses
import io
import pathlib
import time
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.ct.scans import Scan
from experiments.patients.registering import Row
from experiments.reports import document
from experiments.reports import page
from experiments.reports import pictures
from experiments.reports import verdicts
from experiments.reports.verdicts import Verdict
from experiments.serving import slices
from experiments.serving.slices import Slices
from radgs_jax import metrics
from radgs_jax.geometry.xray import XRay
from radgs_jax.levels import level_name
from radgs_jax.registration import pipeline
from radgs_jax.registration.pipeline import Outcome
from radgs_jax.registration.prepared import Prepared

TYPES = {"pose.json": "application/json", "pose.tfm": "text/plain", "report.html": "text/html"}
"""Files of a case that can be downloaded one by one, and their types."""
ARCHIVE = "result.zip"
"""Name under which the whole folder can be downloaded."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a registration found.

    Attributes:
      folder: where its files are, once they are `written`; case: its case's name in there.
      level: name of the vertebra.
      verdict: whether the pose may be used.
      moved_mm: mTRE from the start pose to the found one.
      outlines: of the vertebra at the found pose, in each view: an SVG path in pixels from the image's corner.
      slices: of the CT at the found pose.
      notes, warnings: what was said on the way.
      reviewed: whether whoever looked at it has accepted the pose.
    """

    folder: pathlib.Path
    case: str
    level: str
    verdict: Verdict
    moved_mm: float
    outlines: Sequence[dict[str, Any]]
    slices: Slices
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    written: bool = False
    reviewed: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def accepted(self) -> bool:
        """Whether the acceptance rule accepts the pose."""
        return bool(self.verdict.accepted)

    def shown(self) -> dict[str, Any]:
        """What the page shows, as plain values."""
        return {
            "name": self.name,
            "level": self.level,
            "state": document.STATES[self.verdict.accepted],
            "headline": f"{self.level}: {self.verdict.headline}",
            "why": self.verdict.why,
            "advice": self.verdict.advice,
            "moved_mm": self.moved_mm,
            "outlines": list(self.outlines),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "written": self.written,
            "reviewed": self.reviewed,
            "planes": {
                plane: {"pixels": slices.PIXELS, "pixel_mm": slices.PIXEL_MM, "reach": slices.REACH, "edges": edges}
                for plane, edges in slices.EDGES.items()
            },
        }

    def file(self, name: str) -> bytes:
        """A file of TYPES, or ARCHIVE."""
        if name != ARCHIVE:
            return (self.folder / self.case / name).read_bytes()
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(self.folder.rglob("*")):
                if path.is_file():
                    archive.write(path, pathlib.PurePosixPath(self.name, path.relative_to(self.folder).as_posix()))
        return stream.getvalue()


def of(
    folder: pathlib.Path,
    row: Row,
    outcome: Outcome,
    prepared: Prepared,
    scan: Scan,
    camera_sd: tuple[float, float],
) -> Result:
    """The result of a case whose files will be in `folder`.

    Args:
      outcome: of registering `row`, whose X-rays are views in memory; prepared: its vertebra, of `scan`.
      camera_sd: as in the registration's options.
    """
    assert not callable(row.xrays)
    vertebra, pose = prepared.vertebra, outcome.world_from_ct
    xrays = row.xrays if outcome.together is None else pipeline.corrected(row.xrays, outcome.together)
    return Result(
        folder,
        row.name,
        level_name(vertebra.label),
        verdicts.verdict(outcome, prepared, row.xrays, row.start_found, camera_sd),
        float(metrics.mtre(vertebra.points, row.start, pose)),
        [_outline(xray, prepared, pose) for xray in xrays],
        Slices(scan, pose, (pose @ vertebra.ct_from_box)[:3, 3]),
    )


def _outline(xray, prepared, pose):
    """The vertebra's outline in a view: a path in pixels of a part of it, that part's first column and row, and their scale."""
    vertebra = prepared.vertebra
    close, (column, row, scale) = pictures.close_up(xray, vertebra, pose)
    path = page.outline(pictures.render(vertebra.density, vertebra.ct_from_index, pose, close.camera))
    return {"path": path, "first": [int(column), int(row)], "scale": int(scale)}


def shown_inputs(
    number: int, names: Sequence[str], xrays: Sequence[XRay], labels: Sequence[int], warnings: Sequence[str]
) -> dict[str, Any]:
    """What the page shows of a loaded acquisition, as plain values; number: of the load; names: of its files."""
    views = [
        {
            "name": verdicts.view_name(xray, np.eye(4)),
            "width": xray.camera.width,
            "height": xray.camera.height,
            **slices.xray_range(xray),
        }
        for xray in xrays
    ]
    named = [{"label": label, "name": level_name(label)} for label in labels]
    return {"number": number, "files": list(names), "views": views, "levels": named, "warnings": list(warnings)}


def new_place(folder: pathlib.Path, level: str) -> pathlib.Path:
    """A folder for a new result, which is not made yet: the level and the time."""
    name = f"{level}-{time.strftime('%Y%m%d-%H%M%S')}"
    places = (folder / (name if count == 1 else f"{name}-{count}") for count in range(1, 1000))
    return next(place for place in places if not place.exists())
