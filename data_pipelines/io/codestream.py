"""Checks of a compressed image before it is decoded."""

import collections.abc
import contextlib
import os
import pathlib
import sys

from radgs_jax import errors

END = b"\xff\xd9"
"""The last marker of a stream: EOI of JPEG and JPEG-LS (ISO 10918-1 B.1.1.3), EOC of JPEG 2000 (15444-1 A.4.4)."""


@contextlib.contextmanager
def silent() -> collections.abc.Iterator[None]:
    """Discards what the whole process writes to standard error, such as a C decoder's messages about a damaged image.

    Decoders raise an exception as well, so nothing is lost.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def check(path: pathlib.Path | str, frame: bytes, wanted: tuple[int, int]) -> None:
    """Checks a JPEG, JPEG-LS or JPEG 2000 stream: decoders allocate memory by the size in its header.

    Args:
      path: the file named in errors.
      frame: bytes of the stream.
      wanted: (rows, columns) of the image.

    Raises:
      InputError: the stream is truncated, of another size, or of another kind.
    """
    size = shape(frame)
    if size is None or not without_padding(frame).endswith(END):
        errors.fail(path, "PixelData", "a compressed image that is cut or of another kind", "a whole JPEG or JPEG 2000")
    if size != tuple(wanted):
        errors.fail(path, "PixelData", f"a compressed image of {size}", f"{tuple(wanted)} as Rows and Columns say")


def without_padding(frame: bytes) -> bytes:
    """A stream without the bytes 00 and FF that pad fragments behind its last marker. Some decoders take them for data."""
    return frame.rstrip(b"\0\xff")


def shape(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) in the header of a JPEG or JPEG-LS (ISO 10918-1 B.2.2) or JPEG 2000 (15444-1 A.5.1) stream, or None."""
    if frame[:2] == b"\xff\xd8":
        at = 2
        while at + 9 <= len(frame) and frame[at] == 0xFF:
            marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
                return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
            at += 2 + length if marker != 0xFF else 1
        return None
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0:
        return None
    x1, y1, x0, y0 = (int.from_bytes(frame[start + k : start + k + 4], "big") for k in (8, 12, 16, 20))
    return y1 - y0, x1 - x0
