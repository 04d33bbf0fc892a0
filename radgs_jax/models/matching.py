"""3D/3D registration in closed form: the rigid motion that carries CT Gaussians to where the views reconstruct them."""

import flax.struct
import jax
import jax.numpy as jnp

from radgs_jax.geometry import rigid

FREE_MM = 30.0
"""Expected size of a motion, rotations by their lever: what a pose is drawn to where nothing is known."""


@flax.struct.dataclass
class Matches:
    """source (B, A, 3): centres of the CT's Gaussians; target (B, A, 3): of the reconstruction's; mm, box frame.

    information: (B, A, 3, 3) of each target, 1/mm^2: a better view, and directions that both views see, count more.
    """

    source: jax.Array
    target: jax.Array
    information: jax.Array


def subset(cloud, count):
    """Every so many-th of Gaussians (B, N) that are sorted by mass, `count` of them: large and small ones alike."""
    stride = max(1, cloud.density.shape[-1] // count)
    return jax.tree.map(lambda a: a[:, : stride * count : stride], cloud)


def carry(matches, motion):
    """The same matches with their sources moved by `motion` (B, 4, 4)."""
    return matches.replace(source=rigid.apply(motion, matches.source))


def align(matches, steps=3):
    """The motion T that minimises sum (T x - y)' W (T x - y), by Gauss-Newton on SE(3); differentiable.

    Args:
      matches: `Matches`; steps: static count; three reach float32's end from 25 degrees.
    Returns:
      motion (B, 4, 4) and its information (B, 6, 6) about the box's origin, rad and mm.
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
