"""Centres of Gaussians that a network sees in one X-ray: 3DGR-CAR's centre predictor, and what it is trained against.

It follows the summary of Fu et al., "3DGR-CAR", MICCAI 2024, whose authors keep this part of their code, and two rebuilds by others
(of which G2304138H/3DGR-CAR is one): a U-Net of one view gives each patch of pixels a depth and three offsets. Ours also says which
patches show the vertebra, since cluttered X-rays show no outline. Depths run along a patch's ray from half a box before to half a
box behind the point nearest to the box's origin, and offsets along the camera's axes, so that neither depends on how the box is
turned: the boxes of training are the vertebrae's own at their starts, those of reconstructions have the world's axes. Targets come
from the Gaussians of the CT's vertebra at the true pose: their means, and on voxels of 3 mm the first hits of rays.
"""

from typing import Any
from typing import cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common import rays as pixel_rays
from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax import gaussians
from radgs_jax.baselines import box
from radgs_jax.baselines.box import BoxViews
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid
from radgs_jax.models import backbones

PATCH = 2
"""Side of a patch, pixels: the rebuilds' of 3DGR-CAR, whose paper leaves it open."""
OFFSET = 0.1
"""Largest offset of a centre along an axis, boxes: a rebuild's."""
GROUPS = 8
"""Groups of channels that are normalised: a rebuild's."""
SILOG_SHARE = 0.85
"""Share of the mean that the error of log depths leaves out: a rebuild's, as usual for depth."""
TARGET_SIDE, TARGET_SAMPLES = 32, 48
"""Voxels along a side and samples along a ray with which first hits are found: 3 and 2 mm. Chosen by hand: half is coarser than a
patch, twice costs more than the network."""
SURFACE = 0.01
"""Density of a first hit, 1/mm. Chosen by hand: half of soft tissue's; half and twice move the surface by less than a voxel."""


class DoubleConv(nn.Module):
    """Two 3-wide convolutions with norms, (B, h, w, C) to (B, h, w, width)."""

    width: int

    @nn.compact
    def __call__(self, x: backbones.Input) -> backbones.Features:
        for _ in range(2):
            x = nn.silu(nn.GroupNorm(GROUPS)(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        return x


class CentrePredictor(nn.Module):
    """U-Net of one view: for each patch a depth, three offsets and a presence, all before activation.

    X-rays are standardised over their valid pixels, because a real panel's gain and air value are unknown. The rebuild works on
    pixels and averages its answers over patches; ours works on patches, for a quarter of the time.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width"], valid: Bool[Array, "batch height width"]
    ) -> Float[jax.Array, "batch rows columns 5"]:
        count = jnp.maximum(jnp.sum(valid, (1, 2), keepdims=True), 1)
        level = jnp.where(valid, images - jnp.sum(jnp.where(valid, images, 0.0), (1, 2), keepdims=True) / count, 0.0)
        level = level * jax.lax.rsqrt(jnp.sum(level**2, (1, 2), keepdims=True) / count + 1e-6)
        x = backbones.space_to_depth(jnp.stack([level, valid.astype(images.dtype)], -1), PATCH)
        levels = []
        for stage, width in enumerate(self.widths):
            x = DoubleConv(width)(nn.max_pool(x, (2, 2), (2, 2)) if stage else x)
            levels.append(x)
        for skip in levels[-2::-1]:
            x = nn.ConvTranspose(skip.shape[-1], (2, 2), (2, 2))(x)
            x = DoubleConv(skip.shape[-1])(jnp.concatenate([skip, x], -1))
        return nn.Dense(5)(x)


@flax.struct.dataclass
class Centres:
    """What views say of their patches, (..., h, w).

    Attributes:
      place: (..., h, w, 3) centres, mm, box frame.
      depth: along the box, from 0 to 1.
      presence: whether the patch shows the vertebra, from 0 to 1.
    """

    place: Leaf
    depth: Leaf
    presence: Leaf


def _along_rays(depth, intrinsics, camera_from_box):
    """Points (..., h, w, n, 3), mm, box frame, at depths (..., h, w, n) along the rays of patches."""
    binned = (intrinsics - jnp.asarray([0, 0, 1, 1]) * 0.5 * (PATCH - 1)) / PATCH
    along = pixel_rays.rays(binned, *depth.shape[-3:-1])
    along = along / jnp.linalg.norm(along, axis=-1, keepdims=True)
    box_from_camera = rigid.inverse(camera_from_box)
    along = rigid.apply_rotation(box_from_camera[..., None, None, :3, :3], along)[..., None, :]
    source = box_from_camera[..., None, None, None, :3, 3]
    nearest = -jnp.sum(along * source, -1)
    return source + (nearest + (depth - 0.5) * box.BOX_MM)[..., None] * along


def lift(
    answers: Float[Array, "*views rows columns 5"],
    intrinsics: Float[Array, "*views 4"],
    camera_from_box: Float[Array, "*views 4 4"],
) -> Centres:
    """The network's answers in the box's frame; `intrinsics` are those of its windows."""
    depth, presence = jax.nn.sigmoid(answers[..., 0]), jax.nn.sigmoid(answers[..., 4])
    place = _along_rays(depth[..., None], intrinsics, camera_from_box)[..., 0, :]
    turn = jnp.swapaxes(camera_from_box[..., :3, :3], -1, -2)[..., None, None, :, :]
    offset = rigid.apply_rotation(turn, OFFSET * box.BOX_MM * jnp.tanh(answers[..., 1:4]))
    return Centres(place + offset, depth, presence)


def first_hits(
    cloud: Gaussians,
    intrinsics: Float[Array, "batch views 4"],
    camera_from_box: Float[Array, "batch views 4 4"],
    rows: int,
) -> tuple[Bool[jax.Array, "batch views {rows} {rows}"], Float[jax.Array, "batch views {rows} {rows}"]]:
    """Which patches show a cloud, and the depth, from 0 to 1, at which their rays first meet `SURFACE`.

    Args:
      cloud: Gaussians (B, N), box frame.
      intrinsics: of windows of `PATCH` times `rows` pixels.
    """
    density = gaussians.voxelize(cloud, box.box_grid(TARGET_SIDE))
    depths = (jnp.arange(TARGET_SAMPLES) + 0.5) / TARGET_SAMPLES
    everywhere = jnp.broadcast_to(depths, (*intrinsics.shape[:2], rows, rows, TARGET_SAMPLES))
    places = _along_rays(everywhere, intrinsics, camera_from_box)
    index = (places / box.BOX_MM + 0.5) * TARGET_SIDE - 0.5

    def sample(volume, index):
        return jax.scipy.ndimage.map_coordinates(volume, list(jnp.moveaxis(index, -1, 0)), order=1)

    above = jax.vmap(sample)(density, index) > SURFACE
    return jnp.any(above, -1), depths[jnp.argmax(above, -1)]


def chamfer(
    a: Float[Array, "*batch n 3"],
    a_counts: Bool[Array, "*batch n"],
    b: Float[Array, "*batch m 3"],
    b_counts: Bool[Array, "*batch m"],
) -> Float[jax.Array, ""]:
    """Mean distance from the points that count of one cloud to the nearest such point of the other, plus the other way."""
    inner = jnp.einsum("...ni,...mi->...nm", a, b, precision=jax.lax.Precision.HIGHEST)
    far = jnp.sum(a**2, -1)[..., :, None] - 2.0 * inner + jnp.sum(b**2, -1)[..., None, :]

    def one_way(far, a, a_counts, b, b_counts):
        near = jnp.argmin(jnp.where(b_counts[..., None, :], far, jnp.inf), -1)
        away = a - jnp.take_along_axis(b, near[..., None], -2)
        return box.masked_mean(jnp.sqrt(jnp.sum(away**2, -1) + 1e-6), a_counts)

    return one_way(far, a, a_counts, b, b_counts) + one_way(jnp.swapaxes(far, -1, -2), b, b_counts, a, a_counts)


def depth_error(
    found: Float[Array, "*views rows columns"], wanted: Float[Array, "*views rows columns"], hit: Bool[Array, "..."]
) -> Float[jax.Array, ""]:
    """Scale-invariant error of log depths, absolute error, and absolute error of differences between neighbours, where hit."""
    log = jnp.log(found) - jnp.log(wanted)
    silog = jnp.sqrt(
        jnp.maximum(box.masked_mean(log**2, hit) - SILOG_SHARE * box.masked_mean(log, hit) ** 2, 0.0) + 1e-6
    )
    slopes = 0.0
    for axis in (-2, -1):
        both = jax.lax.slice_in_dim(hit, 1, None, axis=axis) & jax.lax.slice_in_dim(hit, 0, -1, axis=axis)
        slopes += box.masked_mean(jnp.abs(jnp.diff(found - wanted, axis=axis)), both)
    return silog + box.masked_mean(jnp.abs(found - wanted), hit) + slopes


def predict(params: Any, widths: tuple[int, ...], views: BoxViews) -> Centres:
    """Centres of the patches of views, each by itself.

    Args:
      params: {'gcp': ...}; widths: as in `CentrePredictor`.
      views: of (V, ...) or (B, V, ...) arrays.
    """
    size = views.images.shape[-2:]
    answers = CentrePredictor(widths).apply(
        params["gcp"], views.images.reshape(-1, *size), views.valid.reshape(-1, *size)
    )
    answers = cast(jax.Array, answers)
    answers = answers.reshape(*views.images.shape[:-2], *answers.shape[1:])
    return lift(answers, views.intrinsics, views.camera_from_box)
