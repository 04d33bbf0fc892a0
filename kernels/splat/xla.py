"""`splat` in plain XLA: footprint tiles, window scatter, hand-written backward; runs on any device."""

import jax.numpy as jnp
from jaxtyping import Float
from jaxtyping import Int32

from kernels.common import exact
from kernels.common import instances
from kernels.common import support
from kernels.common import symmetric
from kernels.common.types import Array
from kernels.splat import oracle

DRAWN_TILE, GATHERED_TILE = (8, 16), (8, 8)
"""Rows and columns of a tile, px. Chosen by hand: the scatter is fastest with large tiles; the backward pass does more work per
pixel, so small tiles waste less."""


def pixel_boxes(
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    intrinsics: Float[Array, "*batch 4"],
    height: int,
    width: int,
) -> tuple[Int32[Array, "*batch n 2"], Int32[Array, "*batch n 2"]]:
    """First and last pixel (row, column) of the region q < 16, clipped to the image.

    The bounds are exact: the dual conic of the ellipsoid's outline, C* = tau^2 S - p p' in camera coordinates, touches
    the lines x = const where C*_33 x^2 - 2 C*_13 x + C*_11 = 0. For a Gaussian without pixels, last < first.
    """
    S = symmetric.inverse(precision)
    tau2 = support.Q_MAX
    p_z = mean[..., 2]
    c_zz = tau2 * S[..., 5] - p_z * p_z

    def extent(c_ii, c_iz, focal, centre, size):
        root = jnp.sqrt(jnp.maximum(c_iz * c_iz - c_ii * c_zz, 0.0))
        # c_zz < 0 for a visible Gaussian, so the + root is the lower bound.
        low = jnp.ceil((c_iz + root) / c_zz * focal + centre - exact.BOX_MARGIN)
        high = jnp.floor((c_iz - root) / c_zz * focal + centre + exact.BOX_MARGIN)
        return jnp.clip(low, 0, size), jnp.clip(high, -1, size - 1)

    fx, fy, cx, cy = (intrinsics[..., i, None] for i in range(4))
    u0, u1 = extent(tau2 * S[..., 0] - mean[..., 0] ** 2, tau2 * S[..., 2] - mean[..., 0] * p_z, fx, cx, width)
    v0, v1 = extent(tau2 * S[..., 3] - mean[..., 1] ** 2, tau2 * S[..., 4] - mean[..., 1] * p_z, fy, cy, height)
    low, high = jnp.stack([v0, u0], -1), jnp.stack([v1, u1], -1)
    # Bounds are NaN for a mean so far away that its square overflows.
    shown = oracle.visible(mean, precision)[..., None] & ~jnp.any(jnp.isnan(low + high), -1, keepdims=True)
    return jnp.where(shown, low, 0).astype(jnp.int32), jnp.where(shown, high, -1).astype(jnp.int32)


def _pairs(owner, corner, tile, mean, precision, density, intrinsics, n):
    """Ray and Gaussian quantities of a chunk of tiles, each (CHUNK, tile rows, tile columns).

    Coordinates are relative to the mean, so that float32 suffices at 700 mm from the source.
    """
    p, K, rho, k = mean[owner], precision[owner], density[owner], intrinsics[owner // n]
    rows = jnp.arange(tile[0], dtype=jnp.int32)[None, :, None]
    columns = jnp.arange(tile[1], dtype=jnp.int32)[None, None, :]
    px, py, pz, rho = (a[:, None, None] for a in (p[:, 0], p[:, 1], p[:, 2], rho))
    kxx, kxy, kxz, kyy, kyz, kzz = (K[:, i, None, None] for i in range(6))
    fx, fy, cx, cy = (k[:, i, None, None] for i in range(4))
    x = ((corner[:, 1, None, None] + columns).astype(p.dtype) - cx) / fx
    y = ((corner[:, 0, None, None] + rows).astype(p.dtype) - cy) / fy
    Kd = (kxx * x + kxy * y + kxz, kxy * x + kyy * y + kyz, kxz * x + kyz * y + kzz)
    a = x * Kd[0] + y * Kd[1] + Kd[2]
    dx, dy = px - x * pz, py - y * pz
    shift = (Kd[0] * dx + Kd[1] * dy) / a
    q = kxx * dx * dx + 2.0 * kxy * dx * dy + kyy * dy * dy - a * shift * shift
    length2 = 1.0 + x * x + y * y
    thickness = jnp.sqrt(length2 * (2.0 * jnp.pi) / a)
    # r = p - t* d, the shortest vector (in the metric K) from the ray to the mean.
    r = (dx - shift * x, dy - shift * y, -shift * jnp.ones_like(x))
    return x, y, rho, (kxx, kxy, kxz, kyy, kyz, kzz), Kd, a, q, length2, thickness, r, pz + shift


def _flatten(density, mean, precision, intrinsics):
    batch, n = density.shape[:-1], density.shape[-1]
    return batch, n, density.reshape(-1), mean.reshape(-1, 3), precision.reshape(-1, 6), intrinsics.reshape(-1, 4)


def _footprints(mean, precision, intrinsics, n, height, width, tile):
    low, high = pixel_boxes(mean.reshape(-1, n, 3), precision.reshape(-1, n, 6), intrinsics, height, width)
    low, high = low.reshape(-1, 2), high.reshape(-1, 2)
    return instances.tile_counts(low, high, tile), low


def forward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    intrinsics: Float[Array, "*batch 4"],
    height: int,
    width: int,
) -> Float[Array, "*batch height width"]:
    """As `oracle.splat`, float32 or float64."""
    batch, n, density, mean, precision, intrinsics = _flatten(density, mean, precision, intrinsics)
    if density.size == 0:
        return jnp.zeros((*batch, height, width), mean.dtype)
    tile = DRAWN_TILE
    counts, low = _footprints(mean, precision, intrinsics, n, height, width, tile)
    mean, precision = instances.finite(mean, precision)

    def body(owner, corner, valid, images):
        _, _, rho, _, _, _, q, _, thickness, _, _ = _pairs(owner, corner, tile, mean, precision, density, intrinsics, n)
        values = jnp.where(valid[:, None, None], rho * thickness * support.weight(q), 0.0)
        return instances.add_windows(images, owner // n, corner, values)

    # Tiles may extend beyond the lower and right borders; the margin holds those pixels.
    images = jnp.zeros((intrinsics.shape[0], height + tile[0], width + tile[1]), mean.dtype)
    images = instances.for_each_chunk(counts, low, tile, body, images)
    return images[:, :height, :width].reshape(*batch, height, width)


def backward(
    density: Float[Array, "*batch n"],
    mean: Float[Array, "*batch n 3"],
    precision: Float[Array, "*batch n 6"],
    intrinsics: Float[Array, "*batch 4"],
    cotangent: Float[Array, "*batch height width"],
    to_camera: bool = True,
) -> tuple[Float[Array, "..."], ...]:
    """Gradients to density, mean, precision and, if `to_camera`, intrinsics, in their shapes.

    Per pair, with I = rho * thickness * w(q) and slope = rho * thickness * dw/dq:
    dI/dp = 2 slope K r; dI/dK = slope r r' - I d d' / (2 a); dI/dd = I (d / |d|^2 - K d / a) - 2 slope t* K r.
    """
    height, width = cotangent.shape[-2:]
    shapes = density.shape, mean.shape, precision.shape, intrinsics.shape
    _, n, density, mean, precision, intrinsics = _flatten(density, mean, precision, intrinsics)
    if density.size == 0:
        return tuple(jnp.zeros(shape, mean.dtype) for shape in shapes[: 3 + to_camera])
    tile = GATHERED_TILE
    counts, low = _footprints(mean, precision, intrinsics, n, height, width, tile)
    mean, precision = instances.finite(mean, precision)
    cotangent = jnp.pad(cotangent.reshape(-1, height, width), ((0, 0), (0, tile[0]), (0, tile[1])))

    def body(owner, corner, valid, sums):
        x, y, rho, K, Kd, a, q, length2, thickness, r, depth = _pairs(
            owner, corner, tile, mean, precision, density, intrinsics, n
        )
        g = jnp.where(valid[:, None, None], instances.read_windows(cotangent, owner // n, corner, tile), 0.0)
        w, dw = support.weight_and_slope(q)
        unit = g * thickness * w
        value, slope = rho * unit, g * rho * thickness * dw
        kxx, kxy, kxz, kyy, kyz, kzz = K
        Kr = (
            kxx * r[0] + kxy * r[1] + kxz * r[2],
            kxy * r[0] + kyy * r[1] + kyz * r[2],
            kxz * r[0] + kyz * r[1] + kzz * r[2],
        )
        along = -0.5 * value / a
        terms = [
            unit,
            2.0 * slope * Kr[0],
            2.0 * slope * Kr[1],
            2.0 * slope * Kr[2],
            slope * r[0] * r[0] + along * x * x,
            2.0 * (slope * r[0] * r[1] + along * x * y),
            2.0 * (slope * r[0] * r[2] + along * x),
            slope * r[1] * r[1] + along * y * y,
            2.0 * (slope * r[1] * r[2] + along * y),
            slope * r[2] * r[2] + along,
        ]
        if to_camera:
            ddx = value * (x / length2 - Kd[0] / a) - 2.0 * slope * depth * Kr[0]
            ddy = value * (y / length2 - Kd[1] / a) - 2.0 * slope * depth * Kr[1]
            terms += [ddx * x, ddy * y, ddx, ddy]
        # Idle lanes compute with some owner, and 0 * nan is nan.
        terms = jnp.stack([jnp.sum(term, (1, 2)) for term in terms], -1)
        return sums.at[owner].add(jnp.where(valid[:, None], terms, 0.0))

    start = jnp.zeros((density.shape[0], 14 if to_camera else 10), mean.dtype)
    sums = instances.for_each_chunk(counts, low, tile, body, start)
    gradients = [sums[:, 0], sums[:, 1:4], sums[:, 4:10]]
    if to_camera:
        focal = jnp.concatenate([intrinsics[:, :2], intrinsics[:, :2]], -1)
        gradients.append(-jnp.sum(sums[:, 10:].reshape(-1, n, 4), 1) / focal)
    return tuple(gradient.reshape(shape) for gradient, shape in zip(gradients, shapes))
