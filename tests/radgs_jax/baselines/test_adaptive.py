"""Densify and prune in a fixed number of slots, against lists that grow and shrink."""

import dataclasses

import jax
import jax.numpy as jnp
import lumps
import numpy as np
import pytest

from radgs_jax.baselines import adaptive
from radgs_jax.baselines import box
from radgs_jax.baselines import gr_car
from radgs_jax.baselines import r2_gaussian
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import rigid

refill = jax.jit(adaptive.refill, static_argnums=0)


def _cloud(count, slots, scale=(0.05, 0.6), seed=0):
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=(count, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    parts = (
        rng.uniform(0.1, 1.0, count),
        rng.uniform(-0.5, 0.5, (count, 3)),
        rng.uniform(*scale, (count, 3)),
        quaternion,
    )
    return adaptive.in_slots(Gaussians(*(jnp.asarray(a, jnp.float32) for a in parts)), slots)


def _mass(cloud, alive):
    return float(jnp.sum(jnp.where(alive, cloud.density * jnp.prod(cloud.scale, -1), 0.0)))


@pytest.mark.parametrize(
    ("rule", "clones", "halves"), [(r2_gaussian.RULE, 1.0, 1 / 4.096), (gr_car.RULE, 2.0, 2 / 4.096)]
)
def test_mass_after_a_round_is_as_published(rule, clones, halves):
    """R2-Gaussian's clones keep the mass and its halves a quarter of it; 3DGR-CAR's double and halve it."""
    rule = dataclasses.replace(rule, reach=np.inf)
    for scale, ratio in (((0.2, 0.9), clones), ((2.0, 4.0), halves)):
        scale = tuple(rule.clone_scale * s for s in scale)
        cloud, alive = _cloud(30, 80, scale)
        found = refill(rule, cloud, alive, jnp.ones(80), jax.random.key(0))
        assert int(found.alive.sum()) == 60
        np.testing.assert_allclose(_mass(found.cloud, found.alive), ratio * _mass(cloud, alive), rtol=1e-5)


def test_a_round_is_that_of_lists_that_grow_and_shrink():
    rule = adaptive.Rule(threshold=0.5, clone_scale=0.3, kept=0.5, min_density=0.08, reach=0.45)
    cloud, alive = _cloud(40, 100)
    alive = alive & (np.arange(100) % 7 > 0)
    steepness = jnp.asarray(np.random.default_rng(1).uniform(size=100), jnp.float32)
    found = refill(rule, cloud, alive, steepness, jax.random.key(0))
    old = [np.asarray(a) for a in (cloud.density, cloud.mean, cloud.scale, cloud.quaternion)]
    kept, halves = [], []
    for i in np.flatnonzero(alive):
        density, mean, scale, quaternion = (a[i] for a in old)
        if steepness[i] < 0.5:
            kept.append((density, *mean, *scale, *quaternion))
        elif scale.max() <= 0.3:
            kept += [(0.5 * density, *mean, *scale, *quaternion)] * 2
        else:
            halves += [(0.5 * density, *(scale / 1.6), *quaternion)] * 2
    kept = np.array([g for g in kept if g[0] >= 0.08 and np.abs(g[1:4]).max() <= 0.45])
    new = np.concatenate(
        [np.asarray(a).reshape(100, -1) for a in (found.cloud.density, found.cloud.mean, found.cloud.scale)]
        + [np.asarray(found.cloud.quaternion)],
        -1,
    )[np.asarray(found.alive)]
    # A Gaussian keeps its quaternion, by which the halves, whose means are random, are told from the others.
    ids = new[:, 7:].tolist()
    is_half = np.array([any(i == list(h[4:]) for h in halves) for i in ids])
    for half in new[is_half]:
        (match,) = {h for h in halves if list(h[4:]) == half[7:].tolist()}
        np.testing.assert_allclose(half[[0, 4, 5, 6]], match[:4], rtol=1e-5)
    assert len(halves) // 4 < is_half.sum() <= len(halves)  # some are drawn outside
    order = lambda a: a[np.lexsort(a.T)]
    np.testing.assert_allclose(order(new[~is_half]), order(kept.astype(np.float32)), rtol=1e-5, atol=1e-6)
    # What is as it was kept its slot and is not called changed, and only new Gaussians are fresh.
    same = np.asarray(~found.changed)
    for a, b in zip(jax.tree.leaves(found.cloud), jax.tree.leaves(cloud)):
        np.testing.assert_array_equal(np.asarray(a)[same], np.asarray(b)[same])
    wanted = np.asarray(alive & (steepness >= 0.5))
    small = np.asarray(cloud.scale.max(-1) <= 0.3)
    assert int(found.fresh.sum()) == wanted.sum() + (wanted & ~small).sum()
    assert int(found.changed.sum()) == 2 * wanted.sum()


def test_halves_are_drawn_from_the_gaussian_in_its_own_axes():
    rule = adaptive.Rule(threshold=0.5, clone_scale=0.1, kept=0.5, min_density=0.0)
    n = 4000
    turn = rigid.quaternion_from_matrix(rigid.exp_so3(jnp.asarray([0.4, -0.8, 0.3])))
    scale, mean = jnp.asarray([0.9, 0.3, 0.05]), jnp.asarray([0.2, -0.4, 0.7])
    one = Gaussians(jnp.ones(n), *(jnp.tile(a, (n, 1)) for a in (mean, scale, turn)))
    cloud, alive = adaptive.in_slots(one, 2 * n)
    found = refill(rule, cloud, alive, jnp.ones(2 * n), jax.random.key(3))
    assert bool(found.alive.all() & found.fresh.all())
    R = np.asarray(rigid.matrix_from_quaternion(turn))
    white = (np.asarray(found.cloud.mean) - np.asarray(mean)) @ R / np.asarray(scale)
    np.testing.assert_allclose(white.mean(0), 0.0, atol=0.05)
    np.testing.assert_allclose(np.cov(white.T), np.eye(3), atol=0.06)
    halves = white.reshape(2, n, 3)
    assert abs(np.corrcoef(halves[0, :, 0], halves[1, :, 0])[0, 1]) < 0.06


def test_in_full_slots_clones_come_before_splits_and_the_steepest_first():
    rule = adaptive.Rule(threshold=0.0, clone_scale=0.3, kept=0.5, min_density=0.0)
    scale = jnp.asarray([0.1, 0.5, 0.2, 0.5, 0.1, 0.5])[:, None] * jnp.ones(3)
    cloud, alive = _cloud(6, 6)
    cloud = dataclasses.replace(cloud, scale=scale)
    steepness = jnp.asarray([1.0, 9.0, 3.0, 8.0, 2.0, 5.0])
    for dead, grown in (([3], [2]), ([1, 3], [2, 4]), ([0, 3, 5], [2, 4, 1]), ([], [])):
        left = alive.at[jnp.asarray(dead, int)].set(False)
        found = refill(rule, cloud, left, steepness, jax.random.key(0))
        assert bool(found.alive.all())
        assert set(np.flatnonzero(found.changed)) == set(grown) | set(dead)
        assert set(np.flatnonzero(found.fresh)) == set(dead) | ({1} if 1 in grown else set())


def test_nothing_recompiles_and_numbers_that_are_none_are_left_alone(compilations):
    rule = adaptive.Rule(threshold=0.5, clone_scale=0.3, kept=0.5, min_density=0.0)
    results = []
    for count in (5, 20, 32):
        cloud, alive = _cloud(count, 32)
        steepness = jnp.full(32, jnp.nan).at[0].set(1.0)
        jax.block_until_ready((cloud, alive, steepness))
        before = len(compilations)
        found = jax.block_until_ready(refill(rule, cloud, alive, steepness, jax.random.key(0)))
        results.append((int(found.alive.sum()) - count, len(compilations) - before))
    assert [grown for grown, _ in results] == [1, 1, 0]
    assert [programs for _, programs in results[1:]] == [0, 0]
    with pytest.raises(ValueError, match="found 20 Gaussians, wanted 8 or fewer"):
        adaptive.in_slots(jax.tree.map(lambda a: a[:20], cloud), 8)


def test_faint_and_outside_gaussians_are_removed():
    rule = adaptive.Rule(threshold=np.inf, clone_scale=0.3, kept=0.5, min_density=0.2, reach=1.0)
    cloud, alive = _cloud(4, 5)
    cloud = dataclasses.replace(
        cloud,
        density=jnp.asarray([0.19, 0.5, 0.5, 0.5, 9.0]),
        mean=jnp.asarray([[0, 0, 0], [0, 0, -1.01], [0.99, 0, -0.99], [0, 1.5, 0], [0.0, 0, 0]]),
    )
    found = refill(rule, cloud, alive, jnp.ones(5), jax.random.key(0))
    np.testing.assert_array_equal(found.alive, [False, False, True, False, False])
    assert not found.fresh.any()


def test_a_dead_slot_draws_nothing_and_learns_nothing():
    cloud, alive = _cloud(6, 10)

    def total(cloud):
        seen = adaptive.only_alive(cloud, alive)
        return jnp.sum(seen.density) + jnp.sum(seen.mean**2)

    gradient = jax.grad(total)(cloud)
    assert float(total(cloud)) > 12 * adaptive.FAR**2 - 1.0
    np.testing.assert_array_equal(gradient.density, alive.astype(jnp.float32))
    assert not np.asarray(gradient.mean[6:]).any() and np.asarray(gradient.mean[:6]).all()


def test_moments_of_new_gaussians_are_forgotten_and_others_kept():
    names = {"mean": (0.1, 0.01), "density": (0.2, 0.2)}
    tx = box.with_body(adaptive.adam(names, 10), box.BodyConfig(side=4))
    params = box.parameters(
        {"mean": jnp.ones((4, 3)), "density": jnp.ones(4)}, box.BodyConfig(side=4), lumps.oblique_views(4)
    )
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    fresh = jnp.asarray([False, True, False, True])
    cleared = adaptive.forget(state, fresh)
    assert jax.tree.structure(state) == jax.tree.structure(cleared)
    changed = 0
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(cleared)):
        where = jax.tree_util.keystr(path)
        moments = ("mean" in where or "density" in where) and ("mu" in where or "nu" in where)
        expected = adaptive.choose(fresh, jnp.zeros_like(old), old) if moments else old
        np.testing.assert_array_equal(new, expected)
        changed += moments
    assert changed == 4


def test_adam_is_the_formula_with_rates_that_fall(x64):
    rates = {"mean": (0.1, 0.001), "density": (0.02, 0.02)}
    tx = adaptive.adam(rates, 5)
    params = {"mean": jnp.zeros((3, 2)), "density": jnp.zeros(3)}
    state, found = tx.init(params), params
    expected = {name: np.zeros(value.shape) for name, value in params.items()}
    m, v = ({name: np.zeros(value.shape) for name, value in params.items()} for _ in range(2))
    rng = np.random.default_rng(0)
    for step in range(4):
        gradient = {name: 1e-9 * rng.normal(size=value.shape) for name, value in params.items()}
        updates, state = tx.update({name: jnp.asarray(g) for name, g in gradient.items()}, state, found)
        found = jax.tree.map(jnp.add, found, updates)
        for name, (first, last) in rates.items():
            m[name] = 0.9 * m[name] + 0.1 * gradient[name]
            v[name] = 0.999 * v[name] + 0.001 * gradient[name] ** 2
            direction = m[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + 1e-15)
            expected[name] = expected[name] - first * (last / first) ** (step / 5) * direction
    for name in rates:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_neighbour_distance():
    points = np.random.default_rng(0).normal(size=(50, 3))
    away = np.linalg.norm(points[:, None] - points[None], axis=-1)
    expected = np.sqrt(np.mean(np.sort(away, -1)[:, 1:4] ** 2, -1))
    np.testing.assert_allclose(adaptive.neighbour_distance(points), expected, rtol=1e-6)
    assert np.isinf(adaptive.neighbour_distance(points[:2])).all() and len(adaptive.neighbour_distance(points[:0])) == 0
