"""Lumps of bone that the systems of Table 1 are tried on, and views of them."""

import jax.numpy as jnp
import numpy as np

from radgs_jax.baselines import box
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid


def gaussian_lump(spread_mm, scales_mm, count=40, centre_mm=(4.0, -6.0, 3.0), densities=(0.01, 0.03), seed=0):
    """An off-centre lump of anisotropic, turned Gaussians, mm and 1/mm.

    Args:
      spread_mm: standard deviations of the means along the axes; scales_mm, densities: smallest and largest.
    """
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(count, 3)) * spread_mm + np.asarray(centre_mm)
    quaternion = rng.normal(size=(count, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    parts = rng.uniform(*densities, count), mean, rng.uniform(*scales_mm, (count, 3)), quaternion
    return Gaussians(*(jnp.asarray(a, jnp.float32) for a in parts))


def voxel_lump(side=box.SIDE):
    """An anisotropic, off-centre lump, 1/mm, on `side`^3 voxels of the box."""
    axis = (np.arange(side) - 0.5 * (side - 1)) * box.BOX_MM / side
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    square = ((x - 9.0) / 10.0) ** 2 + ((y + 6.0) / 16.0) ** 2 + ((z - 3.0) / 24.0) ** 2
    return jnp.asarray(0.045 * np.exp(-0.5 * square), jnp.float32)


def oblique_views(count, size=24):
    """Blank C-arm views, not on one circle, whose principal point is not the middle; pixels of 4.6 mm."""
    turns, shifts = zip(*[([0.1, -0.2 + 0.9 * i, 0.3 - 0.2 * i], [3.0, -2.0, 700.0 + 5.0 * i]) for i in range(count)])
    camera_from_box = rigid.transform(rigid.exp_so3(jnp.asarray(turns)), jnp.asarray(shifts))
    intrinsics = jnp.asarray([[152.0, 150.0, 11.0, 12.5]] * count)
    images = jnp.zeros((count, size, size))
    return box.BoxViews(images, jnp.ones_like(images, bool), intrinsics, camera_from_box)
