"""3D/3D registration in closed form: the rigid motion that carries CT Gaussians to where the views reconstruct them."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid

FREE_MM = 30.0
"""Standard deviation of the prior on a motion, mm, rotations by their lever. Chosen by hand, above the largest start error of 25
mm: it only keeps directions that no match constrains at zero. At half, motions that are poorly constrained are shortened; at
twice, noise moves them more."""


@flax.struct.dataclass
class Matches:
    """Pairs of corresponding points, in mm in the box frame.

    Attributes:
      source: (B, A, 3) centres of the CT's Gaussians.
      target: (B, A, 3) centres of the reconstruction's.
      information: (B, A, 3, 3) inverse covariance of each target, 1/mm^2.
    """

    source: Leaf
    target: Leaf
    information: Leaf


def subset(cloud: Gaussians, count: int) -> Gaussians:
    """`count` of the Gaussians (B, N), evenly spaced in their order; sorted by mass, this takes large and small ones alike."""
    stride = max(1, cloud.density.shape[-1] // count)
    return jax.tree.map(lambda a: a[:, : stride * count : stride], cloud)


def carry(matches: Matches, motion: Float[Array, "batch 4 4"]) -> Matches:
    """The same matches with their sources moved by `motion`."""
    return dataclasses.replace(matches, source=rigid.apply(motion, matches.source))


def align(matches: Matches, steps: int = 3) -> tuple[Float[jax.Array, "batch 4 4"], Float[Array, "batch 6 6"]]:
    """The motion T that minimises sum (T x - y)' W (T x - y), by Gauss-Newton on SE(3); differentiable.

    Args:
      steps: number of steps, static. Three converge to float32's precision from 25 degrees.

    Returns:
      The motion, and its information about the box's origin, rad and mm.
    """
    motion = jnp.broadcast_to(jnp.eye(4, dtype=matches.source.dtype), (matches.source.shape[0], 4, 4))
    for _ in range(steps):
        x = rigid.apply(motion, matches.source)
        jacobian = (
            jnp.concatenate([-rigid.skew(x), jnp.broadcast_to(jnp.eye(3), (*x.shape, 3))], -1) * rigid.TWIST_SCALE
        )
        weighted = jnp.sum(matches.information[..., None] * jacobian[..., None, :, :], -2)
        normal = jnp.sum(jnp.sum(jacobian[..., :, None] * weighted[..., None, :], -3), 1)
        normal = normal + FREE_MM**-2 * jnp.eye(6)
        right = jnp.sum(weighted * (matches.target - x)[..., None], (1, 2))
        twist = jnp.linalg.solve(normal, right[..., None])[..., 0] * rigid.TWIST_SCALE
        motion = rigid.matmul(rigid.motion_about(jnp.zeros(3), twist), motion)
    return motion, normal / rigid.TWIST_SCALE[:, None] / rigid.TWIST_SCALE
