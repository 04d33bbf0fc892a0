"""Home tests of Table 1's systems: all of them on tiny sizes, a run that goes on, and what is said of the results."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny
import tiny_systems

from data_pipelines import cases
from data_pipelines.simulation import around
from experiments import home_tests
from experiments.comparison import answers
from experiments.comparison import at_home
from experiments.comparison import home_report
from experiments.comparison import subjects
from experiments.patients import models
from radgs_jax import errors
from radgs_jax.baselines import box
from radgs_jax.models import radgs_reg
from radgs_jax.models.trained import MEAN_SHAPE
from radgs_jax.models.trained import Model
from radgs_jax.training import update

pytestmark = pytest.mark.long

NETWORKS = ("gcp", "diffpose", "ts_sar")
"""Trained networks, whose steps have tests of their own: here they are traced alone."""
SIZES = dataclasses.replace(tiny_systems.SIZES, gr_car=dataclasses.replace(tiny_systems.SIZES.gr_car, gaussians=41))
"""Of their own in what is traced, since steps are kept by their sizes for all tests of a process."""

CONFIG = tiny.config(phantom=dataclasses.replace(tiny.config().phantom, levels=(19, 20, 21, 22, 23, 24)))
"""Whose phantom has the whole of the vertebra that is tested."""


def _contents(folder, pattern):
    """Name -> content of the files in a folder."""
    found = sorted(path for path in pathlib.Path(folder).rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _run(place, asked=home_tests.TESTED, views=(2,), sizes=SIZES):
    case_path = place / "W" / "phantom" / "home_0" / "cases.json"
    out = place / "T", asked, sizes, CONFIG
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(update, "update_of", tiny_systems.traced(NETWORKS))
        return home_tests.run_home_tests(case_path, place / "W", *out, place / "base", views)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with W and T of a finished run of all systems, and its text."""
    folder = tmp_path_factory.mktemp("home")
    params = jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(0))
    models.save_model(
        folder / "base", Model(jax.device_get(params), tiny.MODEL, {0: np.zeros(MEAN_SHAPE)}), "untrained"
    )
    home_tests.rigid_cases(folder / "W" / "phantom", CONFIG, 1)
    return folder, _run(folder)


def test_all_systems_are_tested_and_what_they_reach_is_said(place):
    folder, text = place
    parts = {part.splitlines()[0]: part.splitlines()[2:] for part in text.strip().split("\n\n")}
    assert list(parts) == [*(part.title for part in home_report.PARTS.values()), "what must hold"]
    titles = [[line.split("  ")[0] for line in lines] for lines in parts.values()]
    assert titles[0] == list(at_home.RECONSTRUCTING) and titles[1] == list(at_home.REGISTERING)
    assert titles[2] == list(at_home.DRAWING) and titles[3] == [at_home.TS_SAR]
    assert set(titles[4]) == {system.title for system in home_tests.TESTED}
    # Two steps reach nothing, and the report says so.
    reached = [line.split()[-1] for line in parts["what must hold"] if "above 25 dB" in line]
    assert reached == ["no"] * len(at_home.RECONSTRUCTING)
    for name in ("home.txt", "home.md", "home.json"):
        assert (folder / "T" / name).stat().st_size > 100
    assert (folder / "T" / "home.txt").read_text() == text
    assert (folder / "T" / "views.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_where_it_was(place, tmp_path):
    """Results that are there are not made again, so that the bytes are the same; others are made as they were."""
    folder, text = shutil.copytree(place[0], tmp_path / "home"), place[1]
    written, results = _contents(folder / "T", "home.*"), _contents(folder / "T", "answers/**/*")
    assert _run(folder) == text
    assert _contents(folder / "T", "home.*") == written and _contents(folder / "T", "answers/**/*") == results
    asked = [system for system in home_tests.TESTED if system.title in ("DiffVox", "DDGS-CT, crop")]
    gone = [name for name in results if "diffvox/views" in name or "ddgs_ct_crop" in name and "s0_b1" in name]
    gone += [name for name in results if "ddgs_ct_crop/registration" in name]
    assert len(gone) == 5
    before = {name: (folder / "T" / name).stat().st_mtime_ns for name in results if name not in gone}
    for name in gone:
        (folder / "T" / name).unlink()
    _run(folder, asked)
    assert all((folder / "T" / name).stat().st_mtime_ns == at for name, at in before.items())
    again = _contents(folder / "T", "answers/**/*")
    assert again.keys() == results.keys()
    found, wanted = (_without_times(folder, contents) for contents in (again, results))
    assert found == wanted


def _without_times(folder, contents):
    """Results of `_contents` without what the clock said."""
    values = {name: json.loads(data) if name.endswith(".json") else data for name, data in contents.items()}
    for value in values.values():
        if isinstance(value, dict):
            for name in ("runtime_s", "cpu_s"):
                value.pop(name, None)
    return values


def test_what_is_scored_is_what_the_views_show(place):
    folder, _ = place
    case_file = cases.read(folder / "W" / "phantom" / "home_0" / "cases.json")
    (subject,) = subjects.subjects(case_file, CONFIG, folder / "W", folder / "base").values()
    vertebra = subject.prepared.vertebra
    density, _ = around.in_box(vertebra, box.SIDE, 1.0)

    def answer(subject, given, params, sizes, key):
        frame = box.world_from_box(given.world_from_ct, vertebra.ct_from_box[:3, 3])
        np.testing.assert_allclose(frame, np.eye(4), atol=1e-9)
        views = box.box_views(given.xrays, frame)
        assert views.images.shape == (3, box.CROP_PX, box.CROP_PX) and np.asarray(views.valid).all()
        drawn = box.render(density, box.box_grid(box.SIDE), views, 1.0)
        off = np.asarray(drawn - views.images)
        assert views.images.max() > 0.5 and np.sqrt(np.mean(off**2)) < 0.02 * views.images.max()
        return density, frame

    system = subjects.System("the truth", subjects.RECONSTRUCTION, answer)
    value = at_home.reconstruct(subject, system, SIZES, 0, 3)
    assert value["psnr_honest"] > 60.0 and value["ssim_honest"] > 0.999 and value["cpu_s"] > 0.0


def test_more_views_take_more_steps_of_the_system_that_sees_one_a_step():
    steps = [at_home.sizes_for(subjects.CPU, count).sax_nerf.steps for count in at_home.VIEWS]
    assert steps == [1000, 3000, 15_000]
    assert at_home.sizes_for(subjects.CPU, 30).diffvox == subjects.CPU.diffvox


def _holds(part, result):
    return [holds for _, _, holds in home_report.PARTS[part].checks(result)]


def test_what_must_hold_is_judged_by_the_numbers():
    assert tuple(home_report.PARTS) == at_home.PARTS
    views = lambda *psnr: {f"views_{n}": {"psnr_honest": value} for n, value in zip(at_home.VIEWS, psnr)}
    assert _holds("reconstruction", views(12.0, 18.0, 25.1)) == [True, True]
    assert _holds("reconstruction", views(12.0, 11.9, 25.1)) == [False, True]
    assert _holds("reconstruction", views(12.0, 18.0, 24.9)) == [True, False]
    rigid = lambda *error: {"registration": {"scores": {"error_mm": list(error)}}}
    assert _holds("registration", rigid(0.1, 0.99)) == [True] and _holds("registration", rigid(0.1, 1.01)) == [False]
    drawn = lambda *psnr: {
        "projections": dict(zip(("psnr", "early_aware_psnr", "early_uniform_psnr"), psnr), early_steps=500)
    }
    assert _holds("projections", drawn(36.0, 30.0, 29.0)) == [True, True]
    assert _holds("projections", drawn(34.0, 29.0, 30.0)) == [False, False]
    stepped = lambda *mm: {"steps": dict(zip(("start_mm", "coarse_mm", "fine_mm"), mm))}
    assert _holds("steps", stepped(8.0, 4.0, 3.0)) == [True] and _holds("steps", stepped(8.0, 4.0, 4.1)) == [False]


def test_a_system_without_a_home_test_is_refused():
    assert [one.title for one in answers.chosen(["ddgs"], home_tests.TESTED)] == list(at_home.DRAWING)
    with pytest.raises(errors.InputError, match="--systems: found RadGS-Reg, wanted beginnings of: DiffVox; SAX-NeRF"):
        answers.chosen(["RadGS-Reg"], home_tests.TESTED)
