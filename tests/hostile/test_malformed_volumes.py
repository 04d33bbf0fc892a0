"""Damaged, lying and hostile volumes, arrays and JSON: each is one clear line, quickly and in little memory.

All files are made here by mutating good ones, and read by one worker process, which measures CPU time and peak memory.
"""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import struct
import subprocess
import sys
import zipfile
import zlib

import ct_files
import nibabel
import numpy as np
import pydicom
import pydicom.encaps
import pydicom.uid
import pytest

from data_pipelines import cases
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.io import nifti
from radgs_jax.geometry import camera

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 2.0
MEMORY_KB = 1_000_000
SHAPE = (12, 10, 8)
AFFINE = ct_files.nifti_affine()

WORKER = r"""
import json, pathlib, sys, time
from data_pipelines import cases
from data_pipelines.ct import scans, segmentation
from data_pipelines.ct import centroid_files
from data_pipelines.io import files
from radgs_jax import errors
import pydicom.pixels, gdcm
folder = pathlib.Path(sys.argv[1])
# Each reader runs on its good file first: what it imports and builds once does not count.
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


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def _volume(dtype=np.int16):
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 100).astype(dtype)


def _header(change=lambda header: None, dtype=np.int16, kind=nibabel.Nifti1Image):
    """Header bytes of a good volume, changed behind nibabel's back, and the extension flag behind it."""
    image = kind(_volume(dtype), AFFINE)
    image.header.set_xyzt_units("mm")
    header = nibabel.Nifti1Header(image.to_bytes()[:348]) if kind is nibabel.Nifti1Image else None
    header = header or nibabel.Nifti2Header(image.to_bytes()[:540])
    change(header._structarr)
    return header.binaryblock + bytes(4)


def _set(**values):
    def change(header):
        for name, value in values.items():
            with np.errstate(invalid="ignore"):
                header[name] = value

    return change


def _dim(*values):
    return _set(dim=[*values, *[1] * (8 - len(values))])


def _sform(matrix, column=None, value=None):
    matrix = np.array(matrix, np.float64)
    if column is not None:
        matrix[:, column] = value
    return _set(srow_x=matrix[0], srow_y=matrix[1], srow_z=matrix[2])


def _qform(**values):
    return _set(sform_code=0, qform_code=1, **{"pixdim": [1, 1, 1, 1, 0, 0, 0, 0], **values})


HEADERS = {
    "no axes": _dim(0, 12, 10, 8),
    "minus one axis": _dim(-1, 12, 10, 8),
    "eight axes": _dim(8, 12, 10, 8),
    "a hundred axes": _dim(100, 12, 10, 8),
    "one axis": _dim(1, 960),
    "two axes": _dim(2, 96, 10),
    "no columns": _dim(3, 0, 10, 8),
    "minus five rows": _dim(3, 12, -5, 8),
    "a slice more": _dim(3, 12, 10, 9),
    "a slice less": _dim(3, 12, 10, 7),
    "two volumes": _dim(4, 12, 10, 4, 2),
    "30000^3": _dim(3, 30000, 30000, 30000),
    "32767^7": _dim(7, *[32767] * 7),
    "512 x 512 x 1500": _dim(3, 512, 512, 1500),
    "complex": _set(datatype=32, bitpix=64, dim=[3, 12, 10, 2, 1, 1, 1, 1]),
    "complex 128": _set(datatype=1792, bitpix=128),
    "RGB": _set(datatype=128, bitpix=24),
    "RGBA": _set(datatype=2304, bitpix=32),
    "float 128": _set(datatype=1536, bitpix=128),
    "no type": _set(datatype=0),
    "bits": _set(datatype=1, bitpix=1),
    "type 9999": _set(datatype=9999),
    "wider type": _set(datatype=64, bitpix=64),
    "offset 100": _set(vox_offset=100),
    "offset 1e9": _set(vox_offset=1e9),
    "offset nan": _set(vox_offset=np.nan),
    "offset inf": _set(vox_offset=np.inf),
    "offset -352": _set(vox_offset=-352),
    "offset 360.5": _set(vox_offset=360.5),
    "nan affine": _sform(AFFINE, 1, np.nan),
    "inf affine": _sform(AFFINE, 3, np.inf),
    "zero affine": _sform(np.zeros((3, 4))),
    "zero column": _sform(AFFINE, 0, 0.0),
    "flat affine": _sform(AFFINE, 0, AFFINE[:, 1]),
    "huge voxels": _sform(AFFINE * 1e20),
    "tiny voxels": _sform(AFFINE * [1e-9, 1e-9, 1e-9, 1]),
    "far away": _sform(AFFINE, 3, 1e30),
    "no orientation": _set(sform_code=0, qform_code=0),
    "qform without spacing": _qform(pixdim=[1, 0, 1, 1, 0, 0, 0, 0]),
    "qform of negative spacing": _qform(pixdim=[1, 1, -1, 1, 0, 0, 0, 0]),
    "qform of nan spacing": _qform(pixdim=[1, 1, np.nan, 1, 0, 0, 0, 0]),
    "qform that is no turn": _qform(quatern_b=0.9, quatern_c=0.9, quatern_d=0.9),
    "qform of nan turn": _qform(quatern_b=np.nan),
    "nan intercept": _set(scl_slope=2, scl_inter=np.nan),
    "overflowing slope": _set(scl_slope=3e38, scl_inter=0),
    "metres": _set(xyzt_units=1),
    "microns": _set(xyzt_units=3),
    "header in two files": _set(magic=b"ni1"),
    "no magic": _set(magic=b"abc"),
    "wrong header size": _set(sizeof_hdr=347),
}


def _bomb(front, count, length, tail=b""):
    """A gzip file of `front`, `count` MiB of zeros and `tail`, whose trailer declares `length` bytes; made without inflating."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(front) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.compress(tail) + packer.flush()
    return b"\x1f\x8b\x08" + bytes(7) + start + block * count + end + struct.pack("<II", 0, length % 2**32)


def _niftis():
    """(name, reader, bytes, suffix) of every NIfTI to be refused."""
    body = _volume().tobytes(order="F")
    good = _header() + body
    packed = gzip.compress(good, 6, mtime=0)
    for name, change in HEADERS.items():
        data = _header(change) + body
        yield f"nifti {name}", "ct", data, ".nii"
        yield f"nifti gz {name}", "ct", gzip.compress(data, 1, mtime=0), ".nii.gz"
    for count in (0, 1, 3, 100, 347, 352, 700, len(good) - 1):
        yield f"nifti cut to {count}", "ct", good[:count], ".nii"
    yield "nifti with more behind it", "ct", good + bytes(1000), ".nii"
    for count in (1, 2, 5, 10, 18, 60, len(packed) // 2, len(packed) - 8, len(packed) - 4, len(packed) - 1):
        yield f"gzip cut to {count}", "ct", packed[:count], ".nii.gz"
    for place in (3, 40, len(packed) // 2, len(packed) - 20, len(packed) - 6, len(packed) - 2):
        spoilt = bytearray(packed)
        spoilt[place] ^= 0x55
        yield f"gzip spoilt at {place}", "ct", bytes(spoilt), ".nii.gz"
    yield "gzip with rubbish behind it", "ct", packed + b"rubbish!", ".nii.gz"
    yield "gzip twice", "ct", gzip.compress(packed), ".nii.gz"
    yield "gzip of nothing", "ct", gzip.compress(b""), ".nii.gz"
    yield "bzip2", "ct", bz2.compress(good), ".nii.gz"
    yield "xz", "ct", lzma.compress(good), ".nii.gz"
    yield "text", "ct", b"HU " * 500, ".nii.gz"
    yield "zeros", "ct", bytes(5000), ".nii"
    second = _header(_dim(3, 10**6, 10**6, 10**6), kind=nibabel.Nifti2Image)
    yield "nifti 2 of 10^18 voxels", "ct", second + body, ".nii"
    overflow = _header(_dim(3, 2**62, 2**62, 4), kind=nibabel.Nifti2Image)
    yield "nifti 2 whose size overflows", "ct", overflow + body, ".nii"
    yield "nifti 2 of negative size", "ct", _header(_dim(3, -(2**40), 10, 8), kind=nibabel.Nifti2Image) + body, ".nii"

    thousand = 1000 * 2**20
    yield "bomb behind a small volume", "ct", _bomb(good, 8000, len(good) + 8 * thousand), ".nii.gz"
    yield "bomb that lies about its length", "ct", _bomb(good, 8000, len(good)), ".nii.gz"
    yield "bomb that says 30000^3", "ct", _bomb(_header(HEADERS["30000^3"]), 8000, 2 * 30000**3 + 352), ".nii.gz"
    body_header = _header(_dim(3, 512, 512, 1500))
    claimed = 512 * 512 * 1500 * 2 + 352
    yield "bomb behind a whole body", "ct", _bomb(body_header, 8000, claimed), ".nii.gz"
    yield "whole body cut off", "ct", _bomb(body_header, 740, claimed), ".nii.gz"
    yield "whole body in too few bytes", "ct", _bomb(body_header, 1, claimed), ".nii.gz"
    yield "whole body of a wrong checksum", "ct", _bomb(body_header, 750, claimed), ".nii.gz"
    labels = _header(_dim(3, 512, 512, 1000), np.uint8)
    claimed = 512 * 512 * 1000 + 352
    yield "bomb behind a whole body's labels", "mask", _bomb(labels, 8000, claimed), ".nii.gz"
    yield "whole body's labels cut off", "mask", _bomb(labels, 245, claimed), ".nii.gz"
    yield "bomb as a mask", "scan", _bomb(labels, 250, claimed), ".nii.gz"

    def mask(values, dtype, affine=AFFINE):
        return gzip.compress(nibabel.Nifti1Image(values.astype(dtype), affine).to_bytes(), 1)

    brick = np.zeros(SHAPE)
    brick[3:9, 3:7, 2:6] = 20
    half, one = brick * 1.02, brick.copy()
    one[0, 0, 0] = np.nan
    moved = AFFINE + 0.5 * np.eye(4)[:, [0]] * [[0, 0, 0, 1.0]]
    for name, data in {
        "empty mask": mask(np.zeros(SHAPE), np.uint8),
        "empty float mask": mask(np.zeros(SHAPE), np.float32),
        "mask between whole numbers": mask(half, np.float32),
        "mask of a nan": mask(one, np.float32),
        "mask of an infinity": mask(np.where(brick > 0, np.inf, 0), np.float64),
        "negative mask": mask(-brick, np.int16),
        "mask of 1000": mask(brick * 50, np.int16),
        "mask of unknown numbers": mask(brick * 3, np.uint8),
        "mask upside down": mask(np.where(np.arange(8) < 4, 20, 21) * np.ones(SHAPE), np.uint8),
        "mask on another grid": mask(brick, np.uint8, moved),
        "mask of another size": mask(brick[:-1], np.uint8),
    }.items():
        yield name, "scan", data, ".nii.gz"


# --- npy and npz -----------------------------------------------------------------------------------------------------


def _npy(text, body=bytes(96), version=b"\x01\x00", length=None):
    """An npy file with a header of our own writing."""
    width = "<H" if version[0] == 1 else "<I"
    return b"\x93NUMPY" + version + struct.pack(width, len(text) if length is None else length) + text.encode() + body


def _described(shape, descr="'<f4'", fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def _pickled():
    stream = io.BytesIO()
    np.save(stream, np.array([{}, []], object), allow_pickle=True)
    return stream.getvalue()


NPYS = {
    "empty": b"",
    "magic only": b"\x93NUMPY",
    "text": b"1 2 3\n",
    "version 9": _npy(_described("(4, 6)"), version=b"\x09\x00"),
    "no header": _npy(""),
    "header longer than the file": _npy(_described("(4, 6)"), length=60000),
    "header of 4 GB": _npy(_described("(4, 6)"), version=b"\x02\x00", length=2**32 - 1),
    "header that is no dict": _npy("[1, 2]\n"),
    "header that calls": _npy("__import__('os').abort()\n"),
    "header that nests": _npy("(" * 5000 + ")" * 5000),
    "no shape": _npy("{'descr': '<f4', 'fortran_order': False}\n"),
    "shape of text": _npy(_described("('4', 6)")),
    "negative shape": _npy(_described("(-4, -6)")),
    "shape too large": _npy(_described("(4, 7)")),
    "shape too small": _npy(_described("(4, 5)")),
    "30000^3": _npy(_described("(30000, 30000, 30000)")),
    "shape that overflows": _npy(_described("(4294967296, 4294967296, 4)")),
    "shape of no voxels": _npy(_described("(0, 1000000)")),
    "objects": _pickled(),
    "claims objects": _npy(_described("(4, 6)", "'|O'")),
    "records": _npy(_described("(24,)", "[('a', '<f4')]")),
    "type of 2 GB": _npy(_described("(24,)", "'|V2147483647'")),
    "type that is none": _npy(_described("(24,)", "'<q9'")),
    "cut off": _npy(_described("(4, 6)"), bytes(95)),
    "more behind it": _npy(_described("(4, 6)"), bytes(97)),
}


def _zip(data, name=b"a.npy", declared=None, method=8, flags=0, packed=None, crc=None):
    """A zip archive of one member, each field as given."""
    if packed is None:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        packed = packer.compress(data) + packer.flush()
    size = len(data) if declared is None else declared
    crc = zlib.crc32(data) if crc is None else crc
    common = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, crc, len(packed), size, len(name), 0)
    local = b"PK\x03\x04" + common + name + packed
    central = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    return local + central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


def _npzs():
    good = _npy(_described("(4, 6)"))
    for name, data in NPYS.items():
        if name != "shape of no voxels":
            yield f"npz {name}", _zip(data)
    whole = _zip(good)
    for count in (0, 4, 30, len(whole) // 2, len(whole) - 1):
        yield f"npz cut to {count}", whole[:count]
    for place in (0, 60, 80, len(whole) - 10):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x55
        yield f"npz spoilt at {place}", bytes(spoilt)
    yield "npz without the array", _zip(good, b"b.npy")
    yield "npz of a wrong checksum", _zip(good, crc=1)
    yield "npz of an unknown method", _zip(good, method=99)
    yield "npz by bzip2, cut off", _zip(good, method=12, packed=bz2.compress(good)[:-40])
    long = io.BytesIO()
    with zipfile.ZipFile(long, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", _npy(_described("(4, 6)"), bytes(2**24)))
    yield "npz by LZMA with more behind it", long.getvalue()
    yield "npz encrypted", _zip(good, flags=1)
    yield "npz that says more than it holds", _zip(good, declared=len(good) + 500)
    yield "npz that says less than it holds", _zip(good, declared=len(good) - 20)
    front = _npy(_described("(1000000000,)"), b"")
    # Behind the gzip header and before its trailer stands the same raw stream that zip wants.
    stream = _bomb(front, 3814, 0, bytes(10**9 * 4 - 3814 * 2**20))[10:-8]
    yield "npz bomb of 4 GB", _zip(b"", packed=stream, declared=len(front) + 4 * 10**9, crc=0)
    yield "npz bomb that says 120 bytes", _zip(b"", packed=stream, declared=len(good), crc=0)
    tiny = _npy(_described("(4, 6)"), b"")
    stream = _bomb(tiny, 3000, 0)[10:-8]
    yield "npz bomb behind a small array", _zip(b"", packed=stream, declared=len(tiny) + 96, crc=0)
    yield "npz of more than deflate can reach", _zip(b"", packed=stream[:2000], declared=10**9, crc=0)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _case_document():
    E = np.eye(4)
    E[2, 3] = 700.0
    view = camera_files.view_json(camera.Camera(np.array([2000.0, 2000, 31.5, 31.5]), E, 64, 64), "ap")
    volume = {"patient": "p", "full_ct": "good_ct.nii.gz", "full_mask": "good_mask.nii.gz", "full_label": 20}
    scene = {"id": "s", "volume": "v", "T_gt": np.eye(4).tolist(), "views": [view], "xrays": "x.npz"}
    return {
        "format": cases.CASES_FORMAT,
        "volumes": {"v": volume},
        "scenes": [scene],
        "cases": [{"id": "c", "scene": "s", "T_init": np.eye(4).tolist()}],
    }


CASE_FIELDS = {  # place: values that it must not take; None stands for a field that is not there
    ("format",): (None, "biplanar-vertebra-cases/2", 1, []),
    ("volumes",): (None, [], "v", {"w": {}}),
    ("volumes", "v"): ("x", [], 3),
    ("volumes", "v", "full_ct"): (None, 3, []),
    ("volumes", "v", "full_mask"): (None, {}),
    ("volumes", "v", "full_label"): (None, "20", 20.5, True, 10**30),
    ("scenes",): (None, {}, 0),
    ("scenes", 0): ("s", 1, []),
    ("scenes", 0, "id"): (None, 7),
    ("scenes", 0, "volume"): (None, "w", ["v"]),
    ("scenes", 0, "xrays"): (None, 7),
    ("scenes", 0, "views"): (None, [], {}, [3], [{}]),
    ("scenes", 0, "views", 0, "E"): ([], "E", [[1.0] * 4] * 4, [[float("nan")] * 4] * 4, [[10**400] * 4] * 4, {}),
    ("scenes", 0, "views", 0, "K"): ([[1, 0], [0, 1]], [[0.0] * 3] * 3, [[float("inf")] * 3] * 3),
    ("scenes", 0, "views", 0, "height"): (None, 0, -3, 64.0, "64"),
    ("scenes", 0, "views", 0, "width"): (None, []),
    ("cases",): (None, {}, "c"),
    ("cases", 0): (None, 4),
    ("cases", 0, "id"): (None, []),
    ("cases", 0, "scene"): (None, "t"),
    ("cases", 0, "T_init"): (None, [], [[1, 0], [0, 1]], [[0.0] * 4] * 4, "T", [[1e999] * 4] * 4),
}


def _changed(document, place, value):
    document = json.loads(json.dumps(document))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if value is None and isinstance(inner, dict):
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return json.dumps(document).encode()


CENTROIDS = [{"direction": ["P", "I", "R"]}, {"label": 20, "X": 3.0, "Y": 4.5, "Z": 5.0}]
CENTROID_FIELDS = {
    (0,): (None, 3, []),
    (0, "direction"): (None, "PIR", ["P", "I"], ["P", "A", "R"], ["P", "I", 3], ["X", "Y", "Z"], [["P"], "I", "R"]),
    (1,): (None, "L1", [20, 3, 4, 5]),
    (1, "label"): (None, "20", 0, 300, 20.5, True, [20], float("nan")),
    (1, "X"): (None, "3", [3.0], True),
    # A NaN is a centroid that VerSe lacks.
    (1, "Z"): (float("-inf"), float("inf"), {}),
}


def _jsons():
    for place, values in CASE_FIELDS.items():
        for number, value in enumerate(values):
            name = f"cases {'.'.join(map(str, place))} {number}"
            yield name, "cases", _changed(_case_document(), place, value)
    for place, values in CENTROID_FIELDS.items():
        for number, value in enumerate(values):
            name = f"centroids {'.'.join(map(str, place))} {number}"
            yield name, "centroids", _changed(CENTROIDS, place, value)
    twice = json.dumps([*CENTROIDS, CENTROIDS[1]]).encode()
    yield "centroids twice", "centroids", twice
    yield "centroids of an object", "centroids", b'{"direction": ["P", "I", "R"]}'
    yield "centroids empty", "centroids", b"[]"
    for name, data in {
        "empty": b"",
        "cut off": json.dumps(_case_document()).encode()[:300],
        "two values": b"{} {}",
        "no JSON": b"format: cases",
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "with zero bytes": bytes(100),
        "nested 200000 deep": b"[" * 200000 + b"]" * 200000,
        "nested objects": b'{"a":' * 100000 + b"1" + b"}" * 100000,
        "of 5000 digits": b"[" + b"9" * 5000 + b"]",
        "of 10^400": b'{"a": 1' + b"0" * 400 + b"}",
        "with nan": b'{"a": [1, NaN]}',
        "with infinity": b'{"a": {"b": -Infinity}}',
        "with 1e999": b"[1e999]",
        "of 17 MB": b'"' + b"x" * (17 * 2**20) + b'"',
    }.items():
        yield f"json {name}", "json", data


# --- DICOM -----------------------------------------------------------------------------------------------------------


def _encapsulated(dataset, syntax, frame):
    dataset.PixelData = pydicom.encaps.encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax


def _jpeg_2000(dataset, rows=None):
    frame = bytearray(ct_files.jpeg_2000(dataset.pixel_array))
    place = frame.index(b"\xff\x51") + 6
    # The size that the codestream itself declares, by which a decoder allocates.
    for offset in (0, 4, 16, 20):
        frame[place + offset : place + offset + 4] = struct.pack(">I", rows)
    _encapsulated(dataset, pydicom.uid.JPEG2000Lossless, bytes(frame))


def _jpeg(dataset, rows=None, cut=None):
    frame = bytearray(ct_files.jpeg_lossless(dataset.pixel_array))
    if rows:
        frame[7:9] = struct.pack(">H", rows)
    _encapsulated(dataset, pydicom.uid.JPEGLosslessSV1, bytes(frame[:cut]))


def _rle(dataset):
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.PixelData = dataset.PixelData[:120]


def _deflated(path):
    """A dataset that inflates to 4 GB."""
    data = path.read_bytes()
    explicit, deflated = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.DeflatedExplicitVRLittleEndian
    old = explicit.encode() + bytes(len(explicit) % 2)
    new = deflated.encode() + bytes(len(deflated) % 2)
    at = data.index(old)
    length = 140 + struct.unpack("<I", data[140:144])[0] + 4
    meta = bytearray(data[:at] + new + data[at + len(old) : length])
    meta[at - 2 : at] = struct.pack("<H", len(new))
    meta[140:144] = struct.pack("<I", len(meta) - 144)
    path.write_bytes(bytes(meta) + _bomb(data[length:], 4000, 0)[10:-8])


DATASETS = {
    "no pixels": lambda d: d.pop("PixelData"),
    "empty pixels": lambda d: setattr(d, "PixelData", b""),
    "half the pixels": lambda d: setattr(d, "PixelData", d.PixelData[:1000]),
    "twice the pixels": lambda d: setattr(d, "PixelData", d.PixelData * 2),
    "no rows": lambda d: d.pop("Rows"),
    "zero columns": lambda d: setattr(d, "Columns", 0),
    "65535 rows": lambda d: setattr(d, "Rows", 65535),
    "7 bits": lambda d: setattr(d, "BitsAllocated", 7),
    "no syntax": lambda d: d.file_meta.pop("TransferSyntaxUID"),
    "100000 frames": lambda d: setattr(d, "NumberOfFrames", 100000),
    "unknown syntax": lambda d: _encapsulated(d, pydicom.uid.MPEG2MPML, b"\0\0\1\xb3" * 10),
    "cut JPEG": lambda d: _jpeg(d, cut=60),
    "headless JPEG": lambda d: _encapsulated(d, pydicom.uid.JPEGLosslessSV1, b"no JPEG at all, but some text"),
    "JPEG of 65000 rows": lambda d: _jpeg(d, rows=65000),
    "JPEG of 5 rows": lambda d: _jpeg(d, rows=5),
    "JPEG 2000 of 60000^2": lambda d: _jpeg_2000(d, rows=60000),
    "cut RLE": _rle,
    "text as position": lambda d: _text(d, "ImagePositionPatient", r"a\b\c"),
    "nan as spacing": lambda d: _text(d, "PixelSpacing", r"nan\nan"),
    "two positions": lambda d: _text(d, "ImagePositionPatient", r"1\2"),
    "infinite slope": lambda d: _text(d, "RescaleSlope", "1e999"),
}


def _text(dataset, name, text):
    """Text where numbers belong, which pydicom itself would not let anyone write."""
    tag = pydicom.datadict.tag_for_keyword(name)
    del dataset[tag]
    dataset.add(pydicom.DataElement(tag, "LO", text.split("\\")))


def _relabel(path, name):
    """Turns the LO that `_text` wrote back into the DS that a reader expects."""
    tag = pydicom.datadict.tag_for_keyword(name)
    mark = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    path.write_bytes(path.read_bytes().replace(mark + b"LO", mark + b"DS"))


def _dicoms(root):
    """(name, folder) of series of which one slice is malformed."""
    for number, (name, change) in enumerate(DATASETS.items()):
        datasets = ct_files.slices()
        change(datasets[3])
        folder = root / f"dicom{number}"
        folder.mkdir()
        for k, dataset in enumerate(datasets):
            path = folder / f"{k}.dcm"
            if "TransferSyntaxUID" in dataset.file_meta:
                dataset.save_as(path, enforce_file_format=True)
            else:
                dataset.save_as(path, implicit_vr=False, little_endian=True)
            for field in ("ImagePositionPatient", "PixelSpacing", "RescaleSlope"):
                _relabel(path, field)
        yield f"dicom {name}", folder
    whole = ct_files.write_series(root / "whole", ct_files.slices(), shuffle=False)[3].read_bytes()
    for count in (50, 131, 140, 200, 400, 900, len(whole) - 1000, len(whole) - 1):
        folder = root / f"cut{count}"
        ct_files.write_series(folder, ct_files.slices(), shuffle=False)[3].unlink()
        (folder / "slice.dcm").write_bytes(whole[:count])
        yield f"dicom cut to {count}", folder
    folder = root / "deflated"
    _deflated(ct_files.write_series(folder, ct_files.slices(), shuffle=False)[3])
    yield "dicom deflated to 4 GB", folder
    (root / "nothing").mkdir()
    yield "dicom folder without files", root / "nothing"


# --- the test --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """Makes every file; [(name, reader, path)]."""
    root = tmp_path_factory.mktemp("malformed")
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:9, 3:7, 2:6] = 20
    nifti.write_nifti(root / "good_ct.nii.gz", _volume(), AFFINE)
    nifti.write_nifti(root / "good_mask.nii.gz", labels, AFFINE)
    np.save(root / "good.npy", np.zeros((4, 6), np.float32))
    files.write_npz(root / "good.npz", a=np.zeros((4, 6), np.float32))
    files.write_json(root / "good_cases.json", _case_document())
    files.write_json(root / "good_centroids.json", CENTROIDS)
    ct_files.write_series(root / "good_dicom", ct_files.slices())
    entries = []

    def add(name, reader, data, suffix):
        path = root / f"bad{len(entries)}{suffix}"
        path.write_bytes(data)
        entries.append((name, reader, str(path)))

    for name, reader, data, suffix in _niftis():
        add(name, reader, data, suffix)
    for name, data in NPYS.items():
        if name != "shape of no voxels":
            add(f"npy {name}", "npy", data, ".npy")
    for name, data in _npzs():
        add(name, "npz", data, ".npz")
    for name, reader, data in _jsons():
        add(name, reader, data, ".json")
    entries += [(name, "ct", str(folder)) for name, folder in _dicoms(root)]
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
    """The bench's X-rays are packed by LZMA."""
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
