"""A plain 2D network: each view is regressed to a twist with precisions, and these are fused. No Gaussians, no attention.

It has the same windows, starts, panel augmentation and passes as RadGS-Reg, with a regression in place of the reconstruction.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax import losses
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.models import backbones
from radgs_jax.models import heads
from radgs_jax.models import recm
from radgs_jax.models.config import ModelConfig
from radgs_jax.registration.gauss_newton import LevelViews
from radgs_jax.training import batches
from radgs_jax.training import examples
from radgs_jax.training import update

OUTPUT_MM = 10.0
"""Motion per unit of output, mm, rotations by the lever; as `activation.ANCHORED_STEP_MM`, for comparison."""
DECODER_WIDTH = 16
"""Channels of the decoder that draws the vertebra alone. Chosen by hand; half is less expressive, twice costs twice its time."""
MIN_INFORMATION = 1e-3
"""Information added to every part of a twist when views are fused, 1/mm^2; as `heads.MIN_INFORMATION`, for comparison."""


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """Sizes of the plain network, chosen by hand to be near those of RadGS-Reg.

    Attributes:
      widths, blocks: channels and number of residual blocks at strides 2, 4, 8.
      hidden: width of the dense layers.
      views: number of views; each has its own weights.
    """

    widths: tuple[int, ...] = (32, 64, 96)
    blocks: tuple[int, ...] = (1, 1, 2)
    hidden: int = 128
    views: int = 2


class View(nn.Module):
    """The network of one view."""

    config: PlainConfig

    @nn.compact
    def __call__(
        self, channels: Float[Array, "batch height width c"]
    ) -> tuple[Float[jax.Array, "batch 6"], Float[jax.Array, "batch 6"], Float[jax.Array, "batch height width"]]:
        """A twist (mm, rotations by the lever) in the view's axes, its log precisions, and the vertebra alone."""
        c, levels = self.config, []
        x = backbones.space_to_depth(channels, 2)
        for level, (width, count) in enumerate(zip(c.widths, c.blocks)):
            x = nn.relu(nn.Conv(width, (2, 2), (2, 2))(x) if level else nn.Conv(width, (3, 3))(x))
            for _ in range(count):
                x = backbones.ResidualBlock()(x)
            levels.append(x)
        code = nn.relu(nn.Dense(c.hidden)(x.reshape(x.shape[0], -1)))
        small = nn.initializers.variance_scaling(heads.START_SCALE, "fan_in", "truncated_normal")
        twist, log_precision = jnp.split(nn.Dense(12, kernel_init=small)(nn.relu(nn.Dense(c.hidden)(code))), 2, -1)
        up = nn.Dense(4 * DECODER_WIDTH)(levels[0])
        for level in levels[1:]:
            up = up + jax.image.resize(nn.Dense(4 * DECODER_WIDTH)(level), up.shape, "linear")
        up = nn.Dense(4)(nn.relu(nn.Conv(DECODER_WIDTH, (3, 3))(nn.relu(up))))
        height, width = up.shape[1:3]
        image = up.reshape(-1, height, width, 2, 2).swapaxes(2, 3).reshape(-1, 2 * height, 2 * width)
        twist = OUTPUT_MM * twist
        log_precision = jnp.clip(log_precision, -recm.MAX_LOG_PRECISION, recm.MAX_LOG_PRECISION)
        return twist, log_precision - recm.LOG_PRECISION_OFFSET, image


class Plain(nn.Module):
    """All views, and the least squares of their twists."""

    config: PlainConfig

    @nn.compact
    def __call__(
        self,
        xrays: Float[Array, "batch views height width"],
        valid: Bool[Array, "batch views height width"],
        intrinsics: Float[Array, "batch views 4"],
        camera_from_box: Float[Array, "batch views 4 4"],
        cloud: Gaussians,
    ) -> tuple[Float[jax.Array, "batch 4 4"], Float[jax.Array, "batch views height width"]]:
        """The CT's motion in the box frame and the vertebra alone; arguments are those of `recm.RecM`.

        Raises:
          ValueError: another number of views than the config's.
        """
        views, height, width = xrays.shape[1:]
        if views != self.config.views:
            raise ValueError(f"Plain: found {views} views, wanted {self.config.views}")
        prior = gaussians.project(gaussians.views(cloud, views), camera_from_box, intrinsics, height, width)
        channels = recm.image_channels(xrays, valid, prior, intrinsics, camera_from_box)
        answers = [View(self.config)(channels[:, view]) for view in range(views)]
        twists, log_precisions, images = (jnp.stack(parts, 1) for parts in zip(*answers))
        return fuse(twists, log_precisions, heads.view_from_box(camera_from_box)), images


def fuse(
    twists: Float[Array, "batch views 6"],
    log_precisions: Float[Array, "batch views 6"],
    rotation: Float[Array, "batch views 3 3"],
) -> Float[jax.Array, "batch 4 4"]:
    """Fuses the views' twists to one motion about the box's origin, by least squares.

    Args:
      twists: rotation (mm, by the lever) and translation (mm) in a view's axes.
      log_precisions: of each part of a twist, log 1/mm^2.
      rotation: view_from_box.
    """
    zero = jnp.zeros_like(rotation)
    both = jnp.concatenate([jnp.concatenate([rotation, zero], -1), jnp.concatenate([zero, rotation], -1)], -2)
    precision = jnp.exp(log_precisions)
    normal = jnp.einsum("bvij,bvi,bvik->bjk", both, precision, both) + MIN_INFORMATION * jnp.eye(6)
    right = jnp.einsum("bvij,bvi,bvi->bj", both, precision, twists)
    twist = jnp.linalg.solve(normal, right[..., None])[..., 0] * jnp.asarray(rigid.TWIST_SCALE)
    return rigid.motion_about(jnp.zeros(3), twist)


def init(config: PlainConfig, model_config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Initial parameters {'plain': ...} from a PRNG key, for the windows of a `ModelConfig`."""
    shape = (1, config.views, model_config.crop_px, model_config.crop_px)
    camera_from_box = jnp.broadcast_to(jnp.eye(4).at[2, 3].set(700.0), (*shape[:2], 4, 4))
    cloud = jax.tree.map(lambda a: a[None], gaussians.uniform_cloud(2, 8.0, 0.02))
    intrinsics = jnp.broadcast_to(jnp.asarray([467.0, 467.0, 32.0, 32.0]), (*shape[:2], 4))
    return {
        "plain": Plain(config).init(key, jnp.zeros(shape), jnp.ones(shape, bool), intrinsics, camera_from_box, cloud)
    }


def loss(
    params: Any,
    key: jax.Array,
    batch: batches.PairBatch,
    config: PlainConfig,
    model_config: ModelConfig,
    strength: float = 1.0,
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
    """Pose error (`losses.pose_from_start`) plus the L1 of the vertebra alone, and both by name.

    Args:
      strength: of the drawn panels.
    """
    example = examples.make_example(key, batch, model_config, strength)
    motion, images = cast(
        tuple[jax.Array, jax.Array],
        Plain(config).apply(
            params["plain"],
            example.xrays,
            example.valid,
            example.intrinsics,
            example.camera_from_box,
            example.cloud,
        ),
    )
    pose = losses.pose_from_start(motion, example.motion)
    image = losses.l1(jnp.where(example.valid, images, 0.0), jnp.where(example.valid, example.target, 0.0))
    return pose + image, {"pose_mm": losses.geodesic(motion, example.motion), "image_l1": image}


@functools.cache
def make_update(mesh: jax.sharding.Mesh, config: PlainConfig, model_config: ModelConfig) -> Callable[..., Any]:
    """`update.update_of` for this network's `loss`."""
    return update.update_of(mesh, functools.partial(loss, config=config, model_config=model_config), ("plain",))


@functools.partial(jax.jit, static_argnames=("config", "model_config", "passes"))
def register_plain(
    params: Any,
    config: PlainConfig,
    model_config: ModelConfig,
    seen: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    world_from_box: Float[Array, "4 4"],
    cloud: Gaussians,
    passes: int,
) -> Float[jax.Array, "poses 4 4"]:
    """Runs several passes from a start pose, each on the windows at the pose before it.

    Args:
      seen: X-rays at the model's resolution.
      world_from_box: start pose.
      cloud: the CT vertebra's Gaussians (N,), box frame.
      passes: number of passes, static.

    Returns:
      world_from_box: the start, then the pose after each pass.
    """
    anchors = jax.tree.map(lambda a: a[None], cloud)

    def one_pass(pose, _):
        camera_from_box = rigid.matmul(camera_from_world, pose)
        crops = camera.windows(seen.images, seen.valid, seen.intrinsics, camera_from_box, model_config.crop_px)
        xrays, valid, intrinsics = (a[None] for a in crops)
        motion, _ = Plain(config).apply(params["plain"], xrays, valid, intrinsics, camera_from_box[None], anchors)
        moved = rigid.matmul(pose, motion[0])
        return moved, moved

    _, poses = jax.lax.scan(one_pass, world_from_box, None, length=passes)
    return jnp.concatenate([world_from_box[None], poses])
