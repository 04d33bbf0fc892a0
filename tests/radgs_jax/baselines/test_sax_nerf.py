"""SAX-NeRF: hash grid, attention, integrals and draws as the formulas read, masks, and a small fit."""

import dataclasses

import jax
import jax.numpy as jnp
import lumps
import numpy as np
import pytest

from radgs_jax.baselines import box
from radgs_jax.baselines import sax_nerf

TINY = sax_nerf.Config(
    levels=3,
    coarsest=4,
    table=9,
    width=8,
    heads=2,
    samples=16,
    windows=2,
    window_px=4,
    rays=64,
    steps=300,
    start=0.3,
    rate=0.01,
    drop=0.5,
)
KEY = jax.random.key(0)


def _net(config, seed=0):
    return sax_nerf.Net(config).init(jax.random.key(seed), jnp.zeros((config.line, 3)))


def _index(i, j, k, cells, entries):
    """A corner's entry as the formula reads, in 32-bit integers."""
    if (cells + 1) ** 3 <= entries:
        return i + (cells + 1) * j + (cells + 1) ** 2 * k
    with np.errstate(over="ignore"):
        mixed = np.uint32(i) ^ (np.uint32(2654435761) * np.uint32(j)) ^ (np.uint32(805459861) * np.uint32(k))
    return int(mixed % np.uint32(entries))


@pytest.mark.parametrize("cells, entries", [(4, 125), (7, 512), (8, 512), (1024, 2**15), (16 * 2**15, 2**19)])
def test_corners_have_their_place_where_it_fits_and_their_hash_elsewhere(cells, entries):
    corners = np.random.default_rng(cells).integers(0, cells + 1, (200, 3))
    corners[:2] = [[0, 0, 0], [cells] * 3]
    expected = [_index(*(int(c) for c in corner), cells, entries) for corner in corners]
    found = np.asarray(sax_nerf.table_index(jnp.asarray(corners), cells, entries))
    np.testing.assert_array_equal(found, expected)
    assert found.min() >= 0 and found.max() < entries


def test_levels_double_and_the_published_ones_have_the_published_number_of_entries():
    sizes = sax_nerf.level_sizes(sax_nerf.ORIGINAL)
    assert [n for n, _ in sizes[:3]] == [16, 32, 64] and len(sizes) == 16
    assert round(2 * sum(entries for _, entries in sizes) / 1e6, 2) == 14.26


def _encoded(table, point, config):
    """One point's features in float64, corner by corner."""
    found, first = [], 0
    for level in range(config.levels):
        cells = config.coarsest * 2**level
        entries = min(2**config.table, (cells + 1) ** 3)
        place = np.clip(point, 0.0, 1.0) * (cells - 1) + 0.5
        cell = np.floor(place).astype(int)
        total = np.zeros(config.features)
        for corner in np.ndindex(2, 2, 2):
            at = cell + corner
            weight = np.prod(np.where(np.array(corner) == 1, place - cell, 1 - place + cell))
            total += weight * table[first + _index(*(int(c) for c in at), cells, entries)]
        found.append(total)
        first += entries
    return np.concatenate(found)


def test_an_encoding_is_trilinear_in_every_level():
    rng = np.random.default_rng(0)
    entries = sum(n for _, n in sax_nerf.level_sizes(TINY))
    table, points = rng.normal(size=(entries, 2)), rng.uniform(-0.1, 1.1, (40, 3))
    points[:3] = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.5]]
    arrays = jnp.asarray(table, jnp.float32), jnp.asarray(points, jnp.float32)
    expected = [_encoded(table, point, TINY) for point in points]
    np.testing.assert_allclose(sax_nerf.encode(*arrays, TINY), expected, atol=2e-4)
    # The slope to the table: each point gives each level's feature a weight of one in all.
    slope = jax.grad(lambda table: jnp.sum(sax_nerf.encode(table, arrays[1], TINY)))(arrays[0])
    np.testing.assert_allclose(jnp.sum(slope, 0), [40.0 * TINY.levels] * 2, rtol=1e-5)


@pytest.mark.parametrize("line", [2, 4])
def test_attention_is_that_of_the_formula_inside_each_segment(line):
    """float64 oracle, head by head and sample by sample."""
    config = dataclasses.replace(TINY, line=line, width=6)
    x = np.random.default_rng(1).normal(size=(12, 6))
    module = sax_nerf.LineAttention(config)
    params = module.init(jax.random.key(3), jnp.zeros((line, 6)))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    q, k, v = ((x @ p[f"Dense_{n}"]["kernel"]).reshape(12, 2, 4) for n in range(3))
    mixed = np.zeros((12, 2, 4))
    for i in range(12):
        segment = range(i // line * line, i // line * line + line)
        for head in range(2):
            logits = np.array([q[i, head] @ k[j, head] / 2.0 + p["bias"][head, i % line, j % line] for j in segment])
            weights = np.exp(logits) / np.exp(logits).sum()
            mixed[i, head] = sum(w * v[j, head] for w, j in zip(weights, segment))
    expected = mixed.reshape(12, 8) @ p["Dense_3"]["kernel"] + p["Dense_3"]["bias"]
    np.testing.assert_allclose(module.apply(params, jnp.asarray(x, jnp.float32)), expected, atol=1e-5)
    assert "bias" not in p["Dense_0"] and np.abs(p["bias"]).max() <= 2.0


def test_a_sample_hears_its_segment_alone():
    points = jnp.asarray(np.random.default_rng(2).uniform(size=(8, 3)), jnp.float32)
    params = _net(TINY)
    shaken = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(KEY, a.shape), params)
    moved = points.at[3].set(jnp.asarray([0.9, 0.1, 0.5]))
    change = sax_nerf.Net(TINY).apply(shaken, points) - sax_nerf.Net(TINY).apply(shaken, moved)
    assert np.all(np.abs(change[2:4]) > 1e-6)
    np.testing.assert_array_equal(np.delete(change, [2, 3]), 0.0)


def test_a_constant_density_is_integrated_from_entry_to_exit():
    """Against chords by clipping a ray at each pair of faces, in float64; a ray beside the box has none."""
    views = lumps.oblique_views(2)
    sources, directions = (np.asarray(a, np.float64) for a in box.box_rays(views))
    params = jax.tree.map(jnp.zeros_like, _net(TINY))
    for source, along in zip(sources, directions.reshape(2, -1, 3)):
        low, high = np.sort([(s - source) / along for s in (-48.0, 48.0)], axis=0)
        chord = np.maximum(high.min(-1) - low.max(-1), 0.0)
        assert chord.min() == 0.0 and chord.max() > 100.0
        rays = jnp.asarray(source, jnp.float32), jnp.asarray(along, jnp.float32)
        found = sax_nerf.integrals(params, TINY, KEY, *rays)
        np.testing.assert_allclose(found, TINY.start * box.UNIT_DENSITY * chord, atol=1e-4)


def test_samples_are_ordered_along_each_ray_and_lie_in_equal_parts_of_it(monkeypatch):
    seen = []

    def density(params, config, points):
        seen.append(points)
        return jnp.zeros(points.shape[0])

    monkeypatch.setattr(sax_nerf, "density", density)
    views = lumps.oblique_views(1)
    sources, directions = box.box_rays(views)
    rays = directions[0, 8:16, 8:16].reshape(-1, 3)
    sax_nerf.integrals({}, TINY, KEY, sources[0], rays)
    near, far = box.crossing(sources[0], rays)
    along = jnp.linalg.norm(seen[0].reshape(64, TINY.samples, 3) - sources[0], axis=-1)
    place = (along - near[:, None]) / (far - near)[:, None] * TINY.samples
    np.testing.assert_array_equal(np.floor(place), np.tile(np.arange(TINY.samples), (64, 1)))
    assert np.std(place % 1.0) > 0.2


def test_pixels_are_whole_windows_and_valid_ones_outside_them():
    valid = np.random.default_rng(4).uniform(size=(24, 24)) < 0.5
    for seed in range(5):
        pixels = np.asarray(sax_nerf.draw_pixels(jax.random.key(seed), jnp.asarray(valid), TINY))
        assert len(set(pixels)) == 2 * 16 + 64
        for window in pixels[:32].reshape(2, 4, 4):
            rows, columns = window // 24, window % 24
            assert rows[0, 0] % 4 == 0 and columns[0, 0] % 4 == 0
            np.testing.assert_array_equal(rows - rows[0, 0], np.repeat(np.arange(4), 4).reshape(4, 4))
            np.testing.assert_array_equal(columns - columns[0, 0], np.tile(np.arange(4), (4, 1)))
        assert valid.reshape(-1)[pixels[32:]].all()


@pytest.mark.parametrize("body", [None, box.BodyConfig(side=6, voxel_mm=48.0)])
def test_an_invalid_pixel_never_changes_the_result(body):
    views = lumps.oblique_views(2)
    images = jnp.asarray(np.random.default_rng(5).uniform(size=views.images.shape), jnp.float32)
    valid = jnp.asarray(np.random.default_rng(6).uniform(size=images.shape) < 0.2)
    config = dataclasses.replace(TINY, steps=4, body=body)
    clean, spoilt, huge = (
        np.asarray(sax_nerf.fit(config, views.replace(valid=valid, images=jnp.where(valid, images, value)), KEY))
        for value in (0.5, np.nan, 1e6)
    )
    np.testing.assert_array_equal(spoilt, clean)
    np.testing.assert_array_equal(huge, clean)


def test_the_loss_reaches_every_weight():
    views = lumps.oblique_views(2)
    views = views.replace(images=views.images + 0.3)
    net = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(KEY, a.shape), _net(TINY))
    slope = jax.grad(sax_nerf.loss)({"box": net}, KEY, TINY, views)
    assert all(np.isfinite(a).all() and np.abs(a).max() > 0.0 for a in jax.tree.leaves(slope))


def test_the_rate_falls_once():
    tx = sax_nerf.optimiser(dataclasses.replace(TINY, steps=10))
    state, moved = tx.init(jnp.zeros(())), []
    for _ in range(10):
        update, state = tx.update(jnp.ones(()), state)
        moved.append(-float(update))
    np.testing.assert_allclose(moved, [0.01] * 5 + [0.001] * 5, rtol=1e-4)


@pytest.mark.long
def test_a_lump_appears_where_it_is():
    views = lumps.oblique_views(4)
    truth = lumps.voxel_lump()
    views = views.replace(images=box.render(truth, box.box_grid(box.SIDE), views, 1.0))
    found = np.asarray(sax_nerf.fit(TINY, views, KEY))
    again = np.asarray(sax_nerf.fit(TINY, views, KEY))
    np.testing.assert_array_equal(found, again)
    near = np.asarray(truth) > 0.005
    psnr = -10.0 * np.log10(np.mean((found - truth)[near] ** 2) / box.UNIT_DENSITY**2)
    empty = -10.0 * np.log10(np.mean(truth[near] ** 2) / box.UNIT_DENSITY**2)
    assert psnr > empty + 6.0


def test_segments_must_fill_rays():
    with pytest.raises(ValueError, match="segments of 5"):
        dataclasses.replace(TINY, line=5)
