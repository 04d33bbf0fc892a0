"""A phantom on disk, its scan, and a case file of it, which the tests of this folder share and do not change."""

import pytest
import tiny

from data_pipelines.ct import scans
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """A coarse phantom on disk, stored PIR: (subject, ct, mask)."""
    return scan_files.phantoms(tmp_path_factory.mktemp("scans"), [30002], tiny.config().phantom)[0]


@pytest.fixture(scope="session")
def scan(stored):
    return scans.read_scan(stored[1], stored[2], stored[0])


@pytest.fixture(scope="session")
def case_path(stored, tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases.json"
    return case_files.simulated_cases(path, [stored], (21,), 1, ((0, 5), (20, 25)), 5, quick.PanelFaults())
