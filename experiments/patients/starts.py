"""Start poses from clicked points and from a localizer."""

import numpy as np

from radgs_jax import errors
from radgs_jax.geometry import triangulation
from radgs_jax.localization import locate


def start_from_points(cameras, pixels, vertebra):
    """A start pose from the vertebra's centre clicked in every view, with the CT's own orientation.

    Args:
      cameras: `Camera` of each view; pixels: one (u, v) per view; vertebra: `prepared.Vertebra`.
    Returns:
      world_from_ct (4, 4) and the rms distance of the rays from their common point, mm.
    Raises:
      InputError: a single view, or rays that do not meet.
    """
    lines = [triangulation.rays(np.array([p]), v.intrinsics, v.camera_from_world) for v, p in zip(cameras, pixels)]
    sources, directions = np.stack([source for source, _ in lines]), np.concatenate([d for _, d in lines])
    try:
        centre, _ = triangulation.triangulate(sources, directions, np.ones(len(lines)))
    except ValueError:
        found = "a single view" if len(lines) == 1 else "rays that are parallel or meet in a source"
        errors.fail("flags", "--points", found, "the vertebra's centre in views from two sides")
    away = centre - sources
    miss = away - (away * directions).sum(1, keepdims=True) * directions
    world_from_ct = np.eye(4)
    world_from_ct[:3, 3] = centre - vertebra.ct_from_box[:3, 3]
    return world_from_ct, float(np.sqrt((miss**2).sum(1).mean()))


def start_from_localizer(localizer, xrays, vertebra):
    """A start pose from the vertebra found in the X-rays.

    Args:
      localizer: `locate.Localizer`; xrays: `XRay`s; vertebra: `prepared.Vertebra`.
    Returns:
      world_from_ct (4, 4) and `locate.Located`.
    Raises:
      InputError: as `locate.locate`.
    """
    located = locate.locate(localizer, xrays, vertebra.label)
    return locate.start_pose(localizer, located, vertebra.label, vertebra.ct_from_box[:3, 3]), located
