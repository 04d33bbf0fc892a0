"""The house's rules: imports run one way, and importing does no work."""

import pathlib
import subprocess
import sys

import fresh_python

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def test_imports_run_one_way():
    """import-linter holds experiments -> data_pipelines -> radgs_jax -> kernels (contract in pyproject.toml)."""
    command = [str(pathlib.Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_importing_neither_parses_flags_nor_starts_a_device():
    code = (
        "import sys; sys.argv = ['x', '--unknown']\n"
        "import kernels.splat, kernels.voxelize, kernels.drr, radgs_jax.training.update\n"
        "import data_pipelines.pairs.build, experiments.training.loop\n"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    fresh_python.run(code)


def test_registering_starts_without_what_other_input_and_output_need():
    """Each takes a tenth of a second or more of a start; whoever meets the first DICOM, NIfTI or picture pays for it."""
    code = (
        "import sys, experiments.register\n"
        "heavy = {'nibabel', 'pydicom', 'matplotlib', 'optax', 'jax.experimental.pallas'}\n"
        "heavy |= {'scipy.ndimage', 'scipy.spatial', 'scipy.interpolate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    fresh_python.run(code)
