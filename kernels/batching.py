"""Batches split over devices: the leading axes of an operator stay where they are, without a gather."""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def along_batch(function, events, *arrays):
    """`function(*arrays)`, whose arguments and results all lead with the same batch axes, computed shard by shard.

    XLA cannot look into a kernel, so by itself it gathers a sharded batch on every device before the call. Here it is told
    that batch axes are independent. vmap adds one more of them.

    Args:
      function: arrays -> tuple of arrays; must accept any number and size of leading axes.
      events: trailing axes of each array that are no batch axes; all arrays have the same batch axes.
      arrays: the arguments.
    Returns:
      the tuple of results.
    """

    @custom_vmap
    def call(*arrays):
        return _partitioned(function, events, arrays)

    @call.def_vmap
    def _(size, batched, *arrays):
        whole = (a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(arrays, batched))
        results = along_batch(function, events, *whole)
        return results, (True,) * len(results)

    return call(*arrays)


def _partitioned(function, events, arrays):
    batch = arrays[0].ndim - events[0]
    if batch == 0 or jax.device_count() == 1:
        return function(*arrays)
    results = jax.eval_shape(function, *arrays)

    def shardings(mesh, first):
        spec = tuple(first.sharding.spec)[:batch]
        spec += (None,) * (batch - len(spec))
        return tuple(
            tuple(NamedSharding(mesh, PartitionSpec(*spec, *[None] * (a.ndim - batch))) for a in group)
            for group in (results, arrays)
        )

    def partition(mesh, operands, _):
        of_results, of_operands = shardings(mesh, operands[0])
        return mesh, function, of_results, of_operands

    def infer(mesh, operands, _):
        return shardings(mesh, operands[0])[0]

    # Einsum-like: b0, b1, ... are shared by all arrays; every other axis is its own and must be whole.
    own, sides = [], []
    for group in (arrays, results):
        mappings = []
        for a in group:
            names = [f"e{len(own) + i}" for i in range(a.ndim - batch)]
            own += names
            mappings.append(" ".join([*(f"b{i}" for i in range(batch)), *names]))
        sides.append(", ".join(mappings))
    # Under jit of its own, because constants that a function closes over are refused here.
    call = custom_partitioning(jax.jit(function))
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=" -> ".join(sides),
        need_replication_factors=tuple(own),
    )
    return call(*arrays)
