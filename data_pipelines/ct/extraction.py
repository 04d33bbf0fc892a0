"""One vertebra out of a scan: its frame, density, mask, surface points and Gaussians."""

import dataclasses

import numpy as np
import scipy

from data_pipelines.ct import scans
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax import gaussians
from radgs_jax import levels
from radgs_jax.geometry import resample
from radgs_jax.registration import prepared

CLOUD_VOXEL_MM = 2.5
"""Voxels that Gaussians are fitted to; their own extent is accounted for."""
CUBE_SHAPE = (128, 128, 128)
"""At 1 mm it holds any vertebra with its processes; a lumbar one with long ribs measures 100 mm."""


def _centroid(scan, label):
    box = scan.boxes.get(label)
    if box is None:
        return None
    index = np.argwhere(scan.labels[box] == label).mean(0) + [s.start for s in box]
    return scan.ct_from_index[:3, :3] @ index + scan.ct_from_index[:3, 3]


def ct_from_box(scan, label, path="mask"):
    """The vertebra's own frame (4, 4): origin at the mask's centroid, +z along the spine to the head, +x to the right.

    The spine's direction is taken from the neighbours' centroids; where none is labelled the CT's axes stand in. CT mm.

    Raises:
      InputError: the label is not in the mask, whose file is `path`.
    """
    scans.find_label(scan, label, path)
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


def extract(scan, label, count, mask_path="mask", points=500):
    """The `Vertebra` of VerSe number `label`, with `count` Gaussians of its density and at most `points` points.

    Raises:
      InputError: the label is absent, or its mask, whose file is `mask_path`, touches the scan's border (it is cut) or
        lies over nothing but air.
      ValueError: fewer than 27 Gaussians.
    """
    box = scans.complete_box(scan, label, mask_path)
    box = tuple(slice(part.start - 1, part.stop + 1) for part in box)
    mask = scan.labels[box] == label
    density = np.where(mask, attenuation.from_hounsfield(scan.hu[box]), 0.0).astype(np.float32)
    if not density.any():
        errors.fail(
            mask_path,
            f"label {label} ({levels.level_name(label)})",
            "a mask over nothing but air",
            "one over its CT's bone",
        )
    ct_from_index = resample.part_from_index(scan.ct_from_index, [s.start for s in box])
    frame = ct_from_box(scan, label, mask_path)
    coarse, coarse_grid = resample.block_average(density, ct_from_index, CLOUD_VOXEL_MM)
    cloud = gaussians.from_density(coarse, np.linalg.inv(frame) @ coarse_grid, count)
    surface = np.argwhere(mask & ~scipy.ndimage.binary_erosion(mask))
    chosen = surface[np.random.default_rng(0).permutation(len(surface))[:points]]
    surface_ct = chosen @ ct_from_index[:3, :3].T + ct_from_index[:3, 3]
    return prepared.Vertebra(int(label), density, mask, ct_from_index, frame, cloud, surface_ct)


@dataclasses.dataclass(frozen=True)
class Cube:
    """One vertebra on a grid of its own, along the CT's RAS axes.

    hu: (X, Y, Z) float32, with everything round the vertebra; air where the scan ends.
    occupancy: (X, Y, Z) float32 in [0, 1], the share of the vertebra: its mask blurred by a Gaussian, so 0.5 at a flat
      border, and in sum the mask's volume.
    density: (X, Y, Z) float32, 1/mm: attenuation of `hu` times `occupancy`.
    ct_from_index: (4, 4), voxel centres.
    """

    label: int
    hu: np.ndarray
    occupancy: np.ndarray
    density: np.ndarray
    ct_from_index: np.ndarray


def vertebra_cube(
    scan, label, spacing_mm=1.0, shape=CUBE_SHAPE, soften_mm=0.7, centre=None, allow_cut=False, mask_path="mask"
):
    """Resamples a scan to a cube round one vertebra.

    Where the cube is coarser than the scan, both HU and mask are first blurred along the scan's axes by a Gaussian of
    standard deviation sqrt(spacing^2 - scan spacing^2) / 2, which leaves 29 % of what would just begin to alias.

    Args:
      spacing_mm, shape: of the cube; the default holds the widest lumbar vertebra.
      soften_mm: standard deviation of the Gaussian that softens the mask.
      centre: (3,) CT mm of the cube's middle; None: the middle of the mask's extent.
      allow_cut: takes a vertebra that the scan's border cuts.

    Returns:
      A `Cube`.

    Raises:
      InputError: the label is absent; its mask touches the scan's border; it does not fit into the cube.
    """
    box = scans.find_label(scan, label, mask_path) if allow_cut else scans.complete_box(scan, label, mask_path)
    voxels = np.argwhere(scan.labels[box] == label) + [s.start for s in box]
    voxels = resample.apply_affine(scan.ct_from_index, voxels)
    low, high = voxels.min(0), voxels.max(0)
    ct_from_cube = resample.centred_affine(
        0.5 * (low + high) if centre is None else np.asarray(centre), shape, spacing_mm
    )
    half = 0.5 * spacing_mm * np.array(shape)
    middle = ct_from_cube[:3, 3] + half - 0.5 * spacing_mm
    if (low < middle - half).any() or (high > middle + half).any():
        size = " x ".join(f"{n:.0f}" for n in high - low)
        wanted = f"one inside a cube of {' x '.join(f'{n * spacing_mm:g}' for n in shape)} mm round {middle.round(1).tolist()}"
        errors.fail(
            mask_path, f"label {label} ({levels.level_name(label)})", f"a mask of {size} mm that does not fit", wanted
        )

    native = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)
    coarser = np.sqrt(np.maximum(spacing_mm**2 - native**2, 0.0)) / 2
    softer = np.hypot(coarser, soften_mm)
    # Only the part of the scan that the cube sees through its blur.
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape])).reshape(3, -1).T
    seen = resample.apply_affine(np.linalg.inv(scan.ct_from_index) @ ct_from_cube, corners)
    margin = np.ceil(4 * softer / native) + 1
    low = np.clip(np.floor(seen.min(0) - margin), 0, np.array(scan.hu.shape) - 1).astype(int)
    high = np.clip(np.ceil(seen.max(0) + margin) + 1, low + 1, scan.hu.shape).astype(int)
    part = tuple(slice(a, b) for a, b in zip(low, high))
    affine = resample.part_from_index(scan.ct_from_index, low)
    hu = scan.hu[part]
    if coarser.any():
        hu = scipy.ndimage.gaussian_filter(hu, coarser / native, mode="nearest")
    mask = scipy.ndimage.gaussian_filter(
        (scan.labels[part] == label).astype(np.float32), softer / native, mode="constant"
    )
    hu = resample.resample(hu, affine, ct_from_cube, shape, outside=scans.AIR_HU)
    occupancy = np.clip(resample.resample(mask, affine, ct_from_cube, shape), 0.0, 1.0)
    return Cube(int(label), hu, occupancy, attenuation.from_hounsfield(hu) * occupancy, ct_from_cube)
