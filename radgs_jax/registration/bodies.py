"""Vertebrae of one scan, the rest of their body, and what each window of the X-rays says of their motions.

Around each vertebra a window of every X-ray is modelled as the vertebra, its two neighbours and the rest of the body. The terms are
those of `gauss_newton`: derivatives of images, gains, and t-distributed residuals.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax.geometry import camera
from radgs_jax.geometry import distortion
from radgs_jax.geometry import resample
from radgs_jax.geometry import rigid
from radgs_jax.geometry.distortion import COEFFICIENTS
from radgs_jax.registration import gauss_newton
from radgs_jax.registration.edges import derivatives
from radgs_jax.registration.gains import eliminate_gains
from radgs_jax.registration.gains import fit_gains
from radgs_jax.registration.gauss_newton import LevelViews
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.gauss_newton import Window
from radgs_jax.registration.parts import on_device
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.projection import project
from radgs_jax.registration.projection import project_near
from radgs_jax.registration.projection import Projection

VERTEBRAE_SEEN = 3
"""Vertebrae in a window: the one it is around, the one above and the one below."""
PARTS_SEEN = VERTEBRAE_SEEN + 1
"""Bodies in a window: those, then the rest."""
OF_BODIES, OF_WINDOW = 6 * PARTS_SEEN, 6 * PARTS_SEEN + COEFFICIENTS
"""Parameters of a window in one view: twists of its bodies, then the view's distortion."""


@flax.struct.dataclass
class Around:
    """What a window shows: its vertebra, the ones above and below, and the rest.

    Attributes:
      volumes: four (X, Y, Z), attenuation in 1/mm: each vertebra's above the muscle that fills its hole, and everything but these;
        ct_from_index: (4, 4, 4) of each; there: (4,) whether there is one.
      centres: (4, 3) CT mm, of the vertebrae, and for the rest of the one that the window is around.
    """

    volumes: tuple[Leaf, ...]
    ct_from_index: Leaf
    there: Leaf
    centres: Leaf


@dataclasses.dataclass(frozen=True)
class Bodies:
    """K vertebrae of one scan and the rest of their body.

    Attributes:
      around: what the window around each shows; centres: (K, 3) of the vertebrae, CT mm.
      neighbours: (K, 2) places in this list of the vertebrae above and below; -1 where it is not in the list.
      steps_apart: (K, 2) number of levels between the two, where there is one.
    """

    around: tuple[Around, ...]
    centres: Float[np.ndarray, "vertebrae 3"]
    neighbours: tuple[tuple[int, int], ...]
    steps_apart: tuple[tuple[int, int], ...]

    def seen(self, k: int) -> list[int]:
        """Places of what window k shows among the vertebrae and then the rest around each; k itself where there is no neighbour."""
        return [*_vertebrae_seen(k, self.neighbours[k]), len(self.around) + k]


def _vertebrae_seen(k, neighbours):
    return [k, *(j if j >= 0 else k for j in neighbours)]


def bodies_of(
    ct_from_box: Sequence[Float[Array, "4 4"]], parts: Sequence[Parts], levels_between: Sequence[int]
) -> Bodies:
    """`Bodies` of vertebrae of one scan, from head to feet.

    Args:
      ct_from_box, parts: K of each; levels_between: K - 1 numbers of levels from each to the next, 1 for neighbours.
    """
    boxes = [np.asarray(box, np.float64) for box in ct_from_box]
    ct_from_excess = [box @ np.asarray(p.box_from_excess, np.float64) for box, p in zip(boxes, parts)]
    ct_from_rest = [box @ np.asarray(p.box_from_rest, np.float64) for box, p in zip(boxes, parts)]
    centres = np.stack([box[:3, 3] for box in boxes])
    around, neighbours, apart = [], [], []
    for k, p in enumerate(parts):
        near = [j if 0 <= j < len(parts) else -1 for j in (k - 1, k + 1)]
        neighbours.append(tuple(near))
        apart.append(tuple(levels_between[min(j, k)] if j >= 0 else 1 for j in near))
        rest = np.array(p.rest)
        for j in near:
            if j >= 0:
                _take_out(np.asarray(parts[j].excess), ct_from_excess[j], rest, ct_from_rest[k])
        shown = _vertebrae_seen(k, near)
        around.append(
            Around(
                (*(parts[j].excess for j in shown), on_device(rest)),
                on_device([*(ct_from_excess[j] for j in shown), ct_from_rest[k]]),
                jax.device_put(np.array([True, *(j >= 0 for j in near), True])),
                on_device(centres[[*shown, k]]),
            )
        )
    return Bodies(tuple(around), centres, tuple(neighbours), tuple(apart))


def _take_out(excess, ct_from_excess, rest, ct_from_rest):
    """Takes a vertebra, most of whose volume is empty, out of a rest in place."""
    filled = [np.flatnonzero(excess.any(tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    # With a voxel round it, in which it fades.
    first, end = [max(f[0] - 1, 0) for f in filled], [f[-1] + 2 for f in filled]
    held = excess[tuple(slice(a, b) for a, b in zip(first, end))]
    ct_from_held = resample.part_from_index(ct_from_excess, first)
    met = resample.reached(np.linalg.inv(ct_from_rest) @ ct_from_held, held.shape, rest.shape)
    ct_from_met = resample.part_from_index(ct_from_rest, [part.start for part in met])
    rest[met] -= resample.resample(held, ct_from_held, ct_from_met, rest[met].shape)


def cut(
    views: LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    world_from_ct: Float[Array, "4 4"],
    centre: Float[Array, "3"],
    config: RefineConfig,
) -> tuple[Window, tuple[Projection, ...]]:
    """The window around a vertebra, and for each body in it a `Projection` of its shapes that shows nothing.

    Args:
      world_from_ct: pose at which it is cut; centre: of the vertebra, CT mm; config: of one level, that of `views`.
    """
    (level,) = config.levels
    box = jnp.eye(4).at[:3, 3].set(centre)
    camera_from_box = rigid.matmul(camera_from_world, rigid.matmul(world_from_ct, box))
    crops = camera.windows(views.images, views.valid, views.intrinsics, camera_from_box, level.size)
    shape = len(crops[0]), level.size, level.size
    unseen = Projection(jnp.eye(4), jnp.zeros(3), jnp.zeros(shape), jnp.zeros((*shape, 6)), jnp.zeros((*shape, 7, 2)))
    return gauss_newton.make_window(*crops, camera_from_world, config), (unseen,) * PARTS_SEEN


def linearised(
    around: Around,
    window: Window,
    near: tuple[Projection, ...],
    again: Bool[Array, ""],
    camera_from_world: Float[Array, "views 4 4"],
    world_from_ct: Float[Array, "4 4 4"],
    distortions: Float[Array, "views 3"],
    fields: Float[Array, " views"],
    config: RefineConfig,
) -> tuple[
    Float[jax.Array, "views 27 27"],
    Float[jax.Array, "views 27"],
    Float[jax.Array, "views blocks 27"],
    tuple[Projection, ...],
]:
    """Normal equations of a window in each view, over the twists of its bodies about their own centres and its distortion.

    A body is projected anew where it has moved by `gauss_newton.REUSE_PX` since.

    Args:
      near: of each body, from `cut` or an earlier step; again: whether to project all of them anew.
      camera_from_world: (V, 4, 4) corrected; world_from_ct: (4, 4, 4) current poses of the vertebra, the one above, the one below
        and the rest; distortions: (V, 3), small; fields: (V,) of `distortion.field`; config: of one level, that of `window`.
    Returns:
      normal matrices (V, 27, 27), right sides (V, 27), and what each square of pixels adds to those (V, B, 27), rad and mm, of
      the bodies, 0 where there is none, then of the distortion's coefficients, which have no unit; and `near` for the next step.
    """
    (level,) = config.levels
    seen = window.intrinsics, camera_from_world, level.size
    # The rest turns about the vertebra that the window is around.
    turned = jnp.concatenate([world_from_ct[:VERTEBRAE_SEEN], world_from_ct[:1]])
    centres = rigid.apply(turned, around.centres[:, None])[:, 0]
    images, filtered, used = [], [], []
    for i in range(PARTS_SEEN):
        step_mm = level.vertebra_step_mm if i < VERTEBRAE_SEEN else level.rest_step_mm
        body = around.volumes[i], around.ct_from_index[i], world_from_ct[i], centres[i]
        moved = rigid.twist_about(centres[i], rigid.matmul(world_from_ct[i], rigid.inverse(near[i].world_from_box)))
        has_moved = jnp.max(jnp.abs(moved) / rigid.TWIST_SCALE) > gauss_newton.REUSE_PX * level.pixel_mm
        anew = functools.partial(project, *body, *seen, step_mm, config.blur_px)
        used.append(jax.lax.cond(around.there[i] & (again | has_moved), anew, lambda i=i: near[i]))
        image, derived = project_near(used[i], world_from_ct[i], centres[i])
        images.append(image)
        filtered.append(derived)
    total = sum(images[1:], images[0])
    stretched = derivatives(distortion.stretch(total, window.intrinsics, fields), config.blur_px)
    # What the distortion moves is mostly the rest's, and has its gain.
    of_others = [part[..., 0, :] for part in filtered[1:]]
    of_rest = sum(of_others, jnp.sum(stretched * distortions[:, None, None, :, None], -2))
    of_excess = filtered[0][..., 0, :]
    gain_rest, gain_excess, columns, gains, weights = fit_gains(
        window.target, window.inside, window.weights, window.edge_count, of_rest, of_excess, total, config.gain_ridge
    )
    jacobian = [filtered[0][..., 1:, :] * gain_excess[..., None, None]]
    others = [*(part[..., 1:, :] for part in filtered[1:]), stretched]
    jacobian += [other * gain_rest[..., None, None] for other in others]
    residual = window.target - gain_rest[..., None] * of_rest - gain_excess[..., None] * of_excess
    equations = eliminate_gains(columns, gains, jnp.concatenate(jacobian, -2), residual, weights, config.gain_ridge)
    return *equations, tuple(used)
