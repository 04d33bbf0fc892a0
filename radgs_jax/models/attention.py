"""Counterfactual attention learning (Rao et al. 2021; Eq. 1 of the paper)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class AttentionMaps(nn.Module):
    """Factual attention: 1x1 convolution, normalisation over the image, ReLU.

    (..., h, w, C) features -> (..., h, w, maps) non-negative weights. They start around 3, well above the mean weight 1 of
    the intervention: with equal means the effect of Eq. 1 would start at zero and pass no gradient on.
    """

    maps: int

    @nn.compact
    def __call__(self, features):
        logits = nn.Dense(self.maps)(features)
        mean = jnp.mean(logits, (-3, -2), keepdims=True)
        variance = jnp.var(logits, (-3, -2), keepdims=True)
        scale = self.param("scale", nn.initializers.ones, (self.maps,))
        bias = self.param("bias", nn.initializers.constant(3.0), (self.maps,))
        return nn.relu((logits - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias)


def counterfactual_maps(key, shape, draws):
    """Attention under intervention: `draws` maps of i.i.d. uniform weights in [0, 2), (draws, *shape).

    Without a PRNG key, one map of ones, (1, *shape): the mean of that distribution, so that inference is deterministic.
    """
    if key is None:
        return jnp.ones((1, *shape))
    return jax.random.uniform(key, (draws, *shape), maxval=2.0)


def attend(features, maps):
    """What a head sees through attention maps.

    Args:
      features: (..., h, w, C); maps: (..., h, w, M).
    Returns:
      gated features (..., h, w, C), weighted by the mean of the maps, and the bilinear attention pooling (..., M * C):
      mean over pixels of map times feature, signed square root. No L2 norm: it would cancel the level of the attention,
      which the effect lives on.
    """
    gated = features * jnp.mean(maps, -1, keepdims=True)
    pooled = jnp.einsum("...hwm,...hwc->...mc", maps, features) / (maps.shape[-3] * maps.shape[-2])
    pooled = pooled.reshape(*pooled.shape[:-2], -1)
    # x / sqrt(|x| + eps) is the signed square root with a bounded slope at 0.
    return gated, pooled * jax.lax.rsqrt(jnp.abs(pooled) + 1e-4)
