"""A CT with its vertebra labels, and one vertebra taken out of it."""

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from data_pipelines import files
from radgs_jax import attenuation
from radgs_jax import gaussians

FILL_HU = 40.0
"""What fills a vertebra's hole in the rest of the body: muscle."""
END_MM = 60.0
"""How far a scan's end slices are repeated: the body goes on where the scan stops."""
CLOUD_VOXEL_MM = 2.5
"""Voxels that Gaussians are fitted to; their own extent is accounted for."""
GRID_SHAPE = (96, 96, 96)
"""The evaluation grid of the case format: 96^3 at 1 mm in CT axes, centred on the vertebra."""


def level_name(label):
    """VerSe label -> name, such as 20 -> 'L1'."""
    for first, last, letter in ((1, 7, "C"), (8, 19, "T"), (20, 25, "L")):
        if first <= label <= last:
            return f"{letter}{label - first + 1}"
    return {26: "sacrum", 28: "T13"}.get(label, f"label {label}")


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
        return {i + 1: box for i, box in enumerate(ndimage.find_objects(self.labels)) if box is not None}


def read_scan(ct_path, mask_path, patient=None):
    """Reads a CT and its label map in any orientation.

    Raises:
      InputError: unreadable files, different grids, non-finite HU, labels that are not whole numbers.
    """
    hu, ct_from_index = files.read_nifti(ct_path)
    labels, mask_affine = files.read_nifti(mask_path)
    if hu.dtype.kind not in "iuf":
        files.fail(ct_path, "voxel type", hu.dtype, "real numbers (HU)")
    if hu.shape != labels.shape:
        files.fail(mask_path, "shape in RAS order", labels.shape, f"the CT's {hu.shape}")
    corners = (
        np.array([[0, 0, 0], np.array(hu.shape) - 1]) @ (ct_from_index - mask_affine)[:3, :3].T
        + (ct_from_index - mask_affine)[:3, 3]
    )
    if np.abs(corners).max() > 0.1:
        files.fail(
            mask_path,
            "affine",
            f"a grid {np.abs(corners).max():.2f} mm away from the CT's",
            "the CT's grid within 0.1 mm",
        )
    bad = np.count_nonzero(~np.isfinite(hu))
    if bad:
        files.fail(ct_path, "voxels", f"{bad} not finite", "finite HU")
    if not np.isfinite(labels).all() or (labels != np.rint(labels)).any() or labels.min() < 0 or labels.max() > 255:
        files.fail(mask_path, "labels", f"values in [{labels.min()}, {labels.max()}]", "whole numbers 0 to 255")
    return Scan(patient or str(ct_path), hu.astype(np.float32), labels.astype(np.uint8), ct_from_index)


def find_label(scan, label, path):
    """Bounding box of a label, as a tuple of slices.

    Raises:
      InputError: the label is not in the mask.
    """
    box = scan.boxes.get(label)
    if box is None:
        files.fail(path, "label", sorted(scan.boxes), f"{label} among them")
    return box


def _centroid(scan, label):
    box = scan.boxes.get(label)
    if box is None:
        return None
    index = np.argwhere(scan.labels[box] == label).mean(0) + [s.start for s in box]
    return scan.ct_from_index[:3, :3] @ index + scan.ct_from_index[:3, 3]


def ct_from_box(scan, label, path="mask"):
    """The vertebra's own frame (4, 4): origin at the mask's centroid, +z along the spine to the head, +x to the right.

    The spine's direction is taken from the neighbours' centroids; where none is labelled the CT's axes stand in.
    """
    find_label(scan, label, path)
    centre = _centroid(scan, label)
    above, below = _centroid(scan, label - 1), _centroid(scan, label + 1)
    up = (above if above is not None else centre) - (below if below is not None else centre)
    z = np.array([0.0, 0, 1]) if np.linalg.norm(up) < 1.0 else up / np.linalg.norm(up)
    y = np.cross(z, [1.0, 0, 0])
    y /= np.linalg.norm(y)
    frame = np.eye(4)
    frame[:3, :3] = np.stack([np.cross(y, z), y, z], 1)
    frame[:3, 3] = centre
    return frame


@dataclasses.dataclass(frozen=True)
class Vertebra:
    """One vertebra of a scan.

    density: (X, Y, Z) attenuation inside the mask, 0 elsewhere, 1/mm, on a crop of the scan's own grid;
    mask: (X, Y, Z) bool; ct_from_index: (4, 4) of that crop; ct_from_box: (4, 4) the vertebra's frame;
    cloud: its Gaussians in the box frame; points: (P, 3) CT mm, on its surface.
    """

    label: int
    density: np.ndarray
    mask: np.ndarray
    ct_from_index: np.ndarray
    ct_from_box: np.ndarray
    cloud: gaussians.Gaussians
    points: np.ndarray


def extract(scan, label, count, mask_path="mask", points=500):
    """Takes the vertebra `label` out of a scan, with `count` Gaussians of its density.

    Raises:
      InputError: the label is absent, or its mask touches the scan's border (the vertebra is cut).
    """
    box = find_label(scan, label, mask_path)
    for axis, part in enumerate(box):
        if part.start == 0 or part.stop == scan.labels.shape[axis]:
            files.fail(
                mask_path,
                f"label {label} ({level_name(label)})",
                f"a mask that touches the scan's border on axis {axis}",
                "a complete vertebra",
            )
    box = tuple(slice(part.start - 1, part.stop + 1) for part in box)
    mask = scan.labels[box] == label
    density = np.where(mask, attenuation.from_hounsfield(scan.hu[box]), 0.0).astype(np.float32)
    ct_from_index = scan.ct_from_index.copy()
    ct_from_index[:3, 3] += scan.ct_from_index[:3, :3] @ [s.start for s in box]
    frame = ct_from_box(scan, label, mask_path)
    coarse, coarse_grid = block_average(density, ct_from_index, CLOUD_VOXEL_MM)
    cloud = gaussians.from_density(coarse, np.linalg.inv(frame) @ coarse_grid, count)
    surface = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    chosen = surface[np.random.default_rng(0).permutation(len(surface))[:points]]
    surface_ct = chosen @ ct_from_index[:3, :3].T + ct_from_index[:3, 3]
    return Vertebra(int(label), density, mask, ct_from_index, frame, cloud, surface_ct)


def resample(array, ct_from_index, ct_from_grid, shape, order=1):
    """`array` on another affine grid of the same frame, 0 outside; order 1 trilinear, 0 nearest."""
    index_from_grid = np.linalg.inv(ct_from_index) @ ct_from_grid
    return ndimage.affine_transform(
        np.asarray(array, np.float32),
        index_from_grid[:3, :3],
        index_from_grid[:3, 3],
        shape,
        order=order,
        mode="constant",
        cval=0.0,
    )


def evaluation_grid(vertebra, centre=None):
    """ct_from_index (4, 4) of the case format's evaluation grid: CT axes, 1 mm, centred on `centre` or the mask's centroid."""
    affine = np.eye(4)
    affine[:3, 3] = (vertebra.ct_from_box[:3, 3] if centre is None else np.asarray(centre)) - 0.5 * (
        np.array(GRID_SHAPE) - 1
    )
    return affine


def _blocks(ct_from_index, spacing_mm):
    """Voxels per block and axis that keep the spacing at or below `spacing_mm` (1 at least)."""
    return np.maximum(1, np.floor(spacing_mm / np.linalg.norm(ct_from_index[:3, :3], axis=0) + 1e-6)).astype(int)


def block_average(array, ct_from_index, spacing_mm):
    """`array` averaged over whole blocks of voxels, the last ones filled up with zeros, and its exact affine."""
    factor = _blocks(ct_from_index, spacing_mm)
    padded = np.pad(array, [(0, -n % f) for n, f in zip(array.shape, factor)])
    shape = np.array(padded.shape) // factor
    blocks = padded.reshape(shape[0], factor[0], shape[1], factor[1], shape[2], factor[2])
    affine = ct_from_index.copy()
    affine[:3, :3] = ct_from_index[:3, :3] * factor
    affine[:3, 3] = ct_from_index[:3, 3] + ct_from_index[:3, :3] @ (0.5 * (factor - 1))
    return blocks.mean((1, 3, 5), dtype=np.float32), affine


class WholeBody:
    """A scan's attenuation on a coarser grid, its end slices repeated for 60 mm, from which single vertebrae can be taken.

    Averaging is linear, so taking a vertebra out costs a small patch, not a pass over the scan.
    """

    def __init__(self, scan, spacing_mm):
        self._spacing_mm, self._grid = spacing_mm, scan.ct_from_index
        mu = attenuation.from_hounsfield(scan.hu)
        # The last block is filled up with the end slice: filled with air, it would be what END_MM repeats.
        fill = -mu.shape[2] % _blocks(scan.ct_from_index, spacing_mm)[2]
        mu = np.pad(mu, ((0, 0), (0, 0), (0, fill)), mode="edge")
        mu, affine = block_average(mu, scan.ct_from_index, spacing_mm)
        self._mu, self.ct_from_index, self._repeat = _extend_ends(mu, affine)

    def without(self, vertebra):
        """Attenuation (X, Y, Z) in 1/mm on the grid `ct_from_index`, muscle in the vertebra's place."""
        factor = _blocks(self._grid, self._spacing_mm)
        start = np.linalg.solve(self._grid[:3, :3], vertebra.ct_from_index[:3, 3] - self._grid[:3, 3])
        start = np.rint(start).astype(int)
        first = start // factor
        padded = np.pad(excess_over_fill(vertebra), [(int(n), 0) for n in start - first * factor])
        patch, _ = block_average(padded, self._grid, self._spacing_mm)
        rest = self._mu.copy()
        first[2] += self._repeat
        rest[tuple(slice(a, a + n) for a, n in zip(first, patch.shape))] -= patch
        return rest


def _extend_ends(mu, ct_from_index):
    # The scan axis is the one nearest to the body's length; after reorientation to RAS that is the last one.
    repeat = int(round(END_MM / np.linalg.norm(ct_from_index[:3, 2])))
    affine = ct_from_index.copy()
    affine[:3, 3] -= affine[:3, 2] * repeat
    return np.pad(mu, ((0, 0), (0, 0), (repeat, repeat)), mode="edge"), affine, repeat


def excess_over_fill(vertebra):
    """Attenuation (X, Y, Z) that the vertebra has above the muscle that fills its hole, on its own grid."""
    fill = attenuation.from_hounsfield(np.array(FILL_HU, np.float32))
    return np.where(vertebra.mask, vertebra.density - fill, 0.0).astype(np.float32)
