"""What the accuracy depends on: `python -m experiments.study --ct --mask --label=17,18,19,20 --workdir=W --out=S`.

Simulates X-rays of a patient that `experiments.prepare` has prepared, with a generator of their own, and registers them: as
they are, and with one thing at a time made worse. Leaves tables, a page of plots and the worst cases' pictures in S. What has
been registered stays there, so that a study that was stopped goes on.
"""

import pathlib

from absl import flags

from data_pipelines import files
from experiments import cli
from experiments import configs
from experiments import pictures
from experiments import studying

CT = flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder) that was prepared.", required=True)
MASK = flags.DEFINE_string("mask", None, "Label map on the CT's grid.", required=True)
LABEL = flags.DEFINE_list("label", None, "VerSe numbers of its prepared vertebrae.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder that `experiments.prepare` made.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder of the study.", required=True)
SCENES = flags.DEFINE_integer("scenes", 20, "Acquisitions of each vertebra, one start each.", lower_bound=1)
SWEEP_SCENES = flags.DEFINE_integer(
    "sweep_scenes",
    3,
    "Acquisitions of each vertebra at each point of a sweep, one start each; 0: no sweeps.",
    lower_bound=0,
)
PLAIN_MINUTES = flags.DEFINE_float(
    "plain_minutes", 0.0, "Training time of the plain 2D network, on the workdir's pairs; 0: none.", lower_bound=0.0
)
MINUTES = flags.DEFINE_list("minutes", [], "Training times to prepare the first vertebra with, anew, and compare.")
SEED = flags.DEFINE_integer("seed", 5, "Seed of everything random.", lower_bound=0)


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
    """Runs the study; raises as `studying.Patient`, `build.simulated_cases` and `patients.prepare`."""
    labels, minutes = cli.label_numbers(LABEL.value), cli.numbers("--minutes", MINUTES.value)
    out, config, seed = pathlib.Path(OUT.value), configs.DEMO, SEED.value
    patient, passes = studying.Patient(CT.value, MASK.value, labels, WORKDIR.value), config.passes
    report, results, counts = _Report(out / "study.txt"), {}, {}

    def run(condition, count):
        counts[condition] = count
        results[condition] = studying.run(patient, condition, count, seed, out, passes)
        return results[condition]

    for variant in ("artic", "real"):
        condition = studying.Condition("scenes", variant, variant)
        rows = run(condition, SCENES.value)
        report.add(f"scenes: {variant}", studying.HEADER, *studying.by_start(rows, configs.STARTS_MM))
    far = studying.Condition("far starts", "artic", starts_mm=studying.FAR_MM, every_start=True)
    rows = run(far, max(1, SCENES.value // 4))
    report.add("far starts: artic", studying.HEADER, *studying.by_start(rows, studying.FAR_MM))
    report.add(studying.reconstructions(patient, max(1, SWEEP_SCENES.value), seed, out, passes))
    groups = {}
    for condition in studying.sweeps() if SWEEP_SCENES.value else []:
        rows = run(condition, SWEEP_SCENES.value)
        groups.setdefault(condition.group, {})[condition.name] = rows
    for group, entries in groups.items():
        report.add(group, studying.HEADER, *(studying.line(name, rows) for name, rows in entries.items()))
    params = studying.train_plain(patient, config, PLAIN_MINUTES.value, out, seed) if PLAIN_MINUTES.value else None
    for variant in ("artic", "real"):
        condition, count = studying.Condition("methods", variant, variant), max(1, SWEEP_SCENES.value)
        found = studying.compare(patient, params, condition, count, seed, out, passes)
        report.add(f"methods on the same cases: {variant}", *studying.methods(found))
    if minutes:
        for value in minutes:
            condition = studying.Condition("minutes of training", f"{value:g}", every_start=True)
            few = studying.prepared_for(patient, config, value, cli.REPOSITORY / "base", out)
            rows = studying.run(few, condition, max(1, SWEEP_SCENES.value), seed, out, passes)
            groups.setdefault(condition.group, {})[condition.name] = rows
        lines = (studying.line(name, rows) for name, rows in groups[condition.group].items())
        report.add(condition.group, studying.HEADER, *lines)
    starts = {name: results[studying.Condition("scenes", name, name)] for name in ("artic", "real")}
    pictures.study(out / "study.png", {**starts, "artic, far": results[far]}, groups)
    studying.failures(patient, results, counts, seed, out, passes)
    print(f"\nwritten: {out / 'study.txt'}, {out / 'study.png'}")


if __name__ == "__main__":
    cli.run(main)
