"""A CT with its vertebra labels."""

import dataclasses
import functools
import pathlib

import numpy as np

from data_pipelines.ct import hounsfield
from data_pipelines.ct import segmentation
from data_pipelines.io import files
from data_pipelines.io import nifti
from radgs_jax import errors
from radgs_jax import levels

AIR_HU = -1000.0
"""HU outside a scan: air, by the definition of the Hounsfield scale."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """A CT and its label map on one grid.

    Attributes:
      patient: an identifier.
      hu: (X, Y, Z) int16 where the file holds whole HU, float32 where not.
      labels: (X, Y, Z) uint8, VerSe numbers.
      ct_from_index: (4, 4) RAS+ mm of voxel centres.
    """

    patient: str
    hu: np.ndarray
    labels: np.ndarray
    ct_from_index: np.ndarray

    @functools.cached_property
    def boxes(self) -> dict[int, tuple[slice, ...]]:
        """Bounding box of each label in the label map, as a tuple of slices."""
        return segmentation.boxes(self.labels)


def read_ct(path: pathlib.Path | str) -> tuple[np.ndarray, np.ndarray]:
    """A CT from a NIfTI file, a folder of one DICOM series, or one multi-frame DICOM file.

    Returns:
      HU (X, Y, Z), int16 where the file holds whole HU and float32 where not, with axes permuted and flipped to be nearest to RAS+
      (oblique axes stay oblique); and ct_from_index (4, 4), RAS+ mm of voxel centres.

    Raises:
      InputError: a file is unreadable or damaged, voxels are not finite, or `dicom_series.read_series` refuses the series.
    """
    path = pathlib.Path(path)
    if path.is_dir() or files.is_dicom(path):
        from data_pipelines.ct import dicom_series  # here, since importing pydicom takes half a second

        hu, ct_from_index = nifti.to_canonical(*dicom_series.read_series(path))
    else:
        hu, ct_from_index = nifti.read_nifti(path)
    if hu.dtype.kind == "f":
        bad = hu.size - sum(int(np.count_nonzero(np.isfinite(part))) for part in hu)
        if bad:
            errors.fail(path, "voxels", f"{bad} not finite", "finite HU")
    # Floats would take twice the memory, and longer to make than the file takes to read.
    return hu if hu.dtype == np.int16 else hu.astype(np.float32, copy=False), ct_from_index


def read_scan(
    ct_path: pathlib.Path | str,
    mask_path: pathlib.Path | str,
    patient: str | None = None,
    label_map: str | None = None,
    unclear: str | None = None,
) -> Scan:
    """Reads a CT and its label map, each stored along any axes.

    Args:
      ct_path: as for `read_ct`.
      mask_path: the label map, a NIfTI file or a folder of masks, as for `segmentation.read_labels`.
      patient: an identifier. None: the CT's path.
      label_map, unclear: numbering of the mask, as for `segmentation.read_labels`.

    Raises:
      InputError: as `read_ct`, `segmentation.read_labels` and `hounsfield.check`, or the grids differ.
    """
    # Grids are compared before the label map's voxels are read, so it cannot be larger than the CT.
    grid = segmentation.read_grid(mask_path)
    hu, ct_from_index = read_ct(ct_path)
    segmentation.check_grid(mask_path, *grid, hu.shape, ct_from_index)
    labels, _ = segmentation.read_labels(mask_path, label_map, unclear)
    scan = Scan(patient or str(ct_path), hu, labels, ct_from_index)
    hounsfield.check(ct_path, hu, labels, ct_from_index, scan.boxes)
    return scan


def find_label(scan: Scan, label: int, path: pathlib.Path | str) -> tuple[slice, ...]:
    """Bounding box of a label, as a tuple of slices. `path` is the label map's file, named in errors.

    Raises:
      InputError: the label is not in the mask.
    """
    box = scan.boxes.get(label)
    if box is None:
        found = ", ".join(map(levels.level_name, sorted(scan.boxes))) or "nothing"
        errors.fail(path, "label", found, f"{levels.level_name(label)} among them")
    return box


def complete_box(scan: Scan, label: int, path: pathlib.Path | str) -> tuple[slice, ...]:
    """`find_label` of a vertebra that must be completely inside the scan.

    Raises:
      InputError: the label is not in the mask, or its mask touches the scan's border (the vertebra is cut).
    """
    box = find_label(scan, label, path)
    axis = segmentation.border_axis(box, scan.labels.shape)
    if axis is not None:
        found = f"a mask that touches the scan's border on axis {axis}"
        errors.fail(path, f"label {label} ({levels.level_name(label)})", found, "a complete vertebra")
    return box
