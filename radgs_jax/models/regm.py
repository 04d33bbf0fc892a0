"""RegM: the pose of a reconstruction against the CT vertebra.

Gaussians that are the CT's own are matched one for one, so a rigid motion follows in closed form from where the views see
them and how precisely. What is learned is what to believe: `Reweighting` looks at what a first motion leaves of every match.
`Regressor` is the paper's, an encoder of both as the channels of one volume, for what has no matches or a larger machine.
"""

import flax.linen as nn
import jax.numpy as jnp

from radgs_jax import gaussians
from radgs_jax.geometry import grid
from radgs_jax.geometry import rigid
from radgs_jax.models import backbones
from radgs_jax.models import matching
from radgs_jax.models.config import ModelConfig

ROTATION_UNIT = 0.2
TRANSLATION_UNIT_MM = 10.0
DENSITY_UNIT = 0.02
"""What an output or input of 1 means: rad, mm, 1/mm."""


class Reweighting(nn.Module):
    """Log weights (B, A) for matches, from each one's residual beside all of them; at the start about 0."""

    width: int = 48

    @nn.compact
    def __call__(self, matches):
        """matches: `Matches`, their sources carried by a first motion."""
        left = matches.target - matches.source
        known = jnp.stack([matches.information[..., i, i] for i in range(3)], -1)
        size = jnp.sum(left * jnp.sum(matches.information * left[..., None, :], -1), -1, keepdims=True)
        x = jnp.concatenate([matches.source / 20.0, left / 5.0, jnp.log(known + 1e-3), jnp.log(size + 1e-2)], -1)
        x = nn.relu(nn.Dense(self.width)(x))
        everyone = jnp.broadcast_to(jnp.mean(x, 1, keepdims=True), x.shape)
        x = nn.relu(nn.Dense(self.width)(jnp.concatenate([x, everyone], -1)))
        x = nn.Dense(1, kernel_init=nn.initializers.variance_scaling(0.02, "fan_in", "truncated_normal"))(x)
        return 4.0 * jnp.tanh(0.25 * x[..., 0])


class Regressor(nn.Module):
    """3D encoder and pose head: twist (B, 6), rad and mm about the box's origin, that moves the CT onto the reconstruction."""

    config: ModelConfig

    @nn.compact
    def __call__(self, reconstruction, ct):
        """reconstruction, ct: (B, D, D, D) density in 1/mm on the same grid."""
        name, options = self.config.backbone_3d
        x = jnp.stack([reconstruction, ct, reconstruction - ct], -1) / DENSITY_UNIT
        x = backbones.make_backbone(name, **dict(options))(x)
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        x = nn.Dense(6, kernel_init=nn.initializers.variance_scaling(0.02, "fan_in", "truncated_normal"))(x)
        return x * jnp.asarray([ROTATION_UNIT] * 3 + [TRANSLATION_UNIT_MM] * 3)


class RegM(nn.Module):
    """The registration module (Fig. 1c); with config.backbone_3d None it is `Reweighting` alone."""

    config: ModelConfig

    @nn.compact
    def __call__(self, reconstruction, matches, ct_cloud, passes):
        """As `estimate`."""
        c = self.config
        motion = jnp.broadcast_to(jnp.eye(4, dtype=ct_cloud.mean.dtype), (ct_cloud.mean.shape[0], 4, 4))
        information = jnp.zeros((motion.shape[0], 6, 6), motion.dtype)
        if matches is not None:
            motion, information = matching.align(matches)
            weight = jnp.exp(Reweighting()(matching.carry(matches, motion)))
            motion, information = matching.align(
                matches.replace(information=weight[..., None, None] * matches.information)
            )
        if c.backbone_3d is None:
            return motion, information
        regressor, ct = Regressor(c), volume(ct_cloud, c)
        for _ in range(passes):
            carried = gaussians.move(reconstruction, rigid.inverse(motion))
            twist = regressor(volume(carried, c), ct)
            motion = rigid.matmul(motion, rigid.motion_about(jnp.zeros(3, ct.dtype), twist))
        return motion, information


def volume(cloud, config):
    """RegM's view of Gaussians (B, N): density (B, D, D, D), 1/mm, on its grid, low-passed to what the grid can carry."""
    cells = grid.centred((config.grid,) * 3, config.voxel_mm)
    return gaussians.voxelize(gaussians.blur(cloud, config.grid_blur_mm), cells)


def matches_of(reconstruction, ct_cloud, config):
    """`Matches` of Gaussians (B, N) that are the CT's, one for one, of a precision of 1 mm."""
    source, target = (matching.subset(cloud, config.anchors).mean for cloud in (ct_cloud, reconstruction))
    return matching.Matches(source, target, jnp.broadcast_to(jnp.eye(3), (*source.shape, 3)))


def estimate(params, config, reconstruction, matches, ct_cloud, passes=1):
    """Registers the CT's Gaussians to the reconstruction's, with shared weights over several passes of the `Regressor`.

    The reconstruction is carried back by the estimate between passes (Gaussians move rigidly, nothing is resampled), so
    the CT stays in its own axes.

    Args:
      params: RegM's variables; reconstruction, ct_cloud: Gaussians (B, N), box frame; matches: `Matches` or None.
      passes: static count >= 1.
    Returns:
      motion (B, 4, 4) in the box frame, reconstruction ~ motion applied to the CT, and the matches' information (B, 6, 6) on
      it, zero without them.
    """
    return RegM(config).apply(params, reconstruction, matches, ct_cloud, passes)
