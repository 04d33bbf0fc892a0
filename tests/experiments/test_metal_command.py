"""The metal network: its file, its training on a few phantoms, and the flags that name it."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines import simulation
from data_pipelines.phantom import generate
from data_pipelines.simulation import metal_views
from experiments import metal as command
from experiments.patients import metal_files
from radgs_jax import errors
from radgs_jax.models import metal

CONFIG = metal.MetalConfig(1.0, (2, 3))
SMALL = metal_views.MetalSet(
    2,
    1,
    2,
    simulation.Geometry(window=32, binning=20, vertebra_step_mm=4.0, rest_step_mm=6.0),
    simulation.Preset(chance_hardware=1.0),
    generate.PhantomConfig((4.0, 4.0, 4.0), levels=(20, 21, 22, 23, 24)),
)


def test_a_finder_is_read_as_it_was_written_and_damage_is_one_line(tmp_path):
    path = tmp_path / "metal.npz"
    finder = metal.MetalFinder(jax.device_get(metal.init(CONFIG, jax.random.key(0))), CONFIG)
    metal_files.write_finder(path, finder, "a test")
    again = metal_files.read_finder(path)
    assert again.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, again.params, finder.params)
    with np.load(path) as stored:
        arrays = dict(stored)
    name = next(key for key in arrays if key != "header")
    for value in (arrays[name] + 1.0, arrays[name] * np.nan, arrays[name][..., :1]):
        np.savez(path, **{**arrays, name: value})
        with pytest.raises(errors.InputError, match="metal.npz"):
            metal_files.read_finder(path)
    np.savez(path, header=np.array("{}"))
    with pytest.raises(errors.InputError, match="metal.npz"):
        metal_files.read_finder(path)


def test_the_shipped_finder_is_there():
    assert metal_files.read_base().config == metal.MetalConfig()


def test_training_ends_with_scores_and_goes_on_where_it_was(tmp_path):
    how = command.MetalTraining(views=SMALL, held_out=1, steps=2, batch=4, crop_px=16)
    finder, scores = command.train_finder(tmp_path, how, CONFIG)
    assert set(scores) == {"found", "right", "false"} and all(0 <= value <= 1 for value in scores.values())
    again, _ = command.train_finder(tmp_path, how, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, again.params, finder.params)


def test_views_are_a_function_of_their_numbers_and_show_metal():
    from data_pipelines.pairs import identity

    first, again = (metal_views.views(SMALL, 5, 0, identity.Archive({})) for _ in range(2))
    for name in ("images", "metal", "valid"):
        assert first[name].shape == (2, 2, 32, 32)
        np.testing.assert_array_equal(first[name], again[name])
    assert dataclasses.replace(SMALL, bodies=3) != SMALL and first["metal"].any()
