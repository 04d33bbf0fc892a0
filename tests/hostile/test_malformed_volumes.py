"""Malformed and hostile volumes, arrays and JSON: each is one clear line, quickly and in little memory.

All files are made by changing valid ones, and read by one worker process, which measures CPU time and peak memory.
"""

import io
import json
import pathlib
import subprocess
import sys
import zipfile

import ct_files
import malformed_arrays
import malformed_volumes
import numpy as np
import pytest

from data_pipelines.io import files
from data_pipelines.io import nifti

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 2.0
"""CPU time that reading a file may take."""
MEMORY_KB = 1_000_000
"""Memory in KB by which it may raise the peak."""
WORKER = r"""
import json, pathlib, sys, time
from data_pipelines import cases
from data_pipelines.ct import scans, segmentation
from data_pipelines.ct import centroid_files
from data_pipelines.io import files
from radgs_jax import errors
import pydicom.pixels, gdcm
folder = pathlib.Path(sys.argv[1])
# Each reader reads its valid file first, so that imports are not measured.
good = scans.read_scan(folder / "good_ct.nii.gz", folder / "good_mask.nii.gz")
readers = {
    "ct": scans.read_ct,
    "mask": segmentation.read_labels,
    "scan": lambda path: scans.read_scan(folder / "good_ct.nii.gz", path),
    "npy": files.read_npy,
    "npz": lambda path: files.read_npz(path, "a"),
    "json": files.read_json,
    "cases": cases.read,
    "centroids": lambda path: centroid_files.read_centroids(path, good),
}
good_files = {"ct": "good_ct.nii.gz", "mask": "good_mask.nii.gz", "scan": "good_mask.nii.gz", "npy": "good.npy",
              "npz": "good.npz", "json": "good_cases.json", "cases": "good_cases.json", "centroids": "good_centroids.json"}
for name, file in good_files.items():
    readers[name](folder / file)
scans.read_ct(folder / "good_dicom")
def peak_kb():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak_kb()
report = {}
for name, reader, path in json.loads((folder / "list.json").read_text()):
    start = time.process_time()
    try:
        readers[reader](pathlib.Path(path))
        kind, text = "accepted", ""
    except errors.InputError as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
    report[name] = [kind, text, time.process_time() - start, peak_kb() - before]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """Writes every file; returns the folder and a list of (name, reader, path)."""
    root = tmp_path_factory.mktemp("malformed")
    labels = np.zeros(malformed_volumes.SHAPE, np.uint8)
    labels[3:9, 3:7, 2:6] = 20
    nifti.write_nifti(root / "good_ct.nii.gz", malformed_volumes.volume(), malformed_volumes.AFFINE)
    nifti.write_nifti(root / "good_mask.nii.gz", labels, malformed_volumes.AFFINE)
    np.save(root / "good.npy", np.zeros((4, 6), np.float32))
    files.write_npz(root / "good.npz", a=np.zeros((4, 6), np.float32))
    files.write_json(root / "good_cases.json", malformed_arrays.case_document())
    files.write_json(root / "good_centroids.json", malformed_arrays.CENTROIDS)
    ct_files.write_series(root / "good_dicom", ct_files.slices())
    entries = []

    def add(name, reader, data, suffix):
        path = root / f"bad{len(entries)}{suffix}"
        path.write_bytes(data)
        entries.append((name, reader, str(path)))

    for name, reader, data, suffix in malformed_volumes.niftis():
        add(name, reader, data, suffix)
    for name, data in malformed_arrays.NPYS.items():
        if name != "shape of no voxels":
            add(f"npy {name}", "npy", data, ".npy")
    for name, data in malformed_arrays.npzs():
        add(name, "npz", data, ".npz")
    for name, reader, data in malformed_arrays.json_files():
        add(name, reader, data, ".json")
    entries += [(name, "ct", str(folder)) for name, folder in malformed_volumes.dicom_series(root)]
    for reader in ("ct", "mask", "npy", "npz", "json", "centroids"):
        entries.append((f"no file for {reader}", reader, str(root / "absent")))
        entries.append((f"zero byte in the name for {reader}", reader, str(root / "a\0b")))
        entries.append((f"device for {reader}", reader, "/dev/zero"))
        if reader != "ct":
            entries.append((f"folder for {reader}", reader, str(root)))
    (root / "list.json").write_text(json.dumps(entries))
    return root, entries


@pytest.fixture(scope="module")
def report(listed):
    root, _ = listed
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(root)], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_each_malformed_file_is_refused_with_one_line_that_names_it(listed, report):
    _, entries = listed
    assert len(entries) == len(report) >= 150
    wrong = {}
    for name, _, path in entries:
        kind, text, _, _ = report[name]
        file = pathlib.Path(path).name.replace("\0", "\\x00")
        clear = ": found " in text and ", wanted " in text and text.isprintable() and len(text) < 1000
        if kind != "refused" or not clear or not (file in text or pathlib.Path(path).name in text):
            wrong[name] = (kind, text[:300])
    assert not wrong


def test_each_takes_little_time_and_memory(report):
    slow = {name: round(seconds, 2) for name, (_, _, seconds, _) in report.items() if seconds > SECONDS}
    assert not slow
    large = {name: kb for name, (_, _, _, kb) in report.items() if kb > MEMORY_KB}
    assert not large


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_method_of_zip_is_read(tmp_path, method):
    """The X-rays of the bench cases are compressed by LZMA."""
    stream = io.BytesIO()
    wanted = np.asfortranarray(np.arange(24, dtype=">f4").reshape(4, 6))
    np.save(stream, wanted)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("a.npy", stream.getvalue())
    found = files.read_npz(tmp_path / "a.npz", "a")["a"]
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype


def test_limits_leave_room_for_a_whole_body():
    assert 512 * 512 * 1500 <= files.MAX_VOXELS and 512 * 512 * 1500 * 4 <= files.MAX_VOLUME_BYTES
    assert 2 * 3000**2 * 4 <= files.MAX_ARRAY_BYTES
