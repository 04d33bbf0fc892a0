"""Reads PNG, TIFF and JPEG files with one grey channel: 16 bits or more, or 8 bits where the caller says that they are measured."""

import os
import pathlib
import struct
import typing
import warnings
import zlib

import numpy as np
from PIL import Image

from data_pipelines.io import codestream
from data_pipelines.xrays import read_options
from data_pipelines.xrays import stored_images
from radgs_jax import errors

FIRST_BYTES = (b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\xff\xd8\xff")
"""First bytes of the files that `read_picture` reads: PNG, TIFF and BigTIFF in both byte orders, JPEG."""
INFLATED_CHUNK = 2**22
"""Bytes inflated at once. Chosen by hand: less costs calls, more costs memory."""
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow's modes of one channel of 16 bits or more."""
_DISPLAY = {"L": 1, "LA": 2, "P": 1, "RGB": 3, "RGBA": 4, "RGBX": 4}
"""Pillow's modes of 8 bits, with the bytes of a pixel."""
_OPAQUE = 255
"""Alpha of a pixel that shows all of its colour."""


def read_picture(path: pathlib.Path | str, most: int, frame: int | None = None, display: bool = False) -> np.ndarray:
    """The grey image (height, width) in a PNG, TIFF or JPEG file.

    Args:
      path: the file.
      most: largest number of pixels.
      frame: number of the page in a file with several, from 0.
      display: also take 8 bits, and colours whose channels are all equal.

    Raises:
      InputError: the file is damaged, has colours, fewer bits than the caller says, several pages of which none was chosen, or
        more than `most` pixels.
    """
    try:
        with warnings.catch_warnings(), codestream.silent():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "TIFF", "JPEG")) as picture:
                _check_size(path, picture, most)
                number = stored_images.frame_number(path, frame, getattr(picture, "n_frames", 1))
                if number:
                    picture.seek(number)
                    _check_size(path, picture, most)
                _check_mode(path, picture, display)
                _check_complete(path, picture, most)
                if picture.mode in _DEEP:
                    return np.array(picture)
                return grey(path, np.array(picture.convert("RGBA" if picture.mode in ("P", "LA") else picture.mode)))
    except errors.InputError:
        raise
    except Exception as error:  # Pillow raises SyntaxError, OSError, struct.error and others on damaged files
        errors.fail(path, "content", f"{type(error).__name__}: {error}"[:200], "a complete PNG, TIFF or JPEG")


def grey(path: pathlib.Path | str, image: np.ndarray) -> np.ndarray:
    """The one channel of an image (H, W), or of (H, W, 3 or 4) whose colours are equal and whose alpha is full.

    Raises:
      InputError: the channels differ.
    """
    if image.ndim == 2:
        return image
    colours = image[..., :3]
    if (colours != colours[..., :1]).any() or (image[..., 3:] != _OPAQUE).any():
        errors.fail(
            path, "pixels", f"colours ({image.shape[2]} channels that differ)", "one grey channel, or equal ones"
        )
    return np.ascontiguousarray(colours[..., 0])


def refuse_display(path: pathlib.Path | str, found: str) -> typing.NoReturn:
    """Refuses a picture of 8 bits that the caller has not said to be measured. `path` and `found` are named in the error.

    Raises:
      InputError: always.
    """
    wanted = "16 bits or more: 8 are made for display as a rule; if they hold measured numbers, say so with"
    errors.fail(
        path, "pixels", found, f"{wanted} {read_options.named('bits', 8)} and --values=intensity or --values=log"
    )


def _check_size(path, picture, most):
    if picture.width * picture.height > most:
        errors.fail(path, "size", f"{picture.width} x {picture.height}", f"{most} pixels at most")


def _check_mode(path, picture, display):
    if picture.mode in _DEEP:
        return
    depth = _depth(path, picture)
    if picture.mode not in _DISPLAY or depth != 8:
        wanted = "one grey channel of 16 bits or more, or of 8"
        errors.fail(path, "pixels", f"mode {picture.mode} of {depth} bit(s)", wanted)
    if not display:
        refuse_display(path, f"mode {picture.mode}, 8 bits")


def _depth(path, picture):
    """Bits of a channel as stored: Pillow scales some depths to 8 without a word."""
    if picture.format == "PNG":
        with open(path, "rb") as stream:
            return stream.read(25)[24]  # of the header chunk (PNG 3rd edition, 11.2.1)
    if picture.format == "TIFF":
        depths = set(picture.tag_v2.get(258, (1,)))
        return depths.pop() if len(depths) == 1 else 0
    return 8


def _check_complete(path, picture, most):
    """Checks the size of the image data, since Pillow fills missing data with zeros. It notices that itself in a JPEG."""
    if picture.format == "JPEG":
        return
    samples = _DISPLAY.get(picture.mode) or (2 if picture.mode.startswith("I;16") else 4)
    if picture.format == "PNG":
        found = _png_bytes(path, most, samples)
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
    planes = samples if picture.tag_v2.get(284, 1) == 2 else 1
    if 279 in picture.tag_v2 and len(counts) != planes * -(-picture.height // max(1, rows)):
        errors.fail(path, "StripByteCounts", f"{len(counts)} strips", f"{picture.height} rows, {rows} a strip")


def _png_bytes(path, most, samples):
    """Inflated size of a PNG's image data, counted until it exceeds that of `most` pixels (PNG 3rd edition, 10.1)."""
    limit, total, inflater = (samples + 1) * most, 0, zlib.decompressobj()
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
