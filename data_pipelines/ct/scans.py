"""A CT with its vertebra labels, and one vertebra taken out of it."""

import dataclasses
import functools
import pathlib

import numpy as np

from data_pipelines.ct import segmentation
from data_pipelines.io import files
from data_pipelines.io import nifti
from radgs_jax import errors
from radgs_jax import levels

AIR_HU = -1000.0
"""What surrounds a scan in a cube that reaches beyond it."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """hu, labels: (X, Y, Z) on one grid; ct_from_index: (4, 4) RAS+ mm; patient: an identifier."""

    patient: str
    hu: np.ndarray
    labels: np.ndarray
    ct_from_index: np.ndarray

    @functools.cached_property
    def boxes(self):
        """Bounding box (tuple of slices) of each label that is there, found in one pass over the scan."""
        return segmentation.boxes(self.labels)


def read_ct(path):
    """A CT from a NIfTI file, a folder of one DICOM series, or one multi-frame DICOM file.

    Returns:
      hu: (X, Y, Z) float32, axes turned to be nearest to RAS+; oblique axes stay oblique.
      ct_from_index: (4, 4) RAS+ mm of voxel centres.

    Raises:
      InputError: unreadable or damaged files, voxels that are not finite; of DICOM also what `dicom_series.read_series` names.
    """
    path = pathlib.Path(path)
    if path.is_dir() or files.is_dicom(path):
        from data_pipelines.ct import dicom_series  # which brings pydicom, half a second, for one kind of file

        hu, ct_from_index = nifti.to_canonical(*dicom_series.read_series(path))
    else:
        hu, ct_from_index = nifti.read_nifti(path)
    if hu.dtype.kind == "f":
        bad = hu.size - sum(int(np.count_nonzero(np.isfinite(part))) for part in hu)
        if bad:
            errors.fail(path, "voxels", f"{bad} not finite", "finite HU")
    return hu.astype(np.float32, copy=False), ct_from_index


def read_scan(ct_path, mask_path, patient=None, label_map=None):
    """The `Scan` of a CT (NIfTI or DICOM, see `read_ct`) and its label map, stored in any orientation.

    Args:
      patient: an identifier; None: the CT's path.
      label_map: which numbers the mask holds, as `segmentation.read_labels`; None finds out or refuses.

    Raises:
      InputError: as `read_ct` and `segmentation.read_labels`, or different grids.
    """
    # Grids are compared before the label map's voxels are read: it then is no larger than a CT that is there.
    grid = nifti.read_nifti_grid(mask_path)
    hu, ct_from_index = read_ct(ct_path)
    segmentation.check_grid(mask_path, *grid, hu.shape, ct_from_index)
    labels, _ = segmentation.read_labels(mask_path, label_map)
    return Scan(patient or str(ct_path), hu, labels, ct_from_index)


def find_label(scan, label, path):
    """Bounding box of a label, as a tuple of slices.

    Raises:
      InputError: the label is not in the mask.
    """
    box = scan.boxes.get(label)
    if box is None:
        errors.fail(path, "label", sorted(scan.boxes), f"{label} among them")
    return box


def complete_box(scan, label, path):
    """Bounding box of a label whose vertebra the scan shows whole, as a tuple of slices.

    Raises:
      InputError: the label is not in the mask, or its mask touches the scan's border (the vertebra is cut).
    """
    box = find_label(scan, label, path)
    axis = segmentation.border_axis(box, scan.labels.shape)
    if axis is not None:
        found = f"a mask that touches the scan's border on axis {axis}"
        errors.fail(path, f"label {label} ({levels.level_name(label)})", found, "a complete vertebra")
    return box
