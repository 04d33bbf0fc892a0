"""The folder that `prepare` writes and `register` reads. Imports no training.

A workdir holds `manifest.json` with the hashes of everything that its contents were made from and, per scan, the model, the
acceptance rule, what registering needs of each vertebra, and the localizer where it was asked for.
"""

import dataclasses
import functools
import json
import pathlib

from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.io import files
from data_pipelines.pairs.identity import scan_digest
from experiments.localizers import localizer_files
from experiments.patients import models
from radgs_jax import errors
from radgs_jax import gaussians
from radgs_jax.registration import confidence
from radgs_jax.registration import gauss_newton
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.prepared import fine_cloud
from radgs_jax.registration.prepared import on_device_parts
from radgs_jax.registration.prepared import PARTS
from radgs_jax.registration.prepared import Parts
from radgs_jax.registration.prepared import Prepared
from radgs_jax.registration.prepared import Vertebra
from radgs_jax.registration.search import SearchConfig

FORMAT = "radgs-workdir/2"
CALIBRATION = "calibration.json"
REFINE = "refine.json"
UNMARKED = "0f19542c02bf41bc"
"""What a rule without `fitted_for` was fitted to: all of them were written with one refinement and search."""


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


class Identity:
    """Content digests of targets, each file read once."""

    def __init__(self):
        self._sha256 = functools.cache(files.sha256)

    def scan(self, target):
        """Digest of a target's CT and mask; read with another label map a scan is another one. InputError: a missing file."""
        paths = (pathlib.Path(target.ct).resolve(), pathlib.Path(target.mask).resolve())
        return scan_digest(*paths, target.labels, self._sha256)


def renew(path, config):
    """Keeps a JSON file of a dataclass, or none for None, touching it only where that changes something."""
    if config is None:
        path.unlink(missing_ok=True)
        return
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if not path.exists() or files.read_json(path) != wanted:
        files.write_json(path, wanted)


def prepare_untrained(
    model, scan, label, rule=None, refine=RefineConfig(), search=SearchConfig(), whole=None, mask_path="mask"
):
    """`Prepared` with a `trained.Model` as it is, of a vertebra of a `scans.Scan` at hand.

    Args:
      label: VerSe number; rule, refine, search: as in `Prepared`; mask_path: what errors name.
      whole: the scan's `whole_body.WholeBody` at `whole_body.BODY_MM`, where several vertebrae share it; None makes it.
    Raises:
      InputError: an absent or cut vertebra.
    """
    whole = whole_body.WholeBody(scan, whole_body.BODY_MM) if whole is None else whole
    vertebra = extraction.extract(scan, label, model.config.gaussians, mask_path)
    parts = on_device_parts(whole_body.moving_parts(whole, vertebra))
    return Prepared(model, vertebra, fine_cloud(vertebra), parts, refine, search, rule)


def body_reader():
    """A function that gives the `scans.Scan` of a `cases.Volume` and its `whole_body.WholeBody`, the last one kept.

    Raises, when called:
      InputError: as `scans.read_scan`.
    """

    @functools.lru_cache(1)
    def read(ct, mask, patient):
        scan = scans.read_scan(ct, mask, patient)
        return scan, whole_body.WholeBody(scan, whole_body.BODY_MM)

    return lambda volume: read(volume.full_ct, volume.full_mask, volume.patient)


def untrained_loader(model, refine):
    """A function that gives the untrained `Prepared` of a `cases.Volume`; it raises as `prepare_untrained` and `body_reader`."""
    body = body_reader()

    def of_volume(volume):
        scan, whole = body(volume)
        return prepare_untrained(model, scan, volume.full_label, refine=refine, whole=whole, mask_path=volume.full_mask)

    return of_volume


def loader(workdir):
    """A function that gives the `Prepared` of a `cases.Volume` in `workdir`; it raises as `load`."""
    identity = Identity()

    def of_volume(volume):
        target = Target(volume.patient, volume.full_ct, volume.full_mask, volume.full_label)
        return load(workdir, target, identity)

    return of_volume


def read_refine(path):
    """The `gauss_newton.RefineConfig` of a JSON file.

    Raises:
      InputError: no such file, or other fields.
    """
    value = files.read_json(path)
    try:
        levels = tuple(gauss_newton.Level(**level) for level in value["levels"])
        return gauss_newton.RefineConfig(**{**value, "levels": levels})
    except (KeyError, TypeError) as error:
        errors.fail(path, "fields", str(error)[:80], "those of a refinement that `experiments.prepare` wrote")


def read_rule(path):
    """The `confidence.AcceptanceRule` of a JSON file, None where there is none.

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
            errors.fail(path, field, repr(found)[:60], f"{count} numbers" if count else "a number")
    fitted_for = value.get("fitted_for", UNMARKED)
    if not isinstance(fitted_for, str):
        errors.fail(path, "fitted_for", repr(fitted_for)[:60], "a digest of refinement and search")
    numbers = (tuple(value[field]) for field in ("chance", "thresholds", "size"))
    return confidence.AcceptanceRule(*numbers, value["radius"], fitted_for)


def claim(workdir, document):
    """Takes a fresh workdir, or checks that what it holds was made from the same inputs; a detector may come later."""
    path = workdir / "manifest.json"
    if path.exists():
        found = read_manifest(workdir)
        for field in ("base", "config", "scans", *({"detector"} & set(found) & set(document))):
            if found.get(field) != document[field]:
                errors.fail(
                    path,
                    field,
                    found.get(field),
                    f"{document[field]} (a workdir is reused only for the same inputs; name another one or delete it)",
                )
        if set(document) - set(found):
            files.write_json(path, {**found, **document})
    elif workdir.exists() and any(workdir.iterdir()):
        errors.fail(workdir, "folder", "files but no manifest.json", "an empty folder or a prepared workdir")
    else:
        files.write_json(path, document)


def save_vertebra(path, vertebra, parts):
    """Writes what registering needs of a `prepared.Vertebra` and its `prepared.Parts` as an npz, atomically; `load` reads it."""
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


def read_manifest(workdir):
    """The manifest of a prepared workdir.

    Raises:
      InputError: none there, another format, or fields that are none of its own.
    """
    path = pathlib.Path(workdir) / "manifest.json"
    manifest = files.read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        errors.fail(path, "format", repr(found), repr(FORMAT))
    prepared = manifest.get("scans")
    if not isinstance(prepared, dict) or not all(isinstance(labels, list) for labels in prepared.values()):
        errors.fail(path, "scans", repr(prepared)[:60], "lists of labels by the scans' digests")
    return manifest


def localizer_path(workdir, digest):
    """File of the localizer adapted to the scan of that digest; it need not be there."""
    return pathlib.Path(workdir) / digest / "detector.npz"


def load_localizer(workdir, target, identity, generic):
    """The detector that finds a target's vertebra in X-rays, and whether it is one adapted to the patient.

    Args:
      identity: `Identity`; generic: file of the detector that stands in where the workdir was prepared without one.
    Returns:
      `locate.Localizer`, bool.
    Raises:
      InputError: neither is there, an unfinished preparation, or a damaged file.
    """
    path, generic = localizer_path(workdir, identity.scan(target)), pathlib.Path(generic)
    if "detector" in read_manifest(workdir):
        if not path.exists():
            wanted = "a finished one: run `experiments.prepare` again to go on"
            errors.fail(workdir, "detector", "an unfinished preparation", wanted)
        return localizer_files.load(path), True
    if not generic.exists():
        wanted = "--init, --points, or a workdir with a detector: run `experiments.prepare --detector` on it"
        errors.fail(workdir, "start pose", "nothing to find the vertebra with", wanted)
    return localizer_files.load(generic), False


def load(workdir, target, identity):
    """The `Prepared` vertebra of a target; `identity`: an `Identity`.

    Raises:
      InputError: a workdir that does not hold it, an unfinished preparation, or an unreadable file.
    """
    workdir = pathlib.Path(workdir)
    manifest = read_manifest(workdir)
    digest = identity.scan(target)
    folder = workdir / digest
    if target.label not in manifest["scans"].get(digest, []):
        errors.fail(
            workdir,
            f"label {target.label} of {target.ct}",
            "not prepared",
            "a vertebra that `experiments.prepare` was run for, with the same --labels",
        )
    if not models.model_exists(folder / "model"):
        errors.fail(
            workdir, "model", "an unfinished preparation", "a finished one: run `experiments.prepare` again to go on"
        )
    names = ("density", "mask", "ct_from_index", "ct_from_box", "points")
    cloud = ("format", "density", "mean", "scale", "quaternion")
    stored = (f"{prefix}_{k}" for prefix in ("cloud", "fine") for k in cloud)
    path = folder / f"vertebra_{target.label}.npz"
    a = files.read_npz(path, *names, *stored, *PARTS)
    for field in ("cloud_format", "fine_format"):
        if str(a[field]) != gaussians.FORMAT:
            errors.fail(path, field, repr(str(a[field])), repr(gaussians.FORMAT))
    coarse, fine = (gaussians.from_arrays({k: a[f"{prefix}_{k}"] for k in cloud}) for prefix in ("cloud", "fine"))
    vertebra = Vertebra(
        target.label,
        a["density"],
        a["mask"],
        a["ct_from_index"],
        a["ct_from_box"],
        coarse,
        a["points"],
    )
    model, rule = models.load_model(folder / "model"), read_rule(folder / CALIBRATION)
    parts = on_device_parts(Parts(**{name: a[name] for name in PARTS}))
    refine, search = read_refine(folder / REFINE), SearchConfig()
    if rule is not None and rule.fitted_for != (wanted := confidence.method_digest(refine, search)):
        wanted = f"{wanted}, the refinement and search in use: prepare the workdir again"
        errors.fail(folder / CALIBRATION, "fitted_for", rule.fitted_for, wanted)
    return Prepared(model, vertebra, fine, parts, refine, search, rule)
