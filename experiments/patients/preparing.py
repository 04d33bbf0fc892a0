"""Prepares patients: data stage P3 on each scan, and the adapted localizer. `workdir` describes the folder that is written."""

import dataclasses
import pathlib
from collections.abc import Sequence

from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.io import processes
from data_pipelines.pairs import build
from data_pipelines.pairs import identity
from data_pipelines.pairs.batches import PairSet
from experiments import configs
from experiments.localizers import localizer_files
from experiments.localizers import training
from experiments.patients import models
from experiments.patients.workdir import base_rule
from experiments.patients.workdir import CALIBRATION
from experiments.patients.workdir import claim
from experiments.patients.workdir import is_sealed
from experiments.patients.workdir import localizer_path
from experiments.patients.workdir import prepared_names
from experiments.patients.workdir import REFINE_FILE
from experiments.patients.workdir import renew
from experiments.patients.workdir import save_vertebra
from experiments.patients.workdir import ScanDigests
from experiments.patients.workdir import seal
from experiments.patients.workdir import settings_names
from experiments.patients.workdir import Target
from experiments.patients.workdir import WORKDIR_FORMAT
from experiments.runtime import progress
from experiments.runtime.shards import ALL
from experiments.runtime.shards import Shard
from experiments.training import loop
from radgs_jax import errors
from radgs_jax import levels
from radgs_jax.registration.confidence import AcceptanceRule
from radgs_jax.training import objectives

SEED_OFFSET = 7
"""Added to the config's seed for P3's pairs, so that they differ from those of other stages."""


def prepare(
    config: configs.Config,
    workdir: pathlib.Path | str,
    targets: Sequence[Target],
    base: pathlib.Path | str,
    minutes: float | None = None,
    phases: Sequence[str] = objectives.PHASES,
    localizer: pathlib.Path | str | None = None,
    adapting: training.LocalizerTraining = training.PATIENT,
    rule: AcceptanceRule | None = None,
    shard: Shard = ALL,
) -> None:
    """Prepares every target: one network per scan for all its vertebrae, trained from the model in folder `base`.

    A workdir that was prepared without a localizer can be given one later. A workdir that is prepared again takes over the
    refinement and the acceptance rule of the later call, and what is damaged in it is made again.

    Args:
      config: its P3 stage says how the networks are trained.
      workdir: folder to write, new or prepared from the same inputs.
      targets: the vertebrae.
      base: folder of the base model.
      minutes: training time per scan, min, instead of the config's steps; 0 takes the base's network as it is.
      phases: phases to run; the model is written after the last one, 'joint'.
      localizer: file of the localizer to adapt to each scan; None for none.
      adapting: how the localizer is trained; `minutes` does not limit that.
      shard: the part of the scans that this process prepares, while others prepare the rest.
      rule: acceptance rule fitted for config.refine; None takes the base's own, `calibration.json` in its folder. If that is
        absent too, or fitted for another refinement, poses are not judged.
    Raises:
      InputError: unreadable input, an absent or cut vertebra, a vertebra that the localizer does not know, an unusable base or
        localizer, a workdir made from other inputs, in use by another process, or that cannot be written.
      DivergedError: as `loop.run_steps`.
    """
    workdir = pathlib.Path(workdir)
    digests = ScanDigests()
    groups, mine = {}, shard.of((target.ct, target.mask) for target in targets)
    if not (mine or shard.whole):
        return
    for target in [target for target in targets if (target.ct, target.mask) in mine]:
        groups.setdefault(digests.of(target), {})[target.label] = target
    model = models.load_model(base)
    rule = rule or base_rule(base, config.refine)
    document = {
        "format": WORKDIR_FORMAT,
        "base": models.model_hash(model),
        "config": identity.config_hash(
            config.seed, config.p3, config.pairs, config.losses, model.config, config.batch, minutes
        ),
        "scans": {digest: sorted(group) for digest, group in groups.items()},
    }
    if localizer is not None:
        generic = localizer_files.read_localizer(localizer)
        known = generic.config.levels
        for target in targets:
            if target.label not in known:
                wanted = f"one from {levels.level_name(known[0])} to {levels.level_name(known[-1])}, or no localizer"
                errors.fail(localizer, f"label {target.label}", levels.level_name(target.label), wanted)
        document["detector"] = training.patient_recipe(localizer, adapting)
    missing = _missing(workdir, groups)
    # Reads all input before the first file is written, so that unusable input leaves nothing behind.
    vertebrae = {digest: _extract(group.values(), model.config.gaussians) for digest, group in missing.items()}
    files.make_folder(workdir)

    def settle():
        claim(workdir, document, part=not shard.whole)
        for digest in groups:
            # Training does not depend on these two, so an existing workdir may exchange them.
            renew(workdir / digest / REFINE_FILE, config.refine)
            renew(workdir / digest / CALIBRATION, rule)
            seal(workdir, settings_names(digest))

    with processes.first_holds(workdir / locks.LOCK, workdir, shared=not shard.whole):
        processes.first_does(settle)
        for digest in _missing(workdir, missing):
            group = missing[digest]
            _prepare_scan(config, workdir / digest, list(group.values()), vertebrae[digest], model, minutes, phases)
            processes.first_does(lambda: seal(workdir, prepared_names(digest, group)))
        for digest, group in groups.items() if localizer is not None else ():
            path = localizer_path(workdir, digest)
            name = path.relative_to(workdir).as_posix()
            if not is_sealed(workdir, [name]):
                first = next(iter(group.values()))
                training.make_patient_localizer(workdir / digest, first.ct, first.mask, generic, adapting, first.labels)
                seal(workdir, [name])


def _missing(workdir, groups):
    """The groups whose files are not all there as they were written. A group is {label: target} of a scan."""
    if not (workdir / "manifest.json").exists():
        return groups
    return {d: g for d, g in groups.items() if not (is_sealed(workdir, prepared_names(d, g)) and _sound(workdir / d))}


def _sound(folder):
    """Whether the model of a scan can be loaded."""
    try:
        models.load_model(folder / "model")
    except errors.InputError:
        return False
    return True


def _extract(targets, gaussian_count):
    """(`prepared.Vertebra`, `parts.Parts`) of each target."""
    first = next(iter(targets))
    scan = scans.read_scan(first.ct, first.mask, first.patient, first.labels)
    vertebrae = [extraction.extract(scan, target.label, gaussian_count, target.mask) for target in targets]
    whole = whole_body.WholeBody(scan, whole_body.BODY_MM)
    return [(vertebra, whole_body.moving_parts(whole, vertebra)) for vertebra in vertebrae]


def pairs_of(config: configs.Config, folder: pathlib.Path, targets: Sequence[Target], gaussian_count: int) -> PairSet:
    """The pairs that P3 trains on, made where they are not there yet.

    Args:
      folder: of the scan, in a workdir.
      targets: vertebrae of one scan.
      gaussian_count: number of Gaussians per vertebra.
    Raises:
      InputError: as `build.simulated_pairs`.
    """
    first = targets[0]
    scan = identity.FileScan(first.patient, first.ct, first.mask, first.labels)
    with progress.Bar(len(targets) * (1 + config.p3.pairs + config.p3.ct_pairs), "p3 pairs") as bar:
        return build.simulated_pairs(
            folder / "pairs",
            [(scan, target.label) for target in targets],
            config.p3.pairs,
            config.seed + SEED_OFFSET,
            config.pairs,
            gaussian_count,
            config.p3.ct_pairs,
            bar.update,
        )


def _prepare_scan(config, folder, targets, vertebrae, model, minutes, phases):

    def save():
        for vertebra, parts in vertebrae:
            save_vertebra(folder / f"vertebra_{vertebra.label}.npz", vertebra, parts)

    processes.first_does(save)
    labels = [target.label for target in targets]
    if minutes == 0:
        models.save_model(folder / "model", model, f"the base, for labels {labels}")
        return
    pair_set = pairs_of(config, folder, targets, model.config.gaussians)
    stage = dataclasses.replace(config, model=model.config)
    params = loop.run_phases(
        stage,
        folder,
        "p3",
        pair_set,
        model.params,
        config.p3.steps,
        config.p3.learning_rate,
        phases,
        None if minutes is None else 60.0 * minutes,
    )
    if phases[-1] == "joint":
        models.save_model(folder / "model", dataclasses.replace(model, params=params), f"P3, labels {labels}")
