"""Batches and examples: all that data pipelines need to know of training."""

import flax.struct

from kernels.common.types import Leaf
from radgs_jax import gaussians


@flax.struct.dataclass
class PairBatch:
    """B pairs, simulated or real, in windows wider than the network's crop. Line integrals may be float16, as they are stored: a
    device turns them into float32 faster than the host does.

    Attributes:
      rest: (B, V, S, S) line integrals of everything but the vertebra.
      excess: (B, V, S, S) line integrals of what the vertebra adds.
      vertebra: (B, V, S, S) line integrals of the vertebra alone.
      measured: (B, V, S, S) the X-ray as the panel measures it, in line integrals up to a scale and an offset.
      valid: (B, V, S, S) bool, the pixels of `measured` that count.
      intrinsics: (B, V, 4) of the windows.
      camera_from_world: (B, V, 4, 4), mm.
      world_from_box: (B, 4, 4) the true pose, mm.
      simulated: (B,) bool, False where rest and excess are unknown.
      cloud: Gaussians (B, N) of the CT's vertebra, box frame.
    """

    rest: Leaf
    excess: Leaf
    vertebra: Leaf
    measured: Leaf
    valid: Leaf
    intrinsics: Leaf
    camera_from_world: Leaf
    world_from_box: Leaf
    simulated: Leaf
    cloud: gaussians.Gaussians


@flax.struct.dataclass
class CtBatch:
    """B pairs of a CT's vertebra and the same moved.

    Attributes:
      motion: (B, 4, 4) that moves `cloud` to its true place, box frame.
      cloud: Gaussians (B, N), box frame.
    """

    motion: Leaf
    cloud: gaussians.Gaussians


@flax.struct.dataclass
class Example:
    """What a network sees at a start pose, and the truth.

    Attributes:
      xrays: (B, V, H, W) line integrals in crops at the start pose.
      valid: (B, V, H, W) bool, the pixels that count.
      intrinsics: (B, V, 4) of the crops.
      camera_from_box: (B, V, 4, 4) at the start pose, mm.
      cloud: Gaussians (B, N) of the CT's vertebra, box frame.
      motion: (B, 4, 4) from the start box to the true one; it moves the CT to its true place.
      target: (B, V, H, W) line integrals of the vertebra alone at the true pose.
    """

    xrays: Leaf
    valid: Leaf
    intrinsics: Leaf
    camera_from_box: Leaf
    cloud: gaussians.Gaussians
    motion: Leaf
    target: Leaf
