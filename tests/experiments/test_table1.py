"""Table 1: all systems on tiny cases, what they may know, a run that goes on, and the statistics."""

import dataclasses
import json
import math
import pathlib
import shutil
import time
from typing import Any
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_systems

from data_pipelines import cases
from data_pipelines.io import files
from experiments import table1
from experiments.comparison import answers
from experiments.comparison import pictures
from experiments.comparison import subjects
from experiments.comparison import systems
from experiments.comparison import tables
from experiments.comparison import training
from radgs_jax.training import update

SIZES = tiny_systems.SIZES
SEVEN = (
    "DiffVox",
    "SAX-NeRF",
    "3DGR-CAR",
    "R2-Gaussian",
    "DiffPose, crop twice, then vertebra",
    "DDGS-CT, vertebra",
    "TS-SAR, reconstructed from its title",
)
"""A row of each system of the paper's table: of DiffPose the one whose code the others share."""
SHARING = ("DiffPose, vertebra", "DiffPose, crop", "DDGS-CT, crop", "plain 2D network")
"""Rows that run what others run, with another volume, or a network that has tests of its own: most of what they take is compiling,
so that only the slow tests ask them."""
TRACED = ("diffpose", "ts_sar")
"""Networks whose training step is traced but not compiled, which would take a third of the run; a slow test trains them."""
RUN = tuple(system for system in systems.SYSTEMS if system.title not in SHARING)


def _bytes(folder):
    """Name -> content of all answers."""
    found = sorted(pathlib.Path(folder).rglob("*.npz"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def table(trained, tmp_path_factory):
    """A table about `real` X-rays of a held-out vertebra of the trained run: (case file, folder with W and T, text)."""
    folder = tmp_path_factory.mktemp("table1")
    raw = files.read_json(trained[0] / "eval" / "cases.json")
    scene = raw["scenes"][0]
    raw["scenes"], raw["cases"] = [scene], [case for case in raw["cases"] if case["scene"] == scene["id"]][:2]
    raw["volumes"] = {scene["volume"]: raw["volumes"][scene["volume"]]}
    of_files = [(raw["volumes"][scene["volume"]], ("full_ct", "full_mask")), (scene, ("xrays",))]
    for value, fields in of_files:
        value |= {field: str(trained[0] / "eval" / value[field]) for field in fields}
    path = folder / "cases.json"
    files.write_json(path, raw)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(update, "update_of", tiny_systems.traced(TRACED))
        return path, folder, _made(path, folder, trained)


def _made(path, folder, trained, asked=RUN, variants=("real",), sizes=SIZES):
    base = trained[0] / "p2" / "model"
    return table1.make_table(path, variants, folder / "W", folder / "T", asked, sizes, tiny.config(), base)


@pytest.fixture
def unscored(monkeypatch):
    """Leaves out what costs more than tiny answers: pictures, and scores of volumes."""
    monkeypatch.setattr(pictures, "write", lambda *_: None)
    monkeypatch.setattr(answers, "_volume_score", lambda *_: dict.fromkeys(tables.VOLUME_SCORES, 0.5))


def _titles(text):
    """The sorted titles of each table's rows, by the table's name."""
    found = {}
    for part in text.strip().split("\n\n"):
        name, _, *rows = part.splitlines()
        found[name] = sorted(row.split("  ")[0] for row in rows)
    return found


def _wanted(asked, variants):
    return {
        f"{kind}, variant {variant}": sorted(
            s.title for s in asked if s.kind == kind and (s.variants is None or variant in s.variants)
        )
        for variant in variants
        for kind in (subjects.RECONSTRUCTION, subjects.REGISTRATION)
    }


def test_a_table_has_every_row_of_its_variants(table, trained, tmp_path, unscored, monkeypatch):
    """With answers that cost nothing."""
    monkeypatch.setattr(cases, "read_xrays", lambda *_: ())

    def free(system):
        if system.kind == subjects.REGISTRATION:
            answer = lambda subject, given, params, sizes, key: given.world_from_ct
        else:
            answer = lambda subject, given, params, sizes, key: (np.zeros((2, 2, 2)), given.world_from_ct)
        return dataclasses.replace(system, answer=answer, prepare=None)

    variants = ("easy", "artic", "real")
    text = _made(table[0], tmp_path, trained, [free(system) for system in systems.SYSTEMS], variants)
    assert _titles(text) == _wanted(systems.SYSTEMS, variants)
    titles = [system.title for system in systems.SYSTEMS]
    assert len(set(titles)) == len(titles) and set(SEVEN + SHARING) <= set(titles)


def test_what_is_run_has_its_rows_pictures_and_results(table):
    path, folder, text = table
    case_file, out = cases.read(path), folder / "T"
    assert _titles(text) == _wanted(RUN, ["real"])
    assert (out / "volumes_real.png").exists() and (out / "poses_real.png").exists()
    found = json.loads((out / "results_ddgs_ct_vertebra_real.json").read_text())
    assert [one["id"] for one in found["results"]] == [case.name for case in case_file.cases]
    zero = next(row for row in json.loads((out / "table.json").read_text())["real"] if row["title"] == "zero volume")
    # An empty volume scores well by the paper's protocol, which is why both stand there.
    assert zero["scores"]["ssim_paper"][0] > 0.6 > zero["scores"]["ssim_honest"][0]
    assert (out / "table.md").read_text().count("| zero volume |") == 1
    page = (out / "report.html").read_text()
    assert page.count('<th scope="row">zero volume</th>') == 1 and page.count("data:image/webp;base64,") == 2


def test_no_system_sees_the_truth(table, trained, tmp_path, unscored):
    """The same bytes where true poses, points and notes about the starts are false."""
    path, folder, _ = table
    raw = files.read_json(path)
    for scene in raw["scenes"]:
        scene["T_gt"][0][3] += 37.0
        scene["T_rest"] = np.eye(4).tolist()
    for case in raw["cases"]:
        case |= {"bin_mm": [20, 25], "init_mtre_mm": 1.0, "init_rot_deg": 1.0}
    for volume in raw["volumes"].values():
        volume["points"], volume["centre"] = (np.array(volume["points"]) + 9.0).tolist(), [0.0, 0.0, 0.0]
    false = tmp_path / "cases.json"
    files.write_json(false, raw)
    shutil.copytree(folder / "W", tmp_path / "W")
    _made(false, tmp_path, trained)
    assert _bytes(tmp_path / "T") == _bytes(folder / "T")


def test_a_stopped_run_goes_on_where_it_was(table, trained, tmp_path, unscored):
    """An answer of each of the seven systems is missing, and no other one is touched."""
    path, folder, _ = table
    shutil.copytree(folder / "T", tmp_path / "T")
    shutil.copytree(folder / "W", tmp_path / "W")
    kept = sorted((tmp_path / "T" / "answers").rglob("*.npz"))
    systems_of = [one.parents[1].name for one in kept]
    gone = [kept[systems_of.index(answers.slug(title))] for title in SEVEN]
    before = {one: one.stat().st_mtime_ns for one in kept if one not in gone}
    for one in gone:
        one.unlink()
    _made(path, tmp_path, trained)
    assert _bytes(tmp_path / "T") == _bytes(folder / "T")
    assert all(one.stat().st_mtime_ns == at for one, at in before.items())


def test_an_answer_is_timed_until_it_is_there():
    """Calls of compiled programs return before their results are there."""
    run = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, a: jnp.sin(a @ a), x))
    x = jnp.full((300, 300), 1e-3)
    run(x).block_until_ready()
    began = time.process_time()
    run(x).block_until_ready()
    alone = time.process_time() - began
    system = subjects.System("x", subjects.RECONSTRUCTION, lambda *_: (run(x), np.eye(4)))
    subject = given = params = cast(Any, None)
    found, times = answers.timed(system, subject, given, params, SIZES, jax.random.key(0))
    assert found[0].shape == x.shape and times["cpu_s"] > 0.5 * alone


@pytest.mark.slow
def test_rows_that_share_code_run_and_what_was_traced_trains(table, trained, tmp_path):
    titles = sorted((*SHARING, SEVEN[-1]))
    # Other sizes are trained anew.
    one_step = {name: dataclasses.replace(getattr(SIZES, name), steps=1) for name in TRACED}
    asked = [system for system in systems.SYSTEMS if system.title in titles]
    text = _made(table[0], tmp_path, trained, asked, sizes=dataclasses.replace(SIZES, **one_step))
    assert _titles(text)["registration, variant real"] == titles
    kept = [np.load(one)["world_from_ct"] for one in (tmp_path / "T" / "answers").rglob("*.npz")]
    assert len(kept) == 2 * len(titles) and all(np.isfinite(pose).all() for pose in kept)


def test_what_a_stopped_preparation_cost_is_not_known(tmp_path):
    training.with_cost(tmp_path / "cost.json", True, lambda: {"weights": np.zeros(3)})
    cost = training.kept_cost(tmp_path / "cost.json")
    row = dataclasses.replace(_row("x", [1.0], ["a"]), preparation_s=cost.cpu_s)
    assert math.isnan(cost.cpu_s) and cost.parameters == 3
    assert "not known" in tables.registration([row], "")[1][0] and tables.as_values(row)["preparation_s"] is None


def test_other_sizes_are_asked_anew(table):
    system = next(s for s in systems.SYSTEMS if s.title == "DiffVox")
    other = dataclasses.replace(SIZES, diffvox=dataclasses.replace(SIZES.diffvox, steps=4))
    assert answers.digest(system, SIZES, 0) != answers.digest(system, other, 0)
    assert answers.digest(system, SIZES, 0) == answers.digest(system, dataclasses.replace(SIZES, plain_steps=9), 0)


def _row(title, error, scenes):
    values = {"start_mm": np.full(len(error), 3.0), "error_mm": np.asarray(error, float)}
    return tables.Row(title, tuple(scenes), values, np.ones(len(error)), np.ones(len(error)), 0.0, 0)


def test_systems_are_tested_by_scene_and_corrected_for_their_number():
    """Holm's correction as it reads: the k-th smallest of n p-values times n - k, and never below the one before."""
    assert tables.holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    rng = np.random.default_rng(0)
    scenes = np.repeat([f"s{i}" for i in range(10)], 3)
    ours = _row("ours", rng.uniform(0, 0.1, 30), scenes)
    worse, same = _row("worse", ours.scores["error_mm"] + 1.0, scenes), _row("same", ours.scores["error_mm"], scenes)
    found = tables.against(ours, [worse, same], "error_mm")
    # Ten scenes that all differ in one direction: 2 / 2^10, one test that counts.
    assert found[0] == pytest.approx(2.0 / 2**10) and math.isnan(found[1])


def test_intervals_draw_whole_scenes():
    scenes = ["a"] * 50 + ["b"] * 50
    row = _row("x", [0.0] * 50 + [1.0] * 50, scenes)
    assert tables.interval(row, "error_mm", np.mean) == (0.0, 1.0)
    head, cells = tables.registration([row, _row("y", [0.2] * 100, scenes)], "y")
    assert [line[0] for line in cells] == ["y", "x"] and len(head) == len(cells[0])
    assert tables.as_markdown(head, cells).splitlines()[2].startswith("| y | 100 |")
