"""Random postures: a spine that bends smoothly, vertebrae that deviate from the bend, and soft tissue that follows it.

Motions are rigid maps of CT coordinates, mm: from a place in the scan to the same tissue's place in the posture.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from radgs_jax.geometry import rigid_host

WAVE_LEVELS = (6.0, 24.0)
"""Shortest and longest wavelength of a spine's bend, in vertebrae; chosen by hand. 6 bends a lumbar spine into an S, 24 into a
single arc; shorter waves would be indistinguishable from independent motions of the vertebrae."""


@dataclasses.dataclass(frozen=True)
class Spine:
    """A scan's vertebrae from head to feet.

    Attributes:
      labels: K VerSe numbers.
      ct_from_box: (K, 4, 4) frames of the vertebrae in the scan.
    """

    labels: tuple[int, ...]
    ct_from_box: np.ndarray

    @property
    def centres(self) -> np.ndarray:
        """Origins of the frames, (K, 3) CT mm."""
        return self.ct_from_box[:, :3, 3]


@dataclasses.dataclass(frozen=True)
class Posture:
    """Motions of K vertebrae.

    Attributes:
      smooth: (K, 4, 4) of the soft tissue at each level.
      own: (K, 4, 4) of the vertebrae.
    """

    smooth: np.ndarray
    own: np.ndarray


def draw_posture(
    rng: np.random.Generator,
    spine: Spine,
    anchor: int,
    bend_deg: Sequence[float],
    jitter_deg: float,
    jitter_mm: float,
) -> Posture:
    """Draws a posture. Neighbouring vertebrae turn about the point midway between them, by angles that vary in waves.

    Args:
      anchor: index of the level that the smooth motion leaves in place.
      bend_deg: (3,) largest angle between neighbours about the upper one's x (flexion), y (lateral bend) and z (twist).
      jitter_deg, jitter_mm: largest turn about and shift along each axis of a single vertebra, beyond the smooth motion.
    """
    count = len(spine.labels)
    length, phase = rng.uniform(*WAVE_LEVELS, 3), rng.uniform(0.0, 2.0 * np.pi, 3)
    amplitude = np.radians(bend_deg) * rng.uniform(-1.0, 1.0, 3)
    angles = amplitude * np.cos(2.0 * np.pi * np.arange(max(count - 1, 0))[:, None] / length + phase)
    smooth = np.tile(np.eye(4), (count, 1, 1))
    for level in range(anchor + 1, count):
        smooth[level] = smooth[level - 1] @ _joint(spine, level - 1, angles[level - 1])
    for level in range(anchor - 1, -1, -1):
        smooth[level] = smooth[level + 1] @ np.linalg.inv(_joint(spine, level, angles[level]))
    own = [motion @ jitter(rng, centre, jitter_deg, jitter_mm) for motion, centre in zip(smooth, spine.centres)]
    return Posture(smooth, np.stack(own))


def jitter(rng: np.random.Generator, centre: np.ndarray, largest_deg: float, largest_mm: float) -> np.ndarray:
    """Draws a motion (4, 4) of one vertebra about its centre (3,): a rotation vector and a shift, uniform along each axis."""
    twist = rng.uniform(-1.0, 1.0, 6) * ([np.radians(largest_deg)] * 3 + [largest_mm] * 3)
    return rigid_host.motion_about(centre, twist)


def _joint(spine, upper, angles):
    """Rotation (4, 4) below level `upper` by `angles` (3,) rad about its axes, about the point midway to the next level."""
    axes = spine.ct_from_box[upper, :3, :3]
    middle = 0.5 * (spine.centres[upper] + spine.centres[upper + 1])
    return rigid_host.motion_about(middle, np.concatenate([axes @ angles, np.zeros(3)]))


def pull_back(spine: Spine, smooth: np.ndarray, ct_from_index: np.ndarray, first: int, count: int) -> np.ndarray:
    """Where in the scan the soft tissue of a posture comes from, one affine map for each slice of a grid.

    Between vertebrae the inverse motions are interpolated along the grid's third axis (monotone cubics, Fritsch and Carlson
    1980); beyond the last vertebrae they are constant. Neighbours differ by a few degrees, so that the interpolated matrices
    are rigid to about one part in a thousand.

    Args:
      smooth: (K, 4, 4) of the spine's `Posture`.
      ct_from_index: (4, 4) of the grid.
      first, count: first slice (plane of constant third index) and number of slices.

    Returns:
      (count, 3, 3): matrix n maps (i, j, 1) of slice first + n in the posture to voxel indices in the scan.

    Raises:
      ValueError: posed vertebrae that do not follow each other along the grid's third axis.
    """
    back, index_from_ct = np.linalg.inv(smooth), np.linalg.inv(ct_from_index)
    posed = np.einsum("kij,kj->ki", smooth[:, :3, :3], spine.centres) + smooth[:, :3, 3]
    place = posed @ index_from_ct[2, :3] + index_from_ct[2, 3]
    slices = first + np.arange(count)
    if len(place) > 1:
        if not (np.diff(place) < 0).all():
            raise ValueError("the posed vertebrae do not follow each other along the scan's third axis, head to feet")
        blend = scipy.interpolate.PchipInterpolator(place[::-1], back[::-1])
        back = blend(np.clip(slices, place[-1], place[0]))
    else:
        back = np.repeat(back, count, 0)
    affines = (index_from_ct @ back @ ct_from_index)[:, :3]
    return np.stack([affines[..., 0], affines[..., 1], affines[..., 2] * slices[:, None] + affines[..., 3]], -1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def warp(
    volumes: tuple[jax.Array, ...], pull_back: jax.Array, shape: tuple[int, int], margin: int
) -> tuple[jax.Array, ...]:
    """Resamples volumes into a posture.

    Args:
      volumes: (X, Y, Z) each, zero in the first and last planes of the first two axes, whose values are repeated outside.
      pull_back: (count, 3, 3) matrices of `pull_back`.
      shape: (X', Y') of the result.
      margin: index along the first two axes at which the result holds the volumes' index 0.

    Returns:
      (X', Y', count) each, by trilinear interpolation.
    """
    i = jnp.arange(shape[0], dtype=jnp.float32)[:, None, None] - margin
    j = jnp.arange(shape[1], dtype=jnp.float32)[None, :, None] - margin
    size = volumes[0].shape
    places = [
        jnp.clip(pull_back[:, a, 0] * i + pull_back[:, a, 1] * j + pull_back[:, a, 2], 0.0, n - 1.0)
        for a, n in enumerate(size)
    ]
    low = [jnp.minimum(jnp.floor(p).astype(jnp.int32), n - 2) for p, n in zip(places, size)]
    x, y, z = (p - c for p, c in zip(places, low))
    corner = (low[0] * size[1] + low[1]) * size[2] + low[2]

    def sample(flat):
        def along_z(offset):
            a, b = flat[corner + offset], flat[corner + offset + 1]
            return a + z * (b - a)

        def along_y(offset):
            a, b = along_z(offset), along_z(offset + size[2])
            return a + y * (b - a)

        a, b = along_y(0), along_y(size[1] * size[2])
        return a + x * (b - a)

    # Sampled one by one: where volumes share a gather, XLA repeats the gather of all of them for each result.
    return tuple(sample(v.reshape(-1)) for v in volumes)
