"""Fits the acceptance rule: `python -m experiments.calibrate --cases=C.json,D.json --out=base/calibration.json`.

Refines every scene from poses as wrong as a network's beside a start further off, judges none of them, and fits
`radgs_jax.confidence` to how wrong they ended. Needs no training: what a refinement says of itself does not depend on where
its start came from.
"""

import dataclasses

import numpy as np
from absl import flags

from data_pipelines import carm
from data_pipelines import cases
from data_pipelines import files
from data_pipelines import scan as scans
from experiments import cli
from experiments import configs
from experiments import patients
from experiments import progress
from experiments import registering
from radgs_jax import confidence
from radgs_jax import metrics

CASES = flags.DEFINE_list("cases", None, "Case files with true poses, of simulated patients.", required=True)
VARIANTS = flags.DEFINE_list("variants", ["artic", "real"], "Arrays of their X-ray files.")
STARTS_MM = flags.DEFINE_list(
    "starts_mm", ["1", "3", "5", "8", "15"], "Sizes of the starts' errors, one case of each a scene."
)
SEED = flags.DEFINE_integer("seed", 11, "Seed of the starts.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "JSON file of the calibration.", required=True)


def refined_cases(case_file, variant, sizes_mm, seed, on_done):
    """`refinement.Refined`, points about the centre in world axes and mTRE of every scene from starts of those sizes."""
    body, prepared = patients.bodies(), {}
    for number, scene in enumerate(case_file.scenes.values()):
        volume = case_file.volumes[scene.volume]
        if volume.name not in prepared:
            scan, whole = body(volume)
            vertebra = scans.extract(scan, volume.full_label, 64, volume.full_mask)
            prepared[volume.name] = vertebra, patients.refinement_parts(scans.moving_parts(whole, vertebra))
        vertebra, parts = prepared[volume.name]
        images, truth = cases.read_xrays(scene, variant), cases.truth(case_file, scene)
        rng = np.random.default_rng([seed, number])
        centre = vertebra.ct_from_box[:3, 3]
        for size in sizes_mm:
            sizes = size * rng.uniform(0.5, 1.5), rng.uniform(0.0, 25.0)
            starts = [carm.start_of_mtre(rng, truth, centre, vertebra.points, s) @ vertebra.ct_from_box for s in sizes]
            valid = [np.ones(image.shape, bool) for image in images]
            refined = registering.refine_pose(parts, scene.views, images, valid, starts, configs.DEMO.refine)
            pose = np.asarray(refined.world_from_box, np.float64) @ np.linalg.inv(vertebra.ct_from_box)
            yield refined, (vertebra.points - centre) @ pose[:3, :3].T, metrics.mtre(vertebra.points, pose, truth)
            on_done()


def main():
    """Fits and writes the calibration, and prints how it does on the cases that it was fitted to.

    Raises:
      InputError: unreadable cases, sizes that are no numbers, or cases that all end right or all wrong.
    """
    sizes = cli.numbers("--starts_mm", STARTS_MM.value)
    case_files = [cases.read(path) for path in CASES.value]
    found = []
    total = sum(len(c.scenes) for c in case_files) * len(VARIANTS.value) * len(sizes)
    with progress.bar(total, "refine") as bar:
        for case_file in case_files:
            for variant in VARIANTS.value:
                found += refined_cases(case_file, variant, sizes, SEED.value, bar.update)
    refined, points, errors = zip(*found)
    errors = np.array(errors)
    try:
        calibration = confidence.calibrate(refined, points, errors)
    except ValueError as error:
        files.fail(CASES.value[0], "cases", str(error), "simulated cases of both kinds")
    judged = [confidence.judge(r, p, calibration) for r, p in zip(refined, points)]
    accepted, radius = (np.array([getattr(j, name) for j in judged]) for name in ("accepted", "uncertainty_mm"))
    right = errors < metrics.SUCCESS_MM
    files.write_json(OUT.value, dataclasses.asdict(calibration))
    print(
        f"{len(errors)} cases, {right.sum()} right; wrong and accepted {(accepted & ~right).sum()}, right and refused "
        f"{(~accepted & right).sum()}; radius holds {100 * np.mean((errors <= radius)[right]):.1f} % of the right ones, median "
        f"{np.median(radius[right]):.2f} mm, median error {np.median(errors[right]):.2f} mm"
    )


if __name__ == "__main__":
    cli.run(main)
