"""Densify and prune with static shapes: what the Gaussian systems of Table 1 share.

It follows adaptive density control (Kerbl et al., "3D Gaussian Splatting", 2023) as the public code of R2-Gaussian and of 3DGR-CAR
changed it: steep Gaussians are cloned where they are small and split where they are large, and faint ones are removed. That code
grows and shrinks its arrays. Here a cloud has a fixed number of slots. A dead slot has density 0, and new Gaussians are put into
dead slots, clones first, then splits, of each the steepest first, as far as there is room; so nothing recompiles. Lengths and
densities are in the unit of the system whose `Rule` is used.
"""

import dataclasses
import math
from collections.abc import Hashable
from collections.abc import Mapping
from typing import Any
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid

if TYPE_CHECKING:
    import optax

SHRINK = 1.6
"""Scale of a split Gaussian relative to its children's: 0.8 times their number, in both codes and in 3D Gaussian splatting."""
NEIGHBOURS = 3
"""Number of nearest points whose distance gives a new cloud its scale: that of all three codes."""
EPS = 1e-15
"""Adam's: that of all three codes. It does not hold back parameters with small gradients."""
FAR = 1e3
"""Coordinates at which dead slots are drawn, in units of a scene: no ray meets them, so that they cost almost nothing."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a system densifies and prunes.

    Attributes:
      threshold: steepness from which a Gaussian is cloned or split.
      clone_scale: largest scale of a Gaussian that is cloned; larger ones are split.
      kept: density of both clones and of both halves of a split, relative to the density before.
      min_density: a Gaussian below it is removed.
      reach: a Gaussian whose mean is farther from the origin along an axis is removed.
    """

    threshold: float
    clone_scale: float
    kept: float
    min_density: float
    reach: float = math.inf


@flax.struct.dataclass
class Refilled:
    """The slots after a round.

    Attributes:
      cloud: Gaussians (C,); alive: (C,) bool.
      changed: (C,) bool, slots with other parameters than before.
      fresh: (C,) bool, slots with a new Gaussian, whose moments are to be forgotten.
    """

    cloud: Gaussians
    alive: Leaf
    changed: Leaf
    fresh: Leaf


def refill(
    rule: Rule, cloud: Gaussians, alive: Bool[Array, " slots"], steepness: Float[Array, " slots"], key: jax.Array
) -> Refilled:
    """One round: clones, then splits, then pruning.

    A clone is an exact copy. A split Gaussian is replaced by two, drawn from it as from a distribution and `SHRINK` times smaller.
    With half of the density kept, clones have the mass of the Gaussian before, and halves 1 / 4.1 of it (`SHRINK` cubed).

    Args:
      cloud: Gaussians (C,), activated.
      steepness: a size of gradients, by the system's own definition.
    """
    slots = alive.shape[0]
    wanted = alive & (steepness >= rule.threshold)
    small = jnp.max(cloud.scale, -1) <= rule.clone_scale
    order = jnp.lexsort((-steepness, ~small, ~wanted))
    room = jnp.minimum(jnp.sum(wanted), slots - jnp.sum(alive))
    granted = jnp.arange(slots) < room
    # The slot of each new Gaussian, in the order of their parents; past the end, where writes are dropped, for none.
    target = jnp.where(granted, jnp.argsort(alive, stable=True), slots)
    chosen = jnp.zeros(slots, bool).at[order].set(granted)
    split = chosen & ~small

    turn = rigid.matrix_from_quaternion(cloud.quaternion)
    drawn = jax.random.normal(key, (2, slots, 3)) * cloud.scale
    shift = jnp.where(split[:, None], rigid.apply_rotation(turn, drawn), 0.0)
    lighter = dataclasses.replace(
        cloud,
        density=jnp.where(chosen, rule.kept * cloud.density, cloud.density),
        scale=jnp.where(split[:, None], cloud.scale / SHRINK, cloud.scale),
    )
    first, second = (dataclasses.replace(lighter, mean=cloud.mean + each) for each in shift)
    cloud = jax.tree.map(lambda a, b: a.at[target].set(b[order], mode="drop"), first, second)
    new = jnp.zeros(slots, bool).at[target].set(True, mode="drop")
    inside = jnp.all(jnp.abs(cloud.mean) <= rule.reach, -1)
    left = (jnp.asarray(alive) | new) & (cloud.density >= rule.min_density) & inside
    return Refilled(cloud, left, chosen | new, split | new)


def choose(where: Bool[Array, " slots"], new: Any, old: Any) -> Any:
    """Trees of arrays (C, ...), the one's where `where`, else the other's."""
    return jax.tree.map(lambda a, b: jnp.where(where.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


def in_slots(cloud: Gaussians, slots: int) -> tuple[Gaussians, Bool[jax.Array, " {slots}"]]:
    """A cloud of at most `slots` Gaussians in as many slots, and which are alive.

    Raises:
      ValueError: more Gaussians than slots.
    """
    count = cloud.density.shape[0]
    if count > slots:
        raise ValueError(f"in_slots: found {count} Gaussians, wanted {slots} or fewer")
    # On the host, where another number of Gaussians is no other program. A dead slot's parameters count for nothing; these stay
    # finite however a system activates them.
    empty = Gaussians(*(jnp.asarray(value) for value in (0.5, [0.0] * 3, [0.5] * 3, [1.0, 0.0, 0.0, 0.0])))

    def filled(empty, given):
        rest = np.broadcast_to(empty, (slots - count, *given.shape[1:]))
        return jnp.asarray(np.concatenate([given, rest]), jnp.float32)

    return jax.tree.map(filled, empty, cloud), jnp.asarray(np.arange(slots) < count)


def only_alive(cloud: Gaussians, alive: Bool[Array, " slots"]) -> Gaussians:
    """The cloud with dead slots at density 0 and far away, and without gradients to them."""
    return dataclasses.replace(
        cloud,
        density=jnp.where(alive, cloud.density, 0.0),
        mean=jnp.where(alive[:, None], cloud.mean, FAR),
    )


def neighbour_distance(points: Float[Array, "n 3"]) -> Float[np.ndarray, " n"]:
    """Root mean square distance of each point to its `NEIGHBOURS` nearest others; infinite where there are fewer."""
    found, _ = scipy.spatial.cKDTree(points).query(points, NEIGHBOURS + 1)
    return np.sqrt(np.mean(found[:, 1:] ** 2, -1)).astype(np.float32)


def adam(rates: Mapping[str, tuple[float, float]], steps: int) -> "optax.GradientTransformation":
    """Adam of a tree whose leaves are named as in `rates`, each with a rate that falls exponentially from the one to the other."""
    import optax

    def names(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, tree)

    falls = {name: optax.exponential_decay(first, steps, last / first) for name, (first, last) in rates.items()}
    scaled: dict[Hashable, Any] = {name: optax.scale_by_learning_rate(fall) for name, fall in falls.items()}
    return optax.chain(optax.scale_by_adam(eps=EPS), optax.multi_transform(scaled, names))


def forget(opt_state: Any, fresh: Bool[Array, " slots"]) -> Any:
    """The state of `box.with_body` with Adam's moments of the box's `fresh` slots set to 0."""
    import optax

    def clear(state):
        if not isinstance(state, optax.ScaleByAdamState):
            return state

        def zero(moments):
            cleared = choose(fresh, jax.tree.map(jnp.zeros_like, moments["box"]), moments["box"])
            return {**moments, "box": cleared}

        return state._replace(mu=zero(state.mu), nu=zero(state.nu))

    return jax.tree.map(clear, opt_state, is_leaf=lambda state: isinstance(state, optax.ScaleByAdamState))
