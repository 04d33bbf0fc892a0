"""The spine's curve, the page of a run, and the pages of studies, tables and trainings."""

import base64
import contextlib
import io
import re
import types

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import transform

from data_pipelines.io import files
from experiments.reports import document
from experiments.reports import index_page
from experiments.reports import overview
from experiments.reports import run_record
from experiments.reports import spine_curve
from experiments.runtime import progress
from experiments.training import history
from radgs_jax.geometry import rigid_host

LORDOSIS_DEG, RADIUS_MM = 40.0, 150.0


def _turned(axis, degrees, centre=(0.0, 0.0, 0.0)):
    twist = [*(np.radians(degrees) * np.eye(3)["xyz".index(axis)]), 0.0, 0.0, 0.0]
    return rigid_host.motion_about(np.asarray(centre), np.asarray(twist))


@pytest.fixture
def spine():
    """Five vertebrae, head first, on an arc that is hollow at the back."""
    leans = np.radians(np.linspace(-0.5, 0.5, 5) * LORDOSIS_DEG)
    bones = []
    for label, lean in zip(range(20, 25), leans):
        box = np.eye(4)
        # Its +z leans to the front by `lean`; the arc's centre lies behind.
        box[:3, :3] = transform.Rotation.from_euler("x", -lean).as_matrix()
        box[:3, 3] = [30.0, RADIUS_MM * np.cos(lean) - 200.0, -RADIUS_MM * np.sin(lean) - 400.0]
        bones.append(types.SimpleNamespace(label=label, ct_from_box=box))
    return bones


def test_a_spine_that_has_moved_as_one_has_its_ct_curve(spine):
    pose = rigid_host.matrix(np.array([0.5, -1.0, 2.0]), [300.0, -20.0, 70.0])
    found = spine_curve.curves(spine, [pose] * 5)
    for name in ("centres", "directions"):
        np.testing.assert_allclose(getattr(found["X-rays"], name), getattr(found["CT"], name), atol=1e-9)
    assert found["CT"].lordosis_deg() == pytest.approx(LORDOSIS_DEG) and found["CT"].to_right_deg() == pytest.approx(0)


@pytest.mark.parametrize("axis, degrees", [("x", 7.0), ("x", -7.0), ("y", 9.0)])
def test_a_bent_spine_has_the_angle_that_it_was_bent_by(spine, axis, degrees):
    """Extension turns the upper end about the axis to the right, and it then leans to the back; +y turns it to the right."""
    bent = [_turned(axis, degrees * k / 4.0, bone.ct_from_box[:3, 3]) for k, bone in zip((4, 3, 2, 1, 0), spine)]
    pose = rigid_host.matrix(np.array([0.1, 0.2, -0.3]), [5.0, -20.0, 7.0])
    found = spine_curve.curves(spine, [pose @ one for one in bent])["X-rays"]
    if axis == "x":
        assert found.lordosis_deg() - LORDOSIS_DEG == pytest.approx(degrees) and found.to_right_deg() == pytest.approx(
            0
        )
    else:
        # In the coronal plane of the CT, which sees a leaning vertebra shortened.
        up = bent[0][:3, :3] @ spine[0].ct_from_box[:3, 2]
        assert found.to_right_deg() == pytest.approx(np.degrees(np.arctan2(up[0], up[2]))) and up[0] > 0
    segments = [spine_curve.segment(spine[k : k + 2], [pose @ one for one in bent[k : k + 2]]) for k in range(4)]
    assert (segments[0]["upper"], segments[0]["lower"]) == ("L1", "L2")
    turned = [np.linalg.norm(list(one["turn_deg"].values())) for one in segments]
    np.testing.assert_allclose(turned, abs(degrees) / 4, atol=1e-6)


def test_the_page_of_a_run_has_verdicts_the_spine_and_each_case_once(spine, tmp_path):
    results = [
        {"id": "L1", "T": np.eye(4).tolist(), "accepted": True, "uncertainty_mm": 0.123, "runtime_s": 0.5},
        {"id": "L2", "T": _turned("x", 3.0).tolist(), "accepted": True, "uncertainty_mm": 0.2, "runtime_s": 0.5},
        {"id": "L3", "T": np.eye(4).tolist(), "accepted": False, "uncertainty_mm": None, "runtime_s": 0.7},
    ]
    for one in results:
        said = "accepted, within" if one["accepted"] else "REFUSED, do not"
        files.write_json(tmp_path / one["id"] / "pose.json", {"verdict": f"{one['id']}: {said}; why; advice"})
        document.write(tmp_path / one["id"] / overview.NAME, one["id"], f"<article>of {one['id']}</article>")
    record = {
        "command": "python -m x --a='<b>'",
        "begun": "then",
        "wall_s": 1.0,
        "cpu_s": 2.0,
        "versions": {"jax": "1"},
    }
    files.write_json(tmp_path / "run.json", {**record, "machine": {}, "inputs": {"ct": "abc"}, "warnings": ["careful"]})
    failures = [{"id": "L4", "reason": "no <X-ray> shows it"}]
    overview.write(tmp_path, results, failures, {"L1": spine[0], "L2": spine[1], "L3": spine[2]})
    text = (tmp_path / overview.NAME).read_text()
    for wanted in (
        "3 registered: 2 accepted, 1 refused",
        'class="mark refused">L3: REFUSED, do not<',
        ">0.13<",
        "failed: no &lt;X-ray&gt; shows it",
        'href="L1/report.html"',
        "L1 to L2, degrees",
        "<td class=number>-3.0</td>",
        "&lt;b&gt;",
        "careful",
    ):
        assert wanted in text, wanted
    assert [text.count(f"<article>of {one['id']}</article>") for one in results] == [1, 1, 1] and "L3 to" not in text
    # Without a common acquisition, and of many cases, there is no curve, and the pages are linked alone.
    many = [{**results[0]} for _ in range(overview.MOST_INSIDE + 1)]
    overview.write(tmp_path, many, (), {})
    assert "<article>" not in (tmp_path / overview.NAME).read_text()


def test_an_index_page_needs_nothing_else_and_shows_what_is_there(tmp_path):
    Image.new("RGB", (2000, 30), "red").save(tmp_path / "wide.png")
    sections = [
        index_page.table("Scores", ["system", "mTRE"], [["a < b", "0.1"], ["c", "0.2"]], "Lower is better."),
        index_page.text("As text", "x  y\n1 <2"),
        index_page.pictures("Plots", {tmp_path / "wide.png": "a & b", tmp_path / "missing.png": "nothing"}),
        index_page.pictures("None", {tmp_path / "missing.png": "nothing"}),
        index_page.links("Files", tmp_path, ["wide.png", "missing.txt"]),
    ]
    index_page.write(tmp_path, "A <title>", sections, run_record.RunRecord())
    page = (tmp_path / "report.html").read_text()
    assert "<h1>A &lt;title&gt;</h1>" in page and '<th scope="row">a &lt; b</th>' in page and "1 &lt;2" in page
    assert page.count("<img") == 1 and 'alt="a &amp; b"' in page and "None" not in page and "missing" not in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    (encoded,) = re.findall(r"data:image/webp;base64,([\w+/=]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).width == index_page.WIDTH_PX


def test_scalars_are_read_back_as_far_as_they_are_written(tmp_path):
    with contextlib.closing(progress.Log(tmp_path, "p1_rec")) as log:
        for step in range(1, 6):
            log.scalars(step, {"loss": 10.0 / step, "examples_per_s": 3.0})
        log.image(5, "picture", np.zeros((4, 4)))
    folder = tmp_path / "tensorboard" / "p1_rec"
    (path,) = folder.iterdir()
    steps, values = history.scalars(folder)["loss"]
    np.testing.assert_allclose(values, 10.0 / steps, rtol=1e-6)
    assert steps.tolist() == [1, 2, 3, 4, 5] and set(history.scalars(folder)) == {"loss", "examples_per_s"}
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        history.scalars(folder)  # no error, wherever a writer has got to
    path.write_bytes(whole[: len(whole) // 2])
    assert len(history.scalars(folder)["loss"][0]) in (2, 3, 4)
