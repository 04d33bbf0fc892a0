"""Label maps in pieces: specks are ignored and said, large second pieces refused, and swapped or skipped levels noticed."""

import os
import pathlib
import time

import nibabel
import numpy as np
import pytest
from absl import logging as absl_logging

from data_pipelines.ct import pieces
from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from radgs_jax import errors

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
FAULTS = pathlib.Path(os.environ.get("RADGS_SHARED", REPOSITORY.parent / "shared")) / "faults"


@pytest.fixture
def said(monkeypatch):
    """Lines that were said."""
    lines = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *values: lines.append(message % values))
    return lines


def _spine(numbers=(18, 19, 20, 21, 22), pitch_mm=28.0, spacing=2.0):
    """(labels, affine) of vertebrae, listed from the head down: bricks of 36 x 32 x 18 mm (20.7 ml) in a column."""
    size = [int(n / spacing) for n in (36, 32, 18)]
    pitches = [pitch_mm] * (len(numbers) - 1) if np.isscalar(pitch_mm) else list(pitch_mm)
    labels = np.zeros((int(110 / spacing), int(100 / spacing), int((sum(pitches) + 60) / spacing)), np.uint8)
    for number, below in zip(numbers, np.cumsum([0, *pitches])):
        top = labels.shape[2] - int((20 + below) / spacing)
        labels[tuple(slice(n, n + m) for n, m in zip((int(34 / spacing), int(30 / spacing), top - size[2]), size))] = (
            number
        )
    return labels, np.diag([spacing, spacing, spacing, 1.0])


def _read(tmp_path, labels, affine, label_map=None):
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "m.nii.gz")
    return segmentation.read_labels(tmp_path / "m.nii.gz", label_map)[0]


# --- specks and pieces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(0, 0, 0), (54, 3, 9), (10, 40, -1), (10, 10, 30)], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_specks_are_ignored_and_said_wherever_they_are(tmp_path, said, place, size):
    clean, affine = _spine()
    labels = clean.copy()
    corner = [n % m for n, m in zip(place, labels.shape)]
    labels[tuple(slice(n, n + size) for n in corner)] = 20
    count = np.count_nonzero(labels != clean)
    assert count
    found = _read(tmp_path, labels, affine)
    np.testing.assert_array_equal(found, clean)
    (line,) = said
    assert "1 speck of L1" in line and f"({count} voxel" in line and f"{8 * count:.3g} mm3), ignored" in line
    # The vertebra is complete again.
    scan = scans.Scan("x", np.zeros(found.shape, np.float32), found, affine)
    assert scans.complete_box(scan, 20, "m") == pieces.boxes(clean)[20]


def test_many_specks_are_one_line(tmp_path, said):
    clean, affine = _spine()
    labels = clean.copy()
    labels[::13, 2, ::11] = 19
    labels[2, ::9, ::17] = 21
    np.testing.assert_array_equal(_read(tmp_path, labels, affine), clean)
    assert len(said) == 1 and "specks of T12, L2" in said[0]


def test_a_label_that_is_nothing_but_a_speck_is_ignored(tmp_path, said):
    """It would turn the frame of the vertebra beside it."""
    clean, affine = _spine()
    labels = clean.copy()
    labels[30, 40, 5:8] = 23
    np.testing.assert_array_equal(_read(tmp_path, labels, affine), clean)
    assert "1 speck of L4 (3 voxels, 24 mm3), ignored" in said[0]


def test_boxes_are_those_of_what_is_left():
    labels, affine = _spine()
    whole = pieces.boxes(labels)
    labels[0, 0, 0] = labels[50, 2, 2] = 21
    assert pieces.clean("m", labels, affine) == whole == pieces.boxes(labels)


@pytest.mark.parametrize("size", [(7, 8, 7), (12, 10, 8), (14, 14, 9)], ids=str)
def test_a_large_second_piece_is_refused_with_both_sizes(tmp_path, size):
    labels, affine = _spine()
    labels[2 : 2 + size[0], 2 : 2 + size[1], 20 : 20 + size[2]] = 20
    voxels = np.prod(size)
    both = f"two pieces of {18 * 16 * 9 * 8} and {8 * voxels} mm3 \\({18 * 16 * 9} and {voxels} voxels\\), "
    with pytest.raises(errors.InputError, match=both) as caught:
        _read(tmp_path, labels, affine)
    assert "label 20 (L1)" in str(caught.value) and " mm apart, wanted one piece" in str(caught.value)


def test_half_of_a_neighbour_is_refused(tmp_path):
    labels, affine = _spine()
    x, y, z = pieces.boxes(labels)[19]
    labels[x, y, z.start + 4 : z.stop] = 20
    with pytest.raises(errors.InputError, match=r"label 20 \(L1\): found two pieces of"):
        _read(tmp_path, labels, affine)


@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_a_crack_through_a_vertebra_is_said(tmp_path, said, spacing):
    """A loose arch or a fracture: two pieces side by side are one vertebra."""
    labels, affine = _spine(spacing=spacing)
    x, y, _ = pieces.boxes(labels)[21]
    middle = y.start + int(10 / spacing)
    labels[x, middle : middle + 1][labels[x, middle : middle + 1] == 21] = 0
    assert 21 in pieces.boxes(_read(tmp_path, labels, affine))
    assert len(said) == 1 and "label 21 (L2): two pieces of" in said[0] and "taken as one vertebra" in said[0]


def test_pieces_that_the_border_cuts_may_join_outside(tmp_path, said):
    labels, affine = _spine()
    low = pieces.boxes(labels)[22][2].start
    labels = labels[:, :, low:]
    labels[:, 20:26][labels[:, 20:26] == 22] = 0
    assert 22 in pieces.boxes(_read(tmp_path, labels, affine)) and not said


def test_the_sacrum_may_have_several_pieces(tmp_path, said):
    labels, affine = _spine((22, 23, 24, 26, 27), 32.0)
    labels[17:30, 10:14, 2:12] = 26
    assert {26, 27} <= set(pieces.boxes(_read(tmp_path, labels, affine))) and not said


def test_fine_and_large_masks_take_seconds():
    labels, affine = _spine(tuple(range(8, 25)), 26.0, spacing=1.0)
    labels = np.asfortranarray(np.pad(labels, ((180, 180), (180, 180), (0, 0))))
    labels[::150, ::150, ::100] = 20
    start = time.process_time()
    found = pieces.clean("m", labels, affine)
    pieces.check_order("m", found, labels.shape, affine)
    assert labels.size > 9e7 and time.process_time() - start < 12.0


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_map", [None, "verse"])
@pytest.mark.parametrize(
    ("numbers", "names"),
    [
        ((18, 20, 19, 21, 22), ("T12", "L1")),
        ((19, 20, 28, 21, 22), ("T13", "L1")),
        ((28, 19, 20, 21), ("T12", "T13")),
        ((16, 17, 18, 26, 19), ("T12", "sacrum")),
    ],
)
def test_swapped_levels_are_refused_with_their_heights(tmp_path, numbers, names, label_map):
    with pytest.raises(errors.InputError, match="labels: found") as caught:
        _read(tmp_path, *_spine(numbers), label_map)
    upper, lower = names
    assert f"{upper} at " in str(caught.value) and f" mm, below {lower} at " in str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "pitch", "line"),
    [
        ((17, 19, 20), (54.0, 30.0), "1 not labelled between T10 and T12, 54 mm apart"),
        ((20, 22), 70.0, "1 not labelled between L1 and L3, 70 mm apart"),
        ((17, 19, 20, 21), (26.0, 30.0, 33.0), "no room for the 1 between T10 and T12, 26 mm apart"),
        ((18, 19, 20, 21), (27.0, 62.0, 33.0), "room for another between T12 and L1, 62 mm apart"),
        ((16, 20), 110.0, "3 not labelled between T9 and L1, 110 mm apart"),
    ],
)
def test_skipped_levels_are_said(tmp_path, said, numbers, pitch, line):
    assert sorted(pieces.boxes(_read(tmp_path, *_spine(numbers, pitch)))) == sorted(numbers)
    assert len(said) == 1 and line in said[0] and said[0].startswith(f"{tmp_path / 'm.nii.gz'}: labels: ")


@pytest.mark.parametrize(
    ("numbers", "pitch"),
    [
        ((18, 19, 20, 21, 22), 28.0),
        ((18, 19, 28, 20, 21), 28.0),
        ((22, 23, 24, 25, 26), 34.0),
        ((22, 23, 24, 26, 27), 34.0),
        ((18, 19, 20, 21, 22), 20.0),
        (tuple(range(8, 25)), 24.0),
        ((21,), 30.0),
        ((26,), 30.0),
        ((24, 26), 40.0),
    ],
)
def test_spines_without_gaps_say_nothing(tmp_path, said, numbers, pitch):
    assert sorted(pieces.boxes(_read(tmp_path, *_spine(numbers, pitch)))) == sorted(numbers)
    assert not said


# --- the reported files ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FAULTS.exists(), reason="the shared faults are not next to the repository (RADGS_SHARED)")
def test_the_reported_masks(said):
    folder = FAULTS / "52-islands"
    clean = scans.read_scan(folder / "ct.nii.gz", folder / "mask_clean.nii.gz")
    assert not said
    for name in ("mask_border_voxel", "mask_island"):
        scan = scans.read_scan(folder / "ct.nii.gz", folder / f"{name}.nii.gz")
        np.testing.assert_array_equal(scan.labels, clean.labels)
        scans.complete_box(scan, 20, name)
    assert len(said) == 2
    for name in ("mask_large_island", "mask_mixed"):
        with pytest.raises(errors.InputError, match="two pieces of 16560 and"):
            scans.read_scan(folder / "ct.nii.gz", folder / f"{name}.nii.gz")
