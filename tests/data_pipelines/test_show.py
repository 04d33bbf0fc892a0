"""Contact sheets: one for every kind of data, and one error line for bad input."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import xray_files

from data_pipelines import cases
from data_pipelines import show
from data_pipelines import simulation
from data_pipelines.ct import scans
from data_pipelines.io import files
from data_pipelines.pairs import pair_store
from data_pipelines.phantom import generate
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick
from data_pipelines.xrays import radiograph
from radgs_jax import errors

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    made = generate.make_phantom(30005, generate.PhantomConfig(spacing_mm=(2.5, 2.5, 3.0), levels=(20, 21, 22, 23, 24)))
    return scan_files.write_verse(made, tmp_path_factory.mktemp("scan"), "show", "LPS")


def _tiles(figure):
    """Titles of the tiles that show an image."""
    figure.canvas.draw()
    shown = [axes for axes in figure.axes if axes.images]
    assert all(np.ptp(np.asarray(axes.images[0].get_array(), float)) > 0 for axes in shown)
    return [axes.get_title() for axes in shown]


def test_a_scan_and_its_simulations(paths):
    scan = scans.read_scan(paths["ct"], paths["mask"])
    assert _tiles(show.of_scan(scan, (21, 22))) == [
        f"{level} {plane}" for level in ("L2", "L3") for plane in ("sagittal", "coronal", "axial")
    ]
    body = simulation.ArticulatedBody(scan, 6.0, 4.0)
    titles = _tiles(show.of_simulation(body, (21,), 2, 5))
    assert len(titles) == 8 and titles[0] == "L2 view 1, clean" and titles[-1] == "seed 5, 1: measured"


@pytest.fixture(scope="module")
def case_file(paths, tmp_path_factory):
    subjects = [("show", paths["ct"], paths["mask"])]
    path = tmp_path_factory.mktemp("cases") / "cases.json"
    return cases.read(
        case_files.simulated_cases(path, subjects, (21,), 1, ((0, 5),), 5, quick.PanelFaults(), variants=("full",))
    )


def test_cases(case_file):
    assert _tiles(show.of_cases(case_file, "full")) == [
        title for view in (1, 2) for title in (f"show_L2_s0 view {view}, full", "the scan at the true pose")
    ]


LEVELS = [
    [{"level": "L2", "uv": [30.5, 41.0], "confidence": 0.934}, {"level": "L3", "uv": [31, 60], "confidence": 0.5}],
    [{"level": "L2", "uv": [28.0, 40.0], "confidence": 1.0}],
]


def test_detections(case_file, tmp_path):
    files.write_json(tmp_path / "found.json", {"show_L2_s0": {"level": "L2", "views": LEVELS}})
    reports = show.read_found(tmp_path / "found.json", case_file)
    figure = show.of_found(case_file, "full", reports)
    assert [title.splitlines()[0] for title in _tiles(figure)] == [f"show_L2_s0 view {v}, full" for v in (1, 2)]
    assert [[(text.get_position(), text.get_text()) for text in axes.texts] for axes in figure.axes] == [
        [((30.5, 41.0), "L2 93"), ((31, 60), "L3 50")],
        [((28.0, 40.0), "L2 100")],
    ]
    files.write_json(tmp_path / "found.json", {"show_L2_s0": {"error": "X-rays: L2: found nothing"}})
    figure = show.of_found(case_file, "full", show.read_found(tmp_path / "found.json", case_file))
    assert all(title.endswith("X-rays: L2: found nothing") for title in _tiles(figure))
    assert not any(axes.texts for axes in figure.axes)


@pytest.mark.parametrize(
    "reports,said",
    [
        ([], "content: found list"),
        ({"another": {}}, "show_L2_s0: found 'nothing'"),
        ({"show_L2_s0": {"error": 3}}, "show_L2_s0.error: found 3"),
        ({"show_L2_s0": {"level": "L2"}}, "show_L2_s0.views: found 'nothing'"),
        ({"show_L2_s0": {"views": LEVELS[:1]}}, "show_L2_s0.views: found 1 views, wanted a list for each of 2 views"),
        ({"show_L2_s0": {"views": [[], {}]}}, "show_L2_s0.views[1]: found {}"),
        ({"show_L2_s0": {"views": [[{"level": "L2", "uv": [3], "confidence": 1}], []]}}, "show_L2_s0.views[0]"),
        ({"show_L2_s0": {"views": [[{"level": "L2", "uv": [3, 4]}], []]}}, "show_L2_s0.views[0]"),
        ({"show_L2_s0": {"views": [[{"level": 22, "uv": [3, 4], "confidence": 1}], []]}}, "show_L2_s0.views[0]"),
        ({"show_L2_s0": {"views": [[{"level": "L2", "uv": ["3", 4], "confidence": 1}], []]}}, "show_L2_s0.views[0]"),
    ],
)
def test_reports_of_another_form_are_refused(case_file, tmp_path, reports, said):
    files.write_json(tmp_path / "found.json", reports)
    with pytest.raises(errors.InputError) as caught:
        show.read_found(tmp_path / "found.json", case_file)
    assert f"found.json: {said}" in str(caught.value) and "\n" not in str(caught.value)


def test_measured_xrays_next_to_the_stored_numbers(tmp_path):
    """This image is mirrored when it is read, and the stored numbers must be mirrored as well."""
    (tmp_path / "xray.dcm").write_bytes(xray_files.dicom())
    figure = show.of_xrays([tmp_path / "xray.dcm"], radiograph.ReadOptions(air=4000.0, collimator=False))
    stored, lines = _tiles(figure)
    assert "as stored" in stored and "line integrals, intensity" in lines
    stored, lines = (np.asarray(axes.images[0].get_array(), np.float64) for axes in figure.axes)
    np.testing.assert_array_equal(stored, xray_files.pixels()[:, ::-1])
    np.testing.assert_allclose(lines, -np.log(stored / 4000.0), atol=1e-5)


@pair_store.named("test.shown/1")
def _pair(config, seed, index):
    del config
    measured, vertebra = np.random.default_rng([seed, index]).uniform(0, 5, (2, 2, 9, 8)).astype(np.float16)
    return {"measured": measured, "vertebra": vertebra, "valid": measured > 0.5}


def test_pairs(tmp_path):
    source = pair_store.write(tmp_path / "store", _pair, 5, {"kind": "noise"}, processes=1)
    titles = _tiles(show.of_pairs(source, 2))
    assert titles[0] == "pair 0 view 1" and titles[4] == "pair 4 view 1" and len(titles) == 8


@pytest.mark.parametrize(
    "program,arguments,said",
    [
        ("show", ["--scan=ct.nii.gz", "--output=a.png"], "flags: --scan and --mask go together"),
        ("show", ["--cases=none.json", "--output=a.png"], "none.json: file: found nothing, wanted a JSON file"),
        ("show", ["--pairs=none", "--found=a.json", "--output=a.png"], "flags: --found goes with --cases"),
        (
            "simulator.bench",
            ["--scan=ct.nii.gz"],
            "flags: --mask, --label: found nothing, wanted --scan, --mask and --label",
        ),
        ("simulator.bench", ["ct.nii.gz"], "flags: found the argument 'ct.nii.gz', wanted flags only"),
        (
            "simulator.bench",
            ["--scan=ct.nii.gz", "--mask=none.nii", "--label=22"],
            "none.nii: file: found nothing, wanted a NIfTI file",
        ),
    ],
)
def test_bad_input_is_one_line(program, arguments, said):
    command = [sys.executable, "-m", f"data_pipelines.{program}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
    assert not (REPOSITORY / "a.png").exists()
