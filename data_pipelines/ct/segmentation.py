"""Vertebra masks: reading label maps in any known numbering, and running TotalSegmentator to make one.

TotalSegmentator (Wasserthal et al., Radiology: AI 2023) is run by its command line and never imported, so it need not be
installed. The command is `experiments.segment`.
"""

import dataclasses
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np
from absl import logging

from data_pipelines.ct import hounsfield
from data_pipelines.ct import mask_folders
from data_pipelines.ct import numbering
from data_pipelines.ct import pieces
from data_pipelines.io import files
from data_pipelines.io.nifti import read_nifti
from data_pipelines.io.nifti import read_nifti_grid
from data_pipelines.io.nifti import read_nifti_label_names
from data_pipelines.io.nifti import write_nifti
from radgs_jax import errors
from radgs_jax import levels

LABEL_MAPS = numbering.LABEL_MAPS
to_verse = numbering.to_verse
parse_labels = numbering.parse_labels
boxes = pieces.boxes
border_axis = pieces.border_axis
check_grid = mask_folders.check_grid
_NAMES = list(numbering.NAMES)
INSTALL = "pip install TotalSegmentator"


def read_grid(path: pathlib.Path | str) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (3,) and affine (4, 4) of what `read_labels` reads, without reading the voxels.

    Raises:
      InputError: as `read_labels`, for faults of names and headers.
    """
    return mask_folders.read_grid(path) if mask_folders.is_folder(path) else read_nifti_grid(path)


def read_labels(
    path: pathlib.Path | str, label_map: str | None = None, unclear: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map in VerSe numbers. Specks are removed and levels checked (`pieces.clean`, `pieces.check_order`).

    Args:
      path: a NIfTI file; or a folder with one mask for each vertebra, as TotalSegmentator writes it.
      label_map: what the values are, as for `numbering.parse_labels`. None recognises it: by the names of a folder's files; by the
        table of names that TotalSegmentator writes into its files; or else it is VerSe's, provided that all values are VerSe
        numbers, that they increase from the head down (those of TotalSegmentator increase upwards), and that they are no count
        from 1 and no mask of a single vertebra. Any other file is refused.
      unclear: what such counts and single values are, instead of refusing them: a numbering, where the files are known to have it.

    Returns:
      Labels (X, Y, Z) uint8 with axes nearest to RAS+, and their affine (4, 4) in mm.

    Raises:
      InputError: the file is unreadable or damaged, its values are not whole numbers from 0 to 255, it shows no vertebra, its
        numbering is not recognised, a label has two large pieces, or levels do not follow each other from head to feet.
      ValueError: `label_map` is no numbering.
    """
    numbering.check_name(label_map)
    if mask_folders.is_folder(path):
        if label_map is not None and not label_map.startswith("totalsegmentator"):
            errors.fail(
                path, "labels", f"--labels={label_map} for a folder of masks", "none: the names of its files tell"
            )
        numbers, affine = mask_folders.read_values(path)
        return _checked(path, numbers, affine, ordered=True)
    values, affine = read_nifti(path)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high) and 0 <= low and high <= 255):
        errors.fail(path, "labels", f"values in [{low}, {high}]", "whole numbers 0 to 255")
    numbers = values.astype(np.uint8)
    if values.dtype.kind == "f" and (numbers != values).any():
        errors.fail(path, "labels", f"values in [{low}, {high}], some between whole numbers", "whole numbers 0 to 255")
    heights = _heights(numbers, affine)
    if not heights:
        errors.fail(path, "labels", "an empty mask", "one labelled vertebra or more")
    named = {} if label_map else _named(path)
    if named:
        numbers = to_verse(numbers, named)
    elif label_map:
        numbers = numbering.apply(path, numbers, sorted(heights), label_map)
    else:
        _recognise(path, heights, unclear)
    return _checked(path, numbers, affine, ordered=label_map != numbering.BONES)


def _recognise(path, heights, unclear):
    """Refuses values, given by their heights in mm, that are not clearly VerSe numbers."""
    present = sorted(heights)
    wanted = f"VerSe numbers, or a word on what they are: --labels={'|'.join(LABEL_MAPS)}|binary:LEVEL|VALUES:LEVELS"
    steps = np.sign(np.diff([heights[n] for n in present if n <= levels.L6])).sum()
    single = len(present) == 1
    if present[-1] > numbering.VERSE_LARGEST and not single:
        errors.fail(path, "labels", f"values up to {present[-1]}", wanted)
    if unclear is None or single and present[0] > numbering.VERSE_LARGEST:
        numbering.check_clear(path, present, steps > 0)
    if steps > 0:
        errors.fail(path, "labels", "numbers that count from the feet up", wanted)


def _checked(path, numbers, affine, ordered):
    """Labels without specks, and their affine."""
    found = pieces.clean(path, numbers, affine)
    if not found:
        errors.fail(path, "labels", "no vertebra", "one labelled vertebra or more")
    if ordered:
        pieces.check_order(path, found, numbers.shape, affine)
    return numbers, affine


def _named(path):
    """VerSe number by label value, from the table of names in the file. Empty if it names no vertebra."""
    names, known = read_nifti_label_names(path), numbering.VERSE_BY_NAME
    found = {value: known[name] for value, name in names.items() if name in known and 0 < value < 256}
    return found if any(names[value].startswith("vertebrae_") for value in found) else {}


def complete_labels(labels: np.ndarray) -> tuple[int, ...]:
    """The labels of a map (X, Y, Z) that do not touch the scan's border, so that their vertebrae are taken to be complete."""
    return tuple(label for label, box in boxes(labels).items() if border_axis(box, labels.shape) is None)


def whole_vertebrae(path: pathlib.Path | str, label_map: str | None = None) -> list[int]:
    """VerSe numbers, from head to feet, of the vertebrae in a mask that its border does not cut. It warns of those that are cut.

    Args:
      path, label_map: as for `read_labels`.
    Raises:
      InputError: as `read_labels`, or there is no such vertebra.
    """
    values, _ = read_labels(path, label_map)
    whole, there = complete_labels(values), boxes(values)
    found = [label for label in levels.VERTEBRAE if label in whole]
    if cut := [levels.level_name(label) for label in levels.VERTEBRAE if label in there and label not in whole]:
        logging.warning("%s: cut by the CT's border: left out", ", ".join(cut))
    if not found:
        errors.fail(path, "labels", sorted(whole), "a whole vertebra")
    return found


def _heights(numbers, affine):
    """Height in mm of the centre of each label's bounding box, along the axis to the head."""
    return {label: affine[2, :3] @ [0.5 * (s.start + s.stop - 1) for s in box] for label, box in boxes(numbers).items()}


@dataclasses.dataclass(frozen=True)
class SegmentOptions:
    """How TotalSegmentator is run.

    Attributes:
      fast: use its 3 mm model.
      device: its option --device. None: its default.
    """

    fast: bool = False
    device: str | None = None


def segment(
    ct_path: pathlib.Path | str,
    output_path: pathlib.Path | str,
    mask_path: pathlib.Path | str | None = None,
    label_map: str | None = None,
    options: SegmentOptions = SegmentOptions(),
) -> dict:
    """Writes the label map of a CT in VerSe numbers, and a JSON file of the same name that records how it was made.

    Each file is written atomically.

    Args:
      ct_path: as for `scans.read_ct`.
      output_path: the NIfTI file to write.
      mask_path: a label map on the CT's grid, as for `read_labels`. None runs TotalSegmentator.
      label_map: numbering of `mask_path`, as for `read_labels`.
      options: how TotalSegmentator is run.

    Returns:
      The content of the JSON file.

    Raises:
      InputError: the output's name is not a NIfTI's, a file is unreadable, the mask is on another grid or refused by
        `read_labels`, the CT is not in HU, or TotalSegmentator is not installed, fails, or finds no vertebra.
    """
    output_path = pathlib.Path(output_path)
    if not output_path.name.endswith((".nii.gz", ".nii")):
        errors.fail(output_path, "name", output_path.suffix or "no ending", "a name that ends in .nii.gz")
    from data_pipelines.ct import scans  # here, since that module imports this one

    with tempfile.TemporaryDirectory() as folder:
        record = {"ct": {"name": pathlib.Path(ct_path).name, "sha256": files.sha256(ct_path)}}
        if mask_path is not None:
            record["mask"] = {"name": pathlib.Path(mask_path).name, "sha256": files.sha256(mask_path)}
            record["label_map"] = label_map or "recognised"
            source = mask_path
            grid = read_grid(source)
            hu, ct_from_index = scans.read_ct(ct_path)
        else:
            source = pathlib.Path(folder) / "labels.nii.gz"
            hu, ct_from_index = scans.read_ct(ct_path)
            record.update(_run_totalsegmentator(_as_nifti(ct_path, hu, ct_from_index, folder), source, options))
            if not _named(source):
                label_map = "totalsegmentator_v1" if record["version"].startswith("1.") else "totalsegmentator"
            grid = read_grid(source)
        check_grid(source, *grid, hu.shape, ct_from_index)
        labels, affine = read_labels(source, label_map)
        hounsfield.check(ct_path, hu, labels, ct_from_index)
    record["vertebrae"] = sorted(boxes(labels))
    files.write_json(output_path.with_name(output_path.name.removesuffix(".gz").removesuffix(".nii") + ".json"), record)
    write_nifti(output_path, labels, affine)
    return record


def _as_nifti(ct_path, hu, ct_from_index, folder):
    """A NIfTI file of a CT. A DICOM series is converted to one in `folder`."""
    ct_path = pathlib.Path(ct_path)
    if not (ct_path.is_dir() or files.is_dicom(ct_path)):
        return ct_path
    path = pathlib.Path(folder) / "ct.nii.gz"
    write_nifti(path, np.rint(hu).astype(np.int16), ct_from_index)
    return path


def _run_totalsegmentator(ct, output, options):
    program = shutil.which("TotalSegmentator")
    if program is None:
        errors.fail("TotalSegmentator", "program", "nothing on the PATH", f"it installed ({INSTALL}), or --mask")
    version = _call([program, "--version"]).strip().splitlines()
    arguments = ["--ml", "--task", "total", "--roi_subset", *_NAMES]
    arguments += ["--fast"] * options.fast + (["--device", options.device] if options.device else [])
    _call([program, "-i", str(pathlib.Path(ct).absolute()), "-o", str(output), *arguments])
    return {"program": "TotalSegmentator", "version": version[-1] if version else "unknown", "options": arguments}


def _call(command):
    """Output of a command. If it fails, its last line is the error."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        errors.fail("TotalSegmentator", f"exit status {done.returncode}", said, "a run that succeeds")
    return done.stdout
