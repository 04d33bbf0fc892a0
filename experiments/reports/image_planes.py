"""Where X-rays are drawn in space: on a plane behind the vertebra, across the cone of their rays."""

import numpy as np
from jaxtyping import Float
from jaxtyping import Real

from radgs_jax.geometry.camera import Camera

BEHIND = 1.35
"""Depth of the drawn picture planes, relative to the vertebra's distance from the source. Chosen by hand, to be seen."""


def world_from_pixel(camera: Camera, centre_world: Real[np.ndarray, "3"]) -> Float[np.ndarray, "4 4"]:
    """From (u, v, n, 1) to world mm: pixels of the image on its plane behind a vertebra, and n mm beyond the plane.

    Each pixel (u, v, 0) lies on its own ray. The plane is parallel to the panel.

    Args:
      centre_world: the vertebra's centre, mm.
    """
    world_from_camera = np.linalg.inv(np.asarray(camera.camera_from_world, np.float64))
    fx, fy, cx, cy = np.asarray(camera.intrinsics, np.float64)
    depth = BEHIND * float(np.linalg.norm(world_from_camera[:3, 3] - centre_world))
    camera_from_pixel = np.array(
        [[depth / fx, 0, 0, -depth * cx / fx], [0, depth / fy, 0, -depth * cy / fy], [0, 0, 1, depth], [0, 0, 0, 1]]
    )
    return world_from_camera @ camera_from_pixel


def source(camera: Camera) -> Float[np.ndarray, "3"]:
    """The X-ray source in the world, mm."""
    return np.linalg.inv(np.asarray(camera.camera_from_world, np.float64))[:3, 3]


def corners(camera: Camera, world_from_pixel: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 3"]:
    """The image's outer corners in the world, mm, in the order in which its border is drawn."""
    u = np.array([0, camera.width, camera.width, 0]) - 0.5
    v = np.array([0, 0, camera.height, camera.height]) - 0.5
    return (np.stack([u, v, np.zeros(4), np.ones(4)], -1) @ world_from_pixel.T)[:, :3]
