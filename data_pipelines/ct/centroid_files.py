"""Vertebra centres: computed from masks, and read from published JSON files."""

import numpy as np
import scipy

from data_pipelines.io import files
from radgs_jax import errors
from radgs_jax.geometry import resample

BODY_DEPTH = 0.65
"""Of a mask's largest depth: at half of it, the pedicles of a collapsed body still count as body."""

CENTROID_MM = 5.0
"""How far a published centroid may lie outside the box of its mask."""


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
        found[label] = resample.apply_affine(scan.ct_from_index, index - 1 + [s.start for s in box])
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
            if type(value) not in (int, float):
                errors.fail(path, f"[{number}].{axis}", repr(value)[:60], "a number")
        if not np.isnan(values).any():
            points[int(label)] = np.array(values, np.float64)
    # Both at once would be two files in one; the first says how it is meant.
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
    """CT mm of a point in stored voxels along `direction`, or in mm of a 1 mm scan there that shares the centre."""
    from_stored = _index_from_stored(direction, scan.labels.shape)
    if millimetres:
        axes = np.abs(from_stored[:3, :3]).argmax(0)
        sizes = np.array(scan.labels.shape)[axes]
        spacing = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)[axes]
        point = (point - 0.5 * (np.rint(sizes * spacing) - 1)) / spacing + 0.5 * (sizes - 1)
    return resample.apply_affine(scan.ct_from_index @ from_stored, point)


def _outside_mm(points, scan):
    """How far each point (CT mm) lies outside of its label's bounding box, mm."""
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
    """(4, 4) from voxel indices along the axis codes `direction` to those in RAS order, of an array of RAS shape `shape`."""
    import nibabel

    orientation = nibabel.orientations.axcodes2ornt(direction)
    stored_shape = [shape[int(axis)] for axis in orientation[:, 0]]
    return np.linalg.inv(nibabel.orientations.inv_ornt_aff(orientation, stored_shape))
