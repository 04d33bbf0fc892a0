"""The gain between image and model: fitted, and eliminated from a Gauss-Newton step.

Scatter and beam hardening scale the derivatives of an image by a gain that varies smoothly over the image and with the
thickness of the body. The gain of the rest is a constant, plus terms linear in thickness, u and v; that of the vertebra is the
same plus a constant. The pose is solved for with these K = 5 gains eliminated (variable projection, Golub and Pereyra 1973).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.registration import edges

CONSTANT_PENALTY = 0.01
"""Penalty on the constant gain as a fraction of the penalty on the others, no unit. Chosen by hand: with a `gain_ridge` of 0.01
it draws that gain towards 0 by about 0.01 %, and by half or twice as much at half or twice the value."""
THICKNESS_SCALE = 0.5
"""Factor from line integral to the thickness term, no unit. Chosen by hand so that the term is about 1 in size, as u and v are.
At half, the penalty draws that term to 0 four times as strongly; at twice, a quarter as strongly."""
MIN_GAIN = 0.02
"""Minimum of a pixel's gain, no unit. Chosen by hand: it only keeps gains positive. The gain that scatter leaves is about
1 / (1 + scatter-to-primary ratio), several times the minimum, so that half or twice should matter to outliers alone."""
BLOCK = 16
"""Side, pixels, of the squares of pixels whose residuals are taken for independent of each other's, in how uncertain a step is.
Chosen by hand: what the model lacks, such as a rib that has moved, spans several pixels; in smaller squares it looks independent,
and of larger ones there are too few."""
ITERATIONS = 3
"""Number of times that gains and weights are fitted in turn, in every Gauss-Newton step anew. Chosen by hand: fewer leave
outliers more weight; more cost time in proportion."""


def _gain_ridge(normal, ridge):
    """Diagonals (V, K) of the quadratic penalty on gains: `ridge` times the constant gain's own entry of the normal matrix."""
    free = jnp.asarray([CONSTANT_PENALTY] + [1.0] * (normal.shape[-1] - 1))
    return ridge * free * normal[:, :1, 0] + 1e-9


def _gain_normal(columns, weights, ridge):
    """The gains' normal matrices (V, K, K) with the penalty, and the penalty's diagonals (V, K)."""
    normal = edges.einsum("vyxad,vyxbd,vyx->vab", columns, columns, weights)
    penalty = _gain_ridge(normal, ridge)
    return normal + penalty[..., None] * jnp.eye(normal.shape[-1]), penalty


def solve_gains(
    columns: Float[Array, "views size size gains 2"],
    target: Float[Array, "views size size 2"],
    weights: Float[Array, "views size size"],
    ridge: float,
) -> Float[jax.Array, "views gains"]:
    """Gains by weighted, penalised least squares.

    Args:
      columns: derivatives of the model by gain; target: derivatives of the image; ridge: `RefineConfig.gain_ridge`.
    """
    normal, _ = _gain_normal(columns, weights, ridge)
    right = edges.einsum("vyxad,vyxd,vyx->va", columns, target, weights)
    return jnp.linalg.solve(normal, right[..., None])[..., 0]


def eliminate_gains(
    columns: Float[Array, "views size size gains 2"],
    gains: Float[Array, "views gains"],
    jacobian: Float[Array, "views size size params 2"],
    residual: Float[Array, "views size size 2"],
    weights: Float[Array, "views size size"],
    ridge: float,
) -> tuple[
    Float[jax.Array, "views params params"], Float[jax.Array, "views params"], Float[jax.Array, "views blocks params"]
]:
    """Normal equations of a Gauss-Newton step over P parameters and the gains, with the gains eliminated (a Schur complement).

    The objective is sum_pixels weights |residual|^2 + sum_k penalty_k gains_k^2, with the weights and the penalty held at
    their current values; at a step s the residual is residual - jacobian s - columns d, for gains + d.

    Args:
      columns: derivatives of the model by gain; gains: where it is linearised; ridge: `RefineConfig.gain_ridge`.
    Returns:
      normal matrices and right sides, by view, and what each square of `BLOCK` pixels adds to the right side.
    """
    normal, penalty = _gain_normal(columns, weights, ridge)
    cross = edges.einsum("vyxad,vyxpd,vyx->vap", columns, jacobian, weights)
    solved = jnp.linalg.solve(normal, cross)
    normals = edges.einsum("vyxpd,vyxqd,vyx->vpq", jacobian, jacobian, weights)
    normals = normals - edges.einsum("vap,vaq->vpq", cross, solved)
    weighted = weights[..., None] * residual
    blocks = _block_sums(edges.einsum("vyxpd,vyxd->vyxp", jacobian, weighted))
    blocks = blocks - edges.einsum(
        "vba,vap->vbp", _block_sums(edges.einsum("vyxad,vyxd->vyxa", columns, weighted)), solved
    )
    rights = jnp.sum(blocks, 1) + edges.einsum("va,vap->vp", penalty * gains, solved)
    return normals, rights, blocks


def _block_sums(values):
    """Sums (V, B, P) of values (V, S, S, P) over squares of `BLOCK` pixels; those at the end may be smaller."""
    views, size = values.shape[:2]
    count = -(-size // BLOCK)
    padded = jnp.pad(values, [(0, 0), *[(0, count * BLOCK - size)] * 2, (0, 0)])
    squares = padded.reshape(views, count, BLOCK, count, BLOCK, -1)
    return jnp.sum(squares, (2, 4)).reshape(views, count * count, -1)


def fit_gains(
    target: Float[Array, "views size size 2"],
    inside: Float[Array, "views size size"],
    weights: Float[Array, "views size size"],
    edge_count: Float[Array, "views 1 1"],
    rest: Float[Array, "views size size 2"],
    excess: Float[Array, "views size size 2"],
    thickness: Float[Array, "views size size"],
    ridge: float,
) -> tuple[
    Float[Array, "views size size"],
    Float[Array, "views size size"],
    Float[Array, "views size size gains 2"],
    Float[Array, "views gains"],
    Float[Array, "views size size"],
]:
    """The model that fits the image best over all gains, and the residuals' weights.

    Args:
      target: derivatives of the image; inside: 1 where they count; weights: those of the first fit.
      edge_count: number of pixels with edges.
      rest, excess: derivatives of the two parts' line integrals; thickness: line integrals of both parts.
      ridge: `RefineConfig.gain_ridge`.
    Returns:
      gain of the rest and of the excess at every pixel, columns, their gains, weights in 1 / residual variance.
    """
    total = rest + excess
    counted = jnp.maximum(jnp.sum(inside, (1, 2), keepdims=True), 1.0)
    level = THICKNESS_SCALE * (thickness - jnp.sum(thickness * inside, (1, 2), keepdims=True) / counted)
    u = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, level.shape[-1]), level.shape)
    basis = jnp.stack([jnp.ones_like(level), level, u, jnp.swapaxes(u, 1, 2)], -1)
    columns = jnp.concatenate([basis[..., None] * total[..., None, :], excess[..., None, :]], -2)
    for _ in range(ITERATIONS):
        gains = solve_gains(columns, target, weights, ridge)
        of_rest = jnp.maximum(edges.einsum("vyxk,vk->vyx", basis, gains[:, :-1]), MIN_GAIN)
        of_excess = jnp.maximum(of_rest + gains[:, -1, None, None], MIN_GAIN)
        residual = target - of_rest[..., None] * rest - of_excess[..., None] * excess
        square = jnp.sum(residual**2, -1)
        variance = jnp.sum(weights * square, (1, 2), keepdims=True) / (2.0 * edge_count) + 1e-12
        weights = inside * (edges.T_FREEDOM + 2.0) / (edges.T_FREEDOM + square / variance)
    return of_rest, of_excess, columns, gains, weights / variance
