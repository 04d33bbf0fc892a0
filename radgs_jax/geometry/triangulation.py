"""Rays of pixels in the world, how far apart they pass, and the point nearest to several. numpy."""

import numpy as np


def rays(uv, intrinsics, camera_from_world):
    """Source (3,) and unit directions (n, 3) in the world of pixels (n, 2)."""
    xy = (uv - intrinsics[2:]) / intrinsics[:2]
    d = np.concatenate([xy, np.ones((len(uv), 1))], -1) @ camera_from_world[:3, :3]
    source = -camera_from_world[:3, :3].T @ camera_from_world[:3, 3]
    return source, d / np.linalg.norm(d, axis=-1, keepdims=True)


def ray_distance(source_a, d_a, source_b, d_b):
    """Shortest distances (n, m) in mm between rays (n, 3) and rays (m, 3): 0 where two pixels are of one point."""
    normal = np.cross(d_a[:, None], d_b[None])
    length = np.maximum(np.linalg.norm(normal, axis=-1), 1e-9)
    return np.abs(normal @ (source_b - source_a)) / length


def triangulate(sources, directions, spreads_mm):
    """World point nearest to rays, by weighted least squares, exactly.

    Args:
      sources, directions: (V, 3), the latter of unit length; spreads_mm: (V,) standard deviations across the rays.
    Returns:
      point (3,) and its covariance (3, 3) in mm^2.
    Raises:
      ValueError: fewer than two rays, parallel ones, or rays that are nearest to each other at a source or behind it.
    """
    across = np.eye(3) - directions[:, :, None] * directions[:, None]
    across = across / np.square(spreads_mm)[:, None, None]
    information = across.sum(0)
    if len(sources) < 2 or np.linalg.cond(information) > 1e8:
        raise ValueError("triangulate: wanted two rays or more that are not parallel")
    point = np.linalg.solve(information, np.einsum("vij,vj->i", across, sources))
    # Different pixels of one camera: their rays meet in its source.
    if (((point - sources) * directions).sum(1) < 1.0).any():
        raise ValueError("triangulate: wanted rays that meet before their sources")
    return point, np.linalg.inv(information)
