"""RegM: the pose of a reconstruction against the CT vertebra, from both as the channels of one volume."""

import flax.linen as nn
import jax.numpy as jnp

from radgs_jax import gaussians
from radgs_jax import grid
from radgs_jax import rigid
from radgs_jax.models import backbones
from radgs_jax.models.config import ModelConfig

ROTATION_UNIT = 0.2
TRANSLATION_UNIT_MM = 10.0
DENSITY_UNIT = 0.02
"""What an output or input of 1 means: rad, mm, 1/mm."""


class RegM(nn.Module):
    """3D encoder and pose head."""

    config: ModelConfig

    @nn.compact
    def __call__(self, reconstruction, ct):
        """Twist (B, 6), rad and mm about the box's origin, that moves the CT onto the reconstruction.

        reconstruction, ct: (B, D, D, D) density in 1/mm on the same grid.
        """
        name, options = self.config.backbone_3d
        x = jnp.stack([reconstruction, ct, reconstruction - ct], -1) / DENSITY_UNIT
        x = backbones.make_backbone(name, **dict(options))(x)
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        x = nn.Dense(6, kernel_init=nn.initializers.variance_scaling(0.02, "fan_in", "truncated_normal"))(x)
        return x * jnp.asarray([ROTATION_UNIT] * 3 + [TRANSLATION_UNIT_MM] * 3)


def volume(cloud, config):
    """RegM's view of Gaussians (B, N): density (B, D, D, D), 1/mm, on its grid, low-passed to what the grid can carry."""
    cells = grid.centred((config.grid,) * 3, config.voxel_mm)
    return gaussians.voxelize(gaussians.blur(cloud, config.grid_blur_mm), cells)


def estimate(params, config, reconstruction, ct_cloud, passes=1):
    """Registers the CT's Gaussians to the reconstruction's, with shared weights over several passes.

    The reconstruction is carried back by the estimate between passes (Gaussians move rigidly, nothing is resampled), so
    the CT stays in its own axes.

    Args:
      params: RegM's variables; reconstruction, ct_cloud: Gaussians (B, N), box frame; passes: static count >= 1.
    Returns:
      motion (B, 4, 4) in the box frame: reconstruction ~ motion applied to the CT.
    """
    model = RegM(config)
    ct = volume(ct_cloud, config)
    motion = jnp.broadcast_to(jnp.eye(4, dtype=ct.dtype), (ct.shape[0], 4, 4))
    for _ in range(passes):
        carried = gaussians.move(reconstruction, rigid.inverse(motion))
        twist = model.apply(params, volume(carried, config), ct)
        motion = rigid.matmul(motion, rigid.motion_about(jnp.zeros(3, ct.dtype), twist))
    return motion
