"""The device mesh that training runs on: one axis, 'data', over which batches are split."""

import jax
import numpy as np


def make_mesh(devices=None):
    """A mesh over `devices` (all of them by default); one device is a mesh of one."""
    devices = jax.devices() if devices is None else devices
    return jax.sharding.Mesh(np.asarray(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def replicate(tree, mesh):
    """`tree` with every array whole on every device of the mesh."""
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
