"""Files that the user names on the page: those of the folder where the server was started, and those that are uploaded.

Nothing else is ever opened: a path is resolved, links included, and must lie in its folder.
"""

import os
import pathlib
import secrets
from collections.abc import AsyncIterable

from data_pipelines.io import files
from radgs_jax import errors

MAX_UPLOAD_BYTES = 4 * 2**30
"""Most bytes of one upload, all of its files together. A CT of 512 x 512 x 2000 voxels has 1 GB; half of the limit refuses large
uncompressed ones as floats, twice fills a laptop's disk in a few mistakes."""
MAX_UPLOAD_FILES = 5000
"""Most files of one upload, such as the slices of a DICOM series. Half refuses long thin-slice series, twice is no series."""
MAX_NAME_CHARACTERS = 200
"""Longest name of an uploaded file; file systems take 255 bytes."""
LISTED = 2000
"""Most entries of a folder that are shown, so that a page stays usable."""
SEPARATORS = "/\\:\0"


class StartFolder:
    """The folder whose files may be picked."""

    def __init__(self, root: pathlib.Path | str) -> None:
        self.root = pathlib.Path(root).resolve()

    def inside(self, relative: str) -> pathlib.Path:
        """The file or folder at a path relative to the folder.

        Raises:
          InputError: nothing is there, or it lies outside, perhaps by a link.
        """
        wanted = f"a file or folder in {self.root}"
        if "\0" in relative:
            errors.fail("files", "path", repr(relative), wanted)
        try:
            path = (self.root / relative).resolve(strict=True)
        except (OSError, RuntimeError):  # a RuntimeError where links lead in a circle
            errors.fail("files", "path", f"nothing at {relative!r}", wanted)
        if not path.is_relative_to(self.root):
            errors.fail("files", "path", f"{relative!r}, which is outside", wanted)
        return path

    def listed(self, relative: str) -> dict:
        """What a folder holds, as plain values: folders first, no hidden ones, nothing that leads outside.

        Raises:
          InputError: as `inside`, or it is no folder.
        """
        folder, entries = self.inside(relative), []
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            errors.fail("files", "folder", f"{relative!r}: {error.strerror}", "a folder that can be read")
        here = folder.relative_to(self.root)
        for name in names:
            path = folder / name
            if not name.startswith(".") and path.exists() and path.resolve().is_relative_to(self.root):
                entries.append({"name": name, "path": (here / name).as_posix(), "folder": path.is_dir()})
        entries.sort(key=lambda entry: not entry["folder"])
        return {
            "folder": here.as_posix(),
            "parent": None if folder == self.root else here.parent.as_posix(),
            "entries": entries[:LISTED],
            "left_out": max(0, len(entries) - LISTED),
        }


class Uploads:
    """Uploaded files, each upload in a folder of its own."""

    def __init__(self, folder: pathlib.Path | str, most_bytes: int = MAX_UPLOAD_BYTES) -> None:
        self._folder, self._most = pathlib.Path(folder), most_bytes
        self._sizes: dict[str, dict[str, int]] = {}

    def new(self) -> str:
        """The id of a new upload, without files."""
        upload = secrets.token_hex(8)
        files.make_folder(self._folder / upload)
        self._sizes[upload] = {}
        return upload

    async def add(self, upload: str, name: str, parts: AsyncIterable[bytes]) -> None:
        """Adds a file to an upload, from its bytes.

        Raises:
          InputError: an unknown upload, an unsafe name, one that is there already, or too much; nothing of the file is kept then.
        """
        sizes = self._of(upload)
        _check_name(name)
        if name in sizes:
            errors.fail("upload", name, "a second file of this name", "each name once")
        if len(sizes) >= MAX_UPLOAD_FILES:
            errors.fail("upload", name, f"more than {MAX_UPLOAD_FILES} files", "the files of one series")
        sizes[name], before = 0, sum(sizes.values())
        try:
            with files.replacing(self._folder / upload / name) as temporary, open(temporary, "wb") as stream:
                async for part in parts:
                    sizes[name] += len(part)
                    if before + sizes[name] > self._most:
                        errors.fail("upload", name, f"more than {self._most} bytes", "a smaller file")
                    stream.write(part)
        except BaseException:
            del sizes[name]
            raise

    def path(self, upload: str) -> pathlib.Path:
        """The file of an upload, or its folder where there are several.

        Raises:
          InputError: an unknown upload, or one without files.
        """
        names = list(self._of(upload))
        if not names:
            errors.fail("upload", "files", "nothing", "a file")
        return self._folder / upload / names[0] if len(names) == 1 else self._folder / upload

    def _of(self, upload):
        if upload not in self._sizes:
            errors.fail("upload", "id", repr(upload), "an upload of this page")
        return self._sizes[upload]


def _check_name(name):
    safe = name.isprintable() and not name.startswith(".") and not any(c in SEPARATORS for c in name)
    if not safe or not 0 < len(name.encode()) <= MAX_NAME_CHARACTERS:
        errors.fail("upload", "name", repr(name), "a plain file name, without folders")
