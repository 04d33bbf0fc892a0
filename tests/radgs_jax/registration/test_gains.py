"""The gains between image and model."""

import jax.numpy as jnp
import numpy as np

from radgs_jax.registration.gains import eliminate_gains


def test_gains_are_eliminated_as_the_objective_says(x64):
    """Against the joint Gauss-Newton step over pose and gains, written out in float64 as one least-squares problem."""
    rng = np.random.default_rng(4)
    views, side, count, params, ridge = 2, 9, 4, 6, 0.3
    columns = rng.normal(size=(views, side, side, count, 2)) * np.array([3.0, 1.0, 0.5, 2.0])[:, None]
    jacobian = rng.normal(size=(views, side, side, params, 2))
    residual, gains = rng.normal(size=(views, side, side, 2)), rng.normal(size=(views, count))
    weights = rng.uniform(0.0, 2.0, (views, side, side)) * (rng.uniform(size=(views, side, side)) > 0.2)
    normals, rights = eliminate_gains(*map(jnp.asarray, (columns, gains, jacobian, residual, weights)), ridge=ridge)
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
