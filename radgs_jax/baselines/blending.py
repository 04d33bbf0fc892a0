"""Ordered alpha blending of Gaussians, as 3D Gaussian splatting (3DGS) draws surfaces: what is nearer hides what is farther.

With Gaussians j in order of depth, a pixel p is C(p) = sum_j c_j s_j prod_{l<j} (1 - s_l), of one channel. Here
s_j = a_j exp(-q_j / 2) up to `MOST_STRENGTH`, and q_j is the squared Mahalanobis distance of p from the projected Gaussian.
Projection is affine about each mean (EWA). The order matters, so `kernels.splat`, which adds line integrals, does not serve.

`blend` is the formula as it reads. `blend_listed` draws tiles, each from a list of Gaussians, with gradients written by hand; lists
that hold all Gaussians give the same image. 3DGS also drops strengths below 1/255 and stops at a transmittance of 1e-4; we do
neither, so that images are smooth functions of poses.
"""

import functools
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from jaxtyping import Int

from kernels.common.types import Array
from kernels.common.types import Leaf
from radgs_jax.geometry import rigid

LOW_PASS_PX2 = 0.3
"""Variance added to a projected Gaussian, px^2: 3DGS's, so that none is lost between pixels."""
MOST_STRENGTH = 0.99
"""Largest s: 3DGS's, so that what lies behind keeps a gradient."""
NEAR_MM = 1.0
"""Depth, mm, from which Gaussians are drawn. Chosen by hand: at half or twice of it, too, nothing lies that near the source."""


@flax.struct.dataclass
class Footprints:
    """N Gaussians in images of B cameras.

    Attributes:
      centre: (B, N, 2) projected means u, v, px.
      conic: (B, N, 3) inverse covariances xx, xy, yy, 1/px^2.
      depth: (B, N) along the camera's axis, mm.
      opacity: (B, N) the peaks a; 0 for what is not before the camera.
    """

    centre: Leaf
    conic: Leaf
    depth: Leaf
    opacity: Leaf


def footprints(
    mean: Float[Array, "n 3"],
    scale: Float[Array, "n 3"],
    quaternion: Float[Array, "n 4"],
    opacity: Float[Array, " n"],
    intrinsics: Float[Array, "views 4"],
    camera_from_frame: Float[Array, "views 4 4"],
) -> Footprints:
    """Gaussians as cameras see them: J R S R' J' + `LOW_PASS_PX2`, with J the derivative of the projection at the mean.

    Args:
      mean, scale: mm; quaternion: unit, w, x, y, z; opacity: peaks.
      intrinsics: fx, fy, cx, cy, px; camera_from_frame: rigid, mm.
    """
    x, y, depth = jnp.moveaxis(rigid.apply(camera_from_frame, mean), -1, 0)
    shown = depth > NEAR_MM
    depth = jnp.where(shown, depth, NEAR_MM)
    fx, fy, cx, cy = (intrinsics[:, i, None] for i in range(4))
    slope_u, slope_v = x / depth, y / depth
    axes = rigid.matrix_from_quaternion(quaternion) * scale[:, None, :]
    # One standard deviation along each of a Gaussian's axes, in the image.
    along = rigid.apply_rotation(camera_from_frame[:, None, None, :3, :3], jnp.swapaxes(axes, -1, -2))
    side_u = (fx / depth)[..., None] * (along[..., 0] - slope_u[..., None] * along[..., 2])
    side_v = (fy / depth)[..., None] * (along[..., 1] - slope_v[..., None] * along[..., 2])
    xx, yy = (jnp.sum(side * side, -1) + LOW_PASS_PX2 for side in (side_u, side_v))
    xy = jnp.sum(side_u * side_v, -1)
    # xx yy - xy^2, by which axes that are parallel in the image do not cancel.
    parts = [side_u[..., i] * side_v[..., j] - side_u[..., j] * side_v[..., i] for i, j in ((0, 1), (0, 2), (1, 2))]
    minor = cast(jax.Array, sum(part * part for part in parts))
    determinant = minor + LOW_PASS_PX2 * (xx + yy - LOW_PASS_PX2)
    conic = jnp.stack([yy, -xy, xx], -1) / determinant[..., None]
    centre = jnp.stack([fx * slope_u + cx, fy * slope_v + cy], -1)
    return Footprints(centre, conic, depth, jnp.where(shown, opacity, 0.0))


def blend(
    seen: Footprints, colour: Float[Array, "views n"], height: int, width: int
) -> Float[jax.Array, "views {height} {width}"]:
    """C(p) of every pixel from every Gaussian. It takes memory for N images a view.

    Args:
      colour: c of each Gaussian in each view.
      height, width: static, px.
    """
    order = jnp.argsort(jax.lax.stop_gradient(seen.depth), -1)
    take = lambda a: jnp.take_along_axis(a, order, 1)[..., None, None]
    u, v = take(seen.centre[..., 0]), take(seen.centre[..., 1])
    xx, xy, yy = (take(seen.conic[..., i]) for i in range(3))
    du, dv = jnp.arange(width) - u, jnp.arange(height)[:, None] - v
    q = xx * du * du + 2.0 * xy * du * dv + yy * dv * dv
    strength = jnp.minimum(take(seen.opacity) * jnp.exp(-0.5 * q), MOST_STRENGTH)
    passed = jnp.cumprod(1.0 - strength, 1)
    before = jnp.concatenate([jnp.ones_like(passed[:, :1]), passed[:, :-1]], 1)
    return jnp.sum(take(colour) * strength * before, 1)


def _tiles(height, width, tile_px):
    """Middles (T, 2) of the tiles that cover an image, row by row, px, and their number along each side."""
    rows, columns = -(-height // tile_px), -(-width // tile_px)
    v, u = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    middle = np.stack([u, v], -1).reshape(-1, 2) * tile_px + 0.5 * (tile_px - 1)
    return middle.astype(np.float32), rows, columns


def lists(seen: Footprints, height: int, width: int, tile_px: int, count: int) -> Int[jax.Array, "views tiles {count}"]:
    """The `count` Gaussians that can matter most in each tile, in no order.

    Those are chosen whose strength in the tile has the largest upper bound: q is at least the squared distance of the tile along u
    or v over the variance along it.

    Args:
      tile_px, count: static; count at most N.
    """
    middle, _, _ = _tiles(height, width, tile_px)
    xx, xy, yy = jnp.moveaxis(seen.conic, -1, 0)
    # 1 / variance along u and v, from the inverse covariance.
    inverse = jnp.stack([xx - xy * xy / yy, yy - xy * xy / xx], -1)
    away = jnp.abs(seen.centre[:, None] - middle[:, None]) - 0.5 * (tile_px - 1)
    least_q = jnp.max(jnp.maximum(away, 0.0) ** 2 * inverse[:, None], -1)
    bound = jnp.log(jnp.maximum(seen.opacity, 1e-30))[:, None] - 0.5 * least_q
    return jax.lax.top_k(jax.lax.stop_gradient(bound), count)[1]


def blend_listed(
    seen: Footprints,
    colour: Float[Array, "views n"],
    listed: Int[Array, "views tiles count"],
    height: int,
    width: int,
    tile_px: int,
) -> Float[jax.Array, "views {height} {width}"]:
    """`blend` of the listed Gaussians alone, tile by tile.

    Args:
      listed: as of `lists`; lists may be older than `seen`, since they are put in order of depth here.
      tile_px: static, that of the lists.
    """
    middle, rows, columns = _tiles(height, width, tile_px)
    views, tiles, count = listed.shape
    flat = listed.reshape(views, tiles * count)
    take = lambda a: jnp.take_along_axis(a, flat, 1).reshape(views, tiles, count)
    order = jnp.argsort(take(jax.lax.stop_gradient(seen.depth)), -1)
    flat = jnp.take_along_axis(listed, order, -1).reshape(views, tiles * count)
    u, v, xx, xy, yy, a, c = (
        take(x) for x in (*jnp.moveaxis(seen.centre, -1, 0), *jnp.moveaxis(seen.conic, -1, 0), seen.opacity, colour)
    )
    # The exponent as a polynomial of the place in the tile: coordinates stay small, and so do rounding errors.
    u, v = u - middle[:, 0, None], v - middle[:, 1, None]
    slope_u, slope_v = xx * u + xy * v, xy * u + yy * v
    peak = jnp.log(jnp.maximum(a, 1e-30))
    terms = (peak - 0.5 * (slope_u * u + slope_v * v), slope_u, slope_v, -0.5 * xx, -xy, -0.5 * yy)
    terms = jnp.stack([term.reshape(views * tiles, count).T for term in terms], -1)
    image = cast(jax.Array, _blend_tiles(tile_px, terms, c.reshape(views * tiles, count).T))
    image = image.reshape(views, rows, columns, tile_px, tile_px).swapaxes(2, 3)
    return image.reshape(views, rows * tile_px, columns * tile_px)[:, :height, :width]


def _monomials(tile_px):
    """1, x, y, x^2, x y, y^2 at a tile's pixels (6, P), from its middle."""
    place = np.arange(tile_px) - 0.5 * (tile_px - 1)
    y, x = (a.ravel() for a in np.meshgrid(place, place, indexing="ij"))
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y]).astype(np.float32)


def _strength(terms, monomials):
    exponent = sum(terms[:, i, None] * monomials[i] for i in range(6))
    return jnp.minimum(jnp.exp(cast(jax.Array, exponent)), MOST_STRENGTH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend_tiles(tile_px, terms, colour):
    """Pixels (T, P) of tiles from terms (count, T, 6) of exponents and colours (count, T), in order of depth."""
    monomials = jnp.asarray(_monomials(tile_px), terms.dtype)

    def step(state, gaussian):
        through, total = state
        weight = through * _strength(gaussian[0], monomials)
        return (through - weight, total + gaussian[1][:, None] * weight), None

    shape = (terms.shape[1], monomials.shape[1])
    start = jnp.ones(shape, terms.dtype), jnp.zeros(shape, terms.dtype)
    return jax.lax.scan(step, start, (terms, colour))[0][1]


def _blend_tiles_fwd(tile_px, terms, colour):
    total = _blend_tiles(tile_px, terms, colour)
    return total, (terms, colour, total)


def _blend_tiles_bwd(tile_px, residuals, cotangent):
    # dC/ds_j = T_j c_j - (what lies behind j) / (1 - s_j), again from front to back: T_j and what lies behind are kept up.
    terms, colour, total = residuals
    monomials = jnp.asarray(_monomials(tile_px), terms.dtype)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def step(state, gaussian):
        through, behind = state
        strength, c = _strength(gaussian[0], monomials), gaussian[1][:, None]
        weight = through * strength
        behind = behind - c * weight
        to_strength = cotangent * (through * c - behind / (1.0 - strength))
        to_exponent = jnp.where(strength < MOST_STRENGTH, to_strength * strength, 0.0)
        return (through - weight, behind), (product(to_exponent, monomials.T), jnp.sum(cotangent * weight, -1))

    _, gradients = jax.lax.scan(step, (jnp.ones_like(total), total), (terms, colour))
    return gradients


_blend_tiles.defvjp(_blend_tiles_fwd, _blend_tiles_bwd)
