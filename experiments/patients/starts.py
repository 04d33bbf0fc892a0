"""Start poses from clicked points and from a localizer."""

from collections.abc import Sequence

import numpy as np

from radgs_jax import errors
from radgs_jax.geometry import triangulation
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.localization import locate
from radgs_jax.registration.prepared import Vertebra


def start_from_points(
    cameras: Sequence[Camera], pixels: Sequence[Sequence[float]], vertebra: Vertebra
) -> tuple[np.ndarray, float]:
    """A start pose from the vertebra's centre clicked in every view, with the CT's own orientation.

    Args:
      cameras: one per view; pixels: one (u, v) per view; vertebra: whose centre was clicked.
    Returns:
      world_from_ct (4, 4), mm, and the rms distance of the rays from their common point, mm.
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


def start_from_localizer(
    localizer: locate.Localizer, xrays: Sequence[XRay], vertebra: Vertebra
) -> tuple[np.ndarray, locate.Located]:
    """A start pose from the vertebra that a localizer finds in the X-rays.

    Returns:
      world_from_ct (4, 4), mm, and what was found.
    Raises:
      InputError: as `locate.locate`.
    """
    located = locate.locate(localizer, xrays, vertebra.label)
    return locate.start_pose(localizer, located, vertebra.label, vertebra.ct_from_box[:3, 3]), located
