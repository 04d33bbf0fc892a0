"""3DGR-CAR: Gaussians that are voxelised, projected and fitted to X-rays, from centres that a network sees in each view.

It follows Fu et al., "3DGR-CAR", MICCAI 2024, and its public code (windrise/3DGR-CAR, f482e19), which fits alone; the network is
in `gr_centres`. In a fit, Gaussians are voxelised and the voxels projected; the squared error of all views falls by Adam, with
clones, splits and pruning (`adaptive`) by the momentary gradient of means. Means are in boxes from the box's corner, scales in
boxes, densities in `box.UNIT_DENSITY`. Errors are in the integral of that density over a published voxel, 1 / 128 of the box,
because the published threshold of gradients is for such images.

What differs: the public code draws patches of a fixed size and counts voxels at borders twice; ours are whole. It splits all
Gaussians or none where 12,000 would be passed, clones beyond that, and draws halves without turning them; `adaptive` does as it
says. Its start is a filtered backprojection; so is ours, where there is no network, in the scale that fits the images. Its two
views are one view twice, by mistake. Dice of the patches that show the vertebra stands for the paper's term for vessels, whose
centrelines are left out. Centres of all views are pooled, and are as dense as the backprojection; the paper takes the first
view's. The last step is the result, not the one of the smallest error. Voxels are as fine as a result's: on coarser ones a fit
of 30 views cannot pass 24 dB, which is what sampling the truth there leaves.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax.baselines import adaptive
from radgs_jax.baselines import box
from radgs_jax.baselines import gr_centres
from radgs_jax.baselines.box import BodyConfig
from radgs_jax.baselines.box import BoxViews
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import camera
from radgs_jax.models.config import ModelConfig
from radgs_jax.training import batches
from radgs_jax.training import examples
from radgs_jax.training import update

RATES = {"mean": (1.6e-4, 1.6e-6), "density": (0.01, 0.01), "scale": (5e-3, 5e-3), "quaternion": (1e-3, 1e-3)}
"""Adam's rates at the first and the last step, of parameters before activation: 3DGR-CAR's."""
RATE_RUNS = 3.75
"""Runs over which the rate of means falls: in 3DGR-CAR 30,000 steps, of which 8,000 are made."""
RULE = adaptive.Rule(threshold=2e-4, clone_scale=0.015, kept=1.0, min_density=0.005)
"""3DGR-CAR's. Clones and halves keep the whole density, so that a clone doubles the mass."""
UNIT_INTEGRAL = box.UNIT_DENSITY * box.BOX_MM / 128
"""Line integral that is 1 in the error: 3DGR-CAR's is over a voxel of 128 along a side."""
AIR, START_DENSITY = 0.05, 0.04
"""Backprojected density from which a voxel is not air, and the start's density relative to it: 3DGR-CAR's."""
PATIENCE = 6
"""Intervals in a row without a smaller error that a fit goes on after: 3DGR-CAR's."""
BODY_ERROR = 0.05
"""Error of a line integral at which the body's penalty weighs as beside an absolute error, no unit. Chosen by hand: an error of a
few percent; half smooths the body half as much, twice twice as much."""
DICE_WEIGHT, DEPTH_WEIGHT = 0.5, 0.01
"""Of the terms beside the distance of points: the rebuilds'. They give that one the logarithm of the step; ours is 1."""
ALONE_SHARE = 0.5
"""Fraction of training pairs that show the vertebra alone, as a part of the cases does. Chosen by hand: with fewer the centre
predictor knows such X-rays less, with more it knows cluttered ones less."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the defaults are for a CPU.

    Attributes:
      gaussians: largest number at the start; capacity: largest number.
      side: voxels along a side that Gaussians are sampled at.
      steps: number of steps, a multiple of `interval`.
      interval: steps between rounds of densification.
      densify: steps after which rounds begin.
      pace: factor on `RATES`, for fewer steps than the 8,000 that they are for. Chosen by hand.
      crop_px, pixel_mm: the centre predictor's windows, those of the `ModelConfig` that it was trained with.
      widths: channels of the centre predictor at strides 2, 4, 8, and so on.
      pooled: whether the start has the centres of all views, or those of the first.
      body: the voxels around the box; None for a vertebra in air.
    """

    gaussians: int = 4000
    capacity: int = 5000
    side: int = 96
    steps: int = 1500
    interval: int = 100
    densify: int = 500
    pace: float = 3.0
    crop_px: int = 64
    pixel_mm: float = 1.5
    widths: tuple[int, ...] = (16, 32, 64, 128)
    pooled: bool = True
    body: BodyConfig | None = None


QUICK = Config(steps=700, densify=200)
"""About half the steps."""
ORIGINAL = Config(10_000, 12_000, 128, steps=8000, pace=1.0, widths=(32, 64, 128, 256, 512))
"""3DGR-CAR's sizes and steps, and a rebuild's of the centre predictor."""


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initial parameters {'gcp': ...} of the centre predictor from a PRNG key."""
    shape = (1, config.crop_px, config.crop_px)
    return {"gcp": gr_centres.CentrePredictor(config.widths).init(key, jnp.zeros(shape), jnp.ones(shape, bool))}


def loss(
    params: Any,
    key: jax.Array,
    batch: batches.PairBatch,
    config: Config,
    model_config: ModelConfig,
    strength: float = 1.0,
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
    """Distance of the centres of patches that show the vertebra from the CT's Gaussians at the true pose (both ways, boxes), Dice
    of those patches, and the depth of first hits; and the parts by name.

    Args:
      strength: of the drawn panels.
    """
    drawn, picked = jax.random.split(key)
    example = examples.make_example(drawn, batch, model_config, strength)
    alone = jax.random.bernoulli(picked, ALONE_SHARE, (example.xrays.shape[0], 1, 1, 1))
    images = jnp.where(alone, example.target, example.xrays)
    views = BoxViews(images, example.valid | alone, example.intrinsics, example.camera_from_box)
    cloud = gaussians.move(example.cloud, example.motion)
    found = gr_centres.predict(params, config.widths, views)
    hit, depth = gr_centres.first_hits(
        cloud, views.intrinsics, views.camera_from_box, model_config.crop_px // gr_centres.PATCH
    )
    points = gaussians.views(cloud, hit.shape[1])
    places = found.place.reshape(*hit.shape[:2], -1, 3)
    apart = gr_centres.chamfer(places, hit.reshape(*hit.shape[:2], -1), points.mean, points.density > 0) / box.BOX_MM
    overlap = jnp.sum(found.presence * hit, (-2, -1))
    dice = jnp.mean(1.0 - (2.0 * overlap + 1.0) / (jnp.sum(found.presence, (-2, -1)) + jnp.sum(hit, (-2, -1)) + 1.0))
    deep = gr_centres.depth_error(found.depth, depth, hit)
    parts = {"centres_mm": box.BOX_MM * apart, "presence_dice": 1.0 - dice, "depth": deep}
    return apart + DICE_WEIGHT * dice + DEPTH_WEIGHT * deep, parts


@functools.cache
def make_update(mesh: jax.sharding.Mesh, config: Config, model_config: ModelConfig) -> Callable[..., Any]:
    """`update.update_of` for the centre predictor's `loss`."""
    return update.update_of(mesh, functools.partial(loss, config=config, model_config=model_config), ("gcp",))


def resized(views: BoxViews, size: int, pixel_mm: float) -> BoxViews:
    """The views in windows of `size` pixels of exactly `pixel_mm` at the isocentre, with the box's origin at pixel size // 2, as in
    a model's crops. A pixel averages the finer ones in it; what the views lack is not valid."""

    def one(image, valid, intrinsics, camera_from_box):
        scale = camera_from_box[2, 3] / (pixel_mm * intrinsics[0])
        middle = camera.project_camera(intrinsics, camera_from_box[None, :3, 3])[0]
        # Positions of pixels' edges, in which `scale_and_translate` counts, are half a pixel from those of their centres.
        move = size // 2 + 0.5 - scale * (middle + 0.5)
        resize = functools.partial(
            jax.image.scale_and_translate,
            shape=(size, size),
            spatial_dims=(0, 1),
            scale=jnp.stack([scale, scale]),
            translation=move[::-1],
            method="linear",
        )
        moved = jnp.concatenate([intrinsics[:2] * scale, scale * (intrinsics[2:] + 0.5) + move - 0.5])
        return resize(image), resize(valid.astype(image.dtype)) > 1.0 - 1e-3, moved

    images, valid, intrinsics = jax.vmap(one)(views.images, views.valid, views.intrinsics, views.camera_from_box)
    return BoxViews(images, valid, intrinsics, views.camera_from_box)


def activate(raw: Mapping[str, Array], alive: Bool[Array, " slots"]) -> Gaussians:
    """Gaussians in boxes and `box.UNIT_DENSITY`."""
    quaternion = raw["quaternion"] / jnp.linalg.norm(raw["quaternion"], axis=-1, keepdims=True)
    density, scale = jax.nn.sigmoid(raw["density"]), jax.nn.sigmoid(raw["scale"])
    return adaptive.only_alive(Gaussians(density, jnp.asarray(raw["mean"]), scale, quaternion), alive)


def deactivate(cloud: Gaussians) -> dict[str, jax.Array]:
    """Inverse of `activate`."""
    density, scale = (jax.scipy.special.logit(a) for a in (cloud.density, cloud.scale))
    return {"density": density, "mean": cloud.mean, "scale": scale, "quaternion": cloud.quaternion}


def in_mm(cloud: Gaussians) -> Gaussians:
    """A cloud in boxes and `box.UNIT_DENSITY` in mm and 1/mm, box frame."""
    mean = (cloud.mean - 0.5) * box.BOX_MM
    return Gaussians(cloud.density * box.UNIT_DENSITY, mean, cloud.scale * box.BOX_MM, cloud.quaternion)


def fit_loss(params: Mapping[str, Any], config: Config, views: BoxViews, alive: Array) -> Float[jax.Array, ""]:
    """Mean squared error of all views' valid pixels, and the body's penalty."""
    around, penalty = box.surroundings(params, config.body, views)
    voxels = box.box_grid(config.side)
    volume = gaussians.voxelize(in_mm(activate(params["box"], alive)), voxels)
    away = box.render(volume, voxels, views, box.BOX_MM / config.side) + around - views.images
    return (box.masked_mean(away**2, views.valid) + 2.0 * BODY_ERROR * penalty) / UNIT_INTEGRAL**2


def optimiser(config: Config) -> Any:
    """Adam with `RATES`, and the body's."""
    rates = {name: (config.pace * first, config.pace * last) for name, (first, last) in RATES.items()}
    return box.with_body(adaptive.adam(rates, round(RATE_RUNS * config.steps)), config.body)


def ramp(images: Float[Array, "views size size"]) -> Float[jax.Array, "views size size"]:
    """Images filtered along rows by the frequency's size (Ram-Lak), for C-arms that turn about what is upright in them.

    The outermost columns are repeated outwards, so that what goes on beyond the windows makes no edge.
    """
    size = images.shape[-1]
    wide = jnp.pad(images, ((0, 0), (0, 0), (size, size)), mode="edge")
    filtered = jnp.fft.ifft(jnp.fft.fft(wide) * jnp.abs(jnp.fft.fftfreq(3 * size))).real
    return filtered[..., size:-size]


@functools.partial(jax.jit, static_argnames="config")
def backprojection(config: Config, views: BoxViews) -> Float[jax.Array, "side side side"]:
    """Filtered backprojection, positive, `box.UNIT_DENSITY`, scaled so that its projection fits the images best.

    The body is as at the start, so that the box gets what that leaves.
    """
    params = box.parameters({}, config.body, views)
    rest = jnp.maximum(views.images - box.surroundings(params, config.body, views)[0], 0.0)
    voxels = box.box_grid(config.side)
    draw = functools.partial(box.render, voxels=voxels, views=views, step_mm=box.BOX_MM / config.side)
    _, back = jax.vjp(draw, jnp.zeros(voxels.shape))
    rays = back(views.valid.astype(rest.dtype))[0]
    mean = jnp.maximum(back(jnp.where(views.valid, ramp(rest), 0.0))[0], 0.0) / (rays + 1e-6)
    drawn = draw(mean)
    scale = box.masked_mean(drawn * rest, views.valid) / (box.masked_mean(drawn**2, views.valid) + 1e-9)
    return scale * mean / box.UNIT_DENSITY


def _steepest(config, volume):
    """Voxels of a volume: which are denser than air, their places in boxes, and densities; the steepest ones alone."""
    volume = np.asarray(volume)
    slopes = [np.diff(volume, axis=axis, append=np.float32(0.0)) for axis in range(3)]
    steepness = np.sum(np.square(np.stack(slopes)), 0).reshape(-1)
    best = np.argsort(-steepness, kind="stable")[: config.gaussians]
    level, index = volume.reshape(-1)[best], np.stack(np.unravel_index(best, volume.shape), -1)
    return level >= AIR, ((index + 0.5) / config.side).astype(np.float32), level


@functools.partial(jax.jit, static_argnames="config")
def _predicted(config, volume, views, params):
    """As `_steepest`, of what the centre predictor sees."""
    found = gr_centres.predict(params, config.widths, resized(views, config.crop_px, config.pixel_mm))
    found = jax.tree.map(lambda a: a[: None if config.pooled else 1], found)
    mean = found.place.reshape(-1, 3) / box.BOX_MM + 0.5
    level = jax.scipy.ndimage.map_coordinates(volume, list(mean.T * config.side - 0.5), order=1, mode="nearest")
    return found.presence.reshape(-1) > 0.5, mean, jnp.maximum(level, AIR)


def start(
    config: Config, views: BoxViews, key: jax.Array, params: Any = None
) -> tuple[dict[str, jax.Array], Bool[jax.Array, " slots"]]:
    """Gaussians before activation, and which are alive.

    Args:
      params: of the centre predictor, which sees the views `resized`; None starts at the steepest voxels of the backprojection.
    """
    volume = backprojection(config, views)
    found = _steepest(config, volume) if params is None else _predicted(config, volume, views, params)
    # On the host: the number of places differs from case to case, and each would be compiled for.
    chosen, mean, level = (np.asarray(a) for a in found)
    places = np.asarray(jax.random.permutation(key, np.flatnonzero(chosen)))[: config.gaussians]
    mean, level = mean[places], np.clip(level[places], 0.0, 1.0)
    away = np.clip(adaptive.neighbour_distance(mean), 1e-3, 1.0)
    # The public code takes the distance's logarithm for a scale before activation.
    scale = np.tile((away / (1.0 + away))[:, None], (1, 3))
    quaternion = np.tile([1.0, 0.0, 0.0, 0.0], (len(places), 1))
    parts = (jnp.asarray(a, jnp.float32) for a in (START_DENSITY * level, mean, scale, quaternion))
    cloud, alive = adaptive.in_slots(Gaussians(*parts), config.capacity)
    return deactivate(cloud), alive


@functools.partial(jax.jit, static_argnames="config")
def descend(
    config: Config, views: BoxViews, params: Any, opt_state: Any, alive: Array
) -> tuple[Any, Any, Float[jax.Array, " steps"]]:
    """An interval's steps: parameters, Adam's state, and the losses before each step."""

    def cost(params, key):
        return fit_loss(params, config, views, alive)

    return box.descend(cost, optimiser(config), params, opt_state, jax.random.split(jax.random.key(0), config.interval))


@functools.partial(jax.jit, static_argnames="config")
def densify(
    config: Config, views: BoxViews, params: Any, opt_state: Any, alive: Array, key: jax.Array
) -> tuple[Any, Any, Bool[jax.Array, " slots"]]:
    """One round by the momentary gradient of means."""
    push = jax.grad(fit_loss)(params, config, views, alive)["box"]["mean"]
    raw = params["box"]
    found = adaptive.refill(RULE, activate(raw, alive), alive, jnp.linalg.norm(push, axis=-1), key)
    params = {**params, "box": adaptive.choose(found.changed, deactivate(found.cloud), raw)}
    return params, adaptive.forget(opt_state, found.fresh), found.alive


@functools.partial(jax.jit, static_argnames="config")
def density_of(config: Config, params: Any, alive: Array) -> Float[Array, "96 96 96"]:
    """The result, 1/mm, by way of the voxels of the fit, which do not see all of the smallest Gaussians."""
    return box.to_result(gaussians.voxelize(in_mm(activate(params["box"], alive)), box.box_grid(config.side)))


def fit(config: Config, views: BoxViews, key: jax.Array, params: Any = None) -> Float[jax.Array, "96 96 96"]:
    """Reconstructs the density in the box, 1/mm, in its frame.

    Each step takes all views, as published: the Gaussians are sampled once for all of them.

    Args:
      params: of the centre predictor, whose centres are the start; None starts from the backprojection.
    """
    first, rounds = jax.random.split(key)
    raw, alive = start(config, views, first, params)
    fitted = box.parameters(raw, config.body, views)
    opt_state = optimiser(config).init(fitted)
    best, waited = np.inf, 0
    for done in range(config.interval, config.steps + 1, config.interval):
        fitted, opt_state, errors = descend(config, views, fitted, opt_state, alive)
        last = float(errors[-1])
        best, waited = min(best, last), 0 if last < best else waited + 1
        if waited > PATIENCE:
            break
        if config.densify < done < config.steps:
            fitted, opt_state, alive = densify(
                config, views, fitted, opt_state, alive, jax.random.fold_in(rounds, done)
            )
    return density_of(config, fitted, alive)
