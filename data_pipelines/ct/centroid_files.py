"""Centres of vertebral bodies: computed from masks, and read from published JSON files."""

import pathlib

import numpy as np
import scipy

from data_pipelines.ct import scans
from data_pipelines.io import files
from radgs_jax import errors
from radgs_jax.geometry import resample

BODY_DEPTH = 0.65
"""Depth, as a fraction of a mask's largest depth, above which voxels belong to the vertebral body. Chosen by hand: at half of the
largest depth, the pedicles of a collapsed body still count; nearer to 1 only a point remains."""

CENTROID_MM = 5.0
"""Largest distance in mm of a published centroid from the bounding box of its mask. Chosen by hand: half refuses rounded centroids
of small masks, twice lets axes be mixed up in small vertebrae."""


def centroids(scan: scans.Scan) -> dict[int, np.ndarray]:
    """Centres of the vertebral bodies, (3,) in CT mm, by label.

    Like those of VerSe, they lie in the body. The mask's centre of mass lies further back, because of the arch. A centre is the
    mean, weighted by depth (distance to the mask's border in mm), of the largest connected part that is deeper than BODY_DEPTH.
    """
    spacing = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)
    found = {}
    for label, box in scan.boxes.items():
        # Padded by one voxel, so that the scan's border is a border of the mask.
        depth = scipy.ndimage.distance_transform_edt(np.pad(scan.labels[box] == label, 1), sampling=spacing)
        parts, _ = scipy.ndimage.label(depth > BODY_DEPTH * depth.max())
        largest = np.bincount(parts.ravel())[1:].argmax() + 1
        index = np.array(scipy.ndimage.center_of_mass(np.where(parts == largest, depth, 0.0)))
        found[label] = resample.apply_affine(scan.ct_from_index, index - 1 + [s.start for s in box])
    return found


def read_centroids(path: pathlib.Path | str, scan: scans.Scan) -> dict[int, np.ndarray]:
    """Centres from a VerSe centroid file, (3,) in CT mm, by label. VerSe writes NaN for unknown ones; they are left out.

    VerSe is published in two layouts. In the layout by subject, the entry `direction` holds the axis codes of the label map
    when the file was made, and coordinates are voxel indices along them. Files of the challenge have no such entry:
    coordinates are mm on a 1 mm scan with the same centre, on axes that are documented once as P, I, R and once as I, P, L.
    The interpretation that is nearer to the masks is used.

    Args:
      path: the JSON file.
      scan: the scan of the label map, stored along any axes.

    Raises:
      InputError: the JSON is unreadable, a field is missing or mistyped, axis codes are invalid, a label occurs twice, or a
        point is more than CENTROID_MM outside the bounding box of its mask.
    """
    entries = files.read_json(path, nan=True)
    if not isinstance(entries, list) or not entries:
        errors.fail(path, "content", repr(entries)[:60], "a list of objects with label, X, Y, Z")
    readings, points = [], {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            errors.fail(path, f"[{number}]", repr(entry)[:60], "an object with label, X, Y, Z")
        if "direction" in entry:
            readings.append((_axis_codes(path, entry["direction"]), False))
            continue
        label = entry.get("label", "nothing")
        values = [entry.get(axis, "nothing") for axis in "XYZ"]
        if type(label) not in (int, float) or not 1 <= label <= 255 or label != int(label):
            errors.fail(path, f"[{number}].label", repr(label)[:60], "a whole number from 1 to 255")
        if int(label) in points:
            errors.fail(path, f"[{number}].label", f"{label} a second time", "each label once")
        for axis, value in zip("XYZ", values):
            if type(value) not in (int, float) or abs(value) > files.REACH_MM:
                errors.fail(path, f"[{number}].{axis}", repr(value)[:60], f"a number, {files.REACH_MM:g} at most")
        if not np.isnan(values).any():
            points[int(label)] = np.array(values, np.float64)
    # With several direction entries, the first one counts.
    readings = readings[:1] or [("PIR", True), ("IPL", True)]
    found = [{label: _ct_point(p, *reading, scan) for label, p in points.items()} for reading in readings]
    best = min(found, key=lambda places: sum(_outside_mm(places, scan).values()))
    for label, distance in _outside_mm(best, scan).items():
        if distance > CENTROID_MM:
            wanted = f"{CENTROID_MM:.0f} mm at most"
            errors.fail(path, f"label {label}", f"a point {distance:.0f} mm off its mask", wanted)
    return best


def _axis_codes(path, direction):
    axes = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
    if (
        not isinstance(direction, list)
        or not all(isinstance(code, str) and code in axes for code in direction)
        or sorted(axes[code] for code in direction) != [0, 1, 2]
    ):
        errors.fail(path, "direction", repr(direction)[:60], "three axis codes such as ['P', 'I', 'R']")
    return direction


def _ct_point(point, direction, millimetres, scan):
    """A point in CT mm. It is given along `direction`, in voxels, or in mm on a 1 mm scan with the same centre."""
    from_stored = _index_from_stored(direction, scan.labels.shape)
    if millimetres:
        axes = np.abs(from_stored[:3, :3]).argmax(0)
        sizes = np.array(scan.labels.shape)[axes]
        spacing = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)[axes]
        point = (point - 0.5 * (np.rint(sizes * spacing) - 1)) / spacing + 0.5 * (sizes - 1)
    return resample.apply_affine(scan.ct_from_index @ from_stored, point)


def _outside_mm(points, scan):
    """Distance in mm of each point (CT mm) from the bounding box of its label; 0 inside."""
    spacing = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)
    index_from_ct = np.linalg.inv(scan.ct_from_index)
    distances = {}
    for label in sorted(set(points) & set(scan.boxes)):
        index = resample.apply_affine(index_from_ct, points[label])
        first = np.array([part.start for part in scan.boxes[label]])
        last = np.array([part.stop - 1 for part in scan.boxes[label]])
        beyond = np.maximum(0, np.maximum(first - index, index - last))
        distances[label] = float(np.linalg.norm(beyond * spacing))
    return distances


def _index_from_stored(direction, shape):
    """(4, 4) from voxel indices along the axis codes `direction` to RAS order; `shape` is the array's shape in RAS order."""
    import nibabel

    orientation = nibabel.orientations.axcodes2ornt(direction)
    stored_shape = [shape[int(axis)] for axis in orientation[:, 0]]
    return np.linalg.inv(nibabel.orientations.inv_ornt_aff(orientation, stored_shape))
