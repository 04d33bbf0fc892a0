"""The paper's Table 2 at a laptop's scale: `python -m experiments.ablation --out=A`.

Trains the variant of each row on phantoms and scores it on X-rays of a phantom patient that only P3 has seen. The poses are
the network's own; the last columns add the refinement, which all rows share. A run that was stopped continues.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from absl import flags

from data_pipelines import cases
from data_pipelines.io import files
from experiments import configs
from experiments import data_stages
from experiments.patients import models
from experiments.patients import untrained
from experiments.patients import workdir
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
    p1=configs.StageConfig(pairs=16, ct_pairs=32, steps=(160, 30, 30), learning_rate=2e-3),
    p2=configs.StageConfig(pairs=2, ct_pairs=16, steps=(20, 10, 20), learning_rate=1e-3),
    p3=configs.StageConfig(pairs=96, ct_pairs=64, steps=(160, 10, 40), learning_rate=1.5e-3),
)
"""A sixth to a half of the demo's steps on fewer spines: chosen by hand, training time (70 minutes for all rows, which grow with
the steps) against how well the models are trained."""
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
REGISTRATION = ("mean_mm", "median_mm", "range_mm", "success", "refined_mm", "refined_success")


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


def score_row(
    config: configs.Config,
    folder: pathlib.Path,
    row: tuple[str, str, str, Sequence[str]],
    case_file: cases.CaseFile,
) -> dict[str, float | None]:
    """Figures of a row on a case file, kept in `folder`/scores; the registration's are None where RegM is not trained.

    Args:
      config: of the row's run; folder: of that run; row: one of `ROWS`; case_file: with true poses and points.
    Raises:
      InputError: as `data_stages.p1`, `data_stages.p2` and `data_stages.p3`.
    """
    name, _, stage, phases = row
    kept = folder / "scores" / f"{name.split()[0]}.json"
    if kept.exists():
        return files.read_json(kept)
    prepare = _prepare_of(config, folder, stage, phases)
    network = evaluate.evaluate(case_file, "real", prepare, config.passes, refine=False)
    error, start = network["error_mm"], network["start_mm"]
    volumes = network["volumes"]["reconstruction"]
    share, area = network["attention"].mean(0)
    figures = {name: float(values.mean()) for name, values in volumes.items()}
    figures |= {"attention": float(share), "silhouette": float(area), "start_mm": float(np.median(start))}
    figures |= dict.fromkeys(REGISTRATION)
    if "reg" in phases:
        refined = evaluate.evaluate(case_file, "real", prepare, config.passes, score_volumes=False)["error_mm"]
        values = (
            np.mean(error),
            np.median(error),
            metrics.capture_range(start, error),
            np.mean(error < metrics.SUCCESS_MM),
            np.median(refined),
            np.mean(refined < metrics.SUCCESS_MM),
        )
        figures |= dict(zip(REGISTRATION, map(float, values)))
    files.write_json(kept, figures)
    return figures


def ablation_table(figures: Mapping[str, Mapping[str, float | None]]) -> str:
    """The table as text; figures: row name -> what `score_row` returns."""
    lines = [
        f"{'':>32} {'SSIM honest':>12} {'PSNR':>8} {'SSIM paper':>11} {'PSNR':>8} {'attention':>10} {'mean mm':>8} {'median':>7} "
        f"{'CR mm':>6} {'SR':>6} {'refined':>8} {'SR':>6}"
    ]
    for name, f in figures.items():
        text = (
            f"{name:>32} {100 * f['ssim_honest']:10.2f} % {f['psnr_honest']:5.2f} dB {100 * f['ssim_paper']:9.2f} % "
            f"{f['psnr_paper']:5.2f} dB {100 * f['attention']:8.0f} %"
        )
        if f["mean_mm"] is not None:
            text += (
                f" {f['mean_mm']:8.2f} {f['median_mm']:7.2f} {f['range_mm']:6.0f} {100 * f['success']:4.0f} % "
                f"{f['refined_mm']:8.2f} {100 * f['refined_success']:4.0f} %"
            )
        lines.append(text)
    last = figures[name]
    return "\n".join(
        [
            *lines,
            f"start median {last['start_mm']:.1f} mm; the vertebra takes {100 * last['silhouette']:.0f} % of the crops",
        ]
    )


def run_ablation(out: pathlib.Path | str, seed: int = 0) -> None:
    """Trains and scores every row; writes `out`/table.txt and prints it after each.

    Args:
      out: folder of the runs and of the table; seed: of everything random.
    Raises:
      InputError: as `data_stages.p1`, `data_stages.p2` and `data_stages.p3`.
    """
    out = pathlib.Path(out)
    configurations = {name: dataclasses.replace(config, seed=seed) for name, config in RUNS.items()}
    first = next(iter(configurations.values()))
    _share_data(out / "small", out)
    path = data_stages.held_out_cases(first, out, data_stages.patient_scan(first, out), ("real",))
    case_file, figures = cases.read(path), {}
    for row in ROWS:
        name, run, *_ = row
        _share_data(out / run, out)
        figures[name] = score_row(configurations[run], out / run, row, case_file)
        text = ablation_table(figures)
        with files.replacing(out / "table.txt") as temporary:
            temporary.write_text(text + "\n")
        print(text)


def main() -> None:
    """Runs `run_ablation` with the flags, and raises as it does."""
    run_ablation(flags.FLAGS.out, flags.FLAGS.seed)


if __name__ == "__main__":
    cli.run(main, define_flags)
