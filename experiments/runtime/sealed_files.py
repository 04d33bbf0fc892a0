"""Files of a cache that hold their own SHA-256, since a damaged one could pass for another; such a file is made again."""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from data_pipelines.io import files
from radgs_jax import errors

MARK = b"radgs-kept/1\n"
"""First bytes of a file; the 32 bytes of the SHA-256 of its name and data follow, and the data."""
SHOWN_CHARACTERS = 160
"""Maximum length of an error's text in a warning, so that it stays one line."""

_Value = TypeVar("_Value")


def from_file(path: pathlib.Path, read: Callable[[bytes], _Value], make: Callable[[], bytes]) -> _Value:
    """read(what `make` returned); where the file is missing or damaged, or `read` fails, it is made and written first."""
    try:
        return read(unpacked(path.name, path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # the type depends on where the file is damaged
        say_made_again(path, error)
    data = make()
    try:
        with files.replacing(path) as temporary:
            temporary.write_bytes(packed(path.name, data))
    except errors.InputError as error:
        logging.warning("%s; not kept, so the next start is as slow", error)
    return read(data)


def packed(name: str, data: bytes) -> bytes:
    """The content of a file of that name: its digest covers the name, so that no file can take another's place."""
    return MARK + hashlib.sha256(name.encode() + b"\n" + data).digest() + data


def unpacked(name: str, content: bytes) -> bytes:
    """The data of a file. Raises ValueError where it is not as it was written."""
    data = content[len(MARK) + hashlib.sha256().digest_size :]
    if content != packed(name, data):
        raise ValueError("not as it was written")
    return data


def say_made_again(path: pathlib.Path, error: Exception) -> None:
    """Logs that a damaged file is made again."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    logging.warning("%s: made again: %s", path, text[:SHOWN_CHARACTERS])


@functools.cache
def sources(packages: tuple[str, ...]) -> str:
    """Digest of all Python files of these packages, which names what their code makes."""
    digest, root = hashlib.sha256(), pathlib.Path(__file__).resolve().parents[2]
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
