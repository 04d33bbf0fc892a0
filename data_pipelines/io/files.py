"""Reading that reports bad input in one line, and writing that never leaves a half-written file."""

import collections.abc
import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import secrets
import shutil
import stat
import typing
import zipfile

import numpy as np

from data_pipelines.io import locks
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
MAX_FOLDER_FILES = 20_000
"""Files and folders in a folder that is read as one thing, such as a DICOM series. A whole-body CT has 1500 slices. Chosen by hand:
half might refuse a folder of several phases, and twice walks further through a folder that was named by mistake."""
MAX_FOLDER_BYTES = 2**33
"""Bytes of all files in such a folder: four times the largest volume. Half refuses series with large private elements; twice
spends twice the time, about 8 s, before a folder that was named by mistake is refused."""
LEFTOVER = ".radgs-"
"""How the names of temporary files begin."""
LONGEST_SUFFIX = 24
"""Characters of a suffix that a temporary name repeats, since writers choose their format by it; longer ones name no format."""
CLEARED_FOLDERS = 4096
"""Folders that a process remembers to have cleared of leftovers. Chosen by hand; not sensitive: a forgotten one is listed again."""
NAMED_CHARACTERS = 100
"""Longest name of a field in an error message, characters. Chosen by hand, so that a message stays a line."""


@contextlib.contextmanager
def writing(path: pathlib.Path | str, field: str = "file") -> collections.abc.Iterator[None]:
    """Turns an OSError of the block, which writes `path`, into one line: no space, no permission, a name too long, ...

    Raises:
      InputError: an OSError in the block.
    """
    try:
        yield
    except OSError as error:
        other = error.filename if error.filename and str(path) not in str(error.filename) else None
        reason = error.strerror or str(error) or type(error).__name__
        errors.fail(path, field, f"{reason} ({other})" if other else reason, "a place that can be written")


def make_folder(path: pathlib.Path | str) -> pathlib.Path:
    """Makes a folder, and those above it, unless it is there.

    Raises:
      InputError: it cannot be made.
    """
    path = pathlib.Path(path)
    with writing(path, "folder"):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def replacing(path: pathlib.Path | str) -> collections.abc.Iterator[pathlib.Path]:
    """Yields a temporary path in the same folder, which becomes `path`, on the disk, when the block ends without an error.

    A missing folder is created. The file's mode is what the user's umask says. After an error, `path` is unchanged and the
    temporary file is removed. What killed processes have left in the folder is removed as well.

    Raises:
      InputError: the folder or the file cannot be written, or `path` is a folder, device or pipe.
    """
    path = pathlib.Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            errors.fail(path, "file", "a folder, device or pipe", "a file that may be replaced")
        clear_leftovers(path.parent)
        temporary, handle = _temporary(path)
        try:
            yield temporary
            synchronise(temporary)
            os.replace(temporary, path)
            synchronise(path.parent)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            os.close(handle)


def _temporary(path):
    """A new file beside `path`, locked while it is open: (path, descriptor). Its name is short where that of `path` is long."""
    suffix = "".join(path.suffixes[-2:])
    suffix = suffix if len(suffix) <= LONGEST_SUFFIX else ""
    while True:
        temporary = path.with_name(f"{LEFTOVER}{secrets.token_hex(6)}{suffix}")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if locks.mark(handle, temporary):
            return temporary, handle
        os.close(handle)


@functools.lru_cache(CLEARED_FOLDERS)
def clear_leftovers(folder: pathlib.Path) -> None:
    """Removes the temporary files of `replacing` whose process has ended, once per folder and process."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(LEFTOVER) and locks.abandoned(folder / name):
                os.unlink(folder / name)


def synchronise(path: pathlib.Path | str) -> None:
    """Waits until a file, or a folder's list of names, is on the disk.

    Raises:
      OSError: the disk is full or broken.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot synchronise a folder, or anything.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(handle)


def check_new(path: pathlib.Path | str) -> None:
    """Checks that a folder can be made at `path`: nothing is there, or an empty folder.

    Raises:
      InputError: something else is there, or it cannot be told.
    """
    wanted = "a new folder"
    try:
        if os.path.lexists(path) and not os.path.isdir(path):
            errors.fail(path, "folder", "a file", wanted)
        elif not os.path.lexists(path):
            return
        elif os.path.ismount(path):
            errors.fail(path, "folder", "a mount point, which cannot be replaced", "a new folder below it")
        elif os.listdir(path):
            errors.fail(path, "folder", "one that is not empty", wanted)
    except OSError as error:
        errors.fail(path, "folder", error.strerror, wanted)


@contextlib.contextmanager
def new_folder(
    path: pathlib.Path | str, keep: bool = False, resume: bool = False
) -> collections.abc.Iterator[pathlib.Path]:
    """Yields a folder beside `path` to write into, which becomes `path` when the block ends without an error.

    While the block runs, no other process can do the same with this `path`. What killed runs have left is removed.

    Args:
      path: a new or empty folder.
      keep: leave the unfinished folder there after an error, for `resume`.
      resume: go on with the unfinished folder of an earlier run, if there is one.
    Raises:
      InputError: `path` is not new, another process makes it, or it cannot be written.
    """
    check_new(path)
    real = pathlib.Path(os.path.realpath(path))
    make_folder(real.parent)
    with locks.hold(locks.beside(real, "lock"), path) as held:
        check_new(path)  # again: another process may have finished it meanwhile
        with writing(path, "folder"):
            left = unfinished(real) if held else []
            partial = left.pop() if resume and left else locks.beside(real, f"{secrets.token_hex(4)}.partial")
            for old in left:
                shutil.rmtree(old)
            partial.mkdir(exist_ok=True)
        try:
            yield partial
            with writing(path, "folder"):
                synchronise(partial)
                check_new(path)
                if real.exists():
                    real.rmdir()
                partial.rename(real)
                synchronise(real.parent)
        finally:
            if not keep:
                shutil.rmtree(partial, ignore_errors=True)


def unfinished(path: pathlib.Path | str) -> list[pathlib.Path]:
    """Unfinished folders of `new_folder(path)` and of models, the latest last. Whoever holds the lock may remove them."""
    path = pathlib.Path(os.path.realpath(path))
    start = locks.beside(path, "").name
    with contextlib.suppress(OSError):
        names = [n for n in os.listdir(path.parent) if n.startswith(start) and n.endswith(".partial")]
        return sorted((path.with_name(n) for n in names), key=lambda p: p.stat().st_mtime_ns)
    return []


def read_text(path: pathlib.Path | str, wanted: str, most_bytes: int) -> str:
    """A text file in UTF-8; wanted: what the file should be, for messages.

    Raises:
      InputError: the file is missing, larger than `most_bytes`, or no such text.
    """
    size = file_size(path, wanted)
    if size > most_bytes:
        errors.fail(path, "size", f"{size} bytes", f"{most_bytes} at most")
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return errors.fail(path, "content", error, wanted)


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
    """Whether a file has "DICM" after its 128-byte preamble (DICOM PS3.10, 7.1). False if it cannot be read, or is no file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size < 132:
            return False
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
      InputError: the file is missing, unreadable, not JSON, too deeply nested or longer than MAX_JSON_BYTES, or holds a key
        twice, a number that is not finite, or a whole number beyond 64 bits.
    """
    size = file_size(path, "a JSON file")
    if size > MAX_JSON_BYTES:
        errors.fail(path, "size", f"{size} bytes", f"{MAX_JSON_BYTES} at most")
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
    # ValueError: not JSON, not UTF-8, or a number of too many digits.
    except (OSError, ValueError) as error:
        errors.fail(path, "content", error, "valid JSON")
    except RecursionError:
        errors.fail(path, "content", "nesting too deep to read", "valid JSON")
    _check_numbers(path, value, nan)
    return value


def _unique(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:NAMED_CHARACTERS]!r} twice")
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
            errors.fail(path, field[-NAMED_CHARACTERS:] or "content", "values that are not finite", "finite numbers")
        elif isinstance(value, int) and abs(value) >= 2**63:
            errors.fail(
                path, field[-NAMED_CHARACTERS:] or "content", "a whole number beyond 64 bits", "numbers of 64 bits"
            )


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
            if len(members) < len(archive.infolist()):
                errors.fail(path, "content", "two arrays of one name", wanted)
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
      InputError: the file is missing or unreadable, or as `listed`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        lines = (f"{p.relative_to(path).as_posix()}\n{sha256(p)}\n" for p in listed(path))
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    size = file_size(path, "a readable file")
    try:
        # Files of /proc claim to be empty, and reading one of them may never end.
        with open(path if size else os.devnull, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        errors.fail(path, "file", error.strerror, "a readable file")


def listed(folder: pathlib.Path | str) -> list[pathlib.Path]:
    """All files below a folder, sorted; links to folders are not followed, devices and pipes are left out.

    Raises:
      InputError: more than MAX_FOLDER_FILES files and folders, or more than MAX_FOLDER_BYTES.
    """
    folder, found, count, size = pathlib.Path(folder), [], 0, 0
    wanted = "a folder of one series, or one file"
    for place, folders, names in os.walk(folder):
        count += len(folders) + len(names)
        if count > MAX_FOLDER_FILES:
            errors.fail(folder, "folder", f"more than {MAX_FOLDER_FILES} files", wanted)
        for path in (pathlib.Path(place, name) for name in names):
            with contextlib.suppress(OSError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    found.append(path)
                    size += status.st_size
        if size > MAX_FOLDER_BYTES:
            errors.fail(folder, "folder", f"more than {MAX_FOLDER_BYTES} bytes", wanted)
    return sorted(found)
