"""Random damage to files: to their bytes, and to what is inside gzip, zip, PNG, DICOM, JSON and ITK files, as they stay readable.

Every function takes a `random.Random`, and the same one gives the same damage.
"""

import gzip
import io
import json
import math
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

HEADER_BYTES = 400
"""Half of the damage falls into so many first bytes, where headers are."""
LENGTHS = (1, 2, 4, 16, 128, 512, 4096)
"""Bytes that are overwritten, moved, inserted or lost."""
INTEGERS = {"h": 2**15, "i": 2**31, "q": 2**63}
EXTREMES = [
    struct.pack(order + code, value)
    for order in "<>"
    for code, values in {
        **{code: (0, -1, end - 1, -end) for code, end in INTEGERS.items()},
        **{code: (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e38) for code in "fd"},
    }.items()
    for value in values
]
BYTE_KINDS = ("flip", "overwrite", "cut", "zero", "duplicate", "swap", "insert", "remove", "extreme", "append")


def damage_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One random change of bytes, and what it is."""
    kind, changed, size = rng.choice(BYTE_KINDS), bytearray(data), len(data)
    if size < 2:
        return bytes(rng.randbytes(3)), "rubbish"
    at = rng.randrange(min(size, HEADER_BYTES) if rng.random() < 0.5 else size)
    length = rng.choice(LENGTHS)
    part = slice(at, min(at + length, size))
    if kind == "flip":
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        changed[part] = rng.randbytes(len(changed[part]))
    elif kind == "cut":
        del changed[at:]
    elif kind == "zero":
        changed[part] = bytes(len(changed[part]))
    elif kind == "duplicate":
        changed[at:at] = changed[part]
    elif kind == "swap":
        at, other = sorted(rng.sample(range(size), 2))
        length = min(length, other - at, size - other)
        first, second = slice(at, at + length), slice(other, other + length)
        changed[first], changed[second] = changed[second], changed[first]
    elif kind == "insert":
        changed[at:at] = rng.randbytes(length)
    elif kind == "remove":
        del changed[part]
    elif kind == "extreme":
        value = rng.choice(EXTREMES)
        at -= at % rng.choice((1, 2, 4))
        changed[at : at + len(value)] = value
    else:
        changed += rng.randbytes(length)
    return bytes(changed), f"{kind} at {at}"


# Containers: their checksums fit afterwards.


def _gzip(data, rng):
    inner = gzip.decompress(data)
    if rng.random() < 0.25:
        more = rng.choice((b"", rng.randbytes(100), inner[:100], inner, bytes(2**22)))
        parts = [data, gzip.compress(more, 1, mtime=0)]
        rng.shuffle(parts)
        return b"".join(parts), f"a gzip member of {len(more)} bytes more"
    inner, what = damage_bytes(inner, rng)
    return gzip.compress(inner, 1, mtime=0), f"inside gzip, {what}"


def _zip(data, rng):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    place, kind = (
        rng.randrange(len(members)),
        rng.choice(("inside",) * 5 + ("header",) * 3 + ("drop", "rename", "swap")),
    )
    name, content = members[place]
    what = f"{kind} {name}"
    if kind == "inside":
        content, what = damage_bytes(content, rng)
        what = f"inside {name}, {what}"
    elif kind == "header" and name.startswith("header"):
        content, what = _header(content, rng)
    elif kind == "header":
        word = rng.choice(re.findall(rb"[<>|=][a-zA-Z]\d+|True|False|\d+", content[10:120]) or [b"descr"])
        new = rng.choice((b"0", b"-1", b"9" * 12, b"1", b"|O", b"<f2", b">i8", b"<c16", b"True", b"None", b"<U9", b""))
        content = _npy_of(content, lambda text: text.replace(word, new, 1))
        what = f"{name}: {word!r} is {new!r}"
    elif kind == "swap":
        other = rng.randrange(len(members))
        members[other], content = (members[other][0], content), members[other][1]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for index, (other, kept) in enumerate(members):
            if index == place and kind != "drop":
                archive.writestr("renamed.npy" if kind == "rename" else name, content)
            elif index != place:
                archive.writestr(other, kept)
    return stream.getvalue(), what


def _npy_of(content, change):
    """An npy file with changed text in its header, whose length fits."""
    length = int.from_bytes(content[8:10], "little")
    text = change(content[10 : 10 + length]).rstrip() + b"\n"
    return content[:8] + struct.pack("<H", len(text)) + text + content[10 + length :]


def _header(content, rng):
    """JSON as text in an npy of one item of UTF-32, such as the header of a localizer."""
    start = 10 + int.from_bytes(content[8:10], "little")
    text, what = damage_json(content[start:].decode("utf-32-le").rstrip("\0").encode(), rng)
    text = text.decode(errors="replace")[: 2**16]
    head = _npy_of(content[:start], lambda old: re.sub(rb"<U\d+", b"<U%d" % max(len(text), 1), old))
    return head + text.encode("utf-32-le", "surrogatepass"), f"in the header, {what}"


def _png(data, rng):
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    place, kind = (
        rng.randrange(len(chunks)),
        rng.choice(("inside",) * 5 + ("pixels", "pixels", "duplicate", "drop", "kind")),
    )
    name, content = chunks[place]
    what = f"{kind} {name!r}"
    if kind == "inside" and content:
        content, what = damage_bytes(content, rng)
        what = f"inside {name!r}, {what}"
    elif kind == "pixels" and name == b"IDAT" and sum(n == b"IDAT" for n, _ in chunks) == 1:
        content, what = damage_bytes(zlib.decompress(content), rng)
        content, what = zlib.compress(content), f"in the pixels, {what}"
    elif kind == "kind":
        name = rng.choice((b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"fdAT", b"IEND"))
    count = {"drop": 0, "duplicate": 2}.get(kind, 1)
    chunks[place : place + 1] = [(name, content)] * count
    written = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return data[:8] + b"".join(written), what


_LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OD", b"OF", b"OL", b"UC", b"UR")
_NUMBERS = {b"US": "<H", b"SS": "<h", b"UL": "<I", b"SL": "<i", b"FL": "<f", b"FD": "<d", b"AT": "<I"}
_TEXTS = (
    "", "0", "-1", "-0", "1", "nan", "inf", "1e308", "-1e308", "1e-308", "2147483648", "9" * 40, "1\\2\\3\\4", "x", "\0", "1..2",
    "\\", "\xff\xfe", "\x1b$B", "a\nb", " ", "L\\P", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2", "../../x", "y" * 500,
)  # fmt: skip


def dicom_elements(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(offset, offset of the value, its length, VR) of the elements of a DICOM file in explicit little endian, while they fit."""
    at, found = 132, []
    while at + 12 <= len(data):
        vr = data[at + 4 : at + 6]
        start = at + (12 if vr in _LONG else 8)
        length = int.from_bytes(data[start - 4 : start] if vr in _LONG else data[at + 6 : at + 8], "little")
        if start + length > len(data):
            break
        found.append((at, start, length, vr))
        at = start + length
    return found


def _dicom(data, rng):
    elements = dicom_elements(data)
    at, start, length, vr = rng.choice(elements)
    kind = rng.choice(("value",) * 6 + ("drop", "duplicate", "vr", "tag"))
    tag = data[at : at + 4]
    what = f"{kind} of {tag[1::-1].hex()},{tag[:1:-1].hex()} {vr.decode(errors='replace')}"
    element, value = data[at : start + length], data[start : start + length]
    if kind == "value":
        if vr in _NUMBERS:
            code = _NUMBERS[vr]
            ends = (0, 1, 2 ** (8 * struct.calcsize(code) - 1) - 1)
            value = rng.choice((*(struct.pack(code, n) for n in ends), b"\xff" * struct.calcsize(code), b"", 2 * value))
        elif vr in _LONG:
            value = damage_bytes(value, rng)[0]
        else:
            text = rng.choice(_TEXTS).encode("latin-1")
            value = text + b" " * (len(text) % 2)
            what = f"{what} is {text!r}"
        size = struct.pack("<I", len(value)) if vr in _LONG else struct.pack("<H", len(value) % 2**16)
        element = data[at : start - len(size)] + size + value
    elif kind == "vr":
        element = element[:4] + rng.choice((b"DS", b"US", b"SQ", b"UN", b"ZZ", b"LO", b"UI", b"\0\0")) + element[6:]
    elif kind == "tag":
        other = rng.choice(elements)[0]
        element = data[other : other + 4] + element[4:]
    element = element * {"drop": 0, "duplicate": 2}.get(kind, 1)
    return data[:at] + element + data[start + length :], what


# JSON.

TEXTS = (
    "", "1", "NaN", "a\0b", "a\nb", "\x1b[31mred", "../../up", "/dev/zero", ".", "..", "x" * 300, "\u202e", "\u00e9", "\ud800",
    "a b", "P", "null", "s0", "1e999", "~", "%s{0}", "a" * 5000,
)  # fmt: skip
_DEEP = "@deep@"
VALUES = (
    None, True, False, 0, -1, 1, 2, 255, 2**31 - 1, 2**63 - 1, 2**63, -(2**64), 10**400, 1e308, -1e308, 1e-320, 0.5, -0.0, math.nan,
    math.inf, -math.inf, [], {}, [[]], [None], {"": None}, {"P": 1}, [0] * 3000, [[[[[[0]]]]]], [[0.0] * 4] * 4, [[1, 2], [3]],
    _DEEP, *TEXTS,
)  # fmt: skip
SCALES = (-1, 0, 1000, 1e-3, 1e30, 1e-30, 1 + 1e-7, 1.01)
JSON_KINDS = ("value",) * 8 + ("scale",) * 3 + ("drop", "rename", "twice", "duplicate", "swap", "nest", "mark")


def _place(value, rng):
    """A random place in a JSON value: (container, key)."""
    holder, key = None, None
    while isinstance(value, (list, dict)) and value and (holder is None or rng.random() < 0.75):
        holder, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = holder[key]
    return holder, key


def damage_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """JSON with one value, name or mark changed; or, where it cannot be read, with changed bytes."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return damage_bytes(data, rng)
    kind = rng.choice(JSON_KINDS)
    holder, key = _place(root[0], rng) if rng.random() < 0.97 else (root, 0)
    if holder is None:
        holder, key = root, 0
    what = f"{kind} of {key!r}"
    if kind == "value":
        new = rng.choice(VALUES)
        holder[key] = new
        what = f"{what} is {repr(new)[:40]}"
    elif kind == "scale" and isinstance(holder[key], (int, float)):
        holder[key] *= rng.choice(SCALES)
    elif kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
    elif kind == "duplicate" and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == "swap":
        other, name = _place(root[0], rng)
        if other is not None:
            kept = json.loads(json.dumps([holder[key], other[name]]))
            other[name], holder[key] = kept
    elif kind == "nest":
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"P": holder[key]}
    text = json.dumps(root[0] if root else None, default=str)
    if kind == "twice" and (names := re.findall(r'"(\w+)": ', text)):
        name = rng.choice(names)
        text = text.replace(f'"{name}": ', f'"{name}": {rng.choice(("0", "null", "[]"))}, "{name}": ', 1)
    elif kind == "mark":
        at = rng.choice([place for place, mark in enumerate(text) if mark in '[]{},:"'] or [0])
        text = text[:at] + rng.choice(("", "[", "}", ",", ":", '"', "\\", "\n", "\0", "\ufeff")) + text[at + 1 :]
    deep = rng.choice((50, 100_000))
    return text.replace(f'"{_DEEP}"', "[" * deep + "]" * deep).encode(), what


WORDS = (b"", b"0", b"-1", b"2", b"nan", b"1e999", b"-1e308", b"x", b"1 2", b"1_0", b":", b"#", b"\xff", b"\0")


def _words(data, rng):
    """Text with one of its words changed, such as an ITK transform."""
    words = re.split(rb"(\s+)", data)
    at = rng.randrange(0, len(words), 2)
    new = rng.choice((*WORDS, words[0]))
    what = f"{words[at]!r} is {new!r}"
    words[at] = new
    return b"".join(words), what


UNREADABLE = (
    ValueError, IndexError, ArithmeticError, EOFError, OSError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip
"""What taking a damaged file apart may raise."""


def _inside(name: str, data: bytes) -> Callable[[bytes, random.Random], Any]:
    """What damages a file in its own terms."""
    for start, change in ((b"\x1f\x8b", _gzip), (b"PK\x03\x04", _zip), (b"\x89PNG", _png)):
        if data.startswith(start):
            return change
    if data[128:132] == b"DICM":
        return _dicom
    if name.endswith(".json"):
        return damage_json
    return _words if name.endswith((".tfm", ".txt")) else damage_bytes


def damage(name: str, data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damages the content of the file `name` once, or now and then three times; two of three times in the file's own terms."""
    said = []
    for _ in range(3 if rng.random() < 0.15 else 1):
        change = _inside(name, data) if rng.random() < 0.67 else damage_bytes
        try:
            data, what = change(data, rng)
        except UNREADABLE:
            data, what = damage_bytes(data, rng)  # what was damaged before cannot be taken apart again
        said.append(what)
    return data, "; ".join(said)
