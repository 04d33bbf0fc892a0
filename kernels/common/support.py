"""The support rule that every backend of `splat` and `voxelize` shares.

A Gaussian's weight is `exp(-q / 2) * fade(q)`, where q is the full quadratic form (3 sigma is q = 9) and `fade` is 1 up
to q = 12.25 (3.5 sigma), then a smoothstep in q down to 0 at q = 16 (4 sigma). The weight is C1, so two correct backends
cannot disagree by a jump at a boundary sample.
"""

import jax.numpy as jnp

Q_FADE = 12.25
Q_MAX = 16.0
SIGMA_MAX = 4.0


def weight(q):
    """Weight of a sample with quadratic form `q` (any shape, dimensionless); 0 where q >= 16."""
    s = jnp.clip((Q_MAX - q) / (Q_MAX - Q_FADE), 0.0, 1.0)
    # The exponent is clipped where the fade is already 0, so that a huge q gives 0 and never 0 * inf in a gradient.
    return jnp.exp(-0.5 * jnp.clip(q, 0.0, Q_MAX)) * s * s * (3.0 - 2.0 * s)


def weight_and_slope(q):
    """`weight(q)` and its derivative to q, for hand-written backward passes."""
    s = jnp.clip((Q_MAX - q) / (Q_MAX - Q_FADE), 0.0, 1.0)
    gaussian = jnp.exp(-0.5 * jnp.clip(q, 0.0, Q_MAX))
    fade = s * s * (3.0 - 2.0 * s)
    fade_slope = -6.0 * s * (1.0 - s) / (Q_MAX - Q_FADE)
    return gaussian * fade, gaussian * (fade_slope - 0.5 * fade)
