"""An X-ray turned until the head is up, at one pixel size. numpy."""

import dataclasses

import numpy as np
import scipy
from jaxtyping import Bool
from jaxtyping import Real

from kernels.common.types import Array
from radgs_jax.geometry import camera
from radgs_jax.localization.network import MULTIPLE

MIN_SINE = 0.5
"""Smallest sine of the angle between the beam and the patient's axis, no unit (30 degrees). Chosen by hand: such views show the
vertebrae one behind the other. At half, views of 15 degrees are accepted; at 1, none are."""
MIN_COVER = 0.9
"""Fraction of a sampled pixel that must be valid, no unit. Chosen by hand: at half, pixels at the collimator's edge mix in what
lies outside; 1 would lose pixels to rounding."""


@dataclasses.dataclass(frozen=True)
class Upright:
    """A view as the network sees it.

    Attributes:
      image, valid: the turned image and its valid pixels.
      intrinsics, camera_from_world: its camera.
      matrix, offset: from its pixels to those of the original view, (u, v) original = matrix @ (u, v) + offset.
    """

    image: Real[np.ndarray, "height width"]
    valid: Bool[np.ndarray, "height width"]
    intrinsics: Real[np.ndarray, "4"]
    camera_from_world: Real[np.ndarray, "4 4"]
    matrix: Real[np.ndarray, "2 2"]
    offset: Real[np.ndarray, "2"]


def upright(
    image: Real[Array, "height width"],
    valid: Bool[Array, "height width"],
    intrinsics: Real[Array, "4"],
    camera_from_world: Real[Array, "4 4"],
    pixel_mm: float,
) -> Upright:
    """Turns an X-ray about its camera's axis until the head (+z of the world) is up, and brings it to one pixel size.

    Pixels are averaged over whole blocks, then sampled. The image is padded to multiples of `MULTIPLE` pixels with invalid pixels.

    Args:
      pixel_mm: pixel size of the result at the isocentre.

    Raises:
      ValueError: a beam within 30 degrees of the patient's axis.
    """
    focal, centre = intrinsics[:2], intrinsics[2:]
    feet = -camera_from_world[:2, 2]
    if np.linalg.norm(feet) < MIN_SINE:
        raise ValueError("a beam along the patient (+z of the world)")
    feet = feet / np.linalg.norm(feet)
    turn = np.array([[feet[1], -feet[0]], [feet[0], feet[1]]])  # camera x, y to upright x, y
    fine = camera_from_world[2, 3] / focal
    block = np.maximum(1, np.rint(pixel_mm / fine)).astype(int).min()
    small, clear = camera.bin_image(image, block), camera.bin_image(valid, block)
    h, w = (block * n for n in small.shape)
    # From pixels of the result to pixels of the view, which are both lengths at the isocentre.
    matrix = np.diag(1.0 / fine) @ turn.T * pixel_mm
    corners = np.array([[x, y] for x in (-0.5, w - 0.5) for y in (-0.5, h - 0.5)])
    corners = corners @ np.linalg.inv(matrix).T
    low, high = corners.min(0), corners.max(0)
    size = np.maximum(1, np.rint(high - low)).astype(int)
    offset = matrix @ (low + 0.5)
    to_small = (offset - 0.5 * (block - 1)) / block
    # scipy's axes are rows, then columns.
    swap, start = matrix[::-1, ::-1] / block, to_small[::-1]
    shape = tuple(-(-size[::-1] // MULTIPLE) * MULTIPLE)
    sampled = scipy.ndimage.affine_transform(small, swap, start, shape, order=1, mode="nearest")
    clear = scipy.ndimage.affine_transform(clear, swap, start, shape, order=1, mode="constant") > MIN_COVER
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
