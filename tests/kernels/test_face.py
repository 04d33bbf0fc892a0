"""The public face of `kernels`."""

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CHECK = "assert all(callable(getattr(kernels, name)) for name in kernels.__all__), vars(kernels)"


@pytest.mark.parametrize(
    "script",
    [
        "import sys, kernels; assert 'jax' not in sys.modules",
        f"import kernels; {CHECK}",
        f"import kernels.splat, kernels.voxelize.api, kernels.drr; {CHECK}",
        f"from kernels.splat import oracle; import kernels; {CHECK}; from kernels.splat import xla",
        f"from kernels import drr, drr_and_motion, splat, voxelize; import kernels; assert kernels.drr is drr; {CHECK}",
    ],
    ids=["no jax", "attributes", "after subpackages", "modules", "names"],
)
def test_the_names_are_the_operators_whatever_was_imported(script):
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
