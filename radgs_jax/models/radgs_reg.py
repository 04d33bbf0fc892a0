"""RadGS-Reg: RecM and RegM joined, and the registration that iterates them from a start pose."""

import flax.struct
import jax
import jax.numpy as jnp

from radgs_jax import gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.models import recm
from radgs_jax.models import regm
from radgs_jax.models.recm import Reconstruction


def init(config, key, views=2):
    """Fresh parameters {'recm': ..., 'regm': ...} for a `ModelConfig` and so many views, from a PRNG key."""
    size = config.crop_px
    key_rec, key_reg = jax.random.split(key)
    camera_from_box = jnp.broadcast_to(jnp.eye(4).at[2, 3].set(700.0), (1, views, 4, 4))
    intrinsics = jnp.broadcast_to(jnp.asarray([467.0, 467.0, 0.5 * size, 0.5 * size]), (1, views, 4))
    side = round(config.gaussians ** (1 / 3)) + 1
    anchors = jax.tree.map(lambda a: a[None, : config.gaussians], gaussians.uniform_cloud(side, 60.0 / side, 0.02))
    matches = regm.matches_of(anchors, anchors, config) if config.head == "anchored" else None
    return {
        "recm": recm.RecM(config).init(
            key_rec,
            jnp.zeros((1, views, size, size)),
            jnp.ones((1, views, size, size), bool),
            intrinsics,
            camera_from_box,
            anchors,
        ),
        "regm": regm.RegM(config).init(key_reg, anchors, matches, anchors, 1),
    }


@flax.struct.dataclass
class Registration:
    """One registration.

    world_from_box: (4, 4) after the last pass; trajectory: (passes + 1, 4, 4) with the start first; reconstruction: what
    the last pass saw, Gaussians (1, N) in the box frame of `trajectory[-2]`; information: (6, 6) of its matches on the pose,
    in that frame; xrays: (V, H, W) its crops; intrinsics (V, 4).
    """

    world_from_box: jax.Array
    trajectory: jax.Array
    reconstruction: Reconstruction
    information: jax.Array
    xrays: jax.Array
    intrinsics: jax.Array


def iterate(
    params, config, images, valid, intrinsics, camera_from_world, world_from_box, cloud, passes, inner_passes=2
):
    """Iterates RecM and RegM from a start pose; deterministic, of static cost.

    Each pass crops the X-rays at the current pose, reconstructs, registers the CT's Gaussians to the reconstruction, and
    moves the pose by the result.

    Args:
      images: V line-integral images (H_v, W_v), binned to about config.pixel_mm at the isocentre; views may differ in size.
      valid: V arrays (H_v, W_v) bool, the pixels that count.
      intrinsics: (V, 4) of those images; camera_from_world: (V, 4, 4); world_from_box: (4, 4) the start.
      cloud: the CT vertebra's Gaussians (N,), box frame. passes, inner_passes: static counts (RecM, RegM per RecM).
    Returns:
      `Registration`.
    """
    model = recm.RecM(config)
    anchors = jax.tree.map(lambda a: a[None], cloud)

    def one_pass(world_from_box, _):
        camera_from_box = rigid.matmul(camera_from_world, world_from_box)
        xrays, inside, k = camera.windows(images, valid, intrinsics, camera_from_box, config.crop_px)
        reconstruction = model.apply(params["recm"], xrays[None], inside[None], k[None], camera_from_box[None], anchors)
        motion, information = regm.estimate(
            params["regm"], config, reconstruction.effect, reconstruction.matches, anchors, inner_passes
        )
        moved = rigid.matmul(world_from_box, motion[0])
        return moved, (moved, reconstruction, information[0], xrays, k)

    final, (poses, *seen) = jax.lax.scan(one_pass, world_from_box, None, length=passes)
    last = jax.tree.map(lambda a: a[-1], seen)
    return Registration(final, jnp.concatenate([world_from_box[None], poses]), *last)
