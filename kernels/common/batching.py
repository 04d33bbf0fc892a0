"""Batches split over devices: the leading axes of an operator stay where they are, without a gather."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import backend
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def along_batch(function, events, *arrays, shared=0, summed=False):
    """`function(*arrays)`, whose arguments and results lead with the same batch axes, computed shard by shard.

    XLA cannot look into a kernel, so by itself it gathers a sharded batch on every device before the call. Here it is told
    that batch axes are independent. vmap adds one more of them; where it maps a shared array or a sum, it is a loop.

    Args:
      function: arrays -> tuple of arrays; must accept any number and size of leading axes.
      events: trailing axes of each array that are no batch axes; all arrays but the shared ones have the same batch axes.
      arrays: the arguments.
      shared: so many of the first arrays have no batch axes; every device holds them whole.
      summed: the results have no batch axes either: they are sums over the batch, and are added up over devices.
    Returns:
      the tuple of results.
    """
    again = functools.partial(along_batch, function, events, shared=shared, summed=summed)

    @custom_vmap
    def call(*arrays):
        return _partitioned(function, events, arrays, shared, summed)

    @call.def_vmap
    def _(size, batched, *arrays):
        if summed or any(batched[:shared]):
            mapped = [a for a, b in zip(arrays, batched) if b]

            def one(mapped):
                rest = iter(mapped)
                return again(*(next(rest) if b else a for a, b in zip(arrays, batched)))

            results = jax.lax.map(one, mapped)
        else:
            batches = zip(arrays[shared:], batched[shared:])
            whole = (a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in batches)
            results = again(*arrays[:shared], *whole)
        return results, (True,) * len(results)

    return call(*arrays)


def _partitioned(function, events, arrays, shared, summed):
    batch = arrays[shared].ndim - events[shared]
    # Not only the default devices: the arrays may be split over a host's processors beside one GPU.
    if batch == 0 or all(client.device_count() == 1 for client in backend.backends().values()):
        return function(*arrays)
    results = jax.eval_shape(function, *arrays)
    leading = [0] * shared + [batch] * (len(arrays) - shared), [0 if summed else batch] * len(results)

    def shardings(mesh, operands):
        spec = tuple(operands[shared].sharding.spec)[:batch]
        spec += (None,) * (batch - len(spec))
        of_operands, of_results = (
            tuple(NamedSharding(mesh, PartitionSpec(*spec[:axes])) for axes in group) for group in leading
        )
        return spec, of_operands, of_results

    def partition(mesh, operands, _):
        spec, of_operands, of_results = shardings(mesh, operands)
        split = [name for names in spec if names for name in (names if isinstance(names, tuple) else (names,))]
        whole = jax.jit(lambda *shards: jax.lax.psum(function(*shards), tuple(split)))
        return mesh, whole if summed and split else function, of_results, of_operands

    def infer(mesh, operands, _):
        return shardings(mesh, operands)[2]

    # Einsum-like: b0, b1, ... are the batch axes of all arrays; every other axis is its own and must be whole.
    own, sides = [], []
    for group, counts in zip((arrays, results), leading):
        mappings = []
        for a, axes in zip(group, counts):
            names = [f"e{len(own) + i}" for i in range(a.ndim - axes)]
            own += names
            mappings.append(" ".join([*(f"b{i}" for i in range(axes)), *names]))
        sides.append(", ".join(mappings))
    # Under jit of its own, because constants that a function closes over are refused here.
    call = custom_partitioning(jax.jit(function))
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=" -> ".join(sides),
        need_replication_factors=tuple(own),
        reduction_factors=tuple(f"b{i}" for i in range(batch)) if summed else (),
    )
    return call(*arrays)
