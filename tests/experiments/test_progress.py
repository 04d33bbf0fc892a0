"""What a run says on its way: lines, JSON, a log file, and how far the whole of it is."""

import json
import re

import fresh_python
import pytest
import tiny

from experiments import train
from experiments.runtime import events
from experiments.runtime import progress

LOOP = """
import pathlib, time
from experiments.runtime import endings, events, progress
from radgs_jax import errors
progress.LINE_S = 0.05
with events.told({form!r}, pathlib.Path({folder!r})), endings.one_line_each():
    with progress.Bar(4, "steps") as bar:
        for number in range(4):
            time.sleep(0.06)
            bar.set_postfix(loss=number, refresh=False)
            bar.update()
    pathlib.Path({folder!r}).mkdir()
    endings.warn("careful")
    errors.fail("a.json", "field", 1, "2")
"""


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines_and_a_log(tmp_path):
    folder = tmp_path / "run"
    done = fresh_python.end(LOOP.format(form="text", folder=str(folder)))
    assert done.returncode == 2 and "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[-2:] == ["warning: careful", "error: a.json: field: found 1, wanted 2"]
    assert re.fullmatch(r"steps: [1-4] of 4, 00:00 so far, 00:00 left, loss=\d", lines[0]) and lines[-3].startswith(
        "steps: 4"
    )
    kept = (folder / events.FILE).read_text().splitlines()
    assert [line.split(" ")[1] for line in kept[:1] + kept[-2:]] == ["begin:", "warning:", "error:"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in kept)


def test_for_programs_every_line_is_json(tmp_path):
    done = fresh_python.end(LOOP.format(form="json", folder=str(tmp_path / "run")))
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert [one["kind"] for one in found] == ["begin", *["progress"] * (len(found) - 3), "warning", "error"]
    last = found[-3]
    assert (last["title"], last["done"], last["total"], last["left_s"]) == ("steps", 4, 4, 0.0) and last[
        "elapsed_s"
    ] > 0.2
    assert found[-1]["status"] == 2 and found[-1]["text"] == "a.json: field: found 1, wanted 2"


def test_a_bar_says_how_far_the_whole_run_is(monkeypatch):
    """Twice as slow as planned: what is left takes twice as long, too. Bars that are skipped count as done."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.planned({"skipped": 50.0, "first": 100.0, "second": 50.0}):
        with progress.Bar(10, "first") as bar:
            now[0] = 100.0
            bar.update(5)
            share, left_s = bar._whole()
            assert share == pytest.approx(0.5) and left_s == pytest.approx(200.0)
            assert "[whole run 50%, 03:20 left] first" in str(bar)
        with progress.Bar(10, "no part of it") as bar:
            assert "whole run" not in str(bar)


def test_the_plan_of_a_training_has_its_bars(trained):
    """Their titles, as checkpoints have them."""
    folders = {path.name for path in trained[0].rglob("checkpoints/*_*") if path.is_dir()}
    planned = train.plan(tiny.config())
    assert folders == {title for title in planned if "_" in title} and all(value > 0 for value in planned.values())
