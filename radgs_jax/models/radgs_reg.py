"""RadGS-Reg: RecM and RegM joined, and the registration that iterates them from a start pose."""

import flax.struct
import jax
import jax.numpy as jnp

from radgs_jax import camera
from radgs_jax import gaussians
from radgs_jax import rigid
from radgs_jax.models import recm
from radgs_jax.models import regm
from radgs_jax.models.recm import Reconstruction


def init(config, key, views=2):
    """Fresh parameters {'recm': ..., 'regm': ...} for a `ModelConfig` and so many views, from a PRNG key."""
    size = config.crop_px
    key_rec, key_reg = jax.random.split(key)
    camera_from_box = jnp.broadcast_to(jnp.eye(4).at[2, 3].set(700.0), (1, views, 4, 4))
    intrinsics = jnp.broadcast_to(jnp.asarray([467.0, 467.0, 0.5 * size, 0.5 * size]), (1, views, 4))
    side = round(config.gaussians ** (1 / 3)) + 1
    anchors = jax.tree.map(lambda a: a[None, : config.gaussians], gaussians.uniform_cloud(side, 60.0 / side, 0.02))
    volume = jnp.zeros((1, *(config.grid,) * 3))
    return {
        "recm": recm.RecM(config).init(
            key_rec,
            jnp.zeros((1, views, size, size)),
            jnp.ones((1, views, size, size), bool),
            intrinsics,
            camera_from_box,
            anchors,
        ),
        "regm": regm.RegM(config).init(key_reg, volume, volume),
    }


@flax.struct.dataclass
class Registration:
    """One registration.

    world_from_box: (4, 4) after the last pass; trajectory: (passes + 1, 4, 4) with the start first; reconstruction: what
    the last pass saw, Gaussians (1, N) in the box frame of `trajectory[-2]`; xrays: (V, H, W) its crops; intrinsics (V, 4).
    """

    world_from_box: jax.Array
    trajectory: jax.Array
    reconstruction: Reconstruction
    xrays: jax.Array
    intrinsics: jax.Array


def crop_view(image, valid, intrinsics, camera_from_box, size):
    """The size x size window of a view round the projection of the box's origin, at whole pixels; repeated edges beyond it.

    Args:
      image, valid: (H, W); intrinsics: (4,); camera_from_box: (4, 4).
    Returns:
      window (size, size), where it is valid (nowhere beyond the image), and its exact intrinsics (4,).
    """
    origin = camera.project_camera(intrinsics, camera_from_box[None, :3, 3])[0]
    corner = jnp.round(origin).astype(jnp.int32) - size // 2
    height, width = image.shape
    corner = jnp.clip(corner, -size, jnp.asarray([width, height]))
    rows, columns = corner[1] + jnp.arange(size), corner[0] + jnp.arange(size)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    shift = jnp.concatenate([jnp.zeros(2), corner.astype(intrinsics.dtype)])
    return image[rows][:, columns], valid[rows][:, columns] & inside, intrinsics - shift


def register(
    params, config, images, valid, intrinsics, camera_from_world, world_from_box, cloud, passes, inner_passes=2
):
    """Iterates RecM and RegM from a start pose; deterministic, of static cost.

    Each pass crops the X-rays at the current pose, reconstructs, registers the CT's Gaussians to the reconstruction, and
    moves the pose by the result.

    Args:
      images: V line-integral images (H_v, W_v), binned to about config.pixel_mm at the isocentre; views may differ in size.
      valid: V arrays (H_v, W_v) bool, the pixels that count.
      intrinsics: (V, 4) of those images; camera_from_world: (V, 4, 4); world_from_box: (4, 4) the start.
      cloud: the CT vertebra's Gaussians (N,), box frame. passes, inner_passes: static counts (RecM, RegM per RecM).
    Returns:
      `Registration`.
    """
    model = recm.RecM(config)
    anchors = jax.tree.map(lambda a: a[None], cloud)

    def one_pass(world_from_box, _):
        camera_from_box = rigid.matmul(camera_from_world, world_from_box)
        views = zip(images, valid, intrinsics, camera_from_box)
        crops = [crop_view(*view, config.crop_px) for view in views]
        xrays, inside, k = (jnp.stack(parts) for parts in zip(*crops))
        reconstruction = model.apply(params["recm"], xrays[None], inside[None], k[None], camera_from_box[None], anchors)
        motion = regm.estimate(params["regm"], config, reconstruction.effect, anchors, inner_passes)[0]
        moved = rigid.matmul(world_from_box, motion)
        return moved, (moved, reconstruction, xrays, k)

    final, (poses, reconstructions, xrays, k) = jax.lax.scan(one_pass, world_from_box, None, length=passes)
    last = jax.tree.map(lambda a: a[-1], (reconstructions, xrays, k))
    return Registration(final, jnp.concatenate([world_from_box[None], poses]), *last)
