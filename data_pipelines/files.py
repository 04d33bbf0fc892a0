"""Reading with one clear line on bad input, and writing that never leaves a half-written file."""

import contextlib
import gzip
import hashlib
import io
import json
import logging
import math
import os
import pathlib
import stat
import tempfile
import warnings
import xml.etree.ElementTree
import zipfile
import zlib

import numpy as np

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
_DEFLATE_RATIO = 1032
"""Deflate never shrinks by more: a match of 258 bytes takes 2 bits."""
_LABELS_BYTES = 2**29
"""Of a volume of MAX_VOXELS at 8 bits a voxel."""
_TIGHT_RATIO, _TIGHT_AFTER_BYTES = 50, 2**27
"""A CT packs 2 to 10 times; only labels pack more than 50 times over so long a stretch, and 8 bits a voxel do for them."""
_CHUNK, _PACKED_CHUNK = 2**20, 2**14
_VOXEL_MM = (1e-3, 1e3)
_REACH_MM = 1e6


class InputError(ValueError):
    """Input that a user can mend. Its text is one line: file, field, value found, value wanted."""


def fail(path, field, found, wanted):
    """Raises InputError in the project's one form, a line of printable characters.

    Args:
      path: the file, or a word for what else was wrong; field: where in it; found, wanted: the value and what it should be.
    """
    found = str(found)
    found = found if len(found) <= 400 else f"{found[:400]}..."
    line = " ".join(f"{path}: {field}: found {found}, wanted {wanted}".splitlines())
    # File names and damaged text may hold what no terminal can show.
    raise InputError("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


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


def write_nifti(path, array, affine):
    """Writes a NIfTI volume, gzip level 1, atomically; the same bytes for the same volume.

    Args:
      array: (X, Y, Z) numbers of a type that NIfTI has; affine: (4, 4) from voxel indices to RAS+ mm.
    """
    import nibabel  # a third of a second, for one kind of file

    image = nibabel.Nifti1Image(np.asarray(array), np.asarray(affine, np.float64))
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


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
        fail(path, "file", "nothing", wanted)
    except (OSError, ValueError) as error:
        fail(path, "file", getattr(error, "strerror", None) or error, wanted)
    if not stat.S_ISREG(status.st_mode):
        fail(path, "file", "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe", wanted)
    return status.st_size


def read_json(path, nan=False):
    """The JSON value of a file; with `nan`, a NaN, which JSON does not know, is let pass.

    Raises:
      InputError: missing, unreadable, not JSON, nested too deep, longer than MAX_JSON_BYTES, or a number that is not
        finite or, if whole, beyond 64 bits.
    """
    size = file_size(path, "a JSON file")
    if size > MAX_JSON_BYTES:
        fail(path, "size", f"{size} bytes", f"{MAX_JSON_BYTES} at most")
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    # ValueError: not JSON, not UTF-8, or a number of too many digits.
    except (OSError, ValueError) as error:
        fail(path, "content", error, "valid JSON")
    except RecursionError:
        fail(path, "content", "nesting too deep to read", "valid JSON")
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
            fail(path, field or "content", "values that are not finite", "finite numbers")
        elif isinstance(value, int) and abs(value) >= 2**63:
            fail(path, field or "content", "a whole number beyond 64 bits", "numbers of 64 bits")


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
                fail(path, "array", f"only {list(members)}", f"'{absent[0]}'")
            return {name: _read_member(path, archive, members[name], name) for name in names}
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds on damaged files
        fail(path, "content", f"{type(error).__name__}: {error}", wanted)


def _read_member(path, archive, info, name):
    # What any other method inflates to is bounded as it is read, by the size that the array's own header declares.
    if info.compress_type == zipfile.ZIP_DEFLATED and info.file_size > (info.compress_size + 1) * _DEFLATE_RATIO:
        found = f"{info.file_size} bytes in {info.compress_size}"
        fail(path, f"'{name}': size", found, "a size that deflate can reach")
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
    except InputError:
        raise
    except Exception as error:
        fail(path, "content", f"{type(error).__name__}: {error}", "a complete npy file of numbers")


def _read_array(path, field, stream, size):
    """The array of an npy stream of `size` bytes; numpy parses the header, nothing is allocated before it is checked."""
    start = stream.read(8)
    if start[:7] not in (b"\x93NUMPY\x01", b"\x93NUMPY\x02"):
        fail(path, f"{field}: first bytes", start, "those of an npy file of version 1 or 2")
    counted, read_header = (2, np.lib.format.read_array_header_1_0), (4, np.lib.format.read_array_header_2_0)
    width, parse = counted if start[6] == 1 else read_header
    length = stream.read(width)
    count = int.from_bytes(length, "little")
    if count > MAX_HEADER_BYTES:
        fail(path, f"{field}: header", f"{count} bytes", f"{MAX_HEADER_BYTES} at most")
    shape, fortran, dtype = parse(io.BytesIO(length + stream.read(count)))
    if dtype.hasobject or dtype.kind not in "biufcSU":
        fail(path, f"{field}: type", dtype, "plain arrays: numbers or text")
    if any(n < 0 for n in shape):
        fail(path, f"{field}: shape", shape, "axes that are not negative")
    items = math.prod(shape)
    if items * max(dtype.itemsize, 1) > MAX_ARRAY_BYTES:
        fail(path, f"{field}: shape", f"{shape} of {dtype}", f"{MAX_ARRAY_BYTES} bytes at most")
    held = size - 8 - width - count
    if items * dtype.itemsize != held:
        fail(path, f"{field}: shape", f"{shape} of {dtype} with {held} bytes behind it", "the size that it declares")
    raw = np.empty(held, np.uint8)
    _fill(stream, raw)
    if stream.read(1):
        fail(path, f"{field}: shape", f"{shape} of {dtype} with more behind it", "the size that it declares")
    return raw.view(dtype).reshape(shape, order="F" if fortran else "C") if held else np.empty(shape, dtype)


def _fill(stream, array):
    # In pieces, so that memory is touched only as far as the stream really goes.
    view = memoryview(array)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done : done + _CHUNK])
        if not count:
            raise EOFError(f"the data ends after {done} of {len(view)} bytes")
        done += count


class _Gunzip(io.RawIOBase):
    """The content of a gzip file, inflated only as far as it is asked for."""

    def __init__(self, path, stream):
        self._path, self._stream, self._inflate, self._input = path, stream, zlib.decompressobj(31), b""
        self._taken = self._given = 0
        self.may_be_tight = True

    def readable(self):
        return True

    def readinto(self, target):
        while not self._inflate.eof:
            if not self._input:
                # Little at a time: what a call leaves over is copied.
                self._input = self._stream.read(_PACKED_CHUNK)
                if not self._input:
                    raise EOFError("the compressed data is cut off")
                self._taken += len(self._input)
            data = self._inflate.decompress(self._input, len(target))
            self._input = self._inflate.unconsumed_tail
            if data:
                self._given += len(data)
                if not self.may_be_tight and self._given > max(_TIGHT_AFTER_BYTES, _TIGHT_RATIO * self._taken):
                    found = f"{self._given} bytes packed into {self._taken}"
                    fail(self._path, "content", found, "a CT, which packs less, or labels of 8 bits a voxel")
                target[: len(data)] = data
                return len(data)
        return 0


@contextlib.contextmanager
def _nifti(path, axes=3, most=MAX_VOXELS):
    """Yields (header, shape, the file's first bytes, stream of the rest) of a NIfTI file whose claims are checked.

    The volume has `axes` axes, 2 or 3, any further ones of length 1, and `most` voxels at most. The first bytes end with the
    header's extensions or, as they are read in one piece, a few voxels further on.
    """
    size = file_size(path, "a NIfTI file")
    try:
        # What nibabel and numpy warn of in a damaged header becomes an error below, or is of no account.
        with open(path, "rb") as stream, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            packed = stream.read(2) == b"\x1f\x8b"
            if packed:
                stream.seek(-4, os.SEEK_END)
                length = int.from_bytes(stream.read(4), "little")
            stream.seek(0)
            source = _Gunzip(path, stream) if packed else stream
            block = _read(source, 540)
            header = _nifti_header(path, block, axes)
            shape, first, claimed = _nifti_claims(path, header, axes, most)
            if packed and claimed > size * _DEFLATE_RATIO:
                fail(path, "shape", f"{shape}: {claimed} bytes out of {size}", "a size that deflate can reach")
            if packed and claimed % 2**32 != length:
                wanted = f"a complete NIfTI volume: the {claimed} that the header declares, in one gzip member"
                fail(path, "gzip trailer", f"{length} bytes", wanted)
            if packed:
                source.may_be_tight = claimed <= _LABELS_BYTES
            if not packed and claimed != size:
                fail(path, "size", f"{size} bytes", f"a complete NIfTI volume: the {claimed} that the header declares")
            start = block + _read(source, first - len(block))
            yield header, shape, start, source
    except InputError:
        raise
    except MemoryError:
        fail(path, "shape", "more than fits into memory", "a smaller volume")
    # nibabel, zlib and numpy each raise their own kinds on damaged files; HeaderDataError is an Exception only.
    except Exception as error:
        fail(path, "content", f"{type(error).__name__}: {error}", "a complete NIfTI volume")


def _read(stream, count):
    """Up to `count` bytes: fewer only where the stream ends."""
    data = b""
    buffer = bytearray(max(count, 0))
    while len(data) < count:
        got = stream.readinto(memoryview(buffer)[: count - len(data)])
        if not got:
            break
        data += bytes(buffer[:got])
    return data


def _nifti_header(path, block, axes):
    import nibabel

    for kind in (nibabel.Nifti2Header, nibabel.Nifti1Header):
        if kind.may_contain_header(block):
            header = kind(block[: kind.sizeof_hdr], check=False)
            if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
                fail(path, "magic", header["magic"].item(), "a NIfTI in one file (n+1 or n+2)")
            if header["sizeof_hdr"] != kind.sizeof_hdr:
                fail(path, "sizeof_hdr", header["sizeof_hdr"], kind.sizeof_hdr)
            if axes == 3 and not header["sform_code"] and not (header["pixdim"][1:4] > 0).all():
                fail(path, "pixdim", header["pixdim"][1:4].tolist(), "a positive spacing (no sform stands in)")
            # nibabel mends small faults and logs each; what it cannot mend it raises.
            header.check_fix(logger=logging.Logger("nifti", logging.CRITICAL + 1), error_level=40)
            return header
    fail(path, "content", f"a file that begins with {block[:8]}", "a complete NIfTI volume")


def _nifti_claims(path, header, axes, most):
    """(shape, offset of the voxels, bytes of the whole file) as the header declares them, within what is accepted."""
    rank, wanted = int(header["dim"][0]), f"{'two' if axes == 2 else 'three'} axes"
    if not axes <= rank <= 7:
        fail(path, "shape", f"{rank} axes", wanted)
    shape = tuple(int(n) for n in header["dim"][1 : rank + 1])
    if min(shape) < 1:
        fail(path, "shape", shape, "at least one voxel along each axis")
    if max(shape[axes:], default=1) > 1:
        fail(path, "shape", shape, wanted)
    shape = shape[:axes]
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        fail(path, "voxel type", dtype, "real numbers of at most 64 bits")
    voxels = math.prod(shape)
    if voxels > most or voxels * dtype.itemsize > MAX_VOLUME_BYTES:
        fail(path, "shape", f"{shape} of {dtype}", f"{most} voxels and {MAX_VOLUME_BYTES} bytes at most")
    offset = float(header["vox_offset"]) or header.single_vox_offset
    if not header.single_vox_offset <= offset <= MAX_HEADER_BYTES or offset % 1:
        fail(path, "vox_offset", offset, f"a whole number from {header.single_vox_offset} to {MAX_HEADER_BYTES}")
    return shape, int(offset), int(offset) + voxels * dtype.itemsize


def _nifti_affine(path, header):
    if not header["sform_code"] and not header["qform_code"]:
        fail(path, "affine", "neither an sform nor a qform", "one of them: left and right cannot be guessed")
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        fail(path, "units", unit, "mm")
    affine = np.asarray(header.get_best_affine(), np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (
        not np.isfinite(affine).all()
        or spacing.min() < _VOXEL_MM[0]
        or spacing.max() > _VOXEL_MM[1]
        or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3
        or np.abs(affine[:3, 3]).max() > _REACH_MM
    ):
        fail(path, "affine", affine.tolist(), f"a finite, invertible 4x4 matrix, voxels of {_VOXEL_MM} mm")
    return affine


def to_canonical(array, affine):
    """An array (X, Y, Z) and its affine with axes turned and flipped to be nearest to RAS+; oblique axes stay oblique."""
    import nibabel

    orientation = nibabel.io_orientation(affine)
    shape = array.shape
    return (
        nibabel.apply_orientation(array, orientation),
        affine @ nibabel.orientations.inv_ornt_aff(orientation, shape),
    )


def read_nifti_grid(path):
    """Shape (3,) and affine (4, 4) as `read_nifti` gives them, without reading the voxels.

    Raises:
      InputError: as `read_nifti`, of the header.
    """
    with _nifti(path) as (header, shape, _, _):
        # An array of the shape that takes no memory goes through the same turn as the voxels.
        stand_in, affine = to_canonical(np.broadcast_to(np.uint8(0), shape), _nifti_affine(path, header))
        return stand_in.shape, affine


def read_nifti_label_names(path):
    """Names by label value (dict int -> str) from the label table that TotalSegmentator leaves in a NIfTI; empty without one.

    Raises:
      InputError: as `read_nifti`, of the header, or a table that cannot be read.
    """
    import nibabel

    with _nifti(path) as (header, _, start, _):
        size = header.sizeof_hdr
        if start[size : size + 1] in (b"", b"\0"):
            return {}
        offset = int(header["vox_offset"]) or header.single_vox_offset
        block = start[size + 4 : offset]
        swapped = header.endianness != nibabel.volumeutils.native_code
        for extension in header.exts_klass.from_fileobj(io.BytesIO(block), len(block), swapped):
            if b"<LabelTable>" in extension.content:
                table = xml.etree.ElementTree.fromstring(extension.content.strip())
                return {int(label.get("Key")): (label.text or "").strip() for label in table.iter("Label")}
    return {}


def read_nifti(path):
    """A NIfTI volume in RAS+ order: array (X, Y, Z) as stored or, scaled, float32; and its 4x4 affine in mm.

    NIfTI-1 and -2 in one file, gzipped or not, by content and not by name. Nothing of the declared size is allocated or
    inflated before the declaration is checked against the file's size and, compressed, its gzip trailer.

    Raises:
      InputError: missing, truncated or damaged; not 3D; not real numbers; more than MAX_VOXELS or MAX_VOLUME_BYTES; a
        length other than declared; no or no usable affine.
    """
    with _nifti(path) as (header, shape, start, source):
        affine = _nifti_affine(path, header)
        array = _nifti_voxels(path, header, shape, start, source)
    return to_canonical(array, affine)


def read_nifti_image(path, most):
    """A NIfTI file that holds one image: array (X, Y) in the file's own axes, as stored or, scaled, float32.

    Read with the care of `read_nifti`, but an affine is neither wanted nor followed: it must not turn an X-ray.

    Raises:
      InputError: missing, truncated or damaged; more than two axes longer than one; not real numbers; more than `most`
        pixels; a length other than declared.
    """
    with _nifti(path, 2, most) as (header, shape, start, source):
        return _nifti_voxels(path, header, shape, start, source)


def _nifti_voxels(path, header, shape, start, source):
    """The array that follows a checked header, in the file's own axes; what `_nifti` yields goes in."""
    dtype = header.get_data_dtype()
    offset = int(header["vox_offset"]) or header.single_vox_offset
    raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    early = np.frombuffer(start[offset:], np.uint8)
    raw[: len(early)] = early[: len(raw)]
    _fill(source, raw[len(early) :])
    if len(early) > len(raw) or _read(source, 1):
        fail(path, "shape", f"{shape} of {dtype} with more behind it", "the size that it declares")
    array = raw.view(dtype).reshape(shape, order="F")
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    slope, intercept = header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1.0, 0.0):
        array = array.astype(np.float32)
        # What overflows here is not finite, and refused as such by whoever needs numbers.
        array *= np.float32(slope)
        array += np.float32(intercept)
    return array


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
        fail(path, "file", error.strerror, "a readable file")
