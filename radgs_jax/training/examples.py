"""Examples from pairs, with a random start pose and a random panel for each."""

import dataclasses
from collections.abc import Callable
from typing import cast

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.models.config import ModelConfig
from radgs_jax.training import augment
from radgs_jax.training import batches

MEASURED_SHARE = 0.5
"""Fraction of simulated pairs that show what the simulated panel measured; the others get a random panel at each step. Chosen by
hand: more show the simulator's physics, fewer show more variety."""
CLEAN_SHARE = 0.3
"""Fraction of X-rays that are left without a random panel. Chosen by hand: fewer make clean X-rays rare, more make the network rely
on them."""
MEASURED_STRENGTH = 0.3
"""Strength of the random panel on measured X-rays, which have had a panel already, as a fraction of that on clean sums. Chosen by
hand: it widens the range of the simulated panels; at 1, most X-rays would show the effects of a panel twice."""


def _check_shapes(batch: batches.PairBatch) -> None:
    """Raises an AssertionError for arrays that do not fit together; costs nothing but at trace time."""
    images = batch.rest, batch.excess, batch.vertebra, batch.measured, batch.valid
    chex.assert_rank(images, 4)
    chex.assert_equal_shape(images)
    chex.assert_equal_shape_prefix((batch.rest, batch.intrinsics, batch.camera_from_world), 2)
    chex.assert_equal_shape_prefix((batch.rest, batch.world_from_box, batch.simulated, batch.cloud.density), 1)
    chex.assert_shape(batch.intrinsics, (..., 4))
    chex.assert_shape((batch.camera_from_world, batch.world_from_box), (..., 4, 4))


def make_example(
    key: jax.Array, batch: batches.PairBatch, config: ModelConfig, strength: float = 1.0
) -> batches.Example:
    """Draws a start pose and a panel for each pair, and crops the X-rays at the start.

    Args:
      strength: of the random panels; 0 shows the clean sums of simulated pairs.
    Raises:
      AssertionError: arrays of the batch whose shapes do not fit together, when traced.
    """
    _check_shapes(batch)
    keys = jax.random.split(key, 5)
    count = batch.rest.shape[0]
    offset = rigid.motion_about(jnp.zeros(3), augment.start_twist(keys[0], count))
    world_from_start = rigid.matmul(batch.world_from_box, offset)
    camera_from_box = rigid.matmul(batch.camera_from_world, world_from_start[:, None])

    def crop(image, valid, k, E):
        cut, inside, moved = camera.window(image, valid, k, E, config.crop_px)
        return cut.astype(jnp.float32), inside, moved

    crop = cast(Callable[..., tuple[jax.Array, jax.Array, jax.Array]], jax.vmap(jax.vmap(crop)))
    measured, valid, intrinsics = crop(batch.measured, batch.valid, batch.intrinsics, camera_from_box)
    rest, everywhere, _ = crop(batch.rest, jnp.ones_like(batch.valid), batch.intrinsics, camera_from_box)
    excess, target = (
        crop(image, batch.valid, batch.intrinsics, camera_from_box)[0] for image in (batch.excess, batch.vertebra)
    )
    each = (count, 1, 1, 1)
    seen = ~batch.simulated.reshape(each) | (jax.random.uniform(keys[1], each) < MEASURED_SHARE * strength)
    dirty = strength * (jax.random.uniform(keys[2], each) > CLEAN_SHARE)
    xrays = jnp.where(seen, measured, augment.contrast(keys[3], rest, excess, dirty))
    xrays = augment.random_panel(keys[4], xrays, jnp.where(seen, MEASURED_STRENGTH, 1.0) * dirty)
    return batches.Example(
        xrays,
        jnp.where(seen, valid, everywhere),
        intrinsics,
        camera_from_box,
        batch.cloud,
        rigid.inverse(offset),
        target,
    )


def crop(example: batches.Example, size: int) -> batches.Example:
    """Cuts an example's windows to `size` pixels around the box's origin at its pose."""
    cut = jax.vmap(jax.vmap(lambda image, valid, k, E: camera.window(image, valid, k, E, size)))
    place = example.valid, example.intrinsics, example.camera_from_box
    xrays, valid, intrinsics = cut(example.xrays, *place)
    target, _, _ = cut(example.target, *place)
    return dataclasses.replace(example, xrays=xrays, valid=valid, intrinsics=intrinsics, target=target)


def carry(example: batches.Example, motion: Float[Array, "batch 4 4"]) -> batches.Example:
    """The example at its pose moved by `motion`, in the box frame, in the same windows."""
    return dataclasses.replace(
        example,
        camera_from_box=rigid.matmul(example.camera_from_box, motion[:, None]),
        motion=rigid.matmul(rigid.inverse(motion), example.motion),
    )
