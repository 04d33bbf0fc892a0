"""Reading that reports bad input in one line, and writing that never leaves a half-written file."""

import collections.abc
import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import stat
import tempfile
import typing
import zipfile

import numpy as np

from radgs_jax import errors

# Limits on what a header may declare; each is checked before memory is allocated. All are chosen by hand: half of one refuses
# the largest real files that it names, and twice that lets a hostile file claim twice the memory.
MAX_VOXELS = 2**29
"""Voxels of one volume: 512 x 512 x 2048. A whole-body CT has 512 x 512 x 1500."""
MAX_VOLUME_BYTES = 2**31
"""Bytes of one volume as stored: MAX_VOXELS at 32 bits each."""
MAX_ARRAY_BYTES = 2**29
"""Bytes of one array in an npy or npz file: 8 X-rays of 4096 x 4096 pixels at 32 bits each."""
MAX_JSON_BYTES = 2**24
"""Bytes of a JSON file: about 40,000 cases. The Python objects take up to 40 times that."""
MAX_HEADER_BYTES = 2**20
"""Bytes in front of a NIfTI's voxels, extensions included."""
DEFLATE_RATIO = 1032
"""Upper bound of deflate's compression: a match of 258 bytes takes at least 2 bits (RFC 1951)."""
LABELS_BYTES = 2**29
"""Bytes of a volume of MAX_VOXELS at 8 bits each. Volumes up to this size may be compressed by any ratio."""
TIGHT_RATIO = 50
"""Largest compression ratio of a volume above LABELS_BYTES. Chosen by hand: a CT compresses 2 to 10 times, label maps more, but
these fit into 8 bits per voxel. Half would be close to a CT with wide margins of air; twice doubles what a bomb inflates to."""
TIGHT_AFTER_BYTES = 2**27
"""Inflated bytes before TIGHT_RATIO applies, since a stretch of air compresses well. Chosen by hand: half might refuse a scan that
begins with air; twice inflates a bomb twice as far."""
_CHUNK = 2**20
"""Bytes read at once into an array. Chosen by hand: less costs calls, more touches memory beyond the end of a cut file."""
PACKED_CHUNK = 2**14
"""Compressed bytes passed to the inflater at once. Chosen by hand: less costs calls, more costs copies of the unconsumed rest."""
VOXEL_MM = (1e-3, 1e3)
"""Smallest and largest voxel spacing in mm that an affine may have. Chosen by hand to catch wrong units; not sensitive."""
REACH_MM = 1e6
"""Largest coordinate in mm of a volume's corner. Chosen by hand to catch damaged affines; not sensitive."""


@contextlib.contextmanager
def replacing(path: pathlib.Path | str) -> collections.abc.Iterator[pathlib.Path]:
    """Yields a temporary path in the same folder, which becomes `path` when the block ends without an error.

    A missing folder is created. After an error, `path` is unchanged and the temporary file is removed.

    Raises:
      OSError: the folder cannot be created or written to.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix="".join(path.suffixes[-2:]))
    os.close(handle)
    try:
        yield pathlib.Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_json(path: pathlib.Path | str, value: object) -> None:
    """Writes `value` as JSON, atomically.

    Raises:
      ValueError: a number is not finite.
      TypeError: JSON cannot represent a value.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_npz(path: pathlib.Path | str, **arrays: np.ndarray) -> None:
    """Writes a compressed npz file of named arrays of numbers or text, atomically; `read_npz` reads them back."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as stream:
            np.savez_compressed(stream, **arrays)


def is_dicom(path: pathlib.Path | str) -> bool:
    """Whether a file has "DICM" after its 128-byte preamble (DICOM PS3.10, 7.1). False if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False


def file_size(path: pathlib.Path | str, wanted: str) -> int:
    """Size of a regular file in bytes. `wanted` is the kind of file that the error message asks for.

    Raises:
      InputError: the path does not exist, or is a folder, device or pipe (the last two could be endless).
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        errors.fail(path, "file", "nothing", wanted)
    except (OSError, ValueError) as error:
        errors.fail(path, "file", getattr(error, "strerror", None) or error, wanted)
    if not stat.S_ISREG(status.st_mode):
        errors.fail(path, "file", "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe", wanted)
    return status.st_size


def read_json(path: pathlib.Path | str, nan: bool = False) -> typing.Any:
    """The value in a JSON file. `nan` allows NaN, which is not part of JSON.

    Raises:
      InputError: the file is missing, unreadable, not JSON, too deeply nested or longer than MAX_JSON_BYTES, or holds a
        number that is not finite, or a whole number beyond 64 bits.
    """
    size = file_size(path, "a JSON file")
    if size > MAX_JSON_BYTES:
        errors.fail(path, "size", f"{size} bytes", f"{MAX_JSON_BYTES} at most")
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    # ValueError: not JSON, not UTF-8, or a number of too many digits.
    except (OSError, ValueError) as error:
        errors.fail(path, "content", error, "valid JSON")
    except RecursionError:
        errors.fail(path, "content", "nesting too deep to read", "valid JSON")
    _check_numbers(path, value, nan)
    return value


def _check_numbers(path, value, nan):
    pending = [("", "", value)]
    while pending:
        # `place` is the path to the value. `field` is the outermost list around it: errors name a matrix, not one cell of it.
        field, place, value = pending.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                name = f"{place}.{key}" if place else key
                pending.append((name, name, inner))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                name = f"{place}[{index}]"
                pending.append((name if isinstance(inner, dict) else field, name, inner))
        elif isinstance(value, float) and not (math.isfinite(value) or nan and math.isnan(value)):
            errors.fail(path, field or "content", "values that are not finite", "finite numbers")
        elif isinstance(value, int) and abs(value) >= 2**63:
            errors.fail(path, field or "content", "a whole number beyond 64 bits", "numbers of 64 bits")


def read_npz(path: pathlib.Path | str, *names: str) -> dict[str, np.ndarray]:
    """The arrays `names` of an npz file, by name.

    Raises:
      InputError: the file is missing or damaged, or an array is missing, holds anything but numbers or text, is larger than
        MAX_ARRAY_BYTES, or has a header that does not match its data.
    """
    wanted = "a complete npz file of plain arrays"
    file_size(path, "an npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            absent = [name for name in names if name not in members]
            if absent:
                errors.fail(path, "array", f"only {list(members)}", f"'{absent[0]}'")
            return {name: _read_member(path, archive, members[name], name) for name in names}
    except errors.InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise different exceptions on damaged files
        errors.fail(path, "content", f"{type(error).__name__}: {error}", wanted)


def _read_member(path, archive, info, name):
    # For other compression methods, reading stops at the size that the array's own header declares.
    if info.compress_type == zipfile.ZIP_DEFLATED and info.file_size > (info.compress_size + 1) * DEFLATE_RATIO:
        found = f"{info.file_size} bytes in {info.compress_size}"
        errors.fail(path, f"'{name}': size", found, "a size that deflate can reach")
    with archive.open(info) as stream:
        return _read_array(path, f"'{name}'", stream, info.file_size)


def read_npy(path: pathlib.Path | str) -> np.ndarray:
    """The array in an npy file.

    Raises:
      InputError: the file is missing or truncated, or its array is larger than MAX_ARRAY_BYTES, has a header that does not
        match the data, or holds anything but numbers or text.
    """
    size = file_size(path, "an npy file")
    try:
        with open(path, "rb") as stream:
            return _read_array(path, "array", stream, size)
    except errors.InputError:
        raise
    except Exception as error:
        errors.fail(path, "content", f"{type(error).__name__}: {error}", "a complete npy file of numbers")


def _read_array(path, field, stream, size):
    """The array in an npy stream of `size` bytes. The header is checked before memory is allocated."""
    start = stream.read(8)
    if start[:7] not in (b"\x93NUMPY\x01", b"\x93NUMPY\x02"):
        errors.fail(path, f"{field}: first bytes", start, "those of an npy file of version 1 or 2")
    counted, read_header = (2, np.lib.format.read_array_header_1_0), (4, np.lib.format.read_array_header_2_0)
    width, parse = counted if start[6] == 1 else read_header
    length = stream.read(width)
    count = int.from_bytes(length, "little")
    if count > MAX_HEADER_BYTES:
        errors.fail(path, f"{field}: header", f"{count} bytes", f"{MAX_HEADER_BYTES} at most")
    shape, fortran, dtype = parse(io.BytesIO(length + stream.read(count)))
    if dtype.hasobject or dtype.kind not in "biufcSU":
        errors.fail(path, f"{field}: type", dtype, "plain arrays: numbers or text")
    if any(n < 0 for n in shape):
        errors.fail(path, f"{field}: shape", shape, "axes that are not negative")
    items = math.prod(shape)
    if items * max(dtype.itemsize, 1) > MAX_ARRAY_BYTES:
        errors.fail(path, f"{field}: shape", f"{shape} of {dtype}", f"{MAX_ARRAY_BYTES} bytes at most")
    held = size - 8 - width - count
    if items * dtype.itemsize != held:
        errors.fail(
            path, f"{field}: shape", f"{shape} of {dtype} with {held} bytes behind it", "the size that it declares"
        )
    raw = np.empty(held, np.uint8)
    fill_array(stream, raw)
    if stream.read(1):
        errors.fail(path, f"{field}: shape", f"{shape} of {dtype} with more behind it", "the size that it declares")
    return raw.view(dtype).reshape(shape, order="F" if fortran else "C") if held else np.empty(shape, dtype)


def fill_array(stream: typing.Any, array: np.ndarray) -> None:
    """Fills a byte array from a stream that has `readinto`.

    Raises:
      EOFError: the stream ends first.
    """
    # In chunks, so that a short stream does not touch all of the allocated memory.
    view = memoryview(array)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done : done + _CHUNK])
        if not count:
            raise EOFError(f"the data ends after {done} of {len(view)} bytes")
        done += count


def sha256(path: pathlib.Path | str) -> str:
    """Hex digest of a file, or of the names and contents of all files in a folder (such as a DICOM series).

    Raises:
      InputError: the file is missing or unreadable.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        listed = "".join(f"{p.relative_to(path).as_posix()}\n{sha256(p)}\n" for p in inside)
        return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()
    file_size(path, "a readable file")
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        errors.fail(path, "file", error.strerror, "a readable file")
