"""A hundred wrong inputs on the bench: none may come out accepted, and most must be told at once. Slow; needs the bench."""

import dataclasses
import pathlib
import re
import sys
import time

import fresh_python
import numpy as np
import pytest

from data_pipelines import cases
from experiments import configs
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients import workdir
from experiments.runtime.kept_programs import kept
from radgs_jax import errors
from radgs_jax import metrics
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import pipeline
from radgs_jax.registration import plausibility

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BENCH = REPOSITORY.parent / "shared" / "bench" / "cases" / "cases.json"
MEDIAN_S = 5.0


def _turned(xray, degrees):
    """The same X-ray with a camera turned about the world's head axis: what a second, nearly equal view would claim."""
    turn = rigid_host.matrix(np.array([0.0, 0.0, np.radians(degrees)]), [0.0, 0.0, 0.0])
    camera = dataclasses.replace(xray.camera, camera_from_world=xray.camera.camera_from_world @ turn)
    shifted = np.roll(xray.line_integrals, 1, axis=1)
    return XRay(shifted, xray.valid, camera)


def _with(xray, image):
    return XRay(image.astype(np.float32), xray.valid, xray.camera)


def _noise(xray, rng):
    return _with(xray, rng.normal(3.0, 1.0, xray.line_integrals.shape))


WRONG = {
    "mirrored": lambda ap, lateral, rng: [_with(x, x.line_integrals[:, ::-1]) for x in (ap, lateral)],
    "upside down": lambda ap, lateral, rng: [_with(x, x.line_integrals[::-1]) for x in (ap, lateral)],
    "swapped": lambda ap, lateral, rng: [_with(ap, lateral.line_integrals), _with(lateral, ap.line_integrals)],
    "scaled by 1000": lambda ap, lateral, rng: [_with(x, 1000.0 * x.line_integrals) for x in (ap, lateral)],
    "black": lambda ap, lateral, rng: [_with(x, np.full(x.line_integrals.shape, 11.0)) for x in (ap, lateral)],
    "noise": lambda ap, lateral, rng: [_noise(x, rng) for x in (ap, lateral)],
    "same view twice": lambda ap, lateral, rng: [ap, ap],
    "5 degrees apart": lambda ap, lateral, rng: [ap, _turned(ap, 5.0)],
    "10 degrees apart": lambda ap, lateral, rng: [lateral, _turned(lateral, 10.0)],
}


def _prepare(folder):
    """The bench's case file and a function that loads its vertebrae, prepared without training."""
    case_file = cases.read(BENCH)
    targets = [workdir.target_of(volume) for volume in case_file.volumes.values()]
    if not folder.exists():
        preparing.prepare(configs.DEMO, folder, targets, models.base_folder(), minutes=0.0)
    load = workdir.loader(folder)
    return case_file, lambda volume: load(workdir.target_of(volume))


def _register(prepared, xrays, start):
    """The pose that is accepted, as the command decides it, or None; and the seconds that it took."""
    began = time.perf_counter()
    try:
        plausibility.check(prepared.vertebra, xrays, start)
        outcome = pipeline.register(prepared, xrays, start, compile=kept)
    except errors.InputError:
        return None, time.perf_counter() - began
    return outcome.world_from_ct if outcome.confidence.accepted else None, time.perf_counter() - began


def main(folder):
    """Registers the wrong inputs, prints a line for each, and a summary."""
    case_file, load = _prepare(pathlib.Path(folder))
    rng, taken, accepted = np.random.default_rng(0), [], []
    volumes = list(case_file.volumes)
    for case in case_file.cases[::4][:10]:
        scene = case_file.scenes[case.scene]
        prepared = load(case_file.volumes[scene.volume])
        ap, lateral = cases.read_xrays(scene, "real")
        inputs = {name: (prepared, change(ap, lateral, rng), case.world_from_ct) for name, change in WRONG.items()}
        # Another level's vertebra, started where this one is. The X-rays show it too: if it is found there, that is right.
        other = load(case_file.volumes[volumes[(volumes.index(scene.volume) + 2) % len(volumes)]])
        start = case.world_from_ct @ prepared.vertebra.ct_from_box @ np.linalg.inv(other.vertebra.ct_from_box)
        inputs["other level"] = other, [ap, lateral], start
        rest = next(np.array(s["T_rest"]) for s in case_file.raw["scenes"] if s["id"] == scene.name)
        for name, given in inputs.items():
            pose, seconds = _register(*given)
            taken.append(seconds)
            wrong = pose is not None and not (
                name == "other level" and metrics.mtre(other.vertebra.points, pose, rest) < metrics.SUCCESS_MM
            )
            accepted += [f"{case.name} {name}"] * wrong
            print(f"{case.name} {name}: {'accepted' if wrong else 'none'} {seconds:.2f} s", flush=True)
    print(f"{len(taken)} inputs, median {np.median(taken):.2f} s, largest {max(taken):.1f} s; accepted {accepted}")


@pytest.mark.slow
def test_none_of_a_hundred_wrong_inputs_is_accepted(tmp_path):
    """In a process of its own: the tests' quick compilation makes slow programs."""
    if not BENCH.exists():
        pytest.skip("the bench is not there")
    printed = fresh_python.run_script(__file__, tmp_path / "workdir")
    count, median_s, accepted = re.fullmatch(
        r"(\d+) inputs, median ([\d.]+) s, .*accepted (.*)", printed.splitlines()[-1]
    ).groups()
    assert (count, accepted) == ("100", "[]") and float(median_s) < MEDIAN_S, printed


if __name__ == "__main__":
    main(sys.argv[1])
