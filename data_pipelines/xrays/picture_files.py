"""Reads PNG and TIFF files with one grey channel of 16 bits or more."""

import os
import pathlib
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from radgs_jax import errors

INFLATED_CHUNK = 2**22
"""Bytes inflated at once. Chosen by hand: less costs calls, more costs memory."""


def read_picture(path: pathlib.Path | str, most: int) -> np.ndarray:
    """The grey image (height, width) in a PNG or TIFF file.

    Raises:
      InputError: the file is damaged, has colours, fewer than 16 bits or several pages, or more than `most` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "TIFF")) as picture:
                if picture.width * picture.height > most:
                    errors.fail(path, "size", f"{picture.width} x {picture.height}", f"{most} pixels at most")
                if picture.mode not in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
                    errors.fail(
                        path, "pixels", f"mode {picture.mode}", "one grey channel of 16 bits or more, not for display"
                    )
                _check_complete(path, picture, most)
                try:
                    picture.seek(1)
                except EOFError:
                    picture.seek(0)
                else:
                    errors.fail(path, "pages", "several", "one")
                return np.array(picture)
    except errors.InputError:
        raise
    except Exception as error:  # Pillow raises SyntaxError, OSError, struct.error and others on damaged files
        errors.fail(path, "content", f"{type(error).__name__}: {error}"[:200], "a complete PNG or TIFF")


def _check_complete(path, picture, most):
    """Checks the size of the image data, since Pillow fills missing data with zeros."""
    samples = 2 if picture.mode.startswith("I;16") else 4
    if picture.format == "PNG":
        found = _png_bytes(path, most)
        wanted = picture.height * (1 + samples * picture.width)
        if found < wanted if picture.info.get("interlace") else found != wanted:
            errors.fail(path, "image data", f"{found} bytes", f"{wanted} for {picture.width} x {picture.height}")
        return
    counts = picture.tag_v2.get(279) or picture.tag_v2.get(325) or ()
    counts = counts if isinstance(counts, tuple) else (counts,)
    found, wanted = sum(counts), picture.height * picture.width * samples
    if picture.tag_v2.get(259, 1) == 1 and 279 in picture.tag_v2 and found != wanted:
        errors.fail(path, "StripByteCounts", f"{found} bytes", f"{wanted} for {picture.width} x {picture.height}")
    rows = picture.tag_v2.get(278, picture.height)
    if 279 in picture.tag_v2 and len(counts) != -(-picture.height // max(1, rows)):
        errors.fail(path, "StripByteCounts", f"{len(counts)} strips", f"{picture.height} rows, {rows} a strip")


def _png_bytes(path, most):
    """Inflated size of a PNG's image data, counted until it exceeds that of `most` pixels (PNG 3rd edition, 10.1)."""
    limit, total, inflater = 5 * most, 0, zlib.decompressobj()
    with open(path, "rb") as stream:
        stream.seek(8)
        while total < limit:
            length, kind = struct.unpack(">I4s", stream.read(8))
            if kind == b"IEND":
                break
            if kind != b"IDAT":
                stream.seek(length + 4, os.SEEK_CUR)
                continue
            rest = stream.read(length)
            while rest and total < limit:
                total += len(inflater.decompress(rest, INFLATED_CHUNK))
                rest = inflater.unconsumed_tail
            stream.seek(4, os.SEEK_CUR)
    return total
