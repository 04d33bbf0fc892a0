"""A CT with its vertebra labels, and one vertebra taken out of it."""

import dataclasses
import functools
import pathlib

import numpy as np
import scipy

from data_pipelines import files
from data_pipelines import segmentation
from radgs_jax import attenuation
from radgs_jax import gaussians

AIR_HU = -1000.0
"""What surrounds a scan in a cube that reaches beyond it."""
FILL_HU = 40.0
"""What fills a vertebra's hole in the rest of the body: muscle."""
END_MM = 60.0
"""How far a scan's end slices are repeated: the body goes on where the scan stops."""
CLOUD_VOXEL_MM = 2.5
"""Voxels that Gaussians are fitted to; their own extent is accounted for."""
BODY_DEPTH = 0.65
"""Of a mask's largest depth: at half of it, the pedicles of a collapsed body still count as body."""
BODY_MM = 2.0
"""Voxels of the rest of the body that poses are refined with."""
PART_MM = 1.0
"""And of the vertebra."""
PART_REACH_MM = 130.0
"""How far along the body rays through a vertebra's window leave its level."""
GRID_SHAPE = (96, 96, 96)
"""The evaluation grid of the case format: 96^3 at 1 mm in CT axes, centred on the vertebra."""

CENTROID_MM = 5.0
"""How far a published centroid may lie outside the box of its mask."""
CUBE_SHAPE = (128, 128, 128)
"""At 1 mm it holds any vertebra with its processes; a lumbar one with long ribs measures 100 mm."""


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
        return segmentation.boxes(self.labels)


def read_ct(path):
    """A CT from a NIfTI file, a folder of one DICOM series, or one multi-frame DICOM file.

    Returns:
      hu: (X, Y, Z) float32, axes turned to be nearest to RAS+; oblique axes stay oblique.
      ct_from_index: (4, 4) RAS+ mm of voxel centres.

    Raises:
      InputError: unreadable or damaged files, voxels that are not finite; of DICOM also what `dicom_ct.read_series` names.
    """
    path = pathlib.Path(path)
    if path.is_dir() or files.is_dicom(path):
        from data_pipelines import dicom_ct  # which brings pydicom, half a second, for one kind of file

        hu, ct_from_index = files.to_canonical(*dicom_ct.read_series(path))
    else:
        hu, ct_from_index = files.read_nifti(path)
    if hu.dtype.kind == "f":
        bad = hu.size - sum(int(np.count_nonzero(np.isfinite(part))) for part in hu)
        if bad:
            files.fail(path, "voxels", f"{bad} not finite", "finite HU")
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
    grid = files.read_nifti_grid(mask_path)
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
        files.fail(path, "label", sorted(scan.boxes), f"{label} among them")
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
        files.fail(path, f"label {label} ({level_name(label)})", found, "a complete vertebra")
    return box


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
    """The `Vertebra` of VerSe number `label`, with `count` Gaussians of its density and at most `points` points.

    Raises:
      InputError: the label is absent, or its mask, whose file is `mask_path`, touches the scan's border (it is cut) or
        lies over nothing but air.
      ValueError: fewer than 27 Gaussians.
    """
    box = complete_box(scan, label, mask_path)
    box = tuple(slice(part.start - 1, part.stop + 1) for part in box)
    mask = scan.labels[box] == label
    density = np.where(mask, attenuation.from_hounsfield(scan.hu[box]), 0.0).astype(np.float32)
    if not density.any():
        files.fail(
            mask_path, f"label {label} ({level_name(label)})", "a mask over nothing but air", "one over its CT's bone"
        )
    ct_from_index = part_from_index(scan.ct_from_index, [s.start for s in box])
    frame = ct_from_box(scan, label, mask_path)
    coarse, coarse_grid = block_average(density, ct_from_index, CLOUD_VOXEL_MM)
    cloud = gaussians.from_density(coarse, np.linalg.inv(frame) @ coarse_grid, count)
    surface = np.argwhere(mask & ~scipy.ndimage.binary_erosion(mask))
    chosen = surface[np.random.default_rng(0).permutation(len(surface))[:points]]
    surface_ct = chosen @ ct_from_index[:3, :3].T + ct_from_index[:3, 3]
    return Vertebra(int(label), density, mask, ct_from_index, frame, cloud, surface_ct)


def part_from_index(ct_from_index, start):
    """The affine (4, 4), mm, of an array's part that begins at voxel `start` (3,), from the whole array's."""
    affine = ct_from_index.copy()
    affine[:3, 3] += ct_from_index[:3, :3] @ np.asarray(start)
    return affine


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
    box = find_label(scan, label, mask_path) if allow_cut else complete_box(scan, label, mask_path)
    voxels = np.argwhere(scan.labels[box] == label) + [s.start for s in box]
    voxels = _apply(scan.ct_from_index, voxels)
    low, high = voxels.min(0), voxels.max(0)
    ct_from_cube = _centred_grid(0.5 * (low + high) if centre is None else np.asarray(centre), shape, spacing_mm)
    half = 0.5 * spacing_mm * np.array(shape)
    middle = ct_from_cube[:3, 3] + half - 0.5 * spacing_mm
    if (low < middle - half).any() or (high > middle + half).any():
        size = " x ".join(f"{n:.0f}" for n in high - low)
        wanted = f"one inside a cube of {' x '.join(f'{n * spacing_mm:g}' for n in shape)} mm round {middle.round(1).tolist()}"
        files.fail(mask_path, f"label {label} ({level_name(label)})", f"a mask of {size} mm that does not fit", wanted)

    native = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)
    coarser = np.sqrt(np.maximum(spacing_mm**2 - native**2, 0.0)) / 2
    softer = np.hypot(coarser, soften_mm)
    # Only the part of the scan that the cube sees through its blur.
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape])).reshape(3, -1).T
    seen = _apply(np.linalg.inv(scan.ct_from_index) @ ct_from_cube, corners)
    margin = np.ceil(4 * softer / native) + 1
    low = np.clip(np.floor(seen.min(0) - margin), 0, np.array(scan.hu.shape) - 1).astype(int)
    high = np.clip(np.ceil(seen.max(0) + margin) + 1, low + 1, scan.hu.shape).astype(int)
    part = tuple(slice(a, b) for a, b in zip(low, high))
    affine = part_from_index(scan.ct_from_index, low)
    hu = scan.hu[part]
    if coarser.any():
        hu = scipy.ndimage.gaussian_filter(hu, coarser / native, mode="nearest")
    mask = scipy.ndimage.gaussian_filter(
        (scan.labels[part] == label).astype(np.float32), softer / native, mode="constant"
    )
    hu = resample(hu, affine, ct_from_cube, shape, outside=AIR_HU)
    occupancy = np.clip(resample(mask, affine, ct_from_cube, shape), 0.0, 1.0)
    return Cube(int(label), hu, occupancy, attenuation.from_hounsfield(hu) * occupancy, ct_from_cube)


def _apply(matrix, points):
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def resample(array, ct_from_index, ct_from_grid, shape, order=1, outside=0.0):
    """An array (X, Y, Z) on another affine grid of the same frame, `outside` where it ends; order 1 trilinear, 0 nearest.

    Args:
      ct_from_index, ct_from_grid: (4, 4) of the array and of the result; shape: the result's, float32.
    """
    index_from_grid = np.linalg.inv(ct_from_index) @ ct_from_grid
    return scipy.ndimage.affine_transform(
        np.asarray(array, np.float32),
        index_from_grid[:3, :3],
        index_from_grid[:3, 3],
        shape,
        order=order,
        mode="constant",
        cval=outside,
    )


def _centred_grid(centre, shape, spacing_mm):
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = centre - 0.5 * spacing_mm * (np.array(shape) - 1)
    return affine


def evaluation_grid(vertebra, centre=None):
    """ct_from_index (4, 4) of the case format's evaluation grid: CT axes, 1 mm, centred on `centre` or the mask's centroid."""
    return _centred_grid(vertebra.ct_from_box[:3, 3] if centre is None else np.asarray(centre), GRID_SHAPE, 1.0)


def _blocks(ct_from_index, spacing_mm):
    """Voxels per block and axis that keep the spacing at or below `spacing_mm` (1 at least)."""
    return np.maximum(1, np.floor(spacing_mm / np.linalg.norm(ct_from_index[:3, :3], axis=0) + 1e-6)).astype(int)


def block_average(array, ct_from_index, spacing_mm):
    """An array (X, Y, Z) averaged over whole blocks of voxels, the last ones filled up with zeros, and its exact affine.

    Args:
      ct_from_index: (4, 4) of the array; spacing_mm: largest side of a block, unless a voxel's is larger.
    Returns:
      float32 array, ct_from_index (4, 4) of it.
    """
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
        self._mu, self.ct_from_index, self._repeat = coarse_body(mu, scan.ct_from_index, spacing_mm)

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


def coarse_body(array, ct_from_index, spacing_mm):
    """A scan's array (X, Y, Z) averaged over blocks (`block_average`), its end slices repeated for END_MM.

    Returns:
      the array, its affine (4, 4) in mm, and how often each end slice was repeated.
    """
    # The last block is filled up with the end slice: filled with air, it would be what is repeated.
    fill = -array.shape[2] % _blocks(ct_from_index, spacing_mm)[2]
    array = np.pad(array, ((0, 0), (0, 0), (0, fill)), mode="edge")
    array, affine = block_average(array, ct_from_index, spacing_mm)
    # The scan axis is the one nearest to the body's length; after reorientation to RAS that is the last one.
    repeat = int(round(END_MM / np.linalg.norm(affine[:3, 2])))
    affine[:3, 3] -= affine[:3, 2] * repeat
    return np.pad(array, ((0, 0), (0, 0), (repeat, repeat)), mode="edge"), affine, repeat


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an X-ray of one vertebra's neighbourhood is made of, for `radgs_jax.refinement`: 1/mm, and affines (4, 4) in mm.

    excess: (X, Y, Z) float16, the vertebra above the muscle that fills its hole; rest: (X', Y', Z') float16, everything else
    within PART_REACH_MM along the body; box_from_*: from voxel indices to the vertebra's frame.
    """

    excess: np.ndarray
    box_from_excess: np.ndarray
    rest: np.ndarray
    box_from_rest: np.ndarray


def moving_parts(whole, vertebra):
    """The `Parts` of a `WholeBody` and one `Vertebra` of its scan, in sizes that few vertebrae differ in."""
    box_from_ct = np.linalg.inv(vertebra.ct_from_box)
    excess, ct_from_excess = block_average(excess_over_fill(vertebra), vertebra.ct_from_index, PART_MM)
    rest, grid = whole.without(vertebra), whole.ct_from_index
    along = np.linalg.norm(grid[:3, 2])
    middle = _apply(np.linalg.inv(grid), vertebra.ct_from_box[None, :3, 3])[0, 2]
    first = max(0, int(middle - PART_REACH_MM / along))
    rest = rest[:, :, first : int(middle + PART_REACH_MM / along) + 2]
    ct_from_rest = part_from_index(grid, [0, 0, first])
    arrays = [np.pad(a, [(0, -n % 16) for n in a.shape]).astype(np.float16) for a in (excess, rest)]
    return Parts(arrays[0], box_from_ct @ ct_from_excess, arrays[1], box_from_ct @ ct_from_rest)


def excess_over_fill(vertebra):
    """Attenuation (X, Y, Z), 1/mm, that a `Vertebra` has above the muscle that fills its hole, on its own grid."""
    fill = attenuation.from_hounsfield(np.array(FILL_HU, np.float32))
    return np.where(vertebra.mask, vertebra.density - fill, 0.0).astype(np.float32)


def centroids(scan):
    """Centres of the vertebral bodies, {label: (3,) CT mm}, one for each label of a scan.

    As VerSe's own they lie in the body, not at the mask's centre of mass, which the arch draws backwards: the centre,
    weighted by depth (mm to the mask's border), of the largest connected part deeper than BODY_DEPTH of the largest depth.
    """
    spacing = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)
    found = {}
    for label, box in scan.boxes.items():
        # A border of one voxel: the mask ends where the scan does.
        depth = scipy.ndimage.distance_transform_edt(np.pad(scan.labels[box] == label, 1), sampling=spacing)
        parts, _ = scipy.ndimage.label(depth > BODY_DEPTH * depth.max())
        largest = np.bincount(parts.ravel())[1:].argmax() + 1
        index = np.array(scipy.ndimage.center_of_mass(np.where(parts == largest, depth, 0.0)))
        found[label] = _apply(scan.ct_from_index, index - 1 + [s.start for s in box])
    return found


def read_centroids(path, scan):
    """Centres from a VerSe centroid JSON, {label: (3,) CT mm}; one that VerSe lacks is NaN and left out.

    VerSe is published in two layouts. By subject, an entry `direction` has the axis codes of the label map as it was stored,
    and coordinates are its voxels; `scan` is that label map's scan, in whatever order its file is stored now. The
    challenge's files have no such entry: coordinates are mm on a 1 mm scan with the same centre, on axes documented once as
    P, I, R and once as I, P, L; the reading that meets the masks is taken.

    Raises:
      InputError: unreadable JSON, missing or mistyped fields, axis codes that are none, a label given twice, or a point more
        than CENTROID_MM outside the box of its mask.
    """
    entries = files.read_json(path, nan=True)
    if not isinstance(entries, list) or not entries:
        files.fail(path, "content", repr(entries)[:60], "a list of objects with label, X, Y, Z")
    readings, points = [], {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            files.fail(path, f"[{number}]", repr(entry)[:60], "an object with label, X, Y, Z")
        if "direction" in entry:
            readings.append((_axis_codes(path, entry["direction"]), False))
            continue
        label = entry.get("label", "nothing")
        values = [entry.get(axis, "nothing") for axis in "XYZ"]
        if type(label) not in (int, float) or not 1 <= label <= 255 or label != int(label):
            files.fail(path, f"[{number}].label", repr(label)[:60], "a whole number from 1 to 255")
        if int(label) in points:
            files.fail(path, f"[{number}].label", f"{label} a second time", "each label once")
        for axis, value in zip("XYZ", values):
            if type(value) not in (int, float):
                files.fail(path, f"[{number}].{axis}", repr(value)[:60], "a number")
        if not np.isnan(values).any():
            points[int(label)] = np.array(values, np.float64)
    # Both at once would be two files in one; the first says how it is meant.
    readings = readings[:1] or [("PIR", True), ("IPL", True)]
    found = [{label: _ct_point(p, *reading, scan) for label, p in points.items()} for reading in readings]
    best = min(found, key=lambda places: sum(_outside_mm(places, scan).values()))
    for label, distance in _outside_mm(best, scan).items():
        if distance > CENTROID_MM:
            wanted = f"{CENTROID_MM:.0f} mm at most"
            files.fail(path, f"label {label}", f"a point {distance:.0f} mm off its mask", wanted)
    return best


def _axis_codes(path, direction):
    axes = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
    if (
        not isinstance(direction, list)
        or not all(isinstance(code, str) and code in axes for code in direction)
        or sorted(axes[code] for code in direction) != [0, 1, 2]
    ):
        files.fail(path, "direction", repr(direction)[:60], "three axis codes such as ['P', 'I', 'R']")
    return direction


def _ct_point(point, direction, millimetres, scan):
    """CT mm of a point in stored voxels along `direction`, or in mm of a 1 mm scan there that shares the centre."""
    from_stored = _index_from_stored(direction, scan.labels.shape)
    if millimetres:
        axes = np.abs(from_stored[:3, :3]).argmax(0)
        sizes = np.array(scan.labels.shape)[axes]
        spacing = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)[axes]
        point = (point - 0.5 * (np.rint(sizes * spacing) - 1)) / spacing + 0.5 * (sizes - 1)
    return _apply(scan.ct_from_index @ from_stored, point)


def _outside_mm(points, scan):
    """How far each point (CT mm) lies outside of its label's bounding box, mm."""
    spacing = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)
    index_from_ct = np.linalg.inv(scan.ct_from_index)
    distances = {}
    for label in sorted(set(points) & set(scan.boxes)):
        index = _apply(index_from_ct, points[label])
        first = np.array([part.start for part in scan.boxes[label]])
        last = np.array([part.stop - 1 for part in scan.boxes[label]])
        beyond = np.maximum(0, np.maximum(first - index, index - last))
        distances[label] = float(np.linalg.norm(beyond * spacing))
    return distances


def _index_from_stored(direction, shape):
    """(4, 4) from voxel indices along the axis codes `direction` to those in RAS order, of an array of RAS shape `shape`."""
    import nibabel

    orientation = nibabel.orientations.axcodes2ornt(direction)
    stored_shape = [shape[int(axis)] for axis in orientation[:, 0]]
    return np.linalg.inv(nibabel.orientations.inv_ornt_aff(orientation, stored_shape))
