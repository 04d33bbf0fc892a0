"""R2-Gaussian: Gaussians that are fitted to X-rays by a rasteriser with the right integral along rays.

It follows Zha et al., "R2-Gaussian", NeurIPS 2024, and its public code (Ruyi-Zha/r2_gaussian, fc2bcad): one view a step, drawn
without replacement until all have been seen; L1, SSIM and the total variation of a random sub-box; Adam; clones, splits and
pruning (`adaptive`). Lengths are in half boxes and densities in `box.UNIT_DENSITY`, so its rates and thresholds hold.

What differs: our projection is exact for a cone beam, where its rasteriser is affine; SSIM counts windows of valid pixels alone
and is not padded with zeros; a view sees a Gaussian where it gives it a gradient; the cloud has a capacity. The public start from a
filtered backprojection needs many views, so ours is its other one, uniform at random, with densities up to 0.05, not 1.0: two
views never clear the haze of the latter. With two views an epoch has two steps; steps are kept, not epochs. A step has one view,
also with two, as published: its moments average over views, and a step costs the same for any number of them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax import gaussians
from radgs_jax import losses
from radgs_jax.baselines import adaptive
from radgs_jax.baselines import box
from radgs_jax.baselines.box import BodyConfig
from radgs_jax.baselines.box import BoxViews
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import grid
from radgs_jax.geometry import rigid

RATES = {"mean": (2e-4, 2e-5), "density": (0.01, 0.001), "scale": (5e-3, 5e-4), "quaternion": (1e-3, 1e-4)}
"""Adam's rates at the first and the last step, of parameters before activation: R2-Gaussian's."""
RULE = adaptive.Rule(threshold=5e-5, clone_scale=0.2, kept=0.5, min_density=1e-5, reach=1.0)
"""R2-Gaussian's, with the scene's units: the mean gradient in normalised image coordinates, and a tenth of the box's side."""
SCALES = (0.001, 1.0)
"""Smallest and largest scale: R2-Gaussian's 0.0005 and 0.5 of the box's side."""
SCALE_MARGIN = 1e-5
"""Distance that scales keep from `SCALES` when they are inverted: R2-Gaussian's."""
SSIM_WEIGHT, TV_WEIGHT = 0.25, 0.05
"""Of the terms beside L1: R2-Gaussian's; its total variation is the mean over the three axes."""
SSIM_WINDOW = 11
"""Side of SSIM's window, pixels: Wang et al.'s, also R2-Gaussian's."""
TV_SIDE = 32
"""Side of the sub-box whose total variation is taken, voxels of a result: R2-Gaussian's."""
VOXEL_MM = box.BOX_MM / box.SIDE
"""Side of a voxel of a result, mm."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the defaults are for a CPU.

    Attributes:
      gaussians: number at the start; capacity: largest number.
      density: largest at the start, in `box.UNIT_DENSITY`; the public code's is 1.0.
      steps: number of steps, a multiple of `interval`.
      interval: steps between rounds of densification.
      densify: steps after which rounds begin and before which they end.
      pace: factor on `RATES`, for fewer steps than the 30,000 that they are for. Chosen by hand: 30 views of a phantom are fitted
        4 dB better than at 1.
      published_tv: the public code's gradient of total variation with respect to means, which is too small by the square of a
        voxel's side in half boxes.
      body: the voxels around the box; None for a vertebra in air.
    """

    gaussians: int = 4000
    capacity: int = 8000
    density: float = 0.05
    steps: int = 2500
    interval: int = 100
    densify: tuple[int, int] = (500, 1250)
    pace: float = 3.0
    published_tv: bool = False
    body: BodyConfig | None = None


QUICK = Config(steps=1200, densify=(200, 600))
"""About half the steps."""
ORIGINAL = Config(gaussians=50_000, capacity=500_000, steps=30_000, densify=(500, 15_000), pace=1.0)
"""R2-Gaussian's sizes and steps."""


@flax.struct.dataclass
class State:
    """What a fit carries on.

    Attributes:
      params: `box.parameters`; opt_state: of `optimiser`.
      alive: (C,) bool.
      steepness: (C,) sum of the sizes of gradients since the last round; seen: (C,) number of views in it.
    """

    params: Any
    opt_state: Any
    alive: Leaf
    steepness: Leaf
    seen: Leaf


def activate(raw: Mapping[str, Array], alive: Bool[Array, " slots"]) -> Gaussians:
    """Gaussians in the scene's units."""
    low, high = SCALES
    quaternion = raw["quaternion"] / jnp.linalg.norm(raw["quaternion"], axis=-1, keepdims=True)
    scale = low + (high - low) * jax.nn.sigmoid(raw["scale"])
    return adaptive.only_alive(
        Gaussians(jax.nn.softplus(raw["density"]), jnp.asarray(raw["mean"]), scale, quaternion), alive
    )


def deactivate(cloud: Gaussians) -> dict[str, jax.Array]:
    """Inverse of `activate`, of scales within `SCALES`."""
    (low, high), margin = SCALES, SCALE_MARGIN
    share = (jnp.clip(cloud.scale, low + margin, high - margin) - low) / (high - low)
    density = cloud.density + jnp.log(-jnp.expm1(-cloud.density))
    return {
        "density": density,
        "mean": cloud.mean,
        "scale": jax.scipy.special.logit(share),
        "quaternion": cloud.quaternion,
    }


def in_mm(cloud: Gaussians) -> Gaussians:
    """A cloud of the scene's units in mm and 1/mm."""
    return Gaussians(
        cloud.density * box.UNIT_DENSITY, cloud.mean * box.UNIT_MM, cloud.scale * box.UNIT_MM, cloud.quaternion
    )


def sub_box_variation(cloud: Gaussians, key: jax.Array, published: bool) -> Float[jax.Array, ""]:
    """Total variation of a random sub-box, a mean over axes, in the scene's units.

    Args:
      published: as `Config.published_tv`.
    """
    if published:
        fixed = jax.lax.stop_gradient(cloud.mean)
        cloud = dataclasses.replace(cloud, mean=fixed + (VOXEL_MM / box.UNIT_MM) ** 2 * (cloud.mean - fixed))
    room = box.BOX_MM - TV_SIDE * VOXEL_MM
    corner = jax.random.uniform(key, (3,), minval=-0.5 * box.BOX_MM, maxval=-0.5 * box.BOX_MM + room)
    affine = jnp.diag(jnp.asarray([VOXEL_MM] * 3 + [1.0])).at[:3, 3].set(corner + 0.5 * VOXEL_MM)
    volume = gaussians.voxelize(in_mm(cloud), grid.VoxelGrid(affine, (TV_SIDE,) * 3))
    return losses.tv3d(volume) / (3.0 * box.UNIT_DENSITY)


def loss(
    params: Mapping[str, Any],
    nudge: Float[Array, "slots 3"],
    view: Int[Array, ""],
    key: jax.Array,
    config: Config,
    views: BoxViews,
    alive: Bool[Array, " slots"],
) -> Float[jax.Array, ""]:
    """L1, SSIM and the sub-box's total variation, for one view; and the body's penalty.

    Args:
      params: `box.parameters`.
      nudge: added to means in the image alone, so that its gradient is the image's.
      key: of the sub-box.
    """
    one = jax.tree.map(lambda a: a[view][None], views)
    seen = dict(params)
    if config.body is not None:
        seen["body"] = {**params["body"], "air": params["body"]["air"][view][None]}
    around, penalty = box.surroundings(seen, config.body, one)
    cloud = activate(params["box"], alive)
    shown = in_mm(dataclasses.replace(cloud, mean=cloud.mean + nudge))
    # Without an axis for the one view, which would double the time.
    camera = one.camera_from_box[0], one.intrinsics[0]
    image = gaussians.project(shown, *camera, *one.images.shape[1:])[None] + around
    found, wanted = image / box.UNIT_INTEGRAL, one.images / box.UNIT_INTEGRAL
    l1 = box.masked_mean(jnp.abs(found - wanted), one.valid)
    alike = losses.ssim_map(found, wanted, 1.0, 2, SSIM_WINDOW)
    window = (1, SSIM_WINDOW, SSIM_WINDOW)
    whole = jax.lax.reduce_window(one.valid, True, jax.lax.bitwise_and, window, (1, 1, 1), "VALID")
    variation = sub_box_variation(cloud, key, config.published_tv)
    ssim = box.masked_mean(1.0 - alike, whole)
    return l1 + SSIM_WEIGHT * ssim + TV_WEIGHT * variation + penalty / box.UNIT_INTEGRAL


def screen_gradient(
    gradient: Float[Array, "slots 3"],
    mean: Float[Array, "slots 3"],
    camera_from_box: Float[Array, "4 4"],
    intrinsics: Float[Array, "4"],
    height: int,
    width: int,
) -> Float[jax.Array, " slots"]:
    """Size of the gradient with respect to means in an image whose sides go from -1 to 1, in which R2-Gaussian's threshold is.

    A step of a mean across the rays by its depth z moves its pixel by the focal length f, that is by 2 f / width.

    Args:
      gradient: with respect to `mean`; both in the box's frame and the scene's units.
    """
    across = rigid.apply_rotation(camera_from_box[:3, :3], gradient)[:, :2]
    depth = rigid.apply(camera_from_box, mean * box.UNIT_MM)[:, 2] / box.UNIT_MM
    half = 0.5 * jnp.asarray([width, height]) / intrinsics[:2]
    return jnp.linalg.norm(half * depth[:, None] * across, axis=-1)


def optimiser(config: Config) -> Any:
    """Adam with `RATES`, and the body's."""
    rates = {name: (config.pace * first, config.pace * last) for name, (first, last) in RATES.items()}
    return box.with_body(adaptive.adam(rates, config.steps), config.body)


def start(config: Config, views: BoxViews, key: jax.Array) -> State:
    """Gaussians uniform in the box at random."""
    place, level = jax.random.split(key)
    mean = jax.random.uniform(place, (config.gaussians, 3), minval=-1.0, maxval=1.0)
    density = jax.random.uniform(level, (config.gaussians,), maxval=config.density)
    scale = jnp.tile(jnp.asarray(adaptive.neighbour_distance(np.asarray(mean)))[:, None], (1, 3))
    quaternion = jnp.tile(jnp.asarray([1.0, 0, 0, 0]), (config.gaussians, 1))
    cloud, alive = adaptive.in_slots(Gaussians(density, mean, scale, quaternion), config.capacity)
    params = box.parameters(deactivate(cloud), config.body, views)
    nothing = jnp.zeros(config.capacity)
    return State(params, optimiser(config).init(params), alive, nothing, nothing)


@functools.partial(jax.jit, static_argnames="config")
def descend(
    config: Config, views: BoxViews, state: State, order: Int[Array, " steps"], keys: jax.Array
) -> tuple[State, Float[jax.Array, " steps"]]:
    """One step for each view in `order`, and the losses before each step."""
    import optax

    tx = optimiser(config)
    height, width = views.images.shape[1:]

    def step(state, inputs):
        view, key = inputs
        still = jnp.zeros((config.capacity, 3))
        value, (gradient, push) = jax.value_and_grad(loss, (0, 1))(
            state.params, still, view, key, config, views, state.alive
        )
        mean = state.params["box"]["mean"]
        steep = screen_gradient(push, mean, views.camera_from_box[view], views.intrinsics[view], height, width)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state, state.alive, state.steepness + steep, state.seen + (steep > 0)), value

    return jax.lax.scan(step, state, (order, keys))


@functools.partial(jax.jit, static_argnames="config")
def densify(config: Config, state: State, key: jax.Array) -> State:
    """One round by the mean steepness over the views that saw a Gaussian since the last round."""
    raw = state.params["box"]
    mean_steepness = state.steepness / jnp.maximum(state.seen, 1.0)
    found = adaptive.refill(RULE, activate(raw, state.alive), state.alive, mean_steepness, key)
    params = {**state.params, "box": adaptive.choose(found.changed, deactivate(found.cloud), raw)}
    nothing = jnp.zeros(config.capacity)
    return State(params, adaptive.forget(state.opt_state, found.fresh), found.alive, nothing, nothing)


def view_order(key: jax.Array, steps: int, views: int) -> Int[jax.Array, " {steps}"]:
    """Views of the steps: all of them in a random order, again and again."""
    rounds = jax.random.split(key, -(-steps // views))
    return jax.vmap(lambda k: jax.random.permutation(k, views))(rounds).reshape(-1)[:steps]


@jax.jit
def density_of(state: State) -> Float[Array, "96 96 96"]:
    """The result, 1/mm."""
    return gaussians.voxelize(in_mm(activate(state.params["box"], state.alive)), box.box_grid(box.SIDE))


def fit(config: Config, views: BoxViews, key: jax.Array) -> Float[jax.Array, "96 96 96"]:
    """Reconstructs the density in the box, 1/mm, in its frame."""
    first, order, boxes, rounds = jax.random.split(key, 4)
    count = views.images.shape[0]
    state = start(config, views, first)
    chunks = config.steps // config.interval
    orders = view_order(order, chunks * config.interval, count).reshape(chunks, -1)
    keys = jax.random.split(boxes, (chunks, config.interval))
    begin, end = config.densify
    for chunk in range(chunks):
        state, _ = descend(config, views, state, orders[chunk], keys[chunk])
        if begin < (chunk + 1) * config.interval < end:
            state = densify(config, state, jax.random.fold_in(rounds, chunk))
    return density_of(state)
