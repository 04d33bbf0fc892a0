"""Compressed streams are checked before a decoder sees them: whole, of the right size, with any padding."""

import ct_files
import numpy as np
import pytest

from data_pipelines.io import codestream
from radgs_jax import errors

SHAPE = (40, 56)


def streams():
    image = np.arange(SHAPE[0] * SHAPE[1], dtype=np.uint16).reshape(SHAPE)
    return [ct_files.jpeg_2000(image), ct_files.jpeg_lossless(image)]


@pytest.mark.parametrize("padding", [b"", b"\0", b"\xff", b"\xff\xff\xff", b"\0\xff\0\0", 40 * b"\xff"])
def test_a_whole_stream_may_be_padded(padding):
    for stream in streams():
        codestream.check("f", stream + padding, SHAPE)
        assert codestream.without_padding(stream + padding) == stream


def test_a_cut_stream_is_refused_with_any_padding():
    for stream in streams():
        for cut in (stream[:-1], stream[:-2], stream[: len(stream) // 2], stream[:30]):
            for padding in (b"", b"\0\0", b"\xff\xff", b"\xff\0"):
                with pytest.raises(errors.InputError, match="f: PixelData: found a compressed image that is cut"):
                    codestream.check("f", cut + padding, SHAPE)


def test_a_stream_of_another_size_is_refused():
    for stream in streams():
        with pytest.raises(errors.InputError, match=r"found a compressed image of \(40, 56\), wanted \(56, 40\)"):
            codestream.check("f", stream, SHAPE[::-1])
