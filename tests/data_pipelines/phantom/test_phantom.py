"""The procedural spine phantom: determinism, anatomy of the labels, and the VerSe files."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.phantom import anatomy
from data_pipelines.phantom import generate
from data_pipelines.phantom import scan_files


@pytest.fixture(scope="module")
def case():
    return generate.make_phantom(0)


def _levels(case):
    return sorted(case.centroids)


def _occupancy(case, label, points):
    """Label occupancy in 0..1 at points (..., 3) in the frame of that vertebra."""
    voxel_from_vertebra = np.linalg.inv(case.affine) @ case.patient_from_vertebra[label]
    voxels = points @ voxel_from_vertebra[:3, :3].T + voxel_from_vertebra[:3, 3]
    low = np.maximum(np.floor(voxels.reshape(-1, 3).min(0)).astype(int) - 1, 0)
    high = np.ceil(voxels.reshape(-1, 3).max(0)).astype(int) + 2
    crop = case.mask[tuple(slice(a, b) for a, b in zip(low, high))] == label
    return ndimage.map_coordinates(crop.astype(np.float32), np.moveaxis(voxels - low, -1, 0), order=1)


def _column(x, y, z):
    """Points (..., 3) from broadcastable coordinates."""
    return np.stack(np.broadcast_arrays(*map(np.asarray, (x, y, z))), -1).astype(float)


def _run(inside, start):
    """First and last index of the run of True in a 1-d array that holds index `start`."""
    labels, _ = ndimage.label(inside)
    assert labels[start]
    at = np.flatnonzero(labels == labels[start])
    return at[0], at[-1]


def test_same_seed_same_arrays(case):
    again = generate.make_phantom(0)
    assert np.array_equal(again.hu, case.hu) and np.array_equal(again.mask, case.mask)
    assert np.array_equal(again.affine, case.affine)
    for label in _levels(case):
        assert np.array_equal(again.patient_from_vertebra[label], case.patient_from_vertebra[label])


def test_seeds_differ_in_size_and_origin(case):
    coarse = generate.PhantomConfig(spacing_mm=(2.5, 2.5, 3.0))
    volumes, origins = [], []
    for seed in range(1, 4):
        other = generate.make_phantom(seed, coarse)
        volumes.append(np.sum(other.mask == 22) * np.prod(coarse.spacing_mm) / 1000)
        origins.append(other.affine[:3, 3])
    assert np.min(np.diff(np.sort(volumes))) > 0.02 * np.mean(volumes)
    assert np.min(np.abs(origins)) >= 40
    assert np.ptp(np.array(origins), axis=0).min() > 10


def test_types_and_labels(case):
    assert case.hu.dtype == np.int16 and case.mask.dtype == np.uint8 and case.affine.dtype == np.float64
    assert case.hu.shape == case.mask.shape
    assert set(np.unique(case.mask)) == {0, *range(16, 25), anatomy.SACRUM}
    assert _levels(case) == list(range(16, 25)) == sorted(case.patient_from_vertebra)
    for pose in case.patient_from_vertebra.values():
        assert np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3)) and np.linalg.det(pose[:3, :3]) > 0


def test_one_piece_each_and_inside_the_scan(case):
    boxes = ndimage.find_objects(case.mask)
    for label in [*_levels(case), anatomy.SACRUM]:
        box = boxes[label - 1]
        pieces, _ = ndimage.label(case.mask[box] == label)
        sizes = np.bincount(pieces.ravel())[1:]
        assert sizes.max() >= 0.98 * sizes.sum(), label
        if label != anatomy.SACRUM:
            assert all(s.start > 0 and s.stop < n for s, n in zip(box, case.mask.shape)), label


def test_volumes(case):
    voxel_ml = abs(np.linalg.det(case.affine[:3, :3])) / 1000
    volumes = np.array([np.sum(case.mask == label) * voxel_ml for label in _levels(case)])
    assert np.all((volumes > 15) & (volumes < 75)), volumes
    assert np.polyfit(np.arange(len(volumes)), volumes, 1)[0] > 2
    assert volumes[-2:].min() > 1.4 * volumes[0]


def test_canal_is_free_at_mid_body(case):
    y = np.arange(-60, 0.1, 0.5)
    voxel_from_patient = np.linalg.inv(case.affine)
    for label in _levels(case):
        inside = _occupancy(case, label, _column(0, y, -2)) > 0.5
        body_first, _ = _run(inside, len(y) - 1)
        first, last = _run(~inside, body_first - 1)
        assert first > 0, f"{label}: no arch behind the canal"
        assert y[last] - y[first] > 12
        centre = 0.5 * (y[first] + y[last])
        angle, radius = np.meshgrid(np.linspace(0, 2 * np.pi, 24), [0, 2, 4, 5.5])
        disk = _column(radius * np.cos(angle), centre + radius * np.sin(angle), -2)
        assert _occupancy(case, label, disk).max() < 0.5, label
        pose = voxel_from_patient @ case.patient_from_vertebra[label]
        voxel = np.rint(pose[:3, :3] @ [0, centre, -2] + pose[:3, 3]).astype(int)
        assert case.hu[tuple(voxel)] < 120


def test_endplates_are_concave(case):
    z = np.arange(-25, 25.1, 0.25)
    for label in _levels(case):
        x = np.arange(0, 40, 0.5)
        _, edge = _run(_occupancy(case, label, _column(x, 5, 0)) > 0.5, 0)
        ends = []
        for at in (0, 0.93 * x[edge], -0.93 * x[edge]):
            ends.append(_run(_occupancy(case, label, _column(at, 5, z)) > 0.5, len(z) // 2))
        (low, high), rims = ends[0], ends[1:]
        assert np.mean([rim[1] for rim in rims]) > high, label
        assert np.mean([rim[0] for rim in rims]) < low, label


def test_cortex_is_denser_than_marrow(case):
    spacing = nib.affines.voxel_sizes(case.affine)
    boxes = ndimage.find_objects(case.mask)
    for label in _levels(case):
        box = boxes[label - 1]
        depth = ndimage.distance_transform_edt(np.pad(case.mask[box] == label, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
        hu = case.hu[box]
        cortex, marrow = hu[(depth > 0) & (depth < 1.8)], hu[depth > 5]
        assert np.median(cortex) > np.median(marrow) + 150
        assert 60 < np.median(marrow) < 320
        assert np.percentile(cortex, 95) < 1200


def test_fewer_levels_and_bad_configs():
    coarse = generate.PhantomConfig(spacing_mm=(2.5, 2.5, 3.0), levels=(20, 21, 22, 23, 24))
    assert set(np.unique(generate.make_phantom(5, coarse).mask)) == {0, 20, 21, 22, 23, 24, anatomy.SACRUM}
    for bad in ({"levels": (20, 22, 24)}, {"levels": (15, 16)}, {"spacing_mm": (1, 1)}, {"extent_mm": (50, 50)}):
        with pytest.raises(ValueError):
            generate.make_phantom(0, dataclasses.replace(coarse, **bad))


def test_verse_files_in_another_orientation(case, tmp_path):
    paths = scan_files.write_verse(case, tmp_path / "case", "phantom000", axcodes="PIR")
    assert sorted(p.name for p in (tmp_path / "case").iterdir()) == sorted(p.name for p in paths.values())
    ct, mask = nib.load(paths["ct"]), nib.load(paths["mask"])
    assert nib.aff2axcodes(ct.affine) == nib.aff2axcodes(mask.affine) == ("P", "I", "R")
    assert ct.get_data_dtype() == np.int16 and mask.get_data_dtype() == np.uint8
    assert np.allclose(ct.affine, mask.affine)
    back = nib.as_closest_canonical(ct)
    assert np.array_equal(np.asanyarray(back.dataobj), case.hu)
    assert np.allclose(back.affine, case.affine, atol=1e-3)

    stored = np.asanyarray(mask.dataobj)
    direction, *entries = json.loads(paths["centroids"].read_text())
    assert direction == {"direction": ["P", "I", "R"]}
    assert [entry["label"] for entry in entries] == _levels(case)
    for entry in entries:
        label = entry["label"]
        expected = nib.affines.apply_affine(case.affine, np.argwhere(case.mask == label).mean(0))
        found = nib.affines.apply_affine(mask.affine, np.argwhere(stored == label).mean(0))
        assert np.allclose(found, expected, atol=0.1)
        centroid = nib.affines.apply_affine(mask.affine, [entry["X"], entry["Y"], entry["Z"]])
        assert np.allclose(centroid, case.centroids[label], atol=0.1)
        voxel = tuple(np.rint([entry["X"], entry["Y"], entry["Z"]]).astype(int))
        assert stored[voxel] == label

    with pytest.raises(ValueError):
        scan_files.write_verse(case, tmp_path, "x", axcodes="RLS")
