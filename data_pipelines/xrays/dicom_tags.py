"""Reads single data elements of a DICOM header."""

import collections.abc
import pathlib
import typing

import numpy as np

from radgs_jax import errors

if typing.TYPE_CHECKING:
    import pydicom

_PLACEHOLDERS = (0.0, -1.0)
"""Numbers that machines write where they do not know a distance, a spacing or an aspect."""


def read(
    path: pathlib.Path | str,
    header: "pydicom.Dataset",
    keyword: str,
    count: int | None = None,
    kind: collections.abc.Callable[[typing.Any], typing.Any] = float,
) -> tuple | None:
    """Numbers or words of a data element as a tuple, or None if it is absent or empty.

    Args:
      path: the file, named in errors.
      header: the data set.
      keyword: the element.
      count: how many there must be; any number if None.
      kind: converts each of them.

    Raises:
      InputError: a value cannot be converted, is not finite, or the count is another.
    """
    try:
        value = header.get(keyword)
        if value is None or value == "" or (hasattr(value, "__len__") and len(value) == 0):
            return None
        many = value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
        numbers = tuple(kind(v) for v in many)
    except Exception as error:  # pydicom converts on access, with various exceptions
        errors.fail(path, keyword, f"{type(error).__name__}: {error}"[:120], f"a readable {kind.__name__}")
    if kind is float and not np.isfinite(numbers).all() or count is not None and len(numbers) != count:
        errors.fail(path, keyword, numbers[:8], f"{count or 'finite'} number(s)")
    return numbers


def word(path: pathlib.Path | str, header: "pydicom.Dataset", keyword: str, default: str | None = None) -> str | None:
    """The first word of a data element; `default` if it is absent or empty.

    Raises:
      InputError: as `read`.
    """
    words = read(path, header, keyword, kind=str)
    return words[0] if words else default


def whole(
    path: pathlib.Path | str, header: "pydicom.Dataset", keyword: str, low: int, high: int, default: int | None = None
) -> int:
    """A whole number from `low` to `high` in a data element; `default` if it is absent, unless that is None.

    Raises:
      InputError: there is none, or another number.
    """
    value = read(path, header, keyword, 1)
    if value is None and default is not None:
        return default
    if value is None or value[0] != int(value[0]) or not low <= value[0] <= high:
        errors.fail(path, keyword, "nothing" if value is None else value[0], f"a whole number from {low} to {high}")
    return int(value[0])


def measures(
    path: pathlib.Path | str, header: "pydicom.Dataset", keyword: str, count: int, low: float, high: float, wanted: str
) -> tuple[float, ...] | None:
    """Positive numbers between `low` and `high` in a data element, or None if it is absent or holds placeholders alone.

    Raises:
      InputError: other numbers; `wanted` says which there should be.
    """
    values = read(path, header, keyword)
    if values is None or all(value in _PLACEHOLDERS for value in values):
        return None
    if len(values) != count or not all(low < value < high for value in values):
        errors.fail(path, keyword, values[:8] if len(values) != 1 else values[0], wanted)
    return values
