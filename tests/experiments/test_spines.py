"""Five vertebrae of X-rays that are not kind, one at a time and together: the hard bench. Slow; needs the bench."""

import dataclasses
import math
import pathlib
import re
import time

import fresh_python
import jax
import numpy as np
import pytest

from data_pipelines import cases
from experiments import configs
from experiments.patients import models
from experiments.patients import untrained
from experiments.patients import workdir
from experiments.runtime.kept_programs import kept
from kernels.common import private_cache
from radgs_jax import levels
from radgs_jax import metrics
from radgs_jax.registration import pipeline

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BENCH = REPOSITORY.parent / "shared" / "bench" / "hard" / "cases.json"
SPINES = (15, 16, 17, 18, 19), (16, 17, 18, 19, 20)
"""VerSe numbers of T8 to T12 and of T9 to L1: all that the CT shows whole in the middle of the X-rays."""


def _truth(scene, variant, label, own):
    """World_from_ct of a vertebra in a scene's raw values; own: the label of the scene's own vertebra."""
    if variant == "bent" and levels.level_name(label) in scene["T_others"]:
        return np.array(scene["T_others"][levels.level_name(label)])
    return np.array(scene["T_gt"] if label == own else scene["T_rest"])


def compare(variant, camera_sd):
    """Prints medians over the scenes' vertebrae, and over pairs of neighbours: one at a time, and together."""
    case_file = cases.read(BENCH)
    raw = {one["id"]: one for one in case_file.raw["scenes"]}
    model = models.load_model(models.base_folder())
    refine, digests = configs.DEMO.refine, workdir.ScanDigests()
    load = untrained.untrained_loader(model, refine, workdir.base_rule(models.base_folder(), refine), digests)
    options = pipeline.RegisterOptions(camera_sd=camera_sd)
    errors = {kind: ([], []) for kind in ("one at a time", "together")}
    spent = {kind: [] for kind in errors}
    prepared = {}
    for name, scene in case_file.scenes.items():
        volume, xrays = case_file.volumes[scene.volume], cases.read_xrays(scene, variant)
        start = next(case.world_from_ct for case in case_file.cases if case.scene == name)
        for spine in SPINES:
            target = workdir.target_of(volume)
            for label in spine:
                if label not in prepared:
                    prepared[label] = load(dataclasses.replace(target, label=label))
            chosen = [prepared[label] for label in spine]
            poses = []
            for one in chosen:
                began = time.perf_counter()
                poses.append(pipeline.register(one, xrays, start, options, kept).world_from_ct)
                spent["one at a time"].append(time.perf_counter() - began)
            began = time.perf_counter()
            found = pipeline.refine_spine(chosen, xrays, poses, options, kept).world_from_ct[: len(spine)]
            spent["together"].append(time.perf_counter() - began)
            truth = [_truth(raw[name], variant, label, volume.full_label) for label in spine]
            points = [one.vertebra.points for one in chosen]
            for kind, answers in (("one at a time", poses), ("together", found)):
                alone, relative = errors[kind]
                alone += [metrics.mtre(p, pose, true) for p, pose, true in zip(points, answers, truth)]
                for k in range(len(spine) - 1):
                    pair = (np.linalg.inv(its[k]) @ its[k + 1] for its in (answers, truth))
                    relative.append(metrics.mtre(points[k + 1], *pair))
    for kind, (alone, relative) in errors.items():
        medians = f"pose {np.median(alone):.3f} mm, relative {np.median(relative):.3f} mm"
        print(f"{variant}, {kind}: {medians}, {np.median(spent[kind]):.2f} s", flush=True)


def main():
    """Compares `bent` with right cameras, and `calib` with what is known of them."""
    if cache := private_cache.folder("xla"):
        jax.config.update("jax_compilation_cache_dir", str(cache))
    compare("bent", (0.0, 0.0))
    compare("calib", (math.radians(0.3), 1.0))


@pytest.mark.slow
def test_relative_poses_are_better_together():
    """In a process of its own: the tests' quick compilation makes slow programs."""
    if not BENCH.exists():
        pytest.skip("the hard bench is not there")
    printed = fresh_python.run_script(__file__)
    found = re.findall(r"(bent|calib), (.*): pose ([\d.]+) mm, relative ([\d.]+) mm, ([\d.]+) s", printed)
    said = {(variant, kind): [float(n) for n in numbers] for variant, kind, *numbers in found}
    (pose, relative, _), (pose_alone, relative_alone, _) = said["bent", "together"], said["bent", "one at a time"]
    assert pose <= pose_alone and relative < 2.0 / 3.0 * relative_alone, printed
    assert said["calib", "together"][1] < 0.25, printed


if __name__ == "__main__":
    main()
