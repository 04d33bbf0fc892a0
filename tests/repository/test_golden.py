"""Golden answers: what the base model and the refinement say of the bench cases, to the last bit.

The digests in golden.json belong to one machine and one set of library versions, since XLA compiles for the CPU that it
finds. There every answer must be the same bits; elsewhere poses must agree within a tenth of a millimetre. A change that is
meant to alter answers writes them anew with

    GOLDEN_WRITE=1 python -m pytest -m slow tests/repository/test_golden.py

and says in its commit why they differ.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines import cases
from data_pipelines import simulation
from data_pipelines.pairs import build
from data_pipelines.pairs import examples
from data_pipelines.pairs import identity
from data_pipelines.phantom import generate
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import case_files
from experiments import configs
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients import workdir as workdirs

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = pathlib.Path(__file__).with_name("golden.json")
BENCH = REPOSITORY.parent / "shared" / "bench" / "cases" / "cases.json"
AWAY_MM = 0.1
"""How far apart answers may be on another machine; they are 0.03 to 0.1 mm from the truth."""

pytestmark = pytest.mark.slow


def machine():
    """What decides the bits: the CPU's features and the libraries that compile and compute."""
    flags = ""
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line.partition(":")[2].strip() for line in lines if line.startswith("flags")), "")
    parts = [platform.machine(), flags, jax.__version__, jax.lib.__version__, np.__version__, os.cpu_count()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def digest(*arrays):
    """Short digest of numeric arrays: types, shapes and bytes."""
    state = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        state.update(f"{array.dtype.str} {array.shape}".encode() + array.tobytes())
    return state.hexdigest()[:16]


@pytest.fixture(scope="module")
def golden():
    """The kept answers, and whether they are this machine's; with GOLDEN_WRITE, what is found is kept at the end."""
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if not os.environ.get("GOLDEN_WRITE"):
        if not kept:
            pytest.skip(f"{GOLDEN.name} is not there")
        yield kept
        return
    found = {"machine": machine()}
    yield found
    GOLDEN.write_text(json.dumps({**kept, **found}, indent=1, sort_keys=True) + "\n")


def check(golden, name, found):
    """Holds the answers `found` against those kept as `name`, or keeps them."""
    if os.environ.get("GOLDEN_WRITE"):
        golden[name] = found
    elif golden["machine"] == machine():
        assert found == golden[name]
    else:
        pytest.skip(f"{name}: kept on another machine, whose bits these need not be")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The four vertebrae of the bench, prepared with the base as it is."""
    if not BENCH.exists():
        pytest.skip("the bench is not there")
    stage = configs.StageConfig(pairs=1, ct_pairs=1, steps=(0, 0, 0), learning_rate=1e-4)
    config = dataclasses.replace(configs.DEMO, p3=stage, batch=2)
    volumes = cases.read(BENCH).volumes.values()
    targets = [workdirs.target_of(volume) for volume in volumes]
    folder = tmp_path_factory.mktemp("golden") / "workdir"
    rule = workdirs.read_rule(models.base_folder() / workdirs.CALIBRATION)
    preparing.prepare(config, folder, targets, models.base_folder(), rule=rule)
    return folder


@pytest.mark.parametrize("variant", ("artic", "real"))
def test_answers_of_the_bench(golden, workdir, variant, tmp_path):
    """40 cases by the command as users run it; the compiler's ordinary settings, not the tests' quick ones."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "experiments.register", f"--cases={BENCH}", f"--variant={variant}", "--nopictures"]
    command += [f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    found = {}
    for r in results:
        radius = np.nan if r["uncertainty_mm"] is None else r["uncertainty_mm"]
        bits = digest(np.array(r["T"]), np.array([r["accepted"]]), np.array([radius]))
        covariance = digest(np.array(r["covariance"], float))
        found[r["id"]] = {"bits": bits, "covariance": covariance, "T": np.round(r["T"], 5).tolist()}
    assert len(found) == 40
    if not os.environ.get("GOLDEN_WRITE") and golden["machine"] != machine():
        points = {v: cases.points(cases.read(BENCH), v) for v in cases.read(BENCH).volumes}
        scenes = {c.name: cases.read(BENCH).scenes[c.scene].volume for c in cases.read(BENCH).cases}
        for name, one in found.items():
            moved = [
                points[scenes[name]] @ np.array(T)[:3, :3].T + np.array(T)[:3, 3]
                for T in (one["T"], golden[variant][name]["T"])
            ]
            assert np.linalg.norm(moved[0] - moved[1], axis=1).mean() < AWAY_MM, name
        return
    check(golden, variant, found)


def test_the_base_is_the_same_model(golden):
    model = models.load_model(models.base_folder())
    found = models.model_hash(model)
    if os.environ.get("GOLDEN_WRITE"):
        golden["base"] = found
    assert golden["base"] == found


def test_bytes_of_pairs(golden, tmp_path):
    """One simulated, one measured and one CT pair of a phantom, as they are stored."""
    config = examples.PairConfig(
        simulation.Geometry(window=56, binning=16, vertebra_step_mm=4.0, rest_step_mm=6.0), rest_mm=6.0, vertebra_mm=3.0
    )
    small = generate.PhantomConfig(spacing_mm=(2.5, 2.5, 3.0), levels=(20, 21, 22, 23, 24))
    subject = scan_files.phantoms(tmp_path, [5], small)[0]
    simulated = build.simulated_pairs(tmp_path / "simulated", [(identity.FileScan(*subject), 22)], 1, 3, config, 64)
    case_path = case_files.simulated_cases(
        tmp_path / "cases.json", [subject], (22,), 1, ((0, 10),), 4, configs.DEMO.detector, ("real",)
    )
    case_file = cases.read(case_path)
    measured = build.measured_pairs(
        tmp_path / "measured", case_file, list(case_file.scenes), "real", config, 64, pixel_mm=3.0
    )
    sets = {"simulated": simulated.source[0], "measured": measured.source[0], "moved": simulated.moved[0]}
    check(golden, "pairs", {name: digest(*(record[k] for k in sorted(record))) for name, record in sets.items()})
