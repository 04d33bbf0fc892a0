"""An X-ray turned until the head is up, at one pixel size. numpy."""

import dataclasses

import numpy as np
import scipy

from radgs_jax.geometry import camera
from radgs_jax.localization.network import MULTIPLE


@dataclasses.dataclass(frozen=True)
class Upright:
    """A view as the network sees it: image, valid (H, W), intrinsics (4,) and camera_from_world (4, 4) of that image.

    matrix (2, 2), offset (2,): pixel u, v of the view as it came = matrix @ (u, v) here + offset.
    """

    image: np.ndarray
    valid: np.ndarray
    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    matrix: np.ndarray
    offset: np.ndarray


def upright(image, valid, intrinsics, camera_from_world, pixel_mm):
    """An X-ray turned about its camera's axis until the head (+z of the world) is up, at one pixel size at the isocentre.

    Pixels are averaged over whole blocks, then sampled; the image is filled up to whole multiples of `MULTIPLE` pixels
    with pixels that are not valid.

    Args:
      image, valid: (H, W); intrinsics: (4,); camera_from_world: (4, 4); pixel_mm: of the result.
    Returns:
      `Upright`.
    Raises:
      ValueError: a beam within 30 degrees of the patient's axis.
    """
    focal, centre = intrinsics[:2], intrinsics[2:]
    feet = -camera_from_world[:2, 2]
    if np.linalg.norm(feet) < 0.5:
        raise ValueError("a beam along the patient (+z of the world)")
    feet = feet / np.linalg.norm(feet)
    turn = np.array([[feet[1], -feet[0]], [feet[0], feet[1]]])  # camera x, y to upright x, y
    fine = camera_from_world[2, 3] / focal
    block = np.maximum(1, np.rint(pixel_mm / fine)).astype(int).min()
    small, clear = camera.bin_image(image, block), camera.bin_image(valid, block)
    h, w = (block * n for n in small.shape)
    # Pixels here to pixels there: both are lengths at the isocentre.
    matrix = np.diag(1.0 / fine) @ turn.T * pixel_mm
    corners = np.array([[x, y] for x in (-0.5, w - 0.5) for y in (-0.5, h - 0.5)])
    corners = corners @ np.linalg.inv(matrix).T
    low, high = corners.min(0), corners.max(0)
    size = np.maximum(1, np.rint(high - low)).astype(int)
    offset = matrix @ (low + 0.5)
    to_small = (offset - 0.5 * (block - 1)) / block
    # scipy counts rows first.
    swap, start = matrix[::-1, ::-1] / block, to_small[::-1]
    shape = tuple(-(-size[::-1] // MULTIPLE) * MULTIPLE)
    sampled = scipy.ndimage.affine_transform(small, swap, start, shape, order=1, mode="nearest")
    clear = scipy.ndimage.affine_transform(clear, swap, start, shape, order=1, mode="constant") > 0.9
    rotation = np.eye(4)
    rotation[:2, :2] = turn
    scale = camera_from_world[2, 3] / pixel_mm
    middle = np.linalg.solve(matrix, centre - offset)
    return Upright(
        sampled.astype(np.float32),
        clear,
        np.array([scale, scale, *middle]),
        rotation @ camera_from_world,
        matrix,
        offset,
    )
