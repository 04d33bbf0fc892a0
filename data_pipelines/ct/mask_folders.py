"""A folder with one mask for each structure, as TotalSegmentator writes it, as one label map."""

import pathlib

import numpy as np
from absl import logging

from data_pipelines.ct import numbering
from data_pipelines.io import nifti
from radgs_jax import errors
from radgs_jax import levels

GRID_TOLERANCE_MM = 0.1
"""Largest distance in mm between the corners of a label map's grid and its CT's. Chosen by hand: half may refuse affines rounded on
writing, twice adds as much error to every pose."""
OVERLAP_SHARE = 0.5
"""Share of a mask inside another from which the two are the same vertebra twice. Masks of neighbours share voxels at their facets,
a few percent. At half, coarse masks are refused; at twice, doubles pass."""
_ENDINGS = (".nii.gz", ".nii")


def is_folder(path: pathlib.Path | str) -> bool:
    """Whether a mask's path is a folder."""
    return pathlib.Path(path).is_dir()


def vertebra_files(folder: pathlib.Path | str) -> dict[pathlib.Path, int]:
    """The masks of vertebrae in a folder, from head to feet, and their VerSe numbers. Only names are read.

    Names are TotalSegmentator's ('vertebrae_L1.nii.gz', 'sacrum.nii.gz'); all other files are left out.

    Raises:
      InputError: there is none, or one name occurs twice.
    """
    found: dict[str, pathlib.Path] = {}
    try:
        listed = sorted(pathlib.Path(folder).iterdir())
    except OSError as error:
        errors.fail(folder, "folder", error.strerror, "a readable folder")
    for path in listed:
        ending = next((end for end in _ENDINGS if path.name.endswith(end)), None)
        name = path.name.removesuffix(ending) if ending else ""
        if name not in numbering.VERSE_BY_NAME or not path.is_file():
            continue
        if name in found:
            errors.fail(path, "name", f"also {found[name].name}", "every structure once")
        found[name] = path
    if not any(name.startswith("vertebrae_") for name in found):
        wanted = "masks named as TotalSegmentator names them (vertebrae_L1.nii.gz), or one file with all labels"
        errors.fail(folder, "masks", "no vertebra's" if found else "none", wanted)
    order = {name: levels.ORDER.index(numbering.VERSE_BY_NAME[name]) for name in found}
    return {found[name]: numbering.VERSE_BY_NAME[name] for name in sorted(found, key=lambda name: (order[name], name))}


def read_grid(folder: pathlib.Path | str) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (3,) and affine (4, 4) mm of a folder's masks, axes nearest to RAS+. Voxels are not read.

    Raises:
      InputError: as `vertebra_files`; a mask is damaged or on another grid than the first.
    """
    (first, *others) = vertebra_files(folder)
    shape, affine = nifti.read_nifti_grid(first)
    for path in others:
        check_grid(path, *nifti.read_nifti_grid(path), shape, affine, f"{first.name}'s")
    return shape, affine


def read_values(folder: pathlib.Path | str) -> tuple[np.ndarray, np.ndarray]:
    """The masks of a folder as one label map.

    Masks of what is not in the scan are empty and do no harm. Where two overlap, the one nearer to the feet wins, which is said.

    Returns:
      Labels (X, Y, Z) uint8 in VerSe numbers with axes nearest to RAS+, and their affine (4, 4) in mm.

    Raises:
      InputError: as `read_grid`; a mask has several values, or is for the most part inside another.
    """
    paths = vertebra_files(folder)
    shape, affine = read_grid(folder)
    labels, shared = np.zeros(shape, np.uint8), {}
    for path, number in paths.items():
        values, _ = nifti.read_nifti(path)
        high = values.max()
        if values.min() != 0 and high != 0 or not np.isfinite(high):
            errors.fail(path, "mask", f"values in [{values.min()}, {high}]", "0, and one value in the vertebra")
        inside = values != 0
        size = np.count_nonzero(inside)
        if not size:
            continue
        if (values[inside] != high).any():
            errors.fail(path, "mask", f"several values up to {high}", "0, and one value in the vertebra")
        under = labels[inside]
        counts = np.bincount(under, minlength=256)
        counts[[0, number]] = 0
        other = int(counts.argmax())
        if counts[other] > OVERLAP_SHARE * size:
            found = f"{100 * counts[other] / size:.0f} % inside {levels.level_name(other)}"
            errors.fail(path, "mask", found, "masks of different vertebrae")
        if counts.any():
            shared[levels.level_name(number)] = int(counts.sum())
        labels[inside] = number
    if shared:
        listed = ", ".join(f"{count} voxels of {name}" for name, count in shared.items())
        logging.warning("%s: masks: %s also in a mask further up, taken for the lower vertebra", folder, listed)
    return labels, affine


def check_grid(
    path: pathlib.Path | str,
    shape: tuple[int, ...],
    affine: np.ndarray,
    ct_shape: tuple[int, ...],
    ct_from_index: np.ndarray,
    whose: str = "the CT's",
) -> None:
    """Checks that a label map is on its CT's grid.

    Args:
      path: the label map's file, named in errors.
      shape, affine: (3,) and (4, 4) in mm, of the label map.
      ct_shape, ct_from_index: the same of the CT.
      whose: the grid that is wanted, in words.

    Raises:
      InputError: the shapes differ, or a corner is more than GRID_TOLERANCE_MM away.
    """
    if tuple(shape) != tuple(ct_shape):
        errors.fail(path, "shape in RAS order", tuple(shape), f"{whose} {tuple(ct_shape)}")
    apart = nifti.apart_mm(shape, affine, ct_from_index)
    if apart > GRID_TOLERANCE_MM:
        errors.fail(path, "affine", f"a grid {apart:.2f} mm away from {whose}", f"{whose} grid within 0.1 mm")
