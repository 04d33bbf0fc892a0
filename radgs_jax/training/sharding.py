"""The device mesh that training runs on, and what lies where on it.

Axes: 'data' and 'fsdp' together split a batch by examples; 'fsdp' also splits parameters and the optimiser's moments of them.
"""

import math
import re
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp")
RULES = ((re.compile(r"(^|/)kernel$"), (-1, -2)),)
"""Of a parameter's path: the axes of the array that may be split over 'fsdp', of which the first that it divides is. What no rule
names stays whole on every device: biases and scales of normalisations, a thousandth of the numbers."""

_Tree = TypeVar("_Tree")


def make_mesh(devices: Sequence[Any] | None = None, shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh over jax devices, all of them by default; one device is a mesh of one.

    Args:
      shape: sizes of `AXES`; 'data' takes the devices that the others leave.
    Raises:
      ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    chosen = np.asarray(jax.devices() if devices is None else devices)
    sizes = axis_sizes(chosen.size, shape or {})
    return Mesh(chosen.reshape(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def axis_sizes(devices: int, shape: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes of `AXES` for a number of devices; arguments and errors as of `make_mesh`."""
    sizes = {"fsdp": 1, **shape}
    sizes.setdefault("data", devices // sizes["fsdp"])
    if set(sizes) != set(AXES) or math.prod(sizes.values()) != devices or min(sizes.values()) < 1:
        raise ValueError(f"mesh: found {dict(sizes)} for {devices} device(s), wanted sizes of {', '.join(AXES)}")
    return tuple(sizes[axis] for axis in AXES)


def of_batch(mesh: Mesh) -> NamedSharding:
    """Where examples lie: the first axis of every array of a batch is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_state(state: Any, mesh: Mesh) -> Any:
    """Where each array of a training state lies, by `RULES`; a tree of `NamedSharding`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _of_leaf(path, np.shape(leaf), mesh), state)


def _of_leaf(path, shape, mesh):
    parts, name = mesh.shape["fsdp"], jax.tree_util.keystr(path, simple=True, separator="/")
    axes = next((axes for pattern, axes in RULES if pattern.search(name)), ()) if parts > 1 else ()
    for axis in axes:
        if len(shape) >= -axis and shape[axis] % parts == 0:
            # Without axes after it, as jax writes it: another spelling would compile the step twice.
            return NamedSharding(mesh, PartitionSpec(*[None] * (axis % len(shape)), "fsdp"))
    return whole(mesh)


def made(mesh: Mesh, make: Callable[..., _Tree], *given: Any) -> _Tree:
    """The state that `make(*given)` returns, made where `of_state` wants each array, so that no device ever holds all of it.

    Args:
      given: pytrees of arrays, the same in all of jax's processes. They are copied, so that the state may be donated.
    """
    values = jax.device_get(given)
    copied = lambda *values: make(*jax.tree.map(jnp.copy, values))
    return jax.jit(copied, out_shardings=of_state(jax.eval_shape(make, *values), mesh))(*values)


def gathered(tree: _Tree, mesh: Mesh) -> _Tree:
    """All of a tree's arrays on the host, wherever their parts lie. All of jax's processes must call this."""
    return jax.device_get(jax.jit(lambda tree: tree, out_shardings=whole(mesh))(tree))
