"""What the reconstructing systems of Table 1 share: a box around the vertebra, what X-rays show of it, and the body around it.

The box is a cube in world axes whose middle is where the start pose puts the vertebra. A system reconstructs what is in it. On
X-rays of a whole body that would have to swallow everything else that the rays meet, so a second, coarse grid of voxels takes
what is outside the box; only the box is scored. Both are fitted together, by the system's own loss on the sum of both images.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import cast
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common import rays as pixel_rays
from kernels.common.types import Array
from kernels.common.types import Leaf
from kernels.drr import drr
from radgs_jax import losses
from radgs_jax.geometry import camera
from radgs_jax.geometry import grid
from radgs_jax.geometry import rigid
from radgs_jax.geometry.grid import VoxelGrid
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import pyramid

if TYPE_CHECKING:
    import optax

BOX_MM = 96.0
"""Side of the box, mm: that of the case format's evaluation grid."""
SIDE = 96
"""Voxels along a side of a result: 1 mm."""
UNIT_MM = 0.5 * BOX_MM
"""Length that is 1 inside systems whose published rates and thresholds are for a scene in [-1, 1]^3, mm."""
UNIT_DENSITY = losses.DENSITY_RANGE
"""Density that is 1 inside them, 1/mm."""
UNIT_INTEGRAL = UNIT_MM * UNIT_DENSITY
"""Line integral that is 1 inside them, no unit."""
PIXEL_MM, CROP_PX = 1.12, 96
"""Pixels of the windows at the isocentre, mm, and their number along a side: together the box as a C-arm's views see it."""
LEAST_DENSITY = 1e-3
"""Least density that the body starts with, 1/mm: a twentieth of water's. With an unknown air value, X-rays may show less."""
SHARPNESS = 20.0
"""Of `softplus`, mm: DiffVox's, so that densities of bone are in the linear part."""


@flax.struct.dataclass
class BoxViews:
    """Windows of V X-rays around the box.

    Attributes:
      images: (V, S, S) line integrals; valid: (V, S, S) bool.
      intrinsics: (V, 4) of the windows; camera_from_box: (V, 4, 4), mm.
    """

    images: Leaf
    valid: Leaf
    intrinsics: Leaf
    camera_from_box: Leaf


@dataclasses.dataclass(frozen=True)
class BodyConfig:
    """The grid of voxels around the box.

    Attributes:
      side: voxels along a side; voxel_mm: of such a voxel: together a trunk.
      step_mm: of samples along rays.
      smoothness: weight of its total variation, mm.
      rate: Adam's, of voxels, 1/mm, and of air values.
      air: whether each view has an unknown constant, as where the exposure in air is unknown.
    """

    side: int = 48
    voxel_mm: float = 8.0
    step_mm: float = 6.0
    smoothness: float = 1.0
    rate: float = 2e-3
    air: bool = False


def world_from_box(
    world_from_ct: Float[np.ndarray, "4 4"], centroid: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "4 4"]:
    """The box's frame at a start pose: world axes, origin where the pose puts the mask's centroid, CT mm."""
    found = np.eye(4)
    found[:3, 3] = world_from_ct[:3, :3] @ centroid + world_from_ct[:3, 3]
    return found


_windows = jax.jit(camera.windows, static_argnums=4)


def box_views(
    xrays: Sequence[XRay],
    world_from_box: Float[np.ndarray, "4 4"],
    pixel_mm: float = PIXEL_MM,
    crop_px: int = CROP_PX,
) -> BoxViews:
    """The X-rays around a box, binned to about `pixel_mm` at the isocentre."""
    seen = pyramid.at_resolution(xrays, pixel_mm)
    poses = np.stack([xray.camera.camera_from_world for xray in xrays]) @ world_from_box
    camera_from_box = jnp.asarray(poses, jnp.float32)
    images, valid, intrinsics = _windows(seen.images, seen.valid, seen.intrinsics, camera_from_box, crop_px)
    return BoxViews(images, valid, intrinsics, camera_from_box)


def box_grid(side: int) -> VoxelGrid:
    """The box's voxels, `side` along each axis."""
    return grid.centred((side,) * 3, BOX_MM / side)


def softplus(x: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """log(1 + exp(s x)) / s with s of `SHARPNESS`."""
    return cast(jax.Array, jax.nn.softplus(SHARPNESS * x) / SHARPNESS)


def render(
    volume: Float[Array, "x y z"], voxels: VoxelGrid, views: BoxViews, step_mm: float
) -> Float[Array, "views size size"]:
    """Line integrals of densities on a grid in the box's frame."""
    index_from_camera = jnp.linalg.inv(rigid.matmul(views.camera_from_box, voxels.frame_from_index))[:, :3]
    height, width = views.images.shape[1:]
    return drr(volume, index_from_camera, views.intrinsics, height, width, step_mm=step_mm)


def to_result(volume: Float[Array, "side side side"]) -> Float[jax.Array, "96 96 96"]:
    """Densities of the box on voxels of 1 mm, interpolated from another number of voxels."""
    return jax.image.resize(volume, (SIDE,) * 3, "linear", antialias=False)


def init_body(config: BodyConfig, views: BoxViews) -> dict[str, jax.Array]:
    """Parameters of the body: `voxels` before `softplus`, and `air`, a constant a view.

    It starts with the same density everywhere, by which the mean line integral is the X-rays'. With more, the box would have to
    take away what is too much, and systems whose densities vanish never come back from there.
    """
    path_mm = _outside_image(config, jnp.ones((config.side,) * 3), views)
    mean = masked_mean(views.images, views.valid) / jnp.maximum(masked_mean(path_mm, views.valid), config.voxel_mm)
    start = jnp.log(jnp.expm1(SHARPNESS * jnp.maximum(mean, LEAST_DENSITY))) / SHARPNESS
    return {"voxels": jnp.full((config.side,) * 3, start), "air": jnp.zeros(len(views.images))}


def _outside(config, density):
    # The box's faces lie between voxels.
    places = (np.arange(config.side) - 0.5 * (config.side - 1)) * config.voxel_mm
    inner = np.abs(places) < 0.5 * BOX_MM
    return density * ~(inner[:, None, None] & inner[None, :, None] & inner[None, None, :])


def _outside_image(config, density, views):
    density = _outside(config, density)
    return render(density, grid.centred(density.shape, config.voxel_mm), views, config.step_mm)


def body_image(params: Mapping[str, Array], config: BodyConfig, views: BoxViews) -> Float[Array, "views size size"]:
    """Line integrals of what is outside the box, and the views' constants."""
    image = _outside_image(config, softplus(params["voxels"]), views)
    return image + params["air"][:, None, None] * config.air


def body_penalty(params: Mapping[str, Array], config: BodyConfig) -> Float[jax.Array, ""]:
    """Weighted total variation of the body."""
    return config.smoothness * losses.tv3d(_outside(config, softplus(params["voxels"])))


def masked_mean(values: Float[Array, "*pixels"], valid: Bool[Array, "*pixels"]) -> Float[jax.Array, ""]:
    """Mean over valid pixels; 0 without any."""
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def with_body(tx: "optax.GradientTransformation", config: BodyConfig | None) -> "optax.GradientTransformation":
    """The optimiser of {'box': ..., 'body': ...}: `tx` for the system's own parameters, Adam for the body's; of 'box' alone
    without a body."""
    import optax

    parts: dict[Hashable, optax.GradientTransformation] = {"box": tx}
    if config is not None:
        parts["body"] = optax.adam(config.rate)
    return optax.multi_transform(parts, {name: name for name in parts})


def parameters(box: Any, config: BodyConfig | None, views: BoxViews) -> dict[str, Any]:
    """{'box': `box`, 'body': `init_body`}, or the first alone."""
    return {"box": box} if config is None else {"box": box, "body": init_body(config, views)}


def surroundings(
    params: Mapping[str, Any], config: BodyConfig | None, views: BoxViews
) -> tuple[Float[Array, "views size size"], Float[jax.Array, ""]]:
    """`body_image` and `body_penalty` of `parameters`; zeros without a body."""
    if config is None:
        return jnp.zeros_like(views.images), jnp.zeros(())
    return body_image(params["body"], config, views), body_penalty(params["body"], config)


def descend(
    loss: Callable[..., Float[jax.Array, ""]],
    tx: "optax.GradientTransformation",
    params: Any,
    opt_state: Any,
    keys: jax.Array,
) -> tuple[Any, Any, Float[jax.Array, " steps"]]:
    """One step of `tx` on `loss(params, key)` for each key: parameters, the optimiser's state, and the losses before each step."""
    import optax

    def step(state, key):
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, opt_state), values = jax.lax.scan(step, (params, opt_state), keys)
    return params, opt_state, values


def box_rays(views: BoxViews) -> tuple[Float[jax.Array, "views 3"], Float[jax.Array, "views size size 3"]]:
    """Sources, mm, and unit directions of all pixels' rays, in the box's frame."""
    height, width = views.images.shape[1:]
    along = pixel_rays.rays(views.intrinsics, height, width)
    along = along / jnp.linalg.norm(along, axis=-1, keepdims=True)
    box_from_camera = rigid.inverse(views.camera_from_box)
    return box_from_camera[:, :3, 3], rigid.apply_rotation(box_from_camera[:, None, None, :3, :3], along)


def crossing(
    source: Float[Array, "*#rays 3"], direction: Float[Array, "*#rays 3"]
) -> tuple[Float[jax.Array, "*rays"], Float[jax.Array, "*rays"]]:
    """Distances from the source, mm, at which rays enter and leave the box; equal ones for a ray that misses it."""
    slope = jnp.where(jnp.abs(direction) < 1e-9, 1e-9, direction)
    a, b = ((sign * 0.5 * BOX_MM - source) / slope for sign in (-1.0, 1.0))
    near = jnp.max(jnp.minimum(a, b), -1)
    return near, jnp.maximum(near, jnp.min(jnp.maximum(a, b), -1))
