"""How well 20 starts around a found pose of the wrist end in one place (docs/real.md): precision, not accuracy.

`python examples/wrist_precision.py DATA OUT BONE FRAME`, after `experiments.register` has written OUT/BONE_FRAME.
"""

import itertools
import pathlib
import sys

import numpy as np

from data_pipelines.io import files
from data_pipelines.xrays import radiograph
from experiments.patients import workdir
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from radgs_jax import metrics
from radgs_jax import RegisterOptions
from radgs_jax.geometry import rigid_host
from radgs_jax.levels import FIRST_BONE
from radgs_jax.registration import pipeline

STARTS, SHIFT_MM, TURN_DEG = 20, 5.0, 10.0


def starts_around(pose: np.ndarray, centre: np.ndarray) -> list[np.ndarray]:
    """Poses (4, 4) moved by up to SHIFT_MM in a random direction and turned by up to TURN_DEG about a random axis."""
    rng, found = np.random.default_rng(0), []
    for _ in range(STARTS):
        turn, shift = rng.normal(size=(2, 3))
        turn *= np.radians(TURN_DEG) * rng.uniform() / np.linalg.norm(turn)
        shift *= SHIFT_MM * rng.uniform() / np.linalg.norm(shift)
        found.append(rigid_host.motion_about(centre, [*turn, *shift]) @ pose)
    return found


def main(data: pathlib.Path, out: pathlib.Path, bone: str, frame: str) -> None:
    """Prints how far the starts are off, and how far their ends are apart."""
    target = workdir.Target(bone, out / f"{bone}.nii.gz", out / f"{bone}_mask.nii.gz", FIRST_BONE + 1, "bones")
    prepared = workdir.load(out / f"W_{bone}", target, workdir.ScanDigests())
    paths = [data / f"xr_rad_uln_cam0{number}_UND.{frame}.tif" for number in (1, 2)]
    xrays = radiograph.read_views(paths, out / "cameras.json", radiograph.ReadOptions(values="intensity", bits=8))
    pose = np.array(files.read_json(out / f"{bone}_{frame}" / "results.json")["results"][0]["T"])
    centre = (pose @ prepared.vertebra.ct_from_box)[:3, 3]
    ends, begins = [], starts_around(pose, centre)
    with progress.Bar(STARTS, f"{bone} {frame}") as bar:
        for start in begins:
            ends.append(pipeline.register(prepared, xrays, start, RegisterOptions(passes=1), kept).world_from_ct)
            bar.update()
    points = prepared.vertebra.points
    off = [metrics.mtre(points, start, pose) for start in begins]
    apart = [metrics.mtre(points, a, b) for a, b in itertools.combinations(ends, 2)]
    away = [metrics.mtre(points, end, pose) for end in ends]
    print(
        f"{bone} {frame}: starts {min(off):.1f} to {max(off):.1f} mm off; ends at most {max(apart):.3f} mm apart, median "
        f"{np.median(apart):.3f}; within 0.1 mm of the pose: {sum(a < 0.1 for a in away)} of {STARTS}"
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), *sys.argv[3:5])
