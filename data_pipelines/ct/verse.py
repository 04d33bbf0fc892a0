"""VerSe'19/20, or any folder of CTs with label maps, as a tensorflow-datasets builder. It writes array_record without tensorflow.

VerSe is published in two layouts (https://github.com/anjany/verse). Both are read as they are, once the zips are unpacked:

  by subject    dataset-verse20training/dataset-01training/rawdata/sub-gl003/sub-gl003_dir-ax_ct.nii.gz
                                                    .../derivatives/sub-gl003/sub-gl003_dir-ax_seg-vert_msk.nii.gz
                                                                              sub-gl003_dir-ax_seg-subreg_ctd.json
  challenge     01_training/verse512/verse512_CT-iso.nii.gz, verse512_CT-iso_seg.nii.gz, verse512_CT-iso_iso-ctd.json
                training/verse004.nii.gz, verse004_seg.nii.gz, verse004_ctd.json

The name of a second scan of a patient is `sub-verse400_split-verse090` or `verse400_verse090`; the first number identifies the
patient. The files of the 2019 challenge do not show which scans belong together. Splits are the published folders. Other
folders (a hospital's data: `X_ct.nii.gz` with `X_mask.nii.gz` or `X_seg-vert_msk.nii.gz`) have no splits. Then the patient is
the part of the name before the first `_`, and a digest of it chooses the split, independently of the other files: 80 %
training, 10 % validation, 10 % test.

In every layout, a CT may also be a folder `X_ct` with one DICOM series, read by `scans.read_ct`. The label map is always a
NIfTI file on the CT's grid. A folder of that name that contains other CTs is an ordinary folder.

Labels are VerSe's: C1-7 = 1..7, T1-12 = 8..19, L1-6 = 20..25, T13 = 28.
"""

import collections.abc
import dataclasses
import functools
import hashlib
import pathlib
import re
import typing

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_pipelines.ct import centroid_files
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from data_pipelines.io import files
from radgs_jax import errors
from radgs_jax import levels
from radgs_jax.geometry import resample

SPLITS = ("training", "validation", "test")
LUMBAR = tuple(range(20, 26))
SPINE = tuple(sorted(levels.VERTEBRAE))
PAPER_CASES, PAPER_SCANS, PAPER_VERTEBRAE = 300, 253, 1280
"""The paper's lumbar selection of VerSe'20: 253 scans with 1,280 vertebrae, from 300 cases."""
MARGIN_MM = 10.0
"""Margin in mm around the mask in the crop of a vertebra. Chosen by hand: half cuts off soft tissue that the blur of a cube needs,
twice makes the dataset larger."""
SPLIT_PERCENT = (80, 90)
"""Percentiles of the patients' digests at which the validation and the test split begin. Chosen by hand, as is common."""

CATALOGUE = "catalogue.json"
"""File beside a dataset of whole scans with the content of each, by which sets of training pairs are named."""

_SPLIT_FOLDER = re.compile(r"(?:dataset-?)?(?:verse)?\d*[-_]?(training|validation|test)", re.IGNORECASE)
_VERSE_ID = re.compile(r"((?:verse|gl)\d+)(?![0-9a-z])", re.IGNORECASE)
_MASK_ENDS = ("_seg-vert_msk", "_seg", "_mask")
_CENTROID_ENDS = ("_seg-subreg_ctd", "_seg-vb_ctd", "_iso-ctd", "_ctd")


@dataclasses.dataclass(frozen=True)
class ScanFiles:
    """The files of one scan.

    Attributes:
      patient: identifier of the patient.
      name: name of the scan.
      split: one of SPLITS.
      ct: a NIfTI file or a folder of DICOM files.
      mask: the label map.
      centroids: the published centroids, or None.
    """

    patient: str
    name: str
    split: str
    ct: pathlib.Path
    mask: pathlib.Path
    centroids: pathlib.Path | None


def find_scans(folder: pathlib.Path | str) -> list[ScanFiles]:
    """The scans of a folder in any of the layouts above. Only names are read.

    Masks without a CT, which occur in the challenge's files, are left out; the builder warns of them.

    Raises:
      InputError: there is no CT, a CT has no mask, a name occurs twice, files are both inside and outside of split folders, or a
        patient is in two splits.
    """
    return _find(pathlib.Path(folder))[0]


def _find(folder):
    """The scans of a folder, and the paths of masks without a CT."""
    cts, masks, centroids = {}, {}, {}
    paths = sorted(folder.rglob("*"))
    series = _series(paths)
    for path in paths:
        kind, name = ("ct", path.name.removesuffix("_ct")) if path in series else _kind(path.name)
        if kind is None:
            continue
        key = (_published_split(folder, path), name)
        known = {"ct": cts, "mask": masks, "centroids": centroids}[kind]
        if key in known:
            errors.fail(path, "name", f"also {known[key]}", "every scan once (give one release of VerSe)")
        known[key] = path
    if not cts:
        wanted = (
            "X_ct.nii.gz or a folder X_ct of DICOM, with X_mask.nii.gz or X_seg-vert_msk.nii.gz, or VerSe as published"
        )
        errors.fail(folder, "files", "no CT", wanted)
    published = {split is not None for split, _ in cts}
    if len(published) == 2:
        stray = next(path for (split, _), path in cts.items() if split is None)
        errors.fail(stray, "folder", "none of training, validation and test", "one of them, as for other scans here")
    found, owner = [], {}
    for (split, name), ct in cts.items():
        mask = masks.get((split, name))
        if mask is None:
            errors.fail(ct, "mask", "none", f"{name}_seg-vert_msk.nii.gz, {name}_seg.nii.gz or {name}_mask.nii.gz")
        patient = patient_of(name)
        own = split or split_of(patient)
        if owner.setdefault(patient, own) != own:
            errors.fail(
                ct,
                f"split of patient {patient}",
                f"{owner[patient]} and {own}",
                "one split for all of a patient's scans",
            )
        found.append(ScanFiles(patient, name, own, ct, mask, centroids.get((split, name))))
    return found, [path for key, path in masks.items() if key not in cts]


def patient_of(name: str) -> str:
    """The patient in a scan's name: 'sub-verse400_split-verse090' -> 'verse400', 'GL003_CT_ax' -> 'gl003', 'p7_b' -> 'p7'."""
    name = name.removeprefix("sub-")
    verse = _VERSE_ID.match(name)
    return verse[1].lower() if verse else name.split("_")[0]


def split_of(patient: str) -> str:
    """The split, one of SPLITS, of a patient without a published one. It depends on the identifier alone."""
    place = int(hashlib.sha256(patient.encode()).hexdigest(), 16) % 100
    return SPLITS[0 if place < SPLIT_PERCENT[0] else 1 if place < SPLIT_PERCENT[1] else 2]


def _series(paths):
    """The folders X_ct in a sorted list of paths that are DICOM series, that is, contain no other CT."""
    inside, found = set(), set()
    # In reverse, so that the content of a folder comes before the folder.
    for path in reversed(paths):
        named = path.name.endswith("_ct") and not path.name.startswith(".") and path not in inside and path.is_dir()
        if named:
            found.add(path)
        if named or _kind(path.name)[0] == "ct":
            inside.update(path.parents)
    return found


def _kind(file_name):
    """(kind, name of the scan) of a file; the kind is 'ct', 'mask', 'centroids', or None for other files."""
    if file_name.startswith("."):
        return None, None
    if file_name.endswith(".json"):
        stem = file_name.removesuffix(".json")
        end = next((end for end in _CENTROID_ENDS if stem.endswith(end)), None)
        return ("centroids", stem.removesuffix(end)) if end else (None, None)
    stem = file_name.removesuffix(".gz").removesuffix(".nii")
    if not file_name.endswith((".nii", ".nii.gz")):
        return None, None
    for end in _MASK_ENDS:
        if stem.endswith(end):
            return "mask", stem.removesuffix(end)
    # Other label maps of the layout by subject, such as parts of vertebrae.
    if stem.endswith("_msk"):
        return None, None
    return "ct", stem.removesuffix("_ct")


def _published_split(folder, path):
    named = {m[1].lower() for part in path.relative_to(folder).parts[:-1] if (m := _SPLIT_FOLDER.fullmatch(part))}
    if len(named) > 1:
        errors.fail(path, "folder", f"both {' and '.join(sorted(named))}", "one split")
    return named.pop() if named else None


def _fingerprint(found):
    """Digest of the names, splits and file sizes of scans."""
    lines = [f"{s.split} {s.name} {_bytes(s.ct)} {_bytes(s.mask)}" for s in found]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def fingerprint(folder: pathlib.Path | str) -> str:
    """Digest of the names, splits and file sizes of a folder's scans; raises as `find_scans`."""
    return _fingerprint(find_scans(folder))


def _bytes(path):
    """Size of a file, or the sum over the files in a folder (the size of a folder itself depends on the file system)."""
    inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in inside)


def selection_summary(complete: collections.abc.Mapping[ScanFiles, tuple[int, ...]]) -> dict[str, typing.Any]:
    """Counts of a selection of vertebrae, compared with those of the paper.

    Args:
      complete: selected labels of complete vertebrae, for each scan of a folder.

    Returns:
      Plain values: cases, patients, scans and vertebrae (numbers), by_split (scans per split), whole (there are at least as
      many cases as in the paper), agrees (scans and vertebrae are as many), line (a sentence for the log).
    """
    chosen = {scan: labels for scan, labels in complete.items() if labels}
    vertebrae = sum(map(len, chosen.values()))
    whole = len(complete) >= PAPER_CASES
    agrees = (len(chosen), vertebrae) == (PAPER_SCANS, PAPER_VERTEBRAE)
    line = f"{len(chosen)} of {len(complete)} scans, with {vertebrae} complete vertebrae"
    paper = f"the paper's {PAPER_SCANS} scans and {PAPER_VERTEBRAE} vertebrae of {PAPER_CASES} cases"
    if agrees:
        line += f": {paper}"
    elif whole:
        line += f": {len(chosen) - PAPER_SCANS:+d} scans and {vertebrae - PAPER_VERTEBRAE:+d} vertebrae compared with {paper}"
    else:
        line += f"; not to be held against {paper}: the folder has fewer"
    return {
        "cases": len(complete),
        "patients": len({scan.patient for scan in chosen}),
        "scans": len(chosen),
        "vertebrae": vertebrae,
        "by_split": {split: sum(scan.split == split for scan in chosen) for split in SPLITS},
        "whole": whole,
        "agrees": agrees,
        "line": line,
    }


@dataclasses.dataclass(eq=False)
class VerseConfig(tfds.core.BuilderConfig):
    """What one example is.

    Attributes:
      labels: VerSe numbers of the selected vertebrae.
      whole_scans: one example per scan instead of one per vertebra.
    """

    labels: tuple[int, ...] = LUMBAR
    whole_scans: bool = False


def _volume(dtype):
    # 'bytes', since array_record compresses anyway.
    return tfds.features.Tensor(shape=(None, None, None), dtype=dtype, encoding="bytes")


def _numbers(*shape):
    return tfds.features.Tensor(shape=shape, dtype=np.float64, encoding="bytes")


class Verse(tfds.core.GeneratorBasedBuilder):
    """Vertebrae or whole scans at the scan's own spacing, with axes nearest to RAS+. Nothing is resampled.

    Features of every example:
      hu: (X, Y, Z) int16, rounded and clipped.
      labels: (X, Y, Z) uint8, all labels.
      ct_from_index: (4, 4) RAS+ mm of this array.
      patient, scan: identifiers.
    Features of vertebrae, which are cropped MARGIN_MM around the mask:
      label: VerSe number.
      ct_from_box: (4, 4) the vertebra's frame, see `extraction.ct_from_box`.
      centroid: (3,) the published one in CT mm, or NaN.
    Features of whole scans:
      complete: (n,) selected labels whose vertebrae are complete.
      centroids: (n, 3) of these.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download the three zips of VerSe'20 (links in https://github.com/anjany/verse, CC BY-SA 4.0), unpack them into "
        "one folder, and give that as manual_dir. Any folder of X_ct.nii.gz, or folders X_ct of DICOM slices, with "
        "X_mask.nii.gz serves as well."
    )
    BUILDER_CONFIGS = [
        VerseConfig(name="lumbar", description="One example a complete lumbar vertebra", labels=LUMBAR),
        VerseConfig(name="lumbar_scans", description="Scans that show one", labels=LUMBAR, whole_scans=True),
        VerseConfig(name="spine", description="One example a complete vertebra", labels=SPINE),
        VerseConfig(name="spine_scans", description="Scans that show one", labels=SPINE, whole_scans=True),
    ]

    def _info(self):
        features = {
            "hu": _volume(np.int16),
            "labels": _volume(np.uint8),
            "ct_from_index": _numbers(4, 4),
            "patient": tfds.features.Text(),
            "scan": tfds.features.Text(),
        }
        if self.builder_config.whole_scans:
            features["complete"] = tfds.features.Tensor(shape=(None,), dtype=np.int32)
            features["centroids"] = _numbers(None, 3)
        else:
            features["label"] = tfds.features.Scalar(dtype=np.int32)
            features["ct_from_box"] = _numbers(4, 4)
            features["centroid"] = _numbers(3)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict(features),
            homepage="https://github.com/anjany/verse",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        wanted = self.builder_config.labels
        # Names and masks are read before CTs, so that faults of a folder show at once and not after hours.
        found, alone = _find(pathlib.Path(dl_manager.manual_dir))
        for path in alone:
            logging.warning("%s: a mask without a CT, left out", path)
        complete = {}
        for scan in found:
            labels, _ = segmentation.read_labels(scan.mask, unclear="verse")
            complete[scan] = tuple(label for label in segmentation.complete_labels(labels) if label in wanted)
        held = selection_summary(complete)
        if not held["scans"]:
            errors.fail(dl_manager.manual_dir, "vertebrae", "none complete", f"one of {wanted} in one scan at least")
        # The paper's numbers are for its lumbar selection.
        if wanted == LUMBAR:
            (logging.warning if held["whole"] and not held["agrees"] else logging.info)("verse: %s", held["line"])
        self.info.metadata.update(held, fingerprint=_fingerprint(complete))
        chosen = {split: [s for s, labels in complete.items() if labels and s.split == split] for split in SPLITS}
        return {split: self._generate_examples(members) for split, members in chosen.items() if members}

    def _generate_examples(self, members):
        config = self.builder_config
        for member in members:
            scan = scans.read_scan(member.ct, member.mask, member.patient, unclear="verse")
            known = centroid_files.read_centroids(member.centroids, scan) if member.centroids else {}
            labels = [label for label in segmentation.complete_labels(scan.labels) if label in config.labels]
            nowhere = np.full(3, np.nan)
            if config.whole_scans:
                yield (
                    member.name,
                    {
                        **_arrays(scan, tuple(slice(0, size) for size in scan.labels.shape), member),
                        "complete": np.array(labels, np.int32),
                        "centroids": np.array([known.get(label, nowhere) for label in labels]),
                    },
                )
                continue
            for label in labels:
                yield (
                    f"{member.name}_{label}",
                    {
                        **_arrays(scan, _box(scan, label), member),
                        "label": label,
                        "ct_from_box": extraction.ct_from_box(scan, label, member.mask),
                        "centroid": known.get(label, nowhere),
                    },
                )


def _box(scan, label):
    margin = np.ceil(MARGIN_MM / np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)).astype(int)
    return tuple(
        slice(max(0, part.start - m), min(size, part.stop + m))
        for part, m, size in zip(scan.boxes[label], margin, scan.labels.shape)
    )


def _arrays(scan, box, member):
    limits = np.iinfo(np.int16)
    return {
        "hu": np.clip(np.rint(scan.hu[box]), limits.min, limits.max).astype(np.int16),
        "labels": np.ascontiguousarray(scan.labels[box]),
        "ct_from_index": resample.part_from_index(scan.ct_from_index, [part.start for part in box]),
        "patient": member.patient,
        "scan": member.name,
    }


def prepare(folder: pathlib.Path | str, data_dir: pathlib.Path | str, config: str = "lumbar") -> Verse:
    """Builds the dataset unless it exists.

    Args:
      folder: the unpacked download, or any folder in a layout above.
      data_dir: the folder of datasets.
      config: name of one of Verse.BUILDER_CONFIGS.

    Returns:
      The builder. `as_data_source(split)` gives random access, and `info.metadata` holds `selection_summary`.

    Raises:
      InputError: as `find_scans`, `centroid_files.read_centroids` and `scans.read_scan`; or no selected vertebra is complete, or
        `data_dir` holds the dataset of another folder.
    """
    if not pathlib.Path(folder).is_dir():
        errors.fail(folder, "folder", "nothing", "a folder of CTs and masks")
    builder = Verse(data_dir=str(data_dir), config=config, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(folder)))
    # An existing dataset is not built again, so it could be that of another folder.
    built, given = builder.info.metadata["fingerprint"], fingerprint(folder)
    if built != given:
        errors.fail(builder.data_dir, "scans", f"those of another folder ({built})", f"those of {folder} ({given})")
    return builder


def as_scan(example: collections.abc.Mapping[str, typing.Any]) -> scans.Scan:
    """An example, whether a whole scan or the crop of a vertebra, as a `scans.Scan`."""
    return scans.Scan(_text(example["patient"]), example["hu"], example["labels"], np.asarray(example["ct_from_index"]))


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


@dataclasses.dataclass(frozen=True)
class DatasetScan:
    """A scan in a dataset of whole scans, as a source of training pairs.

    Attributes:
      folder: of the dataset; split, index: its place in it.
      patient, name: identifiers; content: SHA-256 of its arrays; complete: VerSe numbers of the selected whole vertebrae.
    """

    folder: str
    split: str
    index: int
    patient: str
    name: str
    content: str
    complete: tuple[int, ...]

    def digest(self) -> str:
        """Short digest of its arrays."""
        return self.content[:16]

    def read(self) -> scans.Scan:
        """The scan."""
        return as_scan(_source(self.folder, self.split)[self.index])


@functools.lru_cache(1)
def _source(folder, split):
    return tfds.builder_from_directory(folder).as_data_source(split)


def scans_of(builder: Verse) -> list[DatasetScan]:
    """The scans of a dataset of whole scans. Their content is read once, and noted beside the dataset."""
    folder = pathlib.Path(builder.data_dir)
    path = folder / CATALOGUE
    if not path.exists():
        noted = []
        for split in builder.info.splits:
            for index, example in enumerate(builder.as_data_source(split)):
                scan, content = as_scan(example), hashlib.sha256()
                for array in (scan.hu, scan.labels, scan.ct_from_index):
                    content.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
                complete = [int(label) for label in example["complete"]]
                noted.append([split, index, scan.patient, _text(example["scan"]), content.hexdigest(), complete])
        files.write_json(path, noted)
    return [DatasetScan(str(folder), *values, tuple(complete)) for *values, complete in files.read_json(path)]
