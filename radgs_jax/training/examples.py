"""Examples from pairs: a start pose and a panel drawn for each."""

import jax
import jax.numpy as jnp

from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.training import augment
from radgs_jax.training import batches

MEASURED_SHARE = 0.5
"""Of simulated pairs, how many show what the simulated detector measured; the others get a detector drawn at each step."""
CLEAN_SHARE = 0.3
"""Of X-rays, how many no detector is drawn for."""


def make_example(key, batch, config, strength=1.0):
    """Draws a start pose and a detector for each pair, and crops at the start; `strength` 0 shows simulated pairs' clean sums."""
    keys = jax.random.split(key, 5)
    count = batch.rest.shape[0]
    offset = rigid.motion_about(jnp.zeros(3), augment.start_twist(keys[0], count))
    world_from_start = rigid.matmul(batch.world_from_box, offset)
    camera_from_box = rigid.matmul(batch.camera_from_world, world_from_start[:, None])

    def crop(image, valid, k, E):
        return camera.window(image, valid, k, E, config.crop_px)

    crop = jax.vmap(jax.vmap(crop))
    measured, valid, intrinsics = crop(batch.measured, batch.valid, batch.intrinsics, camera_from_box)
    rest, everywhere, _ = crop(batch.rest, jnp.ones_like(batch.valid), batch.intrinsics, camera_from_box)
    excess, target = (
        crop(image, batch.valid, batch.intrinsics, camera_from_box)[0] for image in (batch.excess, batch.vertebra)
    )
    each = (count, 1, 1, 1)
    seen = ~batch.simulated.reshape(each) | (jax.random.uniform(keys[1], each) < MEASURED_SHARE * strength)
    dirty = strength * (jax.random.uniform(keys[2], each) > CLEAN_SHARE)
    # A measured X-ray has had its detector: a little more of the same widens what the simulator knows.
    xrays = jnp.where(seen, measured, augment.contrast(keys[3], rest, excess, dirty))
    xrays = augment.random_panel(keys[4], xrays, jnp.where(seen, 0.3, 1.0) * dirty)
    return batches.Example(
        xrays,
        jnp.where(seen, valid, everywhere),
        intrinsics,
        camera_from_box,
        batch.cloud,
        rigid.inverse(offset),
        target,
    )
