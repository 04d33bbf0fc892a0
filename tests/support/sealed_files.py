"""Digests of what is read from sealed folders, to the last bit, for tests that damage them."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.localizers import localizer_files
from experiments.patients import models
from experiments.patients import workdir as workdirs


def fingerprint(*values: Any) -> str:
    """Digest of everything in pytrees, to the last bit."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(values):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """A dataclass as nested dicts, for `fingerprint`."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def read_workdir(target: workdirs.Target) -> Callable[[pathlib.Path], tuple[str, str]]:
    """A function from a prepared workdir to digests of all that registering reads of a target there."""
    digests = workdirs.ScanDigests()

    def read(folder):
        found = workdirs.load(folder, target, digests)
        rest = {f.name: plain(getattr(found, f.name)) for f in dataclasses.fields(found) if f.name != "model"}
        return models.model_hash(found.model), fingerprint(rest)

    return read


def read_localizer(path: pathlib.Path) -> str:
    """Digest of a localizer."""
    localizer = localizer_files.read_localizer(path)
    return fingerprint(localizer.params, plain(localizer.config), plain(localizer.chain), localizer.centres_ct)


def read_base(folder: pathlib.Path) -> tuple[str, str]:
    """Digests of a base: its model, and its localizer and rule."""
    rule = plain(workdirs.read_rule(folder / workdirs.CALIBRATION))
    rest = read_localizer(folder / "detector.npz"), fingerprint(rule)
    return models.model_hash(models.load_model(folder)), "".join(rest)
