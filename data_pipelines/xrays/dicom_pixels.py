"""Finds and reads the pixels of one frame of a DICOM file, without reading the others (PS3.5: 7.1 elements, 8 and A.4 pixels)."""

import dataclasses
import logging
import pathlib
import struct
import typing

import numpy as np

from data_pipelines.io import codestream
from radgs_jax import errors

if typing.TYPE_CHECKING:
    import pydicom

HEAD_BYTES = 136
"""Bytes at the begin of a file that tell whether it is DICOM: the preamble, its word, and the first element's tag."""
DEFERRED_BYTES = 2**16
"""Bytes above which the value of an element is left in the file until it is asked for. Chosen by hand: half or twice changes only
how much of private elements is read."""
MAX_CODED_RATIO = 4
"""Largest size of a compressed frame relative to its pixels. Chosen by hand: incompressible frames are slightly above 1, so half is
still enough, and twice lets a damaged file take more memory."""
EXTRA_CODED_BYTES = 4096
"""Bytes that a compressed frame may have beyond that, for the headers of small images. Chosen by hand; not sensitive."""
MAX_FRAGMENTS = 2**20
"""Most fragments of compressed pixels. Chosen by hand: ten for each frame of the longest run; half or twice bounds only the time
that a damaged file takes."""
_UNDEFINED = 2**32 - 1
"""Length of a value that ends with a delimiter (PS3.5, 7.1)."""
_PIXEL_DATA = (0x7FE0, 0x0010)
"""Tag of the pixels."""
_ITEM, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
"""Tags of a fragment and of the end of all (PS3.5, A.4)."""
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
"""Value representations with a length of 32 bits (PS3.5, 7.1.2)."""


@dataclasses.dataclass(frozen=True)
class PixelElement:
    """Where a file keeps its pixels.

    Attributes:
      path: the file.
      size: its bytes.
      syntax: the transfer syntax; None if the file does not say, and the pixels are not compressed.
      little: whether numbers are little-endian.
      vr: value representation as stored, b"" if implicit.
      at: offset of the value.
      length: bytes of the value; None if undefined, as of compressed pixels.
    """

    path: pathlib.Path
    size: int
    syntax: "pydicom.uid.UID | None"
    little: bool
    vr: bytes
    at: int
    length: int | None


def looks_like_dicom(head: bytes) -> bool:
    """Whether the first HEAD_BYTES of a file are those of DICOM: with preamble, or beginning with group 0002 or 0008."""
    if head[128:132] == b"DICM":
        return True
    # Files of old programs have no preamble, and some no meta group either. Their first element is a length or a UID.
    return head[:4] in (b"\2\0\0\0", b"\2\0\1\0", b"\2\0\2\0", b"\2\0\x10\0") or head[:4] in (
        b"\x08\0\0\0", b"\x08\0\1\0", b"\x08\0\5\0", b"\x08\0\x08\0", b"\x08\0\x12\0", b"\x08\0\x16\0", b"\x08\0\x18\0",
    )  # fmt: skip


def read_header(path: pathlib.Path) -> "tuple[pydicom.Dataset, PixelElement | None]":
    """All elements in front of the pixels, and where the pixels are (None if there are none).

    Raises:
      InputError: the data set is deflated. Whatever pydicom raises on damaged files is raised as well.
    """
    import pydicom  # here, since importing it takes half a second

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it logs what it also raises or warns of

    with open(path, "rb") as stream:
        head = stream.read(4096)
        size = stream.seek(0, 2)
        stream.seek(0)
        preamble = head[128:132] == b"DICM"
        meta = pydicom.filereader.read_file_meta_info(path) if preamble else None
        deflated = pydicom.uid.DeflatedExplicitVRLittleEndian
        if meta.get("TransferSyntaxUID") == deflated if meta is not None else deflated.encode() in head:
            # pydicom inflates the whole data set without a limit.
            errors.fail(path, "TransferSyntaxUID", "a deflated data set", "one of the others: dcmconv +te")
        header = pydicom.dcmread(stream, defer_size=DEFERRED_BYTES, stop_before_pixels=True, force=not preamble)
        begin = stream.tell()
        start = stream.read(12)
    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID")
    implicit, little = header.original_encoding
    order = "<" if little else ">"
    if len(start) < 8 or struct.unpack(f"{order}HH", start[:4]) != _PIXEL_DATA:
        return header, None
    vr = start[4:6]
    if implicit or not vr.isalpha():
        vr, skip, (length,) = b"", 8, struct.unpack(f"{order}L", start[4:8])
    elif vr in _LONG:
        skip, (length,) = 12, struct.unpack(f"{order}L", start[8:12])
    else:
        skip, (length,) = 8, struct.unpack(f"{order}H", start[6:8])
    return header, PixelElement(
        path, size, syntax, bool(little), vr, begin + skip, None if length == _UNDEFINED else length
    )


def read_frame(
    header: "pydicom.Dataset", element: PixelElement, shape: tuple[int, int], kind: np.dtype, count: int, number: int
) -> np.ndarray:
    """The pixels (rows, columns) of a frame, of type `kind`, as stored.

    Args:
      header: as `read_header` returns it.
      element: where the pixels are.
      shape: (rows, columns), as the header says.
      kind: type of a stored number, as the header says.
      count: number of frames.
      number: the frame, from 0.

    Raises:
      InputError: the pixels are missing or cut, or not of that size.
    """
    compressed = element.syntax is not None and element.syntax.is_encapsulated
    if not compressed:
        return _plain_frame(element, shape, kind, count, number)
    return _coded_frame(header, element, shape, kind, count, number)


def _plain_frame(element, shape, kind, count, number):
    path, pixels = element.path, shape[0] * shape[1]
    frame_bytes = pixels * kind.itemsize
    if element.length is None:
        errors.fail(path, "PixelData", "an undefined length without compression", f"{frame_bytes * count} bytes")
    # pydicom only warns about surplus bytes, and masks bits above BitsStored. One byte may make the length even.
    if not frame_bytes * count <= element.length <= frame_bytes * count + 1:
        found = f"{element.length} bytes"
        errors.fail(path, "PixelData", found, f"{frame_bytes * count} for {count} frame(s) of {shape}")
    begin = frame_bytes * number
    if not element.little and kind.itemsize == 1 and element.vr == b"OW":
        # Bytes of big-endian words: neighbours have changed places (PS3.5, 8.1.1).
        first = begin - begin % 2
        words = np.fromfile(path, np.uint16, (begin - first + pixels + 1) // 2, offset=element.at + first)
        read = words.byteswap().view(kind)[begin - first :][:pixels]
    else:
        read = np.fromfile(path, kind.newbyteorder("<" if element.little else ">"), pixels, offset=element.at + begin)
    if read.size != pixels:
        errors.fail(path, "PixelData", f"{read.size} pixels", f"{pixels}: a complete file")
    return read.reshape(shape).astype(kind)


def _coded_frame(header, element, shape, kind, count, number):
    import pydicom

    path, syntax = element.path, element.syntax
    with open(path, "rb") as stream:
        table, fragments = _fragments(stream, element)
        chosen = _fragments_of(stream, header, element, table, fragments, count, number)
        length = sum(n for _, n in chosen)
        limit = MAX_CODED_RATIO * shape[0] * shape[1] * kind.itemsize + EXTRA_CODED_BYTES
        if length > limit:
            # Before it is read, since a damaged length could claim all memory.
            errors.fail(path, "PixelData", f"{length} bytes of one frame", f"{limit} at most for {shape}")
        frame = b"".join(_read_at(stream, at, n) for at, n in chosen)
    if syntax != pydicom.uid.RLELossless:
        codestream.check(path, frame, shape)
        frame = codestream.without_padding(frame)
    try:
        with codestream.silent():
            pixels, _ = pydicom.pixels.get_decoder(syntax).as_array(
                pydicom.encaps.encapsulate([frame], has_bot=False),
                index=0,
                raw=True,
                number_of_frames=1,
                rows=shape[0],
                columns=shape[1],
                samples_per_pixel=1,
                photometric_interpretation=header.PhotometricInterpretation,
                bits_allocated=8 * kind.itemsize,
                bits_stored=header.BitsStored,
                pixel_representation=header.PixelRepresentation,
                pixel_keyword="PixelData",
            )
    except Exception as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        errors.fail(path, "PixelData", found, f"an image that '{syntax.name}' decodes to")
    if pixels.shape != shape:
        errors.fail(path, "PixelData", f"an image of shape {pixels.shape}", f"{shape} as Rows and Columns say")
    return pixels


def _read_at(stream, at, length):
    stream.seek(at)
    return stream.read(length)


def _fragments(stream, element):
    """The basic offset table, and (offset, length) of each fragment: of its value, in the file."""
    at, fragments, table = element.at, [], ()
    end = element.size if element.length is None else min(element.size, element.at + element.length)
    while at + 8 <= end:
        group, number, length = struct.unpack("<HHL", _read_at(stream, at, 8))
        if (group, number) == _END:
            break
        if (group, number) != _ITEM or at + 8 + length > end or len(fragments) > MAX_FRAGMENTS:
            errors.fail(element.path, "PixelData", f"no whole fragment at byte {at}", "compressed frames in fragments")
        fragments.append((at + 8, length))
        at += 8 + length
    if len(fragments) < 2:
        errors.fail(element.path, "PixelData", "no compressed frame", "an offset table and fragments")
    offset, length = fragments[0]
    if length and length % 4 == 0:
        table = struct.unpack(f"<{length // 4}L", _read_at(stream, offset, length))
    return table, fragments[1:]


def _fragments_of(stream, header, element, table, fragments, count, number):
    """The fragments of one frame (PS3.5, A.4; PS3.3, C.7.6.3.1.8)."""
    if count == 1:
        return fragments
    extended = header.get("ExtendedOffsetTable")
    if isinstance(extended, bytes) and len(extended) == 8 * count:
        table = struct.unpack(f"<{count}Q", extended)
    if len(table) == count:
        base = fragments[0][0] - 8
        begin, end = table[number], table[number + 1] if number + 1 < count else element.size
        chosen = [(at, length) for at, length in fragments if begin <= at - 8 - base < end]
        if not chosen or chosen[0][0] - 8 - base != begin:
            errors.fail(
                element.path, "PixelData", f"no fragment at {begin}", f"frame {number} where the offset table says"
            )
        return chosen
    if len(fragments) == count:
        return [fragments[number]]
    # Without a table, a frame ends with the fragment that has the last marker.
    frames, current = [], []
    for at, length in fragments:
        current.append((at, length))
        tail = min(length, 64)
        if codestream.without_padding(_read_at(stream, at + length - tail, tail)).endswith(codestream.END):
            frames.append(current)
            current = []
    if len(frames) != count:
        found = f"{len(frames)} frame(s) in {len(fragments)} fragments without an offset table"
        errors.fail(element.path, "PixelData", found, f"{count} as NumberOfFrames says")
    return frames[number]
