"""Checksums of what is written and read back: a damaged file is one clear line, never other numbers.

A folder is sealed by `checksums.json`: the SHA-256 of each of its files by their path, and that of this list itself. A JSON
document is sealed by a field `sha256` of its own. Both are against accidents: someone who means to can compute them anew.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.io import files
from radgs_jax import errors

FORMAT = "radgs-checksums/1"
NAME = "checksums.json"
FIELD = "sha256"
SHOWN = 12
"""Characters of a digest in an error message; not sensitive: it tells two files apart for people."""


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON document with the digest of its other fields in the field FIELD."""
    return {**document, FIELD: _digest(document)}


def _digest(document):
    rest = {key: value for key, value in document.items() if key != FIELD}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_sealed(path: pathlib.Path | str, document: Mapping[str, Any], remedy: str) -> None:
    """Checks a document that `sealed` made.

    Args:
      path: its file, for the message; remedy: what helps.
    Raises:
      InputError: another content than was written.
    """
    found = document.get(FIELD)
    if not isinstance(found, str):
        errors.fail(path, FIELD, "nothing", f"the checksum of its content: {remedy}")
    if found != (made := _digest(document)):
        errors.fail(path, FIELD, f"{made[:SHOWN]} of the content", f"{found[:SHOWN]}, as it was written: {remedy}")


def digests(folder: pathlib.Path | str, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files by their path in a folder, without those that are not there.

    Raises:
      InputError: an unreadable file.
    """
    folder = pathlib.Path(folder)
    return {name: files.sha256(folder / name) for name in sorted(names) if (folder / name).exists()}


def check(folder: pathlib.Path | str, wanted: Mapping[str, str], names: Iterable[str], remedy: str) -> None:
    """Checks files against `digests`.

    Args:
      folder: of the files; wanted: digests by path in it; names: paths to check, which are there or not, as `wanted` says.
      remedy: what helps.
    Raises:
      InputError: a file that is missing, was changed, or has no digest.
    """
    folder = pathlib.Path(folder)
    for name in names:
        path, there = folder / name, os.path.lexists(folder / name)
        if name not in wanted:
            if there:
                errors.fail(path, FIELD, "none for it", f"a file that was written with its checksum: {remedy}")
        elif not there:
            errors.fail(path, "file", "nothing", f"the file that was written here: {remedy}")
        elif (found := files.sha256(path)) != wanted[name]:
            line = f"{found[:SHOWN]}: a damaged or edited file"
            errors.fail(path, FIELD, line, f"{str(wanted[name])[:SHOWN]}, as it was written: {remedy}")


def seal(folder: pathlib.Path | str) -> None:
    """Writes `checksums.json` for all files of a folder, except hidden ones in it.

    Raises:
      InputError: it cannot be written.
    """
    folder = pathlib.Path(folder)
    paths = (path.relative_to(folder).as_posix() for path in files.listed(folder))
    _write(folder, digests(folder, (name for name in paths if name != NAME and not name.startswith("."))))


def _write(folder, found):
    files.write_json(folder / NAME, sealed({"format": FORMAT, "files": found}))


def renew(path: pathlib.Path | str) -> None:
    """Renews the checksum of one file that was just written, where its folder is sealed.

    Raises:
      InputError: a damaged `checksums.json`, or it cannot be written.
    """
    path = pathlib.Path(path)
    if (path.parent / NAME).exists():
        found = read(path.parent, "seal the folder again")
        _write(path.parent, {**found, **digests(path.parent, [path.name])})


def read(folder: pathlib.Path | str, remedy: str) -> dict[str, str]:
    """The digests in a folder's `checksums.json`.

    Raises:
      InputError: no such file, or a damaged one.
    """
    path = pathlib.Path(folder) / NAME
    if not path.exists():
        errors.fail(path, "file", "nothing", f"the checksums that are written with the folder: {remedy}")
    document = files.read_json(path)
    if (
        not isinstance(document, dict)
        or document.get("format") != FORMAT
        or not isinstance(document.get("files"), dict)
    ):
        errors.fail(path, "format", "another content", f"{FORMAT!r} with 'files': {remedy}")
    check_sealed(path, document, remedy)
    return document["files"]


def verify(folder: pathlib.Path | str, remedy: str, below: tuple[str, ...] = ("",)) -> dict[str, str]:
    """Checks the files of a sealed folder.

    Args:
      folder: that `seal` was called for; remedy: what helps; below: beginnings of the paths to check, all by default.
    Returns:
      the folder's digests.
    Raises:
      InputError: no or damaged checksums, or a file that is missing or was changed.
    """
    wanted = read(folder, remedy)
    check(folder, wanted, [name for name in wanted if name.startswith(below)], remedy)
    return wanted


def check_file(path: pathlib.Path | str, remedy: str) -> None:
    """Checks one file of a sealed folder; a file in a folder without checksums is taken as it is.

    Raises:
      InputError: damaged checksums, or a file that was changed or has none.
    """
    path = pathlib.Path(path)
    if (path.parent / NAME).exists():
        check(path.parent, read(path.parent, remedy), [path.name], remedy)


def of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """A digest of the names, shapes, types and values of arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()
