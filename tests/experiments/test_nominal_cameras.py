"""X-rays as DICOM files whose geometry tags are off, without a calibration: the bench through `register`. Slow; needs the bench."""

import pathlib
import re
import subprocess
import sys

import fresh_python
import nominal_views
import numpy as np
import pytest

from data_pipelines import cases
from data_pipelines.ct import scans
from data_pipelines.io import files
from experiments import configs
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients.workdir import Target
from radgs_jax import metrics
from radgs_jax.levels import level_name

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BENCH = REPOSITORY.parent / "shared" / "bench" / "cases" / "cases.json"
OFF_MM, OFF_DEG = 5.0, 1.0
RELATIVE_MM = 0.5


def main(folder):
    """Registers each scene's vertebra and the one below or above it, prints a line for each scene, and a summary."""
    folder, case_file = pathlib.Path(folder), cases.read(BENCH)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(case_file.volumes.values()))
    scan = scans.read_scan(first.full_ct, first.full_mask, "bench")
    labels = sorted({v.full_label for v in case_file.volumes.values()})
    targets = [Target("bench", first.full_ct, first.full_mask, label) for label in labels]
    if not (folder / "workdir").exists():
        preparing.prepare(configs.DEMO, folder / "workdir", targets, models.base_folder(), minutes=0.0)
    relative, off, radii, held = [], [], [], 0
    for number, scene in enumerate(case_file.scenes.values()):
        label = case_file.volumes[scene.volume].full_label
        other = label + 1 if label + 1 in labels else label - 1
        rng = np.random.default_rng([3, number])
        paths = [folder / f"{scene.name}_{view}.dcm" for view in ("ap", "lateral")]
        for path, xray in zip(paths, cases.read_xrays(scene, "real")):
            path.write_bytes(nominal_views.xa(xray, rng, OFF_DEG, OFF_MM))
        case = [case for case in case_file.cases if case.scene == scene.name][number % 3]
        files.write_json(folder / "init.json", case.world_from_ct.tolist())
        command = [
            sys.executable,
            *("-m", "experiments.register", f"--ct={first.full_ct}", f"--mask={first.full_mask}"),
            *(f"--label={min(label, other)},{max(label, other)}", f"--xrays={paths[0]},{paths[1]}", "--together"),
            *(
                f"--init={folder / 'init.json'}",
                f"--workdir={folder / 'workdir'}",
                f"--air={nominal_views.AIR:g}",
                "--nopictures",
            ),
            f"--out={folder / scene.name}",
        ]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        raw = next(one for one in case_file.raw["scenes"] if one["id"] == scene.name)
        truth = {level_name(label): np.array(raw["T_gt"]), level_name(other): np.array(raw["T_rest"])}
        if done.returncode or not (folder / scene.name / "spine.json").exists():
            print(f"{scene.name}: none: {done.stderr.splitlines()[-1:]}", flush=True)
            relative.append(np.inf)
            continue
        spine = files.read_json(folder / scene.name / "spine.json")["vertebrae"]
        found = {one["level"]: np.array(one["world_from_ct"]) for one in spine}
        points = {level: np.argwhere(scan.labels == n)[::50] for level, n in ((level_name(n), n) for n in labels)}
        points = {level: p @ scan.ct_from_index[:3, :3].T + scan.ct_from_index[:3, 3] for level, p in points.items()}
        a, b = level_name(label), level_name(other)
        relative.append(metrics.mtre(points[a], np.linalg.inv(found[b]) @ found[a], np.linalg.inv(truth[b]) @ truth[a]))
        for one in spine:
            error = metrics.mtre(points[one["level"]], found[one["level"]], truth[one["level"]])
            off.append(error)
            radii.append(one["uncertainty_mm"])
            held += error <= one["uncertainty_mm"]
        print(
            f"{scene.name}: relative {relative[-1]:.2f} mm, in the world {off[-2]:.1f} and {off[-1]:.1f} mm", flush=True
        )
    within = f"{held} of {len(off)} within the radius, {np.median(radii):.1f} mm in the median"
    print(f"{len(relative)} scenes, relative {np.median(relative):.2f} mm, largest {max(relative):.2f} mm; {within}")


@pytest.mark.slow
def test_relative_poses_are_right_with_nominal_cameras(tmp_path):
    """In a process of its own: the tests' quick compilation makes slow programs."""
    if not BENCH.exists():
        pytest.skip("the bench is not there")
    printed = fresh_python.run_script(__file__, tmp_path)
    median_mm, held, count = re.search(r"relative ([\d.]+) mm, largest .*; (\d+) of (\d+) within", printed).groups()
    assert float(median_mm) < RELATIVE_MM and int(held) >= 0.9 * int(count), printed


if __name__ == "__main__":
    main(sys.argv[1])
