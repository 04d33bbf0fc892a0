"""Exposed fields of any convex shape, told from what surrounds them by their numbers alone: it is constant, or far darker."""

import numpy as np
import scipy

from radgs_jax.geometry import camera

# All constants are chosen by hand; test_line_integral_fields.py checks them on simulated fields.
_MIN_EDGE = 0.2
"""Smallest share of the image's edge that has the surroundings' value. Half takes scattered clipped pixels, twice misses fields
that reach over most of the edge."""
_SOLID = 0.6
"""Smallest share of constant surroundings whose four neighbours have the same value. Half takes clipped noise, 1 is the maximum."""
_MIN_FIELD = 0.02
"""Smallest field as a share of the image. Half takes bright specks, twice misses strongly collimated fields."""
_MIN_AROUND = 0.003
"""Smallest share of the image that lies outside. Half takes single rows, which lose nothing; twice misses narrow borders."""
_CONVEX = 0.96
"""Smallest share of its convex hull that a field fills. Lower takes anatomy, and 1 is the maximum: a field of pixels has steps."""
_JUMP = 0.3
"""Smallest difference of line integrals between constant surroundings and the field's rim. Half takes a body's thin rim, twice
misses fields that show much air."""
_STEEP = 0.65
"""Smallest ratio of that difference at the rim to that deeper inside, and of a black border's fall within two pixels to that within
four. A round body in air, whose line integrals rise from 0 with
the root of the depth, has 0.4; nearer to 1 misses fields whose rim shows air."""
_RIM_PX, _DEEP_PX = (1.5, 3.5), (10.0, 16.0)
"""Distances from the border in pixels that are the rim and deeper inside. Half sees the penumbra, twice needs larger fields."""
_SMALL_PX = 192
"""Larger side of the image that black surroundings are searched in, at most, in pixels. Half is less exact, twice takes four times
as long."""
_GAP = 1.5
"""Smallest difference of line integrals between the brightest twentieth of black surroundings and the darkest twentieth of the
field. Half takes dense anatomy beside air, twice misses fields of thick bodies."""
_SHARP = 0.9
"""Share of a black border's points where line integrals fall by _GAP within four pixels. Half takes anatomy; 1 is the maximum."""


def field_in_constant(image: np.ndarray) -> np.ndarray | None:
    """The field (H, W) bool of line integrals whose surroundings have exactly one value, such as 0; None if there is none.

    Args:
      image: (H, W) line integrals.
    """
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    values, counts = np.unique(edge, return_counts=True)
    if counts.max() < _MIN_EDGE * edge.size:
        return None
    value = values[np.argmax(counts)]
    around = _reaching_the_edge(image == value)
    if scipy.ndimage.binary_erosion(around, border_value=1).sum() < _SOLID * around.sum():
        return None
    field = _field_within(around)
    if field is None:
        return None
    depth = scipy.ndimage.distance_transform_edt(field)
    rim, deep = (_within(depth, *limits) for limits in (_RIM_PX, _DEEP_PX))
    if not rim.any() or not deep.any():
        return None
    jump, inner = (np.median(np.abs(image[part] - value)) for part in (rim, deep))
    return field if jump > _JUMP and jump > _STEEP * inner else None


def field_in_black(image: np.ndarray) -> np.ndarray | None:
    """The field (H, W) bool of line integrals that are all far lower than those of its surroundings; None if there is none.

    Args:
      image: (H, W) line integrals, finite.
    """
    factor = max(1, -(-max(image.shape) // _SMALL_PX))
    small = scipy.ndimage.gaussian_filter(camera.bin_image(image, factor), 0.7)
    if min(small.shape) < 32:
        return None
    field = _field_within(_reaching_the_edge(small > _threshold(small)))
    if field is None:
        return None
    well_inside = scipy.ndimage.binary_erosion(field, iterations=2, border_value=1)
    near_inside = scipy.ndimage.binary_dilation(field, iterations=2)
    if not well_inside.any() or near_inside.all():
        return None
    if np.quantile(small[~near_inside], 0.05) - np.quantile(small[well_inside], 0.95) < _GAP:
        return None
    rim = field & ~well_inside
    fall = _range_within(small, 9)[rim]
    if (fall > _GAP).mean() < _SHARP or np.median(_range_within(small, 5)[rim] / np.maximum(fall, _GAP)) < _STEEP:
        return None
    equations = _hull(field).equations
    v, u = (np.arange(n, dtype=np.float32) for n in image.shape)
    inside = np.ones(image.shape, bool)
    for a, b, c in equations:
        inside &= (a * u + (b * v + factor * c - 0.5 * (factor - 1) * (a + b))[:, None]) <= 0
    return inside


def _range_within(image, width):
    return scipy.ndimage.maximum_filter(image, width) - scipy.ndimage.minimum_filter(image, width)


def _reaching_the_edge(mask):
    """The part of a mask that is connected to the image's edge."""
    labels, _ = scipy.ndimage.label(mask)
    reached = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, reached[reached > 0])


def _field_within(around):
    """The largest part that `around` leaves, if that is one convex field; else None."""
    if around.mean() < _MIN_AROUND:
        return None
    labels, count = scipy.ndimage.label(~around)
    if count == 0:
        return None
    field = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    middle = field[field.shape[0] // 2, field.shape[1] // 2]
    if (
        not middle
        or field.mean() < _MIN_FIELD
        or (~field).mean() < _MIN_AROUND
        or min(np.ptp(at) for at in np.nonzero(field)) < 8
    ):
        return None
    hull = _hull(field)
    # The hull goes through the centres of the outermost pixels, so it lacks half a pixel along its length.
    return field if field.sum() >= _CONVEX * (hull.volume + 0.5 * hull.area) else None


def _hull(field):
    rows = np.flatnonzero(field.any(1))
    first, last = field[rows].argmax(1), field.shape[1] - 1 - field[rows][:, ::-1].argmax(1)
    return scipy.spatial.ConvexHull(np.concatenate([np.stack([first, rows], 1), np.stack([last, rows], 1)]))


def _within(depth, low, high):
    return (depth > low) & (depth <= high)


def _threshold(image):
    """The value that parts an image into two classes with most variance between them (Otsu)."""
    counts, edges = np.histogram(image, 128)
    middles = 0.5 * (edges[:-1] + edges[1:])
    below = np.cumsum(counts)[:-1].astype(np.float64)
    total, moment = np.cumsum(counts * middles)[:-1], (counts * middles).sum()
    above = image.size - below
    between = below * above * (total / np.maximum(below, 1) - (moment - total) / np.maximum(above, 1)) ** 2
    return edges[1 + np.argmax(between)]
