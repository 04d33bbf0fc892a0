"""What the accuracy depends on: `python -m experiments.study --ct --mask --label=17,18,19,20 --workdir=W --out=S`.

Simulates new X-rays of a patient that `experiments.prepare` has prepared and registers them: as they are, and with one
property at a time made worse. Writes tables, a page of plots and the worst cases' pictures to S. Finished conditions are kept
there, so a study that was stopped continues.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines.io import files
from experiments import configs
from experiments.patients import models
from experiments.reports import index_page
from experiments.reports import plots
from experiments.reports import statistics
from experiments.reports.run_record import RunRecord
from experiments.runtime import cli
from experiments.runtime import shards
from experiments.runtime.shards import Shard
from experiments.scoring import conditions
from experiments.scoring import rivals
from radgs_jax import errors

VARIANTS = "artic", "real"
"""Variants of the X-rays that are registered."""
BINS = {"scenes": configs.STARTS_MM, "far starts": conditions.FAR_STARTS_MM}
"""Groups of conditions whose tables are by start error, with its bins, mTRE in mm."""
FAR_SHARE = 4
"""Far starts get one scene for this many of the others, because each of their scenes is registered from all far bins."""


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder) that was prepared.", required=True)
    flags.DEFINE_string("mask", None, "Label map on the CT's grid.", required=True)
    flags.DEFINE_list("label", None, "VerSe numbers of the prepared vertebrae.", required=True)
    flags.DEFINE_string("workdir", None, "Folder that `experiments.prepare` made.", required=True)
    flags.DEFINE_string("out", None, "Folder for the study's cases and tables.", required=True)
    flags.DEFINE_integer("scenes", 20, "Number of acquisitions of each vertebra, with one start each.", lower_bound=1)
    flags.DEFINE_integer(
        "sweep_scenes",
        3,
        "Number of acquisitions of each vertebra at each point of a sweep, with one start each; 0: no sweeps.",
        lower_bound=0,
    )
    flags.DEFINE_list("sweeps", [], "Run these sweeps alone, by the names of their tables; default: everything.")
    flags.DEFINE_float(
        "plain_minutes",
        0.0,
        "Minutes to train a plain 2D network on the workdir's pairs; 0: none.",
        lower_bound=0.0,
    )
    flags.DEFINE_list(
        "minutes",
        [],
        "Training times in minutes to compare; each prepares the first vertebra anew.",
    )
    flags.DEFINE_integer("seed", 5, "Seed of everything random.", lower_bound=0)
    shards.define()


def _planned(scenes, sweep_scenes, sweeps):
    """(condition, acquisitions of each vertebra) of what is registered for the tables of scenes and of sweeps, in their order."""
    known = conditions.sweeps()
    for group in sweeps:
        if group not in {condition.group for condition in known}:
            wanted = f"one of {', '.join(dict.fromkeys(condition.group for condition in known))}"
            errors.fail("flags", "--sweeps", group, wanted)
    if sweeps:
        return [(condition, sweep_scenes) for group in sweeps for condition in known if condition.group == group]
    planned = []
    for variant in VARIANTS:
        planned.append((conditions.Condition("scenes", variant, variant), scenes))
        far = conditions.Condition("far starts", variant, variant, starts_mm=conditions.FAR_STARTS_MM, every_start=True)
        planned.append((far, max(1, scenes // FAR_SHARE)))
    return planned + [(condition, sweep_scenes) for condition in known if sweep_scenes]


class _Report:
    """Tables that are written to disk as soon as they are made."""

    def __init__(self, path):
        self.path, self.texts = path, []

    def add(self, *lines):
        """Appends a table, prints it and writes all of them."""
        self.texts.append("\n".join(lines))
        print(f"\n{self.texts[-1]}")
        with files.replacing(self.path) as temporary:
            temporary.write_text("\n\n".join(self.texts) + "\n")


def run_study(
    ct: pathlib.Path | str,
    mask: pathlib.Path | str,
    labels: Sequence[int],
    workdir: pathlib.Path | str,
    out: pathlib.Path | str,
    *,
    scenes: int = 20,
    sweep_scenes: int = 3,
    sweeps: Sequence[str] = (),
    plain_minutes: float = 0.0,
    minutes: Sequence[float] = (),
    seed: int = 5,
    shard: Shard = shards.ALL,
) -> None:
    """Registers a prepared patient under every condition and writes the study to `out`.

    Args:
      ct, mask: the scan that was prepared.
      labels: VerSe numbers of its prepared vertebrae.
      workdir: folder that `preparing.prepare` made.
      out: folder of the study; finished conditions in it are not registered again.
      scenes: number of acquisitions per vertebra, one start each.
      sweep_scenes: number of acquisitions per vertebra at each point of a sweep; 0 skips the sweeps.
      sweeps: groups of `conditions.sweeps` to run alone; empty for all, and everything else.
      plain_minutes: training time of the plain 2D network on the workdir's pairs; 0 skips it.
      minutes: training times to compare, for which the first vertebra is prepared anew.
      seed: of everything random.
      shard: the part of the conditions that this process registers, without tables.
    Raises:
      InputError: as `conditions.Patient`, `case_files.simulated_cases` and `preparing.prepare`.
    """
    out, config, record = pathlib.Path(out), configs.BASE, RunRecord()
    patient, passes = conditions.Patient(ct, mask, labels, workdir), config.passes
    counts = dict(_planned(scenes, sweep_scenes, sweeps))
    name_of = lambda condition: conditions.scenes_name(patient, condition, counts[condition], seed)
    # Conditions with the same scenes stay together, since one process simulates these.
    mine = shard.of(map(name_of, counts))
    chosen = [condition for condition in counts if name_of(condition) in mine]
    report = _Report(out / "study.txt")
    results, by_start, groups = {}, {}, {}
    for condition in chosen:
        rows = conditions.register_condition(patient, condition, counts[condition], seed, out, passes)
        results[condition] = rows
        if shard.whole and condition.group in BINS:
            lines = statistics.by_start(rows, BINS[condition.group])
            report.add(f"{condition.group}: {condition.name}", statistics.HEADER, *lines)
            by_start.setdefault(condition.name, []).extend(rows)
        else:
            groups.setdefault(condition.group, {})[condition.name] = rows
    if not shard.whole:
        registered = f"{len(chosen)} of {len(counts)} conditions are registered"
        print(f"{registered}; the same command without --shard writes the tables")
        return
    if not sweeps:
        report.add(rivals.reconstructions(patient, max(1, sweep_scenes), seed, out, passes))
    for group, entries in groups.items():
        report.add(group, statistics.HEADER, *statistics.with_metal_apart(entries))
    if sweeps:
        _write_page(out, report.texts, record)
        return
    params = rivals.train_plain(patient, config, plain_minutes, out, seed) if plain_minutes else None
    for variant in VARIANTS:
        condition, count = conditions.Condition("methods", variant, variant), max(1, sweep_scenes)
        found = rivals.compare(patient, params, condition, count, seed, out, passes)
        report.add(f"methods on the same cases: {variant}", *statistics.methods(found))
    if minutes:
        for value in minutes:
            condition = conditions.Condition("minutes of training", f"{value:g}", every_start=True)
            few = conditions.prepared_for(patient, config, value, models.base_folder(), out)
            rows = conditions.register_condition(few, condition, max(1, sweep_scenes), seed, out, passes)
            groups.setdefault(condition.group, {})[condition.name] = rows
        lines = (statistics.line(name, rows) for name, rows in groups[condition.group].items())
        report.add(condition.group, statistics.HEADER, *lines)
    plots.study_page(out / "study.png", by_start, groups)
    conditions.failures(patient, results, counts, seed, out, passes)
    _write_page(out, report.texts, record)
    print(f"\nopen {out / index_page.NAME}")


def _write_page(out, texts, record):
    """The page of the study's tables, whose first lines are their names, and of its pictures."""
    shown = {out / "study.png": "Errors over start errors, and at each point of each sweep."}
    worst = {
        path: f"{path.parent.name}: a case that failed." for path in sorted((out / "failures").rglob("picture.png"))
    }
    sections = [index_page.text(*text.split("\n", 1)) for text in texts]
    sections += [index_page.pictures("Plots", shown), index_page.pictures("The worst failures", worst)]
    sections.append(index_page.links("Files", out, ("study.txt", "study.png", "log.txt")))
    index_page.write(out, "A study: errors, radii and refusals under each condition", sections, record)


def main() -> None:
    """Runs `run_study` with the flags; raises as it, `cli.label_numbers` and `cli.numbers`."""
    given = flags.FLAGS
    run_study(
        given.ct,
        given.mask,
        cli.label_numbers(given.label),
        given.workdir,
        given.out,
        scenes=given.scenes,
        sweep_scenes=given.sweep_scenes,
        sweeps=given.sweeps,
        plain_minutes=given.plain_minutes,
        minutes=cli.numbers("--minutes", given.minutes),
        seed=given.seed,
        shard=shards.given(),
    )


if __name__ == "__main__":
    cli.run(main, define_flags, log_in="out")
