"""Batches split over devices: an operator's leading axes stay where they are, without a gather."""

import functools
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend import backend
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from kernels.common.types import Array


def along_batch(
    function: Callable[..., tuple[Array, ...]],
    events: Sequence[int],
    *arrays: Array,
    shared: int = 0,
    summed: bool = False,
) -> tuple[Array, ...]:
    """Computes `function(*arrays)` shard by shard; arguments and results have the same leading batch axes.

    XLA cannot see inside a kernel, so it would gather a sharded batch on every device before the call; declaring the batch axes
    independent prevents that. Where a mesh is in use (`jax.set_mesh`), the first of them is split over all of it. vmap adds one
    more batch axis; where it maps a shared array or a sum, it becomes a loop.

    Args:
      function: arrays -> tuple of arrays; must accept any number and size of leading axes.
      events: number of trailing axes of each array that are not batch axes.
      arrays: the arguments.
      shared: number of leading arguments without batch axes; every device holds them whole.
      summed: the results have no batch axes: they are sums over the batch, added up over devices.
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


def _over_mesh(function, mesh, arrays, shared, summed):
    """`function` with the first batch axis split over all of a mesh that is in use, which TPUs need: they know no
    `custom_partitioning`. Inside a `jax.shard_map` it is split already."""
    splits = all(kind == AxisType.Auto for kind in mesh.axis_types) and len(arrays[shared]) % mesh.size == 0
    if not splits or mesh.size == 1:
        return function(*arrays)
    first = PartitionSpec(mesh.axis_names)

    def on_each(*shards):
        results = function(*shards)
        return jax.lax.psum(results, mesh.axis_names) if summed else results

    taken = (PartitionSpec(),) * shared + (first,) * (len(arrays) - shared)
    given = PartitionSpec() if summed else first
    return jax.shard_map(on_each, in_specs=taken, out_specs=given, check_vma=False)(*arrays)


def _partitioned(function, events, arrays, shared, summed):
    batch = arrays[shared].ndim - events[shared]
    mesh = jax.sharding.get_abstract_mesh()
    if batch and not mesh.empty:
        return _over_mesh(function, mesh, arrays, shared, summed)
    # All kinds of devices count: the arrays may be split over a host's processors although the default device is one GPU.
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

    # An einsum-like rule: b0, b1, ... are the batch axes of all arrays; every other axis has a name of its own and stays whole.
    own, sides = [], []
    for group, counts in zip((arrays, results), leading):
        mappings = []
        for a, axes in zip(group, counts):
            names = [f"e{len(own) + i}" for i in range(a.ndim - axes)]
            own += names
            mappings.append(" ".join([*(f"b{i}" for i in range(axes)), *names]))
        sides.append(", ".join(mappings))
    # In a jit of its own, because custom_partitioning refuses functions that close over constants.
    call = custom_partitioning(jax.jit(function))
    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=" -> ".join(sides),
        need_replication_factors=tuple(own),
        reduction_factors=tuple(f"b{i}" for i in range(batch)) if summed else (),
    )
    return call(*arrays)
