"""Reading with one clear line on bad input, and writing that never leaves a half-written file."""

import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import stat
import tempfile
import zipfile

import numpy as np

from radgs_jax import errors

# What a file may claim to hold. Claims are checked before anything of their size is allocated or inflated.
MAX_VOXELS = 2**29
"""512 x 512 x 2048: a whole body is 512 x 512 x 1500."""
MAX_VOLUME_BYTES = 2**31
"""As stored: the largest volume at 32 bits a voxel."""
MAX_ARRAY_BYTES = 2**29
"""Of one array in an npy or npz file: 8 X-rays of 4096 x 4096 at 32 bits a pixel."""
MAX_JSON_BYTES = 2**24
"""40,000 cases; Python's objects take up to 40 times the text."""
MAX_HEADER_BYTES = 2**20
"""In front of a NIfTI's voxels, its extensions included."""
DEFLATE_RATIO = 1032
"""Deflate never shrinks by more: a match of 258 bytes takes 2 bits."""
LABELS_BYTES = 2**29
"""Of a volume of MAX_VOXELS at 8 bits a voxel."""
TIGHT_RATIO, TIGHT_AFTER_BYTES = 50, 2**27
"""A CT packs 2 to 10 times; only labels pack more than 50 times over so long a stretch, and 8 bits a voxel do for them."""
_CHUNK, PACKED_CHUNK = 2**20, 2**14
VOXEL_MM = (1e-3, 1e3)
REACH_MM = 1e6


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path in the same folder that becomes `path` when the block ends without an error.

    The folder is made if need be. After an error, also one in the block, `path` is as it was and nothing else is left.

    Raises:
      OSError: a folder that cannot be made or written to.
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


def write_json(path, value):
    """Writes `value` as JSON, atomically.

    Raises:
      ValueError, TypeError: numbers that are not finite, or what JSON has no form for.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_npz(path, **arrays):
    """Writes a compressed npz of named arrays of numbers or text, of any shape, atomically; `read_npz` reads them back."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as stream:
            np.savez_compressed(stream, **arrays)


def is_dicom(path):
    """Whether a file has the DICOM mark behind its preamble; False for what cannot be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False


def file_size(path, wanted):
    """Size in bytes of a regular file; `wanted` says in a word what it should be.

    Raises:
      InputError: nothing there, a folder, or a device or pipe (which could be endless).
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


def read_json(path, nan=False):
    """The JSON value of a file; with `nan`, a NaN, which JSON does not know, is let pass.

    Raises:
      InputError: missing, unreadable, not JSON, nested too deep, longer than MAX_JSON_BYTES, or a number that is not
        finite or, if whole, beyond 64 bits.
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
        # `place` names a number, `field` the outermost list of numbers that it stands in: a matrix is named, not its cell.
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


def read_npz(path, *names):
    """The named arrays of an npz file, as a dict.

    Raises:
      InputError: missing or damaged file, a missing array, one that is not of plain numbers or text, one larger than
        MAX_ARRAY_BYTES, or a header that does not fit what the file holds.
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
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds on damaged files
        errors.fail(path, "content", f"{type(error).__name__}: {error}", wanted)


def _read_member(path, archive, info, name):
    # What any other method inflates to is bounded as it is read, by the size that the array's own header declares.
    if info.compress_type == zipfile.ZIP_DEFLATED and info.file_size > (info.compress_size + 1) * DEFLATE_RATIO:
        found = f"{info.file_size} bytes in {info.compress_size}"
        errors.fail(path, f"'{name}': size", found, "a size that deflate can reach")
    with archive.open(info) as stream:
        return _read_array(path, f"'{name}'", stream, info.file_size)


def read_npy(path):
    """The array of an npy file.

    Raises:
      InputError: missing, truncated, larger than MAX_ARRAY_BYTES, a header that does not fit the file, or an array that
        is not of plain numbers or text.
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
    """The array of an npy stream of `size` bytes; numpy parses the header, nothing is allocated before it is checked."""
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


def fill_array(stream, array):
    # In pieces, so that memory is touched only as far as the stream really goes.
    view = memoryview(array)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done : done + _CHUNK])
        if not count:
            raise EOFError(f"the data ends after {done} of {len(view)} bytes")
        done += count


def sha256(path):
    """Hex digest of a file, or of the names and contents of all files in a folder (a DICOM series).

    Raises:
      InputError: a missing file.
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
