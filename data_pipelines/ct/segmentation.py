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
import scipy

from data_pipelines.io import files
from data_pipelines.io.nifti import read_nifti
from data_pipelines.io.nifti import read_nifti_grid
from data_pipelines.io.nifti import read_nifti_label_names
from data_pipelines.io.nifti import to_canonical
from data_pipelines.io.nifti import write_nifti
from radgs_jax import errors

_NAMES = (
    [f"vertebrae_C{n}" for n in range(1, 8)]
    + [f"vertebrae_T{n}" for n in range(1, 13)]
    + [f"vertebrae_L{n}" for n in range(1, 6)]
)
VERSE_BY_NAME = {**{name: number for number, name in enumerate(_NAMES, 1)}, "sacrum": 26, "vertebrae_S1": 26}
"""VerSe numbers by TotalSegmentator's class names. It separates S1 from the sacrum, VerSe does not."""
VERSE_LARGEST = 28
"""Largest VerSe number. C1 to C7 are 1 to 7, T1 to T12 8 to 19, L1 to L6 20 to 25, sacrum 26, coccyx 27, T13 28."""
LARGEST_LEVEL = 25
"""VerSe number of L6, the last one that counts from the head down."""
GRID_TOLERANCE_MM = 0.1
"""Largest distance in mm between the corners of a label map's grid and its CT's. Chosen by hand: half may refuse affines rounded on
writing, twice adds as much error to every pose."""
LABEL_MAPS = {
    "verse": {number: number for number in range(256)},
    # `total_v1` and `total` in TotalSegmentator's map_to_binary.py. Both count vertebrae from L5 up to C1.
    "totalsegmentator_v1": {**{18 + i: 24 - i for i in range(24)}, 92: 26},
    "totalsegmentator": {**{27 + i: 24 - i for i in range(24)}, 25: 26, 26: 26},
}
"""VerSe number by label value; values that are not listed become 0. `totalsegmentator` is the task `total` of version 2."""
INSTALL = "pip install TotalSegmentator"


def to_verse(values: np.ndarray, label_map: dict[int, int]) -> np.ndarray:
    """Converts label values (any shape, integers 0 to 255) to VerSe numbers, uint8. `label_map` is a value of LABEL_MAPS."""
    table = np.zeros(256, np.uint8)
    for value, number in label_map.items():
        table[value] = number
    return table[values]


def read_labels(path: pathlib.Path | str, label_map: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads a label map in VerSe numbers.

    Args:
      path: a NIfTI file.
      label_map: a key of LABEL_MAPS. None recognises the numbering: by the table of names that TotalSegmentator writes into its
        files; or else it is VerSe's, provided that all values are VerSe numbers and that they increase from the head down
        (those of TotalSegmentator increase upwards). Any other file is refused.

    Returns:
      Labels (X, Y, Z) uint8 with axes nearest to RAS+, and their affine (4, 4) in mm.

    Raises:
      InputError: the file is unreadable or damaged, its values are not whole numbers from 0 to 255, it shows no vertebra, or
        its numbering is not recognised.
      ValueError: `label_map` is not a key of LABEL_MAPS.
    """
    if label_map is not None and label_map not in LABEL_MAPS:
        raise ValueError(f"label_map is {label_map!r}, wanted one of {', '.join(LABEL_MAPS)}")
    values, affine = read_nifti(path)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high) and 0 <= low and high <= 255):
        errors.fail(path, "labels", f"values in [{low}, {high}]", "whole numbers 0 to 255")
    numbers = values.astype(np.uint8)
    if values.dtype.kind == "f" and (numbers != values).any():
        errors.fail(path, "labels", f"values in [{low}, {high}], some between whole numbers", "whole numbers 0 to 255")
    wanted = f"VerSe numbers, or a word on what they are: --labels={'|'.join(LABEL_MAPS)}"
    named = {} if label_map else _named(path)
    if high > VERSE_LARGEST and not named and not label_map:
        errors.fail(path, "labels", f"values up to {high}", wanted)
    numbers = to_verse(numbers, named or LABEL_MAPS[label_map or "verse"])
    heights = _heights(numbers, affine)
    if not heights:
        errors.fail(path, "labels", "an empty mask" if high == 0 else "no vertebra", "one labelled vertebra or more")
    steps = np.sign(np.diff([heights[label] for label in sorted(heights) if label <= LARGEST_LEVEL]))
    if not label_map and steps.sum() > 0:
        errors.fail(path, "labels", "numbers that count from the feet up", wanted)
    return numbers, affine


def _named(path):
    """VerSe number by label value, from the table of names in the file. Empty if it names no vertebra."""
    names = read_nifti_label_names(path)
    found = {value: VERSE_BY_NAME[name] for value, name in names.items() if name in VERSE_BY_NAME and 0 < value < 256}
    return found if any(names[value].startswith("vertebrae_") for value in found) else {}


def boxes(labels: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """Bounding box, as a tuple of slices, of each label above 0 in an integer array."""
    # In memory order, which differs from C order once axes were permuted: six times faster.
    order = np.argsort(np.abs(labels.strides))[::-1]
    found = enumerate(scipy.ndimage.find_objects(labels.transpose(order)), 1)
    back = np.argsort(order)
    return {label: tuple(box[axis] for axis in back) for label, box in found if box is not None}


def complete_labels(labels: np.ndarray) -> tuple[int, ...]:
    """The labels of a map (X, Y, Z) that do not touch the scan's border, so that their vertebrae are taken to be complete."""
    return tuple(label for label, box in boxes(labels).items() if border_axis(box, labels.shape) is None)


def border_axis(box: tuple[slice, ...], shape: tuple[int, ...]) -> int | None:
    """The first axis on which a bounding box touches the border of an array of the given shape, or None."""
    touched = (axis for axis, (part, size) in enumerate(zip(box, shape)) if part.start == 0 or part.stop == size)
    return next(touched, None)


def _heights(numbers, affine):
    """Height in mm of the centre of each label's bounding box, along the axis to the head."""
    return {label: affine[2, :3] @ [0.5 * (s.start + s.stop - 1) for s in box] for label, box in boxes(numbers).items()}


def check_grid(
    path: pathlib.Path | str,
    shape: tuple[int, ...],
    affine: np.ndarray,
    ct_shape: tuple[int, ...],
    ct_from_index: np.ndarray,
) -> None:
    """Checks that a label map is on its CT's grid.

    Args:
      path: the label map's file, named in errors.
      shape, affine: (3,) and (4, 4) in mm, of the label map.
      ct_shape, ct_from_index: the same of the CT.

    Raises:
      InputError: the shapes differ, or a corner is more than GRID_TOLERANCE_MM away.
    """
    if tuple(shape) != tuple(ct_shape):
        errors.fail(path, "shape in RAS order", tuple(shape), f"the CT's {tuple(ct_shape)}")
    difference = ct_from_index - affine
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape])).reshape(3, -1).T
    apart = np.abs(corners @ difference[:3, :3].T + difference[:3, 3]).max()
    if apart > GRID_TOLERANCE_MM:
        errors.fail(path, "affine", f"a grid {apart:.2f} mm away from the CT's", "the CT's grid within 0.1 mm")


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
      mask_path: a label map on the CT's grid. None runs TotalSegmentator.
      label_map: numbering of `mask_path`, as for `read_labels`.
      options: how TotalSegmentator is run.

    Returns:
      The content of the JSON file.

    Raises:
      InputError: the output's name is not a NIfTI's, a file is unreadable, the mask is on another grid, or TotalSegmentator is
        not installed, fails, or finds no vertebra.
    """
    output_path = pathlib.Path(output_path)
    if not output_path.name.endswith((".nii.gz", ".nii")):
        errors.fail(output_path, "name", output_path.suffix or "no ending", "a name that ends in .nii.gz")
    with tempfile.TemporaryDirectory() as folder:
        record = {"ct": {"name": pathlib.Path(ct_path).name, "sha256": files.sha256(ct_path)}}
        nifti, ct_shape, ct_from_index = _as_nifti(ct_path, pathlib.Path(folder), convert=mask_path is None)
        if mask_path is not None:
            record["mask"] = {"name": pathlib.Path(mask_path).name, "sha256": files.sha256(mask_path)}
            record["label_map"] = label_map or "recognised"
            source = mask_path
        else:
            source = pathlib.Path(folder) / "labels.nii.gz"
            record.update(_run_totalsegmentator(nifti, source, options))
            if not _named(source):
                label_map = "totalsegmentator_v1" if record["version"].startswith("1.") else "totalsegmentator"
        check_grid(source, *read_nifti_grid(source), ct_shape, ct_from_index)
        labels, affine = read_labels(source, label_map)
    record["vertebrae"] = sorted(boxes(labels))
    files.write_json(output_path.with_name(output_path.name.removesuffix(".gz").removesuffix(".nii") + ".json"), record)
    write_nifti(output_path, labels, affine)
    return record


def _as_nifti(ct_path, folder, convert):
    """(NIfTI file, shape, affine) of a CT. A DICOM series is converted to a file in `folder` if `convert` is set."""
    ct_path = pathlib.Path(ct_path)
    if not (ct_path.is_dir() or files.is_dicom(ct_path)):
        return ct_path, *read_nifti_grid(ct_path)

    from data_pipelines.ct import dicom_series

    hu, ct_from_index = to_canonical(*dicom_series.read_series(ct_path))
    path = folder / "ct.nii.gz"
    if convert:
        write_nifti(path, np.rint(hu).astype(np.int16), ct_from_index)
    return path, hu.shape, ct_from_index


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
