"""A plain 2D network: each view's picture to a twist of its own, fused by what each says that it knows. No Gaussians, no attention.

What the 3D road is measured against: the same crops, starts, detectors and passes, a regression where RadGS-Reg reconstructs.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from radgs_jax import gaussians
from radgs_jax import losses
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.models import backbones
from radgs_jax.models import heads
from radgs_jax.models import recm
from radgs_jax.models.config import ModelConfig
from radgs_jax.training import examples
from radgs_jax.training import update

STEP_MM = 10.0
"""What an output of 1 means: mm, and mm at the lever."""


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """widths, blocks: channels and residual blocks at strides 2, 4, 8; hidden: of dense layers; views: each has its own weights."""

    widths: tuple = (32, 64, 96)
    blocks: tuple = (1, 1, 2)
    hidden: int = 128
    views: int = 2


class View(nn.Module):
    """One view: (B, H, W, C) to a twist and its log precisions (B, 6), in the view's axes, and the vertebra alone (B, H, W)."""

    config: PlainConfig

    @nn.compact
    def __call__(self, channels):
        c, levels = self.config, []
        x = backbones.space_to_depth(channels, 2)
        for level, (width, count) in enumerate(zip(c.widths, c.blocks)):
            x = nn.relu(nn.Conv(width, (2, 2), (2, 2))(x) if level else nn.Conv(width, (3, 3))(x))
            for _ in range(count):
                x = backbones.ResidualBlock()(x)
            levels.append(x)
        code = nn.relu(nn.Dense(c.hidden)(x.reshape(x.shape[0], -1)))
        small = nn.initializers.variance_scaling(0.05, "fan_in", "truncated_normal")
        twist, log_precision = jnp.split(nn.Dense(12, kernel_init=small)(nn.relu(nn.Dense(c.hidden)(code))), 2, -1)
        up = nn.Dense(4 * 16)(levels[0])
        for level in levels[1:]:
            up = up + jax.image.resize(nn.Dense(4 * 16)(level), up.shape, "linear")
        up = nn.Dense(4)(nn.relu(nn.Conv(16, (3, 3))(nn.relu(up))))
        height, width = up.shape[1:3]
        image = up.reshape(-1, height, width, 2, 2).swapaxes(2, 3).reshape(-1, 2 * height, 2 * width)
        return STEP_MM * twist, jnp.clip(log_precision, -6.0, 6.0) - 2.0, image


class Plain(nn.Module):
    """Both views, and the least squares of their twists."""

    config: PlainConfig

    @nn.compact
    def __call__(self, xrays, valid, intrinsics, camera_from_box, cloud):
        """Arguments as `recm.RecM`: the CT's motion (B, 4, 4) in the box frame and the vertebra alone (B, V, H, W).

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


def fuse(twists, log_precisions, rotation):
    """The motion (B, 4, 4) about the box's origin that least squares makes of the views' twists.

    Args:
      twists, log_precisions: (B, V, 6) rotation (mm at the lever) and translation (mm) in a view's axes, log 1/mm^2;
      rotation: (B, V, 3, 3) view_from_box.
    """
    zero = jnp.zeros_like(rotation)
    both = jnp.concatenate([jnp.concatenate([rotation, zero], -1), jnp.concatenate([zero, rotation], -1)], -2)
    precision = jnp.exp(log_precisions)
    normal = jnp.einsum("bvij,bvi,bvik->bjk", both, precision, both) + 1e-3 * jnp.eye(6)
    right = jnp.einsum("bvij,bvi,bvi->bj", both, precision, twists)
    twist = jnp.linalg.solve(normal, right[..., None])[..., 0] * jnp.asarray(rigid.TWIST_SCALE)
    return rigid.motion_about(jnp.zeros(3), twist)


def init(config, model_config, key):
    """Fresh parameters {'plain': ...} from a PRNG key, for the crops of a `ModelConfig`."""
    shape = (1, config.views, model_config.crop_px, model_config.crop_px)
    camera_from_box = jnp.broadcast_to(jnp.eye(4).at[2, 3].set(700.0), (*shape[:2], 4, 4))
    cloud = jax.tree.map(lambda a: a[None], gaussians.uniform_cloud(2, 8.0, 0.02))
    intrinsics = jnp.broadcast_to(jnp.asarray([467.0, 467.0, 32.0, 32.0]), (*shape[:2], 4))
    return {
        "plain": Plain(config).init(key, jnp.zeros(shape), jnp.ones(shape, bool), intrinsics, camera_from_box, cloud)
    }


def loss(params, key, batch, config, model_config, strength=1.0):
    """Twist error, less where the start is far, plus the L1 of the vertebra alone; scalar and a dict of its parts.

    Args:
      batch: `batches.PairBatch`; strength: of the drawn detectors.
    """
    example = examples.make_example(key, batch, model_config, strength)
    motion, images = Plain(config).apply(
        params["plain"],
        example.xrays,
        example.valid,
        example.intrinsics,
        example.camera_from_box,
        example.cloud,
    )
    pose = losses.pose_from_start(motion, example.motion)
    image = losses.l1(jnp.where(example.valid, images, 0.0), jnp.where(example.valid, example.target, 0.0))
    return pose + image, {"pose_mm": losses.geodesic(motion, example.motion), "image_l1": image}


@functools.cache
def make_update(mesh, config, model_config: ModelConfig):
    """`update.update_of` this network's `loss`."""
    return update.update_of(mesh, functools.partial(loss, config=config, model_config=model_config), ("plain",))


@functools.partial(jax.jit, static_argnames=("config", "model_config", "passes"))
def register_plain(params, config, model_config, seen, camera_from_world, world_from_box, cloud, passes):
    """Several passes from a start pose, each from the crops at the pose before it.

    Args:
      seen: `gauss_newton.LevelViews` at the model's resolution; camera_from_world: (V, 4, 4); world_from_box: (4, 4) the start;
        cloud: the CT vertebra's Gaussians (N,), box frame; passes: static count.
    Returns:
      world_from_box after each pass, the start first: (passes + 1, 4, 4).
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
