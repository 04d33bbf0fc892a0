"""The ablation on a tiny run: its tables, what it keeps, and its picture."""

import shutil

import numpy as np
import pytest
import tiny

from data_pipelines.io import files
from experiments import ablation

ROWS = (("5  both", "small", "p2", ("rec", "reg")), ("6  all", "small", "p3", ("rec", "reg")))


@pytest.mark.long
def test_rows_are_scored_and_compared_by_scene_and_kept(trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0], tmp_path / "small")
    ablation.run_ablation(tmp_path, 0, ROWS, {"small": tiny.config()})
    values = files.read_json(tmp_path / "table.json")
    assert [row["title"] for row in values] == [name for name, *_ in ROWS]
    scores = {name: np.array(value) for name, value in values[1]["scores"].items()}
    assert len(set(values[1]["scenes"])) == 2 and {len(value) for value in scores.values()} == {10}
    for share in ("attention", "activity", "silhouette"):
        assert np.all((scores[share] > 0) & (scores[share] < 1)), share
    text = (tmp_path / "table.txt").read_text()
    assert "2 scenes, 10 cases" in text and "P3 (6 - 5)" in text and "CAL" not in text
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(ablation.evaluate, "evaluate", lambda *_, **__: pytest.fail("scored again"))
    (tmp_path / "table.txt").unlink()
    ablation.run_ablation(tmp_path, 0, ROWS, {"small": tiny.config()})
    assert (tmp_path / "table.txt").read_text() == text
