"""Trains RadGS-Reg: `python -m experiments.train --stage=full`.

Data stages: P1 (many spines, simulated X-rays), P2 (a folder of real cases, folds by patient; on the default data a second,
harder simulation), P3 (the patient's own CT). Inside each, the module stages RecM, RegM, joint. Every stage starts from the
checkpoint before it, and a run that was stopped goes on where it was.
"""

import dataclasses
import pathlib

from absl import flags

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pairs
from experiments import cli
from experiments import configs
from experiments import curriculum
from experiments import evaluate
from experiments import stages
from radgs_jax import training

STAGES = ("full", *configs.DATA_STAGES, *(f"{d}_{m}" for d in configs.DATA_STAGES for m in training.MODULES))
STAGE = flags.DEFINE_enum("stage", "full", STAGES, "full, a data stage, or one module stage of it.")
PRESET = flags.DEFINE_enum("preset", "demo", sorted(configs.PRESETS), "Configuration.")
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder for data, checkpoints, logs and results.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)
P2_CASES = flags.DEFINE_string(
    "p2_cases", None, "Case file of real X-rays with known poses, for P2; default: simulated."
)
P2_VARIANT = flags.DEFINE_string("p2_variant", "real", "Array of its X-ray files.")
P2_FOLD = flags.DEFINE_integer("p2_fold", 0, "Fold (by patient) that P2 holds out.", lower_bound=0)


def score(config, workdir, subject, ct, mask):
    """The table, as text, of X-rays and poses of the patient that no stage has seen; written to `workdir`/eval too."""
    path = curriculum.held_out_cases(config, workdir, (subject, ct, mask))
    case_file = cases.read(path)
    texts = []
    for variant in ("artic", "real"):
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
    with files.replacing(workdir / "eval" / "table.txt") as temporary:
        temporary.write_text(result + "\n")
    return result


def _claim(path, config_hash):
    """Keeps a workdir to one configuration: its checkpoints would not fit another."""
    if not path.exists():
        files.write_json(path, config_hash)
    elif files.read_json(path) != config_hash:
        files.fail(
            path, "configuration", files.read_json(path), f"{config_hash}; name another --workdir or delete this one"
        )


def train(config, workdir, stage="full", case_path=None, variant="real"):
    """Runs a stage; callable from a notebook.

    Args:
      config: `configs.Config`; workdir: folder that holds the run; stage: one of STAGES.
      case_path, variant: real cases for P2, or None.
    Returns:
      the score table after 'full' and 'p3', else None.
    Raises:
      InputError: a stage whose predecessor is not there, a workdir of another configuration, or unusable input.
    """
    workdir = pathlib.Path(workdir)
    _claim(workdir / "config.json", pairs.config_hash(config))
    name, _, module = stage.partition("_")
    modules = training.MODULES[: training.MODULES.index(module) + 1] if module else training.MODULES
    if module and len(modules) > 1:
        before, steps = modules[-2], config.stage(name).steps[len(modules) - 2]
        if not stages.finished(workdir, name, before, steps):
            files.fail(
                workdir,
                f"stage {name}_{before}",
                "not finished",
                f"its last checkpoint: run --stage={name}_{before} first",
            )
    if name in ("full", "p1"):
        curriculum.p1(config, workdir, modules)
    if name in ("full", "p2"):
        curriculum.p2(config, workdir, modules, case_path, variant)
    if name in ("full", "p3"):
        patient = curriculum.p3(config, workdir, modules)
    return score(config, workdir, *patient) if name == "full" or stage == "p3" else None


def main():
    """Runs `train` with the flags, prints the table where there is one, and raises as it does."""
    config = dataclasses.replace(configs.PRESETS[PRESET.value], seed=SEED.value, p2_fold=P2_FOLD.value)
    table = train(config, WORKDIR.value, STAGE.value, P2_CASES.value, P2_VARIANT.value)
    if table:
        print(f"\n{table}\n\npictures and files: {pathlib.Path(WORKDIR.value) / 'eval'}")


if __name__ == "__main__":
    cli.run(main)
