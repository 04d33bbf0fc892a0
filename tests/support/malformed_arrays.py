"""Malformed npy, npz and JSON files: case files and centroid files among them."""

import bz2
import io
import json
import struct
import zipfile
import zlib

import numpy as np
from malformed_volumes import bomb

from data_pipelines import cases
from data_pipelines.io import camera_files
from radgs_jax.geometry import camera


def _npy(text, body=bytes(96), version=b"\x01\x00", length=None):
    """An npy file with the given header text."""
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
    """A zip archive of one member with the given header fields."""
    if packed is None:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        packed = packer.compress(data) + packer.flush()
    size = len(data) if declared is None else declared
    crc = zlib.crc32(data) if crc is None else crc
    common = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, crc, len(packed), size, len(name), 0)
    local = b"PK\x03\x04" + common + name + packed
    central = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    return local + central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


def npzs():
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
    # Without its header and trailer, a gzip file is the raw stream that zip contains.
    stream = bomb(front, 3814, 0, bytes(10**9 * 4 - 3814 * 2**20))[10:-8]
    yield "npz bomb of 4 GB", _zip(b"", packed=stream, declared=len(front) + 4 * 10**9, crc=0)
    yield "npz bomb that says 120 bytes", _zip(b"", packed=stream, declared=len(good), crc=0)
    tiny = _npy(_described("(4, 6)"), b"")
    stream = bomb(tiny, 3000, 0)[10:-8]
    yield "npz bomb behind a small array", _zip(b"", packed=stream, declared=len(tiny) + 96, crc=0)
    yield "npz of more than deflate can reach", _zip(b"", packed=stream[:2000], declared=10**9, crc=0)


def case_document():
    E = np.eye(4)
    E[2, 3] = 700.0
    view = camera_files.camera_json(camera.Camera(np.array([2000.0, 2000, 31.5, 31.5]), E, 64, 64), "ap")
    volume = {"patient": "p", "full_ct": "good_ct.nii.gz", "full_mask": "good_mask.nii.gz", "full_label": 20}
    scene = {"id": "s", "volume": "v", "T_gt": np.eye(4).tolist(), "views": [view], "xrays": "x.npz"}
    return {
        "format": cases.CASES_FORMAT,
        "volumes": {"v": volume},
        "scenes": [scene],
        "cases": [{"id": "c", "scene": "s", "T_init": np.eye(4).tolist()}],
    }


CASE_FIELDS = {  # invalid values by place; None removes the field
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
    # NaN is not in the list: it marks a missing centroid.
    (1, "Z"): (float("-inf"), float("inf"), {}),
}


def json_files():
    for place, values in CASE_FIELDS.items():
        for number, value in enumerate(values):
            name = f"cases {'.'.join(map(str, place))} {number}"
            yield name, "cases", _changed(case_document(), place, value)
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
        "cut off": json.dumps(case_document()).encode()[:300],
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
