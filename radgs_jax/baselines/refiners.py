"""Ways to refine a pose that know nothing of the rest of the body: what `radgs_jax.refinement` is measured against.

Each is Levenberg and Marquardt's method on SE(3), with analytic Jacobians: against the clean image that a reconstruction
renders, against the gradients of the raw X-ray round the vertebra, and of the overlap of Gaussians in 3D.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.common import symmetric
from radgs_jax import gaussians
from radgs_jax.geometry import camera
from radgs_jax.geometry import rigid
from radgs_jax.registration import edges
from radgs_jax.registration import gauss_newton

SILHOUETTE = 0.02
"""Line integral above which a pixel shows the vertebra."""
MARGIN_PX = 4


def _descend(linearise, start, steps):
    """The pose (4, 4) after `steps` of Levenberg and Marquardt; a step that does not lower the cost is not taken.

    Args:
      linearise: pose -> cost, gradient (6,) and curvature (6, 6) in a twist about its centre in world axes, over
        `rigid.TWIST_SCALE`.
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
        return (*chosen, jnp.clip(jnp.where(better, 0.3, 4.0) * damping, 1e-6, 1e3)), None

    state, _ = jax.lax.scan(body, (start, linearise(start), jnp.float32(1e-2)), None, length=steps)
    return state[0]


def _least_squares(residual, jacobian):
    return (
        0.5 * jnp.sum(residual**2),
        jnp.einsum("...p,...->p", jacobian, residual),
        jnp.einsum("...p,...q->pq", jacobian, jacobian),
    )


def _drawn(bare, pose, views, camera_from_world, size, step_mm):
    image, motion = gauss_newton.project_part(
        bare.excess, bare.box_from_excess, pose, pose[:3, 3], views, camera_from_world, size, step_mm
    )
    return image, motion * jnp.asarray(rigid.TWIST_SCALE, jnp.float32)


@functools.partial(jax.jit, static_argnames="steps")
def to_clean_image(bare, images, intrinsics, camera_from_world, start, steps=20):
    """Least squares of the vertebra's projection, under a free gain a view, to images of the vertebra alone.

    Args:
      bare: `prepared.Parts` of the vertebra in air; images: (V, S, S) line integrals, as a reconstruction renders them.
      intrinsics: (V, 4); camera_from_world: (V, 4, 4); start: (4, 4) world_from_box.
    Returns:
      world_from_box (4, 4).
    """

    def linearise(pose):
        drawn, motion = _drawn(bare, pose, intrinsics, camera_from_world, images.shape[-1], 1.0)
        gain = jnp.sum(drawn * images, (1, 2)) / (jnp.sum(drawn**2, (1, 2)) + 1e-6)
        return _least_squares(gain[:, None, None] * drawn - images, gain[:, None, None, None] * motion)

    return _descend(linearise, start, steps)


@functools.partial(jax.jit, static_argnames=("size", "steps"))
def to_raw_gradients(bare, views, camera_from_world, start, size, steps=15, sigma_px=1.0):
    """Correlation of the gradients of the vertebra's projection and of the raw X-rays, round the vertebra at the start.

    Args:
      bare, camera_from_world, start: as in `to_clean_image`; views: `gauss_newton.LevelViews`; size: pixels along the window.
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


def overlap(a, b):
    """Integral over space of the product of two densities of Gaussians, (N,) and (M,), in closed form; 1/mm.

    Of two Gaussians with covariances A and B it is their densities times (2 pi)^(3/2) sqrt(|A| |B| / |A + B|)
    exp(-d' (A + B)^-1 d / 2), d the distance of their means.
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
def to_gaussians(cloud, reconstruction, start, steps=10):
    """The pose at which the CT's Gaussians overlap the reconstruction's most.

    Args:
      cloud: Gaussians (N,), box frame; reconstruction: Gaussians (M,), world frame; start: (4, 4) world_from_box.
    """

    def linearise(pose):
        def cost(twist):
            moved = rigid.matmul(rigid.motion_about(pose[:3, 3], twist * rigid.TWIST_SCALE), pose)
            return -jnp.log(overlap(gaussians.move(cloud, moved), reconstruction) + 1e-9)

        zero = jnp.zeros(6)
        # Away from the optimum the curvature may be negative; its absolute value descends there, too.
        values, vectors = jnp.linalg.eigh(jax.hessian(cost)(zero))
        return cost(zero), jax.grad(cost)(zero), (vectors * jnp.maximum(jnp.abs(values), 1e-4)) @ vectors.T

    return _descend(linearise, start, steps)
