"""Fits the acceptance rule: `python -m experiments.calibrate --cases=C.json,D.json --out=base/calibration.json`.

Each scene gives a case for each size of `--starts_mm`. A case is refined as in `register`, from a start pose that is wrong by about
that size. The `confidence.AcceptanceRule` is fitted to how wrong the results are, and cases that it refuses are searched for again,
as in `register`. No network is needed, because the features that a refinement reports do not depend on where its start came from.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
from absl import flags

from data_pipelines import cases
from data_pipelines.ct import extraction
from data_pipelines.ct import whole_body
from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.simulation import carm
from experiments.patients import metal_files
from experiments.patients import untrained
from experiments.patients import workdir
from experiments.runtime import cli
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from radgs_jax import metrics
from radgs_jax.errors import fail
from radgs_jax.models import metal
from radgs_jax.registration import confidence
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import pipeline
from radgs_jax.registration import search
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.parts import on_device_parts
from radgs_jax.registration.prepared import Vertebra
from radgs_jax.registration.programs import programs_of
from radgs_jax.registration.pyramid import make_pyramid

FITTED_REFINE, FITTED_SEARCH = RefineConfig(), search.SearchConfig()
"""The refinement and search that a rule is fitted for; it carries their digest and is refused with others."""
START_FACTORS = (0.5, 1.5)
"""Range of a start's error as a multiple of the nominal size, chosen by hand: it spreads sizes over the gaps of `--starts_mm`. A
narrower range leaves gaps; a wider one blurs which size a case has."""
CLOUD_GAUSSIANS = 64
"""Number of Gaussians in the vertebra's coarse cloud. The refinement does not use that cloud, so a small number saves time."""


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_list("cases", None, "Case files with true poses, of simulated patients.", required=True)
    flags.DEFINE_list("variants", ["artic", "real"], "Arrays of the case files' X-ray files to fit to.")
    flags.DEFINE_list(
        "starts_mm",
        ["1", "3", "5", "8", "15", "30", "45"],
        "Sizes of the starts' errors, mTRE in mm; a scene has a case of each.",
    )
    flags.DEFINE_integer("seed", 11, "Seed of the starts.", lower_bound=0)
    flags.DEFINE_string("out", None, "JSON file to write the acceptance rule to.", required=True)


@dataclasses.dataclass
class CalibrationCase:
    """A scene from one start, in the course of its searches.

    Attributes:
      searches: the refinements that are left, each from a wider search than the one before.
      vertebra: the vertebra; world_from_ct: (4, 4) its true pose, mm.
      refined: the latest refinement; None before the first.
      points: (P, 3) surface points at the refined pose, mm, about the vertebra's centre in world axes.
      error_mm: mTRE of the refined pose.
    """

    searches: Iterator[gauss_newton.Refined]
    vertebra: Vertebra
    world_from_ct: np.ndarray
    refined: gauss_newton.Refined | None = None
    points: np.ndarray | None = None
    error_mm: float = np.inf

    def next_search(self) -> None:
        """Runs the first refinement or the next wider search, and updates `refined`, `points` and `error_mm`."""
        self.refined = next(self.searches)
        self.points = pipeline.centred_points(self.refined, self.vertebra)
        pose = np.asarray(self.refined.world_from_box, np.float64) @ np.linalg.inv(self.vertebra.ct_from_box)
        self.error_mm = metrics.mtre(self.vertebra.points, pose, self.world_from_ct)


def started_cases(
    case_file: cases.CaseFile, variant: str, sizes_mm: Sequence[float], seed: int
) -> list[CalibrationCase]:
    """A case for every scene and start size, none of them refined yet.

    Args:
      variant: array of the X-ray files; sizes_mm: nominal errors of the starts, mTRE; seed: of the starts.
    Raises:
      InputError: unreadable input, or a scene without its true pose.
    """
    body, prepared, found = untrained.body_reader(), {}, []
    programs, finder = programs_of(kept), metal_files.read_base()
    for number, scene in enumerate(case_file.scenes.values()):
        volume = case_file.volumes[scene.volume]
        if volume.name not in prepared:
            scan, whole = body(workdir.target_of(volume))
            vertebra = extraction.extract(scan, volume.full_label, CLOUD_GAUSSIANS, volume.full_mask)
            prepared[volume.name] = vertebra, on_device_parts(whole_body.moving_parts(whole, vertebra))
        vertebra, parts = prepared[volume.name]
        xrays = metal.leave_out(finder, cases.read_xrays(scene, variant), kept)
        seen = make_pyramid(xrays, [level.pixel_mm for level in FITTED_REFINE.levels])
        truth = cases.truth(case_file, scene)
        rng = np.random.default_rng([seed, number])
        centre = vertebra.ct_from_box[:3, 3]
        for size in sizes_mm:
            size_mm = size * rng.uniform(*START_FACTORS)
            start = carm.start_of_mtre(rng, truth, centre, vertebra.points, size_mm) @ vertebra.ct_from_box
            wider = functools.partial(pipeline.wide_starts, programs, parts, xrays, start, FITTED_REFINE, FITTED_SEARCH)
            searches = search.searches(
                programs, parts, seen, start, wider, FITTED_REFINE, FITTED_SEARCH, volume.full_label
            )
            found.append(CalibrationCase(searches, vertebra, truth))
    return found


def fit_to_cases(
    found: Sequence[CalibrationCase],
) -> tuple[confidence.AcceptanceRule, list[confidence.Confidence]]:
    """Fits a rule to cases; each threshold is fitted to the cases that the one before refuses, and to one-sided ones.

    Returns:
      the rule, and its verdict on each case.
    Raises:
      ValueError: as `confidence.fit_rule`.
    """
    judged = [None] * len(found)
    for count in range(1 + confidence.SEARCHES):
        asked = [
            i
            for i, j in enumerate(judged)
            if j is None or not j.accepted or search.evenness(found[i].refined) < FITTED_SEARCH.one_sided
        ]
        if not asked:
            break
        with progress.Bar(len(asked), f"search {count}" if count else "refine") as bar:
            for i in asked:
                found[i].next_search()
                bar.update()
        refined, points, error_mm = zip(*((found[i].refined, found[i].points, found[i].error_mm) for i in asked))
        right = np.array(error_mm) < metrics.SUCCESS_MM
        if count == 0:
            digest = confidence.method_digest(FITTED_REFINE, FITTED_SEARCH)
            rule = confidence.fit_rule(refined, points, error_mm, digest)
        else:
            chance = [confidence.judge(r, p, rule).chance for r, p in zip(refined, points)]
            limits = (confidence.threshold(np.array(chance), right),) * (1 + confidence.SEARCHES - count)
            rule = dataclasses.replace(rule, thresholds=rule.thresholds[:count] + limits)
        for i, r, p in zip(asked, refined, points):
            judged[i] = confidence.judge(r, p, rule, count)
        accepted, limit = sum(judged[i].accepted for i in asked), rule.thresholds[count]
        print(f"{len(asked)} judged, {right.sum()} of them right; accepted, from a chance of {limit:.3f}: {accepted}")
    return rule, judged


def fit_acceptance_rule(
    case_paths: Sequence[pathlib.Path | str],
    out: pathlib.Path | str,
    variants: Sequence[str] = ("artic", "real"),
    sizes_mm: Sequence[float] = (1, 3, 5, 8, 15, 30, 45),
    seed: int = 11,
) -> confidence.AcceptanceRule:
    """Fits the acceptance rule to simulated cases, writes it, and prints how it does on these cases.

    Args:
      case_paths: case files with true poses; out: JSON file to write.
      variants: arrays of the X-ray files; sizes_mm, seed: as `started_cases`.
    Raises:
      InputError: unreadable cases, or cases that all end right or all wrong.
    """
    case_files = [cases.read(path) for path in case_paths]
    found = []
    for case_file in case_files:
        for variant in variants:
            found += started_cases(case_file, variant, sizes_mm, seed)
    try:
        rule, judged = fit_to_cases(found)
    except ValueError as error:
        fail(case_paths[0], "cases", str(error), "simulated cases of both kinds")
    files.write_json(out, dataclasses.asdict(rule))
    checksums.renew(out)
    errors_mm = np.array([case.error_mm for case in found])
    accepted, radius = (np.array([getattr(j, name) for j in judged]) for name in ("accepted", "uncertainty_mm"))
    right = errors_mm < metrics.SUCCESS_MM
    print(
        f"{len(errors_mm)} cases, {right.sum()} right; wrong and accepted {(accepted & ~right).sum()}, right and refused "
        f"{(~accepted & right).sum()}; radius holds {100 * np.mean((errors_mm <= radius)[right]):.1f} % of the right ones, "
        f"median {np.median(radius[right]):.2f} mm, median error {np.median(errors_mm[right]):.2f} mm"
    )
    return rule


def main() -> None:
    """Runs `fit_acceptance_rule` with the flags; raises as it and as `cli.numbers`."""
    given = flags.FLAGS
    sizes_mm = cli.numbers("--starts_mm", given.starts_mm)
    fit_acceptance_rule(given.cases, given.out, given.variants, sizes_mm, given.seed)


if __name__ == "__main__":
    cli.run(main, define_flags)
