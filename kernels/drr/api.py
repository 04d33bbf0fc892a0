"""Public `drr`: one definition, one custom gradient, several backends."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from kernels.common import batching
from kernels.common import dispatch
from kernels.common.rays import rays
from kernels.common.types import Array
from kernels.common.types import Implementation
from kernels.drr import ffi_cpu
from kernels.drr import geometry
from kernels.drr import xla

FORWARD = {"ffi_cpu": ffi_cpu.forward, "xla": xla.forward}
TO_VOLUME = {"ffi_cpu": ffi_cpu.to_volume, "xla": xla.to_volume}
PER_RAY = {"ffi_cpu": ffi_cpu.per_ray, "xla": xla.per_ray}


def drr(
    volume: Float[Array, "..."],
    voxel_from_camera: Float[Array, "..."],
    intrinsics: Float[Array, "..."],
    height: int,
    width: int,
    *,
    step_mm: float | int = 1.0,
    implementation: Implementation = None,
) -> Float[Array, "views height width"]:
    """Line integrals through a voxel volume, differentiable in the volume, the pose and the intrinsics.

    The definition is `kernels.drr.oracle.drr`: trilinear samples on a lattice of distances from the source that does not
    move with the pose, out to wherever the volume ends.

    Args:
      volume: (X, Y, Z) attenuation, 1/mm.
      voxel_from_camera: (B, 3, 4) affine from camera mm to voxel indices (voxel i has its centre at i).
      intrinsics: (B, 4) fx, fy, cx, cy in pixels.
      height, width: static image size, px.
      step_mm: static distance of samples along a ray, above 0.
      implementation: backend name, order of names, or None for the best available.
    Returns:
      (B, height, width) line integrals, no unit. Views rejected by `geometry.usable_views` are 0 and have zero gradients.
    Raises:
      ValueError: shapes that do not fit, a step that is not positive, or an unknown implementation.
    """
    implementation = _checked(volume, voxel_from_camera, intrinsics, step_mm, implementation)
    dtype = jnp.result_type(volume, voxel_from_camera, intrinsics)
    if volume.size == 0:
        return jnp.zeros((*intrinsics.shape[:1], height, width), dtype)
    views = geometry.usable_views(jnp.asarray(voxel_from_camera, dtype), jnp.asarray(intrinsics, dtype))
    origin, direction = geometry.voxel_rays(*views, height, width)
    return _drr(float(step_mm), implementation, jnp.asarray(volume, dtype), origin, direction)


def drr_and_motion(
    volume: Float[Array, "..."],
    voxel_from_camera: Float[Array, "..."],
    intrinsics: Float[Array, "..."],
    height: int,
    width: int,
    *,
    camera_from_frame: Float[Array, "..."] | None = None,
    step_mm: float | int = 1.0,
    implementation: Implementation = None,
) -> tuple[Float[Array, "views height width"], Float[Array, "views height width 6"]]:
    """Line integrals, as by `drr`, and every pixel's derivative with respect to a rigid motion of the volume, for Gauss-Newton.

    A motion x -> exp([w]) x + t of a frame's points changes the image by `motion @ (w, t)` to first order. With g the volume's
    gradient, in the frame's axes, at the samples x = s + tau d of a ray from the source s: d/dt = -sum g, d/dw = -sum x x g.

    Other arguments and errors are those of `drr`.

    Args:
      camera_from_frame: (B, 4, 4) rigid, the frame of the motion in mm; the camera's own by default.
    Returns:
      image (B, height, width), and motion (B, height, width, 6): per rad about the frame's origin, then per mm. Neither is
      differentiable.
    """
    implementation = _checked(volume, voxel_from_camera, intrinsics, step_mm, implementation)
    dtype = jnp.result_type(volume, voxel_from_camera, intrinsics)
    if camera_from_frame is None:
        camera_from_frame = jnp.broadcast_to(jnp.eye(4, dtype=dtype), (*intrinsics.shape[:1], 4, 4))
    elif camera_from_frame.shape != (*intrinsics.shape[:1], 4, 4):
        raise ValueError(
            f"drr: camera_from_frame has shape {camera_from_frame.shape}, wanted {(*intrinsics.shape[:1], 4, 4)}"
        )
    if volume.size == 0:
        image = jnp.zeros((*intrinsics.shape[:1], height, width), dtype)
        return image, jnp.zeros((*image.shape, 6), dtype)
    affine, intrinsics = geometry.usable_views(jnp.asarray(voxel_from_camera, dtype), jnp.asarray(intrinsics, dtype))
    origin, direction = geometry.voxel_rays(affine, intrinsics, height, width)

    arrays = jax.lax.stop_gradient((jnp.asarray(volume, dtype), origin, direction))
    image, by_origin, by_direction = _of_rays(PER_RAY, step_mm, implementation, *arrays)
    # A moved volume is sampled where the inverse motion takes the rays; slopes per voxel become slopes along the frame's axes.
    linear, camera_from_frame = jax.lax.stop_gradient((affine[:, :, :3], jnp.asarray(camera_from_frame, dtype)))
    axes = camera_from_frame[:, :3, :3]
    voxel_from_frame = jnp.matmul(linear, axes, precision=jax.lax.Precision.HIGHEST)
    source = -jnp.sum(axes * camera_from_frame[:, :3, 3:], -2)
    d = rays(jax.lax.stop_gradient(intrinsics), height, width)
    d = _along_axes(d / jnp.linalg.norm(d, axis=-1, keepdims=True), axes)
    push, pull = _along_axes(by_origin, voxel_from_frame), _along_axes(by_direction, voxel_from_frame)
    turn = [a + b for a, b in zip(_cross([source[:, i, None, None] for i in range(3)], push), _cross(d, pull))]
    return image, -jnp.stack([*turn, *push], -1)


# Component by component, which XLA makes one loop over pixels of; products with small matrices take it several times as long.


def _along_axes(vectors, axes):
    """Components, three of (B, H, W), of row vectors (B, H, W, 3) times matrices (B, 3, 3)."""
    return [sum(vectors[..., i] * axes[:, i, j, None, None] for i in range(3)) for j in range(3)]


def _cross(a, b):
    """Cross product of vectors that are given as three components."""
    return [a[i - 2] * b[i - 1] - a[i - 1] * b[i - 2] for i in range(3)]


def _checked(volume, voxel_from_camera, intrinsics, step_mm, implementation):
    """Checks that the arguments fit together; returns a hashable `implementation`."""
    if volume.ndim != 3:
        raise ValueError(f"drr: volume has shape {volume.shape}, wanted (X, Y, Z)")
    batch = intrinsics.shape[:1]
    if voxel_from_camera.shape != (*batch, 3, 4) or intrinsics.shape != (*batch, 4):
        raise ValueError(
            f"drr: voxel_from_camera {voxel_from_camera.shape} and intrinsics {intrinsics.shape}, "
            "wanted (B, 3, 4) and (B, 4)"
        )
    if not step_mm > 0:
        raise ValueError(f"drr: step_mm is {step_mm}, wanted more than 0")
    return dispatch.hashable(implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _drr(step_mm, implementation, volume, origin, direction):
    return _of_rays(FORWARD, step_mm, implementation, volume, origin, direction)[0]


def _drr_fwd(step_mm, implementation, volume, origin, direction):
    perturbed = origin.perturbed or direction.perturbed
    arrays = volume.value, origin.value, direction.value
    if not perturbed:
        return _drr(step_mm, implementation, *arrays), (arrays, None)
    # The samples of a line integral also give its slopes, so that the backward pass takes none.
    image, *slopes = _of_rays(PER_RAY, step_mm, implementation, *arrays)
    return image, (arrays, slopes)


def _drr_bwd(step_mm, implementation, residuals, cotangent):
    (volume, *views), slopes = residuals
    if isinstance(cotangent, SymbolicZero):
        return (None,) * 3
    shape = volume.shape

    def to_volume(*views):
        return _run(TO_VOLUME, implementation, step_mm, *_one_axis((1, 3, 2), views), first=(shape,))

    # XLA removes this where nothing uses it.
    (d_volume,) = batching.along_batch(to_volume, (1, 3, 2), *views, cotangent, summed=True)
    if slopes is None:
        return d_volume, None, None
    by_origin, by_direction = (cotangent[..., None] * slope for slope in slopes)
    return d_volume, jnp.sum(by_origin, (-3, -2)), by_direction


_drr.defvjp(_drr_fwd, _drr_bwd, symbolic_zeros=True)


def _of_rays(backends, step_mm, implementation, volume, *views):
    """Results of a backend that takes a volume and rays, whatever their leading axes."""

    def run(volume, *views):
        return _one_batch(lambda *views: _run(backends, implementation, float(step_mm), volume, *views), (1, 3), *views)

    return batching.along_batch(run, (3, 1, 3), volume, *views, shared=1)


def _run(backends, implementation, step_mm, *arrays, first=()):
    """Results of the chosen backend; `first` are its arguments before the arrays."""
    call = lambda backend, *arrays: backend(*first, *arrays, step_mm)
    return dispatch.run("drr", backends, implementation, call, *arrays)


def _one_axis(events, views):
    """`views` with all leading axes merged into one, as backends take them."""
    size = math.prod(views[0].shape[: views[0].ndim - events[0]])
    return tuple(a.reshape(size, *a.shape[a.ndim - event :]) for a, event in zip(views, events))


def _one_batch(function, events, *views):
    """`function(*views)` with merged leading axes; the results have all of them again."""
    batch = views[0].shape[: views[0].ndim - events[0]]
    return tuple(a.reshape(*batch, *a.shape[1:]) for a in function(*_one_axis(events, views)))
