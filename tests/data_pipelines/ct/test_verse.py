"""VerSe in both published layouts and plain folders: volumes and affines are unchanged, and patients are in one split."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import ct_files
import nibabel
import numpy as np
import pytest
from nibabel import orientations
from scipy.spatial import transform

from data_pipelines.ct import centroid_files
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import verse
from data_pipelines.io import nifti
from radgs_jax import errors

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
SHARED = pathlib.Path(os.environ.get("RADGS_SHARED", REPOSITORY.parent / "shared")) / "data"
SPACING = (0.8, 1.3, 2.1)
BODIES = {19: 27, 20: 19, 21: 12, 22: 5}
"""Lower z index of each label's block in RAS order. T12 touches the upper border, so it is cut."""


def make_volume(seed, codes):
    """A stored (hu, labels) pair of images: anisotropic, oblique, off-centre, axes in the order `codes`."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1024, 3000, (26, 23, 32)).astype(np.int16)
    labels = np.zeros(hu.shape, np.uint8)
    for label, z in BODIES.items():
        labels[4:11, 9 : 14 + label % 3, z : z + 5] = label
    affine = np.eye(4)
    affine[:3, :3] = transform.Rotation.from_rotvec([0.1, -0.2, 0.15]).as_matrix() * SPACING
    affine[:3, 3] = 100 * rng.normal(size=3)
    images = []
    for array in (hu, labels):
        image = nibabel.Nifti1Image(array, affine)
        turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(codes))
        images.append(image.as_reoriented(turn))
    return images


def body_points(labels):
    """Voxel index in the stored array of an off-centre point in each block, by label."""
    array = np.asarray(labels.dataobj)
    return {label: np.argwhere(array == label)[40] + [0.25, -0.125, 0.375] for label in BODIES}


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def entries(points):
    return [{"label": n, "X": float(p[0]), "Y": float(p[1]), "Z": float(p[2])} for n, p in points.items()]


def by_subject(root, split, name, seed, codes, entity=""):
    """Writes one scan of the by-subject layout; returns its images."""
    ct, labels = make_volume(seed, codes)
    subject = name.split("_")[0]
    save(ct, root / f"dataset-verse20{split}/rawdata/{subject}/{name}{entity}_ct.nii.gz")
    base = root / f"dataset-verse20{split}/derivatives/{subject}/{name}{entity}"
    save(labels, base.with_name(base.name + "_seg-vert_msk.nii.gz"))
    document = [
        {"direction": list(codes)},
        *entries(body_points(labels)),
        {"label": 9, "X": float("nan"), "Y": 1, "Z": 1},
    ]
    base.with_name(base.name + "_seg-subreg_ctd.json").write_text(json.dumps(document))
    return ct, labels


def one_millimetre(points, labels, axes):
    """Stored voxel indices as mm on a 1 mm scan of the same centre in the axis order `axes`."""
    turn = orientations.ornt_transform(orientations.io_orientation(labels.affine), orientations.axcodes2ornt(axes))
    sizes, spacing = np.array(labels.shape), np.linalg.norm(labels.affine[:3, :3], axis=0)
    turned = {}
    for label, point in points.items():
        out = np.empty(3)
        for axis, (target, flip) in enumerate(turn.astype(int)):
            index = point[axis] if flip == 1 else sizes[axis] - 1 - point[axis]
            new_size = round(sizes[axis] * spacing[axis])
            out[target] = (index - (sizes[axis] - 1) / 2) * spacing[axis] + (new_size - 1) / 2
        turned[label] = out
    return turned


def challenge(root, relative, seed, codes, axes, end):
    """Writes one scan of the challenge's layout at `relative`; returns its images."""
    ct, labels = make_volume(seed, codes)
    path = root / relative
    save(ct, path.with_name(path.name + ".nii.gz"))
    save(labels, path.with_name(path.name + "_seg.nii.gz"))
    document = entries(one_millimetre(body_points(labels), labels, axes))
    path.with_name(path.name + end).write_text(json.dumps(document))
    return ct, labels


def assert_same_voxels(example, ct, labels):
    """Every voxel of an example equals that of the stored scan at the same place in the CT frame."""
    index = np.indices(example["hu"].shape).reshape(3, -1)
    place = example["ct_from_index"][:3, :3] @ index + example["ct_from_index"][:3, 3:]
    stored = np.linalg.inv(ct.affine)[:3, :3] @ (place - ct.affine[:3, 3:])
    assert np.abs(stored - np.rint(stored)).max() < 1e-3
    stored = tuple(np.rint(stored).astype(int))
    np.testing.assert_array_equal(example["hu"].ravel(), np.asarray(ct.dataobj)[stored])
    np.testing.assert_array_equal(example["labels"].ravel(), np.asarray(labels.dataobj)[stored])


def world(image, index):
    return image.affine[:3, :3] @ index + image.affine[:3, 3]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """The layout by subject with realistic names: the folder, and images by name."""
    root = tmp_path_factory.mktemp("verse")
    made = {
        "sub-verse004": by_subject(root, "training", "sub-verse004", 1, "PIR"),
        "sub-gl003_dir-ax": by_subject(root, "training", "sub-gl003", 2, "LAS", "_dir-ax"),
        "sub-verse400_split-verse090": by_subject(root, "validation", "sub-verse400_split-verse090", 3, "RSP"),
        "sub-verse400_split-verse155": by_subject(root, "validation", "sub-verse400_split-verse155", 4, "LPS"),
        "sub-verse808": by_subject(root, "test", "sub-verse808", 5, "RAS"),
    }
    parts = root / "dataset-verse20test/derivatives/sub-verse808/sub-verse808_seg-subreg_msk.nii.gz"
    save(made["sub-verse808"][1], parts)
    return root, made


@pytest.fixture(scope="module")
def vertebrae(subjects, tmp_path_factory):
    return verse.prepare(subjects[0], tmp_path_factory.mktemp("tfds"), "lumbar")


def examples_of(builder):
    return [(split, example) for split in builder.info.splits for example in builder.as_data_source(split)]


def test_a_vertebra_is_unchanged(subjects, vertebrae):
    found = examples_of(vertebrae)
    assert len(found) == 5 * 3  # T12 is not lumbar
    for _, example in found:
        ct, labels = subjects[1][example["scan"].decode()]
        assert_same_voxels(example, ct, labels)
        label = int(example["label"])
        assert (example["labels"] == label).sum() == (np.asarray(labels.dataobj) == label).sum()
        np.testing.assert_allclose(example["centroid"], world(labels, body_points(labels)[label]), atol=1e-4)


def test_affine_and_frame_are_those_of_reading_the_scan(subjects, vertebrae):
    found = {scan.name: scan for scan in verse.find_scans(subjects[0])}
    for _, example in examples_of(vertebrae)[::4]:
        member, label = found[example["scan"].decode()], int(example["label"])
        scan = scans.read_scan(member.ct, member.mask)
        first = np.array([max(0, part.start - n) for part, n in zip(scan.boxes[label], (13, 8, 5))])
        corner = scan.ct_from_index[:3, :3] @ first + scan.ct_from_index[:3, 3]
        np.testing.assert_array_equal(example["ct_from_index"][:3, :3], scan.ct_from_index[:3, :3])
        np.testing.assert_allclose(example["ct_from_index"][:3, 3], corner, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(example["ct_from_box"], extraction.ct_from_box(scan, label))


def test_a_whole_scan_is_what_reading_the_files_gives(subjects, tmp_path):
    builder = verse.prepare(subjects[0], tmp_path, "spine_scans")
    found = {scan.name: scan for scan in verse.find_scans(subjects[0])}
    seen = examples_of(builder)
    assert len(seen) == 5
    for split, example in seen:
        member = found[example["scan"].decode()]
        scan, again = scans.read_scan(member.ct, member.mask, member.patient), verse.as_scan(example)
        assert (again.patient, split) == (member.patient, member.split)
        np.testing.assert_array_equal(again.hu, scan.hu)
        np.testing.assert_array_equal(again.labels, scan.labels)
        np.testing.assert_array_equal(again.ct_from_index, scan.ct_from_index)
        np.testing.assert_array_equal(example["complete"], [20, 21, 22])
        labels = subjects[1][member.name][1]
        wanted = [world(labels, body_points(labels)[label]) for label in (20, 21, 22)]
        np.testing.assert_allclose(example["centroids"], wanted, atol=1e-4)


def test_published_splits_hold_each_patient_once(vertebrae):
    patients = {}
    for split, example in examples_of(vertebrae):
        patients.setdefault(split, set()).add(example["patient"].decode())
    assert patients == {"training": {"verse004", "gl003"}, "validation": {"verse400"}, "test": {"verse808"}}


def test_both_readings_of_the_challenge_layout(tmp_path):
    root = tmp_path / "raw"
    made = {
        "verse004": challenge(root, "training/verse004", 6, "PIR", "PIR", "_ctd.json"),
        "verse005": challenge(root, "training/verse005", 7, "LAS", "IPL", "_ctd.json"),
        "verse512_CT-iso": challenge(root, "01_training/verse512/verse512_CT-iso", 8, "RSP", "PIR", "_iso-ctd.json"),
        "GL017_CT_ax": challenge(root, "02_validation/GL017/GL017_CT_ax", 9, "LPS", "PIR", "_iso-ctd.json"),
        "verse400_verse090_CT-sag": challenge(
            root, "03_test/verse400/verse400_verse090_CT-sag", 10, "RAS", "PIR", "_iso-ctd.json"
        ),
    }
    (root / "training" / "verse004_snapshot.png").write_bytes(b"")
    (root / "training" / "._verse004.nii.gz").write_bytes(b"")
    assert [(s.patient, s.split) for s in sorted(verse.find_scans(root), key=lambda s: s.name)] == [
        ("gl017", "validation"),
        ("verse004", "training"),
        ("verse005", "training"),
        ("verse400", "test"),
        ("verse512", "training"),
    ]
    for _, example in examples_of(verse.prepare(root, tmp_path / "tfds")):
        ct, labels = made[example["scan"].decode()]
        assert_same_voxels(example, ct, labels)
        wanted = world(labels, body_points(labels)[int(example["label"])])
        np.testing.assert_allclose(example["centroid"], wanted, atol=1e-3)


def test_a_plain_folder_is_split_by_patient(tmp_path):
    root = tmp_path / "hospital"
    ct, labels = make_volume(11, "LPS")
    names = [f"p{number}_{series}" for number in range(30) for series in "ab"]
    for name in names:
        # Splitting reads names only.
        (root / name).mkdir(parents=True)
        (root / name / f"{name}_ct.nii.gz").touch()
        (root / name / f"{name}_mask.nii.gz").touch()
    found = verse.find_scans(root)
    split_of = {scan.patient: scan.split for scan in found}
    assert len(found) == 60 and len(split_of) == 30 and set(split_of.values()) == set(verse.SPLITS)
    assert all(scan.split == split_of[scan.patient] for scan in found)
    for name in names[2:]:
        (root / name / f"{name}_ct.nii.gz").unlink()
        (root / name / f"{name}_mask.nii.gz").unlink()
    assert {scan.patient: scan.split for scan in verse.find_scans(root)} == {"p0": split_of["p0"]}
    for name in names[:2]:
        save(ct, root / name / f"{name}_ct.nii.gz")
        save(labels, root / name / f"{name}_mask.nii.gz")
    found = examples_of(verse.prepare(root, tmp_path / "tfds"))
    assert len(found) == 6 and {split for split, _ in found} == {split_of["p0"]}
    assert all(np.isnan(example["centroid"]).all() for _, example in found)
    assert_same_voxels(found[0][1], ct, labels)


def dicom_subject(folder, name):
    """Writes a series of DICOM slices and its label map, L2 below L1, stored along other axes; returns the series' paths."""
    series = ct_files.write_series(folder / f"{name}_ct" / "slices", ct_files.slices())
    labels = np.zeros(ct_files.SIZE, np.uint8)
    labels[9:20, 6:21, 1:3], labels[11:23, 8:24, 3:5] = 21, 20
    ct_files.write_nifti(folder / f"{name}_mask.nii.gz", labels, ct_files.nifti_affine(), "PIR")
    return series, labels


def places(shape, affine):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("config", ["lumbar", "lumbar_scans"])
def test_a_ct_may_be_a_folder_of_dicom_slices(tmp_path, config):
    series, labels = dicom_subject(tmp_path / "raw" / "validation", "p1_a")
    found = examples_of(verse.prepare(tmp_path / "raw", tmp_path / "tfds", config))
    assert len(found) == {"lumbar": 2, "lumbar_scans": 1}[config]
    stored = places(ct_files.SIZE, ct_files.nifti_affine())
    for split, example in found:
        assert (split, example["patient"], example["scan"]) == ("validation", b"p1", b"p1_a")
        here = places(example["hu"].shape, example["ct_from_index"])
        # Rounding: half of the files' largest step, plus half an HU.
        np.testing.assert_allclose(example["hu"], ct_files.hu_at(here), atol=1.01)
        for label in np.atleast_1d(example.get("complete", example.get("label"))):
            np.testing.assert_allclose(
                np.sort(here[example["labels"] == label], axis=0), np.sort(stored[labels == label], axis=0), atol=1e-3
            )
    series[2].unlink()
    refusal(lambda: verse.prepare(tmp_path / "raw", tmp_path / "tfds", config), "another folder")
    refusal(lambda: verse.prepare(tmp_path / "raw", tmp_path / "again", config), "p1_a_ct", "missing slice")
    assert not list(tmp_path.glob("again/**/*.array_record*"))


def test_only_a_folder_without_other_cts_is_a_series(tmp_path):
    inner = tmp_path / "hospital_ct" / "p1_ct"
    inner.mkdir(parents=True)
    (inner / "notes.txt").touch()
    for name in ("hospital_ct/p1_mask.nii.gz", "hospital_ct/p2_ct.nii.gz", "hospital_ct/p2_mask.nii.gz"):
        (tmp_path / name).touch()
    assert {scan.name: scan.ct for scan in verse.find_scans(tmp_path)} == {
        "p1": inner,
        "p2": tmp_path / "hospital_ct/p2_ct.nii.gz",
    }
    (tmp_path / "p1_ct.nii.gz").touch()
    refusal(lambda: verse.find_scans(tmp_path), "p1_ct", "every scan once")
    (tmp_path / "p1_ct.nii.gz").unlink()
    (tmp_path / "hospital_ct/p1_mask.nii.gz").unlink()
    refusal(lambda: verse.find_scans(tmp_path), "p1_ct: mask", "p1_mask.nii.gz")


def test_tensorflow_is_never_imported(subjects, tmp_path):
    code = (
        "import sys\nfrom data_pipelines.ct import verse\n"
        f"builder = verse.prepare({str(subjects[0])!r}, {str(tmp_path)!r})\n"
        "print(len(builder.as_data_source('test')), builder.as_data_source('test')[0]['hu'].shape)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("3 (")
    assert list(tmp_path.glob("verse/lumbar/*/*test.array_record*"))


def fake(number, split="training"):
    path = pathlib.Path(f"{number}")
    return verse.ScanFiles(f"verse{number}", f"sub-verse{number}", split, path, path, None)


def test_the_selection_is_compared_with_the_papers():
    five = (20, 21, 22, 23, 24)
    right = {fake(n): five + (25,) if n < 15 else five if n < 253 else () for n in range(300)}
    held = verse.selection_summary(right)
    assert (held["cases"], held["scans"], held["vertebrae"]) == (300, 253, 1280)
    assert held["whole"] and held["agrees"] and held["by_split"]["training"] == 253
    wrong = verse.selection_summary({**right, fake(300): (24,)})
    assert wrong["whole"] and not wrong["agrees"] and "+1 scans and +1 vertebrae" in wrong["line"]
    part = verse.selection_summary({fake(n): five for n in range(10)})
    assert not part["whole"] and "not to be held against" in part["line"]


def test_a_difference_from_the_papers_selection_is_logged_and_stored(subjects, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(verse, "PAPER_CASES", 5)
    with caplog.at_level(logging.WARNING):
        builder = verse.prepare(subjects[0], tmp_path)
    assert any("-248 scans and -1265 vertebrae" in record.getMessage() for record in caplog.records)
    again = verse.prepare(subjects[0], tmp_path).info.metadata
    assert not again["agrees"] and again["vertebrae"] == 15 and again["line"] == builder.info.metadata["line"]


def test_hounsfield_numbers_that_are_not_whole_are_rounded(tmp_path):
    ct, labels = make_volume(12, "RAS")
    values = np.asarray(ct.dataobj) + 0.3
    save(nibabel.Nifti1Image(values.astype(np.float32), ct.affine), tmp_path / "raw/x_ct.nii.gz")
    save(labels, tmp_path / "raw/x_mask.nii.gz")
    _, example = examples_of(verse.prepare(tmp_path / "raw", tmp_path / "tfds"))[0]
    assert_same_voxels(example, ct, labels)


def refusal(call, *parts):
    with pytest.raises(errors.InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def empty_scan(root, relative, mask_end="_seg-vert_msk"):
    path = root / f"{relative}_ct.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    mask = pathlib.Path(str(root / relative) + mask_end + ".nii.gz")
    mask.touch()


def test_folders_that_cannot_be_right_are_refused(tmp_path):
    find = lambda name: lambda: verse.find_scans(tmp_path / name)
    (tmp_path / "none").mkdir()
    refusal(find("none"), "no CT")
    empty_scan(tmp_path / "two", "training/sub-verse400_split-verse090")
    empty_scan(tmp_path / "two", "test/sub-verse400_split-verse155")
    refusal(find("two"), "patient verse400", "test and training", "one split")
    empty_scan(tmp_path / "twice", "verse19/training/sub-verse004")
    empty_scan(tmp_path / "twice", "verse20/training/sub-verse004")
    refusal(find("twice"), "sub-verse004_ct.nii.gz", "every scan once")
    empty_scan(tmp_path / "mixed", "training/sub-verse004")
    empty_scan(tmp_path / "mixed", "sub-verse005")
    refusal(find("mixed"), "sub-verse005_ct.nii.gz", "training, validation and test")
    empty_scan(tmp_path / "both", "dataset-verse20training/test/sub-verse004")
    refusal(find("both"), "test and training")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x_ct.nii.gz").touch()
    refusal(find("bare"), "x_ct.nii.gz", "mask", "x_mask.nii.gz")
    refusal(lambda: verse.prepare(tmp_path / "absent", tmp_path), "absent", "folder")


def test_a_mask_without_a_ct_is_left_out(tmp_path, caplog):
    by_subject(tmp_path / "raw", "training", "sub-verse004", 1, "PIR")
    (tmp_path / "raw/dataset-verse20training/GL020_seg.nii.gz").touch()
    with caplog.at_level(logging.WARNING):
        assert len(examples_of(verse.prepare(tmp_path / "raw", tmp_path / "tfds"))) == 3
    assert any("GL020_seg.nii.gz" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "text, part",
    [
        ("{", "valid JSON"),
        ("{}", "a list of objects"),
        ("[3]", "an object with label, X, Y, Z"),
        ('[{"direction": ["P", "I"]}]', "axis codes"),
        ('[{"direction": ["P", "A", "R"]}]', "axis codes"),
        ('[{"direction": [1, 2, 3]}]', "axis codes"),
        ('[{"direction": ["R", "A", "S"]}, {"label": 20, "X": 1, "Y": 2}]', "Z: found 'nothing', wanted a number"),
        (
            '[{"direction": ["R", "A", "S"]}, {"label": "20", "X": 1, "Y": 2, "Z": 3}]',
            "label: found '20', wanted a whole number",
        ),
        ('[{"direction": ["R", "A", "S"]}, {"label": 20, "X": 200, "Y": 2, "Z": 3}]', "mm off its mask"),
        ('[{"direction": "RAS"}]', "axis codes"),
        ('[{"direction": ["R", "A", "S"]}, {"label": 20, "X": Infinity, "Y": 2, "Z": 3}]', "finite numbers"),
        (
            '[{"direction": ["R", "A", "S"]}, {"label": 20, "X": 1' + "0" * 400 + ', "Y": 2, "Z": 3}]',
            "numbers of 64 bits",
        ),
        ("[" * 100000, "valid JSON"),
        ('[{"label": 20, "X": 1, "Y": 2, "Z": 300}]', "mm off its mask"),
    ],
)
def test_centroid_files_that_cannot_be_right_are_refused(tmp_path, text, part):
    ct, labels = make_volume(1, "RAS")
    save(ct, tmp_path / "x_ct.nii.gz")
    save(labels, tmp_path / "x_mask.nii.gz")
    (tmp_path / "x_ctd.json").write_text(text)
    scan = scans.read_scan(tmp_path / "x_ct.nii.gz", tmp_path / "x_mask.nii.gz")
    refusal(lambda: centroid_files.read_centroids(tmp_path / "x_ctd.json", scan), "x_ctd.json", part)


def test_a_damaged_scan_leaves_no_dataset(tmp_path):
    root = tmp_path / "raw"
    by_subject(root, "training", "sub-verse004", 1, "PIR")
    path = root / "dataset-verse20training/rawdata/sub-verse004/sub-verse004_ct.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    refusal(lambda: verse.prepare(root, tmp_path / "tfds"), "sub-verse004_ct.nii.gz")
    assert not list(tmp_path.glob("tfds/**/*.array_record*"))


def test_no_vertebra_in_sight_is_refused(tmp_path):
    ct, labels = make_volume(1, "RAS")
    only_cut = np.where(np.asarray(labels.dataobj) == 19, 20, 0).astype(np.uint8)
    save(ct, tmp_path / "raw/x_ct.nii.gz")
    save(nibabel.Nifti1Image(only_cut, labels.affine), tmp_path / "raw/x_mask.nii.gz")
    refusal(lambda: verse.prepare(tmp_path / "raw", tmp_path / "tfds"), "none complete")


def test_a_dataset_of_another_folder_is_not_taken_for_this_one(subjects, vertebrae, tmp_path):
    by_subject(tmp_path, "training", "sub-verse004", 1, "PIR")
    data_dir = pathlib.Path(vertebrae.data_dir).parents[2]
    refusal(lambda: verse.prepare(tmp_path, data_dir), "another folder")
    assert verse.prepare(subjects[0], data_dir).info.splits["training"].num_examples == 6


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_real_scans_and_centroids(tmp_path):
    labels, affine = nifti.read_nifti(SHARED / "verse004_mask" / "sub-verse004_seg-vert_msk.nii.gz")
    labels = labels.astype(np.uint8)
    scan = scans.Scan("verse004", np.zeros(labels.shape, np.float32), labels, affine)
    centroids = centroid_files.read_centroids(SHARED / "verse004_mask" / "sub-verse004_seg-subreg_ctd.json", scan)
    assert sorted(centroids) == list(range(16, 25))
    for label, point in centroids.items():
        mask = np.argwhere(labels == label) @ affine[:3, :3].T + affine[:3, 3]
        assert np.linalg.norm(mask - point, axis=1).min() < 2.0
    found = examples_of(verse.prepare(SHARED / "tptbox_L3", tmp_path))
    assert [(int(example["label"]), example["patient"]) for _, example in found] == [(22, b"tptbox22")]
    assert extraction.extract(verse.as_scan(found[0][1]), 22, 64).label == 22
