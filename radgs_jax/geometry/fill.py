"""Values for the invalid pixels of an image that make no edges."""

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array


def fill(image: Float[Array, "h w"], valid: Bool[Array, "h w"]) -> Float[np.ndarray, "h w"]:
    """The image with values in its invalid pixels that continue their surroundings smoothly.

    Means of valid pixels over blocks of 2 x 2, and of those means again, are carried back to the pixels that have none: pull-push
    interpolation (Gortler et al., "The Lumigraph", SIGGRAPH 1996), in time proportional to the number of pixels. Derivatives at
    the rim of what is left out are then those of the picture round it, not of the metal. An image without valid pixels becomes 0.
    """
    weight = np.asarray(valid, np.float32)
    return np.where(valid, image, _pull_push(np.where(valid, image, 0).astype(np.float32), weight))


def _pull_push(image, weight):
    """Values everywhere, of values times their weights (0 to 1), from which the coarser grids fill what has too little weight."""
    if weight.min() >= 1.0:
        return image
    if min(image.shape) == 1:
        mean = image.sum() / max(float(weight.sum()), 1e-12)
        return np.where(weight > 0, image / np.maximum(weight, 1e-12), mean)
    room = [(0, n % 2) for n in image.shape]
    shape = [(n + 1) // 2 for n in image.shape]
    sums = [np.pad(a, room).reshape(shape[0], 2, shape[1], 2).sum((1, 3)) for a in (image, weight)]
    # A block with one valid pixel is known; blocks weigh 1 at most.
    scale = 1.0 / np.maximum(sums[1], 1.0)
    coarse = _pull_push(sums[0] * scale, sums[1] * scale)
    return image + (1.0 - weight) * _double(coarse, image.shape)


def _double(coarse, shape):
    """The coarse image at twice the resolution, linear between the middles of its pixels."""
    for axis, n in enumerate(shape):
        place = np.clip((np.arange(n) - 0.5) / 2.0, 0, coarse.shape[axis] - 1)
        low = np.floor(place).astype(int)
        high, part = np.minimum(low + 1, coarse.shape[axis] - 1), (place - low).astype(np.float32)
        part = part[:, None] if axis == 0 else part
        coarse = (1 - part) * np.take(coarse, low, axis) + part * np.take(coarse, high, axis)
    return coarse
