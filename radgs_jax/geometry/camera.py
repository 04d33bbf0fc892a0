"""Cameras as intrinsics and extrinsics, with exact binning.

Conventions: pixel centres are integers, u is the column and v the row; the camera sits at the X-ray source, +x along +u,
+y along +v, +z to the detector; world mm. Intrinsics are (..., 4): fx, fy, cx, cy in pixels.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from radgs_jax.geometry import rigid


@flax.struct.dataclass
class Camera:
    """One view, or a batch of views of one image size. On the host its arrays are numpy's, float64.

    intrinsics: (..., 4) fx, fy, cx, cy; camera_from_world: (..., 4, 4) rigid, mm; height, width: static pixels.
    """

    intrinsics: jax.Array
    camera_from_world: jax.Array
    height: int = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)


def project(camera, points_world):
    """Pixel (u, v) of world points (..., N, 3) -> (..., N, 2); nan or wild values for points not before the source."""
    return project_camera(camera.intrinsics, rigid.apply(camera.camera_from_world, points_world))


def project_camera(intrinsics, points_camera):
    """Pixel (u, v) of camera-frame points (..., N, 3) for intrinsics (..., 4)."""
    k = intrinsics[..., None, :]
    return points_camera[..., :2] / points_camera[..., 2:] * k[..., :2] + k[..., 2:]


def bin(camera, factor):
    """Camera of the image averaged over factor x factor pixels: u' = (u - (factor - 1) / 2) / factor. Exact.

    Rows and columns that do not fill a block at the lower and right border fall away. Numpy cameras stay numpy, float64.
    """
    shift = np.array([0, 0, 0.5 * (factor - 1), 0.5 * (factor - 1)])
    return Camera(
        (camera.intrinsics - shift) / factor, camera.camera_from_world, camera.height // factor, camera.width // factor
    )


def bin_image(image, factor):
    """Image (..., H, W) averaged over factor x factor pixels, as `bin` describes."""
    height, width = image.shape[-2] // factor, image.shape[-1] // factor
    rows = image[..., : height * factor, : width * factor].reshape(*image.shape[:-2], height, factor, width * factor)
    # Rows first: whole ones are added much faster than small blocks.
    return rows.mean(-2).reshape(*image.shape[:-2], height, width, factor).mean(-1)


def box_blur(image, radius):
    """Image (..., H, W) averaged over the (2 radius + 1)^2 pixels round each one, its border repeated beyond it."""
    size = 2 * radius + 1
    padded = jnp.pad(image, [(0, 0)] * (image.ndim - 2) + [(radius, radius)] * 2, mode="edge")
    window = (1,) * (image.ndim - 2) + (size, size)
    return jax.lax.reduce_window(padded, 0.0, jax.lax.add, window, (1,) * image.ndim, "VALID") / size**2


def window(image, valid, intrinsics, camera_from_box, size):
    """The size x size window of a view round the projection of the box's origin, at whole pixels; repeated edges beyond it.

    Args:
      image, valid: (H, W); intrinsics: (4,); camera_from_box: (4, 4).
    Returns:
      window (size, size), where it is valid (nowhere beyond the image), and its exact intrinsics (4,).
    """
    origin = project_camera(intrinsics, camera_from_box[None, :3, 3])[0]
    corner = jnp.round(origin).astype(jnp.int32) - size // 2
    height, width = image.shape
    corner = jnp.clip(corner, -size, jnp.asarray([width, height]))
    rows, columns = corner[1] + jnp.arange(size), corner[0] + jnp.arange(size)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    shift = jnp.concatenate([jnp.zeros(2), corner.astype(intrinsics.dtype)])
    return image[rows][:, columns], valid[rows][:, columns] & inside, intrinsics - shift


def windows(images, valid, intrinsics, camera_from_box, size):
    """`window` of V views that may differ in size, stacked: images, where they are valid (V, size, size), intrinsics (V, 4)."""
    crops = [window(*view, size) for view in zip(images, valid, intrinsics, camera_from_box)]
    return tuple(jnp.stack(parts) for parts in zip(*crops))


def binning(camera, pixel_mm):
    """Whole factor that brings a camera's pixel, at the isocentre, nearest to `pixel_mm`."""
    return max(1, round(pixel_mm * camera.intrinsics[0] / camera.camera_from_world[2, 3]))
