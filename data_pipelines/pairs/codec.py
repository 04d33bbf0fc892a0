"""The bytes of a record: a dict of numeric arrays as one string, whose arrays are read without a copy.

A record is `RGPR`, the header's length as uint32, a JSON header {name: [type, shape]} padded with spaces, then the arrays in the
header's order, little-endian and in C order, each at a multiple of 16 bytes from the record's start.
"""

import json
import math
from collections.abc import Mapping

import numpy as np

ALIGN = 16
"""Bytes; at least the size of any numeric type, so that arrays can be read in place."""
MAGIC = b"RGPR"

Arrays = Mapping[str, np.ndarray | np.generic]
"""An example: numeric arrays and numpy scalars by name."""


class Codec:
    """Turns examples of one kind into records and back.

    Attributes:
      arrays: {name: {"dtype": numpy's name such as "<f2", "shape": [...]}}, sorted by name.
      prefix: the bytes that each record starts with.
      size: bytes of a record.
    """

    def __init__(self, arrays: Mapping[str, dict]) -> None:
        self.arrays = {name: arrays[name] for name in sorted(arrays)}
        header = json.dumps(
            {n: [a["dtype"], a["shape"]] for n, a in self.arrays.items()}, separators=(",", ":")
        ).encode()
        header += b" " * (-(len(header) + 8) % ALIGN)
        self.prefix = MAGIC + len(header).to_bytes(4, "little") + header
        self._fields, position = [], len(self.prefix)
        for name, array in self.arrays.items():
            dtype, shape = np.dtype(array["dtype"]), tuple(array["shape"])
            self._fields.append((name, dtype, shape, position))
            position += dtype.itemsize * math.prod(shape)
            position += -position % ALIGN
        self.size = position

    @classmethod
    def of(cls, example: Arrays) -> "Codec":
        """The codec of an example.

        Raises:
          ValueError: no arrays, or an array that does not hold plain numbers.
        """
        arrays = {}
        for name, value in example.items():
            value = np.asarray(value)
            if value.dtype.kind not in "biuf":
                raise ValueError(f"array '{name}': found type {value.dtype}, wanted booleans, integers or floats")
            arrays[name] = {"dtype": value.dtype.newbyteorder("<").str, "shape": list(value.shape)}
        if not arrays:
            raise ValueError("an example without arrays")
        return cls(arrays)

    @classmethod
    def of_record(cls, record: bytes) -> "Codec":
        """The codec that a record's header describes.

        Raises:
          ValueError: a header that is not JSON.
        """
        length = int.from_bytes(record[len(MAGIC) : len(MAGIC) + 4], "little")
        header = json.loads(record[len(MAGIC) + 4 : len(MAGIC) + 4 + length])
        return cls({name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in header.items()})

    def encode(self, example: Arrays) -> bytes:
        """The record of an example; numpy casts and broadcasts arrays of other types and shapes.

        Raises:
          KeyError, ValueError: an array that is missing, or of a shape that does not broadcast.
        """
        record = bytearray(self.size)
        record[: len(self.prefix)] = self.prefix
        for name, dtype, shape, position in self._fields:
            np.frombuffer(record, dtype, math.prod(shape), position).reshape(shape)[...] = example[name]
        return bytes(record)

    def decode(self, record: bytes) -> dict[str, np.ndarray]:
        """The arrays of a record, as read-only views of its bytes.

        Raises:
          ValueError: a record of another kind.
        """
        if len(record) != self.size or not record.startswith(self.prefix):
            raise ValueError(f"{len(record)} bytes that start with {record[:48]!r}")
        return {
            name: np.frombuffer(record, dtype, math.prod(shape), position).reshape(shape)
            for name, dtype, shape, position in self._fields
        }
