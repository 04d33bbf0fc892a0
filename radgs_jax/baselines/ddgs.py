"""DDGS-CT: Gaussians with isotropic and directional radiosity, fitted to projections of a CT and registered by rendering.

It follows Gao et al., "DDGS-CT: Direction-disentangled Gaussian splatting for realistic volume rendering", NeurIPS 2024
(arXiv 2406.02518), whose code is not public. Two sets of Gaussians are blended in one order of depth (`blending`). One has the
same colour from everywhere, sigmoid(b . f); the other's is sigmoid(Y(ray) B f), with Y the real harmonics of the ray without
degree 0. Features f are a Gaussian's own; b and B are shared. Means start on the surface of the bone and inside it (`init`).
What the paper leaves to 3DGS and X-Gaussian, their public defaults fill.

Chosen here: scene units of `box`, degree 1, rays in the box's frame, one view a step, an SSIM without padding, and no
densification, since unseen views of a vertebra pass 40 dB without it. The paper registers by render-and-compare after iComMA and
states neither loss nor steps: we maximise the mean of two correlations (`similarity`) by Adam. We match no keypoints as iComMA
does, which costs range.

Without scatter the directional set does not go dark, since with no degree 0 its colour at rest is sigmoid(0) = 1/2: it keeps a
fifth to a third of the image. What stays small is how its colours change from view to view, by 0.1 of their range or less.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable
from collections.abc import Mapping
from typing import Any
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Float
from jaxtyping import Int

from kernels.common.types import Array
from radgs_jax import losses
from radgs_jax.baselines import blending
from radgs_jax.baselines import box
from radgs_jax.baselines import similarity
from radgs_jax.geometry import camera
from radgs_jax.geometry import resample
from radgs_jax.geometry import rigid
from radgs_jax.registration.gauss_newton import LevelViews

if TYPE_CHECKING:
    import optax

FIRST_OPACITY = 0.1
"""Peak of each Gaussian at the start: 3DGS's."""
NEIGHBOURS = 3
"""Number of neighbours whose root mean squared distance is a Gaussian's first size: 3DGS's."""
RATES = {"basis": 1.25e-4, "features": 2.5e-3, "opacity": 0.05, "size": 5e-3, "rotation": 1e-3}
"""Adam's rates: the paper's of basis and features, else 3DGS's. Sizes are logarithms, opacities before the sigmoid."""
POSITION_RATES = (1.6e-4, 1.6e-6)
"""First and last rate of positions, in `box.UNIT_MM`; geometric between them: 3DGS's."""
ADAM_EPS = 1e-15
"""Added to Adam's root of second moments: 3DGS's."""
SSIM_WEIGHT = 0.2
"""Share of 1 - SSIM in the loss of a fit, the rest being L1: 3DGS's."""
HARMONIC = math.sqrt(3.0 / (4.0 * math.pi))
"""Factor of the real harmonics of degree 1, which are orthonormal on the sphere."""
POSE_RATE, POSE_DECAY, POSE_EVERY = 0.05, 0.9, 25
"""Adam's rate of the pose, rad and `box.UNIT_MM`: the paper's. It falls by this factor every this many steps: DiffPose's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model, and how it is fitted and registered.

    Attributes:
      surface: Gaussians that start on the surface, of the isotropic set.
      inside: Gaussians that start at voxels, half of each set.
      features: numbers of each Gaussian that its colour is made of.
      steps: of the fit, one view each.
      tile_px, listed: side of a tile, pixels, and Gaussians that are drawn in it. With 192, images of a vertebra lose 15 %; with
        these, errors stay below 0.1 % of the range.
      pixel_mm: of projections and X-rays, at the isocentre.
      target_px: side of the projections that `fit` should be given, pixels: they show all of `box.BOX_MM`.
      crop_px: side of the window in which poses are judged, pixels. It is smaller, because a volume that is cut out of a body has
        faces that no X-ray shows.
      pose_steps: of a registration.
    """

    surface: int = 1500
    inside: int = 1000
    features: int = 8
    steps: int = 1500
    tile_px: int = 16
    listed: int = 1024
    pixel_mm: float = 1.5
    target_px: int = 64
    crop_px: int = 48
    pose_steps: int = 150


QUICK = Config(steps=750, pose_steps=75)
"""Half the steps."""
ORIGINAL = Config(surface=15_000, inside=10_000, steps=30_000, listed=4096, pixel_mm=0.75, target_px=128, crop_px=96)
"""The published numbers of Gaussians, before their densification, and of steps."""

Views = tuple[Float[Array, "views height width"], Float[Array, "views 4"], Float[Array, "views 4 4"]]
"""Line integrals, intrinsics in pixels, and camera_from_box in mm."""


def crossings(density: Float[np.ndarray, "x y z"], level: float) -> Float[np.ndarray, "points 3"]:
    """The vertices of marching cubes, in voxels: where a density crosses a level on an edge of the grid, linearly."""
    found = []
    for axis in range(3):
        lower, upper = (np.take(density, np.arange(a, density.shape[axis] - 1 + a), axis) for a in (0, 1))
        index = np.argwhere((lower > level) != (upper > level))
        low, high = (side[tuple(index.T)].astype(np.float64) for side in (lower, upper))
        places = index.astype(np.float64)
        places[:, axis] += (level - low) / (high - low)
        found.append(places)
    return np.concatenate(found)


def _set(mean, config, rng, basis_shape):
    """Parameters of a set of Gaussians around means, mm."""
    away, _ = scipy.spatial.cKDTree(mean).query(mean, NEIGHBOURS + 1)
    # The nearest point of each is itself. Two at one place would be infinitely thin.
    size = np.sqrt(np.mean(away[:, 1:] ** 2, 1)).clip(1e-2)
    return {
        "position": mean / box.UNIT_MM,
        "size": np.tile(np.log(size / box.UNIT_MM)[:, None], (1, 3)),
        "rotation": np.tile([1.0, 0, 0, 0], (len(mean), 1)),
        "opacity": np.full(len(mean), math.log(FIRST_OPACITY / (1.0 - FIRST_OPACITY))),
        "features": np.zeros((len(mean), config.features)),
        "basis": rng.normal(size=basis_shape),
    }


def _sets(means, config, rng):
    """Parameters of the isotropic and of the directional set around means, mm."""
    shapes = (config.features,), (3, config.features)
    sets = [_set(mean, config, rng, shape) for mean, shape in zip(means, shapes)]
    params = {"isotropic": sets[0], "directional": sets[1], "scale": np.ones(())}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def init(
    config: Config,
    density: Float[np.ndarray, "x y z"],
    box_from_index: Float[np.ndarray, "4 4"],
    key: jax.Array,
) -> dict[str, Any]:
    """Parameters before the fit, by the paper's radiodensity-aware dual sampling.

    The isotropic set starts at vertices of the surface at half the density's range and at half the voxels that are drawn with
    probabilities in proportion to their density; the directional set at the other half of those. All colours are 1/2.

    Args:
      density: of what moves, 1/mm; box_from_index: affine, mm.

    Returns:
      {'isotropic': ..., 'directional': ..., 'scale': the line integral that is drawn as 1}.

    Raises:
      ValueError: a surface or an inside with fewer points than Gaussians.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    vertices = crossings(density, 0.5 * (float(density.min()) + float(density.max())))
    weights = np.maximum(density.ravel(), 0.0).astype(np.float64)
    for name, there, wanted in (
        ("on the surface", len(vertices), config.surface),
        ("of positive density", np.count_nonzero(weights), config.inside),
    ):
        if there < wanted:
            raise ValueError(f"ddgs: found {there} points {name}, wanted {wanted}")
    drawn = rng.choice(weights.size, config.inside, replace=False, p=weights / weights.sum())
    voxels = np.stack(np.unravel_index(drawn, density.shape), -1)
    half = config.inside // 2
    surface = vertices[rng.choice(len(vertices), config.surface, replace=False)]
    both = [np.concatenate([surface, voxels[half:]]), voxels[:half]]
    means = [resample.apply_affine(box_from_index, index) for index in both]
    return _sets(means, config, rng)


def init_uniform(config: Config, key: jax.Array) -> dict[str, Any]:
    """Parameters as of `init`, of as many Gaussians anywhere in the box: what the paper compares its sampling with."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    half = config.inside // 2
    counts = config.surface + config.inside - half, half
    return _sets([rng.uniform(-box.UNIT_MM, box.UNIT_MM, (count, 3)) for count in counts], config, rng)


def harmonics(direction: Float[Array, "*batch 3"]) -> Float[jax.Array, "*batch 3"]:
    """Real harmonics of degree 1 of unit vectors, orthonormal on the sphere: their parts y, z, x with a factor."""
    return HARMONIC * jnp.stack([direction[..., 1], direction[..., 2], direction[..., 0]], -1)


def colours(
    params: Mapping[str, Any], camera_from_box: Float[Array, "views 4 4"]
) -> tuple[Float[jax.Array, "views isotropic"], Float[jax.Array, "views directional"]]:
    """Radiosities of both sets in each view, in (0, 1); a ray's direction is that from the source to the Gaussian's mean."""
    sets = params["isotropic"], params["directional"]
    alike = jax.nn.sigmoid(sets[0]["features"] @ sets[0]["basis"])
    source = rigid.inverse(camera_from_box)[:, None, :3, 3]
    ray = box.UNIT_MM * sets[1]["position"] - source
    ray = ray / jnp.linalg.norm(ray, axis=-1, keepdims=True)
    by_harmonic = sets[1]["features"] @ sets[1]["basis"].T
    turned = jax.nn.sigmoid(jnp.sum(harmonics(ray) * by_harmonic, -1))
    return jnp.broadcast_to(alike, (len(camera_from_box), *alike.shape)), turned


def draw(
    params: Mapping[str, Any],
    config: Config,
    intrinsics: Float[Array, "views 4"],
    camera_from_box: Float[Array, "views 4 4"],
    height: int,
    width: int,
) -> Float[jax.Array, "views {height} {width}"]:
    """`render` before its scale, in [0, 1)."""
    position, size, rotation, opacity = (
        jnp.concatenate([params[name][part] for name in ("isotropic", "directional")])
        for part in ("position", "size", "rotation", "opacity")
    )
    quaternion = rotation / jnp.linalg.norm(rotation, axis=-1, keepdims=True)
    seen = blending.footprints(
        box.UNIT_MM * position,
        box.UNIT_MM * jnp.exp(size),
        quaternion,
        jax.nn.sigmoid(opacity),
        intrinsics,
        camera_from_box,
    )
    colour = jnp.concatenate(colours(params, camera_from_box), 1)
    listed = blending.lists(seen, height, width, config.tile_px, min(config.listed, len(opacity)))
    return blending.blend_listed(seen, colour, listed, height, width, config.tile_px)


@functools.partial(jax.jit, static_argnames=("config", "height", "width"))
def render(
    params: Mapping[str, Any],
    config: Config,
    intrinsics: Float[Array, "views 4"],
    camera_from_box: Float[Array, "views 4 4"],
    height: int,
    width: int,
) -> Float[jax.Array, "views {height} {width}"]:
    """Line integrals as the model draws them, differentiable in the parameters and poses.

    Args:
      intrinsics: px; camera_from_box: mm; height, width: px.
    """
    return params["scale"] * draw(params, config, intrinsics, camera_from_box, height, width)


def fit_loss(
    prediction: Float[Array, "views height width"], target: Float[Array, "views height width"]
) -> Float[jax.Array, ""]:
    """0.8 L1 + 0.2 (1 - SSIM) of images in [0, 1]."""
    return (1.0 - SSIM_WEIGHT) * losses.l1(prediction, target) + SSIM_WEIGHT * losses.ssim2d(prediction, target, 1.0)


def _optimiser(params: Mapping[str, Any], steps: int) -> "optax.GradientTransformation":
    import optax

    first, last = POSITION_RATES
    rates = {**RATES, "position": optax.exponential_decay(first, steps, last / first)}
    parts: dict[Hashable, optax.GradientTransformation] = {"scale": optax.set_to_zero()}
    for name, rate in rates.items():
        parts[name] = optax.adam(rate, eps=ADAM_EPS)
    labels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, dict(params))
    return optax.multi_transform(parts, labels)


def fit(config: Config, params: Mapping[str, Any], views: Views, key: jax.Array) -> dict[str, Any]:
    """Fits the Gaussians to projections of what moves.

    Args:
      params: as of `init`.
      views: V projections without noise, of `Config.target_px` and `pixel_mm`. The largest line integral is drawn as 1.
      key: of the views' order: each is seen once before any is again.

    Returns:
      The parameters after the last step.
    """
    images, intrinsics, cameras = (jnp.asarray(a, jnp.float32) for a in views)
    scale = jnp.max(images)
    epochs = jax.random.split(key, -(-config.steps // len(images)))
    order = jax.vmap(lambda key: jax.random.permutation(key, len(images)))(epochs).ravel()[: config.steps]
    return _fit(config, {**params, "scale": scale}, images / scale, intrinsics, cameras, order)


@functools.partial(jax.jit, static_argnames="config")
def _fit(config, params, images, intrinsics, cameras, order: Int[jax.Array, " steps"]):
    height, width = images.shape[1:]

    def loss(params, view):
        image, k, camera_from_box = (a[view][None] for a in (images, intrinsics, cameras))
        return fit_loss(draw(params, config, k, camera_from_box, height, width), image)

    tx = _optimiser(params, config.steps)
    return box.descend(loss, tx, params, tx.init(params), order)[0]


@functools.partial(jax.jit, static_argnames="config")
def register(
    params: Mapping[str, Any],
    config: Config,
    seen: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    world_from_box: Float[Array, "4 4"],
) -> Float[jax.Array, "4 4"]:
    """Registers a fitted model to X-rays from a start pose.

    Args:
      seen: X-rays at `config.pixel_mm`.
      world_from_box: start pose.

    Returns:
      world_from_box: the most similar of all poses on the way.
    """
    import optax

    at_start = rigid.matmul(camera_from_world, world_from_box)
    images, valid, intrinsics = camera.windows(seen.images, seen.valid, seen.intrinsics, at_start, config.crop_px)
    unit = jnp.asarray([1.0] * 3 + [box.UNIT_MM] * 3)

    def pose_of(twist):
        return rigid.matmul(rigid.motion_about(world_from_box[:3, 3], unit * twist), world_from_box)

    def loss(twist):
        cameras = rigid.matmul(camera_from_world, pose_of(twist))
        drawn = render(params, config, intrinsics, cameras, *images.shape[1:])
        both = similarity.ncc(drawn, images, valid) + similarity.gradient_ncc(drawn, images, valid)
        return -0.5 * jnp.mean(both)

    tx = optax.adam(optax.exponential_decay(POSE_RATE, POSE_EVERY, POSE_DECAY, staircase=True))

    def step(state, _):
        twist, opt_state, best = state
        value, gradient = jax.value_and_grad(loss)(twist)
        better = value < best[0]
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), (value, twist), best)
        updates, opt_state = tx.update(gradient, opt_state, twist)
        return (optax.apply_updates(twist, updates), opt_state, best), None

    zero = jnp.zeros(6)
    start = zero, tx.init(zero), (jnp.asarray(jnp.inf), zero)
    (_, _, (_, found)), _ = jax.lax.scan(step, start, None, length=config.pose_steps)
    return pose_of(found)
