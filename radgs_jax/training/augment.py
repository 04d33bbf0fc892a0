"""Random starts, domain randomisation of X-rays, and imperfect reconstructions: seeded pure functions for training.

The ranges below were chosen by hand, to be wider than what the simulator and real X-rays show: narrower ranges risk a network that
fails on X-rays unlike the simulated ones, wider ones take capacity from those like them.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from radgs_jax import gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid

MAX_START_MM = 25.0
"""Maximum size of a start, mm, rotations by `rigid.LEVER_MM`: the range of starts in most tables of docs/accuracy.md. At
half, larger starts are untrained; at twice, fewer pairs show the small errors of later passes."""
SMALL_MM, MEDIUM_MM = 6.0, 12.0
"""Maximum size, mm, of small and of medium starts, which are what passes after the first one see. Chosen by hand."""
SMALL_SHARE, SMALL_OR_MEDIUM_SHARE = 0.4, 0.64
"""Fractions of starts that are small, and that are small or medium. Chosen by hand: more small starts improve the last passes at
the cost of the first."""
LARGE_FROM = 0.2
"""Minimum size of the other starts, as a fraction of the maximum. Chosen by hand."""
BODY_CONTRAST, VERTEBRA_CONTRAST = 0.15, 0.3
"""Maximum relative change of the attenuation of the body and of the vertebra, such as by another beam
or by a CT's calibration."""
HARDENING = 0.08
"""Maximum beam hardening, per unit of line integral: an X-ray of line integral 5 loses up to 29 %."""
SCATTER = 1.0
"""Maximum ratio of scattered to primary intensity."""
SCATTER_RADIUS_PX = 8
"""Radius of each of the two box filters that spread the scatter, pixels: their tails reach across the crop."""
GAIN_RAMP = 0.1
"""Maximum relative change of the panel's gain across the crop, along each axis."""
SOFTNESS = 1.0
"""Maximum share of the image that is replaced by its average over 3 x 3 pixels."""
NOISE = 0.02
"""Maximum standard deviation of the noise of a line integral. Small, since a pixel averages many pixels of the panel."""
MIN_INTENSITY = 1e-6
"""Intensity, as a fraction of the open beam, below which the logarithm is cut off; no unit."""
WARP_GRADIENT = 0.06
"""Standard deviation of the entries of the linear map that warps an imperfect reconstruction, mm per mm."""
WARP_MM = 1.5
"""Standard deviation of the shift of each Gaussian of an imperfect reconstruction, mm."""
LOG_DENSITY = 0.4
"""Standard deviation of the logarithm of each Gaussian's change of density."""
SCALE_GROWTH = 0.5
"""Maximum relative growth of an imperfect reconstruction's Gaussians."""


def start_twist(key: jax.Array, batch: int, max_mm: float = MAX_START_MM) -> Float[jax.Array, "{batch} 6"]:
    """Random twists of start poses, rad and mm.

    The size is split at random between translation and rotation at the lever; rotations are at most `rigid.START_RAD`. Small
    starts are frequent because later passes of the iteration see them.
    """
    keys = jax.random.split(key, 4)
    kind = jax.random.uniform(keys[0], (batch, 1))
    top = jnp.where(kind < SMALL_SHARE, SMALL_MM, jnp.where(kind < SMALL_OR_MEDIUM_SHARE, MEDIUM_MM, max_mm))
    bottom = jnp.where(kind < SMALL_OR_MEDIUM_SHARE, 0.0, LARGE_FROM * max_mm)
    size, share = jnp.split(jax.random.uniform(keys[1], (batch, 2)), 2, -1)
    size, share = bottom + size * (top - bottom), jnp.sqrt(share)
    w, t = jax.random.normal(keys[2], (batch, 3)), jax.random.normal(keys[3], (batch, 3))
    w, t = (d / jnp.linalg.norm(d, axis=-1, keepdims=True) for d in (w, t))
    angle = jnp.minimum(size * jnp.sqrt(1 - share**2) / rigid.LEVER_MM, rigid.START_RAD)
    return jnp.concatenate([w * angle, t * size * share], -1)


def contrast(
    key: jax.Array,
    rest: Float[jax.Array, "batch views height width"],
    excess: Float[jax.Array, "batch views height width"],
    strength: Float[jax.Array, "batch 1 1 1"],
) -> Float[jax.Array, "batch views height width"]:
    """Line integrals of a body and its vertebra under a random change of the attenuation of each.

    Args:
      rest, excess: line integrals of the body and of what the vertebra adds; strength: 0 gives their sum, 1 the full range.
    """
    body, vertebra = (jax.random.uniform(k, strength.shape, minval=-1.0) for k in jax.random.split(key))
    return rest * (1 + BODY_CONTRAST * strength * body) + excess * (1 + VERTEBRA_CONTRAST * strength * vertebra)


def random_panel(
    key: jax.Array, image: Float[jax.Array, "batch views height width"], strength: Float[jax.Array, "batch 1 1 1"]
) -> Float[jax.Array, "batch views height width"]:
    """Line integrals under a random beam and panel: hardening, scatter, a gain ramp, blur and noise.

    Args:
      strength: 0 changes nothing, 1 gives the full range.
    """
    b, v, height, width = image.shape
    keys = jax.random.split(key, 6)

    def draw(i, low, high, shape=(b, 1, 1, 1)):
        return low + (high - low) * jax.random.uniform(keys[i], shape)

    image = image / (1 + strength * draw(0, 0.0, HARDENING) * jnp.maximum(image, 0.0))
    primary = jnp.exp(-image)
    scatter = camera.box_blur(camera.box_blur(primary, SCATTER_RADIUS_PX), SCATTER_RADIUS_PX)
    intensity = primary + strength * draw(1, 0.0, SCATTER) * scatter
    ramp = strength[..., None] * draw(2, -GAIN_RAMP, GAIN_RAMP, (b, v, 2, 1, 1))
    rows, columns = jnp.linspace(-0.5, 0.5, height)[:, None], jnp.linspace(-0.5, 0.5, width)[None]
    intensity = intensity * (1 + ramp[:, :, 0] * rows + ramp[:, :, 1] * columns)
    image = -jnp.log(jnp.maximum(intensity, MIN_INTENSITY))
    soft = strength * draw(3, 0.0, SOFTNESS)
    image = image + soft * (camera.box_blur(image, 1) - image)
    noise = strength * draw(4, 0.0, NOISE) * jax.random.normal(keys[5], image.shape)
    return cast(jax.Array, image + noise)


def imperfect(key: jax.Array, cloud: gaussians.Gaussians) -> gaussians.Gaussians:
    """Gaussians (B, N) with errors like a reconstruction's: warped as a whole and one by one, with uneven density and blur."""
    b, n = cloud.density.shape
    keys = jax.random.split(key, 6)
    severity = jax.random.uniform(keys[0], (b, 1, 1))
    gradient = WARP_GRADIENT * jax.random.normal(keys[1], (b, 3, 3))
    warp = rigid.apply_rotation(gradient[:, None], cloud.mean) + WARP_MM * jax.random.normal(keys[2], cloud.mean.shape)
    density = cloud.density * jnp.exp(LOG_DENSITY * severity[..., 0] * jax.random.normal(keys[3], (b, n)))
    scale = cloud.scale * (1 + severity * SCALE_GROWTH * jax.random.uniform(keys[4], (b, 1, 1)))
    scale_mass = jnp.prod(cloud.scale / scale, -1)
    return gaussians.Gaussians(density * scale_mass, cloud.mean + severity * warp, scale, cloud.quaternion)
