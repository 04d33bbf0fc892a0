"""The gains between image and model, eliminated from a step, and how squares of pixels disagree about it."""

import jax.numpy as jnp
import numpy as np

from radgs_jax.registration.gains import BLOCK
from radgs_jax.registration.gains import eliminate_gains


def test_gains_are_eliminated_as_the_objective_says(x64):
    """Against the joint Gauss-Newton step over pose and gains, written out in float64 as one least-squares problem."""
    rng = np.random.default_rng(4)
    views, side, count, params, ridge = 2, 9, 4, 6, 0.3
    columns = rng.normal(size=(views, side, side, count, 2)) * np.array([3.0, 1.0, 0.5, 2.0])[:, None]
    jacobian = rng.normal(size=(views, side, side, params, 2))
    residual, gains = rng.normal(size=(views, side, side, 2)), rng.normal(size=(views, count))
    weights = rng.uniform(0.0, 2.0, (views, side, side)) * (rng.uniform(size=(views, side, side)) > 0.2)
    normals, rights, blocks = eliminate_gains(
        *map(jnp.asarray, (columns, gains, jacobian, residual, weights)), ridge=ridge
    )
    for v in range(views):
        root = np.sqrt(weights[v])[..., None]
        A = [(root * a).reshape(-1) for a in np.moveaxis(jacobian[v], 2, 0)]
        C = [(root * c).reshape(-1) for c in np.moveaxis(columns[v], 2, 0)]
        penalty = ridge * np.array([0.01, 1.0, 1.0, 1.0]) * (C[0] @ C[0]) + 1e-9
        # Rows of pixels, then one row for the penalty on each gain: sqrt(penalty) (gains + d) -> 0.
        design = np.concatenate([np.stack(A + C, 1), np.eye(count, params + count, params) * np.sqrt(penalty)[:, None]])
        wanted = np.concatenate([(root * residual[v]).reshape(-1), -np.sqrt(penalty) * gains[v]])
        joint, *_ = np.linalg.lstsq(design, wanted, rcond=None)
        np.testing.assert_allclose(np.linalg.solve(normals[v], rights[v]), joint[:params], rtol=1e-9, atol=1e-12)
        covariance = np.linalg.inv(design.T @ design)[:params, :params]
        np.testing.assert_allclose(np.linalg.inv(normals[v]), covariance, rtol=1e-8)
        # One square of 16 pixels holds all of these; the rest of the right side is the penalty's.
        assert blocks.shape == (views, 1, params)
        of_penalty = np.linalg.solve(np.array([[c @ d for d in C] for c in C]) + np.diag(penalty), penalty * gains[v])
        cross = np.array([[c @ a for a in A] for c in C])
        np.testing.assert_allclose(blocks[v].sum(0) + cross.T @ of_penalty, rights[v], rtol=1e-9, atol=1e-9)


def test_squares_of_pixels_tell_how_much_a_step_is_off(x64):
    """Residuals that are alike within each square, drawn many times: the squares' covariance of a step is the steps' own."""
    rng = np.random.default_rng(5)
    side, params, draws = 56, 3, 200
    jacobian = rng.normal(size=(1, side, side, params, 2)) * np.array([1.0, 4.0, 0.5])[:, None] + 0.5
    columns, gains = rng.normal(size=(1, side, side, 2, 2)), np.zeros((1, 2))
    weights = rng.uniform(0.5, 2.0, (1, side, side))
    steps, stated = [], []
    square = np.arange(side) // BLOCK
    for _ in range(draws):
        alike = rng.normal(size=(4, 4))[square[:, None], square[None]]
        residual = (alike[..., None] + 0.3 * rng.normal(size=(side, side, 2)))[None]
        normals, rights, blocks = eliminate_gains(
            *map(jnp.asarray, (columns, gains, jacobian, residual, weights)), ridge=1e-6
        )
        steps.append(np.linalg.solve(normals[0], rights[0]))
        pulls = np.linalg.solve(normals[0], blocks[0].T)
        stated.append(pulls @ pulls.T)
    wanted = np.cov(np.array(steps).T)
    np.testing.assert_allclose(np.mean(stated, 0), wanted, atol=0.2 * np.abs(wanted).max())
    independent = np.linalg.inv(normals[0]) * np.mean(weights * (residual**2).sum(-1) / 2)
    assert np.diag(independent).max() < 0.5 * np.diag(wanted).max()
