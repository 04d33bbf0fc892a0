"""What can be told of a compressed image before its decoder sees it."""

import contextlib
import os
import sys

from radgs_jax import errors


@contextlib.contextmanager
def silent():
    """A context that keeps what a decoder in C prints of a damaged image off standard error, the whole process's.

    The exception that the decoder raises says it too.
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


def check(path, frame, wanted):
    """Refuses a JPEG, JPEG-LS or JPEG 2000 stream that is cut, or whose own size is not `wanted` (rows, columns).

    A decoder allocates by the stream's size, and prints what it thinks of a cut one.

    Args:
      path: the file to name; frame: the stream's bytes.
    Raises:
      InputError: as said; other kinds of bytes too.
    """
    size = shape(frame)
    if size is None or not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        errors.fail(path, "PixelData", "a compressed image that is cut or of another kind", "a whole JPEG or JPEG 2000")
    if size != tuple(wanted):
        errors.fail(path, "PixelData", f"a compressed image of {size}", f"{tuple(wanted)} as Rows and Columns say")


def shape(frame):
    """(rows, columns) in the header of a JPEG, JPEG-LS (ISO 10918-1 B.2.2) or JPEG 2000 (15444-1 A.5.1) stream, else None."""
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
