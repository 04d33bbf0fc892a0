"""Refinements of a pose that do not model the rest of the body, for comparison with `registration.gauss_newton`.

Each is the Levenberg-Marquardt method on SE(3). They fit the vertebra's projection to the image that a reconstruction renders, fit
its gradients to those of the raw X-ray around the vertebra, or maximise the overlap of Gaussians in 3D.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common import symmetric
from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.registration import edges
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import projection
from radgs_jax.registration.parts import Parts

SILHOUETTE = 0.02
"""Line integral above which a pixel shows the vertebra, no unit. Chosen by hand: about 1 mm of spongy bone; half and twice move the
outline by less than a pixel."""
MARGIN_PX = 4
"""Margin around the vertebra's silhouette within which gradients are compared, pixels. Chosen by hand: at half, a start that is far
off leaves the vertebra's edges outside; at twice, more of the neighbours enters."""
FIRST_DAMPING = 1e-2
"""Damping at the start, relative to the diagonal. Chosen by hand, as are the next two: less takes longer first steps, more takes
shorter ones; the factors correct it within a few steps."""
DAMPING_FACTORS = (0.3, 4.0)
"""Factors on the damping after a step that lowers the cost, and after one that does not."""
DAMPING_RANGE = (1e-6, 1e3)
"""Limits of the damping: a pure Gauss-Newton step, and almost none."""
MIN_CURVATURE = 1e-4
"""Smallest curvature of the overlap's logarithm, 1/mm^2. Chosen by hand: it limits steps in flat directions; at half and twice,
these are longer and shorter."""


def _descend(linearise, start, steps):
    """The pose (4, 4) after `steps` Levenberg-Marquardt steps; a step that does not lower the cost is not taken.

    Args:
      linearise: pose -> cost, gradient (6,) and curvature (6, 6) with respect to a twist about the pose's centre in world axes, in
        units of `rigid.TWIST_SCALE`.
    """

    def body(state, _):
        pose, (cost, gradient, curvature), damping = state
        system = curvature + damping * jnp.diag(jnp.diag(curvature)) + 1e-9 * jnp.eye(6)
        step = -jnp.linalg.solve(system, gradient)
        step = step / jnp.maximum(1.0, jnp.max(jnp.abs(step)) / gauss_newton.STEP_MM)
        tried = rigid.matmul(rigid.motion_about(pose[:3, 3], step * rigid.TWIST_SCALE), pose)
        found = linearise(tried)
        better = found[0] < cost
        chosen = jax.tree.map(lambda a, b: jnp.where(better, a, b), (tried, found), (pose, (cost, gradient, curvature)))
        return (*chosen, jnp.clip(jnp.where(better, *DAMPING_FACTORS) * damping, *DAMPING_RANGE)), None

    state, _ = jax.lax.scan(body, (start, linearise(start), jnp.float32(FIRST_DAMPING)), None, length=steps)
    return state[0]


def _least_squares(residual, jacobian):
    return (
        0.5 * jnp.sum(residual**2),
        jnp.einsum("...p,...->p", jacobian, residual),
        jnp.einsum("...p,...q->pq", jacobian, jacobian),
    )


def _drawn(bare, pose, views, camera_from_world, size, step_mm):
    image, motion = projection.project_part(
        bare.excess, bare.box_from_excess, pose, pose[:3, 3], views, camera_from_world, size, step_mm
    )
    return image, motion * jnp.asarray(rigid.TWIST_SCALE, jnp.float32)


@functools.partial(jax.jit, static_argnames="steps")
def to_clean_image(
    bare: Parts,
    images: Float[Array, "views size size"],
    intrinsics: Float[Array, "views 4"],
    camera_from_world: Float[Array, "views 4 4"],
    start: Float[Array, "4 4"],
    steps: int = 20,
) -> Float[jax.Array, "4 4"]:
    """Fits the vertebra's projection, with a free gain per view, to images of the vertebra alone, by least squares.

    Args:
      bare: the vertebra in air.
      images: line integrals, as a reconstruction renders them.
      start: world_from_box.
      steps: number of steps, static.

    Returns:
      world_from_box.
    """

    def linearise(pose):
        drawn, motion = _drawn(bare, pose, intrinsics, camera_from_world, images.shape[-1], 1.0)
        gain = jnp.sum(drawn * images, (1, 2)) / (jnp.sum(drawn**2, (1, 2)) + 1e-6)
        return _least_squares(gain[:, None, None] * drawn - images, gain[:, None, None, None] * motion)

    return _descend(linearise, start, steps)


@functools.partial(jax.jit, static_argnames=("size", "steps"))
def to_raw_gradients(
    bare: Parts,
    views: gauss_newton.LevelViews,
    camera_from_world: Float[Array, "views 4 4"],
    start: Float[Array, "4 4"],
    size: int,
    steps: int = 15,
    sigma_px: float = 1.0,
) -> Float[jax.Array, "4 4"]:
    """Maximises the correlation between gradients of the vertebra's projection and of the raw X-rays, around its place at the
    start.

    Args:
      bare, start, steps: as in `to_clean_image`.
      views: X-rays at one resolution.
      size: side of the window, pixels, static.
      sigma_px: standard deviation of the derivative filter.

    Returns:
      world_from_box.
    """
    camera_from_box = rigid.matmul(camera_from_world, start)
    images, valid, intrinsics = camera.windows(views.images, views.valid, views.intrinsics, camera_from_box, size)
    silhouette, _ = _drawn(bare, start, intrinsics, camera_from_world, size, 1.0)
    window = (1, 2 * MARGIN_PX + 1, 2 * MARGIN_PX + 1)
    seen = (silhouette > SILHOUETTE).astype(jnp.float32)
    near = jax.lax.reduce_window(seen, -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME")
    inside = (near * edges.interior(valid, 3))[..., None, None]

    def unit(values, motion=None):
        norm = jnp.sqrt(jnp.sum(values**2, (1, 2, 3, 4), keepdims=True) + 1e-9)
        values = values / norm
        if motion is None:
            return values
        along = jnp.sum(values * motion, (1, 2, 4), keepdims=True)
        return values, (motion - along * values) / norm

    wanted = unit(inside * edges.derivatives(images[..., None], sigma_px))

    def linearise(pose):
        drawn, motion = _drawn(bare, pose, intrinsics, camera_from_world, size, 1.0)
        filtered = inside * edges.derivatives(jnp.concatenate([drawn[..., None], motion], -1), sigma_px)
        found, slopes = unit(filtered[..., :1, :], filtered[..., 1:, :])
        return _least_squares((found - wanted)[..., 0, :], jnp.moveaxis(slopes, -2, -1))

    return _descend(linearise, start, steps)


def overlap(a: Gaussians, b: Gaussians) -> Float[jax.Array, ""]:
    """Integral over space of the product of two clouds, (N,) and (M,), in closed form; mm.

    For two Gaussians with covariances A and B it is their densities times (2 pi)^(3/2) sqrt(|A| |B| / |A + B|)
    exp(-d' (A + B)^-1 d / 2), with d the difference of their means.
    """

    def covariance(cloud):
        R = rigid.matrix_from_quaternion(cloud.quaternion)
        return jnp.einsum("nij,nj,nkj->nik", R, cloud.scale**2, R)

    both = symmetric.from_matrix(covariance(a))[:, None] + symmetric.from_matrix(covariance(b))[None]
    away = a.mean[:, None] - b.mean[None]
    square = jnp.sum(away * rigid.apply_rotation(symmetric.to_matrix(symmetric.inverse(both)), away), -1)
    volumes = jnp.prod(a.scale, -1)[:, None] * jnp.prod(b.scale, -1)[None] / jnp.sqrt(symmetric.determinant(both))
    weights = a.density[:, None] * b.density[None] * volumes
    return (2.0 * jnp.pi) ** 1.5 * jnp.sum(weights * jnp.exp(-0.5 * square))


@functools.partial(jax.jit, static_argnames="steps")
def to_gaussians(
    cloud: Gaussians, reconstruction: Gaussians, start: Float[Array, "4 4"], steps: int = 10
) -> Float[jax.Array, "4 4"]:
    """Maximises the overlap of the CT's Gaussians with the reconstruction's.

    Args:
      cloud: (N,), box frame.
      reconstruction: (M,), world frame.
      start, steps: as in `to_clean_image`.

    Returns:
      world_from_box.
    """

    def linearise(pose):
        def cost(twist):
            moved = rigid.matmul(rigid.motion_about(pose[:3, 3], twist * rigid.TWIST_SCALE), pose)
            return -jnp.log(overlap(gaussians.move(cloud, moved), reconstruction) + 1e-9)

        zero = jnp.zeros(6)
        # Far from the optimum the curvature may be negative; with its absolute value the step still descends.
        values, vectors = jnp.linalg.eigh(jax.hessian(cost)(zero))
        return cost(zero), jax.grad(cost)(zero), (vectors * jnp.maximum(jnp.abs(values), MIN_CURVATURE)) @ vectors.T

    return _descend(linearise, start, steps)
