"""Extraction of one vertebra from a scan: its frame, density, mask, surface points and Gaussians."""

import collections.abc
import dataclasses
import pathlib

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
"""Voxel side in mm of the density that Gaussians are fitted to. Chosen by hand: half costs eight times the voxels, twice loses
the cortex and the processes. `gaussians.from_density` accounts for the extent of the voxels themselves."""
CUBE_SHAPE = (128, 128, 128)
"""Voxels of a cube: at 1 mm it holds any vertebra with its processes. A lumbar vertebra with long ribs measures 100 mm, so half is
too small for lumbar vertebrae, and twice takes eight times the memory."""
MAX_SURFACE_POINTS = 500
"""Surface points of a vertebra. Chosen by hand: half makes distances to the surface coarser, twice doubles their cost."""
MASK_SOFTENING_MM = 0.7
"""Standard deviation in mm of the Gaussian that softens a cube's mask. Chosen by hand: half leaves the voxel steps of the mask
visible, twice blurs thin processes away."""
MIN_SPINE_MM = 1.0
"""Distance in mm between neighbouring centroids below which they give no direction of the spine. Chosen by hand, well below the
distance between any two vertebrae; not sensitive."""


def _direction(label, present):
    """The labels above and below that give a vertebra's direction, or None for either.

    L5 and the sacrum do not count for each other: the centre of the sacrum lies so far behind that the line to it is tilted by tens
    of degrees against L5's own axis.
    """
    above, below = levels.above(label, present), levels.below(label, present)
    return (
        None if (above, label) == (levels.L5, levels.SACRUM) else above,
        None if (label, below) == (levels.L5, levels.SACRUM) else below,
    )


def _centroid(scan, label):
    box = scan.boxes.get(label)
    if box is None:
        return None
    index = np.argwhere(scan.labels[box] == label).mean(0) + [s.start for s in box]
    return scan.ct_from_index[:3, :3] @ index + scan.ct_from_index[:3, 3]


def ct_from_box(scan: scans.Scan, label: int, path: pathlib.Path | str = "mask") -> np.ndarray:
    """The vertebra's frame (4, 4) in CT mm: origin at the mask's centroid, +z along the spine to the head, +x to the right.

    The centroids of the neighbours give the direction of the spine. Without labelled neighbours it is the CT's z axis.

    Args:
      scan: the scan.
      label: VerSe number.
      path: the label map's file, named in errors.

    Raises:
      InputError: the label is not in the mask.
    """
    scans.find_label(scan, label, path)
    centre = _centroid(scan, label)
    above, below = (_centroid(scan, other) for other in _direction(label, scan.boxes))
    up = (above if above is not None else centre) - (below if below is not None else centre)
    z = np.array([0.0, 0, 1]) if np.linalg.norm(up) < MIN_SPINE_MM else up / np.linalg.norm(up)
    y = np.cross(z, [1.0, 0, 0])
    y /= np.linalg.norm(y)
    frame = np.eye(4)
    frame[:3, :3] = np.stack([np.cross(y, z), y, z], 1)
    frame[:3, 3] = centre
    return frame


def extract(
    scan: scans.Scan,
    label: int,
    count: int,
    mask_path: pathlib.Path | str = "mask",
    points: int = MAX_SURFACE_POINTS,
) -> prepared.Vertebra:
    """Extracts one vertebra.

    Args:
      scan: the scan.
      label: VerSe number.
      count: number of Gaussians that represent its density.
      mask_path: the label map's file, named in errors.
      points: maximum number of surface points.

    Raises:
      InputError: the label is absent, or its mask touches the scan's border (the vertebra is cut) or covers only air.
      ValueError: `count` is below 27.
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
    """One vertebra, resampled to a grid along the CT's RAS axes.

    Attributes:
      label: VerSe number.
      hu: (X, Y, Z) float32, including the surroundings; air outside the scan.
      occupancy: (X, Y, Z) float32 in [0, 1], the mask blurred by a Gaussian: 0.5 at a flat border, and its sum is the volume
        of the mask.
      density: (X, Y, Z) float32 in 1/mm, attenuation of `hu` times `occupancy`.
      ct_from_index: (4, 4) in mm, of voxel centres.
    """

    label: int
    hu: np.ndarray
    occupancy: np.ndarray
    density: np.ndarray
    ct_from_index: np.ndarray


def vertebra_cube(
    scan: scans.Scan,
    label: int,
    spacing_mm: float = 1.0,
    shape: tuple[int, int, int] = CUBE_SHAPE,
    soften_mm: float = MASK_SOFTENING_MM,
    centre: np.ndarray | collections.abc.Sequence[float] | None = None,
    allow_cut: bool = False,
    mask_path: pathlib.Path | str = "mask",
) -> Cube:
    """Resamples a scan to a cube around one vertebra.

    If the cube is coarser than the scan, HU and mask are first blurred along the scan's axes by a Gaussian of standard
    deviation sqrt(spacing^2 - scan spacing^2) / 2. It attenuates the cube's Nyquist frequency to 29 %.

    Args:
      scan: the scan.
      label: VerSe number.
      spacing_mm: voxel side of the cube in mm.
      shape: number of voxels of the cube along each axis.
      soften_mm: standard deviation in mm of the Gaussian that softens the mask.
      centre: (3,) centre of the cube in CT mm. None: the middle of the mask's extent.
      allow_cut: accept a vertebra that is cut by the scan's border.
      mask_path: the label map's file, named in errors.

    Raises:
      InputError: the label is absent, its mask touches the scan's border, or it does not fit into the cube.
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
    # Crop the scan to the cube plus four standard deviations of the blur.
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape])).reshape(3, -1).T
    seen = resample.apply_affine(np.linalg.inv(scan.ct_from_index) @ ct_from_cube, corners)
    margin = np.ceil(4 * softer / native) + 1
    low = np.clip(np.floor(seen.min(0) - margin), 0, np.array(scan.hu.shape) - 1).astype(int)
    high = np.clip(np.ceil(seen.max(0) + margin) + 1, low + 1, scan.hu.shape).astype(int)
    part = tuple(slice(a, b) for a, b in zip(low, high))
    affine = resample.part_from_index(scan.ct_from_index, low)
    hu = np.asarray(scan.hu[part], np.float32)
    if coarser.any():
        hu = scipy.ndimage.gaussian_filter(hu, coarser / native, mode="nearest")
    mask = scipy.ndimage.gaussian_filter(
        (scan.labels[part] == label).astype(np.float32), softer / native, mode="constant"
    )
    hu = resample.resample(hu, affine, ct_from_cube, shape, outside=scans.AIR_HU)
    occupancy = np.clip(resample.resample(mask, affine, ct_from_cube, shape), 0.0, 1.0)
    return Cube(int(label), hu, occupancy, attenuation.from_hounsfield(hu) * occupancy, ct_from_cube)
