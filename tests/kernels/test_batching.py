"""A batch that is split over devices stays split through the kernels: no gather, and the values of one device."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from kernels.drr import drr
from kernels.splat import splat
from kernels.voxelize import voxelize

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
rng = np.random.default_rng(0)
density, offset = rng.uniform(0.01, 0.03, (8, 2, 9)), rng.normal(size=(8, 2, 9, 3)) * [9, 6, 5]
precision = np.tile([0.1, 0.01, 0.0, 0.2, 0.02, 0.15], (8, 2, 9, 1))
intrinsics = np.tile([400.0, 380.0, 15.0, 11.0], (8, 2, 1))
image = [np.float32(a) for a in (density, offset + [0, 0, 700], precision, intrinsics)]
volume = [np.float32(a) for a in (density, offset / 3 + [4, 5, 3], precision)]

# Smooth and near the source: the slope of a trilinear volume jumps from cell to cell, and rounding moves samples over.
x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (9, 7, 8)), indexing="ij")
scan = np.float32(0.02 * np.exp(-((x - 0.1) ** 2) - 2 * y**2 - 1.5 * (z + 0.2 * x) ** 2))
turn = np.linalg.qr(rng.normal(size=(8, 3, 3)))[0] / 3
views = np.concatenate([turn, -turn @ [[2], [-1], [50]] + [[4], [3], [4]]], -1), intrinsics[:, 0] / [13, 12, 1, 1]
views = [np.float32(a) for a in views]
whole = NamedSharding(mesh, PartitionSpec())


def energy(*arrays):
    return jnp.sum((splat(*arrays, 21, 30) if len(arrays) == 4 else voxelize(*arrays, (8, 11, 7))) ** 2)


def projected(*arrays):
    return jnp.sum(drr(*arrays, 21, 30) ** 2)


every = (0, 1, 2, 3)
runs = [(jax.grad(projected, (0, 1, 2)), (scan, *views), (whole, split, split))]
for arrays in (image, volume):
    to_all = jax.grad(energy, every[: len(arrays)])
    runs += [(function, arrays, (split,) * len(arrays)) for function in (to_all, jax.vmap(to_all))]
def in_use(function):
    # As in a training step: a TPU has no other way.

    def used(*arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arrays)

    return used


for function, arrays, shardings in runs:
    alone = jax.jit(function)(*arrays)
    for split_function in (function, in_use(function)):
        compiled = jax.jit(split_function, in_shardings=shardings).lower(*arrays).compile()
        assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
        sharded = compiled(*map(jax.device_put, arrays, shardings))
        for one, other in zip(sharded, alone, strict=True):
            assert np.abs(other).max() > 0
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
print("the same")
"""


@pytest.mark.long
@pytest.mark.parametrize("without_ffi", ["0", "1"])
def test_a_split_batch_is_not_gathered(without_ffi):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "RADGS_NO_FFI": without_ffi, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.endswith("the same\n"), run.stderr
