"""Registering many cases: what is said of each, what a failure leaves, and how a stopped run goes on."""

import dataclasses
import html.parser
import json
import math

import numpy as np
import pytest
from PIL import Image

from data_pipelines import cases
from data_pipelines.io import files
from experiments.patients import registering
from experiments.patients import spines
from experiments.patients.workdir import load
from experiments.patients.workdir import ScanDigests
from experiments.reports import page
from experiments.reports import pictures
from experiments.reports import verdicts
from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.registration import pipeline
from radgs_jax.registration.pipeline import RegisterOptions

QUICK = RegisterOptions(passes=1)


def _answers(folder):
    return [(r["id"], r["T"]) for r in files.read_json(folder / "results.json")["results"]]


def test_a_vertebra_beyond_the_frame_of_a_found_start_is_a_failure_that_says_so(ready, rows, tmp_path):
    """Not a start pose that is taken for another one by mistake."""
    away = rows[0].start.copy()
    away[2, 3] += 150.0
    lost = dataclasses.replace(rows[0], name="lost", start=away, start_from="the body", start_found=True)
    done = registering.register_rows(
        [rows[1], lost], lambda _: ready("refusing"), tmp_path / "out", QUICK, pictures=False
    )
    (failure,) = done.failures
    wanted = (
        "found 0% of its surface in one of them, where the body was found, wanted a vertebra that every X-ray shows"
    )
    assert failure["id"] == "lost" and failure["reason"].endswith(wanted)


def test_each_case_has_a_line_and_a_refused_one_no_radius(ready, rows, tmp_path):
    said = []
    done = registering.register_rows(
        rows[:1], lambda _: ready("refusing"), tmp_path / "no", QUICK, pictures=False, say=said.append
    )
    assert done.results[0] | {"accepted": False, "uncertainty_mm": None, "covariance": None} == done.results[0]
    assert len(said) == 1 and said[0].startswith("case_0 (L2): REFUSED, do not use this pose; ")
    assert "\n" not in said[0] and "check that" in said[0]
    done = registering.register_rows(
        rows[:1], lambda _: ready("accepting"), tmp_path / "yes", QUICK, pictures=False, say=said.append
    )
    assert done.results[0]["accepted"] and 0 < done.results[0]["uncertainty_mm"] < 2
    assert np.shape(done.results[0]["covariance"]) == (6, 6)
    assert said[1].startswith("case_0 (L2): accepted, within 0.") and said[1].endswith(verdicts.EXACT)


def test_poses_that_cameras_leave_open_are_refused_and_trusted_relative_to_each_other(
    ready, rows, trained, first_case, tmp_path
):
    """Two vertebrae, cameras off by some mm: the spine has a radius in the world, and a smaller one between them."""
    target = dataclasses.replace(first_case[3], label=22)
    pair = [rows[0], dataclasses.replace(rows[0], name="other", target=target)]
    pair = [dataclasses.replace(row, xrays=row.xrays()) for row in pair]
    options, said = dataclasses.replace(QUICK, camera_sd=(math.radians(1.0), 5.0)), []

    def run(kind):
        lower = load(trained[0] / "p3", target, ScanDigests())
        by_label = {first_case[3].label: ready(kind), 22: dataclasses.replace(lower, rule=ready(kind).rule)}
        loaded = lambda wanted: by_label[wanted.label]
        extra = {"spine.json": lambda results: spines.spine(pair, loaded, results, options)}
        registering.register_rows(
            pair, loaded, tmp_path / kind, options, pictures=False, extra_files=extra, say=said.append
        )
        return files.read_json(tmp_path / kind / "results.json")["results"]

    for result in run("accepting"):
        assert result["trusted"] and not result["accepted"] and result["uncertainty_mm"] > 2.0
        assert np.shape(result["camera_motions"]) == (2, 4, 4) and np.shape(result["as_calibrated"]) == (4, 4)
    assert len(said) == 2 and all("REFUSED in the world" in line and "--together" in line for line in said)
    spine = files.read_json(tmp_path / "accepting" / "spine.json")
    assert [one["level"] for one in spine["vertebrae"]] == ["L2", "L3"]
    (segment,) = spine["segments"]
    for one in spine["vertebrae"]:
        assert not one["accepted"] and 2.0 < one["uncertainty_mm"] and 0.0 < segment["uncertainty_mm"] < 2.0
    for result in run("refusing"):
        assert not result["trusted"] and result["uncertainty_mm"] is None
    assert not (tmp_path / "refusing" / "spine.json").exists()


def test_a_stopped_run_goes_on_with_what_it_has_finished(ready, rows, tmp_path, monkeypatch):
    """Ctrl-C in the third case: two are kept, and the whole is the same as without the interruption."""
    prepared, register, calls = ready("accepting"), pipeline.register, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return register(*args)

    def run(name, **options):
        return registering.register_rows(rows, lambda _: prepared, tmp_path / name, QUICK, pictures=False, **options)

    monkeypatch.setattr(pipeline, "register", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        errors.InputError, match=r"found 2 finished case\(s\) of a run that was stopped, wanted --resume"
    ):
        run("out")
    with pytest.raises(errors.InputError, match="with other inputs or flags"):
        run("out", resume=True, inputs={"xrays": "others"})
    assert len(calls) == 3
    run("out", resume=True)
    assert len(calls) == 5
    run("whole")
    assert _answers(tmp_path / "out") == _answers(tmp_path / "whole") and len(_answers(tmp_path / "out")) == 4
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["out", "whole"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]


def test_a_journal_whose_last_line_was_cut_loses_that_case_alone(ready, rows, tmp_path, monkeypatch):
    prepared, calls = ready("accepting"), []

    def stop(line):
        calls.append(line)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registering.register_rows(rows, lambda _: prepared, tmp_path / "out", QUICK, pictures=False, say=stop)
    (partial,) = files.unfinished(tmp_path / "out")
    journal = partial / registering.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-30])
    done = registering.register_rows(
        rows, lambda _: prepared, tmp_path / "out", QUICK, pictures=False, resume=True, say=calls.append
    )
    assert len(calls) == 2 + 3 and [r["id"] for r in done.results] == [row.name for row in rows]


def test_a_case_that_cannot_be_registered_is_a_row_with_its_reason(ready, rows, tmp_path):
    def missing():
        errors.fail("b.npz", "file", "nothing", "an npz file")

    broken = [rows[0], dataclasses.replace(rows[1], xrays=missing), rows[2]]
    prepared, said = ready("accepting"), []
    done = registering.register_rows(
        broken, lambda _: prepared, tmp_path / "out", QUICK, pictures=False, say=said.append
    )
    assert [r["id"] for r in done.results] == ["case_0", "case_2"]
    written = files.read_json(tmp_path / "out" / "results.json")
    assert written["failures"] == [{"id": "case_1", "reason": "b.npz: file: found nothing, wanted an npz file"}]
    assert said[1] == "case_1 (L2): FAILED: b.npz: file: found nothing, wanted an npz file"
    with pytest.raises(errors.InputError, match="b.npz"):
        registering.register_rows(broken[1:2], lambda _: prepared, tmp_path / "none", QUICK, pictures=False)
    assert not (tmp_path / "none").exists() and not files.unfinished(tmp_path / "none")


def test_xrays_are_read_when_their_turn_comes(trained, monkeypatch):
    reads, read = [], cases.read_xrays
    monkeypatch.setattr(cases, "read_xrays", lambda *args: reads.append(args) or read(*args))
    rows = registering.rows_of_cases(trained[0] / "eval" / "cases.json", "real")
    assert len(rows) == 10 and not reads
    assert rows[0].xrays() is rows[0].xrays() and len(reads) == 1


def test_the_picture_says_the_verdict_in_its_banner(ready, rows, tmp_path):
    """Green or red from corner to corner, whatever else is drawn; a third X-ray is a third row."""
    xrays = list(rows[0].xrays())
    for views, kind, strongest in ((xrays, "accepting", 1), (xrays + xrays[:1], "refusing", 0)):
        prepared = ready(kind)
        outcome = pipeline.register(prepared, views, rows[0].start, QUICK)
        poses = {"start": rows[0].start, "estimate": outcome.world_from_ct, "truth": rows[0].start}
        said = verdicts.verdict(outcome, prepared, views)
        near = pictures.close_ups(prepared, views, poses, outcome)
        pictures.registration_picture(tmp_path / "p.png", "a case", said, prepared, views, poses, outcome, near)
        image = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
        assert image.shape[0] > 480 * len(views)
        corners = image[[2, 2, 100, 100], [2, -3, 2, -3]]
        assert (corners.argmax(1) == strongest).all()


class _Page(html.parser.HTMLParser):
    """Tags with their attributes, the JSON of the scene, and the texts of the matrices."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scene, self.matrices, self._inside = [], None, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("class") if tag == "script" else tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "scene":
            self.scene = json.loads(data)
        if self._inside == "pre":
            self.matrices.append(np.array([line.split() for line in data.splitlines()], float))


def test_the_page_needs_nothing_else_and_has_the_pose_for_every_frame(ready, rows, tmp_path):
    views = list(rows[0].xrays())
    outcome = pipeline.register(ready("refusing"), views, rows[0].start, dataclasses.replace(QUICK, reconstruct=True))
    poses = {"start": rows[0].start, "estimate": outcome.world_from_ct}
    said = dataclasses.replace(verdicts.verdict(outcome, ready("refusing"), views), why="<because> & so")
    near = pictures.close_ups(ready("refusing"), views, poses, outcome)
    page.write(tmp_path / "r.html", "<a case>", said, ready("refusing"), views, poses, outcome, near)
    text = (tmp_path / "r.html").read_text()
    assert "{{" not in text and "&lt;because&gt; &amp; so" in text and "<a case>" not in text and len(text) < 2e6
    found = _Page(text)
    assert ("header", {"class": "refused"}) in found.tags
    for tag, attributes in found.tags:
        for name in ("src", "href", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 3 * len(views) and all(image["alt"] for image in images)
    paths = [attributes for tag, attributes in found.tags if tag == "path"]
    assert [one["class"] for one in paths] == ["start", "estimate"] * 2 and all(
        one["d"].startswith("M") for one in paths
    )
    plain, moving, resampling = found.matrices
    np.testing.assert_allclose(plain, outcome.world_from_ct, atol=1e-7)
    np.testing.assert_allclose(moving @ resampling, np.eye(4), atol=1e-4)
    # A point of the CT, and where it lies in the world, in LPS.
    point, flip = np.array([10.0, -20.0, 30.0, 1.0]), np.diag([-1.0, -1.0, 1.0, 1.0])
    np.testing.assert_allclose(moving @ flip @ point, flip @ outcome.world_from_ct @ point, atol=1e-5)
    assert [view["name"] for view in found.scene["views"]] == ["AP", "lateral"]
    for view, xray in zip(found.scene["views"], views):
        E = xray.camera.camera_from_world
        np.testing.assert_allclose(E[:3, :3] @ view["source"] + E[:3, 3], 0.0, atol=0.05)
        corner = E[:3, :3] @ view["corners"][2] + E[:3, 3]
        size = [xray.camera.width, xray.camera.height]
        pixel = xray.camera.intrinsics[:2] * corner[:2] / corner[2] + xray.camera.intrinsics[2:]
        np.testing.assert_allclose(pixel, np.array(size) - 0.5, atol=0.1)
    assert len(found.scene["clouds"]) == 3


def test_views_are_named_by_the_way_their_rays_pass_the_patient(rows):
    ap, lateral = rows[0].xrays()
    turn = rigid_host.matrix(np.array([0.0, 0.0, np.pi]), [0.0, 0.0, 0.0])
    assert verdicts.view_name(lateral, rows[0].start) == "lateral"
    names = {verdicts.view_name(ap, rows[0].start), verdicts.view_name(ap, rows[0].start @ turn)}
    assert names == {"AP", "PA"}
    oblique = rigid_host.matrix(np.array([0.0, 0.0, np.pi / 4]), [0.0, 0.0, 0.0])
    assert verdicts.view_name(ap, rows[0].start @ oblique).startswith("oblique (")


def test_lengths_for_people_are_never_smaller_than_they_are():
    assert [verdicts.rounded_up(mm) for mm in (0.0201, 0.33, 0.999, 1.01, 1.1)] == [
        "0.03",
        "0.33",
        "1.00",
        "1.1",
        "1.1",
    ]


def test_results_are_plain_json(ready, rows, tmp_path):
    """No NaN and no infinity, which JSON does not have."""
    registering.register_rows(rows[:1], lambda _: ready("refusing"), tmp_path / "out", QUICK, pictures=True)
    for path in (tmp_path / "out").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path}: {name}"))
    pose = files.read_json(tmp_path / "out" / "case_0" / "pose.json")
    assert pose["accepted"] is False and pose["uncertainty_mm"] is None and "REFUSED" in pose["verdict"]
