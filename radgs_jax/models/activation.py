"""From a head's logits to Gaussians and their ranges."""

import jax
import jax.numpy as jnp

from radgs_jax import gaussians
from radgs_jax.geometry import rigid

DENSITY_UNIT = 0.02
"""1/mm; raw density 0 means softplus(0) of it."""
SCALE_RANGE = (0.4, 20.0)
"""Smallest and largest standard deviation of a Gaussian, mm."""
ANCHORED_STEP_MM = 10.0
PAPER_STEP_MM = 30.0
"""What a mean's logit of 1 moves a Gaussian by."""


def _softplus_inverse(y):
    return y + jnp.log(-jnp.expm1(-y))


def _logit(p):
    return jnp.log(p) - jnp.log1p(-p)


def activate(logits, base, step_mm):
    """Gaussians (B, N) from logits (B, N, 11) = mean 3, scale 3, quaternion 4, density 1, added to those of `base`.

    Density by softplus, scale by a sigmoid between its bounds, quaternion normalised, mean linear (the forms of R2-Gaussian);
    zero logits give `base` back.
    """
    low, high = SCALE_RANGE
    fraction = jnp.clip((base.scale - low) / (high - low), 1e-3, 1.0 - 1e-3)
    raw_density = _softplus_inverse(jnp.clip(base.density / DENSITY_UNIT, 1e-4, 1e2))
    mean, scale, quaternion, density = jnp.split(logits, (3, 6, 10), -1)
    identity = jnp.asarray([1.0, 0, 0, 0], logits.dtype)
    turn = identity + 0.1 * quaternion
    turn = turn * jax.lax.rsqrt(jnp.sum(turn**2, -1, keepdims=True) + 1e-12)
    return gaussians.Gaussians(
        density=DENSITY_UNIT * jax.nn.softplus(raw_density + density[..., 0]),
        mean=base.mean + step_mm * mean,
        scale=low + (high - low) * jax.nn.sigmoid(_logit(fraction) + 0.5 * scale),
        quaternion=rigid.multiply_quaternions(turn, base.quaternion),
    )


def carry_detail(reconstruction, anchors, fine, radius_mm=6.0):
    """The deformation that a network gave its anchors, applied to a finer cloud of the same object.

    A network answers for a few hundred anchors; the prior knows the object in finer Gaussians. Each of these follows the
    anchors near it: shift, turn, and the ratios of scale and density are averaged with Gaussian weights of `radius_mm`
    and the anchors' mass.

    Args:
      reconstruction, anchors: Gaussians (N,), one for one, as returned by RecM for these anchors; fine: Gaussians (M,);
        all in the box frame.
    Returns:
      Gaussians (M,).
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
