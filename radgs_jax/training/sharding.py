"""The device mesh that training runs on: one axis, 'data', over which batches are split."""

from collections.abc import Sequence
from typing import Any
from typing import TypeVar

import jax
import numpy as np

_Tree = TypeVar("_Tree")


def make_mesh(devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh over jax devices (all of them by default); one device is a mesh of one."""
    devices = jax.devices() if devices is None else devices
    return jax.sharding.Mesh(np.asarray(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def replicate(tree: _Tree, mesh: jax.sharding.Mesh) -> _Tree:
    """`tree` with a copy of every array on each device of the mesh."""
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
