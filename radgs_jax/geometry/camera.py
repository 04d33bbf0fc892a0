"""Cameras as intrinsics and extrinsics, with exact binning.

Pixel centres are integers, u is the column and v the row. The camera's origin is the X-ray source, with +x along +u, +y along +v
and +z towards the panel. Lengths are in mm. Intrinsics are fx, fy, cx, cy in pixels.
"""

from collections.abc import Sequence
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Real
from jaxtyping import Shaped

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax.geometry import rigid


@flax.struct.dataclass
class Camera:
    """One view, or a batch of views of one image size. On the host the arrays are numpy's, in float64.

    Attributes:
      intrinsics: (..., 4) fx, fy, cx, cy, pixels.
      camera_from_world: (..., 4, 4) rigid, mm.
      height, width: static size of the image, pixels.
    """

    intrinsics: Leaf
    camera_from_world: Leaf
    height: int = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)


def project(camera: Camera, points_world: Real[Array, "*batch n 3"]) -> Float[Array, "*batch n 2"]:
    """Pixels (u, v) of world points. Points behind the source give meaningless values, possibly nan."""
    return project_camera(camera.intrinsics, rigid.apply(camera.camera_from_world, points_world))


def project_camera(
    intrinsics: Real[Array, "*batch 4"], points_camera: Real[Array, "*batch n 3"]
) -> Float[Array, "*batch n 2"]:
    """Pixels (u, v) of points in the camera's frame."""
    k = intrinsics[..., None, :]
    return points_camera[..., :2] / points_camera[..., 2:] * k[..., :2] + k[..., 2:]


def bin(camera: Camera, factor: int) -> Camera:
    """Camera of the image averaged over blocks of factor x factor pixels: u' = (u - (factor - 1) / 2) / factor. Exact.

    Rows and columns at the lower and right border that do not fill a block are dropped. Numpy arrays stay numpy arrays.
    """
    shift = np.array([0, 0, 0.5 * (factor - 1), 0.5 * (factor - 1)])
    return Camera(
        (camera.intrinsics - shift) / factor, camera.camera_from_world, camera.height // factor, camera.width // factor
    )


def bin_image(image: Shaped[Array, "*batch height width"], factor: int | np.integer) -> Float[Array, "*batch h w"]:
    """The image of the camera that `bin` returns. Booleans become the fraction that is true."""
    height, width = image.shape[-2] // factor, image.shape[-1] // factor
    rows = image[..., : height * factor, : width * factor].reshape(*image.shape[:-2], height, factor, width * factor)
    # Rows first, because adding whole rows is much faster than adding small blocks.
    return rows.mean(-2).reshape(*image.shape[:-2], height, width, factor).mean(-1)


def box_blur(image: Float[Array, "*batch height width"], radius: int) -> Float[jax.Array, "*batch height width"]:
    """Averages over the (2 radius + 1)^2 pixels around each pixel; the border is repeated outwards."""
    size = 2 * radius + 1
    padded = jnp.pad(image, [(0, 0)] * (image.ndim - 2) + [(radius, radius)] * 2, mode="edge")
    window = (1,) * (image.ndim - 2) + (size, size)
    return jax.lax.reduce_window(padded, 0.0, jax.lax.add, window, (1,) * image.ndim, "VALID") / size**2


def window(
    image: Float[Array, "height width"],
    valid: Bool[Array, "height width"],
    intrinsics: Float[Array, "4"],
    camera_from_box: Float[Array, "4 4"],
    size: int,
) -> tuple[Float[Array, "{size} {size}"], Bool[Array, "{size} {size}"], Float[Array, "4"]]:
    """Cuts a window around the projection of the box's origin, at whole pixels.

    Returns:
      The window, in which the image's edges are repeated outwards; its valid pixels, all of them inside the image; and its exact
      intrinsics.
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


def windows(
    images: Sequence[Float[Array, "_ _"]] | Float[Array, "views height width"],
    valid: Sequence[Bool[Array, "_ _"]] | Bool[Array, "views height width"],
    intrinsics: Float[Array, "views 4"],
    camera_from_box: Float[Array, "views 4 4"],
    size: int,
) -> tuple[
    Float[jax.Array, "views {size} {size}"], Bool[jax.Array, "views {size} {size}"], Float[jax.Array, "views 4"]
]:
    """`window` of several views, stacked. Images may differ in size."""
    crops = [window(*view, size) for view in zip(images, valid, intrinsics, camera_from_box)]
    cut, inside, moved = (jnp.stack(parts) for parts in zip(*crops))
    return cut, inside, moved


def binning(camera: Camera, pixel_mm: float) -> int:
    """Integer factor that brings the camera's pixel size at the isocentre nearest to `pixel_mm`."""
    return cast(int, max(1, round(pixel_mm * camera.intrinsics[0] / camera.camera_from_world[2, 3])))
