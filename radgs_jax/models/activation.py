"""From a head's logits to Gaussians, and from a network's Gaussians to finer ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid

# Parameters are trained with the constants below; other values need new training.
DENSITY_UNIT = 0.02
"""Density per unit of the softplus, 1/mm: about that of spongy bone. Chosen by hand. At half and twice, a logit changes the
density by half and twice as much."""
SCALE_RANGE = (0.4, 20.0)
"""Smallest and largest standard deviation of a Gaussian, mm. Chosen by hand: half of the first allows Gaussians thinner than a
pixel shows; half of the second excludes Gaussians of a vertebral body's size."""
ANCHORED_STEP_MM = 10.0
"""Distance that a mean's logit of 1 moves an anchored Gaussian, mm. Chosen by hand, the size of a start error. At half, large
errors need large logits; at twice, the first steps of training are twice as coarse."""
PAPER_STEP_MM = 30.0
"""The same for the paper's head, whose Gaussians all start at the origin, mm: half of a vertebra's width. Chosen by hand; at half
and twice, the cloud spreads more slowly and more quickly."""
FRACTION_MARGIN = 1e-3
"""Distance of a scale from the ends of `SCALE_RANGE` at which its logit is clipped, as a fraction. Chosen by hand: smaller values
give larger logits, at which the sigmoid hardly learns; larger ones change more Gaussians."""
DENSITY_LIMITS = (1e-4, 1e2)
"""Limits of an anchor's density for its inverse softplus, in `DENSITY_UNIT`. Chosen by hand, far outside any bone; half or twice
makes no difference."""
TURN_STEP = 0.1
"""Quaternion component per logit: a logit of 1 turns a Gaussian by about 0.2 rad. Chosen by hand; at half and twice it is 0.1 and
0.4 rad."""
SCALE_STEP = 0.5
"""Change of a scale's sigmoid argument per logit. Chosen by hand; at half and twice a logit changes the scale half and twice as
much."""
CARRY_RADIUS_MM = 6.0
"""Standard deviation of the weights with which a fine Gaussian follows the anchors around it, mm: about the anchors' spacing.
Chosen by hand: at half, each follows a single anchor, with jumps between; at twice, local deformations are averaged away."""


def _softplus_inverse(y):
    return y + jnp.log(-jnp.expm1(-y))


def _logit(p):
    return jnp.log(p) - jnp.log1p(-p)


def activate(logits: Float[Array, "*batch 11"], base: Gaussians, step_mm: float) -> Gaussians:
    """Gaussians from logits (mean 3, scale 3, quaternion 4, density 1) that are relative to `base`.

    Softplus for density, a sigmoid within `SCALE_RANGE` for scale, a normalised quaternion and a linear mean, as in R2-Gaussian.
    Zero logits give `base`.

    Args:
      step_mm: distance that a mean's logit of 1 moves a Gaussian.
    """
    low, high = SCALE_RANGE
    fraction = jnp.clip((base.scale - low) / (high - low), FRACTION_MARGIN, 1.0 - FRACTION_MARGIN)
    raw_density = _softplus_inverse(jnp.clip(base.density / DENSITY_UNIT, *DENSITY_LIMITS))
    mean, scale, quaternion, density = jnp.split(logits, (3, 6, 10), -1)
    identity = jnp.asarray([1.0, 0, 0, 0], logits.dtype)
    turn = identity + TURN_STEP * quaternion
    turn = turn * jax.lax.rsqrt(jnp.sum(turn**2, -1, keepdims=True) + 1e-12)
    return gaussians.Gaussians(
        density=DENSITY_UNIT * jax.nn.softplus(raw_density + density[..., 0]),
        mean=base.mean + step_mm * mean,
        scale=low + (high - low) * jax.nn.sigmoid(_logit(fraction) + SCALE_STEP * scale),
        quaternion=rigid.multiply_quaternions(turn, base.quaternion),
    )


def carry_detail(
    reconstruction: Gaussians, anchors: Gaussians, fine: Gaussians, radius_mm: float = CARRY_RADIUS_MM
) -> Gaussians:
    """Applies the deformation that a network gave its anchors to a finer cloud of the same object.

    Each fine Gaussian follows the anchors around it: shift, turn, and the ratios of scale and density are averaged, weighted by the
    anchors' mass and by a Gaussian of their distance.

    Args:
      reconstruction: (N,) deformed anchors.
      anchors: (N,) the same before, in the same order and frame.
      fine: (M,) in that frame.
      radius_mm: standard deviation of the weights.

    Returns:
      (M,) Gaussians.
    """
    offset2 = jnp.sum((fine.mean[:, None] - anchors.mean[None]) ** 2, -1)
    log_mass = jnp.log(anchors.density + 1e-12) + jnp.sum(jnp.log(anchors.scale), -1)
    weights = jax.nn.softmax(-0.5 * offset2 / radius_mm**2 + log_mass, -1)

    def average(values):
        return jnp.matmul(weights, values, precision=jax.lax.Precision.HIGHEST)

    back = anchors.quaternion * jnp.asarray([1.0, -1, -1, -1])
    turn = rigid.multiply_quaternions(reconstruction.quaternion, back)
    turn = average(jnp.where(turn[..., :1] < 0, -turn, turn))
    turn = turn / jnp.linalg.norm(turn, axis=-1, keepdims=True)
    log_density = jnp.log(reconstruction.density + 1e-9) - jnp.log(anchors.density + 1e-9)
    log_scale = jnp.log(reconstruction.scale) - jnp.log(anchors.scale)
    return gaussians.Gaussians(
        density=fine.density * jnp.exp(average(log_density[:, None])[:, 0]),
        mean=fine.mean + average(reconstruction.mean - anchors.mean),
        scale=fine.scale * jnp.exp(average(log_scale)),
        quaternion=rigid.multiply_quaternions(turn, fine.quaternion),
    )
