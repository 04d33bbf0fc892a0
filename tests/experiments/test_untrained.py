"""Vertebrae that are extracted from a scan once and kept in the user's cache."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.ct import scans
from experiments.patients import untrained
from experiments.patients.models import load_model
from experiments.patients.workdir import ScanDigests
from kernels.common import private_cache
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.parts import PARTS


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return private_cache.folder(untrained.KEPT)


@pytest.fixture
def read_count(monkeypatch):
    """Counts how often a scan is read."""
    times, read = [], scans.read_scan

    def counted(*args):
        times.append(1)
        return read(*args)

    monkeypatch.setattr(scans, "read_scan", counted)
    return times


def _assert_same(one, other):
    for name in ("density", "mask", "ct_from_box", "points"):
        np.testing.assert_array_equal(getattr(one.vertebra, name), getattr(other.vertebra, name))
    for name in PARTS:
        np.testing.assert_array_equal(getattr(one.parts, name), getattr(other.parts, name))
    np.testing.assert_array_equal(one.fine_cloud.mean, other.fine_cloud.mean)


def _loader(trained, digests):
    return untrained.untrained_loader(load_model(trained[0] / "p2" / "model"), RefineConfig(), None, digests)


def test_a_scan_is_read_once_unless_what_was_kept_is_damaged(trained, first_case, cache, read_count, caplog):
    target = first_case[3]
    first = _loader(trained, ScanDigests())(target)
    _assert_same(_loader(trained, ScanDigests())(target), first)
    assert len(read_count) == 1
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    _assert_same(_loader(trained, ScanDigests())(target), first)
    assert len(read_count) == 2 and "made again" in caplog.text
    _loader(trained, None)(target)
    assert len(read_count) == 3


def test_the_cache_is_bounded_and_holds_what_was_used_last(trained, first_case, cache, read_count, monkeypatch):
    target = first_case[3]
    load = _loader(trained, ScanDigests())
    load(target)
    (path,) = cache.iterdir()
    monkeypatch.setattr(untrained, "KEPT_BYTES", path.stat().st_size // 2)
    load(dataclasses.replace(target, label=target.label + 1))
    assert not path.exists() and len(list(cache.iterdir())) == 1
