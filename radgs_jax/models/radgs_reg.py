"""RadGS-Reg: RecM and RegM joined, and the registration that iterates them from a start pose."""

from collections.abc import Sequence
from typing import Any
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax import gaussians
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.models import recm
from radgs_jax.models import regm
from radgs_jax.models.config import ModelConfig
from radgs_jax.models.recm import Reconstruction


def init(config: ModelConfig, key: jax.Array, views: int = 2) -> dict[str, Any]:
    """Initial parameters {'recm': ..., 'regm': ...} for a number of views, from a PRNG key. They do not depend on the views."""
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
    """One registration by the network.

    Attributes:
      world_from_box: (4, 4) pose after the last pass.
      trajectory: (passes + 1, 4, 4) pose before each pass, and the last one.
      reconstruction: that of the last pass, a batch of 1 in the box frame of `trajectory[-2]`.
      information: (6, 6) of its matches on the pose, in that frame, rad and mm.
      xrays: (V, H, W) windows of the last pass.
      intrinsics: (V, 4) of those windows.
    """

    world_from_box: Leaf
    trajectory: Leaf
    reconstruction: Reconstruction
    information: Leaf
    xrays: Leaf
    intrinsics: Leaf


def iterate(
    params: Any,
    config: ModelConfig,
    images: Sequence[Float[Array, "_ _"]],
    valid: Sequence[Bool[Array, "_ _"]],
    intrinsics: Float[Array, "views 4"],
    camera_from_world: Float[Array, "views 4 4"],
    world_from_box: Float[Array, "4 4"],
    cloud: Gaussians,
    passes: int,
    inner_passes: int = 2,
) -> Registration:
    """Iterates RecM and RegM from a start pose; deterministic, and its cost does not depend on the data.

    Each pass crops the X-rays at the current pose, reconstructs, registers the CT's Gaussians to the reconstruction, and
    moves the pose by the result.

    Args:
      params: in the form of `init`.
      config: sizes of the networks.
      images: line integrals, binned to about `config.pixel_mm` at the isocentre; views may differ in size.
      valid: pixels that may be used.
      intrinsics: of those images.
      world_from_box: start pose.
      cloud: the CT vertebra's Gaussians (N,), box frame.
      passes: number of passes, static.
      inner_passes: number of passes of RegM in each, static.
    """
    model = recm.RecM(config)
    anchors = jax.tree.map(lambda a: a[None], cloud)

    def one_pass(world_from_box, _):
        camera_from_box = rigid.matmul(camera_from_world, world_from_box)
        xrays, inside, k = camera.windows(images, valid, intrinsics, camera_from_box, config.crop_px)
        reconstruction = cast(
            Reconstruction,
            model.apply(params["recm"], xrays[None], inside[None], k[None], camera_from_box[None], anchors),
        )
        motion, information = regm.estimate(
            params["regm"], config, reconstruction.effect, reconstruction.matches, anchors, inner_passes
        )
        moved = rigid.matmul(world_from_box, motion[0])
        return moved, (moved, reconstruction, information[0], xrays, k)

    final, (poses, *seen) = jax.lax.scan(one_pass, world_from_box, None, length=passes)
    last = jax.tree.map(lambda a: a[-1], seen)
    return Registration(cast(jax.Array, final), jnp.concatenate([world_from_box[None], poses]), *last)
