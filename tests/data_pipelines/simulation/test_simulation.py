"""The simulator against what can be known: analytic shapes, tabulated physics, direct integration, and another program."""

import dataclasses
import functools
import os
import pathlib

import numpy as np
import pytest
import xraylib
from scipy import ndimage

from data_pipelines import cases
from data_pipelines import simulation
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.simulation import beam
from data_pipelines.simulation import carm
from data_pipelines.simulation import hardware
from data_pipelines.simulation import materials
from data_pipelines.simulation import panel
from data_pipelines.simulation import quick
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax.geometry import rigid_host

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
CASES = pathlib.Path(os.environ.get("RADGS_SHARED", REPOSITORY.parent / "shared")) / "bench" / "cases" / "cases.json"
GEOMETRY = simulation.Geometry(window=48, binning=20)
STILL = simulation.Preset(
    flexion_deg=(0, 0), lateral_bend_deg=(0, 0), twist_deg=(0, 0), jitter_deg=(0, 0), jitter_mm=(0, 0)
)
CLEAN = dataclasses.replace(
    STILL,
    scatter_to_primary=(0, 0),
    quanta_per_mm2=(1e9, 1e9),
    electronic_quanta=(0, 0),
    focal_blur_mm=(0, 0),
    detector_blur_mm=(0, 0),
    gain_ramp=(0, 0),
    vignetting=(0, 0),
    offset_drift=(0, 0),
    air_value=(0, 0),
    chance_collimator=0.0,
    chance_hardware=0.0,
)


# A voxel phantom of known shapes. HU from -1000 to 0 are linear in attenuation, so partly filled voxels are exact.

SHAPES = {
    "sphere": np.array([24.0, 24.0, 24.0]),
    "ellipsoid": np.array([30.0, 16.0, 22.0]),
    "box": np.array([22.0, 15.0, 18.0]),
}
TILT = rigid_host.matrix([0.4, -0.3, 0.5], 0)[:3, :3]


def _inside(name, points):
    """Whether points (..., 3), mm from the centre, are inside the tilted shape."""
    q = points @ TILT / SHAPES[name]
    return np.abs(q).max(-1) <= 1 if name == "box" else np.sum(q**2, -1) <= 1


def _chord(name, origin, direction):
    """Length in the tilted shape of lines through `origin` (3,), mm from its centre, along unit directions (..., 3)."""
    o, d = origin @ TILT / SHAPES[name], direction @ TILT / SHAPES[name]
    if name == "box":
        ends = np.sort([(-1 - o) / d, (1 - o) / d], 0)
        return np.maximum(ends[1].min(-1) - ends[0].max(-1), 0)
    a, b, c = np.sum(d * d, -1), d @ o, o @ o - 1
    return 2 * np.sqrt(np.maximum(b * b - a * c, 0)) / a


@functools.cache
def _shape_hu(name):
    """HU of one shape of water in air on an oblique, anisotropic grid, the grid's affine, and the shape's centre, CT mm."""
    affine = rigid_host.matrix([0.05, -0.04, 0.03], 0) @ np.diag([0.65, 0.6, 0.7, 1.0])
    shape = np.array([114, 124, 106])
    centre = np.array([-30.0, 40.0, -250.0])
    affine[:3, 3] = centre - affine[:3, :3] @ (0.5 * (shape - 1) + [0.3, -0.2, 0.4])
    index = np.moveaxis(np.indices(shape, dtype=np.float32), 0, -1)
    points = index @ affine[:3, :3].T.astype(np.float32) + (affine[:3, 3] - centre).astype(np.float32)
    occupancy = _inside(name, points).astype(np.float32)
    border = _inside(name, points * 0.95) != _inside(name, points * 1.07)
    fine = (np.arange(4) + 0.5) / 4 - 0.5
    shifts = np.stack(np.meshgrid(fine, fine, fine), -1).reshape(-1, 3) @ affine[:3, :3].T
    near = points[border]
    occupancy[border] = np.mean([_inside(name, near + shift.astype(np.float32)) for shift in shifts], 0)
    return -1000 + 1000 * occupancy, affine, centre


def _shape_scan(name, labelled):
    """A scan of a shape whose label holds all of it, or a little cube of air."""
    hu, affine, centre = _shape_hu(name)
    labels = np.zeros(hu.shape, np.uint8)
    if labelled:
        labels[hu > -1000] = 20
    else:
        labels[2:5, 2:5, 2:5] = 20
    return scans.Scan("phantom", hu, labels, affine), centre


def _cameras(size, centre_px_off=3.3):
    """Two oblique cameras of about 0.8 mm pixels at the isocentre, off-centre and with different focal lengths."""
    E = np.stack([carm.extrinsics(12, -9, 700.0), carm.extrinsics(77, 13, 650.0)])
    K = np.array(
        [[900.0, 910, 0.5 * size + centre_px_off, 0.5 * size - 2], [870.0, 860, 0.5 * size - 1, 0.5 * size + 2]]
    )
    return K, E


def _rays(K, E, size):
    """Origins (V, 3) and unit directions (V, size, size, 3) in world mm."""
    u, v = np.meshgrid(np.arange(size), np.arange(size))
    origins, directions = [], []
    for k, e in zip(K, E):
        d = np.stack([(u - k[2]) / k[0], (v - k[3]) / k[1], np.ones_like(u, float)], -1) @ e[:3, :3]
        origins.append(-e[:3, :3].T @ e[:3, 3])
        directions.append(d / np.linalg.norm(d, axis=-1, keepdims=True))
    return np.array(origins), np.array(directions)


@pytest.mark.parametrize("labelled", [True, False], ids=["as a vertebra", "as the rest"])
@pytest.mark.parametrize("name", SHAPES)
def test_line_integrals_of_known_shapes(name, labelled):
    """Within 0.5 % of the largest value, on rays two pixels off outlines and edges that graze no face.

    There, voxels round the shape off. The sum over the image, which that does not change, is right within 0.1 %.
    """
    scan, centre = _shape_scan(name, labelled)
    body, size = simulation.ArticulatedBody(scan, rest_mm=0.5, vertebra_mm=0.5), 96
    world_from_ct = rigid_host.matrix([0.1, 0.2, -0.15], 0)
    world_from_ct[:3, 3] = [4, -6, 3] - world_from_ct[:3, :3] @ centre
    K, E = _cameras(size)
    if labelled:
        _, _, image = body.render_vertebra(20, world_from_ct, K, E, size, 0.4)
    else:
        # The cube of air counts as a vertebra: muscle fills its place, and its excess takes that away again.
        image, _ = body.render_rest(np.eye(4)[None], world_from_ct, K, E, size, 0.4)
        image = image + body.render_vertebra(20, world_from_ct, K, E, size, 0.4)[0]
    # render_vertebra means over four rays a pixel; so does the analytic value.
    shifts = [(-0.25, -0.25), (-0.25, 0.25), (0.25, -0.25), (0.25, 0.25)] if labelled else [(0, 0)]
    R, t = world_from_ct[:3, :3], world_from_ct[:3, 3]
    wanted = np.zeros_like(image)
    for shift in shifts:
        origins, directions = _rays(K - [0, 0, *shift], E, size)
        for view in range(2):
            chord = _chord(name, (origins[view] - t) @ R - centre, directions[view] @ R)
            wanted[view] += attenuation.WATER_PER_MM * chord / len(shifts)
    bent = np.abs([ndimage.laplace(image, mode="nearest") for image in wanted])
    steep = np.hypot(*np.gradient(wanted, axis=(1, 2)))
    straight = (ndimage.maximum_filter(bent, (0, 5, 5)) < 0.02 * wanted.max()) & (steep < 0.06 * wanted.max())
    error = np.abs(image - wanted) / wanted.max()
    assert straight[wanted > 0].mean() > 0.5
    assert error[straight].max() < 0.005
    np.testing.assert_allclose(image.sum((1, 2)), wanted.sum((1, 2)), rtol=1e-3)


def test_attenuation_is_the_published_one():
    """NIST's tables (Hubbell and Seltzer, NISTIR 5632), cm^2/g at 60, 80 and 100 keV."""
    published = {
        "water": ([0.2059, 0.1837, 0.1707], 1.0),
        materials.BONE: ([0.3148, 0.2229, 0.1855], 1.92),
        "aluminium": ([0.2778, 0.2018, 0.1704], 2.699),
        "copper": ([1.593, 0.7630, 0.4584], 8.96),
        "tungsten": ([3.713, 7.810, 4.438], 19.3),
    }
    for material, (values, density) in published.items():
        found = materials.attenuation_per_mm(material, [60.0, 80.0, 100.0])
        np.testing.assert_allclose(found, 0.1 * density * np.array(values), rtol=0.02)
    with pytest.raises(ValueError, match="material 'lead': wanted one of"):
        materials.attenuation_per_mm("lead", [60.0])


def test_soft_tissue_and_bone_add_up_to_the_case_formats_attenuation():
    hu = np.linspace(-1100, 3200, 4301).astype(np.float32)
    bone, whole = materials.bone_from_hounsfield(hu), attenuation.from_hounsfield(hu)
    assert (bone >= 0).all() and (bone <= whole).all() and (np.diff(bone) >= 0).all()
    assert (bone[hu <= materials.ONLY_SOFT_HU] == 0).all()
    dense = hu >= materials.ONLY_BONE_HU + 1
    np.testing.assert_array_equal(bone[dense], whole[dense])
    mono = beam.monochromatic()
    signal, _ = beam.transmit(mono, {materials.SOFT_TISSUE: (whole - bone)[None], materials.BONE: bone[None]})
    np.testing.assert_allclose(-np.log(signal[0]), whole, atol=1e-6)


def test_beam_quality_is_that_of_the_standard_beams():
    """Half-value layers of IEC 61267's RQR 5, 6, 8 and 9, whose total filtration is about 3 mm of aluminium."""
    layers = []
    for kvp, published in ((70, 2.58), (80, 3.01), (100, 3.97), (120, 5.00)):
        energies, photons = beam.tube_photons(kvp, 3.0)
        assert (photons >= 0).all() and energies.max() < kvp
        dose = np.array([e * xraylib.CS_Energy_CP("Air, Dry (near sea level)", float(e)) for e in energies]) * photons
        thickness = np.linspace(0, 10, 1001)
        left = np.exp(-thickness[:, None] * materials.attenuation_per_mm("aluminium", energies)) @ dose / dose.sum()
        layers.append(np.interp(-0.5, -left, thickness))
        assert abs(layers[-1] / published - 1) < 0.06
    assert (np.diff(layers) > 0).all()
    with pytest.raises(ValueError, match="kvp is 20"):
        beam.tube_photons(20.0, 3.0)


WEDGES = {
    materials.SOFT_TISSUE: np.linspace(0, 350, 8),
    materials.BONE: np.linspace(0, 60, 7),
    "aluminium": np.linspace(0, 60, 7),
    "titanium": np.linspace(0, 12, 7),
    "stainless steel": np.linspace(0, 6, 7),
    "cobalt-chrome": np.linspace(0, 6, 7),
}


@pytest.mark.parametrize("kvp, copper", [(70.0, 0.0), (85.0, 0.3), (120.0, 0.1)])
def test_a_step_wedge_is_that_of_direct_integration(kvp, copper):
    """Each wedge behind 80 mm of tissue and bare: within 0.3 % of a sum over 0.1 keV, where 2 % are asked for."""
    spectrum = beam.tube(kvp, 3.0, copper)
    assert len(spectrum.energies_kev) == beam.NODES
    energies, photons = beam.tube_photons(kvp, 3.0, copper)
    fine = np.arange(energies[0] - 0.45, energies[-1] + 0.5, 0.1)
    number = np.repeat(photons, 10)
    iodide = np.array([0.451 * xraylib.CS_Total_CP("CsI", e) for e in energies]).repeat(10)
    response = np.repeat(energies, 10) * (1 - np.exp(-beam.SCINTILLATOR_MM * iodide))
    soft = materials.attenuation_per_mm(materials.SOFT_TISSUE, fine)
    for material, steps in WEDGES.items():
        mu = materials.attenuation_per_mm(material, fine)
        at_reference = materials.attenuation_per_mm(material, [70.0])[0]
        for before in (0.0, 80.0):
            direct = [np.sum(number * response * np.exp(-mu * t - soft * before)) for t in steps]
            direct = np.array(direct) / np.sum(number * response)
            integrals = {material: (steps * at_reference)[None]}
            tissue = np.full((1, len(steps)), before * materials.attenuation_per_mm(materials.SOFT_TISSUE, [70.0])[0])
            if material == materials.SOFT_TISSUE:
                integrals = {material: integrals[material] + tissue}
            else:
                integrals[materials.SOFT_TISSUE] = tissue
            signal, ratio = beam.transmit(spectrum, integrals)
            np.testing.assert_allclose(signal[0], direct, rtol=3e-3)
            # Harder quanta are left, and each carries more noise.
            assert (np.diff(ratio[0]) > 0).all()


def test_chords_of_capsules_are_exact():
    """Against lengths by brute force along the same rays, and by hand for a ray across the middle."""
    size = 40
    K, E = _cameras(size)
    rod = hardware.Implant(np.array([[-10.0, 3, -8], [4, -2, 6], [14, 5, 9]]), 3.0)
    image = hardware.chords([rod], K, E, size, size)
    n = hardware.OVERSAMPLE
    fine = K * [n, n, n, n] + [0, 0, 0.5 * (n - 1), 0.5 * (n - 1)]
    origins, directions = _rays(fine, E, size * n)
    t = np.arange(600, 800, 0.1)
    for view in range(2):
        rows, columns = np.nonzero(image[view] > 0.5)
        for row, column in list(zip(rows, columns))[::7]:
            block = directions[view, n * row : n * row + n, n * column : n * column + n].reshape(-1, 3)
            points = origins[view] + t[None, :, None] * block[:, None]
            distance = np.min([_distance(points, a, b) for a, b in zip(rod.points, rod.points[1:])], 0)
            assert abs((distance < 3.0).sum(1).mean() * 0.1 - image[view, row, column]) < 0.06
    camera = np.eye(4)[None]
    wire = hardware.Implant(np.array([[-5.0, 0, 100], [5, 0, 100]]), 1.0)
    across = hardware.chords([wire], np.array([[1000.0, 1000, 0, 0]]), camera, 1, 1)[0, 0, 0]
    heights = np.array([-1, 0, 1]) / 3 * 0.1
    assert abs(across - np.mean(2 * np.sqrt(1 - heights**2))) < 1e-3
    behind = hardware.Implant(-wire.points, 1.0)
    assert not hardware.chords([behind], np.array([[1000.0, 1000, 0, 0]]), camera, 4, 4).any()


def _distance(points, a, b):
    along = np.clip((points - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
    return np.linalg.norm(points - a - along[..., None] * (b - a), axis=-1)


@pytest.fixture(scope="module")
def signal():
    rng = np.random.default_rng(0)
    integral = np.zeros((60, 48), np.float32)
    integral[8:, 5:40] = rng.uniform(1, 4, (13, 7)).repeat(4, 0).repeat(5, 1)
    return np.exp(-integral), integral


def test_every_effect_vanishes_with_its_strength_and_repeats_by_seed(signal):
    signal, integral = signal
    effects = {
        "scatter": lambda s, rng: panel.scatter(signal, integral, s, rng, 2.4),
        "gain_ramp": lambda s, rng: panel.gain_ramp(signal, s, rng),
        "vignetting": lambda s, rng: panel.vignetting(signal, s, rng),
        "offset": lambda s, rng: panel.offset(signal, s, rng),
        "air_value": lambda s, rng: panel.air_value(signal, s, rng),
        "blur": lambda s, rng: panel.blur(signal, s, 2.4),
        "collimator": lambda s, rng: signal * panel.collimator(signal.shape, s, rng, 2.4),
    }
    for name, effect in effects.items():
        np.testing.assert_allclose(effect(0.0, np.random.default_rng(1)), signal, rtol=1e-6, err_msg=name)
        strong = effect(0.7, np.random.default_rng(1))
        assert np.abs(strong - signal).max() > 1e-4, name
        np.testing.assert_array_equal(strong, effect(0.7, np.random.default_rng(1)), err_msg=name)
        assert strong.dtype == np.float32, name


def test_effects_have_the_strength_that_they_are_given(signal):
    signal, integral = signal
    rng = np.random.default_rng(3)
    behind = integral > panel.BODY
    for ratio in (0.1, 2.0):
        added = panel.scatter(signal, integral, ratio, rng, 2.4) - signal
        np.testing.assert_allclose(added[behind].mean() / signal[behind].mean(), ratio, rtol=1e-4)
        # Broad: nearly flat where the primary signal jumps by an order of magnitude.
        assert added[behind].max() < 4 * added[behind].min()
    gain = panel.gain_ramp(np.ones((60, 48), np.float32), 0.1, rng)
    np.testing.assert_allclose(np.ptp(gain), 0.1, rtol=1e-4)
    np.testing.assert_allclose(np.diff(gain, 2, axis=0), 0, atol=1e-6)
    assert {round(float(panel.air_value(np.ones(1), 0.2, rng)[0]), 4) for _ in range(20)} == {1.2, round(1 / 1.2, 4)}
    drift = [panel.offset(signal, 0.05, rng) - signal for _ in range(50)]
    assert 0.02 < np.max(np.abs(drift)) / signal.mean() < 0.0501
    fall = panel.vignetting(np.ones((60, 48), np.float32), 0.15, rng)
    assert 0.8 < fall.min() < 0.9 and fall[25:35, 20:28].min() > 0.97
    spot = np.zeros((61, 61), np.float32)
    spot[30, 30] = 1
    spread = panel.blur(spot, 1.5, 0.3)
    np.testing.assert_allclose(spread.sum(), 1, rtol=1e-5)
    half_width = np.interp(-0.5 * spread.max(), -spread[30, 30:], np.arange(31)) * 0.3
    np.testing.assert_allclose(2 * half_width, 1.5, rtol=0.03)


def test_noise_is_that_of_counted_quanta_of_many_energies():
    """Mean and variance against quanta counted energy by energy, each weighed by its energy."""
    spectrum, quanta, n = beam.tube(90.0, 3.0), 500.0, 200
    integrals = {
        materials.SOFT_TISSUE: np.full((n, n), 1.2, np.float32),
        materials.BONE: np.full((n, n), 0.4, np.float32),
    }
    signal, ratio = beam.transmit(spectrum, integrals)
    noisy = panel.noise(signal, ratio, quanta, 0.0, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    passed = sum(integrals[m][0, 0] * materials.relative(m, spectrum.energies_kev) for m in integrals)
    share = spectrum.weights / spectrum.energies_kev
    counts = rng.poisson(quanta * share / share.sum() * np.exp(-passed), (n * n, len(share)))
    direct = counts @ spectrum.energies_kev * share.sum() / quanta
    np.testing.assert_allclose(noisy.mean(), direct.mean(), rtol=0.01)
    np.testing.assert_allclose(noisy.var(), direct.var(), rtol=0.04)
    quiet = panel.noise(signal, ratio, 1e12, 0.0, rng)
    np.testing.assert_allclose(quiet, signal, rtol=1e-3)
    dark = panel.noise(np.zeros((n, n)), ratio, quanta, 5.0, rng)
    np.testing.assert_allclose(dark.std(), 5.0 / quanta, rtol=0.03)


def test_collimators_are_dark_outside_and_open_inside():
    shares = [panel.collimator((60, 48), 1.0, np.random.default_rng(seed), 2.4) for seed in range(40)]
    opened = [(s > 0.5).mean() for s in shares]
    assert min(opened) > 0.1 and max(opened) < 1 and np.std(opened) > 0.05
    assert all(s.min() >= 0.00099 and s.max() <= 1.0 for s in shares)


@pytest.fixture(scope="module")
def scan():
    """A trunk with seven vertebrae (the last one cut), each a body with a process to the back and one to the left."""
    affine = rigid_host.matrix([0.03, -0.05, 0.02], 0) @ np.diag([2.0, 2.2, 2.5, 1.0])
    affine[:3, 3] = [-150.0, -130.0, -400.0]
    shape = (130, 100, 84)
    ct = np.moveaxis(np.indices(shape, dtype=np.float32), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    x, y, z = np.moveaxis(ct - [-15.0, -20.0, -300.0], -1, 0)
    hu = np.full(shape, -1000.0, np.float32)
    hu[(x / 115) ** 2 + (y / 90) ** 2 < 1] = 30.0
    hu[((x - 60) / 35) ** 2 + ((y - 20) / 40) ** 2 + ((z - 40) / 70) ** 2 < 1] = -800.0
    labels = np.zeros(shape, np.uint8)
    for step, label in enumerate(range(15, 22)):
        up = z - 80 + 28 * step
        body = (x / 20) ** 2 + ((y + 20) / 15) ** 2 < 1
        process = (np.abs(x) < 4) & (np.abs(y + 48) < 16) | (np.abs(x + 24) < 12) & (np.abs(y + 36) < 5)
        part = (np.abs(up) < 11) & body | (np.abs(up + 4) < 5) & process
        labels[part] = label
        hu[part] = np.where(np.abs(up) > 8, 700.0, 250.0)[part]
    low = int(np.argwhere(labels == 21)[:, 2].min()) + 2
    return scans.Scan("trunk", hu[:, :, low:], labels[:, :, low:], affine @ rigid_host.matrix([0, 0, 0], [0, 0, low]))


@pytest.fixture(scope="module")
def body(scan):
    return simulation.ArticulatedBody(scan, rest_mm=5.0, vertebra_mm=2.6)


def _simulate(body, index=0, label=18, preset=None, geometry=GEOMETRY):
    return simulation.simulate(
        body, label, np.random.default_rng([7, label, index]), preset or simulation.Preset(), geometry
    )


def test_vertebrae_that_the_scan_cuts_stay_with_the_rest(body, scan):
    assert body.spine.labels == (15, 16, 17, 18, 19, 20) and 21 in scan.boxes
    with pytest.raises(errors.InputError, match="simulate: label: found 21, wanted a complete vertebra"):
        _simulate(body, label=21)
    empty = dataclasses.replace(scan, labels=np.zeros_like(scan.labels))
    with pytest.raises(errors.InputError, match="trunk: labels: found .*, wanted a complete vertebra"):
        simulation.ArticulatedBody(empty)


def test_parts_at_rest_add_up_to_the_whole_scan(body, scan):
    """With nothing moved, the X-ray of the parts is the X-ray of the scan, rendered by the older path."""
    sample = _simulate(body, preset=STILL)
    whole = whole_body.WholeBody(scan, 2.6)
    vertebra = extraction.extract(scan, 18, 64)
    world_from_ct = sample.world_from_box.astype(np.float64) @ np.linalg.inv(vertebra.ct_from_box)
    direct = quick.RigidBody(whole, vertebra)
    cameras = sample.intrinsics, sample.camera_from_world, (GEOMETRY.window,) * 2
    rest = direct.render_rest(world_from_ct, *cameras, 1.0)
    excess, alone = direct.render_vertebra(world_from_ct, *cameras, 0.6)
    ours = sample.rest + sample.excess
    assert np.linalg.norm(ours - rest - excess) < 0.02 * np.linalg.norm(rest + excess)
    assert np.linalg.norm(sample.excess - excess) < 0.06 * np.linalg.norm(excess)
    assert np.linalg.norm(sample.vertebra - alone) < 0.06 * np.linalg.norm(alone)
    np.testing.assert_allclose(sample.vertebra.sum((1, 2)), alone.sum((1, 2)), rtol=0.01)


def test_a_body_moved_as_one_is_a_moved_camera(body):
    """The same motion of every level, by the warp, against the same motion of the pose; away from the scan's repeated ends."""
    sample = _simulate(body, preset=STILL)
    world_from_ct = sample.world_from_box.astype(np.float64) @ np.linalg.inv(body.spine.ct_from_box[3])
    motion = rigid_host.motion_about(body.spine.centres[3], np.array([0.06, -0.04, 0.1, 6.0, -4, 3]))
    cameras = sample.intrinsics, sample.camera_from_world.astype(np.float64), GEOMETRY.window
    still, moved = np.tile(np.eye(4), (6, 1, 1)), np.tile(motion, (6, 1, 1))
    warped, _ = body.render_rest(moved, world_from_ct, *cameras)
    placed, _ = body.render_rest(still, world_from_ct @ motion, *cameras)
    unmoved, _ = body.render_rest(still, world_from_ct, *cameras)
    middle = np.s_[:, 10:38]
    assert np.linalg.norm((warped - placed)[middle]) < 0.1 * np.linalg.norm((unmoved - placed)[middle])


def test_a_sample_is_a_function_of_seed_and_index(body):
    one, other = _simulate(body, 4), _simulate(body, 5)
    again = _simulate(body, 4)
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(again, field.name))
        assert np.isfinite(getattr(one, field.name)).all()
    assert np.abs(one.rest - other.rest).max() > 0.1
    # What the detector draws changes neither the posture nor the cameras.
    clean = _simulate(body, 4, preset=dataclasses.replace(simulation.Preset(), chance_hardware=0.0, kvp=(70, 70)))
    np.testing.assert_array_equal(clean.rest, one.rest)


def test_every_vertebra_moves_on_its_own(body):
    still, moved = _simulate(body, preset=STILL), _simulate(body)
    np.testing.assert_array_equal(still.camera_from_world, moved.camera_from_world)
    assert np.abs(still.world_from_box - moved.world_from_box).max() > 0.01
    shift = (moved.centroids - still.centroids)[:, [15, 16, 17, 18, 19, 20]]
    relative = shift - shift.mean(1, keepdims=True)
    assert (np.linalg.norm(relative, axis=-1) > 1e-3).all()


def test_labels_are_where_the_vertebrae_are(body):
    """The target's labelled centroid is the centre of its image, for every target, in windows aimed beside it."""
    geometry = dataclasses.replace(GEOMETRY, aim_mm=25.0)
    for label in body.spine.labels[1:5]:
        sample = _simulate(body, label=label, geometry=geometry)
        assert sample.in_sight[:, label].all() and not sample.in_sight[:, [1, 14, 21, 28]].any()
        for view in range(2):
            E, k = sample.camera_from_world[view], sample.intrinsics[view]
            p = (E @ sample.world_from_box)[:3, 3]
            np.testing.assert_allclose(sample.centroids[view, label], k[:2] * p[:2] / p[2] + k[2:], atol=1e-3)
            image = sample.vertebra[view]
            v, u = np.indices(image.shape)
            centre = np.array([(image * u).sum(), (image * v).sum()]) / image.sum()
            assert np.abs(centre - sample.centroids[view, label]).max() < 2.0
    off = [_simulate(body, i, geometry=geometry).centroids[:, 18] - 24 for i in range(4)]
    assert np.max(np.abs(off)) > 1.0


def test_a_perfect_detector_shows_the_hardened_clean_image(body):
    sample = _simulate(body, preset=CLEAN)
    clean = sample.rest + sample.excess
    assert sample.valid.all() and not sample.metal.any()
    for measured, wanted in zip(sample.measured, clean):
        assert np.corrcoef(measured.ravel(), wanted.ravel())[0, 1] > 0.99
    mono = beam.monochromatic()
    signal, _ = beam.transmit(mono, {materials.SOFT_TISSUE: clean[0]})
    np.testing.assert_allclose(-np.log(signal), np.maximum(clean[0], 0), atol=1e-4)


def test_implants_are_in_the_measured_image_only(body):
    with_metal = dataclasses.replace(CLEAN, chance_hardware=1.0)
    for index in range(3):
        bare, implanted = _simulate(body, index, preset=CLEAN), _simulate(body, index, preset=with_metal)
        np.testing.assert_array_equal(bare.rest, implanted.rest)
        np.testing.assert_array_equal(bare.vertebra, implanted.vertebra)
        metal = implanted.metal > 1.0
        assert implanted.metal.max() > 0.3
        assert (implanted.measured - bare.measured).min() > -0.02
        assert metal.mean() < 0.3 and (implanted.measured - bare.measured)[metal].min() > 0.1


def test_the_preset_holds_the_issues_ranges_and_all_of_it_is_usable(body):
    preset = simulation.Preset()
    assert preset.kvp == (70, 120) and preset.scatter_to_primary == (0.1, 2) and preset.gain_ramp == (0, 0.1)
    assert preset.focal_blur_mm == preset.detector_blur_mm == (0.2, 1.5) and preset.air_value == (0, 0.2)
    assert preset.quanta_per_mm2[1] / preset.quanta_per_mm2[0] == 100
    for end in (0, 1):
        extreme = dataclasses.replace(
            preset,
            chance_collimator=float(end),
            chance_hardware=float(end),
            **{
                f.name: (getattr(preset, f.name)[end],) * 2
                for f in dataclasses.fields(preset)
                if "chance" not in f.name
            },
        )
        sample = _simulate(body, preset=extreme)
        assert np.isfinite(sample.measured).all() and sample.valid.mean() > 0.1


@pytest.mark.skipif(not CASES.exists(), reason="the bench cases are not beside the repository (RADGS_SHARED)")
def test_our_xray_of_every_easy_scene_is_the_given_one():
    """The vertebra alone at 70 keV, at the default resolution of the crops, against another program's."""
    case_file = cases.read(CASES)
    volume = next(iter(case_file.volumes.values()))
    body = simulation.ArticulatedBody(scans.read_scan(volume.full_ct, volume.full_mask))
    for scene in case_file.scenes.values():
        given = np.stack([x.line_integrals for x in cases.read_xrays(scene, "easy")])
        K, E = np.stack([v.intrinsics for v in scene.cameras]), np.stack([v.camera_from_world for v in scene.cameras])
        label = case_file.volumes[scene.volume].full_label
        _, _, ours = body.render_vertebra(label, cases.truth(case_file, scene), K, E, given.shape[1])
        for a, b in zip(ours, given):
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] >= 0.998
            assert 0.98 < a.sum() / b.sum() < 1.02
