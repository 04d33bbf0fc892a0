"""TS-SAR, reconstructed from its title: a transformer in two steps, with semantic attention and an adaptive loss.

The title is that of Zhao, Niu, Zhu, Deng, Zhang and Zou, "Automatic 2D/3D spine registration based on two-step transformer with
semantic attention and adaptive multi-dimensional loss function", Biomed. Signal Process. Control 95 (2024) 106384. We know neither
its text nor any code of it, so that everything here is our choice, and the row of a table must say so:

- Two steps: two networks, each on windows at the pose before it, the first with a coarse grid around the vertebra, the second with
  a fine one in its middle. Nothing refines the pose after them.
- Transformer: features of each view are read where the grid's points project to, and those of all views are joined to one X-ray
  token per point ("lift"). The CT's density there gives the CT tokens. These attend to each other and to the X-ray tokens near
  them. Each votes for the shift of its point, which begins as that to the mean place it attends to; the motion fits all votes.
  Without nearness and with a perceptron on the tokens' mean, which forgets what moved where, nothing was learned.
- Semantic attention: the encoders also segment the vertebra. The product of the views' probabilities at a point is a bias on the
  attention to its X-ray token, so that votes begin as shifts to the vertebra that the views see.
- Adaptive multi-dimensional loss: errors of pose, volume, projection and segmentation, weighted by learned log scales.
"""

import dataclasses
import functools
import math
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
from radgs_jax.baselines import plain
from radgs_jax.baselines import refiners
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import grid
from radgs_jax.geometry import rigid
from radgs_jax.geometry.grid import VoxelGrid
from radgs_jax.models import activation
from radgs_jax.models import backbones
from radgs_jax.models import heads
from radgs_jax.models import matching
from radgs_jax.models import recm
from radgs_jax.models.config import ModelConfig
from radgs_jax.registration.gauss_newton import LevelViews
from radgs_jax.training import batches
from radgs_jax.training import examples
from radgs_jax.training import update

GRID_BLUR = 0.5
"""Standard deviation by which the CT is blurred before a grid samples it, in the grid's spacings. Chosen by hand: at half, bone
between two points is missed; at twice, neighbouring points say the same."""
WAVES = 4.0
"""Shortest wave of the sine positions, in the grid's spacings; the longest is this times the grid's side. Chosen by hand: at half,
neighbouring points have opposite signs; at twice, they differ little."""
MIN_PROBABILITY = 1e-3
"""Added to probabilities in the bias of the semantic attention. Chosen by hand: a point outside the vertebra weighs a thousandth;
half and twice make it half and twice that."""
REACH = 1.0
"""Standard deviation of attention around a CT token at the start, in the grid's spacings. Chosen by hand: at half, it is on little
but the token's own point; at twice, on most of a grid of six."""
MIN_AMOUNT = 1e-2
"""Added to a point's density, in units of `activation.DENSITY_UNIT`, when votes are weighted by it. Chosen by hand: a point in air
begins with about a hundredth of the weight of one in bone; half and twice make it half and twice that."""
TERMS = (("rotation", 5.0), ("translation", 5.0), ("volume", 0.2), ("projection", 0.05), ("segmentation", 1.0))
"""Terms of the loss (mm at `rigid.LEVER_MM`, mm, `losses.ncc3d`, line integral, no unit), and the scale of each at the start, whose
logarithm is learned. Chosen by hand, about the terms' values then, so that each counts alike: AdamW changes a logarithm by less
than 1 in a short training. At half and twice, a term counts twice and half at first."""
STEPS = "coarse", "fine"
"""Names of both steps, in their order."""

Images = Float[Array, "batch views height width"]
Pixels = Bool[Array, "batch views height width"]
Tokens = Float[Array, "batch tokens width"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of both networks and their training. Windows have the size and resolution of the `ModelConfig`.

    Attributes:
      side: points along each axis of a step's grid.
      extents_mm: side of each step's grid, mm.
      levels, blocks: channels and number of residual blocks of the encoders at strides 2, 4, 8; channels: of features.
      width, heads, layers: of the transformer, whose layers have attention to the CT and to the X-rays each.
      views: number of views; each has its own encoders.
      steps, batch, rate: of the training: its number of steps, examples per step, and peak learning rate.
    """

    side: int = 6
    extents_mm: tuple[float, float] = (96.0, 48.0)
    levels: tuple[int, int, int] = (24, 48, 64)
    blocks: tuple[int, int, int] = (0, 1, 2)
    channels: int = 48
    width: int = 64
    heads: int = 4
    layers: int = 2
    views: int = 2
    steps: int = 1500
    batch: int = 8
    rate: float = 1e-3


QUICK = Config(steps=750)
"""Half the steps."""
ORIGINAL = Config(side=12, width=384, heads=6, layers=6, steps=15000)
"""For an accelerator, with windows of 128 pixels of 0.75 mm as in `configs.PAPER`, whose patient training has about as many steps.
The article's own sizes are unknown."""


def points_of(config: Config, step: int) -> VoxelGrid:
    """The grid of a step (0 or 1), in the box's frame."""
    return grid.centred((config.side,) * 3, config.extents_mm[step] / config.side)


def places(points: VoxelGrid) -> Float[Array, "points 3"]:
    """The grid's points in its frame, mm, in the order of a flattened volume."""
    return rigid.apply(points.frame_from_index, jnp.indices(points.shape).reshape(3, -1).T)


def density(cloud: Gaussians, config: Config, step: int) -> Float[Array, "batch x y z"]:
    """Density of Gaussians (B, N) on a step's grid, 1/mm, blurred by `GRID_BLUR`."""
    sigma_mm = GRID_BLUR * config.extents_mm[step] / config.side
    return gaussians.voxelize(gaussians.blur(cloud, sigma_mm), points_of(config, step))


def sine_positions(side: int, width: int) -> Float[jax.Array, "points width"]:
    """Sines and cosines along each axis of a cubic grid, in geometric wavelengths, zeros in the channels that are left over."""
    count = width // 6
    waves = WAVES * side ** (jnp.arange(count) / max(1, count - 1))
    index = jnp.indices((side,) * 3).reshape(3, -1).T
    phase = (2 * math.pi * index[..., None] / waves).reshape(len(index), -1)
    found = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1)
    return jnp.pad(found, [(0, 0), (0, width - found.shape[-1])])


def lift(
    maps: Float[Array, "batch views h w channels"], uv: Float[Array, "batch views points 2"], valid: Pixels
) -> Float[jax.Array, "batch views points channels"]:
    """Reads maps of an image at pixels of it, bilinearly; zero outside the image, and by share where its pixels do not count."""
    height, width = valid.shape[-2:]
    weights = heads.sampling_weights(uv, (height, width), maps.shape[2:4])
    counts = camera.bin_image(valid, height // maps.shape[2]).reshape(*valid.shape[:2], -1)
    inside = jnp.all((uv > -0.5) & (uv < jnp.asarray([width, height]) - 0.5), -1)
    weights = weights * (counts[:, :, None] * inside[..., None])
    return jnp.einsum("bvnp,bvpc->bvnc", weights, maps.reshape(*maps.shape[:2], -1, maps.shape[-1]))


def semantic_bias(probability: Float[Array, "batch views points"]) -> Float[jax.Array, "batch points"]:
    """Bias on the attention to the X-ray token of a point: the log probability that all views see the vertebra there."""
    return jnp.log(jnp.prod(probability, 1) + MIN_PROBABILITY)


class Encoder(nn.Module):
    """Features and segmentation of one view."""

    config: Config

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width c"]) -> tuple[jax.Array, Float[jax.Array, "batch h w"]]:
        """Features (B, h, w, channels) at stride 8, and logits of the vertebra at stride 4."""
        c = self.config
        features = backbones.SmallCNN(c.levels, c.blocks, 2, c.channels, pyramid=False)(image)
        logits = nn.Dense(4)(nn.relu(nn.Conv(c.channels, (3, 3))(nn.relu(features))))
        height, width = logits.shape[1:3]
        logits = logits.reshape(-1, height, width, 2, 2).swapaxes(2, 3).reshape(-1, 2 * height, 2 * width)
        return cast(jax.Array, features), logits


class CrossLayer(nn.Module):
    """Attention of a grid's tokens to others of it, weighted by a Gaussian of their distance with a learned reach for each head,
    and a perceptron; otherwise as `backbones.TransformerLayer`."""

    heads: int
    mlp: int

    @nn.compact
    def __call__(
        self, x: Tokens, others: Tokens, bias: Float[Array, "batch tokens"], at: Float[Array, "tokens 3"]
    ) -> tuple[Tokens, Float[jax.Array, "batch tokens heads 3"]]:
        """Tokens after attention, and the mean shift to what each head of a token attends to.

        Args:
          bias: on the attention to each of the others.
          at: the points, in any unit; `REACH` and the shifts are in the same.
        """
        shape = self.heads, x.shape[-1] // self.heads
        query, others = nn.DenseGeneral(shape)(nn.LayerNorm()(x)), nn.LayerNorm()(others)
        key, value = nn.DenseGeneral(shape)(others), nn.DenseGeneral(shape)(others)
        log_reach = self.param("log_reach", nn.initializers.constant(math.log(REACH)), (self.heads,))
        apart = jnp.sum((at[:, None] - at) ** 2, -1) * jnp.exp(-2.0 * log_reach)[:, None, None]
        there = jnp.broadcast_to(at[:, None], (*value.shape[:3], 3))
        bias = bias[:, None, None] - 0.5 * apart
        found = nn.dot_product_attention(query, key, jnp.concatenate([value, there], -1), bias)
        value, shift = found[..., :-3], found[..., -3:] - at[:, None]
        x = x + nn.DenseGeneral(x.shape[-1], (-2, -1))(value) + nn.DenseGeneral(x.shape[-1], (-2, -1))(shift)
        y = nn.gelu(nn.Dense(self.mlp)(nn.LayerNorm()(x)), approximate=False)
        return x + nn.Dense(x.shape[-1])(y), shift


class Step(nn.Module):
    """The network of one step (0 or 1)."""

    config: Config
    step: int

    @nn.compact
    def __call__(
        self,
        xrays: Images,
        valid: Pixels,
        intrinsics: Float[Array, "batch views 4"],
        camera_from_box: Float[Array, "batch views 4 4"],
        cloud: Gaussians,
    ) -> tuple[Float[jax.Array, "batch 4 4"], Float[jax.Array, "batch views h w"]]:
        """The CT's motion in the box frame, and logits of the vertebra; arguments are those of `recm.RecM`.

        Raises:
          ValueError: another number of views than the config's, or windows that the stride of 8 does not divide.
        """
        c, (count, views, height, width) = self.config, xrays.shape
        if views != c.views or height % 8 or width % 8:
            raise ValueError(f"TS-SAR: found {views} views of {height} x {width}, wanted {c.views} and multiples of 8")
        prior = gaussians.project(gaussians.views(cloud, views), camera_from_box, intrinsics, height, width)
        channels = recm.image_channels(xrays, valid, prior, intrinsics, camera_from_box)
        answers = [Encoder(c)(channels[:, view]) for view in range(views)]
        features, logits = (jnp.stack(parts, 1) for parts in zip(*answers))
        at, spacing_mm = places(points_of(c, self.step)), c.extents_mm[self.step] / c.side
        uv = camera.project_camera(intrinsics, rigid.apply(camera_from_box, at))
        probability = lift(nn.sigmoid(logits)[..., None], uv, valid)
        read = jnp.concatenate([lift(features, uv, valid), probability], -1)
        bias, position = semantic_bias(probability[..., 0]), sine_positions(c.side, c.width)
        seen = nn.Dense(c.width)(jnp.concatenate([read[:, view] for view in range(views)], -1)) + position
        # Attention averages linear maps of its tokens, so that what a shift means at its place has to be said before.
        seen = seen + nn.Dense(c.width)(nn.gelu(seen))
        amount = density(cloud, c, self.step).reshape(count, -1, 1) / activation.DENSITY_UNIT
        x, shift = nn.Dense(c.width)(amount) + position, jnp.zeros(())
        for _ in range(c.layers):
            x = backbones.TransformerLayer(c.heads, 2 * c.width)(x)
            x, shift = CrossLayer(c.heads, 2 * c.width)(x, seen, bias, at / spacing_mm)
        x = jnp.concatenate([nn.LayerNorm()(x), shift.reshape(*x.shape[:2], -1)], -1)
        small = nn.initializers.variance_scaling(heads.START_SCALE, "fan_in", "truncated_normal")
        answer = nn.Dense(4, kernel_init=small)(nn.relu(nn.Dense(c.width)(x)))
        gain = self.param("gain", nn.initializers.constant(1.0 / c.heads), (c.heads,))
        votes = spacing_mm * jnp.einsum("bnhk,h->bnk", shift, gain) + plain.OUTPUT_MM * answer[..., :3]
        weights = nn.softmax(answer[..., 3] + jnp.log(amount[..., 0] + MIN_AMOUNT))
        source = jnp.broadcast_to(at, votes.shape)
        matches = matching.Matches(source, source + votes, weights[..., None, None] * jnp.eye(3))
        return matching.align(matches)[0], logits


def init(config: Config, model_config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Initial parameters {'ts_sar': ...} from a PRNG key, for the windows of a `ModelConfig`."""
    views = 1, config.views
    images = jnp.zeros((*views, model_config.crop_px, model_config.crop_px))
    camera_from_box = jnp.tile(jnp.eye(4).at[2, 3].set(700.0), (*views, 1, 1))
    cloud = jax.tree.map(lambda a: a[None], gaussians.uniform_cloud(2, 8.0, 0.02))
    inputs = images, images == 0, jnp.ones((*views, 4)), camera_from_box, cloud
    found: dict[str, Any] = {
        name: Step(config, step).init(jax.random.fold_in(key, step), *inputs) for step, name in enumerate(STEPS)
    }
    found["log_scales"] = jnp.tile(jnp.log(jnp.asarray([scale for _, scale in TERMS])), (len(STEPS), 1))
    return {"ts_sar": found}


def adaptive(terms: Float[Array, " terms"], log_scales: Float[Array, " terms"]) -> Float[jax.Array, ""]:
    """Sum of exp(-s) L + s over terms L and their log scales s, which is least at s = log L."""
    return jnp.sum(jnp.exp(-log_scales) * terms + log_scales)


def _terms(motion, logits, example, config, step):
    """The `TERMS` (5,) of a step's answer, for an example at the pose that the step started from."""
    truth, (_, views, height, width) = example.motion, example.target.shape
    moved, there = (gaussians.move(example.cloud, pose) for pose in (motion, truth))
    image = gaussians.project(gaussians.views(moved, views), example.camera_from_box, example.intrinsics, height, width)
    return jnp.stack(
        [
            rigid.LEVER_MM * jnp.mean(rigid.rotation_angle(motion[:, :3, :3], truth[:, :3, :3])),
            losses.geodesic(motion, truth, lever_mm=0.0),
            losses.ncc3d(density(moved, config, step), density(there, config, step)),
            losses.l1(jnp.where(example.valid, image, 0.0), jnp.where(example.valid, example.target, 0.0)),
            losses.segmentation(logits, example.target > refiners.SILHOUETTE, example.valid),
        ]
    )


def loss(
    params: Any,
    key: jax.Array,
    batch: batches.PairBatch,
    config: Config,
    model_config: ModelConfig,
    strength: float = 1.0,
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
    """The `adaptive` losses of both steps, and by name the error of the start, of each step, and the second step's terms.

    The second step starts where the first one leaves the vertebra, but does not train it. Panels are drawn once, for windows of the
    batch's size at the start pose; each step's windows are cut from these.

    Args:
      strength: of the drawn panels.
    """
    wide_config = dataclasses.replace(model_config, crop_px=batch.rest.shape[-1])
    wide = examples.make_example(key, batch, wide_config, strength)
    total, found = jnp.zeros(()), {"start_mm": losses.geodesic(jnp.eye(4), wide.motion)}
    for step, name in enumerate(STEPS):
        seen = examples.crop(wide, model_config.crop_px)
        inputs = seen.xrays, seen.valid, seen.intrinsics, seen.camera_from_box, seen.cloud
        motion, logits = cast(Any, Step(config, step).apply(params["ts_sar"][name], *inputs))
        terms = _terms(motion, logits, seen, config, step)
        total = total + adaptive(terms, params["ts_sar"]["log_scales"][step])
        found[f"{name}_mm"] = losses.geodesic(motion, seen.motion)
        wide = examples.carry(wide, jax.lax.stop_gradient(motion))
    return total, {**found, "pose_mm": found["fine_mm"], **dict(zip([term for term, _ in TERMS], terms))}


@functools.cache
def make_update(mesh: jax.sharding.Mesh, config: Config, model_config: ModelConfig) -> Callable[..., Any]:
    """`update.update_of` for this network's `loss`."""
    return update.update_of(mesh, functools.partial(loss, config=config, model_config=model_config), ("ts_sar",))


@functools.partial(jax.jit, static_argnames=("config", "model_config"))
def register(
    params: Any,
    config: Config,
    model_config: ModelConfig,
    seen: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    world_from_box: Float[Array, "4 4"],
    cloud: Gaussians,
) -> Float[jax.Array, "4 4"]:
    """The pose after both steps, world_from_box, each on the windows at the pose before it.

    Args:
      seen: X-rays at the model's resolution.
      world_from_box: start pose.
      cloud: the CT vertebra's Gaussians (N,), box frame.
    """
    clouds, pose = jax.tree.map(lambda a: a[None], cloud), jnp.asarray(world_from_box)
    for step, name in enumerate(STEPS):
        camera_from_box = rigid.matmul(camera_from_world, pose)
        crops = camera.windows(seen.images, seen.valid, seen.intrinsics, camera_from_box, model_config.crop_px)
        inputs = *(a[None] for a in crops), camera_from_box[None], clouds
        motion, _ = cast(Any, Step(config, step).apply(params["ts_sar"][name], *inputs))
        pose = rigid.matmul(pose, motion[0])
    return pose
