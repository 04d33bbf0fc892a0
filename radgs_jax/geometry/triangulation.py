"""Rays of pixels in the world, the distance between two of them, and the point nearest to several. numpy."""

import numpy as np
from jaxtyping import Float
from jaxtyping import Real

PARALLEL = 1e-9
"""Smallest sine of the angle between two rays, no unit. It only avoids division by zero for parallel rays, whose distance is then
reported as 0; half or twice makes no difference."""
MAX_CONDITION = 1e8
"""Largest condition number of a triangulation, no unit. Chosen by hand below float64's 1e16: two rays whose angle is 2e-4 rad reach
it. Half or twice changes that angle by 1.4 times."""
MIN_DEPTH_MM = 1.0
"""Smallest distance of a triangulated point from every source, mm. Chosen by hand: rays of one camera meet at 0 mm, and real points
lie hundreds of mm away, so half or twice makes no difference."""


def rays(
    uv: Real[np.ndarray, "n 2"], intrinsics: Real[np.ndarray, "4"], camera_from_world: Real[np.ndarray, "4 4"]
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "n 3"]]:
    """Source and unit directions, in the world, of the rays through pixels."""
    xy = (uv - intrinsics[2:]) / intrinsics[:2]
    d = np.concatenate([xy, np.ones((len(uv), 1))], -1) @ camera_from_world[:3, :3]
    source = -camera_from_world[:3, :3].T @ camera_from_world[:3, 3]
    return source, d / np.linalg.norm(d, axis=-1, keepdims=True)


def ray_distance(
    source_a: Float[np.ndarray, "3"],
    d_a: Float[np.ndarray, "n 3"],
    source_b: Float[np.ndarray, "3"],
    d_b: Float[np.ndarray, "m 3"],
) -> Float[np.ndarray, "n m"]:
    """Shortest distances in mm between the rays of one view and those of another; 0 where two pixels show the same point."""
    normal = np.cross(d_a[:, None], d_b[None])
    length = np.maximum(np.linalg.norm(normal, axis=-1), PARALLEL)
    return np.abs(normal @ (source_b - source_a)) / length


def triangulate(
    sources: Float[np.ndarray, "views 3"],
    directions: Float[np.ndarray, "views 3"],
    spreads_mm: Float[np.ndarray, " views"],
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"]]:
    """World point nearest to rays, by weighted linear least squares.

    Args:
      directions: of unit length.
      spreads_mm: standard deviations across the rays.

    Returns:
      The point and its covariance in mm^2.

    Raises:
      ValueError: fewer than two rays, parallel rays, or rays that are nearest to each other at a source or behind it.
    """
    across = np.eye(3) - directions[:, :, None] * directions[:, None]
    across = across / np.square(spreads_mm)[:, None, None]
    information = across.sum(0)
    if len(sources) < 2 or np.linalg.cond(information) > MAX_CONDITION:
        raise ValueError("triangulate: wanted two rays or more that are not parallel")
    point = np.linalg.solve(information, np.einsum("vij,vj->i", across, sources))
    # Rays through different pixels of one camera meet at its source.
    if (((point - sources) * directions).sum(1) < MIN_DEPTH_MM).any():
        raise ValueError("triangulate: wanted rays that meet before their sources")
    return point, np.linalg.inv(information)
