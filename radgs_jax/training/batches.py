"""Batches and examples: all that data pipelines need to know of training."""

import flax.struct
import jax

from radgs_jax import gaussians


@flax.struct.dataclass
class PairBatch:
    """Simulated or real X-ray pairs, B of them.

    rest, excess, vertebra: (B, V, S, S) line integrals of everything but the vertebra, of what the vertebra adds, and of
    the vertebra alone, in a window wider than the network's crop; measured: (B, V, S, S) as a detector gives them, up to a
    scale and an offset; valid: (B, V, S, S) bool, where `measured` counts; intrinsics (B, V, 4); camera_from_world
    (B, V, 4, 4); world_from_box (B, 4, 4) the true pose; simulated: (B,) bool, False where rest and excess are unknown;
    cloud: Gaussians (B, N), box frame.
    """

    rest: jax.Array
    excess: jax.Array
    vertebra: jax.Array
    measured: jax.Array
    valid: jax.Array
    intrinsics: jax.Array
    camera_from_world: jax.Array
    world_from_box: jax.Array
    simulated: jax.Array
    cloud: gaussians.Gaussians


@flax.struct.dataclass
class CtBatch:
    """CT pairs: motions (B, 4, 4), which carry the CT's Gaussians `cloud` (B, N) to where they are to be found; box frame."""

    motion: jax.Array
    cloud: gaussians.Gaussians


@flax.struct.dataclass
class Example:
    """What a network sees (xrays, valid, intrinsics, camera_from_box at the start pose, cloud) and the truth.

    motion: (B, 4, 4) from the start box to the true one: the truth is motion applied to the CT; target: (B, V, H, W) the
    vertebra alone at the true pose.
    """

    xrays: jax.Array
    valid: jax.Array
    intrinsics: jax.Array
    camera_from_box: jax.Array
    cloud: gaussians.Gaussians
    motion: jax.Array
    target: jax.Array
