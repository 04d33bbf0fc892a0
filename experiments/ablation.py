"""The paper's Table 2 at a laptop's scale: `python -m experiments.ablation --out=A`.

Trains the variant of each row on phantoms and scores it on X-rays of a phantom patient that only P3 has seen: the network's own
poses, and those after the refinement, which all rows share. A run that was stopped continues.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from absl import flags

from data_pipelines import cases
from data_pipelines.io import files
from experiments import configs
from experiments import data_stages
from experiments.comparison import tables
from experiments.comparison.tables import Row
from experiments.patients import models
from experiments.patients import untrained
from experiments.patients import workdir
from experiments.reports import pictures
from experiments.runtime import cli
from experiments.scoring import evaluate
from radgs_jax import metrics
from radgs_jax.training import objectives


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("out", None, "Folder for the runs and the table.", required=True)
    flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)


SMALL = dataclasses.replace(
    configs.DEMO,
    p1_patients=6,
    patient_labels=(20, 22, 24),
    judged=False,
    eval_scenes=7,
    p1=configs.StageConfig(pairs=16, ct_pairs=32, steps=(160, 30, 30), learning_rate=2e-3),
    p2=configs.StageConfig(pairs=2, ct_pairs=16, steps=(20, 10, 20), learning_rate=1e-3),
    p3=configs.StageConfig(pairs=96, ct_pairs=64, steps=(160, 10, 40), learning_rate=1.5e-3),
)
"""A sixth to a half of the demo's steps on fewer spines: chosen by hand, training time (90 minutes for all rows, which grow with
the steps) against how well the models are trained. The 21 acquisitions are what intervals and tests are over; with six, the least
p-value of a single test is 0.03."""
DENSE = ("densenet121", (("growth", 12), ("blocks", (3, 6))))
VIT = ("vit12", (("patch", 8), ("depth", 4), ("width", 96), ("heads", 4), ("mlp", 192)))
"""The paper's other 2D backbones at sizes chosen by hand for a laptop: larger ones take longer to train."""


def _model(**changes):
    return dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, **changes))


RUNS = {
    "small": SMALL,
    "no_cal": _model(counterfactual_draws=0),
    "dense": _model(backbone_2d=DENSE),
    "vit": _model(backbone_2d=VIT),
}
ROWS = (
    ("1  RecM, P1, without CAL", "no_cal", "p1", ("rec",)),
    ("2  RecM with CAL, P1", "small", "p1", ("rec",)),
    ("3  RecM and RegM apart, P1", "small", "p1", ("rec", "reg")),
    ("4  RadGS-Reg, P1", "small", "p1", objectives.PHASES),
    ("5  RadGS-Reg, P1 and P2", "small", "p2", objectives.PHASES),
    ("6  RadGS-Reg, all stages", "small", "p3", objectives.PHASES),
    ("6' the same without CAL", "no_cal", "p3", objectives.PHASES),
    ("7  dense backbone, all stages", "dense", "p3", objectives.PHASES),
    ("8  ViT backbone, all stages", "vit", "p3", objectives.PHASES),
)
"""Of each row: its name, the run in `RUNS`, the data stage after which it is scored, and the phases of that stage."""
COMPARED = (
    ("CAL, P1", "2", "1"),
    ("joint training, P1", "4", "3"),
    ("P2", "5", "4"),
    ("P3", "6", "5"),
    ("CAL, all stages", "6", "6'"),
    ("dense backbone", "7", "6"),
    ("ViT backbone", "8", "6"),
)
"""What is compared: its name, and the first words of the rows with and without it."""
SHOWN = "1", "2", "6'", "6"
"""First words of the rows in the picture of what networks look at: pairs without and with CAL."""
SCORES = (
    ("ssim_honest", "SSIM %, honest", 1, 100.0),
    ("psnr_honest", "PSNR dB, honest", 2, 1.0),
    ("ssim_paper", "SSIM %, paper's", 1, 100.0),
    ("psnr_paper", "PSNR dB, paper's", 2, 1.0),
)
"""Scores of reconstructions, with their names, digits and scales in tables."""
POSES = ("network_mm", "mTRE mm"), ("refined_mm", "refined: mTRE mm")
"""Errors of the network's own poses and of the refined ones, with their names in tables."""


def _share_data(folder, out):
    """Links the runs to one folder of phantoms and pairs, which are named by content and so are made once."""
    files.make_folder(folder)
    for name in ("scans", "pairs"):
        files.make_folder(out / name)
        if not (folder / name).exists():
            with files.writing(folder / name):
                (folder / name).symlink_to((out / name).resolve(), target_is_directory=True)


def _prepare_of(config, folder, stage, phases):
    """A function from a `cases.Volume` to its `Prepared` with a row's model, which is trained where it is not there yet."""
    model = data_stages.p1(config, folder, phases if stage == "p1" else objectives.PHASES)
    if stage != "p1":
        data_stages.p2(config, folder, objectives.PHASES)
        model = models.load_model(folder / "p2" / "model")
    if stage == "p3":
        data_stages.p3(config, folder, objectives.PHASES)
        return workdir.loader(folder / "p3")
    return untrained.untrained_loader(model, config.refine)


def _word(name):
    """The first word of a row's name, which its files and comparisons have."""
    return name.split()[0]


def score_row(
    config: configs.Config,
    folder: pathlib.Path,
    row: tuple[str, str, str, Sequence[str]],
    case_file: cases.CaseFile,
) -> Row:
    """Scores of a row on a case file, kept in `folder`/scores with what the network looked at in each vertebra's first case.

    Args:
      config: of the row's run; folder: of that run; row: one of `ROWS`; case_file: with true poses and points.
    Returns:
      the row, with `SCORES`, the fractions on the vertebra of `attention` and `activity`, `silhouette`, `start_mm`, and,
      where RegM is trained, `POSES`.
    Raises:
      InputError: as `data_stages.p1`, `data_stages.p2` and `data_stages.p3`.
    """
    name, _, stage, phases = row
    path = folder / "scores" / f"{_word(name)}.json"
    if not path.exists():
        prepare = _prepare_of(config, folder, stage, phases)
        network = evaluate.evaluate(case_file, "real", prepare, config.passes, refine=False, baselines=False)
        scores = dict(network["volumes"]["reconstruction"])
        scores |= dict(zip(("attention", "activity", "silhouette"), network["attention"].T))
        scores["start_mm"] = network["start_mm"]
        if "reg" in phases:
            refined = evaluate.evaluate(case_file, "real", prepare, config.passes, score_volumes=False)
            scores |= {"network_mm": network["error_mm"], "refined_mm": refined["error_mm"]}
        seen = list(network["seen"].values())
        arrays = {key: np.concatenate([getattr(one, key) for one in seen]) for key in ("crops", "activity")}
        files.write_npz(path.with_suffix(".npz"), **arrays)
        files.write_json(path, {key: value.tolist() for key, value in scores.items()})
    scores = {key: np.array(value) for key, value in files.read_json(path).items()}
    return Row(name, tuple(case.scene for case in case_file.cases), scores)


def _with_interval(row, score, statistic, digits, scale=1.0):
    """A statistic of a score with its 95 % interval over scenes, as a cell."""
    low, high = (scale * end for end in tables.interval(row, score, statistic))
    return f"{scale * statistic(row.scores[score]):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _rows_table(rows):
    """Column names and cells of all rows."""
    head = ["", *(name for _, name, *_ in SCORES), "attention on it %", "activity on it %"]
    for _, name in POSES:
        head += [f"{name}, median", "CR mm", "SR %"]
    cells = []
    for row in rows:
        cell = [row.title, *(_with_interval(row, score, np.mean, *how) for score, _, *how in SCORES)]
        cell += [f"{100 * np.mean(row.scores[score]):.0f}" for score in ("attention", "activity")]
        for score, _ in POSES:
            if score not in row.scores:
                cell += ["-"] * 3
                continue
            success = lambda error: np.mean(error < metrics.SUCCESS_MM)
            reached = metrics.capture_range(row.scores["start_mm"], row.scores[score])
            cell += [_with_interval(row, score, np.median, 2), f"{reached:.0f}"]
            cell.append(_with_interval(row, score, success, 0, 100.0))
        cells.append(cell)
    return head, cells


def _differences_table(rows):
    """Column names and cells of what is compared: mean differences of scene means, and Holm-corrected p-values."""
    of = {_word(row.title): row for row in rows}
    pairs = [(name, of[one], of[other]) for name, one, other in COMPARED if one in of and other in of]
    head, cells = [""], [[f"{name} ({_word(one.title)} - {_word(other.title)})"] for name, one, other in pairs]
    for score, name, digits, scale in (*SCORES, *((score, name, 2, 1.0) for score, name in POSES)):
        head += [name, "p"]
        found = [
            tables.differences(one, other, score) if all(score in row.scores for row in (one, other)) else None
            for _, one, other in pairs
        ]
        p = tables.holm([math.nan if values is None else tables.signed_rank(values) for values in found])
        for cell, values, chance in zip(cells, found, p):
            if values is None:
                cell += ["-", "-"]
                continue
            scenes = tuple(map(str, range(len(values))))
            text = _with_interval(Row("", scenes, {score: values}), score, np.mean, digits, scale)
            cell += [text, tables.chance(chance)]
    return head, cells


def _write(out, rows):
    """Writes table.txt, table.md and table.json, and returns the text."""
    start, area = (np.concatenate([row.scores[score] for row in rows]) for score in ("start_mm", "silhouette"))
    cases_of = f"{len(set(rows[0].scenes))} scenes, {len(rows[0].scenes)} cases, start median {np.median(start):.1f} mm"
    title = f"{cases_of}; the vertebra takes {100 * np.mean(area):.0f} % of the crops; 95 % intervals over scenes"
    parts = [(title, *_rows_table(rows))]
    head, cells = _differences_table(rows)
    if cells:
        parts.append(
            ("differences of scene means, 95 % intervals, p of signed ranks with Holm's correction", head, cells)
        )
    return tables.write(out, "table", parts, [tables.as_values(row) for row in rows])


def run_ablation(
    out: pathlib.Path | str,
    seed: int = 0,
    rows: Sequence[tuple[str, str, str, Sequence[str]]] = ROWS,
    runs: Mapping[str, configs.Config] = RUNS,
) -> None:
    """Trains and scores rows; writes table.txt, .md and .json after each, and attention.png after the last.

    Args:
      out: folder of the runs and of the tables; seed: of everything random.
      rows, runs: as `ROWS` and `RUNS`; the held-out cases are those of the first run.
    Raises:
      InputError: as `data_stages.p1`, `data_stages.p2` and `data_stages.p3`.
    """
    out = pathlib.Path(out)
    configurations = {name: dataclasses.replace(config, seed=seed) for name, config in runs.items()}
    first = next(iter(configurations.values()))
    _share_data(out / next(iter(runs)), out)
    path = data_stages.held_out_cases(first, out, data_stages.patient_scan(first, out), ("real",))
    case_file, scored, seen = cases.read(path), [], {}
    for row in rows:
        name, run, *_ = row
        _share_data(out / run, out)
        scored.append(score_row(configurations[run], out / run, row, case_file))
        seen[_word(name)] = files.read_npz(out / run / "scores" / f"{_word(name)}.npz", "crops", "activity")
        print(_write(out, scored))
    titles = {_word(name): name for name, *_ in rows}
    shown = {titles[word]: seen[word]["activity"] for word in SHOWN if word in titles}
    pictures.attention_picture(out / "attention.png", next(iter(seen.values()))["crops"], shown)


def main() -> None:
    """Runs `run_ablation` with the flags, and raises as it does."""
    run_ablation(flags.FLAGS.out, flags.FLAGS.seed)


if __name__ == "__main__":
    cli.run(main, define_flags)
