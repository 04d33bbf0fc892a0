"""The three data stages of training, P1, P2 and P3; each function continues where it was stopped."""

import dataclasses
import pathlib
from collections.abc import Iterable
from collections.abc import Sequence

import jax
import numpy as np

from data_pipelines import cases
from data_pipelines.ct import verse
from data_pipelines.io import files
from data_pipelines.io import processes
from data_pipelines.pairs import build
from data_pipelines.pairs import identity
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import case_files
from experiments import configs
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients.workdir import CALIBRATION
from experiments.patients.workdir import read_rule
from experiments.patients.workdir import Target
from experiments.runtime import progress
from experiments.scoring import evaluate
from experiments.training import loop
from radgs_jax import errors
from radgs_jax import levels
from radgs_jax.models import backbones
from radgs_jax.models import radgs_reg
from radgs_jax.models.trained import Model

P1_SEED, P2_SEED, PATIENT_SEED = 10000, 20000, 30000
"""First phantom seed of each stage, far enough apart that no phantom belongs to two stages."""
SEEDS_PER_RUN = 100
"""Distance between the phantom seeds of runs with consecutive `Config.seed`, which share no phantom up to this number."""
P2_STARTS_MM = ((0, 25),)
"""Bin of P2's start errors, mTRE in mm: the whole range that scores are grouped by."""


@dataclasses.dataclass(frozen=True)
class RealData:
    """What a run is trained on in place of phantoms; what is None, or empty, is simulated from phantoms.

    Attributes:
      p1_folder: CTs with label maps, as `verse.prepare` reads them; p1_splits: its splits that P1 trains on.
      p2_cases: case file of real X-rays with known poses; p2_variant: array of its X-ray files.
      patient: the vertebrae that P3 prepares, of one scan.
    """

    p1_folder: pathlib.Path | None = None
    p1_splits: tuple[str, ...] = verse.SPLITS[:1]
    p2_cases: pathlib.Path | None = None
    p2_variant: str = "real"
    patient: tuple[Target, ...] = ()

    def mark(self) -> list[object]:
        """Plain values that tell this data from other data; empty where all of it is simulated by default."""
        found: list[object] = []
        if self.p1_folder is not None:
            found.append(["p1", verse.fingerprint(self.p1_folder), *self.p1_splits])
        if self.p2_cases is not None:
            found.append(["p2", files.sha256(self.p2_cases), self.p2_variant])
        if self.patient:
            first = self.patient[0]
            found.append(["p3", identity.scan_digest(first.ct, first.mask), *(one.label for one in self.patient)])
        return found


def _phantom_scans(config, workdir, first, count, text):
    seeds = [first + SEEDS_PER_RUN * config.seed + i for i in range(count)]
    with progress.Bar(count, text) as bar:
        return processes.first_makes(lambda: scan_files.phantoms(workdir / "scans", seeds, config.phantom, bar.update))


def patient_scan(config: configs.Config, workdir: pathlib.Path) -> tuple[str, pathlib.Path, pathlib.Path]:
    """(subject, CT path, mask path) of the phantom that P3 prepares, made where it is not there yet."""
    return _phantom_scans(config, workdir, PATIENT_SEED, 1, "patient")[0]


def held_out_cases(
    config: configs.Config,
    workdir: pathlib.Path,
    subject: tuple[str, pathlib.Path, pathlib.Path],
    variants: Sequence[str] | None = None,
) -> pathlib.Path:
    """The case file of X-rays and poses of P3's patient that no stage has seen, made where it is not there yet.

    Args:
      config, workdir: as in `p1`.
      subject: as `patient_scan` returns.
      variants: as in `case_files.simulated_cases`.
    """
    with progress.Bar(len(config.patient_labels) * config.eval_scenes, "held-out X-rays") as bar:
        return case_files.simulated_cases(
            workdir / "eval" / "cases.json",
            [subject],
            config.patient_labels,
            config.eval_scenes,
            configs.STARTS_MM,
            config.seed + 3,
            config.detector,
            variants,
            on_done=bar.update,
        )


def folds(names: Iterable[str], count: int) -> dict[str, int]:
    """Patient name -> index of its fold, of `count`: the sorted names are assigned to the folds in turn."""
    return {name: index % count for index, name in enumerate(sorted(set(names)))}


def _p1_vertebrae(config, workdir, given):
    """(scan, VerSe number) of each vertebra that P1 trains on."""
    if given.p1_folder is None:
        subjects = _phantom_scans(config, workdir, P1_SEED, config.p1_patients, "p1 phantoms")
        return [(identity.FileScan(*subject), label) for subject in subjects for label in config.labels]
    whole = "lumbar_scans" if set(config.labels) <= set(verse.LUMBAR) else "spine_scans"
    folder = given.p1_folder
    builder = processes.first_makes(lambda: verse.prepare(folder, workdir / "datasets", whole))
    print(f"P1's CTs: {builder.info.metadata['line']}")
    scans = [scan for scan in processes.first_makes(lambda: verse.scans_of(builder)) if scan.split in given.p1_splits]
    chosen = [(scan, label) for scan in scans for label in scan.complete if label in config.labels]
    if not chosen:
        wanted = f"one of {', '.join(map(levels.level_name, config.labels))} in {' or '.join(given.p1_splits)}"
        errors.fail(folder, "vertebrae", f"none in {len(scans)} scan(s)", wanted)
    print(f"P1 trains on {len(chosen)} vertebrae of {len({scan.patient for scan, _ in chosen})} patients")
    return chosen


def p1(config: configs.Config, workdir: pathlib.Path, phases: Sequence[str], given: RealData = RealData()) -> Model:
    """Trains P1, on public CTs with simulated X-rays, unless `workdir`/p1/model is there already.

    Args:
      workdir: folder of the run.
      phases: phases to run; the model is written after 'joint'.
      given: where its CTs are.
    Returns:
      the model after the last phase.
    Raises:
      InputError: as `verse.prepare`, or no vertebra to train on.
      DivergedError: as `loop.run_steps`.
    """
    if phases[-1] == "joint" and models.model_exists(workdir / "p1" / "model"):
        return models.load_model(workdir / "p1" / "model")
    vertebrae = _p1_vertebrae(config, workdir, given)
    with progress.Bar(len(vertebrae) * (1 + config.p1.pairs + config.p1.ct_pairs), "p1 pairs") as bar:
        pair_set = build.simulated_pairs(
            workdir / "pairs" / "p1",
            vertebrae,
            config.p1.pairs,
            config.seed + 1,
            config.pairs,
            config.model.gaussians,
            config.p1.ct_pairs,
            on_done=bar.update,
        )
    params = jax.jit(lambda key: radgs_reg.init(config.model, key))(jax.random.key(config.seed))
    print("parameters: " + ", ".join(f"{k} {backbones.count_parameters(v):,}" for k, v in params.items()))
    params = loop.run_phases(config, workdir, "p1", pair_set, params, config.p1.steps, config.p1.learning_rate, phases)
    model = Model(params, config.model, pair_set.mean_shapes())
    if phases[-1] == "joint":
        models.save_model(workdir / "p1" / "model", model, "P1")
    return model


def p2(
    config: configs.Config,
    workdir: pathlib.Path,
    phases: Sequence[str],
    given: RealData = RealData(),
) -> None:
    """Trains P2, on all folds but one of real cases of known pose; by default on simulated cases, harder than P1's.

    Args:
      config, workdir, phases: as in `p1`; given: where its cases are.
    Raises:
      InputError: no model of P1, unreadable cases, an unknown variant, a fold out of range, or no patient outside the fold.
      DivergedError: as `loop.run_steps`.
    """
    if models.model_exists(workdir / "p2" / "model"):
        return
    model = models.load_model(workdir / "p1" / "model")
    case_path, variant = given.p2_cases, given.p2_variant
    if case_path is None:
        if variant not in cases.VARIANTS:
            wanted = f"one of {', '.join(cases.VARIANTS)}, or --p2_cases that have it"
            errors.fail("flags", "--p2_variant", repr(variant), wanted)
        subjects = _phantom_scans(config, workdir, P2_SEED, config.p2_patients, "p2 phantoms")
        with progress.Bar(len(subjects) * len(config.labels) * config.p2.pairs, "p2 X-rays") as bar:
            case_path = processes.first_makes(
                lambda: case_files.simulated_cases(
                    workdir / "p2" / "cases.json",
                    subjects,
                    config.labels,
                    config.p2.pairs,
                    P2_STARTS_MM,
                    config.seed + 2,
                    config.detector,
                    (variant,),
                    on_done=bar.update,
                )
            )
    case_file = cases.read(case_path)
    fold = folds([v.patient for v in case_file.volumes.values()], config.p2_folds)
    if config.p2_fold >= config.p2_folds:
        errors.fail("flags", "--p2_fold", config.p2_fold, f"0 to {config.p2_folds - 1}")
    names = [s.name for s in case_file.scenes.values() if fold[case_file.volumes[s.volume].patient] != config.p2_fold]
    if not names:
        errors.fail(case_path, "patients", sorted(fold), "at least one outside the held-out fold")
    volumes = {case_file.scenes[name].volume for name in names}
    with progress.Bar(len(volumes) * (1 + config.p2.ct_pairs) + len(names), "p2 pairs") as bar:
        pair_set = build.measured_pairs(
            workdir / "pairs" / "p2",
            case_file,
            names,
            variant,
            config.pairs,
            model.config.gaussians,
            model.config.pixel_mm,
            config.p2.ct_pairs,
            bar.update,
        )
    params = loop.run_phases(
        config, workdir, "p2", pair_set, model.params, config.p2.steps, config.p2.learning_rate, phases
    )
    if phases[-1] == "joint":
        trained = dataclasses.replace(model, params=params)
        outside = [s.name for s in case_file.scenes.values() if s.name not in names]
        if outside:
            processes.first_does(lambda: _score_fold(config, workdir, trained, case_file, outside, variant))
        note = f"P1+P2 without fold {config.p2_fold}"
        models.save_model(workdir / "p2" / "model", trained, note)


def _score_fold(config, workdir, model, case_file, names, variant):
    """Scores P2's model on the scenes of the fold that is held out."""
    start, error = evaluate.held_out(model, case_file, names, variant, config.passes, config.refine)
    fold_scores = {"start_mm": start.tolist(), "error_mm": error.tolist(), "variant": variant}
    files.write_json(workdir / "p2" / f"fold_{config.p2_fold}.json", fold_scores)
    medians = f"median mTRE {np.median(start):.2f} -> {np.median(error):.2f} mm"
    print(f"P2, held-out fold {config.p2_fold}, no patient-specific training: {len(error)} cases, {medians}")


def p3(
    config: configs.Config, workdir: pathlib.Path, phases: Sequence[str], given: RealData = RealData()
) -> tuple[str, pathlib.Path, pathlib.Path]:
    """Trains P3, on the patient's own CT, starting from the result of P1 and P2.

    Args:
      config, workdir, phases: as in `p1`; given: the patient.
    Returns:
      (subject, CT path, mask path) of the patient.
    Raises:
      InputError: no model of P2; as `preparing.prepare`.
    """
    targets = given.patient
    if not targets:
        patient = patient_scan(config, workdir)
        targets = tuple(Target(*patient, label) for label in config.patient_labels)
    rule = models.base_folder() / CALIBRATION
    rule = read_rule(rule) if config.judged else None
    base = workdir / "p2" / "model"
    preparing.prepare(config, workdir / "p3", targets, base, phases=phases, rule=rule)
    return targets[0].patient, targets[0].ct, targets[0].mask
