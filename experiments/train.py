"""Trains RadGS-Reg: `python -m experiments.train --stage=full`.

Data stages: P1 (many spines, simulated X-rays), P2 (real cases, folds by patient; by default a second, harder simulation), P3
(the patient's own CT). Each has three phases: RecM, RegM, joint. Every stage starts from the checkpoint before it, and a run
that was stopped continues from its last checkpoint.
"""

import dataclasses
import pathlib

from absl import flags

from data_pipelines import cases
from data_pipelines.ct import verse
from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.io import processes
from data_pipelines.pairs import identity
from experiments import configs
from experiments import data_stages
from experiments.data_stages import RealData
from experiments.patients import workdir as workdirs
from experiments.reports import index_page
from experiments.reports.run_record import RunRecord
from experiments.runtime import cli
from experiments.runtime import cluster
from experiments.runtime import input_flags
from experiments.runtime import progress
from experiments.scoring import evaluate
from experiments.training import history
from experiments.training import loop
from radgs_jax import __version__
from radgs_jax import errors
from radgs_jax.training import objectives
from radgs_jax.training.update import UpdateConfig

STAGES = ("full", *configs.DATA_STAGES, *(f"{d}_{p}" for d in configs.DATA_STAGES for p in objectives.PHASES))

VARIANTS = ("artic", "real")
"""Variants of the held-out X-rays that P3's patient is scored on."""
SCORED = "scored.json"
"""File beside the table, with a digest of all that it depends on."""
PHANTOM_S, PAIR_S, XRAYS_S, CASE_S = 1.9, 0.026, 0.5, 1.9
"""Times that a phantom, a training pair, two X-rays and the score of a case take, s: `make train` on two cores."""
STEP_S = (0.45, 0.1, 0.7)
"""Times that a step of each phase takes, s, its share of compiling included: as above."""


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_enum("stage", "full", STAGES, "full, a data stage, or one phase of a data stage.")
    flags.DEFINE_enum("preset", "demo", sorted(configs.PRESETS), "Training configuration.")
    flags.DEFINE_string("workdir", "runs/demo", "Folder for data, checkpoints, logs and results.")
    flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)
    flags.DEFINE_string("p1_data", None, "Folder of CTs with label maps, such as VerSe, for P1; default: phantoms.")
    flags.DEFINE_multi_enum("p1_split", ["training"], verse.SPLITS, "Split of --p1_data that P1 trains on, or several.")
    flags.DEFINE_string("p2_cases", None, "Case file of real X-rays with known poses, for P2; default: simulated.")
    flags.DEFINE_string("p2_variant", "real", "Array of the X-ray files of --p2_cases.")
    flags.DEFINE_integer("p2_fold", 0, "Number of the fold of patients that P2 holds out.", lower_bound=0)
    flags.DEFINE_integer("trace_steps", 0, "Steps of each phase that jax's profiler records.", lower_bound=0)
    cluster.define()
    input_flags.define_scan("of the patient that P3 prepares; default: a phantom's")


def plan(config: configs.Config) -> dict[str, float]:
    """The progress bars of a full run on phantoms, in order, with the time that the demo's take on two cores, s."""
    vertebrae = config.p1_patients * len(config.labels)
    others = config.p2_patients * len(config.labels)
    own, cases_of = len(config.patient_labels), len(config.patient_labels) * config.eval_scenes
    steps = lambda name: {
        f"{name}_{phase}": seconds * count
        for phase, seconds, count in zip(objectives.PHASES, STEP_S, config.stage(name).steps)
    }
    return {
        "p1 phantoms": PHANTOM_S * config.p1_patients,
        "p1 pairs": PAIR_S * vertebrae * (1 + config.p1.pairs + config.p1.ct_pairs),
        **steps("p1"),
        "p2 phantoms": PHANTOM_S * config.p2_patients,
        "p2 X-rays": XRAYS_S * others * config.p2.pairs,
        "p2 pairs": PAIR_S * others * (1 + config.p2.ct_pairs + config.p2.pairs),
        **steps("p2"),
        "patient": PHANTOM_S,
        "p3 pairs": PAIR_S * own * (1 + config.p3.pairs + config.p3.ct_pairs),
        **steps("p3"),
        "held-out X-rays": XRAYS_S * cases_of,
        **{f"evaluate {variant}": CASE_S * cases_of * len(configs.STARTS_MM) for variant in VARIANTS},
    }


def score_patient(
    config: configs.Config, workdir: pathlib.Path, subject: str, ct: pathlib.Path, mask: pathlib.Path
) -> str:
    """Scores P3's patient on X-rays and poses that no stage has seen, unless the same has been scored before.

    Args:
      config: of the run; workdir: of the run; subject, ct, mask: as `data_stages.p3` returns them.
    Returns:
      the table as text, which is also written to `workdir`/eval/table.txt.
    Raises:
      InputError: as `evaluate.report`.
    """
    path = data_stages.held_out_cases(config, workdir, (subject, ct, mask))
    table, scored = workdir / "eval" / "table.txt", workdir / "eval" / SCORED
    of = identity.config_hash(workdirs.read_manifest(workdir / "p3"), files.read_json(path), config.passes, __version__)
    if scored.exists() and table.exists() and files.read_json(scored) == of:
        print(f"{table}: scored before; delete {scored} to score again")
        return table.read_text().removesuffix("\n")
    case_file, texts = cases.read(path), []
    for variant in VARIANTS:
        text, times = evaluate.report(
            case_file,
            variant,
            workdir / "p3",
            config.passes,
            workdir / "eval",
            score_volumes=variant == "real",
        )
        texts.append(text)
        print(times)
    result = "\n\n".join(texts)
    with files.replacing(table) as temporary:
        temporary.write_text(result + "\n")
    files.write_json(scored, of)
    return result


def mark(config: configs.Config, given: RealData = RealData()) -> str:
    """Digest of all that a run's results depend on."""
    values = dataclasses.asdict(config)
    del values["mesh"], values["trace_steps"]
    if config.update == UpdateConfig():
        del values["update"]
    return identity.config_hash(values, *given.mark())


def _claim(path, config_hash):
    """Ties a workdir to one configuration, because its checkpoints would not fit another."""
    if not path.exists():
        files.write_json(path, config_hash)
    elif files.read_json(path) != config_hash:
        errors.fail(
            path, "configuration", files.read_json(path), f"{config_hash}; name another --workdir or delete this one"
        )


def train(
    config: configs.Config,
    workdir: pathlib.Path | str,
    stage: str = "full",
    given: RealData = RealData(),
) -> str | None:
    """Runs one stage, or all of them.

    Args:
      workdir: folder of the run.
      stage: one of STAGES.
      given: what is trained on in place of phantoms.
    Returns:
      the score table after 'full' and 'p3' in the first process, else None.
    Raises:
      InputError: a stage whose predecessor is not there, a workdir of another configuration or in use by another process, or
        unusable input.
      DivergedError: as `loop.run_steps`.
    """
    workdir = files.make_folder(workdir)
    with (
        processes.first_holds(workdir / locks.LOCK, workdir),
        progress.planned(plan(config) if stage == "full" else {}),
    ):
        return _train(config, workdir, stage, given)


def _train(config, workdir, stage, given):
    processes.first_does(lambda: _claim(workdir / "config.json", mark(config, given)))
    name, _, phase = stage.partition("_")
    phases = objectives.PHASES[: objectives.PHASES.index(phase) + 1] if phase else objectives.PHASES
    if phase and len(phases) > 1:
        before, steps = phases[-2], config.stage(name).steps[len(phases) - 2]
        if not loop.finished(workdir, name, before, steps):
            errors.fail(
                workdir,
                f"stage {name}_{before}",
                "not finished",
                f"its last checkpoint: run --stage={name}_{before} first",
            )
    record = RunRecord()
    show = lambda: processes.first_does(lambda: history.update_page(workdir, config, record))
    if name in ("full", "p1"):
        data_stages.p1(config, workdir, phases, given)
        show()
    if name in ("full", "p2"):
        data_stages.p2(config, workdir, phases, given)
        show()
    if name in ("full", "p3"):
        patient = data_stages.p3(config, workdir, phases, given)
        show()
    scored: list[str] = []
    if name == "full" or stage == "p3":
        processes.first_does(lambda: scored.append(score_patient(config, workdir, *patient)))
        show()
    return scored[0] if scored else None


def main() -> None:
    """Runs `train` with the flags, prints the table where there is one, and raises as it does."""
    with cluster.joined():
        _main()


def _main():
    asked = flags.FLAGS
    config = configs.PRESETS[asked.preset]
    how = {"mesh": cluster.mesh_shape(), "update": cluster.update_config()}
    how |= {"seed": asked.seed, "p2_fold": asked.p2_fold, "trace_steps": asked.trace_steps}
    config = dataclasses.replace(config, **how)
    patient = tuple(input_flags.targets()) if asked.ct or asked.mask else ()
    if any(target.labels for target in patient):
        # Held-out X-rays are a case file, whose label maps are recognised.
        errors.fail("flags", "--labels, --bone", "one of them", "neither: a label map of the spine that is recognised")
    if patient:
        config = dataclasses.replace(config, patient_labels=tuple(target.label for target in patient))
    path = lambda text: None if text is None else pathlib.Path(text)
    splits = tuple(dict.fromkeys(asked.p1_split))
    given = RealData(path(asked.p1_data), splits, path(asked.p2_cases), asked.p2_variant, patient)
    table = train(config, asked.workdir, asked.stage, given)
    if table:
        print(f"\n{table}\n\nopen {pathlib.Path(asked.workdir) / index_page.NAME}")


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags, log_in="workdir")


if __name__ == "__main__":
    command()
