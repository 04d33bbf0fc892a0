"""Borders of collimated X-rays: found where they are, and only there."""

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.phantom import generate
from data_pipelines.simulation import carm
from data_pipelines.simulation import quick
from data_pipelines.xrays import collimator
from data_pipelines.xrays import radiograph
from radgs_jax import attenuation


@pytest.fixture(scope="module")
def anatomy():
    """Line integrals (6, 400, 320) of a phantom's trunk, including dense laterals."""
    made = generate.make_phantom(30002, generate.PhantomConfig(spacing_mm=(3.0, 3.0, 3.5)))
    mu = attenuation.from_hounsfield(made.hu.astype(np.float32))
    angles = ((0, 0), (90, 0), (12, -10), (80, 9), (100, -14), (-14, 4))
    views = np.stack([carm.extrinsics(*pair, 700.0) for pair in angles])
    rng = np.random.default_rng(0)
    world_from_ct = carm.sample_world_from_ct(rng, made.centroids[22])
    k = np.tile([1500.0, 1450.0, 159.5, 199.5], (len(views), 1))
    return np.asarray(quick.render(mu, made.affine, world_from_ct, k, views, (400, 320), 4.0))


def exposed(line_integrals, field, seed, scatter=0.3, photons=2e4):
    """Photon counts behind blades that transmit 0.2 %, with penumbra, scatter and noise."""
    rng = np.random.default_rng(seed)
    open_part = ndimage.gaussian_filter(field.astype(float), 1.0)
    primary = np.exp(-line_integrals) * (open_part + 0.002 * (1 - open_part))
    mean = primary + scatter * ndimage.gaussian_filter(primary, 0.12 * field.shape[1])
    return rng.poisson(mean * photons) + rng.normal(0, 2, field.shape)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_an_open_field_has_no_border(anatomy):
    for seed, line in enumerate(anatomy):
        for scatter in (0.0, 0.3, 1.0):
            found = collimator.find(exposed(line, np.ones(line.shape, bool), seed, scatter))
            assert found.kind == "none" and found.mask.all(), (seed, scatter)
    assert collimator.find(np.full((200, 300), 7.0)).kind == "none"
    assert collimator.find(np.random.default_rng(0).poisson(50, (200, 300))).kind == "none"


@pytest.mark.parametrize("scatter", [0.1, 0.3, 1.0])
def test_straight_leaves_are_found_where_they_are(anatomy, scatter):
    height, width = anatomy[0].shape
    v, u = np.mgrid[:height, :width]
    for seed, line in enumerate(anatomy):
        rng = np.random.default_rng(seed)
        turn = np.radians(rng.uniform(-6, 6))
        centre = np.array([width, height]) / 2 + rng.uniform(-20, 20, 2)
        half = rng.uniform(0.25, 0.42, 2) * [width, height]
        x = (u - centre[0]) * np.cos(turn) + (v - centre[1]) * np.sin(turn)
        y = (v - centre[1]) * np.cos(turn) - (u - centre[0]) * np.sin(turn)
        field = (np.abs(x) < half[0]) & (np.abs(y) < half[1])
        found = collimator.find(exposed(line, field, seed, scatter))
        assert found.kind == "rectangle" and len(found.lines) == 4, seed
        assert overlap(found.mask, field) >= 0.98, (seed, overlap(found.mask, field))


@pytest.mark.parametrize("scatter", [0.0, 0.3])
def test_round_diaphragms_are_found_where_they_are(anatomy, scatter):
    height, width = anatomy[0].shape
    v, u = np.mgrid[:height, :width]
    for seed, line in enumerate(anatomy):
        rng = np.random.default_rng(100 + seed)
        centre = np.array([width, height]) / 2 + rng.uniform(-15, 15, 2)
        field = np.hypot(u - centre[0], v - centre[1]) < rng.uniform(0.35, 0.55) * width
        found = collimator.find(exposed(line, field, seed, scatter))
        assert found.kind == "circle" and overlap(found.mask, field) >= 0.98, seed


def test_one_leaf_alone_and_the_penumbra(anatomy, tmp_path):
    field = np.zeros(anatomy[0].shape, bool)
    field[:, 41:] = True
    np.save(tmp_path / "xray.npy", exposed(anatomy[0], field, 0))
    got = radiograph.read(tmp_path / "xray.npy", None, radiograph.ReadOptions(values="intensity"))
    assert got.origin["collimator"] == "rectangle found"
    edge = np.argmax(got.valid, 1)
    assert (np.abs(edge - 41 - collimator.PENUMBRA_PX) <= 2).mean() > 0.99 and not got.valid[:, :38].any()
