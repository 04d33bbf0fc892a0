"""A folder of masks, one for each structure, is a label map: TotalSegmentator's default output."""

import nibabel
import numpy as np
import pytest
from absl import logging as absl_logging

from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from data_pipelines.io import files
from radgs_jax import errors

AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])
SHAPE = (36, 34, 90)
PLACES = {"vertebrae_T11": 70, "vertebrae_T12": 56, "vertebrae_L1": 42, "vertebrae_L2": 28, "sacrum": 10}
NUMBERS = {"vertebrae_T11": 18, "vertebrae_T12": 19, "vertebrae_L1": 20, "vertebrae_L2": 21, "sacrum": 26}


@pytest.fixture
def said(monkeypatch):
    """Lines that were said."""
    lines = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *values: lines.append(message % values))
    return lines


def _save(path, array, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def _mask(low, value=1):
    mask = np.zeros(SHAPE, np.uint8)
    mask[10:24, 8:24, low : low + 9] = value
    return mask


@pytest.fixture
def folder(tmp_path):
    """The folder, beside a CT; structures that are not in the scan have empty masks."""
    path = tmp_path / "segmentations"
    path.mkdir()
    for name, low in PLACES.items():
        _save(path / f"{name}.nii.gz", _mask(low))
    for name in ("vertebrae_C1", "vertebrae_L5", "vertebrae_S1"):
        _save(path / f"{name}.nii.gz", np.zeros(SHAPE, np.uint8))
    # No vertebrae, and not to be read.
    for name in ("liver", "rib_left_1", "spinal_cord", "vertebrae_body"):
        (path / f"{name}.nii.gz").write_bytes(b"not a NIfTI file")
    (path / "statistics.json").write_text("{}")
    (path / "preview_total.png").write_bytes(b"")
    ct = np.where(sum(_mask(low) for low in PLACES.values()) > 0, 400, 40).astype(np.int16)
    ct[:4] = -1000
    _save(tmp_path / "ct.nii.gz", ct)
    return path


def _wanted():
    labels = np.zeros(SHAPE, np.uint8)
    for name, low in PLACES.items():
        labels[_mask(low) > 0] = NUMBERS[name]
    return labels[::-1, ::-1]


def test_a_folder_is_read_as_a_label_map(folder, said):
    labels, affine = segmentation.read_labels(folder)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, _wanted())
    assert nibabel.aff2axcodes(affine) == ("R", "A", "S") and not said
    shape, grid = segmentation.read_grid(folder)
    assert shape == SHAPE
    np.testing.assert_array_equal(grid, affine)


@pytest.mark.parametrize("label_map", [None, "totalsegmentator", "totalsegmentator_v1"])
def test_scans_and_segment_take_it(folder, tmp_path, label_map):
    scan = scans.read_scan(tmp_path / "ct.nii.gz", folder, label_map=label_map)
    np.testing.assert_array_equal(scan.labels, _wanted())
    record = segmentation.segment(tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz", folder, label_map)
    assert record["vertebrae"] == [18, 19, 20, 21, 26] and record["mask"]["sha256"] == files.sha256(folder)
    np.testing.assert_array_equal(segmentation.read_labels(tmp_path / "out.nii.gz")[0], _wanted())


@pytest.mark.parametrize("value", [1, 255, 20])
def test_any_one_value_and_uncompressed_files(folder, value):
    (folder / "vertebrae_L1.nii.gz").unlink()
    _save(folder / "vertebrae_L1.nii", _mask(PLACES["vertebrae_L1"], value).astype(np.float32))
    np.testing.assert_array_equal(segmentation.read_labels(folder)[0], _wanted())


def test_s1_is_a_part_of_the_sacrum_and_t13_and_l6_have_names(folder):
    _save(folder / "vertebrae_S1.nii.gz", _mask(19)[:, :, :])
    _save(folder / "vertebrae_T13.nii.gz", np.roll(_mask(49), 0))
    (folder / "vertebrae_L1.nii.gz").unlink()
    (folder / "vertebrae_L2.nii.gz").rename(folder / "vertebrae_L6.nii.gz")
    _save(folder / "vertebrae_T12.nii.gz", _mask(60))
    labels, _ = segmentation.read_labels(folder)
    assert sorted(segmentation.boxes(labels)) == [18, 19, 25, 26, 28]


def test_where_masks_overlap_the_lower_vertebra_wins_and_it_is_said(folder, said):
    mask = _mask(PLACES["vertebrae_L1"])
    mask[12:14, 10:12, 30:42] = 1
    _save(folder / "vertebrae_L1.nii.gz", mask)
    labels, _ = segmentation.read_labels(folder)
    assert np.count_nonzero(labels == 21) == 14 * 16 * 9
    assert "masks: 28 voxels of L2 also in a mask further up, taken for the lower vertebra" in said[0]


def _shifted(folder):
    moved = AFFINE.copy()
    moved[1, 3] += 3
    _save(folder / "vertebrae_L2.nii.gz", _mask(28), moved)


REFUSED = {
    "another grid": (_shifted, r"vertebrae_L2.nii.gz: affine: found a grid 3.00 mm away from vertebrae_C1.nii.gz's"),
    "another shape": (
        lambda f: _save(f / "vertebrae_L2.nii.gz", _mask(28)[:-1]),
        r"vertebrae_L2.nii.gz: shape in RAS order: found \(35, 34, 90\), wanted vertebrae_C1.nii.gz's",
    ),
    "the same vertebra twice": (
        lambda f: _save(f / "vertebrae_L2.nii.gz", _mask(42)),
        r"vertebrae_L2.nii.gz: mask: found 100 % inside L1, wanted masks of different vertebrae",
    ),
    "labels in a mask": (
        lambda f: _save(f / "vertebrae_L2.nii.gz", _mask(28) + 2 * _mask(42)),
        "vertebrae_L2.nii.gz: mask: found several values up to 2",
    ),
    "probabilities": (
        lambda f: _save(f / "vertebrae_L2.nii.gz", _mask(28) * np.linspace(0.1, 1, 90, dtype=np.float32)),
        "vertebrae_L2.nii.gz: mask: found several values",
    ),
    "a structure twice": (
        lambda f: _save(f / "vertebrae_L2.nii", _mask(28)),
        "name: found also vertebrae_L2.nii, wanted every structure once",
    ),
    "a damaged mask": (
        lambda f: (f / "vertebrae_L2.nii.gz").write_bytes(b"\x1f\x8b damaged"),
        "vertebrae_L2.nii.gz: content: found",
    ),
    "swapped names": (
        lambda f: [
            (f / "vertebrae_L2.nii.gz").rename(f / "x"),
            (f / "vertebrae_T12.nii.gz").rename(f / "vertebrae_L2.nii.gz"),
            (f / "x").rename(f / "vertebrae_T12.nii.gz"),
        ],
        "labels: found T12 at .* mm, below L1 at",
    ),
    "only empty masks": (
        lambda f: [_save(f / f"{name}.nii.gz", np.zeros(SHAPE, np.uint8)) for name in PLACES],
        "labels: found no vertebra",
    ),
    "only a sacrum": (
        lambda f: [path.unlink() for path in f.glob("vertebrae_*")],
        "masks: found no vertebra's, wanted masks named as TotalSegmentator",
    ),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], "masks: found none, wanted masks named"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_are_no_label_map_are_one_line(folder, tmp_path, name):
    change, message = REFUSED[name]
    change(folder)
    for read in (segmentation.read_labels, lambda path: scans.read_scan(tmp_path / "ct.nii.gz", path)):
        with pytest.raises(errors.InputError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_other_numberings_of_a_folder_are_refused(folder):
    with pytest.raises(errors.InputError, match="found --labels=binary:20 for a folder of masks, wanted none"):
        segmentation.read_labels(folder, "binary:20")


def test_a_folder_on_another_grid_than_its_ct(folder, tmp_path):
    moved = AFFINE.copy()
    moved[0, 3] += 2
    _save(tmp_path / "ct.nii.gz", np.full(SHAPE, 40, np.int16), moved)
    with pytest.raises(errors.InputError, match=r"segmentations: affine: found a grid 2.00 mm away from the CT's"):
        scans.read_scan(tmp_path / "ct.nii.gz", folder)
