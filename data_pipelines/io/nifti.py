"""NIfTI volumes. Every declared size is checked against the file before memory is allocated."""

import contextlib
import gzip
import io
import logging as standard_logging
import math
import os
import pathlib
import warnings
import xml.etree.ElementTree
import zlib

import numpy as np
from absl import logging

from data_pipelines.io import files
from radgs_jax import errors

QFORM_SAID_MM, QFORM_REFUSED_MM = 0.1, 1.0
"""Distances in mm between a volume's corners by its sform and by its qform from which this is said, and refused. A qform's 32-bit
quaternion rounds by 0.01 mm at most. Chosen by hand: half says and refuses rounded qforms, twice allows twice the error in a pose,
if the CT and its X-rays were related by the other one."""
MIN_AXIS_DETERMINANT = 1e-3
"""Smallest determinant of an affine's unit axes. Chosen by hand: 1 is a right angle, 0 a singular affine; not sensitive."""


def write_nifti(path: pathlib.Path | str, array: np.ndarray, affine: np.ndarray) -> None:
    """Writes a gzipped NIfTI volume, atomically. Equal volumes give equal bytes.

    Args:
      path: the file to write.
      array: (X, Y, Z), of a type that NIfTI supports.
      affine: (4, 4) from voxel indices to RAS+ mm.
    """
    import nibabel  # here, since importing it takes a third of a second

    image = nibabel.Nifti1Image(np.asarray(array), np.asarray(affine, np.float64))
    image.header.set_xyzt_units("mm")
    with files.replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


class _Gunzip(io.RawIOBase):
    """The content of a gzip file, inflated only as far as it is read.

    may_be_tight: False applies files.TIGHT_RATIO.
    """

    def __init__(self, path, stream):
        self._path, self._stream, self._inflate, self._input = path, stream, zlib.decompressobj(31), b""
        self._taken = self._given = 0
        self.may_be_tight = True

    def readable(self):
        return True

    def readinto(self, target):
        while not self._inflate.eof:
            if not self._input:
                # In small chunks, since zlib copies the input that a call does not consume.
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
    """Yields (header, shape, first bytes of the file, stream of the remaining bytes) of a NIfTI file with a checked header.

    The volume has `axes` axes, 2 or 3, and any others have length 1; it has at most `most` voxels. The first bytes hold the
    header with its extensions, and may hold a few voxels.
    """
    size = files.file_size(path, "a NIfTI file")
    try:
        # Warnings of nibabel and numpy about a damaged header are either errors below or harmless.
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
    # nibabel, zlib and numpy raise different exceptions on damaged files; HeaderDataError derives from Exception itself.
    except Exception as error:
        errors.fail(path, "content", f"{type(error).__name__}: {error}", "a complete NIfTI volume")


def _read(stream, count):
    """The next `count` bytes, or fewer if the stream ends."""
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
            # nibabel repairs and logs small faults, and raises for others; the log is discarded.
            header.check_fix(logger=standard_logging.Logger("nifti", standard_logging.CRITICAL + 1), error_level=40)
            return header
    errors.fail(path, "content", f"a file that begins with {block[:8]}", "a complete NIfTI volume")


def _nifti_claims(path, header, axes, most):
    """(shape, offset of the voxels, size of the whole file in bytes) as the header declares them, within the limits."""
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


def apart_mm(shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray) -> float:
    """Largest distance in mm along an axis between the corner voxels of a grid (3,) by two affines (4, 4)."""
    difference = other - affine
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in shape])).reshape(3, -1).T
    return float(np.abs(corners @ difference[:3, :3].T + difference[:3, 3]).max())


def _check_qform(path, header, shape, affine, say):
    """Refuses a header whose qform puts the volume elsewhere than its sform, which is `affine`; small differences are said."""
    import nibabel

    if not (header["sform_code"] and header["qform_code"]):
        return
    try:
        qform = np.asarray(header.get_qform(), np.float64)
    except (ValueError, nibabel.spatialimages.HeaderDataError) as error:
        errors.fail(path, "qform", f"no rotation ({error})", "one that agrees with the sform, or the code 0")
    axes = ["".join(axis or "?" for axis in nibabel.aff2axcodes(m)) for m in (affine, qform)]
    apart = apart_mm(shape, affine, qform) if np.isfinite(qform).all() else np.inf
    if axes[0] != axes[1] or apart > QFORM_REFUSED_MM:
        found = f"axes {axes[0]} by the sform, {axes[1]} by the qform, up to {apart:.1f} mm apart"
        errors.fail(path, "sform and qform", found, "one place: set the code of the wrong one to 0")
    if apart > QFORM_SAID_MM and say:
        logging.warning("%s: sform and qform: up to %.2f mm apart, the sform is taken", path, apart)


def _nifti_affine(path, header, shape, say=False):
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
        or abs(np.linalg.det(affine[:3, :3] / spacing)) < MIN_AXIS_DETERMINANT
        or np.abs(affine[:3, 3]).max() > files.REACH_MM
    ):
        errors.fail(path, "affine", affine.tolist(), f"a finite, invertible 4x4 matrix, voxels of {files.VOXEL_MM} mm")
    _check_qform(path, header, shape, affine, say)
    return affine


def to_canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An array (X, Y, Z) and its affine (4, 4), with axes permuted and flipped to be nearest to RAS+. Nothing is resampled."""
    import nibabel

    orientation = nibabel.io_orientation(affine)
    shape = array.shape
    return (
        nibabel.apply_orientation(array, orientation),
        affine @ nibabel.orientations.inv_ornt_aff(orientation, shape),
    )


def read_nifti_grid(path: pathlib.Path | str) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (3,) and affine (4, 4) as `read_nifti` returns them, without reading the voxels.

    Raises:
      InputError: as `read_nifti`, for faults of the header.
    """
    with _nifti(path) as (header, shape, _, _):
        # A broadcast array has the shape, and takes no memory.
        stand_in, affine = to_canonical(np.broadcast_to(np.uint8(0), shape), _nifti_affine(path, header, shape))
        return stand_in.shape, affine


def read_nifti_label_names(path: pathlib.Path | str) -> dict[int, str]:
    """Names by label value, from the label table that TotalSegmentator writes into a NIfTI header. Empty if there is none.

    Raises:
      InputError: as `read_nifti`, for faults of the header, or the table cannot be read.
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


def read_nifti(path: pathlib.Path | str) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI volume with axes nearest to RAS+.

    Reads NIfTI-1 and -2 in a single file. Gzip is recognised by content, not by name. The declared size
    is checked against the file's size and gzip trailer before memory is allocated.

    Returns:
      The array (X, Y, Z), of the stored type, or float32 if the header scales it; and its affine (4, 4) in mm.

    Raises:
      InputError: the file is missing, truncated or damaged; it is not 3D; its voxels are not real numbers; it exceeds
        MAX_VOXELS or MAX_VOLUME_BYTES; its length is not the declared one; it has no usable affine, or
        its qform and its sform disagree by more than QFORM_REFUSED_MM.
    """
    with _nifti(path) as (header, shape, start, source):
        affine = _nifti_affine(path, header, shape, say=True)
        array = _nifti_voxels(path, header, shape, start, source)
    return to_canonical(array, affine)


def read_nifti_image(path: pathlib.Path | str, most: int) -> np.ndarray:
    """The image (X, Y) in a NIfTI file, in the file's own axes; of the stored type, or float32 if the header scales it.

    The affine is ignored: it must not rotate an X-ray.

    Raises:
      InputError: the file is missing, truncated or damaged; more than two axes are longer than 1; its pixels are not real
        numbers, or more than `most`; its length is not the declared one.
    """
    with _nifti(path, 2, most) as (header, shape, start, source):
        return _nifti_voxels(path, header, shape, start, source)


def _nifti_voxels(path, header, shape, start, source):
    """The array after a checked header, in the file's own axes. Takes what `_nifti` yields."""
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
        # Callers that need finite numbers check for overflow.
        array *= np.float32(slope)
        array += np.float32(intercept)
    return array
