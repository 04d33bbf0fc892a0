"""A rigid part's line integrals in several views, and their derivatives by its motion."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array
from kernels.common.types import Leaf
from kernels.drr import drr_and_motion
from radgs_jax.geometry import rigid
from radgs_jax.registration.edges import derivatives
from radgs_jax.registration.edges import einsum


def project_part(
    volume: Float[Array, "x y z"],
    box_from_index: Float[Array, "4 4"],
    world_from_box: Float[Array, "4 4"],
    centre: Float[Array, "3"],
    intrinsics: Float[Array, "views 4"],
    camera_from_world: Float[Array, "views 4 4"],
    size: int,
    step_mm: float,
) -> tuple[Float[Array, "views {size} {size}"], Float[Array, "views {size} {size} 6"]]:
    """Line integrals of a part, and their derivatives by a twist (rad, mm) in world axes about `centre`.

    Args:
      volume: attenuation in 1/mm; centre: world mm; size: pixels along the square image; step_mm: sample distance.
    """
    camera_from_index = rigid.matmul(camera_from_world, rigid.matmul(world_from_box, box_from_index))
    index_from_camera = jnp.linalg.inv(camera_from_index)[:, :3]
    world_from_centre = jnp.eye(4).at[:3, 3].set(centre)
    return drr_and_motion(
        volume,
        index_from_camera,
        intrinsics,
        size,
        size,
        camera_from_frame=rigid.matmul(camera_from_world, world_from_centre),
        step_mm=step_mm,
    )


@flax.struct.dataclass
class Projection:
    """A part's line integrals in V square views at one pose.

    Attributes:
      world_from_box: (4, 4) the pose; centre: (3,) about which it is turned, world mm.
      image: (V, S, S); motion: (V, S, S, 6) its derivatives by a twist in world axes, rad and mm.
      filtered: (V, S, S, 7, 2) `edges.derivatives` of the image, then of those.
    """

    world_from_box: Leaf
    centre: Leaf
    image: Leaf
    motion: Leaf
    filtered: Leaf


def project(
    volume: Float[Array, "x y z"],
    box_from_index: Float[Array, "4 4"],
    world_from_box: Float[Array, "4 4"],
    centre: Float[Array, "3"],
    intrinsics: Float[Array, "views 4"],
    camera_from_world: Float[Array, "views 4 4"],
    size: int,
    step_mm: float,
    blur_px: float,
) -> Projection:
    """The `Projection` of a part; arguments as of `project_part`, and `blur_px` of `edges.derivatives`."""
    views = intrinsics, camera_from_world, size, step_mm
    image, motion = project_part(volume, box_from_index, world_from_box, centre, *views)
    filtered = derivatives(jnp.concatenate([image[..., None], motion], -1), blur_px)
    pose, centre = jnp.asarray(world_from_box), jnp.asarray(centre)
    return Projection(pose, centre, jnp.asarray(image), jnp.asarray(motion), filtered)


def project_near(
    projection: Projection, world_from_box: Float[Array, "4 4"], centre: Float[Array, "3"]
) -> tuple[Float[Array, "views size size"], Float[Array, "views size size 7 2"]]:
    """Image and `Projection.filtered` at a near pose, to first order in its motion, with twists about another centre."""
    motion = rigid.matmul(world_from_box, rigid.inverse(projection.world_from_box))
    twist = rigid.twist_about(projection.centre, motion)
    image = projection.image + einsum("vyxp,p->vyx", projection.motion, twist)
    here, turn, shift = jnp.split(projection.filtered, (1, 4), -2)
    here = here + einsum("vyxpd,p->vyxd", projection.filtered[..., 1:, :], twist)[..., None, :]
    # A turn about the new centre is one about the old centre and a shift.
    turn = turn + jnp.cross((projection.centre - centre)[:, None], shift, axis=-2)
    return image, jnp.concatenate([here, turn, shift], -2)
