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
from experiments.reports import plots
from experiments.reports import statistics
from experiments.runtime import cli
from experiments.scoring import conditions
from experiments.scoring import rivals
from radgs_jax import errors

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
    Raises:
      InputError: as `conditions.Patient`, `case_files.simulated_cases` and `preparing.prepare`.
    """
    out, config = pathlib.Path(out), configs.BASE
    patient, passes = conditions.Patient(ct, mask, labels, workdir), config.passes
    report, results, counts = _Report(out / "study.txt"), {}, {}

    def run(condition, count):
        counts[condition] = count
        results[condition] = conditions.register_condition(patient, condition, count, seed, out, passes)
        return results[condition]

    if sweeps:
        for group in sweeps:
            chosen = [condition for condition in conditions.sweeps() if condition.group == group]
            if not chosen:
                known = dict.fromkeys(condition.group for condition in conditions.sweeps())
                errors.fail("flags", "--sweeps", group, f"one of {', '.join(known)}")
            found = {condition.name: run(condition, sweep_scenes) for condition in chosen}
            report.add(group, statistics.HEADER, *statistics.with_metal_apart(found))
        return
    by_start = {}
    for variant in ("artic", "real"):
        condition = conditions.Condition("scenes", variant, variant)
        by_start[variant] = rows = run(condition, scenes)
        report.add(f"scenes: {variant}", statistics.HEADER, *statistics.by_start(rows, configs.STARTS_MM))
        far = conditions.Condition("far starts", variant, variant, starts_mm=conditions.FAR_STARTS_MM, every_start=True)
        rows = run(far, max(1, scenes // FAR_SHARE))
        by_start[variant] = by_start[variant] + rows
        report.add(f"far starts: {variant}", statistics.HEADER, *statistics.by_start(rows, conditions.FAR_STARTS_MM))
    report.add(rivals.reconstructions(patient, max(1, sweep_scenes), seed, out, passes))
    groups = {}
    for condition in conditions.sweeps() if sweep_scenes else []:
        rows = run(condition, sweep_scenes)
        groups.setdefault(condition.group, {})[condition.name] = rows
    for group, entries in groups.items():
        report.add(group, statistics.HEADER, *statistics.with_metal_apart(entries))
    params = rivals.train_plain(patient, config, plain_minutes, out, seed) if plain_minutes else None
    for variant in ("artic", "real"):
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
    print(f"\nwritten: {out / 'study.txt'}, {out / 'study.png'}")


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
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
