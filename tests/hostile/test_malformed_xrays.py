"""Malformed X-rays and calibrations: each is refused in one line that names the file, quickly and in little memory."""

import json
import pathlib
import subprocess
import sys

import malformed_xrays
import numpy as np
import pytest
from xray_files import npy
from xray_files import pixels
from xray_files import png
from xray_files import SHAPE

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S, LIMIT_MB = 2.0, 1024
INTENSITY = {"values": "intensity", "air": 4000.0, "collimator": False}
WORKER = """
import json, resource, sys, time
import numpy as np
import pydicom, pydicom.pixels
from data_pipelines.xrays import radiograph
from radgs_jax import errors
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for line in sys.stdin:
    job = json.loads(line)
    start = time.perf_counter()
    try:
        got = radiograph.read(job["path"], job["calibration"], radiograph.ReadOptions(**job["options"]))
        answer = {"sum": float(got.line_integrals.sum()), "shape": list(got.line_integrals.shape)}
    except errors.InputError as error:
        answer = {"refused": str(error)}
    except BaseException as error:
        answer = {"raised": f"{type(error).__name__}: {error}"}
    answer["seconds"] = time.perf_counter() - start
    answer["mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Reads every file in one worker process; a list of (path, is valid, answer), and the worker's error output."""
    folder = tmp_path_factory.mktemp("malformed")
    jobs = []

    def add(kind, name, data, calibration=None, options=INTENSITY):
        path = folder / f"{kind}_{name}"
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        job = {"path": str(path), "calibration": None, "options": options}
        if calibration:
            job.update(path=calibration, calibration=str(path))
        jobs.append((path, "valid" in name, job))

    for name, data in malformed_xrays.dicom_mutants():
        add("xa", f"{name}.dcm", data, options={"air": 4000.0, "collimator": False})
    for name, data in malformed_xrays.png_mutants():
        add("picture", f"{name}.png", data)
    for name, data in malformed_xrays.tiff_mutants():
        add("picture", f"{name}.tiff", data)
    for name, data in malformed_xrays.npy_mutants():
        add("array", f"{name}.npy", data)
    for name, data in malformed_xrays.nifti_mutants():
        add("nifti", name, data)
    for name, bits in {"unsaid": None, "few": 11, "none": 0, "huge": 10**9, "text": "12", "half": 12.5}.items():
        options = {**INTENSITY, "sign": -1, "bits": bits}
        add("inverted", f"{name}.png", png(pixels() + 400), options=options)
        add("inverted", f"{name}.npy", npy(pixels() + 400.0), options=options)
    xray = next(str(path) for path, valid, _ in jobs if valid and path.suffix == ".dcm")
    for name, data in malformed_xrays.calibration_mutants():
        add("calibration", name, data, calibration=xray, options={"air": 4000.0, "collimator": False})
    worker = subprocess.run(
        [sys.executable, "-c", WORKER],
        input="\n".join(json.dumps(job) for _, _, job in jobs),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=240,
    )
    lines = [json.loads(line) for line in worker.stdout.splitlines()]
    assert len(lines) == len(jobs), (jobs[len(lines)][0], worker.stderr[-2000:])
    return [(path, valid, answer) for (path, valid, _), answer in zip(jobs, lines)], worker.stderr


def test_there_are_many_malformed_files(answers):
    assert sum(not valid for _, valid, _ in answers[0]) >= 150


def test_each_malformed_file_ends_in_one_line_that_names_it(answers):
    wrong = {
        path.name: answer
        for path, valid, answer in answers[0]
        if not valid and (path.name not in answer.get("refused", "") or "\n" in answer["refused"])
    }
    assert not wrong, "\n".join(f"{name}: {answer}" for name, answer in wrong.items())


def test_each_is_refused_quickly_and_in_little_memory(answers):
    slow = {
        path.name: answer for path, _, answer in answers[0] if answer["seconds"] > LIMIT_S or answer["mb"] > LIMIT_MB
    }
    assert not slow
    assert not answers[1].strip(), "libraries wrote to the error output"


def test_their_valid_siblings_are_read(answers):
    wanted = -np.log(pixels() / 4000.0).sum()
    siblings = [(path.name, answer) for path, valid, answer in answers[0] if valid]
    assert len(siblings) >= 10
    for name, answer in siblings:
        assert answer.get("shape") == list(SHAPE), (name, answer)
        assert abs(answer["sum"] - wanted) < 1e-3 * abs(wanted), name
