"""Numberings in words (`--labels`), and values that need them: masks of one vertebra, counts from 1, other programs' values."""

import nibabel
import numpy as np
import pytest
from absl import logging as absl_logging

from data_pipelines.ct import extraction
from data_pipelines.ct import numbering
from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from radgs_jax import errors
from radgs_jax import levels

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def _column(values, pitch=14, size=(12, 14, 8), dtype=np.uint8):
    """A label map whose vertebrae, listed from the head down, are bricks of 2 mm voxels in a column."""
    labels = np.zeros((40, 40, pitch * len(values) + 12), dtype)
    for place, value in enumerate(values):
        top = labels.shape[2] - 4 - pitch * place
        labels[14 : 14 + size[0], 12 : 12 + size[1], top - size[2] : top] = value
    return labels


def _write(path, labels):
    nibabel.save(nibabel.Nifti1Image(labels, AFFINE), path)
    return path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("binary:20", {-1: 20}),
        ("binary:L1", {-1: 20}),
        ("Binary:T13", {-1: 28}),
        ("lumbar:1-5", {1: 20, 2: 21, 3: 22, 4: 23, 5: 24}),
        ("lumbar:5-1", {5: 20, 4: 21, 3: 22, 2: 23, 1: 24}),
        ("lumbar:1-6", {1: 20, 2: 21, 3: 22, 4: 23, 5: 24, 6: 25}),
        ("thoracic:1-12", {n: n + 7 for n in range(1, 13)}),
        ("cervical:7-1", {8 - n: n for n in range(1, 8)}),
        ("255:L1", {255: 20}),
        ("1-4:T11-L2", {1: 18, 2: 19, 3: 20, 4: 21}),
        ("1-3:T12-T13,4:L1", None),
        ("1-2:T12-T13,3-4:L1-L2", {1: 19, 2: 28, 3: 20, 4: 21}),
        ("3-1:20-22", {3: 20, 2: 21, 1: 22}),
        ("1-6:20-26", {1: 20, 2: 21, 3: 22, 4: 23, 5: 24, 6: 26}),
        ("10:L5,20:S1", {10: 24, 20: 26}),
        ("verse", numbering.LABEL_MAPS["verse"]),
        ("totalsegmentator", numbering.LABEL_MAPS["totalsegmentator"]),
        ("bones", {n: 100 + n for n in range(1, 156)}),
    ],
)  # fmt: skip
def test_words(text, wanted):
    if wanted is None:
        with pytest.raises(errors.InputError, match="as many values as levels"):
            numbering.parse_labels(text)
    else:
        assert segmentation.parse_labels(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "nnunet", "binary", "binary:", "binary:L9", "binary:20-22", "lumbar", "lumbar:", "lumbar:L1", "lumbar:0-4",
        "lumbar:1-7", "thoracic:1-13", "1:L1:L2", "1-5:L5-L1", "1-5:L1-L4", "256:L1", "1:29", "1-2-3:L1-L3", "1:L1,1:L2",
        "1:L1,binary:L2", "binary:L1,2:L2", "1,2:L1", "1:", "a:b", "-1:L1", "1:L1,", "\n", "²:L1", "9999:L1",
    ],
)  # fmt: skip
def test_other_words_are_one_line_that_names_the_flag(text):
    with pytest.raises(errors.InputError, match=r"^flags: --labels: found ") as caught:
        numbering.parse_labels(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1, 255, 100])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int16])
def test_a_mask_of_one_vertebra_needs_a_word(tmp_path, value, dtype):
    path = _write(tmp_path / "m.nii.gz", _column([value], dtype=dtype))
    with pytest.raises(errors.InputError, match=r"one value.*--labels=binary:20 --label=20") as caught:
        segmentation.read_labels(path)
    assert ("--labels=verse for C1" in str(caught.value)) == (value == 1)
    for words in ("binary:20", "binary:L1", f"{value}:L1", f"{value}:20"):
        labels, _ = segmentation.read_labels(path, words)
        assert sorted(segmentation.boxes(labels)) == [20]


@pytest.mark.parametrize(
    ("values", "hint", "words", "numbers"),
    [
        ([1, 2, 3, 4, 5], "lumbar:1-5 --label=20", "lumbar:1-5", [20, 21, 22, 23, 24]),
        ([5, 4, 3, 2, 1], "lumbar:5-1 --label=20", "lumbar:5-1", [20, 21, 22, 23, 24]),
        ([1, 2, 3], "lumbar:1-3", "lumbar:1-3", [20, 21, 22]),
        ([1, 2, 3, 4, 5, 6], "lumbar:1-6", "lumbar:1-6", [20, 21, 22, 23, 24, 25]),
        ([2, 3], "2-3:L2-L3 --label=21", "2-3:L2-L3", [21, 22]),
        ([4], "4:L4 --label=23", "4:L4", [23]),
        (list(range(1, 13)), "thoracic:1-12 --label=8", "thoracic:1-12", list(range(8, 20))),
        (list(range(12, 0, -1)), "thoracic:12-1", "thoracic:12-1", list(range(8, 20))),
    ],
)
def test_counts_from_1_need_a_word(tmp_path, values, hint, words, numbers):
    path = _write(tmp_path / "m.nii.gz", _column(values))
    with pytest.raises(errors.InputError, match="may be the neck or a count") as caught:
        segmentation.read_labels(path)
    assert "--labels=verse" in str(caught.value) and f"--labels={hint}" in str(caught.value)
    labels, _ = segmentation.read_labels(path, words)
    assert sorted(segmentation.boxes(labels)) == numbers
    if values[0] > values[-1]:
        # Read as VerSe numbers they run from the feet up.
        with pytest.raises(errors.InputError, match=r"C1 at .* mm, below C2 at"):
            segmentation.read_labels(path, "verse")


def test_the_neck_has_its_own_way_through(tmp_path):
    """C1 to C7 by `--labels=verse`, or by themselves where the chest is labelled as well or files are known to be VerSe's."""
    neck = _write(tmp_path / "neck.nii.gz", _column(range(1, 8), pitch=9, size=(10, 10, 6)))
    for given in ({"label_map": "verse"}, {"unclear": "verse"}, {"label_map": "cervical:1-7"}):
        labels, _ = segmentation.read_labels(neck, **given)
        assert sorted(segmentation.boxes(labels)) == list(range(1, 8))
    chest = _write(tmp_path / "chest.nii.gz", _column(range(5, 14), pitch=9, size=(10, 10, 6)))
    assert sorted(segmentation.boxes(segmentation.read_labels(chest)[0])) == list(range(5, 14))


def test_a_count_the_wrong_way_is_refused_with_heights(tmp_path):
    path = _write(tmp_path / "m.nii.gz", _column([1, 2, 3, 4, 5]))
    with pytest.raises(errors.InputError, match=r"labels: found L1 at \d+ mm, below L2 at \d+ mm, wanted L1 above L2"):
        segmentation.read_labels(path, "lumbar:5-1")


def test_words_that_do_not_fit_the_values(tmp_path):
    path = _write(tmp_path / "m.nii.gz", _column([1, 2]))
    with pytest.raises(errors.InputError, match=r"found the values 1, 2, wanted one value above 0 for 'binary:20'"):
        segmentation.read_labels(path, "binary:20")
    with pytest.raises(errors.InputError, match=r"found the values 1, 2, wanted values that '7:L1' names"):
        segmentation.read_labels(path, "7:L1")
    with pytest.raises(errors.InputError, match=r"m.nii.gz: labels: found '1:L9', wanted verse, totalsegmentator"):
        segmentation.read_labels(path, "1:L9")


def test_other_structures_beside_verse_numbers_are_said(tmp_path, monkeypatch):
    """SPINEPS writes discs as 100 and endplates as 200 above the vertebra."""
    said = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *values: said.append(message % values))
    labels = _column([20, 21, 22])
    labels[14:26, 12:26, 0:3], labels[30:33, 30:33, 30:33] = 120, 221
    path = _write(tmp_path / "m.nii.gz", labels)
    with pytest.raises(errors.InputError, match="found values up to 221, wanted VerSe numbers, or a word"):
        segmentation.read_labels(path)
    assert sorted(segmentation.boxes(segmentation.read_labels(path, "verse")[0])) == [20, 21, 22]
    assert said == [f"{path}: labels: the values 120, 221 are no VerSe numbers, ignored"]


def test_bones_are_told_from_levels_and_have_no_neighbours(tmp_path):
    path = _write(tmp_path / "m.nii.gz", _column([101, 100, 7]))
    labels, affine = segmentation.read_labels(path, "bones")
    assert sorted(segmentation.boxes(labels)) == [107, 200, 201] and levels.level_name(200) == "bone 100"
    assert levels.neighbours_mm(200) == ()
    scan = scans.Scan("wrist", np.where(labels > 0, 700.0, -1000.0).astype(np.float32), labels, affine)
    assert extraction.ct_from_box(scan, 200)[:3, 2].tolist() == [0, 0, 1]


def _tilted(order, step=(0.0, 6.0, -12.0)):
    """A scan whose vertebrae, listed from the head down, follow a line that is tilted backwards."""
    labels = np.zeros((30, 90, 30 + 13 * len(order)), np.uint8)
    for place, label in enumerate(order):
        centre = np.array([15.0, 12, labels.shape[2] - 12]) + place * np.array(step)
        low = np.rint(centre).astype(int) - 4
        labels[tuple(slice(n, n + 8) for n in low)] = label
    return scans.Scan("x", np.zeros(labels.shape, np.float32), labels, np.eye(4))


@pytest.mark.parametrize("order", [(18, 19, 28, 20, 21), (22, 23, 24, 25, 26), (23, 24, 25)])
def test_frames_follow_the_spine_through_t13_and_l6(order):
    """Every frame's z points to the head along the line, also of T13 (28), T12 (19) and L1 (20) beside it."""
    scan = _tilted(order)
    along = -np.array([0.0, 6.0, -12.0]) / np.hypot(6, 12)
    for label in order:
        np.testing.assert_allclose(extraction.ct_from_box(scan, label)[:3, 2], along, atol=1e-9)


def test_without_extra_levels_frames_are_those_of_the_numbers_beside():
    order = (17, 18, 19, 20, 21, 22, 23, 24, 26)
    scan, upright = _tilted(order), np.array([0.0, 0.0, 1.0])
    centres = {n: np.argwhere(scan.labels == n).mean(0) for n in order}
    for label in order:
        above, below = centres.get(label - 1, centres[label]), centres.get(label + 1, centres[label])
        up = above - below
        wanted = up / np.linalg.norm(up) if up.any() else upright
        np.testing.assert_array_equal(extraction.ct_from_box(scan, label)[:3, 2], wanted)
