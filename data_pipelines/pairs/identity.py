"""Names of scans and configurations by content, and where the files lie that such names stand for."""

import dataclasses
import hashlib
import json

from data_pipelines.ct import scans
from data_pipelines.io import files


def content_hash(config, format):
    """Short digest of a configuration, a dataclass or plain values, the same on every machine; another one in another `format`.

    Raises:
      TypeError, ValueError: values that JSON has no form for, or numbers that are not finite.
    """
    return hashlib.sha256(json.dumps([format, plain_values(config)], sort_keys=True).encode()).hexdigest()[:16]


def plain_values(value):
    """A dataclass or plain values as what JSON gives back of them, so that what is compared is what a manifest holds.

    Raises:
      TypeError, ValueError: as `content_hash`.
    """
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(plain, sort_keys=True, allow_nan=False))


FORMAT = "radgs-pairs/2"


class Archive:
    """Where the files lie that sets of pairs name by content.

    What neighbouring examples share stays: of each thing made from scans, the last one. Other processes are sent the file
    names only.
    """

    def __init__(self, scans, scenes=None):
        """scans: {digest: (patient, ct path, mask path, label map or None)}; scenes: {name: (`cases.Scene`, world_from_ct)}."""
        self.scans, self.scenes, self._kept = scans, scenes, {}

    def __reduce__(self):
        return Archive, (self.scans, self.scenes)

    def keep(self, make, *key):
        """make(self, *key), or what the last call with the same arguments gave."""
        if self._kept.get(make, (None, None))[0] != key:
            self._kept.pop(make, None)  # first, or two scans would be in memory
            self._kept[make] = (key, make(self, *key))
        return self._kept[make][1]


def scan_digest(ct_path, mask_path, label_map=None, digest=files.sha256):
    """What a scan is called wherever its files lie; read with another `label_map` it is another one. `digest` gives a file's.

    Raises:
      InputError: a missing file.
    """
    return config_hash("scan", [digest(ct_path), digest(mask_path), *([label_map] if label_map else [])])


def scan(archive, digest):
    """The `scans.Scan` of that digest in an `Archive`.

    Raises:
      InputError: unreadable files.
    """
    patient, ct, mask, label_map = archive.scans[digest]
    return scans.read_scan(ct, mask, patient, label_map)


def config_hash(*configs):
    """Short digest of frozen dataclasses and plain values, for cache keys and reuse checks; raises as `identity.content_hash`."""
    return content_hash([dataclasses.asdict(c) if dataclasses.is_dataclass(c) else c for c in configs], FORMAT)
