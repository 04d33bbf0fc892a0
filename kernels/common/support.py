"""The support rule of all backends of `splat` and `voxelize`.

A Gaussian's weight is `exp(-q / 2) * fade(q)`, where q is the full quadratic form (3 sigma is q = 9) and `fade` is 1 up
to q = 12.25 (3.5 sigma), then a smoothstep in q down to 0 at q = 16 (4 sigma). The weight is C1, so two correct backends
cannot disagree by a jump at a boundary sample.
"""

import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array

Q_FADE = 12.25
Q_MAX = 16.0
"""Where the fade begins and ends, in q. Chosen by hand: images lose at most 0.3 % and volumes 0.6 % (L2,
`test_support_rule_loses_little`). Half of Q_MAX would cut at 2.8 sigma, twice would double the samples of an image. Also in
common/parallel.h."""

SIGMA_MAX = 4.0
"""sqrt(Q_MAX)."""


def weight(q: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Weight of a sample with quadratic form `q`; 0 where q >= Q_MAX."""
    s = jnp.clip((Q_MAX - q) / (Q_MAX - Q_FADE), 0.0, 1.0)
    # The exponent is clipped where the fade is 0 anyway, so that a huge q gives 0 and not 0 * inf in a gradient.
    return jnp.exp(-0.5 * jnp.clip(q, 0.0, Q_MAX)) * s * s * (3.0 - 2.0 * s)


def weight_and_slope(q: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """`weight(q)` and its derivative with respect to q, for hand-written backward passes."""
    s = jnp.clip((Q_MAX - q) / (Q_MAX - Q_FADE), 0.0, 1.0)
    gaussian = jnp.exp(-0.5 * jnp.clip(q, 0.0, Q_MAX))
    fade = s * s * (3.0 - 2.0 * s)
    fade_slope = -6.0 * s * (1.0 - s) / (Q_MAX - Q_FADE)
    return gaussian * fade, gaussian * (fade_slope - 0.5 * fade)
