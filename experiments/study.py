"""What the accuracy depends on: `python -m experiments.study --ct --mask --label=17,18,19,20 --workdir=W --out=S`.

Simulates X-rays of a patient that `experiments.prepare` has prepared, with a generator of their own, and registers them: as
they are, and with one thing at a time made worse. Leaves tables, a page of plots and the worst cases' pictures in S. What has
been registered stays there, so that a study that was stopped goes on.
"""

import pathlib

from absl import flags

from data_pipelines.io import files
from experiments import configs
from experiments.patients import models
from experiments.reports import pictures
from experiments.reports import statistics
from experiments.runtime import cli
from experiments.scoring import conditions
from experiments.scoring import rivals


def define_flags():
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder) that was prepared.", required=True)
    flags.DEFINE_string("mask", None, "Label map on the CT's grid.", required=True)
    flags.DEFINE_list("label", None, "VerSe numbers of its prepared vertebrae.", required=True)
    flags.DEFINE_string("workdir", None, "Folder that `experiments.prepare` made.", required=True)
    flags.DEFINE_string("out", None, "Folder of the study.", required=True)
    flags.DEFINE_integer("scenes", 20, "Acquisitions of each vertebra, one start each.", lower_bound=1)
    flags.DEFINE_integer(
        "sweep_scenes",
        3,
        "Acquisitions of each vertebra at each point of a sweep, one start each; 0: no sweeps.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "plain_minutes", 0.0, "Training time of the plain 2D network, on the workdir's pairs; 0: none.", lower_bound=0.0
    )
    flags.DEFINE_list("minutes", [], "Training times to prepare the first vertebra with, anew, and compare.")
    flags.DEFINE_integer("seed", 5, "Seed of everything random.", lower_bound=0)


class _Report:
    """Tables that are on disk as soon as they are made."""

    def __init__(self, path):
        self.path, self.texts = path, []

    def add(self, *lines):
        """Appends a table, prints it and writes all of them."""
        self.texts.append("\n".join(lines))
        print(f"\n{self.texts[-1]}")
        with files.replacing(self.path) as temporary:
            temporary.write_text("\n\n".join(self.texts) + "\n")


def main():
    """Runs the study; raises as `conditions.Patient`, `case_files.simulated_cases` and `preparing.prepare`."""
    labels, minutes = cli.label_numbers(flags.FLAGS.label), cli.numbers("--minutes", flags.FLAGS.minutes)
    out, config, seed = pathlib.Path(flags.FLAGS.out), configs.DEMO, flags.FLAGS.seed
    patient, passes = conditions.Patient(flags.FLAGS.ct, flags.FLAGS.mask, labels, flags.FLAGS.workdir), config.passes
    report, results, counts = _Report(out / "study.txt"), {}, {}

    def run(condition, count):
        counts[condition] = count
        results[condition] = conditions.run(patient, condition, count, seed, out, passes)
        return results[condition]

    for variant in ("artic", "real"):
        condition = conditions.Condition("scenes", variant, variant)
        rows = run(condition, flags.FLAGS.scenes)
        report.add(f"scenes: {variant}", statistics.HEADER, *statistics.by_start(rows, configs.STARTS_MM))
    far = conditions.Condition("far starts", "artic", starts_mm=conditions.FAR_MM, every_start=True)
    rows = run(far, max(1, flags.FLAGS.scenes // 4))
    report.add("far starts: artic", statistics.HEADER, *statistics.by_start(rows, conditions.FAR_MM))
    report.add(rivals.reconstructions(patient, max(1, flags.FLAGS.sweep_scenes), seed, out, passes))
    groups = {}
    for condition in conditions.sweeps() if flags.FLAGS.sweep_scenes else []:
        rows = run(condition, flags.FLAGS.sweep_scenes)
        groups.setdefault(condition.group, {})[condition.name] = rows
    for group, entries in groups.items():
        report.add(group, statistics.HEADER, *(statistics.line(name, rows) for name, rows in entries.items()))
    params = (
        rivals.train_plain(patient, config, flags.FLAGS.plain_minutes, out, seed) if flags.FLAGS.plain_minutes else None
    )
    for variant in ("artic", "real"):
        condition, count = conditions.Condition("methods", variant, variant), max(1, flags.FLAGS.sweep_scenes)
        found = rivals.compare(patient, params, condition, count, seed, out, passes)
        report.add(f"methods on the same cases: {variant}", *statistics.methods(found))
    if minutes:
        for value in minutes:
            condition = conditions.Condition("minutes of training", f"{value:g}", every_start=True)
            few = conditions.prepared_for(patient, config, value, models.base_folder(), out)
            rows = conditions.run(few, condition, max(1, flags.FLAGS.sweep_scenes), seed, out, passes)
            groups.setdefault(condition.group, {})[condition.name] = rows
        lines = (statistics.line(name, rows) for name, rows in groups[condition.group].items())
        report.add(condition.group, statistics.HEADER, *lines)
    starts = {name: results[conditions.Condition("scenes", name, name)] for name in ("artic", "real")}
    pictures.study(out / "study.png", {**starts, "artic, far": results[far]}, groups)
    conditions.failures(patient, results, counts, seed, out, passes)
    print(f"\nwritten: {out / 'study.txt'}, {out / 'study.png'}")


if __name__ == "__main__":
    cli.run(main, define_flags)
