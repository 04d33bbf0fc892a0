"""Random starts, domain randomisation of X-rays, and imperfect reconstructions: seeded pure functions for training."""

import jax
import jax.numpy as jnp

from radgs_jax import gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid


def start_twist(key, batch, max_mm=25.0):
    """Twists (B, 6) of start poses: 40 % of size 0-6 mm, 24 % 0-12, the rest up to `max_mm`; small ones are where iteration lives.

    The size is split at random between translation and rotation at the lever; rotations are at most `rigid.START_RAD`. A twist is
    rad, then mm.
    """
    keys = jax.random.split(key, 4)
    kind = jax.random.uniform(keys[0], (batch, 1))
    top = jnp.where(kind < 0.4, 6.0, jnp.where(kind < 0.64, 12.0, max_mm))
    bottom = jnp.where(kind < 0.64, 0.0, 0.2 * max_mm)
    size, share = jnp.split(jax.random.uniform(keys[1], (batch, 2)), 2, -1)
    size, share = bottom + size * (top - bottom), jnp.sqrt(share)
    w, t = jax.random.normal(keys[2], (batch, 3)), jax.random.normal(keys[3], (batch, 3))
    w, t = (d / jnp.linalg.norm(d, axis=-1, keepdims=True) for d in (w, t))
    angle = jnp.minimum(size * jnp.sqrt(1 - share**2) / rigid.LEVER_MM, rigid.START_RAD)
    return jnp.concatenate([w * angle, t * size * share], -1)


def contrast(key, rest, excess, strength):
    """Line integrals (B, V, H, W) of a body and its vertebra, each attenuating up to 15 and 30 % more or less than it does.

    Args:
      rest, excess: (B, V, H, W) of the body and of what the vertebra adds; strength: (B, 1, 1, 1), 0 gives their sum.
    """
    body, vertebra = (jax.random.uniform(k, strength.shape, minval=-1.0) for k in jax.random.split(key))
    return rest * (1 + 0.15 * strength * body) + excess * (1 + 0.3 * strength * vertebra)


def random_panel(key, image, strength):
    """Line integrals (B, V, H, W) under a random beam and detector: hardening, scatter up to the primary, a gain ramp, blur, noise.

    Args:
      strength: (B, 1, 1, 1); 0 changes nothing.
    """
    b, v, height, width = image.shape
    keys = jax.random.split(key, 6)

    def draw(i, low, high, shape=(b, 1, 1, 1)):
        return low + (high - low) * jax.random.uniform(keys[i], shape)

    image = image / (1 + strength * draw(0, 0.0, 0.08) * jnp.maximum(image, 0.0))
    primary = jnp.exp(-image)
    # Two wide box filters stand for the scatter kernel; its tails reach across the window.
    scatter = camera.box_blur(camera.box_blur(primary, 8), 8)
    intensity = primary + strength * draw(1, 0.0, 1.0) * scatter
    ramp = strength[..., None] * draw(2, -0.1, 0.1, (b, v, 2, 1, 1))
    rows, columns = jnp.linspace(-0.5, 0.5, height)[:, None], jnp.linspace(-0.5, 0.5, width)[None]
    intensity = intensity * (1 + ramp[:, :, 0] * rows + ramp[:, :, 1] * columns)
    image = -jnp.log(jnp.maximum(intensity, 1e-6))
    soft = strength * draw(3, 0.0, 1.0)
    image = image + soft * (camera.box_blur(image, 1) - image)
    # The pixels are averages of many detector pixels, so their noise is small.
    noise = strength * draw(4, 0.0, 0.02) * jax.random.normal(keys[5], image.shape)
    return image + noise


def imperfect(key, cloud):
    """Gaussians (B, N) as a reconstruction might have them: warped smoothly and individually, with uneven density and blur."""
    b, n = cloud.density.shape
    keys = jax.random.split(key, 6)
    severity = jax.random.uniform(keys[0], (b, 1, 1))
    gradient = 0.06 * jax.random.normal(keys[1], (b, 3, 3))
    warp = rigid.apply_rotation(gradient[:, None], cloud.mean) + 1.5 * jax.random.normal(keys[2], cloud.mean.shape)
    density = cloud.density * jnp.exp(0.4 * severity[..., 0] * jax.random.normal(keys[3], (b, n)))
    scale = cloud.scale * (1 + severity * 0.5 * jax.random.uniform(keys[4], (b, 1, 1)))
    scale_mass = jnp.prod(cloud.scale / scale, -1)
    return gaussians.Gaussians(density * scale_mass, cloud.mean + severity * warp, scale, cloud.quaternion)
