"""Attenuation, the beam and the panel against tabulated physics, direct integration and counted quanta."""

import numpy as np
import pytest
import xraylib

from data_pipelines.simulation import beam
from data_pipelines.simulation import materials
from data_pipelines.simulation import panel
from radgs_jax import attenuation


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
    """Each wedge, bare and behind 80 mm of tissue, within 0.3 % of a sum in steps of 0.1 keV; 2 % were required."""
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
            # Behind more material the remaining quanta are harder, and each adds more noise.
            assert (np.diff(ratio[0]) > 0).all()


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
        "collimator": lambda s, rng: signal * panel.random_collimator(signal.shape, s, rng, 2.4),
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
    """Mean and variance against quanta that are counted by energy and weighted with it."""
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
    shares = [panel.random_collimator((60, 48), 1.0, np.random.default_rng(seed), 2.4) for seed in range(40)]
    opened = [(s > 0.5).mean() for s in shares]
    assert min(opened) > 0.1 and max(opened) < 1 and np.std(opened) > 0.05
    assert all(s.min() >= 0.00099 and s.max() <= 1.0 for s in shares)


def test_a_vendors_picture_has_eight_bits_and_keeps_the_order_of_large_areas():
    rng = np.random.default_rng(3)
    steps = np.repeat(np.linspace(1.0, 4.0, 8), 40)[None].repeat(200, 0)
    image = steps + 0.02 * rng.normal(size=steps.shape)
    for _ in range(5):
        picture = panel.vendor_picture(image, panel.picture_scale(image), rng)
        assert picture.shape == image.shape and np.unique(picture).size <= 256
        np.testing.assert_allclose(picture * 40.0, np.round(picture * 40.0), atol=1e-4)
        assert picture.min() >= 0.0 and picture.max() <= 255 / 40.0
        middles = picture[:, 20::40].mean(0)
        assert (np.diff(middles) >= 0).all() and np.ptp(middles) > 1.0
