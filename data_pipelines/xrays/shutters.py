"""The field that the tags of collimator and display shutter leave open, and whether the image agrees (PS3.3 C.7.6.11, C.8.7.3)."""

import pathlib
import typing

import numpy as np

from data_pipelines.xrays import dicom_tags
from data_pipelines.xrays import remarks
from radgs_jax import errors

if typing.TYPE_CHECKING:
    import pydicom

MAX_VERTEX_NUMBERS = 2000
"""Largest count of numbers in the vertices of a polygonal shutter. Chosen by hand: the mask's time grows with it."""
MIN_FIELD = 0.03
"""Smallest share of the image that the tags may leave: 17 % of either side, in which no vertebra is seen whole at usual fields of
25 cm and more. Chosen by hand: half lets next to nothing through, twice refuses close collimation of a single vertebra."""
SMALL_FIELD = 0.2
"""Share of the image below which the field that the tags leave is remarked on. Chosen by hand: twice remarks on usual fields, half
misses tags that were made for another image."""
BEYOND = 0.1
"""Share of a side by which edges may lie outside the image; open blades are written as 0, or one more than the last pixel. Chosen
by hand: half or twice still tells tags of a binned image, whose edges are at twice the side."""
BRIGHT = 0.5
"""Intensity of a bright pixel, as a fraction of quantile 0.99 of all. Chosen by hand: half takes scatter below a true collimator
for bright, twice leaves the brightest hundredth alone."""
MAX_LOST = 0.5
"""Share of the bright pixels that the tags may exclude before it is remarked on. Chosen by hand: shutters that trim a border lose
up to a third, since the bright pixels are beside the body; half remarks on these, and 1 is the maximum."""


def from_tags(path: pathlib.Path | str, header: "pydicom.Dataset", shape: tuple[int, int]) -> np.ndarray | None:
    """The area that the tags of collimator and display shutter leave open, (H, W) bool, or None without such tags.

    These tags count pixels from 1, and points are row \\ column.

    Raises:
      InputError: the tags contradict themselves, or leave less than MIN_FIELD of the image.
    """
    masks, shapes = [], []
    v, u = np.ogrid[1 : shape[0] + 1, 1 : shape[1] + 1]
    for noun in ("Collimator", "Shutter"):
        for form in dicom_tags.read(path, header, f"{noun}Shape", kind=str) or ():
            shapes.append(f"{noun}Shape {form}")
            if form == "RECTANGULAR":
                masks.append(_rectangle(path, header, noun, shape, v, u))
            elif form == "CIRCULAR":
                centre = dicom_tags.read(path, header, f"CenterOfCircular{noun}", 2)
                radius = dicom_tags.read(path, header, f"RadiusOfCircular{noun}", 1)
                if centre is None or radius is None or radius[0] <= 0:
                    errors.fail(path, f"circular {noun}", (centre, radius), "a centre and a radius above 0")
                masks.append((v - centre[0]) ** 2 + (u - centre[1]) ** 2 <= radius[0] ** 2)
            elif form == "POLYGONAL":
                points = dicom_tags.read(path, header, f"VerticesOfThePolygonal{noun}")
                if points is None or len(points) < 6 or len(points) % 2 or len(points) > MAX_VERTEX_NUMBERS:
                    errors.fail(path, f"polygonal {noun}", points and points[:6], "three vertices or more")
                masks.append(_inside_polygon(np.reshape(points, (-1, 2)), v, u))
            else:
                errors.fail(path, f"{noun}Shape", repr(form), "RECTANGULAR, CIRCULAR or POLYGONAL")
    if not masks:
        return None
    field = np.broadcast_to(np.logical_and.reduce(masks), shape)
    share = field.mean()
    if share < MIN_FIELD:
        wanted = f"{MIN_FIELD:.0%} or more: correct these tags, or remove them"
        errors.fail(path, ", ".join(shapes), f"{share:.2%} of the image left open", wanted)
    if share < SMALL_FIELD:
        remarks.remark(path, ", ".join(shapes), f"{share:.1%} of the image left open", "only these pixels count")
    return field


def _rectangle(path, header, noun, shape, v, u):
    sides = ("LeftVertical", "RightVertical", "UpperHorizontal", "LowerHorizontal")
    edges = [dicom_tags.read(path, header, f"{noun}{side}Edge", 1) for side in sides]
    if None in edges or edges[0] >= edges[1] or edges[2] >= edges[3]:
        errors.fail(path, f"{noun} edges", tuple(edges), "left < right and upper < lower")
    left, right, upper, lower = (edge[0] for edge in edges)
    outside = [
        edge
        for edge, side in ((left, shape[1]), (right, shape[1]), (upper, shape[0]), (lower, shape[0]))
        if not -BEYOND * side <= edge <= (1 + BEYOND) * side + 1
    ]
    if outside:
        found = f"edges at {', '.join(f'{edge:g}' for edge in outside)} in an image of {shape[0]} x {shape[1]}"
        remarks.remark(path, f"{noun} edges", found, "taken as they are; they may be those of another image size")
    return (u >= left) & (u <= right) & (v >= upper) & (v <= lower)


def _inside_polygon(vertices, v, u):
    """Mask of a polygon with (row, column) vertices, by the even-odd rule."""
    inside = np.zeros(np.broadcast_shapes(v.shape, u.shape), bool)
    for (v0, u0), (v1, u1) in zip(vertices, np.roll(vertices, -1, 0)):
        if v0 != v1:
            inside ^= ((v0 > v) != (v1 > v)) & (u < u0 + (v - v0) * (u1 - u0) / (v1 - v0))
    return inside


def compare(path: pathlib.Path | str, field: np.ndarray, signal: np.ndarray) -> None:
    """Remarks on tags that exclude what the image shows: a collimator leaves no bright pixels outside its field.

    Args:
      path: the file.
      field: (H, W) bool, open by the tags.
      signal: (H, W), grows with the X-rays.
    """
    bright = signal > BRIGHT * np.quantile(signal[np.isfinite(signal)], 0.99)
    lost = (bright & ~field).sum() / max(1, bright.sum())
    if lost > MAX_LOST:
        done = "the tags are followed; correct or remove them if they are of another image"
        remarks.remark(
            path, "collimator, shutter", f"{lost:.0%} of the bright pixels outside the field of the tags", done
        )
