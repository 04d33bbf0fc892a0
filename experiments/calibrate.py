"""Fits the acceptance rule: `python -m experiments.calibrate --cases=C.json,D.json --out=base/calibration.json`.

Refines every scene from poses as wrong as a network's beside a start further off, fits `radgs_jax.confidence` to how wrong they
ended, and searches again where it refuses, as `register` does. Needs no training: what a refinement says of itself does not
depend on where its start came from.
"""

import collections.abc
import dataclasses

import numpy as np
from absl import flags

from data_pipelines import cases
from data_pipelines.ct import extraction
from data_pipelines.ct import whole_body
from data_pipelines.io import files
from data_pipelines.simulation import carm
from experiments.patients import workdir
from experiments.runtime import cli
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from radgs_jax import metrics
from radgs_jax.errors import fail
from radgs_jax.registration import confidence
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import pipeline
from radgs_jax.registration import search
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.prepared import on_device_parts
from radgs_jax.registration.prepared import Vertebra
from radgs_jax.registration.programs import programs_of
from radgs_jax.registration.pyramid import make_pyramid

REFINE, SEARCH = RefineConfig(), search.SearchConfig()


def define_flags():
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_list("cases", None, "Case files with true poses, of simulated patients.", required=True)
    flags.DEFINE_list("variants", ["artic", "real"], "Arrays of their X-ray files.")
    flags.DEFINE_list(
        "starts_mm", ["1", "3", "5", "8", "15", "30", "45"], "Sizes of the starts' errors, one case of each a scene."
    )
    flags.DEFINE_integer("seed", 11, "Seed of the starts.", lower_bound=0)
    flags.DEFINE_string("out", None, "JSON file of the calibration.", required=True)


@dataclasses.dataclass
class CalibrationCase:
    """A scene from one start: the searches that are left, the vertebra, the truth, and what there is so far.

    refined: `gauss_newton.Refined`; points: about the centre in world axes; error_mm: its mTRE.
    """

    searches: collections.abc.Iterator
    vertebra: Vertebra
    world_from_ct: np.ndarray
    refined: gauss_newton.Refined | None = None
    points: np.ndarray | None = None
    error_mm: float = np.inf

    def next_search(self):
        """The next wider search, or the first refinement."""
        self.refined = next(self.searches)
        self.points = pipeline.centred_points(self.refined, self.vertebra)
        pose = np.asarray(self.refined.world_from_box, np.float64) @ np.linalg.inv(self.vertebra.ct_from_box)
        self.error_mm = metrics.mtre(self.vertebra.points, pose, self.world_from_ct)


def started_cases(case_file, variant, sizes_mm, seed):
    """`Case`s of every scene from starts of those sizes, none of them refined yet."""
    body, prepared, found = workdir.body_reader(), {}, []
    programs = programs_of(kept)
    for number, scene in enumerate(case_file.scenes.values()):
        volume = case_file.volumes[scene.volume]
        if volume.name not in prepared:
            scan, whole = body(volume)
            vertebra = extraction.extract(scan, volume.full_label, 64, volume.full_mask)
            prepared[volume.name] = vertebra, on_device_parts(whole_body.moving_parts(whole, vertebra))
        vertebra, parts = prepared[volume.name]
        seen = make_pyramid(cases.read_xrays(scene, variant), [level.pixel_mm for level in REFINE.levels])
        truth = cases.truth(case_file, scene)
        rng = np.random.default_rng([seed, number])
        centre = vertebra.ct_from_box[:3, 3]
        for size in sizes_mm:
            sizes = size * rng.uniform(0.5, 1.5), rng.uniform(0.0, 25.0)
            poses = [carm.start_of_mtre(rng, truth, centre, vertebra.points, s) @ vertebra.ct_from_box for s in sizes]
            searches = search.searches(programs, parts, seen, *poses, REFINE, SEARCH, volume.full_label)
            found.append(CalibrationCase(searches, vertebra, truth))
    return found


def calibrated(found):
    """The `confidence.AcceptanceRule` of `Case`s, each threshold from those that the one before refuses, and their `Confidence`s.

    Raises:
      ValueError: as `confidence.fit_rule`.
    """
    judged = [None] * len(found)
    for count in range(1 + confidence.SEARCHES):
        asked = [i for i, j in enumerate(judged) if j is None or not j.accepted]
        if not asked:
            break
        with progress.bar(len(asked), f"search {count}" if count else "refine") as bar:
            for i in asked:
                found[i].next_search()
                bar.update()
        refined, points, error_mm = zip(*((found[i].refined, found[i].points, found[i].error_mm) for i in asked))
        right = np.array(error_mm) < metrics.SUCCESS_MM
        if count == 0:
            rule = confidence.fit_rule(refined, points, error_mm, confidence.method_digest(REFINE, SEARCH))
        else:
            chance = [confidence.judge(r, p, rule).chance for r, p in zip(refined, points)]
            limits = (confidence.threshold(np.array(chance), right),) * (1 + confidence.SEARCHES - count)
            rule = dataclasses.replace(rule, thresholds=rule.thresholds[:count] + limits)
        for i, r, p in zip(asked, refined, points):
            judged[i] = confidence.judge(r, p, rule, count)
        accepted, limit = sum(judged[i].accepted for i in asked), rule.thresholds[count]
        print(f"{len(asked)} judged, {right.sum()} of them right; accepted, from a chance of {limit:.3f}: {accepted}")
    return rule, judged


def main():
    """Fits and writes the rule, and prints how it does on the cases that it was fitted to.

    Raises:
      InputError: unreadable cases, sizes that are no numbers, or cases that all end right or all wrong.
    """
    sizes = cli.numbers("--starts_mm", flags.FLAGS.starts_mm)
    case_files = [cases.read(path) for path in flags.FLAGS.cases]
    found = []
    for case_file in case_files:
        for variant in flags.FLAGS.variants:
            found += started_cases(case_file, variant, sizes, flags.FLAGS.seed)
    try:
        rule, judged = calibrated(found)
    except ValueError as error:
        fail(flags.FLAGS.cases[0], "cases", str(error), "simulated cases of both kinds")
    files.write_json(flags.FLAGS.out, dataclasses.asdict(rule))
    errors = np.array([case.error_mm for case in found])
    accepted, radius = (np.array([getattr(j, name) for j in judged]) for name in ("accepted", "uncertainty_mm"))
    right = errors < metrics.SUCCESS_MM
    print(
        f"{len(errors)} cases, {right.sum()} right; wrong and accepted {(accepted & ~right).sum()}, right and refused "
        f"{(~accepted & right).sum()}; radius holds {100 * np.mean((errors <= radius)[right]):.1f} % of the right ones, median "
        f"{np.median(radius[right]):.2f} mm, median error {np.median(errors[right]):.2f} mm"
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
