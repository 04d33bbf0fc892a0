"""The public face of `kernels`."""

import fresh_python
import pytest


@pytest.mark.parametrize(
    "script",
    [
        "import sys, kernels; assert 'jax' not in sys.modules",
        "from kernels.drr import drr, drr_and_motion\n"
        "from kernels.splat import splat\n"
        "from kernels.voxelize import voxelize\n"
        "assert all(map(callable, (drr, drr_and_motion, splat, voxelize)))",
        "import kernels.splat.xla as x, kernels.voxelize.oracle as o, kernels.drr as d; assert x.forward and o.voxelize and d.drr",
        "from kernels.splat import splat; import kernels.splat.xla as x; import kernels; assert kernels.splat.splat is splat",
        "from kernels import drr; from kernels.drr import xla; assert drr.xla is xla and callable(drr.drr)",
    ],
    ids=["no jax", "operators", "modules", "both", "subpackages"],
)
def test_operators_and_modules_are_imported_by_their_places(script):
    fresh_python.run(script)
