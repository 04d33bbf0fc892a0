"""Prepared patients: data stage P3 on one scan, and the folder that `prepare` writes and `register` reads.

A workdir W holds `manifest.json` with the hashes of everything its contents were made from, and per patient (one scan) the
model, the base's calibration, per vertebra what registering needs of the CT, and, where it was asked for, the vertebra
detector.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np

from data_pipelines import build
from data_pipelines import files
from data_pipelines import pairs
from data_pipelines import scan as scans
from experiments import checkpoint
from experiments import detectors
from experiments import programs
from experiments import progress
from experiments import stages
from radgs_jax import confidence
from radgs_jax import gaussians
from radgs_jax import refinement
from radgs_jax import training

FORMAT = "radgs-workdir/2"
CALIBRATION = "calibration.json"
REFINE = "refine.json"
PARTS = tuple(field.name for field in dataclasses.fields(scans.Parts))
FINE_GAUSSIANS = 4096


@dataclasses.dataclass(frozen=True)
class Target:
    """One vertebra to prepare: a patient's identifier, the scan, its mask, the VerSe number.

    labels: what numbers the mask holds, a name of `segmentation.LABEL_MAPS`; None finds out or refuses.
    """

    patient: str
    ct: pathlib.Path
    mask: pathlib.Path
    label: int
    labels: str | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A vertebra as `register` needs it.

    model: the patient's; vertebra; fine_cloud: its finer Gaussians (M,), box frame; parts: `refinement.Parts`; bare: the same of
    the vertebra with nothing round it; refine: how they are refined with; calibration: `confidence.Calibration` of that, None
    where the base has none: then nothing is judged.
    """

    model: checkpoint.Model
    vertebra: scans.Vertebra
    fine_cloud: gaussians.Gaussians
    parts: refinement.Parts
    bare: refinement.Parts
    refine: refinement.RefineConfig
    calibration: confidence.Calibration | None


class Identity:
    """Content digests of targets, each file read once."""

    def __init__(self):
        self._sha256 = functools.cache(files.sha256)

    def scan(self, target):
        """Digest of a target's CT and mask; read with another label map a scan is another one. InputError: a missing file."""
        paths = (pathlib.Path(target.ct).resolve(), pathlib.Path(target.mask).resolve())
        return pairs.scan_digest(*paths, target.labels, self._sha256)


def prepare(
    config,
    workdir,
    targets,
    base,
    minutes=None,
    modules=training.MODULES,
    detector=None,
    adapting=detectors.PATIENT,
    calibration=None,
):
    """Prepares every target: one network per scan for all its vertebrae, from the model in folder `base`.

    A workdir that was prepared without a detector can be given one later, and one that is prepared again takes the refinement
    and the acceptance rule that are given then.

    Args:
      config: `configs.Config`; its p3 stage says what is done. workdir: made if need be; targets: list of `Target`.
      minutes: wall time per scan instead of the config's steps.
      modules: module stages to run; the model is written after the last one, 'joint'.
      detector: file of the vertebra detector to adapt to each scan, None for none; adapting: `detectors.TrainConfig` of
        that, which `minutes` does not bound.
      calibration: `confidence.Calibration` of config.refine, None for poses that nobody judges.
    Raises:
      InputError: unreadable input, an absent or cut vertebra, one that the detector does not know, a base or detector that is
        none, or a workdir made from other inputs.
    """
    workdir = pathlib.Path(workdir)
    identity = Identity()
    groups = {}
    for target in targets:
        groups.setdefault(identity.scan(target), {})[target.label] = target
    model = checkpoint.load_model(base)
    document = {
        "format": FORMAT,
        "base": checkpoint.model_hash(model),
        "config": pairs.config_hash(
            config.seed, config.p3, config.pairs, config.losses, model.config, config.batch, minutes
        ),
        "scans": {digest: sorted(group) for digest, group in groups.items()},
    }
    if detector is not None:
        generic = detectors.load(detector)
        known = generic.config.levels
        for target in targets:
            if target.label not in known:
                wanted = f"one from {scans.level_name(known[0])} to {scans.level_name(known[-1])}, or no detector"
                files.fail(detector, f"label {target.label}", scans.level_name(target.label), wanted)
        document["detector"] = detectors.patient_recipe(detector, adapting)
    missing = {d: group for d, group in groups.items() if not checkpoint.model_exists(workdir / d / "model")}
    # Everything that can be wrong with the input is found before the first file is written.
    vertebrae = {digest: _extract(group.values(), model.config.gaussians) for digest, group in missing.items()}
    _claim(workdir, document)
    for digest in groups:
        # Of no account to what is trained: a workdir that is there gets those of this call.
        _renew(workdir / digest / REFINE, config.refine)
        _renew(workdir / digest / CALIBRATION, calibration)
    for digest, group in missing.items():
        _prepare_scan(config, workdir / digest, list(group.values()), vertebrae[digest], model, minutes, modules)
    if detector is None:
        return
    for digest, group in groups.items():
        if not _detector(workdir, digest).exists():
            first = next(iter(group.values()))
            detectors.make_patient(workdir / digest, first.ct, first.mask, generic, adapting, first.labels)


def _renew(path, config):
    """Keeps a JSON file of a dataclass, or none for None, touching it only where that changes something."""
    if config is None:
        path.unlink(missing_ok=True)
        return
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if not path.exists() or files.read_json(path) != wanted:
        files.write_json(path, wanted)


def _extract(targets, gaussian_count):
    """(`scan.Vertebra`, `scan.Parts`) of each target."""
    first = next(iter(targets))
    scan = scans.read_scan(first.ct, first.mask, first.patient, first.labels)
    vertebrae = [scans.extract(scan, target.label, gaussian_count, target.mask) for target in targets]
    whole = scans.WholeBody(scan, scans.BODY_MM)
    return [(vertebra, scans.moving_parts(whole, vertebra)) for vertebra in vertebrae]


def unprepared(model, scan, whole, label, mask_path, refine, calibration=None):
    """`Prepared` with a `checkpoint.Model` as it is, of a vertebra of a `scan.Scan` at hand.

    Args:
      whole: the scan's `scan.WholeBody` at `scan.BODY_MM`; mask_path: what errors name; refine, calibration: as in `Prepared`.
    Raises:
      InputError: an absent or cut vertebra.
    """
    vertebra = scans.extract(scan, label, model.config.gaussians, mask_path)
    parts = refinement_parts(scans.moving_parts(whole, vertebra))
    return Prepared(model, vertebra, fine_cloud(vertebra), parts, bare_parts(parts, vertebra), refine, calibration)


def bodies():
    """A function that gives the `scan.Scan` of a `cases.Volume` and its `scan.WholeBody`, the last one kept.

    Raises, when called:
      InputError: as `scan.read_scan`.
    """

    @functools.lru_cache(1)
    def read(ct, mask, patient):
        scan = scans.read_scan(ct, mask, patient)
        return scan, scans.WholeBody(scan, scans.BODY_MM)

    return lambda volume: read(volume.full_ct, volume.full_mask, volume.patient)


def unprepared_loader(model, refine):
    """A function that gives the `unprepared` vertebra of a `cases.Volume`; it raises as that and `bodies`."""
    body = bodies()
    return lambda volume: unprepared(model, *body(volume), volume.full_label, volume.full_mask, refine)


def loader(workdir):
    """A function that gives the `Prepared` of a `cases.Volume` in `workdir`; it raises as `load`."""
    identity = Identity()

    def of_volume(volume):
        target = Target(volume.patient, volume.full_ct, volume.full_mask, volume.full_label)
        return load(workdir, target, identity)

    return of_volume


def bare_parts(parts, vertebra):
    """`refinement.Parts` of a `scan.Vertebra` in air, in the shapes of its `parts`."""
    alone, _ = scans.block_average(vertebra.density, vertebra.ct_from_index, scans.PART_MM)
    padded = np.pad(alone, [(0, n - m) for n, m in zip(parts.excess.shape, alone.shape)])
    return parts.replace(excess=programs.on_device(padded), rest=programs.on_device(np.zeros(parts.rest.shape)))


def read_refine(path):
    """The `refinement.RefineConfig` of a JSON file.

    Raises:
      InputError: no such file, or other fields.
    """
    value = files.read_json(path)
    try:
        levels = tuple(refinement.Level(**level) for level in value["levels"])
        return refinement.RefineConfig(**{**value, "levels": levels})
    except (KeyError, TypeError) as error:
        files.fail(path, "fields", str(error)[:80], "those of a refinement that `experiments.prepare` wrote")


def read_calibration(path):
    """The `confidence.Calibration` of a JSON file, None where there is none.

    Raises:
      InputError: fields that are missing or no numbers.
    """
    if not path.exists():
        return None
    value = files.read_json(path)
    counts = len(confidence.FEATURES) + 1, confidence.SEARCHES + 1
    wanted = {"chance": counts[0], "thresholds": counts[1], "size": 5, "radius": 0}
    for field, count in wanted.items():
        found = value.get(field) if isinstance(value, dict) else None
        numbers = found if count else [found]
        good = isinstance(numbers, list) and all(type(v) in (int, float) for v in numbers)
        if not good or (count and len(numbers) != count):
            files.fail(path, field, repr(found)[:60], f"{count} numbers" if count else "a number")
    return confidence.Calibration(*(tuple(value[field]) for field in ("chance", "thresholds", "size")), value["radius"])


def _claim(workdir, document):
    """Takes a fresh workdir, or checks that what it holds was made from the same inputs; a detector may come later."""
    path = workdir / "manifest.json"
    if path.exists():
        found = _manifest(workdir)
        for field in ("base", "config", "scans", *({"detector"} & set(found) & set(document))):
            if found.get(field) != document[field]:
                files.fail(
                    path,
                    field,
                    found.get(field),
                    f"{document[field]} (a workdir is reused only for the same inputs; name another one or delete it)",
                )
        if set(document) - set(found):
            files.write_json(path, {**found, **document})
    elif workdir.exists() and any(workdir.iterdir()):
        files.fail(workdir, "folder", "files but no manifest.json", "an empty folder or a prepared workdir")
    else:
        files.write_json(path, document)


def pairs_of(config, folder, targets, gaussian_count):
    """The `pairs.PairSet` that P3 trains on, made where it is not there yet.

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
    params = stages.run(
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
        checkpoint.save_model(
            folder / "model", dataclasses.replace(model, params=jax.device_get(params)), f"P3, labels {labels}"
        )


def fine_cloud(vertebra):
    """The vertebra in `FINE_GAUSSIANS` Gaussians of its native voxels, box frame: the detail of reported reconstructions."""
    box_from_index = np.linalg.inv(vertebra.ct_from_box) @ vertebra.ct_from_index
    return gaussians.from_density(vertebra.density, box_from_index, FINE_GAUSSIANS)


def save_vertebra(path, vertebra, parts):
    """Writes what registering needs of a `scan.Vertebra` and its `scan.Parts` as an npz, atomically; `load` reads it."""
    files.write_npz(
        path,
        density=vertebra.density,
        mask=vertebra.mask,
        ct_from_index=vertebra.ct_from_index,
        ct_from_box=vertebra.ct_from_box,
        points=vertebra.points,
        **{f"cloud_{k}": v for k, v in gaussians.to_arrays(vertebra.cloud).items()},
        **{f"fine_{k}": v for k, v in gaussians.to_arrays(fine_cloud(vertebra)).items()},
        **dataclasses.asdict(parts),
    )


def refinement_parts(parts):
    """`refinement.Parts` on the device, of a `scan.Parts` or of a mapping with its fields."""
    values = parts if isinstance(parts, dict) else dataclasses.asdict(parts)
    return refinement.Parts(**{name: programs.on_device(values[name]) for name in PARTS})


def _manifest(workdir):
    path = pathlib.Path(workdir) / "manifest.json"
    manifest = files.read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        files.fail(path, "format", repr(found), repr(FORMAT))
    prepared = manifest.get("scans")
    if not isinstance(prepared, dict) or not all(isinstance(labels, list) for labels in prepared.values()):
        files.fail(path, "scans", repr(prepared)[:60], "lists of labels by the scans' digests")
    return manifest


def _detector(workdir, digest):
    return pathlib.Path(workdir) / digest / "detector.npz"


def load_detector(workdir, target, identity, generic):
    """The detector that finds a target's vertebra in X-rays, and whether it is one adapted to the patient.

    Args:
      identity: `Identity`; generic: file of the detector that stands in where the workdir was prepared without one.
    Returns:
      `detectors.Model`, bool.
    Raises:
      InputError: neither is there, an unfinished preparation, or a damaged file.
    """
    path, generic = _detector(workdir, identity.scan(target)), pathlib.Path(generic)
    if "detector" in _manifest(workdir):
        if not path.exists():
            wanted = "a finished one: run `experiments.prepare` again to go on"
            files.fail(workdir, "detector", "an unfinished preparation", wanted)
        return detectors.load(path), True
    if not generic.exists():
        wanted = "--init, --points, or a workdir with a detector: run `experiments.prepare --detector` on it"
        files.fail(workdir, "start pose", "nothing to find the vertebra with", wanted)
    return detectors.load(generic), False


def load(workdir, target, identity):
    """The `Prepared` vertebra of a target; `identity`: an `Identity`.

    Raises:
      InputError: a workdir that does not hold it, an unfinished preparation, or an unreadable file.
    """
    workdir = pathlib.Path(workdir)
    manifest = _manifest(workdir)
    digest = identity.scan(target)
    folder = workdir / digest
    if target.label not in manifest["scans"].get(digest, []):
        files.fail(
            workdir,
            f"label {target.label} of {target.ct}",
            "not prepared",
            "a vertebra that `experiments.prepare` was run for, with the same --labels",
        )
    if not checkpoint.model_exists(folder / "model"):
        files.fail(
            workdir, "model", "an unfinished preparation", "a finished one: run `experiments.prepare` again to go on"
        )
    names = ("density", "mask", "ct_from_index", "ct_from_box", "points")
    cloud = ("format", "density", "mean", "scale", "quaternion")
    stored = (f"{prefix}_{k}" for prefix in ("cloud", "fine") for k in cloud)
    path = folder / f"vertebra_{target.label}.npz"
    a = files.read_npz(path, *names, *stored, *PARTS)
    for field in ("cloud_format", "fine_format"):
        if str(a[field]) != gaussians.FORMAT:
            files.fail(path, field, repr(str(a[field])), repr(gaussians.FORMAT))
    coarse, fine = (gaussians.from_arrays({k: a[f"{prefix}_{k}"] for k in cloud}) for prefix in ("cloud", "fine"))
    vertebra = scans.Vertebra(
        target.label,
        a["density"],
        a["mask"],
        a["ct_from_index"],
        a["ct_from_box"],
        coarse,
        a["points"],
    )
    model, calibration = checkpoint.load_model(folder / "model"), read_calibration(folder / CALIBRATION)
    parts = refinement_parts(a)
    return Prepared(
        model, vertebra, fine, parts, bare_parts(parts, vertebra), read_refine(folder / REFINE), calibration
    )
