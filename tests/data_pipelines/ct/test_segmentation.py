"""Label maps: every numbering becomes VerSe's or is refused. TotalSegmentator's command line is run, here a fake program."""

import json
import pathlib
import stat
import subprocess
import sys

import ct_files
import nibabel
import numpy as np
import pytest

from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from data_pipelines.io import files
from data_pipelines.io import nifti
from radgs_jax import errors
from radgs_jax import levels

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def _spine(numbers, affine=None, shape=(10, 12, 40)):
    """A label map whose vertebrae, listed from the head down, are bricks; (array, affine), oblique and off-centre."""
    labels = np.zeros(shape, np.uint8)
    for place, number in enumerate(numbers):
        top = shape[2] - 2 - 5 * place
        labels[2:8, 3:9, top - 4 : top] = number
    return labels, ct_files.nifti_affine(ct_files.OBLIQUE) if affine is None else affine


def _canonical(labels, affine):
    return nifti.to_canonical(labels, affine)[0]


def _write(path, labels, affine, names=None):
    image = nibabel.Nifti1Image(labels, affine)
    if names:
        table = "".join(f'<Label Key="{k}" Red="1" Alpha="1"><![CDATA[{v}]]></Label>\n' for k, v in names.items())
        xml = (
            f"<CaretExtension> <VolumeInformation><LabelTable>{table}</LabelTable></VolumeInformation></CaretExtension>"
        )
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, xml.encode()))
    nibabel.save(image, path)
    return path


def test_the_tables_of_both_versions():
    """First, last and some other classes of TotalSegmentator's class maps, by name."""
    two, one = segmentation.LABEL_MAPS["totalsegmentator"], segmentation.LABEL_MAPS["totalsegmentator_v1"]
    expected = {  # name: (version 2, version 1, VerSe)
        "L5": (27, 18, 24), "L1": (31, 22, 20), "T12": (32, 23, 19), "T11": (33, 24, 18), "T4": (40, 31, 11),
        "T1": (43, 34, 8), "C7": (44, 35, 7), "C2": (49, 40, 2), "C1": (50, 41, 1), "sacrum": (25, 92, 26),
    }  # fmt: skip
    for name, (in_two, in_one, verse) in expected.items():
        assert two[in_two] == one[in_one] == verse
        assert levels.level_name(verse) == name
    assert two[26] == 26 and len(two) == 26 and len(one) == 25
    values = np.array([[0, 27], [50, 117]])
    np.testing.assert_array_equal(segmentation.to_verse(values, two), [[0, 24], [1, 0]])


def test_verse_numbers_are_taken_as_they_are(tmp_path):
    labels, affine = _spine([19, 20, 21])
    path = _write(tmp_path / "m.nii.gz", labels.astype(np.float32), affine)
    found, _ = segmentation.read_labels(path)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, _canonical(labels, affine))


@pytest.mark.parametrize("version", ["totalsegmentator", "totalsegmentator_v1"])
def test_a_table_of_names_gives_the_numbering(tmp_path, version):
    inverse = {verse: value for value, verse in segmentation.LABEL_MAPS[version].items()}
    names = {value: segmentation._NAMES[verse - 1] for verse, value in inverse.items() if verse < 25}
    names[5] = "liver"
    labels, affine = _spine([inverse[v] for v in (18, 19, 20, 21)])
    labels[0, 0, 0] = 5
    path = _write(tmp_path / "named.nii.gz", labels, affine, names)
    wanted = _canonical(_spine([18, 19, 20, 21])[0], affine)
    np.testing.assert_array_equal(segmentation.read_labels(path)[0], wanted)
    # Without the table the file is refused, unless the numbering is given.
    bare = _write(tmp_path / "bare.nii.gz", labels, affine)
    with pytest.raises(errors.InputError, match=r"wanted VerSe numbers, or a word on what they are: --labels="):
        segmentation.read_labels(bare)
    np.testing.assert_array_equal(segmentation.read_labels(bare, version)[0], wanted)


def test_ambiguous_numbers_are_distinguished_by_their_order(tmp_path):
    """TotalSegmentator 1 numbers L5 to L1 from 18 to 22, which are VerSe numbers as well."""
    path = _write(tmp_path / "m.nii.gz", *_spine([22, 21, 20, 19, 18]))
    with pytest.raises(errors.InputError, match="labels: found numbers that count from the feet up"):
        segmentation.read_labels(path)
    found = segmentation.read_labels(path, "totalsegmentator_v1")[0]
    np.testing.assert_array_equal(np.unique(found), [0, 20, 21, 22, 23, 24])


def test_an_unknown_numbering_is_named(tmp_path):
    path = _write(tmp_path / "m.nii.gz", *_spine([19, 20, 21]))
    with pytest.raises(ValueError, match="label_map is 'nnunet', wanted one of verse, totalsegmentator_v1"):
        segmentation.read_labels(path, "nnunet")


def test_a_scan_is_read_with_a_totalsegmentator_map(tmp_path):
    labels, affine = _spine([31, 30, 29])
    mask = _write(tmp_path / "m.nii.gz", labels, affine)
    ct = _write(tmp_path / "ct.nii.gz", np.zeros(labels.shape, np.int16), affine)
    assert sorted(scans.read_scan(ct, mask, label_map="totalsegmentator").boxes) == [20, 21, 22]


# --- running TotalSegmentator ----------------------------------------------------------------------------------------

STAND_IN = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("2.5.0")
    sys.exit(0)
pathlib.Path({log!r}).write_text(json.dumps(arguments))
if {fails}:
    print("loading", file=sys.stderr)
    print("RuntimeError: no weights", file=sys.stderr)
    sys.exit(3)
import nibabel, numpy
ct = nibabel.load(arguments[arguments.index("-i") + 1])
labels = numpy.load({labels!r})
nibabel.save(nibabel.Nifti1Image(labels, ct.affine), arguments[arguments.index("-o") + 1])
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Installs a fake TotalSegmentator that returns given labels and writes its arguments to a file."""
    log = tmp_path / "arguments.json"

    def install(labels, fails=False):
        np.save(tmp_path / "labels.npy", labels)
        path = tmp_path / "bin" / "TotalSegmentator"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            STAND_IN.format(python=sys.executable, log=str(log), fails=fails, labels=str(tmp_path / "labels.npy"))
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent))
        return log

    return install


def test_totalsegmentator_is_run_and_recorded(tmp_path, program):
    labels, affine = _spine([31, 30, 29])
    labels[0, 0, 0] = 5
    ct = _write(tmp_path / "ct.nii.gz", np.zeros(labels.shape, np.int16), affine)
    log = program(labels)
    options = segmentation.SegmentOptions(fast=True, device="cpu")
    segmentation.segment(ct, tmp_path / "out" / "mask.nii.gz", options=options)
    found, grid = nifti.read_nifti(tmp_path / "out" / "mask.nii.gz")
    np.testing.assert_array_equal(found, _canonical(_spine([20, 21, 22])[0], affine))
    np.testing.assert_allclose(grid, nifti.read_nifti_grid(ct)[1], atol=1e-4)
    called = json.loads(log.read_text())
    assert called[called.index("-i") + 1] == str(ct) and "--ml" in called and "--fast" in called
    assert called[called.index("--device") + 1] == "cpu" and called.count("vertebrae_L3") == 1
    record = files.read_json(tmp_path / "out" / "mask.json")
    assert (record["program"], record["version"]) == ("TotalSegmentator", "2.5.0")
    assert record["vertebrae"] == [20, 21, 22] and "--fast" in record["options"]
    assert record["ct"] == {"name": "ct.nii.gz", "sha256": files.sha256(ct)}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mask.json", "mask.nii.gz"]
    assert sorted(scans.read_scan(ct, tmp_path / "out" / "mask.nii.gz").boxes) == [20, 21, 22]


def test_a_dicom_series_is_handed_over_as_nifti(tmp_path, program):
    ct_files.write_series(tmp_path / "series", ct_files.slices())
    shape = scans.read_ct(tmp_path / "series")[0].shape
    labels = np.zeros(shape, np.uint8)
    labels[3:30, 4:30, 2:4] = 31
    log = program(labels)
    segmentation.segment(tmp_path / "series", tmp_path / "mask.nii.gz")
    assert json.loads(log.read_text())[1].endswith("ct.nii.gz")
    assert sorted(scans.read_scan(tmp_path / "series", tmp_path / "mask.nii.gz").boxes) == [20]


def test_an_existing_mask_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    labels, affine = _spine([31, 30])
    ct = _write(tmp_path / "ct.nii.gz", np.zeros(labels.shape, np.int16), affine)
    mask = _write(tmp_path / "given.nii.gz", labels, affine)
    record = segmentation.segment(ct, tmp_path / "mask.nii.gz", mask, "totalsegmentator")
    assert record["vertebrae"] == [20, 21] and record["mask"]["sha256"] == files.sha256(mask)
    elsewhere = affine.copy()
    elsewhere[1, 3] += 3.0
    moved = _write(tmp_path / "moved.nii.gz", labels, elsewhere)
    with pytest.raises(errors.InputError, match="affine: found a grid 3.00 mm away from the CT's"):
        segmentation.segment(ct, tmp_path / "no.nii.gz", moved, "totalsegmentator")
    assert not (tmp_path / "no.nii.gz").exists() and not (tmp_path / "no.json").exists()


def test_failures_are_one_line_and_leave_nothing(tmp_path, program, monkeypatch):
    labels, affine = _spine([31, 30])
    ct = _write(tmp_path / "ct.nii.gz", np.zeros(labels.shape, np.int16), affine)
    out = tmp_path / "out" / "mask.nii.gz"
    program(labels, fails=True)
    with pytest.raises(errors.InputError, match="exit status 3: found RuntimeError: no weights, wanted"):
        segmentation.segment(ct, out)
    program(np.zeros_like(labels))
    with pytest.raises(errors.InputError, match="labels: found an empty mask"):
        segmentation.segment(ct, out)
    program(labels[:-1])
    with pytest.raises(errors.InputError, match="shape in RAS order"):
        segmentation.segment(ct, out)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        errors.InputError, match=r"found nothing on the PATH, wanted it installed \(pip install TotalSeg"
    ):
        segmentation.segment(ct, out)
    assert not out.parent.exists()


def test_the_command_is_one_line_on_bad_input(tmp_path):
    command = [sys.executable, "-m", "experiments.segment", "--ct=none.nii.gz", f"--output={tmp_path}/m.nii.gz"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: none.nii.gz: file: found nothing, wanted a readable file\n"
