"""Prepared patients: data stage P3 on one scan, and the folder that `prepare` writes and `register` reads.

A workdir W holds `manifest.json` with the hashes of everything its contents were made from, and per patient (one scan) the
model, the base's calibration, per vertebra what registering needs of the CT, and, where it was asked for, the vertebra
detector.
"""

import dataclasses
import pathlib

import jax

from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.pairs import build
from data_pipelines.pairs.identity import config_hash
from experiments.localizers import localizer_files
from experiments.localizers import training
from experiments.patients import models
from experiments.patients.workdir import CALIBRATION
from experiments.patients.workdir import claim
from experiments.patients.workdir import FORMAT
from experiments.patients.workdir import Identity
from experiments.patients.workdir import localizer_path
from experiments.patients.workdir import REFINE
from experiments.patients.workdir import renew
from experiments.patients.workdir import save_vertebra
from experiments.runtime import progress
from experiments.training import loop
from radgs_jax import errors
from radgs_jax import levels
from radgs_jax.training import objectives


def prepare(
    config,
    workdir,
    targets,
    base,
    minutes=None,
    modules=objectives.MODULES,
    detector=None,
    adapting=training.PATIENT,
    rule=None,
):
    """Prepares every target: one network per scan for all its vertebrae, from the model in folder `base`.

    A workdir that was prepared without a detector can be given one later, and one that is prepared again takes the refinement
    and the acceptance rule that are given then.

    Args:
      config: `configs.Config`; its p3 stage says what is done. workdir: made if need be; targets: list of `Target`.
      minutes: wall time per scan instead of the config's steps.
      modules: module stages to run; the model is written after the last one, 'joint'.
      detector: file of the vertebra detector to adapt to each scan, None for none; adapting: `training.TrainConfig` of
        that, which `minutes` does not bound.
      rule: `confidence.AcceptanceRule` fitted for config.refine; None for poses that are not judged.
    Raises:
      InputError: unreadable input, an absent or cut vertebra, one that the detector does not know, a base or detector that is
        none, or a workdir made from other inputs.
    """
    workdir = pathlib.Path(workdir)
    identity = Identity()
    groups = {}
    for target in targets:
        groups.setdefault(identity.scan(target), {})[target.label] = target
    model = models.load_model(base)
    document = {
        "format": FORMAT,
        "base": models.model_hash(model),
        "config": config_hash(config.seed, config.p3, config.pairs, config.losses, model.config, config.batch, minutes),
        "scans": {digest: sorted(group) for digest, group in groups.items()},
    }
    if detector is not None:
        generic = localizer_files.load(detector)
        known = generic.config.levels
        for target in targets:
            if target.label not in known:
                wanted = f"one from {levels.level_name(known[0])} to {levels.level_name(known[-1])}, or no detector"
                errors.fail(detector, f"label {target.label}", levels.level_name(target.label), wanted)
        document["detector"] = training.patient_recipe(detector, adapting)
    missing = {d: group for d, group in groups.items() if not models.model_exists(workdir / d / "model")}
    # Everything that can be wrong with the input is found before the first file is written.
    vertebrae = {digest: _extract(group.values(), model.config.gaussians) for digest, group in missing.items()}
    claim(workdir, document)
    for digest in groups:
        # Of no account to what is trained: a workdir that is there gets those of this call.
        renew(workdir / digest / REFINE, config.refine)
        renew(workdir / digest / CALIBRATION, rule)
    for digest, group in missing.items():
        _prepare_scan(config, workdir / digest, list(group.values()), vertebrae[digest], model, minutes, modules)
    if detector is None:
        return
    for digest, group in groups.items():
        if not localizer_path(workdir, digest).exists():
            first = next(iter(group.values()))
            training.make_patient(workdir / digest, first.ct, first.mask, generic, adapting, first.labels)


def _extract(targets, gaussian_count):
    """(`prepared.Vertebra`, `prepared.Parts`) of each target."""
    first = next(iter(targets))
    scan = scans.read_scan(first.ct, first.mask, first.patient, first.labels)
    vertebrae = [extraction.extract(scan, target.label, gaussian_count, target.mask) for target in targets]
    whole = whole_body.WholeBody(scan, whole_body.BODY_MM)
    return [(vertebra, whole_body.moving_parts(whole, vertebra)) for vertebra in vertebrae]


def pairs_of(config, folder, targets, gaussian_count):
    """The `batches.PairSet` that P3 trains on, made where it is not there yet.

    Args:
      config: `configs.Config`; folder: of the scan, in a workdir; targets: of one scan; gaussian_count: of each vertebra.
    Raises:
      InputError: as `build.simulated_pairs`.
    """
    first = targets[0]
    with progress.bar(len(targets) * (1 + config.p3.pairs + config.p3.ct_pairs), "p3 pairs") as bar:
        return build.simulated_pairs(
            folder / "pairs",
            [(first.patient, first.ct, first.mask, target.label) for target in targets],
            config.p3.pairs,
            config.seed + 7,
            config.pairs,
            gaussian_count,
            config.p3.ct_pairs,
            first.labels,
            bar.update,
        )


def _prepare_scan(config, folder, targets, vertebrae, model, minutes, modules):
    for vertebra, parts in vertebrae:
        save_vertebra(folder / f"vertebra_{vertebra.label}.npz", vertebra, parts)
    labels = [target.label for target in targets]
    pair_set = pairs_of(config, folder, targets, model.config.gaussians)
    stage = dataclasses.replace(config, model=model.config)
    params = loop.run(
        stage,
        folder,
        "p3",
        pair_set,
        model.params,
        config.p3.steps,
        config.p3.learning_rate,
        modules,
        None if minutes is None else 60.0 * minutes,
    )
    if modules[-1] == "joint":
        models.save_model(
            folder / "model", dataclasses.replace(model, params=jax.device_get(params)), f"P3, labels {labels}"
        )
