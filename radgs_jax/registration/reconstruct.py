"""The reported reconstruction: a bone that is its CT's but for a fraction of a millimetre, as fine Gaussians."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import grid
from radgs_jax.geometry import rigid
from radgs_jax.models import activation
from radgs_jax.models import matching
from radgs_jax.models import trained
from radgs_jax.models.trained import Model

POSE_BLUR_MM = 1.0
"""Standard deviation by which a reported reconstruction is blurred: two views say no more about where its edges are. At half
it shows detail of the CT as if it had been seen; at twice, small processes fade."""
DEFORMATION_MM = 0.5
"""Standard deviation of the difference between a bone and its CT. Anything beyond that in the network's matches is taken for
an error of the pose. At half the reconstruction is the CT; at twice it follows the network's noise."""


def as_bone(anchors: Gaussians, fine: Gaussians, matches: matching.Matches, registered: bool) -> Gaussians:
    """Fine Gaussians (M,) of the reconstructed bone, box frame.

    Args:
      anchors, fine: Gaussians (N,) and (M,) of the CT's vertebra; matches: where the views see the anchors, a batch of 1.
      registered: whether the pose has been refined, so that the matches' rigid part is the network's error and is dropped.
    """
    motion, _ = matching.align(matches)
    motion = motion[0]
    # The residual of each match after the rigid motion, shrunk by its information relative to the prior that the bone is its CT.
    beyond = matches.target[0] - rigid.apply(motion, matches.source[0])
    known = matches.information[0]
    inverse = jnp.linalg.inv(known + DEFORMATION_MM**-2 * jnp.eye(3))
    own = rigid.apply_rotation(inverse, rigid.apply_rotation(known, beyond))
    inner = jnp.eye(4) if registered else motion
    chosen = jax.tree.map(lambda a: a[0], matching.subset(jax.tree.map(lambda a: a[None], anchors), len(own)))
    bone = gaussians.move(chosen, inner)
    bone = dataclasses.replace(bone, mean=bone.mean + own)
    return gaussians.blur(activation.carry_detail(bone, chosen, fine), POSE_BLUR_MM)


def mean_cloud(model: Model, label: int) -> Gaussians:
    """The mean shape of a level as Gaussians (N,), box frame."""
    return gaussians.from_density(model.mean_shape(label), trained.mean_shape_grid(), model.config.gaussians)


def in_ct(
    reconstruction: Gaussians,
    world_from_ct: Float[Array, "4 4"],
    ct_from_index: Float[Array, "4 4"],
    shape: tuple[int, ...],
) -> Float[np.ndarray, "x y z"]:
    """Density of world-frame Gaussians in 1/mm, carried to CT axes by the inverse of `world_from_ct`.

    Args:
      ct_from_index: affine of the grid on which it is sampled, mm; shape: number of its voxels along each axis.
    """
    ct = gaussians.move(reconstruction, jnp.asarray(np.linalg.inv(world_from_ct), jnp.float32))
    # Centred first: CT coordinates of hundreds of mm would cost float32 its digits.
    middle = ct_from_index[:3, :3] @ (0.5 * (np.array(shape) - 1)) + ct_from_index[:3, 3]
    affine = np.array(ct_from_index)
    affine[:3, 3] -= middle
    ct = dataclasses.replace(ct, mean=ct.mean - jnp.asarray(middle, jnp.float32))
    return np.asarray(gaussians.voxelize(ct, grid.VoxelGrid(jnp.asarray(affine, jnp.float32), tuple(shape))))
