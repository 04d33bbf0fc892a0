"""Contact sheets: a picture for every kind of data, one line for bad input."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import build
from data_pipelines import cases
from data_pipelines import pair_store
from data_pipelines import phantom
from data_pipelines import radiograph
from data_pipelines import scan as scans
from data_pipelines import show
from data_pipelines import simulator
from data_pipelines import xray

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    made = phantom.make_phantom(30005, phantom.PhantomConfig(spacing_mm=(2.5, 2.5, 3.0), levels=(20, 21, 22, 23, 24)))
    return phantom.write_verse(made, tmp_path_factory.mktemp("scan"), "show", "LPS")


def _tiles(figure):
    """Titles of the tiles that show something, and the pixels that are drawn."""
    figure.canvas.draw()
    shown = [axes for axes in figure.axes if axes.images]
    assert all(np.ptp(np.asarray(axes.images[0].get_array(), float)) > 0 for axes in shown)
    return [axes.get_title() for axes in shown]


def test_a_scan_and_its_simulations(paths):
    scan = scans.read_scan(paths["ct"], paths["mask"])
    assert _tiles(show.of_scan(scan, (21, 22))) == [
        f"{level} {plane}" for level in ("L2", "L3") for plane in ("sagittal", "coronal", "axial")
    ]
    body = simulator.Body(scan, 6.0, 4.0)
    titles = _tiles(show.of_simulation(body, (21,), 2, 5))
    assert len(titles) == 8 and titles[0] == "L2 view 1, clean" and titles[-1] == "seed 5, 1: measured"


def test_cases_and_measured_xrays(paths, tmp_path):
    subjects = [("show", paths["ct"], paths["mask"])]
    path = build.simulated_cases(
        tmp_path / "cases.json", subjects, (21,), 1, ((0, 5),), 5, xray.Detector(), variants=("full",)
    )
    assert _tiles(show.of_cases(cases.read(path), "full")) == [
        title for view in (1, 2) for title in (f"show_L2_s0 view {view}, full", "the scan at the true pose")
    ]
    images = cases.read_xrays(cases.read(path).scenes["show_L2_s0"], "full")
    np.save(tmp_path / "xray.npy", images[0])
    (title,) = _tiles(show.of_xrays([tmp_path / "xray.npy"], radiograph.Options(values="line_integrals")))
    assert "line_integrals" in title


def _pair(config, seed, index):
    del config
    images = np.random.default_rng([seed, index]).uniform(0, 5, (3, 2, 9, 8)).astype(np.float16)
    return dict(zip(("rest", "excess", "vertebra"), images))


def test_pairs(tmp_path):
    source = pair_store.write(tmp_path / "store", _pair, 5, {"kind": "noise"}, processes=1)
    titles = _tiles(show.of_pairs(source, 2))
    assert titles[0] == "pair 0 view 1" and titles[4] == "pair 4 view 1" and len(titles) == 8


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--scan=ct.nii.gz", "--output=a.png"], "error: flags: --scan and --mask go together\n"),
        (["--cases=none.json", "--output=a.png"], "error: none.json: file: found nothing, wanted a JSON file\n"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, said):
    command = [sys.executable, "-m", "data_pipelines.show", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said) and not (REPOSITORY / "a.png").exists()
