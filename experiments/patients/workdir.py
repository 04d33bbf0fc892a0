"""The folder that `prepare` writes and `register` reads. This module imports no training.

A workdir holds `manifest.json`, with hashes of everything its contents were made from and the checksums of its files, and one
folder per scan: the model, the refinement, the acceptance rule, one file per vertebra and, if there is one, the adapted localizer.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import numpy as np
from absl import logging

from data_pipelines import cases
from data_pipelines.io import checksums
from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.pairs.identity import scan_digest
from experiments.localizers import localizer_files
from experiments.patients import metal_files
from experiments.patients import models
from radgs_jax import errors
from radgs_jax import gaussians
from radgs_jax.localization.locate import Localizer
from radgs_jax.registration import confidence
from radgs_jax.registration import gauss_newton
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.parts import on_device_parts
from radgs_jax.registration.parts import PARTS
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.prepared import fine_cloud
from radgs_jax.registration.prepared import Prepared
from radgs_jax.registration.prepared import Vertebra
from radgs_jax.registration.search import SearchConfig

MANIFEST_LOCK = ".manifest.lock"
"""File whose lock is held while the manifest changes."""
WORKDIR_FORMAT = "radgs-workdir/3"
OLDER_FORMATS = ("radgs-workdir/1", "radgs-workdir/2")
"""Formats of older versions, whose files have no checksums."""
REMEDY = "prepare the workdir again, by the command that made it"
"""What helps where a file of a workdir was damaged or changed: `experiments.prepare` makes what is not as it was written."""
CALIBRATION = "calibration.json"
"""File name of the acceptance rule in a scan's folder and in the base."""
REFINE_FILE = "refine.json"
UNMARKED = "0f19542c02bf41bc"
"""Digest of the refinement and search that rules without the field `fitted_for` were fitted for."""
LEAST_CHANCE = 0.5
"""Smallest threshold that a rule file may have: a pose that is as likely wrong as right. The shipped rule's are 0.76 to 0.99. Half
lets a file through that accepts wrong poses; there is no twice, since a chance is 1 at most."""
SCAN_SUFFIXES = (".nii", ".nii.gz")
"""Endings of the names of volumes in a folder that is no DICOM series, such as one mask per structure."""
VERTEBRA = ("density", "mask", "ct_from_index", "ct_from_box", "points")
CLOUD = ("format", "density", "mean", "scale", "quaternion")
VERTEBRA_ARRAYS = (*VERTEBRA, *(f"{prefix}_{name}" for prefix in ("cloud", "fine") for name in CLOUD), *PARTS)
"""Names of the arrays of a vertebra's file."""
SHOWN_CHARACTERS = 60
"""Maximum length of a faulty value in an error message, so that the message stays one line."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One vertebra of one scan.

    Attributes:
      patient: the patient's identifier.
      ct, mask: paths of the CT and of the label map on its grid.
      label: VerSe number.
      labels: numbering of the mask, a name in `segmentation.LABEL_MAPS`; None recognises it, or refuses the mask.
    """

    patient: str
    ct: pathlib.Path
    mask: pathlib.Path
    label: int
    labels: str | None = None


def target_of(volume: cases.Volume) -> Target:
    """The vertebra of a case file's volume."""
    return Target(volume.patient, volume.full_ct, volume.full_mask, volume.full_label)


class ScanDigests:
    """Content digests of scans; each file is read once."""

    def __init__(self) -> None:
        self._sha256 = functools.cache(files.sha256)

    def of(self, target: Target) -> str:
        """Digest of a target's CT, mask and numbering.

        Raises:
          InputError: a missing file, or a folder without images or with too much in it.
        """
        paths = tuple(pathlib.Path(os.path.realpath(path)) for path in (target.ct, target.mask))
        for given, path in zip((target.ct, target.mask), paths):
            _check_folder(given, path)
        return scan_digest(*paths, target.labels, self._sha256)


@functools.cache
def _check_folder(given, path):
    """Before a folder is read as a whole: that there are images in it."""
    if path.is_dir() and not any(p.name.endswith(SCAN_SUFFIXES) or files.is_dicom(p) for p in files.listed(path)):
        errors.fail(given, "folder", "no DICOM and no NIfTI file", "a folder of one series, or one file")


def renew(path: pathlib.Path, config: Any | None) -> None:
    """Makes a JSON file hold a dataclass, or removes it for None; a file that is right already is not touched.

    Raises:
      InputError: it cannot be written or removed.
    """
    if config is None:
        with files.writing(path):
            path.unlink(missing_ok=True)
        return
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    with contextlib.suppress(errors.InputError):  # missing or damaged
        if files.read_json(path) == wanted:
            return
    files.write_json(path, wanted)


def vertebra_arrays(vertebra: Vertebra, parts: Parts) -> dict[str, Any]:
    """What `vertebra_of` takes: a vertebra, its Gaussians and its parts as named arrays."""
    found = {name: getattr(vertebra, name) for name in VERTEBRA}
    for prefix, cloud in (("cloud", vertebra.cloud), ("fine", fine_cloud(vertebra))):
        found |= {f"{prefix}_{k}": v for k, v in gaussians.to_arrays(cloud).items()}
    return found | {name: np.asarray(getattr(parts, name)) for name in PARTS}


def vertebra_of(
    label: int, arrays: dict[str, np.ndarray], path: pathlib.Path
) -> tuple[Vertebra, gaussians.Gaussians, Parts]:
    """A vertebra, itself in many Gaussians, and its parts, from `vertebra_arrays`.

    Args:
      label: VerSe number; path: the file, named in errors.
    Raises:
      InputError: Gaussians in another format.
    """
    for field in ("cloud_format", "fine_format"):
        if str(arrays[field]) != gaussians.FORMAT:
            errors.fail(path, field, repr(str(arrays[field])), repr(gaussians.FORMAT))
    coarse, fine = (
        gaussians.from_arrays({name: arrays[f"{prefix}_{name}"] for name in CLOUD}) for prefix in ("cloud", "fine")
    )
    density, mask, ct_from_index, ct_from_box, points = (arrays[name] for name in VERTEBRA)
    vertebra = Vertebra(label, density, mask, ct_from_index, ct_from_box, coarse, points)
    return vertebra, fine, Parts(**{name: arrays[name] for name in PARTS})


def loader(workdir: pathlib.Path | str) -> Callable[[Target], Prepared]:
    """A function from a target to its `Prepared` in `workdir`; it raises as `load`."""
    digests = ScanDigests()
    return lambda target: load(workdir, target, digests)


def read_refine(path: pathlib.Path) -> RefineConfig:
    """The refinement in a JSON file.

    Raises:
      InputError: no such file, or unknown fields.
    """
    value = files.read_json(path)
    try:
        levels = tuple(gauss_newton.Level(**level) for level in value["levels"])
        return gauss_newton.RefineConfig(**{**value, "levels": levels})
    except (KeyError, TypeError) as error:
        errors.fail(path, "fields", str(error)[:80], "those of a refinement that `experiments.prepare` wrote")


def read_rule(path: pathlib.Path) -> confidence.AcceptanceRule | None:
    """The acceptance rule in a JSON file; None if the file is missing.

    Raises:
      InputError: fields that are missing or are not numbers, thresholds below LEAST_CHANCE, or, in the base and other folders with
        checksums, a file that was changed.
    """
    if not path.exists():
        return None
    checksums.check_file(path, "`experiments.calibrate` writes rules; copy the base again to undo an edit")
    value = files.read_json(path)
    counts = len(confidence.FEATURES) + 1, confidence.SEARCHES + 1
    wanted = {"chance": counts[0], "thresholds": counts[1], "size": 2, "radius": 0}
    for field, count in wanted.items():
        found = value.get(field) if isinstance(value, dict) else None
        numbers = found if count else [found]
        good = isinstance(numbers, list) and all(type(v) in (int, float) for v in numbers)
        if not good or (count and len(numbers) != count):
            errors.fail(path, field, repr(found)[:SHOWN_CHARACTERS], f"{count} numbers" if count else "a number")
    if min(value["thresholds"]) < LEAST_CHANCE:
        errors.fail(path, "thresholds", value["thresholds"], f"chances of {LEAST_CHANCE} at least")
    if not value["radius"] > 0:
        errors.fail(path, "radius", value["radius"], "a number above 0")
    fitted_for = value.get("fitted_for", UNMARKED)
    if not isinstance(fitted_for, str):
        errors.fail(path, "fitted_for", repr(fitted_for)[:SHOWN_CHARACTERS], "a digest of refinement and search")
    numbers = (tuple(map(float, value[field])) for field in ("chance", "thresholds", "size"))
    return confidence.AcceptanceRule(*numbers, float(value["radius"]), fitted_for)


def base_rule(base: pathlib.Path | str, refine: RefineConfig) -> confidence.AcceptanceRule | None:
    """The base's acceptance rule; None, with a warning, where it has none for this refinement. Raises as `read_rule`."""
    rule, wanted = read_rule(pathlib.Path(base) / CALIBRATION), confidence.method_digest(refine, SearchConfig())
    if rule is not None and rule.fitted_for != wanted:
        logging.warning("%s: its acceptance rule is for another refinement, so that poses are not judged", base)
        return None
    return rule


def claim(workdir: pathlib.Path, document: dict[str, Any], part: bool = False) -> None:
    """Writes the manifest of a new workdir, or checks that an existing one was made from the same inputs.

    An existing manifest without a localizer takes over that of `document`.

    Args:
      part: whether the document is about a part of the scans: they, and those of later calls, are added to the manifest.
    Raises:
      InputError: a workdir made from other inputs, or a folder that holds something else.
    """
    with locks.hold(workdir / MANIFEST_LOCK, workdir, wait=True):
        _claim(workdir, document, part)


def _claim(workdir, document, part):
    path = workdir / "manifest.json"
    if path.exists():
        found = read_manifest(workdir)
        shared = part or found.get("shared", False)
        if shared:
            document = {**document, "scans": {**found.get("scans", {}), **document["scans"]}, "shared": True}
        same = ("base", "config") if shared else ("base", "config", "scans")
        fields = (*same, *({"detector"} & set(found) & set(document)))
        for field in fields:
            if found.get(field) != document[field]:
                errors.fail(
                    path,
                    field,
                    found.get(field),
                    f"{document[field]} (a workdir is reused only for the same inputs; name another one or delete it)",
                )
        if {**found, **document} != found:
            files.write_json(path, checksums.sealed({**found, **document}))
    elif workdir.exists() and any(p.name not in (locks.LOCK, MANIFEST_LOCK) for p in workdir.iterdir()):
        errors.fail(workdir, "folder", "files but no manifest.json", "an empty folder or a prepared workdir")
    else:
        shared = {"shared": True} if part else {}
        files.write_json(path, checksums.sealed({**document, **shared, "checksums": {}}))


def seal(workdir: pathlib.Path | str, names: Iterable[str]) -> None:
    """Writes the checksums of files that were just written, or removed, to the manifest.

    Args:
      names: paths in the workdir.
    Raises:
      InputError: as `read_manifest`, or the manifest cannot be written.
    """
    workdir, names = pathlib.Path(workdir), list(names)
    # Other processes prepare other scans, and write the same manifest.
    with locks.hold(workdir / MANIFEST_LOCK, workdir, wait=True):
        manifest = read_manifest(workdir)
        kept = {name: digest for name, digest in manifest["checksums"].items() if name not in names}
        changed = {**manifest, "checksums": dict(sorted({**kept, **checksums.digests(workdir, names)}.items()))}
        if changed != manifest:
            files.write_json(workdir / "manifest.json", checksums.sealed(changed))


def is_sealed(workdir: pathlib.Path | str, names: Iterable[str]) -> bool:
    """Whether all of these files are there, as they were written."""
    found = read_manifest(workdir)["checksums"]
    return all(name in found and checksums.digests(workdir, [name]) == {name: found[name]} for name in names)


def prepared_names(digest: str, labels: Iterable[int]) -> list[str]:
    """Paths in a workdir of what is prepared of a scan: its vertebrae, and the checksums of its model."""
    return [*(f"{digest}/vertebra_{label}.npz" for label in labels), f"{digest}/model/{checksums.NAME}"]


def settings_names(digest: str) -> list[str]:
    """Paths in a workdir of a scan's refinement and acceptance rule."""
    return [f"{digest}/{REFINE_FILE}", f"{digest}/{CALIBRATION}"]


def save_vertebra(path: pathlib.Path, vertebra: Vertebra, parts: Parts) -> None:
    """Writes a vertebra and its parts as an npz, atomically; `load` reads it."""
    files.write_npz(path, **vertebra_arrays(vertebra, parts))


def read_manifest(workdir: pathlib.Path | str) -> dict[str, Any]:
    """The manifest of a prepared workdir.

    Raises:
      InputError: no manifest, another format, malformed fields, or another content than was written.
    """
    path = pathlib.Path(workdir) / "manifest.json"
    if not path.exists():
        errors.fail(workdir, "folder", "no manifest.json", "a workdir that `experiments.prepare` made")
    manifest = files.read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found in OLDER_FORMATS:
        wanted = f"{WORKDIR_FORMAT!r}: an older version made it, without checksums; prepare it again, into a new folder"
        errors.fail(path, "format", repr(found), wanted)
    if found != WORKDIR_FORMAT:
        errors.fail(path, "format", repr(found), repr(WORKDIR_FORMAT))
    prepared = manifest.get("scans")
    if not isinstance(prepared, dict) or not all(isinstance(labels, list) for labels in prepared.values()):
        errors.fail(path, "scans", repr(prepared)[:SHOWN_CHARACTERS], "lists of labels by the scans' digests")
    remedy = "copy the workdir again, or delete it and prepare it again"
    checksums.check_sealed(path, manifest, remedy)
    if not isinstance(manifest.get("checksums"), dict):
        errors.fail(path, "checksums", repr(manifest.get("checksums"))[:SHOWN_CHARACTERS], f"digests by file: {remedy}")
    return manifest


def localizer_path(workdir: pathlib.Path | str, digest: str) -> pathlib.Path:
    """Path of the localizer adapted to a scan, which need not exist; digest: of `ScanDigests.of`."""
    return pathlib.Path(workdir) / digest / "detector.npz"


def load_localizer(
    workdir: pathlib.Path | str | None, target: Target, digests: ScanDigests, generic: pathlib.Path | str
) -> tuple[Localizer, bool]:
    """The localizer for a target's vertebra.

    Args:
      workdir: of the target's scan; None for none.
      generic: file of the localizer to use where there is no workdir, or one that was prepared without a localizer.
    Returns:
      the localizer, and whether it is adapted to the patient.
    Raises:
      InputError: no localizer, an unfinished preparation, or a damaged file.
    """
    generic = pathlib.Path(generic)
    if workdir is not None and "detector" in (manifest := read_manifest(workdir)):
        path = localizer_path(workdir, digests.of(target))
        if not path.exists():
            wanted = "a finished one: run `experiments.prepare` again to go on"
            errors.fail(workdir, "detector", "an unfinished preparation", wanted)
        name = path.relative_to(workdir).as_posix()
        checksums.check(workdir, manifest["checksums"], [name], REMEDY)
        return localizer_files.read_localizer(path), True
    if not generic.exists():
        wanted = "--init, --points, or a workdir with a detector: run `experiments.prepare --detector` on it"
        errors.fail(workdir or generic, "start pose", "nothing to find the vertebra with", wanted)
    return localizer_files.read_localizer(generic), False


def load(workdir: pathlib.Path | str, target: Target, digests: ScanDigests) -> Prepared:
    """The prepared vertebra of a target.

    Raises:
      InputError: a workdir that does not hold it, an unfinished preparation, or an unreadable file.
    """
    workdir = pathlib.Path(workdir)
    manifest = read_manifest(workdir)
    digest = digests.of(target)
    folder = workdir / digest
    if target.label not in manifest["scans"].get(digest, []):
        errors.fail(
            workdir,
            f"label {target.label} of {target.ct}",
            f"not prepared; prepared of this scan: {manifest['scans'].get(digest) or 'none'}",
            "a vertebra that `experiments.prepare` was run for, with the same --labels",
        )
    if not models.model_exists(folder / "model"):
        errors.fail(
            workdir, "model", "an unfinished preparation", "a finished one: run `experiments.prepare` again to go on"
        )
    written = [*prepared_names(digest, [target.label]), *settings_names(digest)]
    checksums.check(workdir, manifest["checksums"], written, REMEDY)
    path = folder / f"vertebra_{target.label}.npz"
    vertebra, fine, parts = vertebra_of(target.label, files.read_npz(path, *VERTEBRA_ARRAYS), path)
    model, rule = models.load_model(folder / "model"), read_rule(folder / CALIBRATION)
    refine, search = read_refine(folder / REFINE_FILE), SearchConfig()
    if rule is not None and rule.fitted_for != (wanted := confidence.method_digest(refine, search)):
        wanted = f"{wanted}, the refinement and search in use: prepare the workdir again"
        errors.fail(folder / CALIBRATION, "fitted_for", rule.fitted_for, wanted)
    return Prepared(model, vertebra, fine, on_device_parts(parts), refine, search, metal_files.read_base(), rule)
