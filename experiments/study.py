"""What the accuracy depends on: `python -m experiments.study --ct --mask --label=17,18,19,20 --workdir=W --out=S`.

Simulates X-rays of a patient that `experiments.prepare` has prepared, with a generator of their own, and registers them: as
they are, and with one thing at a time made worse. Leaves tables, a page of plots and the worst cases' pictures in S. What has
been registered stays there, so that a study that was stopped goes on.
"""

import pathlib

import numpy as np
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
SCENES = flags.DEFINE_integer("scenes", 15, "Acquisitions of each vertebra, five starts each.", lower_bound=1)
SWEEP_SCENES = flags.DEFINE_integer(
    "sweep_scenes", 3, "Acquisitions of each vertebra at each point of a sweep, one start each; 0: no sweeps.", lower_bound=0
)
PLAIN_MINUTES = flags.DEFINE_float(
    "plain_minutes", 0.0, "Training time of the plain 2D network, on the workdir's pairs; 0: none.", lower_bound=0.0
)
MINUTES = flags.DEFINE_list("minutes", [], "Training times to prepare the first vertebra with, anew, and compare.")
SEED = flags.DEFINE_integer("seed", 5, "Seed of everything random.", lower_bound=0)


def main():
    """Runs the study; raises as `Patient`, `build.simulated_cases` and `patients.prepare`."""
    labels, minutes = cli.label_numbers(LABEL.value), _numbers(MINUTES.value)
    out, config, seed = pathlib.Path(OUT.value), configs.DEMO, SEED.value
    patient, passes = studying.Patient(CT.value, MASK.value, labels, WORKDIR.value), config.passes
    out.mkdir(parents=True, exist_ok=True)
    texts, results, counts = [], {}, {}
    for variant in ("artic", "real"):
        condition = studying.Condition("scenes", variant, variant, every_start=True)
        results[condition], counts[condition] = studying.run(patient, condition, SCENES.value, seed, out, passes), SCENES.value
        texts.append("\n".join([f"scenes: {variant}", studying.HEADER, *studying.by_start(results[condition], studying.NEAR_MM)]))
    far = studying.Condition("far starts", "artic", starts_mm=studying.FAR_MM, every_start=True)
    counts[far] = max(1, SCENES.value // 3)
    results[far] = studying.run(patient, far, counts[far], seed + 1, out, passes)
    texts.append("\n".join(["far starts: artic", studying.HEADER, *studying.by_start(results[far], studying.FAR_MM)]))
    print("\n\n".join(texts))
    params = studying.train_plain(patient, config, PLAIN_MINUTES.value, out, seed) if PLAIN_MINUTES.value else None
    for variant in ("artic", "real"):
        condition, count = studying.Condition("methods", variant, variant), max(1, SCENES.value // 5)
        found = studying.compare(patient, params, condition, count, seed + 2, out, passes)
        lines = [
            f"{name:>34} {len(e):4d} {np.median(e):10.2f} {np.percentile(e, 90):8.2f} {100 * np.mean(np.array(e) < 2):16.1f} %"
            for name, e in found.items()
        ]
        head = f"{'':>34} {'n':>4} {'median mm':>10} {'p90 mm':>8} {'< 2 mm':>18}"
        texts.append("\n".join([f"methods on the same cases: {variant}", head, *lines]))
        print(texts[-1])
    groups = {}
    for condition in studying.sweeps() if SWEEP_SCENES.value else []:
        counts[condition] = SWEEP_SCENES.value
        results[condition] = studying.run(patient, condition, SWEEP_SCENES.value, seed + 3, out, passes)
        groups.setdefault(condition.group, {})[condition.name] = results[condition]
    own = list(results)
    for value in minutes:
        condition = studying.Condition("minutes of training", f"{value:g}", every_start=True)
        few = studying.prepared_for(patient, config, value, cli.REPOSITORY / "base", out)
        rows = studying.run(few, condition, max(1, SWEEP_SCENES.value), seed + 4, out, passes)
        groups.setdefault(condition.group, {})[condition.name] = rows
    for group, entries in groups.items():
        texts.append("\n".join([group, studying.HEADER, *(studying.line(name, rows) for name, rows in entries.items())]))
    text = "\n\n".join(texts)
    with files.replacing(out / "study.txt") as temporary:
        temporary.write_text(text + "\n")
    starts = {c.name: results[c] for c in own if c.group == "scenes"}
    starts["artic, far"] = results[far]
    pictures.study(out / "study.png", starts, groups)
    studying.failures(patient, own, results, counts, seed, out, passes)
    print(f"\n{text}\n\nwritten: {out / 'study.txt'}, {out / 'study.png'}")


def _numbers(values):
    try:
        return [float(value) for value in values]
    except ValueError:
        return files.fail("flags", "--minutes", ",".join(values), "numbers")


if __name__ == "__main__":
    cli.run(main)
