"""NIfTI volumes, read with every declared size checked against the file before memory is allocated."""

import contextlib
import gzip
import io
import logging
import math
import os
import warnings
import xml.etree.ElementTree
import zlib

import numpy as np

from data_pipelines.io import files
from radgs_jax import errors


def write_nifti(path, array, affine):
    """Writes a NIfTI volume, gzip level 1, atomically; the same bytes for the same volume.

    Args:
      array: (X, Y, Z) numbers of a type that NIfTI has; affine: (4, 4) from voxel indices to RAS+ mm.
    """
    import nibabel  # a third of a second, for one kind of file

    image = nibabel.Nifti1Image(np.asarray(array), np.asarray(affine, np.float64))
    image.header.set_xyzt_units("mm")
    with files.replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


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
                self._input = self._stream.read(files.PACKED_CHUNK)
                if not self._input:
                    raise EOFError("the compressed data is cut off")
                self._taken += len(self._input)
            data = self._inflate.decompress(self._input, len(target))
            self._input = self._inflate.unconsumed_tail
            if data:
                self._given += len(data)
                if not self.may_be_tight and self._given > max(
                    files.TIGHT_AFTER_BYTES, files.TIGHT_RATIO * self._taken
                ):
                    found = f"{self._given} bytes packed into {self._taken}"
                    errors.fail(self._path, "content", found, "a CT, which packs less, or labels of 8 bits a voxel")
                target[: len(data)] = data
                return len(data)
        return 0


@contextlib.contextmanager
def _nifti(path, axes=3, most=files.MAX_VOXELS):
    """Yields (header, shape, the file's first bytes, stream of the rest) of a NIfTI file whose claims are checked.

    The volume has `axes` axes, 2 or 3, any further ones of length 1, and `most` voxels at most. The first bytes end with the
    header's extensions or, as they are read in one piece, a few voxels further on.
    """
    size = files.file_size(path, "a NIfTI file")
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
            if packed and claimed > size * files.DEFLATE_RATIO:
                errors.fail(path, "shape", f"{shape}: {claimed} bytes out of {size}", "a size that deflate can reach")
            if packed and claimed % 2**32 != length:
                wanted = f"a complete NIfTI volume: the {claimed} that the header declares, in one gzip member"
                errors.fail(path, "gzip trailer", f"{length} bytes", wanted)
            if packed:
                source.may_be_tight = claimed <= files.LABELS_BYTES
            if not packed and claimed != size:
                errors.fail(
                    path, "size", f"{size} bytes", f"a complete NIfTI volume: the {claimed} that the header declares"
                )
            start = block + _read(source, first - len(block))
            yield header, shape, start, source
    except errors.InputError:
        raise
    except MemoryError:
        errors.fail(path, "shape", "more than fits into memory", "a smaller volume")
    # nibabel, zlib and numpy each raise their own kinds on damaged files; HeaderDataError is an Exception only.
    except Exception as error:
        errors.fail(path, "content", f"{type(error).__name__}: {error}", "a complete NIfTI volume")


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
                errors.fail(path, "magic", header["magic"].item(), "a NIfTI in one file (n+1 or n+2)")
            if header["sizeof_hdr"] != kind.sizeof_hdr:
                errors.fail(path, "sizeof_hdr", header["sizeof_hdr"], kind.sizeof_hdr)
            if axes == 3 and not header["sform_code"] and not (header["pixdim"][1:4] > 0).all():
                errors.fail(path, "pixdim", header["pixdim"][1:4].tolist(), "a positive spacing (no sform stands in)")
            # nibabel mends small faults and logs each; what it cannot mend it raises.
            header.check_fix(logger=logging.Logger("nifti", logging.CRITICAL + 1), error_level=40)
            return header
    errors.fail(path, "content", f"a file that begins with {block[:8]}", "a complete NIfTI volume")


def _nifti_claims(path, header, axes, most):
    """(shape, offset of the voxels, bytes of the whole file) as the header declares them, within what is accepted."""
    rank, wanted = int(header["dim"][0]), f"{'two' if axes == 2 else 'three'} axes"
    if not axes <= rank <= 7:
        errors.fail(path, "shape", f"{rank} axes", wanted)
    shape = tuple(int(n) for n in header["dim"][1 : rank + 1])
    if min(shape) < 1:
        errors.fail(path, "shape", shape, "at least one voxel along each axis")
    if max(shape[axes:], default=1) > 1:
        errors.fail(path, "shape", shape, wanted)
    shape = shape[:axes]
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        errors.fail(path, "voxel type", dtype, "real numbers of at most 64 bits")
    voxels = math.prod(shape)
    if voxels > most or voxels * dtype.itemsize > files.MAX_VOLUME_BYTES:
        errors.fail(path, "shape", f"{shape} of {dtype}", f"{most} voxels and {files.MAX_VOLUME_BYTES} bytes at most")
    offset = float(header["vox_offset"]) or header.single_vox_offset
    if not header.single_vox_offset <= offset <= files.MAX_HEADER_BYTES or offset % 1:
        errors.fail(
            path, "vox_offset", offset, f"a whole number from {header.single_vox_offset} to {files.MAX_HEADER_BYTES}"
        )
    return shape, int(offset), int(offset) + voxels * dtype.itemsize


def _nifti_affine(path, header):
    if not header["sform_code"] and not header["qform_code"]:
        errors.fail(path, "affine", "neither an sform nor a qform", "one of them: left and right cannot be guessed")
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        errors.fail(path, "units", unit, "mm")
    affine = np.asarray(header.get_best_affine(), np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (
        not np.isfinite(affine).all()
        or spacing.min() < files.VOXEL_MM[0]
        or spacing.max() > files.VOXEL_MM[1]
        or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3
        or np.abs(affine[:3, 3]).max() > files.REACH_MM
    ):
        errors.fail(path, "affine", affine.tolist(), f"a finite, invertible 4x4 matrix, voxels of {files.VOXEL_MM} mm")
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
    files.fill_array(source, raw[len(early) :])
    if len(early) > len(raw) or _read(source, 1):
        errors.fail(path, "shape", f"{shape} of {dtype} with more behind it", "the size that it declares")
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
