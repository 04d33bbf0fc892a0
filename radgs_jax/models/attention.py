"""Counterfactual attention learning (Rao et al. 2021; Eq. 1 of the paper)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array

START_LEVEL = 3.0
"""Mean weight at which factual attention starts; the intervention's is 1. Chosen by hand: near 1 the effect of Eq. 1 would start at
zero and pass no gradient on; at twice, it starts larger, which `recm.EFFECT_SCALE` would have to undo."""
ROOT_SOFTENING = 1e-4
"""Value below which the signed square root of pooled features becomes linear. Chosen by hand; its slope at 0 is at most 100, at
half 141, at twice 71."""


class AttentionMaps(nn.Module):
    """Factual attention: 1x1 convolution, normalisation over the image, ReLU, to `maps` non-negative weights."""

    maps: int

    @nn.compact
    def __call__(self, features: Float[Array, "*batch h w channels"]) -> Float[jax.Array, "*batch h w maps"]:
        """Weights, which start around `START_LEVEL`."""
        logits = nn.Dense(self.maps)(features)
        mean = jnp.mean(logits, (-3, -2), keepdims=True)
        variance = jnp.var(logits, (-3, -2), keepdims=True)
        scale = self.param("scale", nn.initializers.ones, (self.maps,))
        bias = self.param("bias", nn.initializers.constant(START_LEVEL), (self.maps,))
        return nn.relu((logits - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias)


def counterfactual_maps(key: jax.Array | None, shape: tuple[int, ...], draws: int) -> Float[jax.Array, "..."]:
    """Attention under intervention: `draws` maps of i.i.d. uniform weights in [0, 2), (draws, *shape).

    Without a PRNG key, one map of ones, (1, *shape): the mean of that distribution, which makes inference deterministic.
    """
    if key is None:
        return jnp.ones((1, *shape))
    return jax.random.uniform(key, (draws, *shape), maxval=2.0)


def attend(
    features: Float[Array, "*#batch h w channels"], maps: Float[Array, "*#batch h w maps"]
) -> tuple[Float[Array, "... h w channels"], Float[jax.Array, "... pooled"]]:
    """Applies attention maps to features.

    Returns:
      The features weighted by the mean of the maps, and their bilinear attention pooling of maps * channels numbers: the signed
      square root of the mean over pixels of map times feature. It is not normalised, because the L2 norm would cancel the overall
      level of the attention, on which the effect of Eq. 1 depends.
    """
    gated = features * jnp.mean(maps, -1, keepdims=True)
    pooled = jnp.einsum("...hwm,...hwc->...mc", maps, features) / (maps.shape[-3] * maps.shape[-2])
    pooled = pooled.reshape(*pooled.shape[:-2], -1)
    return gated, pooled * jax.lax.rsqrt(jnp.abs(pooled) + ROOT_SOFTENING)
