"""DiffPose on two views: a network regresses each view's pose, then gradient ascent on image similarity refines one pose for both.

It follows Gopalakrishnan, Dey & Golland, "Intraoperative 2D/3D Image Registration via Differentiable X-ray Rendering", CVPR 2024,
and the public code `eigenvivek/DiffPose`: ResNet-18 with GroupNorm and two linear layers for a se(3) logarithm, trained for one
patient by the correlation of rendered images and two geodesic distances; then Adam on the logarithm, to which a volume is rendered
again at each step. Where both differ, this follows the code: the loss of training correlates whole images only, and refinement
renders all pixels and not random patches. Patches are correlated as they are: with a constant added to their variances, they are
not fully unaware of contrast.

The original has one view of a whole body, no start pose, and trains on projections of the CT. Chosen here: windows at the start's
projection and the pairs, panels and starts that RadGS-Reg trains on; one network for both views, with the number of the view as a
second channel; twists about the vertebra's centre instead of the isocentre, in larger units of length and smaller ones of angle;
last layers that start near zero, since the start pose is the best first answer. The pose with the best similarity of those of the
views and the start is refined by both views' sum.
The learning rate's schedule and the optimiser are those of `update`, except that gradients are clipped as in the original.
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
from radgs_jax.baselines import box
from radgs_jax.baselines import similarity
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.geometry.grid import VoxelGrid
from radgs_jax.models import backbones
from radgs_jax.models import heads
from radgs_jax.models.config import ModelConfig
from radgs_jax.registration.gauss_newton import LevelViews
from radgs_jax.training import batches
from radgs_jax.training import examples
from radgs_jax.training import update

INPUT_MEAN, INPUT_STD = 0.3080, 0.1494
"""Mean and standard deviation of X-rays scaled to [0, 1]: the public code's."""
INPUT_EPS = 1e-4
"""Added to the range that X-rays are scaled by: the public code's."""
LEVER_MM = 562.0
"""Length by which rotations count in the double geodesic, mm: half the distance from source to detector, as in the public code,
which is 1124 mm in the case format."""
GEODESIC_WEIGHT = 0.01
"""Weight of both geodesics against the correlation, 1/mm: the public code's."""
GEODESIC_EPS = 1e-4
"""Added under the root of a geodesic, mm^2: the public code's."""
CLIP = 0.01
"""Largest norm of a unit's gradient as a fraction of its weights': the default of timm's adaptive clipping, which the public code
uses (Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021)."""
OUTPUT_MM = 5.0
"""Motion per unit of the network's output, mm, rotations by `rigid.LEVER_MM`. Chosen by hand: at half, translations follow more
slowly, at twice, rotations swing more. With the public code's units, 1 mm and 1 rad, both were worse: after 400 steps the network
was no nearer than its starts."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and steps; those of `ORIGINAL` are published, the others were chosen by hand for a CPU.

    Attributes:
      width: channels of the network's first stage.
      crop_px: side of a view's window for the network, pixels; pairs have to be wider than it.
      refine_px: side of a view's window for similarity, pixels: 72 mm, so that the faces of a rendered cube of 96 mm stay outside,
        and most of what is no vertebra.
      step_mm: of samples along rays.
      steps, batch, learning_rate: of training; the last is the peak of a cosine.
      refine_steps: of refinement.
      refine_rad, refine_mm: first steps of refinement, of rotation and of translation, along each axis. The published 7.5 mm are
        for a pelvis: they lost a phantom's vertebra from one of 12 starts within 4 mm. The default is the public code's for its
        other data set: with it, its half and its twice, all 12 ended within 0.01 mm.
      decay, decay_steps: factor on both after so many steps.
      patch_px: side of a patch.
    """

    width: int = 32
    crop_px: int = 64
    refine_px: int = 48
    step_mm: float = 1.5
    steps: int = 3000
    batch: int = 8
    learning_rate: float = 1e-3
    refine_steps: int = 200
    refine_rad: float = 7.5e-3
    refine_mm: float = 1.0
    decay: float = 0.9
    decay_steps: int = 25
    patch_px: int = similarity.PATCH_PX


QUICK = Config(steps=1500, refine_steps=100)
"""Half the steps."""
ORIGINAL = Config(width=64, crop_px=256, refine_px=192, step_mm=0.5, steps=100_000, refine_steps=500, refine_mm=7.5)
"""The published sizes, steps and rates. Windows of 96 and 72 mm have pixels of 0.375 mm then."""


class PoseNet(nn.Module):
    """The network: windows (N, H, W) and the number of each one's view to the twist from the start to the vertebra."""

    width: int

    @nn.compact
    def __call__(
        self, images: Float[Array, "n height width"], valid: Bool[Array, "n height width"], view: Float[Array, " n"]
    ) -> Float[jax.Array, "n 6"]:
        """Twists, rad and mm, in the views' axes about the start's centre."""
        low, high = (
            f(images, axis=(1, 2), keepdims=True, where=valid, initial=i)
            for f, i in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
        )
        scaled = ((images - low) / (high - low + INPUT_EPS) - INPUT_MEAN) / INPUT_STD
        channels = jnp.where(valid, scaled, 0.0), jnp.broadcast_to(view[:, None, None], images.shape)
        x = jnp.mean(backbones.ResNet18(self.width)(jnp.stack(channels, -1)), (1, 2))
        small = nn.initializers.variance_scaling(heads.START_SCALE, "fan_in", "truncated_normal")
        output = jnp.concatenate([nn.Dense(3, kernel_init=small)(x), nn.Dense(3, kernel_init=small)(x)], -1)
        return output * jnp.asarray(OUTPUT_MM * rigid.TWIST_SCALE, output.dtype)


def _views(images):
    """Number of the view of each of (B, V, H, W) images, in one axis."""
    count, views = images.shape[:2]
    return jnp.tile(jnp.arange(views, dtype=jnp.float32), count)


def moved(
    camera_from_box: Float[Array, "*batch 4 4"], twist: Float[Array, "*batch 6"]
) -> Float[jax.Array, "*batch 4 4"]:
    """The pose after the exponential of a twist about the box's origin, in the camera's axes."""
    motion, centre = rigid.exp_se3(twist), camera_from_box[..., :3, 3]
    shift = centre + motion[..., :3, 3] - rigid.apply_rotation(motion[..., :3, :3], centre)
    return rigid.matmul(rigid.transform(motion[..., :3, :3], shift), camera_from_box)


def geodesics(
    found: Float[Array, "*batch 4 4"], true: Float[Array, "*batch 4 4"]
) -> tuple[Float[jax.Array, "*batch"], Float[jax.Array, "*batch"]]:
    """Distances of poses `camera_from_box`: the norm of the logarithm of their difference (rad and mm), about the vertebra's
    centre, and the double geodesic, mm."""
    log = rigid.log_se3(rigid.matmul(rigid.inverse(true), found))
    double = rigid.distance(found, true, jnp.zeros(3), LEVER_MM)
    return jnp.sqrt(jnp.sum(log**2, -1) + GEODESIC_EPS), jnp.sqrt(double**2 + GEODESIC_EPS)


def init(config: Config, model_config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Initial parameters {'diffpose': ...}; the model's config is taken as by the other systems, and sets nothing here."""
    del model_config
    window = jnp.zeros((1, config.crop_px, config.crop_px))
    return {"diffpose": PoseNet(config.width).init(key, window, window == 0, jnp.zeros(1))}


def loss(
    params: Any,
    key: jax.Array,
    batch: batches.PairBatch,
    volume: Float[Array, "x y z"],
    box_from_index: Float[Array, "4 4"],
    config: Config,
    model_config: ModelConfig,
    strength: float = 1.0,
) -> tuple[Float[jax.Array, ""], dict[str, Float[jax.Array, ""]]]:
    """1 - correlation of the vertebra at the found and at the true pose, plus both weighted geodesics; and its parts by name.

    Args:
      batch: pairs of the vertebra that `volume` is.
      volume: attenuation of the vertebra alone, 1/mm; box_from_index: affine of its voxels.
      strength: of the drawn panels.
    """
    sizes = dataclasses.replace(model_config, crop_px=config.crop_px)
    example = examples.make_example(key, batch, sizes, strength)
    truth = rigid.matmul(example.camera_from_box, example.motion[:, None])
    # Views of all pairs in one axis.
    images, valid, target, intrinsics, start, truth = (
        a.reshape(-1, *a.shape[2:])
        for a in (example.xrays, example.valid, example.target, example.intrinsics, example.camera_from_box, truth)
    )
    twist = cast(jax.Array, PoseNet(config.width).apply(params["diffpose"], images, valid, _views(example.xrays)))
    found = moved(start, twist)
    views = box.BoxViews(target, valid, intrinsics, found)
    drawn = box.render(volume, VoxelGrid(jnp.asarray(box_from_index), volume.shape), views, config.step_mm)
    correlation = jnp.mean(similarity.ncc(drawn, target, valid))
    log, double = (jnp.mean(distance) for distance in geodesics(found, truth))
    parts = {"pose_mm": jnp.mean(rigid.distance(found, truth, jnp.zeros(3))), "ncc": correlation, "double_mm": double}
    return 1.0 - correlation + GEODESIC_WEIGHT * (log + double), parts


@jax.custom_vjp
def clipped(params: Any) -> Any:
    """The parameters as they are; their gradient is clipped, each unit's to a fraction of its weights."""
    return params


def _clip(params, gradient):
    import optax  # a tenth of a second, for training alone

    clip = optax.adaptive_grad_clip(CLIP)
    return (clip.update(gradient, clip.init(params), params)[0],)


clipped.defvjp(lambda params: (params, params), _clip)


def make_update(
    mesh: jax.sharding.Mesh,
    volume: Float[Array, "x y z"],
    box_from_index: Float[Array, "4 4"],
    config: Config,
    model_config: ModelConfig,
) -> Callable[..., Any]:
    """`update.update_of` for this network's `loss` with clipped gradients; another volume compiles again."""

    def objective(params, key, batch):
        params = {"diffpose": clipped(params["diffpose"])}
        return loss(params, key, batch, volume, box_from_index, config, model_config)

    return update.update_of(mesh, objective, ("diffpose",))


def score(
    config: Config,
    volume: Float[Array, "x y z"],
    box_from_index: Float[Array, "4 4"],
    views: box.BoxViews,
    camera_from_box: Float[Array, "views 4 4"],
) -> Float[jax.Array, ""]:
    """Half the correlation of whole images and half that of patches, summed over windows, of a volume at given poses."""
    at_pose = dataclasses.replace(views, camera_from_box=camera_from_box)
    drawn = box.render(volume, VoxelGrid(jnp.asarray(box_from_index), volume.shape), at_pose, config.step_mm)
    compared = drawn, views.images, views.valid
    return jnp.sum(0.5 * similarity.ncc(*compared) + 0.5 * similarity.patch_ncc(*compared, config.patch_px))


def _windows(seen, camera_from_world, world_from_box, size):
    pose = rigid.matmul(camera_from_world, world_from_box)
    images, valid, intrinsics = camera.windows(seen.images, seen.valid, seen.intrinsics, pose, size)
    return box.BoxViews(images, valid, intrinsics, pose)


@functools.partial(jax.jit, static_argnames=("config", "model_config"))
def estimate(
    params: Any,
    config: Config,
    model_config: ModelConfig,
    volume: Float[Array, "x y z"],
    box_from_index: Float[Array, "4 4"],
    seen: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    world_from_box: Float[Array, "4 4"],
) -> Float[jax.Array, "4 4"]:
    """The best of the start and of the poses that the network finds in each view, by the similarity of all views.

    Args:
      volume, box_from_index: that is rendered for the similarity: the vertebra alone, or a part of the CT.
      seen: X-rays at the model's resolution.
      world_from_box: start pose.

    Returns:
      world_from_box.
    """
    del model_config
    views = _windows(seen, camera_from_world, world_from_box, config.crop_px)
    number = _views(views.images[None])
    twist = cast(jax.Array, PoseNet(config.width).apply(params["diffpose"], views.images, views.valid, number))
    found = rigid.matmul(rigid.inverse(camera_from_world), moved(views.camera_from_box, twist))
    poses = jnp.concatenate([world_from_box[None], found])
    compared = _windows(seen, camera_from_world, world_from_box, config.refine_px)
    scores = jax.vmap(functools.partial(score, config, volume, box_from_index, compared))(
        rigid.matmul(camera_from_world, poses[:, None])
    )
    return poses[jnp.argmax(scores)]


@functools.partial(jax.jit, static_argnames="config")
def refine(
    config: Config,
    volume: Float[Array, "x y z"],
    box_from_index: Float[Array, "4 4"],
    seen: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    world_from_box: Float[Array, "4 4"],
) -> Float[jax.Array, "4 4"]:
    """Raises the similarity of a volume and all views by Adam on one twist about the vertebra's centre; arguments are those of
    `estimate`.

    Returns:
      world_from_box of the highest similarity that was met.
    """
    import optax  # a tenth of a second, for this alone

    views = _windows(seen, camera_from_world, world_from_box, config.refine_px)
    unit = jnp.asarray([config.refine_rad] * 3 + [config.refine_mm] * 3)
    tx = optax.adam(optax.exponential_decay(1.0, config.decay_steps, config.decay, staircase=True))

    def misfit(steps):
        pose = moved(world_from_box, steps * unit)
        return -score(config, volume, box_from_index, views, rigid.matmul(camera_from_world, pose)), pose

    def step(state, _):
        steps, moments, least, best = state
        (value, pose), gradient = jax.value_and_grad(misfit, has_aux=True)(steps)
        least, best = jax.tree.map(lambda a, b: jnp.where(value < least, a, b), (value, pose), (least, best))
        change, moments = tx.update(gradient, moments)
        return (steps + change, moments, least, best), None

    first = jnp.zeros(6), tx.init(jnp.zeros(6)), jnp.asarray(jnp.inf), jnp.asarray(world_from_box)
    (_, _, _, best), _ = jax.lax.scan(step, first, length=config.refine_steps)
    return best
