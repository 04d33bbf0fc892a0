"""Digests that name scans and configurations by their content, and the files that such names refer to."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from typing import Protocol
from typing import TypeVar

import numpy as np

from data_pipelines import cases
from data_pipelines.ct import scans
from data_pipelines.io import files

Made = TypeVar("Made")


HASH_FORMAT = "radgs-pairs/2"
"""Part of each `config_hash`: another format of pair sets gets other names."""


def content_hash(config: object, format: str) -> str:
    """Short digest of a configuration and a format's name, the same on every machine.

    Args:
      config: a dataclass or plain values.

    Raises:
      TypeError, ValueError: values that JSON cannot represent, or numbers that are not finite.
    """
    return hashlib.sha256(json.dumps([format, plain_values(config)], sort_keys=True).encode()).hexdigest()[:16]


def plain_values(value: object) -> object:
    """A dataclass or plain values as they are after a round trip through JSON, for comparison with a manifest.

    Raises:
      TypeError, ValueError: as `content_hash`.
    """
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(plain, sort_keys=True, allow_nan=False))


class ScanSource(Protocol):
    """Where a scan lies. It is sent to other processes, so that it is picklable."""

    @property
    def name(self) -> object:
        """What errors name."""

    def digest(self) -> str:
        """Digest of the content; raises InputError for missing files."""

    def read(self) -> scans.Scan:
        """The scan; raises InputError for unreadable files."""


@dataclasses.dataclass(frozen=True)
class FileScan:
    """A scan in files: arguments of `scans.read_scan`."""

    patient: str
    ct: pathlib.Path | str
    mask: pathlib.Path | str
    label_map: str | None = None

    @property
    def name(self) -> pathlib.Path | str:
        """The label map's file."""
        return self.mask

    def digest(self) -> str:
        """`scan_digest` of the files."""
        return scan_digest(self.ct, self.mask, self.label_map)

    def read(self) -> scans.Scan:
        """Reads the files."""
        return scans.read_scan(self.ct, self.mask, self.patient, self.label_map)


class Archive:
    """Finds the files that sets of pairs name by content.

    It caches the most recent result of each factory, since neighbouring examples share it. Only the file names are sent to
    other processes.

    Attributes:
      scans: {digest: its source}.
      scenes: {name: (scene, world_from_ct (4, 4))}.
    """

    def __init__(
        self,
        scans: Mapping[str, ScanSource],
        scenes: Mapping[str, tuple[cases.Scene, np.ndarray]] | None = None,
    ) -> None:
        self.scans, self.scenes, self._kept = scans, scenes, {}

    def __reduce__(self) -> tuple:
        return Archive, (self.scans, self.scenes)

    def keep(self, make: Callable[..., Made], *key: Hashable) -> Made:
        """make(self, *key), or its cached result where the last call had the same key."""
        if self._kept.get(make, (None, None))[0] != key:
            self._kept.pop(make, None)  # before the call, so that only one result is in memory
            self._kept[make] = (key, make(self, *key))
        return self._kept[make][1]


def scan_digest(
    ct_path: pathlib.Path | str,
    mask_path: pathlib.Path | str,
    label_map: str | None = None,
    digest: Callable[[pathlib.Path | str], str] = files.sha256,
) -> str:
    """Digest of a scan's files and of the label map that its mask is read with.

    Args:
      digest: returns the digest of a file; a caller may pass a cache.

    Raises:
      InputError: a missing file.
    """
    return config_hash("scan", [digest(ct_path), digest(mask_path), *([label_map] if label_map else [])])


def scan(archive: Archive, digest: str) -> scans.Scan:
    """Reads the scan of a digest.

    Raises:
      InputError: unreadable files.
    """
    return archive.scans[digest].read()


def config_hash(*configs: object) -> str:
    """Short digest of frozen dataclasses and plain values, for names of caches; raises as `content_hash`."""
    return content_hash([dataclasses.asdict(c) if dataclasses.is_dataclass(c) else c for c in configs], HASH_FORMAT)
