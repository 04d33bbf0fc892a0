"""RegM: the pose of a reconstruction relative to the CT vertebra.

A reconstruction from the CT's own Gaussians matches them one to one, so a rigid motion follows in closed form from where the views
see them and how precisely. Only the weights of the matches are learned: `Reweighting` looks at the residuals after a first motion.
`Regressor` is the paper's module, an encoder of both volumes, for reconstructions without matches or for a larger machine.
"""

import dataclasses
from typing import Any
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import grid
from radgs_jax.geometry import rigid
from radgs_jax.models import activation
from radgs_jax.models import backbones
from radgs_jax.models import matching
from radgs_jax.models.config import ModelConfig

# Parameters are trained with the constants below; other values need new training.
ROTATION_UNIT = 0.2
"""Rotation per unit of the regressor's output, rad. Chosen by hand, the size of a start error, as is the next one. At half and
twice, the same outputs mean half and twice the motion."""
TRANSLATION_UNIT_MM = 10.0
"""Translation per unit of the regressor's output, mm."""
PLACE_UNIT_MM = 20.0
"""Input unit of an anchor's place, mm, about a vertebra's radius. Chosen by hand to give inputs near 1, as are the next four; half
and twice make the input twice and half as large, which the first layer can undo."""
RESIDUAL_UNIT_MM = 5.0
"""Input unit of a residual, mm."""
MIN_INFORMATION = 1e-3
"""Smallest information of a match in its logarithm, 1/mm^2: a standard deviation of 30 mm."""
MIN_CHI_SQUARE = 1e-2
"""Smallest squared residual, in squared standard deviations, in its logarithm."""
MAX_LOG_WEIGHT = 4.0
"""Largest change of a match's log weight, no unit: a factor of 55. At half it is 7.4, and outliers keep more weight; at twice
3000."""
START_SCALE = 0.02
"""Variance scale of the last layers at the start: the first weights are near 1 and the first motions near none. Chosen by hand."""


class Reweighting(nn.Module):
    """Log weights of matches from their residuals, each seen with the mean over all of them; they start near 0."""

    width: int = 48

    @nn.compact
    def __call__(self, matches: matching.Matches) -> Float[jax.Array, "batch anchors"]:
        """The sources of `matches` have been moved by a first motion."""
        left = matches.target - matches.source
        known = jnp.stack([matches.information[..., i, i] for i in range(3)], -1)
        size = jnp.sum(left * jnp.sum(matches.information * left[..., None, :], -1), -1, keepdims=True)
        x = jnp.concatenate(
            [
                matches.source / PLACE_UNIT_MM,
                left / RESIDUAL_UNIT_MM,
                jnp.log(known + MIN_INFORMATION),
                jnp.log(size + MIN_CHI_SQUARE),
            ],
            -1,
        )
        x = nn.relu(nn.Dense(self.width)(x))
        everyone = jnp.broadcast_to(jnp.mean(x, 1, keepdims=True), x.shape)
        x = nn.relu(nn.Dense(self.width)(jnp.concatenate([x, everyone], -1)))
        x = nn.Dense(1, kernel_init=nn.initializers.variance_scaling(START_SCALE, "fan_in", "truncated_normal"))(x)
        return MAX_LOG_WEIGHT * jnp.tanh((1.0 / MAX_LOG_WEIGHT) * x[..., 0])


class Regressor(nn.Module):
    """3D encoder and pose head."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, reconstruction: Float[Array, "batch x y z"], ct: Float[Array, "batch x y z"]
    ) -> Float[jax.Array, "batch 6"]:
        """The twist about the box's origin, rad and mm, that moves the CT onto the reconstruction; densities in 1/mm."""
        assert self.config.backbone_3d is not None
        name, options = self.config.backbone_3d
        x = jnp.stack([reconstruction, ct, reconstruction - ct], -1) / activation.DENSITY_UNIT
        x = backbones.make_backbone(name, **dict(options))(x)
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        x = nn.Dense(6, kernel_init=nn.initializers.variance_scaling(START_SCALE, "fan_in", "truncated_normal"))(x)
        return x * jnp.asarray([ROTATION_UNIT] * 3 + [TRANSLATION_UNIT_MM] * 3)


class RegM(nn.Module):
    """The registration module (Fig. 1c); without `config.backbone_3d` it has no `Regressor`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, reconstruction: Gaussians, matches: matching.Matches | None, ct_cloud: Gaussians, passes: int
    ) -> tuple[Float[Array, "batch 4 4"], Float[Array, "batch 6 6"]]:
        """Arguments and result are those of `estimate`."""
        c = self.config
        motion = jnp.broadcast_to(jnp.eye(4, dtype=ct_cloud.mean.dtype), (ct_cloud.mean.shape[0], 4, 4))
        information = jnp.zeros((motion.shape[0], 6, 6), motion.dtype)
        if matches is not None:
            motion, information = matching.align(matches)
            weight = jnp.exp(Reweighting()(matching.carry(matches, motion)))
            motion, information = matching.align(
                dataclasses.replace(matches, information=weight[..., None, None] * matches.information)
            )
        if c.backbone_3d is None:
            return motion, information
        regressor, ct = Regressor(c), volume(ct_cloud, c)
        for _ in range(passes):
            carried = gaussians.move(reconstruction, rigid.inverse(motion))
            twist = regressor(volume(carried, c), ct)
            motion = rigid.matmul(motion, rigid.motion_about(jnp.zeros(3, ct.dtype), twist))
        return motion, information


def volume(cloud: Gaussians, config: ModelConfig) -> Float[Array, "batch x y z"]:
    """Density of Gaussians (B, N) on RegM's grid, 1/mm, blurred so that the grid can sample it."""
    cells = grid.centred((config.grid,) * 3, config.voxel_mm)
    return gaussians.voxelize(gaussians.blur(cloud, config.grid_blur_mm), cells)


def matches_of(reconstruction: Gaussians, ct_cloud: Gaussians, config: ModelConfig) -> matching.Matches:
    """Matches between Gaussians (B, N) of a reconstruction and of the CT in the same order, with a standard deviation of 1 mm."""
    source, target = (matching.subset(cloud, config.anchors).mean for cloud in (ct_cloud, reconstruction))
    return matching.Matches(source, target, jnp.broadcast_to(jnp.eye(3), (*source.shape, 3)))


def estimate(
    params: Any,
    config: ModelConfig,
    reconstruction: Gaussians,
    matches: matching.Matches | None,
    ct_cloud: Gaussians,
    passes: int = 1,
) -> tuple[Float[Array, "batch 4 4"], Float[Array, "batch 6 6"]]:
    """Registers the CT's Gaussians to the reconstruction's, with shared weights over several passes of the `Regressor`.

    Between passes the reconstruction is moved back by the estimate, so the CT stays in its own axes. Gaussians move rigidly:
    nothing is resampled.

    Args:
      params: RegM's variables.
      reconstruction, ct_cloud: Gaussians (B, N), box frame.
      matches: correspondences; None if there are none.
      passes: number of passes of the `Regressor`, static, at least 1.

    Returns:
      The motion in the box frame that moves the CT onto the reconstruction, and the information of the matches on it (zero without
      matches).
    """
    return cast(Any, RegM(config).apply(params, reconstruction, matches, ct_cloud, passes))
