"""The gain between image and model: fitted, and eliminated from a step."""

import jax.numpy as jnp

from radgs_jax.registration import edges


def _gain_ridge(normal, ridge):
    """Diagonals (V, K) of the quadratic penalty on gains: `ridge` times the first gain's own normal, a hundredth on that gain."""
    free = jnp.asarray([0.01] + [1.0] * (normal.shape[-1] - 1))
    return ridge * free * normal[:, :1, 0] + 1e-9


def _gain_normal(columns, weights, ridge):
    """The gains' normal matrices (V, K, K) with the penalty, and the penalty's diagonals (V, K)."""
    normal = edges.einsum("vyxad,vyxbd,vyx->vab", columns, columns, weights)
    penalty = _gain_ridge(normal, ridge)
    return normal + penalty[..., None] * jnp.eye(normal.shape[-1]), penalty


def solve_gains(columns, target, weights, ridge):
    """Gains (V, K) of columns (V, S, S, K, 2) by weighted, penalised least squares."""
    normal, _ = _gain_normal(columns, weights, ridge)
    right = edges.einsum("vyxad,vyxd,vyx->va", columns, target, weights)
    return jnp.linalg.solve(normal, right[..., None])[..., 0]


def eliminate_gains(columns, gains, jacobian, residual, weights, ridge):
    """Normal equations of a Gauss-Newton step over P parameters and the gains, the gains eliminated (a Schur complement).

    The objective is sum_pixels weights |residual|^2 + sum_k penalty_k gains_k^2, with the weights and the penalty held at
    their current values; at a step s the residual is residual - jacobian s - columns d, for gains + d.

    Args:
      columns: (V, S, S, K, 2) derivatives of the model by gain; gains: (V, K) where it is linearised.
      jacobian: (V, S, S, P, 2); residual: (V, S, S, 2); weights: (V, S, S); ridge: as in `_gain_ridge`.
    Returns:
      normals (V, P, P), rights (V, P).
    """
    normal, penalty = _gain_normal(columns, weights, ridge)
    cross = edges.einsum("vyxad,vyxpd,vyx->vap", columns, jacobian, weights)
    right = edges.einsum("vyxad,vyxd,vyx->va", columns, residual, weights) - penalty * gains
    solved = jnp.linalg.solve(normal, jnp.concatenate([cross, right[..., None]], -1))
    normals = edges.einsum("vyxpd,vyxqd,vyx->vpq", jacobian, jacobian, weights)
    normals = normals - edges.einsum("vap,vaq->vpq", cross, solved[..., :-1])
    rights = edges.einsum("vyxpd,vyxd,vyx->vp", jacobian, residual, weights) - edges.einsum(
        "vap,va->vp", cross, solved[..., -1]
    )
    return normals, rights


def fit_gains(window, rest, excess, thickness, ridge):
    """The model that fits the image best over all gains, and the residuals' weights.

    Args:
      window: `_Window`; rest, excess: (V, S, S, 2) derivatives; thickness: (V, S, S) line integrals of both parts.
    Returns:
      gain of the rest and of the excess (V, S, S), columns (V, S, S, K, 2), their gains (V, K), weights (V, S, S) in
      1 / residual variance.
    """
    target, inside, weights = window.target, window.inside, window.weights
    total = rest + excess
    counted = jnp.maximum(jnp.sum(inside, (1, 2), keepdims=True), 1.0)
    level = 0.5 * (thickness - jnp.sum(thickness * inside, (1, 2), keepdims=True) / counted)
    u = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, level.shape[-1]), level.shape)
    basis = jnp.stack([jnp.ones_like(level), level, u, jnp.swapaxes(u, 1, 2)], -1)
    columns = jnp.concatenate([basis[..., None] * total[..., None, :], excess[..., None, :]], -2)
    for _ in range(3):
        gains = solve_gains(columns, target, weights, ridge)
        of_rest = jnp.maximum(edges.einsum("vyxk,vk->vyx", basis, gains[:, :-1]), 0.02)
        of_excess = jnp.maximum(of_rest + gains[:, -1, None, None], 0.02)
        residual = target - of_rest[..., None] * rest - of_excess[..., None] * excess
        square = jnp.sum(residual**2, -1)
        variance = jnp.sum(weights * square, (1, 2), keepdims=True) / (2.0 * window.told) + 1e-12
        weights = inside * (edges.T_FREEDOM + 2.0) / (edges.T_FREEDOM + square / variance)
    return of_rest, of_excess, columns, gains, weights / variance
