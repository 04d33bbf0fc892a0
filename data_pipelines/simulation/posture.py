"""Random postures: a spine that bends smoothly, every vertebra a little off on its own, and soft tissue that follows.

Motions are ct_from_rest: rigid, of CT mm, from where the scan has something to where the posture puts it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from radgs_jax.geometry import rigid_host

WAVE_LEVELS = (6.0, 24.0)
"""Length of the waves in which a spine bends, in vertebrae: between an S and a single arc."""


@dataclasses.dataclass(frozen=True)
class Spine:
    """A scan's vertebrae from head to feet: labels (K,) VerSe numbers; ct_from_box (K, 4, 4) their frames at rest."""

    labels: tuple
    ct_from_box: np.ndarray

    @property
    def centres(self):
        """(K, 3) CT mm."""
        return self.ct_from_box[:, :3, 3]


@dataclasses.dataclass(frozen=True)
class Posture:
    """smooth (K, 4, 4): motions that soft tissue at each level shares; own (K, 4, 4): those of the vertebrae themselves."""

    smooth: np.ndarray
    own: np.ndarray


def draw(rng, spine, anchor, bend_deg, jitter_deg, jitter_mm):
    """A random `Posture` whose smooth part leaves level `anchor` (an index) where it is.

    Between neighbours the spine turns about the middle between their centres, by angles that run in waves along it.

    Args:
      rng: np.random.Generator; spine: `Spine`.
      bend_deg: (3,) largest angle between neighbours about the upper one's x (flexion), y (lateral bend), z (twist).
      jitter_deg, jitter_mm: largest turn about and shift along each axis of a vertebra of its own, beyond the smooth part.
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


def jitter(rng, centre, largest_deg, largest_mm):
    """A motion (4, 4) of one vertebra about its centre (3,) mm: a rotation vector and a shift, uniform along each axis."""
    twist = rng.uniform(-1.0, 1.0, 6) * ([np.radians(largest_deg)] * 3 + [largest_mm] * 3)
    return rigid_host.motion_about(centre, twist)


def _joint(spine, upper, angles):
    axes = spine.ct_from_box[upper, :3, :3]
    middle = 0.5 * (spine.centres[upper] + spine.centres[upper + 1])
    return rigid_host.motion_about(middle, np.concatenate([axes @ angles, np.zeros(3)]))


def pull_back(spine, smooth, ct_from_index, first, count):
    """Where soft tissue of a posed body comes from: (count, 3, 3) matrices, one for each slice first, first + 1, ... of a grid.

    A slice is a plane of constant third index. What is at (i, j, first + n) in the posture was at matrix n applied to
    (i, j, 1) in the scan, in voxel indices of the grid. Between vertebrae the inverse motions are blended by the slice's place
    among the posed centres (monotone cubics, Fritsch and Carlson 1980); beyond the last they stay. Neighbours differ by a
    few degrees, where blended matrices are rigid within a part in a thousand.

    Args:
      spine: `Spine`; smooth: (K, 4, 4) of its `Posture`; ct_from_index: (4, 4) of the grid.
    Raises:
      ValueError: posed centres that do not follow each other along the grid's third axis.
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
def warp(volumes, pull_back, shape, margin):
    """Volumes as a posture moves them.

    Args:
      volumes: tuple of (X, Y, Z) arrays, empty in the first and last planes of their first two axes.
      pull_back: (count, 3, 3) matrices of `pull_back`.
      shape: (X', Y') of the result, whose index (margin, margin) is the volume's (0, 0).
    Returns:
      tuple of (X', Y', count) arrays: trilinear samples, end values beyond the ends.
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

    # One by one: XLA samples both anew for each when they share a gather.
    return tuple(sample(v.reshape(-1)) for v in volumes)
