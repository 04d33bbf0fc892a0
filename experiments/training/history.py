"""Scalars of a training, read from its TensorBoard files, and the page of a run that shows them."""

import html
import pathlib
import struct
from collections.abc import Iterator
from collections.abc import Mapping

import numpy as np

from data_pipelines import cases
from experiments import configs
from experiments.reports import index_page
from experiments.reports import plots
from experiments.reports.run_record import RunRecord
from radgs_jax.training import objectives

Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values."""
LAST = 10
"""Values at a phase's begin and end whose median the page's table shows. Chosen by hand: a single one varies with its batch; twice
as many reach too far in short phases."""
MEANINGS = {"rec": "the reconstruction (RecM)", "reg": "the registration (RegM)", "joint": "both"}
"""What each phase trains."""


def scalars(folder: pathlib.Path | str) -> dict[str, Curve]:
    """Name -> steps and values, from the event files of one phase's folder. Of a step that was repeated, the last value counts.

    A file that ends in the middle of an event, as one does that is being written, counts up to there.
    """
    from tensorboardX.proto import event_pb2  # an extra of the package, as for `progress.Log`

    found: dict[str, dict[int, float]] = {}
    for path in sorted(pathlib.Path(folder).glob("events.*")):
        for record in _records(path.read_bytes()):
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {name: (np.array(sorted(of)), np.array([of[step] for step in sorted(of)])) for name, of in found.items()}


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length (uint64), its checksum (uint32), data, their checksum (uint32)."""
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        if place + 16 + length > len(content):
            return
        yield content[place + 12 : place + 12 + length]
        place += 16 + length


def update_page(workdir: pathlib.Path, config: configs.Config, record: RunRecord) -> None:
    """`write_page`, which takes seconds, unless the page shows all that has been trained and scored."""
    page, table = workdir / index_page.NAME, workdir / "eval" / "table.txt"
    events = [*workdir.glob("tensorboard/*/events.*"), *workdir.glob("p3/*/tensorboard/*/events.*")]
    shown = page.exists() and all(path.stat().st_mtime < page.stat().st_mtime for path in events)
    # A score that is made again is written again, with the same numbers.
    if not shown or (table.exists() and html.escape(table.read_text()) not in page.read_text(encoding="utf-8")):
        write_page(workdir, config, record)


def write_page(workdir: pathlib.Path, config: configs.Config, record: RunRecord) -> None:
    """Writes `workdir`/losses.png and report.html: the phases, their losses, and the score on X-rays that none has seen."""
    phases = _phases(workdir)
    curves = {name: found["loss"] for name, found in phases.items() if "loss" in found}
    plots.loss_curves(workdir / "losses.png", curves)
    evaluated = workdir / "eval"
    table, drawn = evaluated / "table.txt", _drawn(evaluated)
    sections = [
        _table(phases, config),
        index_page.pictures("Losses", {workdir / "losses.png": "The loss of each phase over its steps."}),
        index_page.text(
            "X-rays that no stage has seen",
            table.read_text(),
            "Beside each score stand those of simple answers. An error is mTRE: the mean distance between the vertebra's surface "
            "points at the found and the true pose.",
        )
        if table.exists()
        else "",
        index_page.pictures(
            "Errors", {path: "Errors over start errors." for path in sorted(evaluated.glob("errors_*.png"))}
        ),
        index_page.pictures("The cases that started farthest off", drawn),
        index_page.links(
            "Files", workdir, ("eval/table.txt", *sorted(str(p.relative_to(workdir)) for p in evaluated.glob("*.json")))
        ),
    ]
    done = [name for name in phases if _done(phases[name]) >= _wanted(name, config)]
    index_page.write(workdir, f"Training: {len(done)} phases are finished", sections, record)


def _phases(workdir):
    """Name of each phase that has begun -> its scalars, in the order of training."""
    folders = [*workdir.glob("tensorboard/*"), *workdir.glob("p3/*/tensorboard/*")]
    order = [f"{stage}_{phase}" for stage in configs.DATA_STAGES for phase in objectives.PHASES]
    known = {folder.name: folder for folder in folders if folder.name in order}
    return {name: scalars(known[name]) for name in sorted(known, key=order.index)}


def _table(phases: Mapping[str, Mapping[str, Curve]], config):
    rows = []
    for name, found in phases.items():
        loss, speed = (found.get(key, (np.array([]), np.array([])))[1] for key in ("loss", "examples_per_s"))
        rows.append(
            [
                name,
                MEANINGS[name.partition("_")[2]],
                f"{_done(found):,} of {_wanted(name, config):,}",
                f"{np.median(loss[:LAST]):.3f}" if len(loss) else "",
                f"{np.median(loss[-LAST:]):.3f}" if len(loss) else "",
                f"{np.median(speed):.1f}" if len(speed) else "",
            ]
        )
    head = ("phase", "trains", "steps", "loss at first", "loss at last", "examples a second")
    note = f"Losses are medians of {LAST} lines of the log. TensorBoard has all curves: tensorboard --logdir of this folder."
    return index_page.table("Phases", head, rows, note)


def _done(found):
    return max((int(steps[-1]) for steps, _ in found.values()), default=0)


def _wanted(name, config):
    stage, _, phase = name.partition("_")
    return config.stage(stage).steps[objectives.PHASES.index(phase)]


def _drawn(evaluated):
    """Pictures of cases -> what they show."""
    found = {}
    for variant in cases.VARIANTS:
        for path in sorted((evaluated / variant).glob("*/picture.png")):
            found[path] = (
                f"{path.parent.name}, variant {variant}: X-rays with outlines at the start, estimated and true pose."
            )
            found[path.with_name("network.png")] = (
                f"{path.parent.name}: what the network looks at, and its reconstruction."
            )
    return found
