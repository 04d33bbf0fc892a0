"""Registers many cases into one folder: results are kept as they come, failures are rows, and a stopped run can go on."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from data_pipelines import cases
from data_pipelines.ct import scans
from data_pipelines.io import camera_files
from data_pipelines.io import files
from experiments.patients.workdir import Target
from experiments.patients.workdir import target_of
from experiments.reports import case_folder
from experiments.reports import dicom_registration
from experiments.reports import verdicts
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from experiments.runtime.kept_programs import Stopwatch
from experiments.runtime.shards import ALL
from experiments.runtime.shards import Shard
from radgs_jax import errors
from radgs_jax.geometry.xray import XRay
from radgs_jax.levels import level_name
from radgs_jax.registration import pipeline
from radgs_jax.registration import plausibility
from radgs_jax.registration.pipeline import Outcome
from radgs_jax.registration.pipeline import RegisterOptions
from radgs_jax.registration.prepared import Prepared

PART = "part.json"
"""File in a part's folder that says which run it is a part of."""
JOURNAL = "finished.jsonl"
"""File of an unfinished folder with one line of JSON for each case that is finished."""
SCENES_IN_MEMORY = 2
"""Acquisitions of a case file whose X-rays are in memory. Cases of one acquisition follow each other, so that fewer would do."""

LEAST_SHOWN = 0.2
"""Share of a vertebra that each X-ray shows where its start was found. Chosen by hand: a third of T9 at the border was enough (the
bench). Half tries what the search then refuses, twice leaves such ones out."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One case to register.

    Attributes:
      name: its id in results.
      target: the vertebra.
      xrays: views of one acquisition, or a function that reads them when the case's turn comes.
      start: (4, 4) world_from_ct, mm.
      truth: (4, 4) world_from_ct, mm, used in pictures only; None if unknown.
      cameras_from, start_from: what errors name as the source of cameras and start pose, such as files.
      start_found: whether the start pose was found in these X-rays.
    """

    name: str
    target: Target
    xrays: Sequence[XRay] | Callable[[], Sequence[XRay]]
    start: np.ndarray
    truth: np.ndarray | None = None
    cameras_from: object = "cameras"
    start_from: object = "start pose"
    start_found: bool = False


@dataclasses.dataclass(frozen=True)
class Registered:
    """What `register_rows` has written.

    Attributes:
      out: the folder.
      results: entries of results.json, in the order of the rows.
      failures: id and reason of each case that could not be registered.
    """

    out: pathlib.Path
    results: list[dict[str, Any]]
    failures: list[dict[str, str]]


def rows_of_cases(path: str | pathlib.Path, variant: str) -> list[Row]:
    """Every case of a case file. X-rays are read when their case's turn comes.

    Args:
      path: case file; variant: array of its X-ray files.
    Raises:
      InputError: as `cases.read`.
    """
    case_file = cases.read(path)
    read = functools.lru_cache(SCENES_IN_MEMORY)(lambda name: cases.read_xrays(case_file.scenes[name], variant))
    rows = []
    for case in case_file.cases:
        scene = case_file.scenes[case.scene]
        volume = case_file.volumes[scene.volume]
        target = target_of(volume)
        xrays = functools.partial(read, scene.name)
        sources = f"{path}: scene {scene.name}", f"{path}: case {case.name}"
        rows.append(Row(case.name, target, xrays, case.world_from_ct, _truth_for_pictures(scene), *sources))
    return rows


def _truth_for_pictures(scene):
    # The true pose is optional and only drawn, so a missing or malformed one must not stop the registration.
    try:
        return camera_files.check_rigid("", "", scene.world_from_ct)
    except errors.InputError:
        return None


def register_rows(
    rows: Sequence[Row],
    load: Callable[[Target], Prepared],
    out: str | pathlib.Path,
    options: RegisterOptions = RegisterOptions(),
    variant: str = "xrays",
    pictures: bool = True,
    extra_files: dict[str, Any] | None = None,
    resume: bool = False,
    inputs: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
    shard: Shard = ALL,
    scenes: bool = False,
    found: Callable[[Row, Outcome, Prepared], None] = lambda row, outcome, prepared: None,
) -> Registered:
    """Registers cases into the folder `out`.

    Args:
      load: returns the `Prepared` of a target; called for every row before the first case is registered, so that unusable
        input is found early. It should cache its results.
      out: a new or empty folder. It appears when all cases are finished; until then, a hidden folder beside it keeps them.
      variant: name of the X-rays' variant in results.json.
      pictures: also write each case's pictures, volumes and transforms.
      extra_files: further JSON files to write: file name -> content, or a function of all cases' results that may return None.
      resume: go on with the unfinished folder of a run that was stopped.
      inputs: plain values, such as digests of files, that a resumed run must have in common with the one it goes on with.
      say: takes a line about each case when it is finished.
      shard: the part of the vertebrae that this process registers, into `out`.parts/i-of-n. The whole run takes the cases of
        finished parts from there, and removes them.
      scenes: also write each case's scene for 3D Slicer, for which its CT is read.
      found: takes each case's outcome as soon as it is there, before its files are written.
    Raises:
      InputError: a folder that is not new, an unfinished folder without `resume` or of another run, or not a single case that can
        be registered. Nothing is written then.
    """
    out, extra_files = pathlib.Path(out), extra_files or {}
    mark, parts = _fingerprint(rows, options, variant, (pictures, scenes), inputs), out.with_name(f"{out.name}.parts")
    if not shard.whole:
        files.check_new(out)
        mine, out = shard.of(row.target for row in rows), parts / f"{shard.index}-of-{shard.count}"
        rows, extra_files = [row for row in rows if row.target in mine], {**extra_files, PART: {"run": mark}}
    _check_unfinished(out, mark, resume)
    with files.new_folder(out, keep=True, resume=resume) as partial:
        journal = _Journal(partial, mark)
        if shard.whole:
            _take_parts(parts, mark, partial, journal)
        try:
            _register_all(rows, load, options, (pictures, scenes), partial, journal, say, found)
            order = {row.name: place for place, row in enumerate(rows)}
            results, failures = (sorted(part, key=lambda one: order[one["id"]]) for part in journal.parts())
            cases.write_results(partial / "results.json", case_folder.PROGRAM, variant, results, failures)
            for name, value in extra_files.items():
                if (content := value(results) if callable(value) else value) is not None:
                    files.write_json(partial / name, content)
            if pictures and shard.whole:
                _write_overview(partial, rows, load, results, failures)
            journal.path.unlink()
        except BaseException:
            if done := len(journal.parts()[0]):
                done = f"{done} of {len(rows)} cases are kept in {partial}"
                logging.warning("%s: stopped: %s; the same command with --resume goes on", out, done)
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    if shard.whole:
        for path in parts.glob(f"*/{PART}"):
            shutil.rmtree(path.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # nothing was shared, or the folder holds something else
            parts.rmdir()
    return Registered(out, results, failures)


def _write_overview(folder, rows, load, results, failures):
    from experiments.reports import overview  # with matplotlib, as in `case_folder.write`

    done = {one["id"] for one in results}
    labels = {row.target.label for row in rows}
    one_acquisition = len(labels) == len(rows) and all(row.xrays is rows[0].xrays for row in rows)
    vertebrae = {row.name: load(row.target).vertebra for row in rows if row.name in done} if one_acquisition else {}
    overview.write(folder, results, failures, vertebrae)


def _take_parts(parts, mark, partial, journal):
    """Copies the cases that parts of this run have finished."""
    for path in sorted(parts.glob(f"*/{PART}")):
        if files.read_json(path) != {"run": mark}:
            errors.fail(path, "run", "a part of a run with other inputs or flags", f"this run's, or {parts} deleted")
        for result in files.read_json(path.with_name("results.json"))["results"]:
            case = path.with_name(result["id"])
            if result["id"] not in journal.finished:
                if case.is_dir():
                    shutil.copytree(case, partial / case.name, dirs_exist_ok=True)
                journal.add("results", result)


def _register_all(rows, load, options, wanted, partial, journal, say, found):
    """Registers the rows that the journal lacks. wanted: whether pictures, and scenes for 3D Slicer, are written.

    Raises:
      InputError: the first row's, where every row has one.
    """
    missing = [row for row in rows if row.name not in journal.finished]
    unusable = {}
    for target in {row.target: None for row in missing}:
        try:
            load(target)
        except errors.InputError as error:
            unusable[target] = error
    warm, first_error, read_ct = set(), None, functools.lru_cache(1)(scans.read_ct)
    with progress.Bar(len(rows), "register", len(rows) - len(missing)) as bar:
        for row in missing:
            try:
                if error := unusable.get(row.target):
                    raise error
                prepared = load(row.target)
                outcome, xrays, times = _register_one(row, prepared, options, warm)
            except errors.InputError as error:
                first_error = first_error or error
                journal.add("failures", {"id": row.name, "reason": str(error)})
                line = f"{_shown(row)}: FAILED: {error}"
            else:
                found(row, outcome, prepared)
                said = verdicts.verdict(outcome, prepared, xrays, row.start_found, options.camera_sd)
                _write_case(partial, row, outcome, said, prepared, xrays, wanted, read_ct)
                journal.add("results", {"id": row.name, **case_folder.answer(outcome), **times})
                line = said.line(_shown(row))
            # The only case's reason is what the command ends with.
            if len(rows) > 1 or journal.parts()[0]:
                with bar.external_write_mode():
                    say(line)
            bar.update()
    if first_error is not None and not journal.parts()[0]:
        raise first_error


def _write_case(partial, row, outcome, said, prepared, xrays, wanted, read_ct):
    """Writes what is wanted of a case: its pictures, volumes, transforms and registration, and its scene for 3D Slicer."""
    pictures, scenes = wanted
    folder = partial / row.name
    if pictures:
        case_folder.write(partial, row.name, outcome, prepared, xrays, row.start, said, row.truth)
        level, place = level_name(row.target.label), folder / "registration.dcm"
        dicom_registration.write(place, row.target.ct, xrays, outcome.world_from_ct, level, said)
    if scenes:
        case_folder.write_scene(
            folder / "scene.mrb", *read_ct(row.target.ct), outcome, prepared, xrays, row.start, row.truth
        )


def _shown(row):
    level = level_name(row.target.label)
    return level if row.name in (level, "case") else f"{row.name} ({level})"


def _register_one(row, prepared, options, warm):
    """The outcome of a case, its X-rays, and the times that it took. `warm` holds what programs have been loaded for."""
    xrays = row.xrays() if callable(row.xrays) else row.xrays
    if row.start_found:
        # Such a start is no mistake of the user's, whatever else would fit.
        share = plausibility.least_share(prepared.vertebra, xrays, row.start)
        if share < LEAST_SHOWN:
            found = f"{share:.0%} of its surface in one of them, where {row.start_from} was found"
            errors.fail("X-rays", level_name(row.target.label), found, "a vertebra that every X-ray shows")
    for note in plausibility.check(prepared.vertebra, xrays, row.start, row.cameras_from, row.start_from):
        logging.warning("%s: %s", _shown(row), note)
    arrays = [*jax.tree.leaves((prepared.parts, prepared.vertebra.cloud)), *(x.line_integrals for x in xrays)]
    shapes = (prepared.refine, prepared.model.config, *(a.shape for a in arrays))
    if shapes not in warm:
        pipeline.warm_up(prepared, xrays, options, kept)
        warm.add(shapes)
    with Stopwatch() as watch:
        outcome = pipeline.register(prepared, xrays, row.start, options, kept)
    return outcome, xrays, watch.times()


def _fingerprint(rows, options, variant, wanted, inputs):
    """What a resumed run must have in common with the one it goes on with, as a digest."""
    shown = [[row.name, str(row.target), np.asarray(row.start).tolist()] for row in rows]
    plain = [shown, dataclasses.asdict(options), variant, wanted, inputs]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class _Journal:
    """The finished cases of an unfinished folder, on the disk after each case.

    Attributes:
      path: the file.
      finished: ids of the cases in it.
    """

    def __init__(self, folder: pathlib.Path, mark: str) -> None:
        self.path = folder / JOURNAL
        if not self.path.exists():
            self._append({"fingerprint": mark})
        _, self._parts = _read_journal(self.path)
        self.finished = {one["id"] for part in self._parts.values() for one in part}

    def add(self, part: str, one: dict[str, Any]) -> None:
        """Adds a case to 'results' or 'failures'."""
        self._append({part: one})
        self._parts[part].append(one)
        self.finished.add(one["id"])

    def parts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Results and failures."""
        return self._parts["results"], self._parts["failures"]

    def _append(self, value):
        with files.writing(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(value, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _read_journal(path):
    """(fingerprint, results and failures by name) of a journal; a last line that is cut, by a kill, does not count.

    Failures are tried again: what was wrong may have been mended. They are left out here.
    """
    mark, parts = None, {"results": [], "failures": []}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        for line in lines:
            value = json.loads(line)
            mark = value.get("fingerprint", mark)
            if "results" in value:
                parts["results"].append({**value["results"], "id": str(value["results"]["id"])})
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        errors.fail(
            path, "content", f"{type(error).__name__}: {error}", "the finished cases of a run; delete its folder"
        )
    return mark, parts


def _check_unfinished(out, mark, resume):
    """Refuses to delete the finished cases of a stopped run, and to go on with those of another one."""
    for folder in files.unfinished(out):
        path = folder / JOURNAL
        if not path.exists():
            continue
        found, parts = _read_journal(path)
        kept_cases = f"{len(parts['results'])} finished case(s) of a run that was stopped"
        if not resume and parts["results"]:
            errors.fail(folder, "folder", kept_cases, "--resume to go on with them, or this folder deleted")
        if resume and found != mark:
            errors.fail(
                folder, "folder", f"{kept_cases}, with other inputs or flags", "those of this command, or another --out"
            )
