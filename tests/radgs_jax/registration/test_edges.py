"""The noise of derivative images."""

import jax.numpy as jnp
import numpy as np

from radgs_jax.registration import edges


def test_noise_is_distinguished_from_structure():
    """The noise's energy in derivatives is found in images with smooth structure, edges and invalid pixels."""
    rng = np.random.default_rng(0)
    v, u = np.meshgrid(np.arange(96.0), np.arange(96.0), indexing="ij")
    clean = np.stack([0.02 * u + np.sin(v / 9.0), np.where(u + 2 * v > 130, 3.0, 1.0)])
    valid = np.ones(clean.shape, bool)
    valid[:, :, :20] = False
    noise = rng.normal(size=clean.shape) * np.array([0.05, 0.2])[:, None, None]
    noisy = np.where(valid, clean + noise, 50.0)
    found = edges.noise_energy(jnp.asarray(noisy, jnp.float32), jnp.asarray(valid), 1.0)
    left = edges.derivatives(jnp.asarray(noise, jnp.float32)[..., None], 1.0)[:, 8:-8, 28:-8]
    np.testing.assert_allclose(found, jnp.mean(jnp.sum(left**2, (-1, -2)), (1, 2)), rtol=0.15)
    assert jnp.all(edges.noise_energy(jnp.asarray(clean, jnp.float32), jnp.asarray(valid), 1.0) < 1e-4)
