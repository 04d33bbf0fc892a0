"""Simulated X-rays of phantoms with metal in them, and where it is: what the metal network is trained and scored on."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from data_pipelines import simulation
from data_pipelines.pairs import identity
from data_pipelines.pairs import pair_store
from data_pipelines.phantom import generate
from data_pipelines.simulation import acquisition
from data_pipelines.simulation import phantom_bodies

METAL = 0.03
"""Line integral at 70 keV from which a pixel shows metal: 0.1 mm of titanium. Chosen by hand: half of it adds the rims of pixels
that metal touches, twice of it misses thin wires seen in large pixels."""


@dataclasses.dataclass(frozen=True)
class MetalSet:
    """Which X-rays to simulate, one phantom after the other. Its hash names the store.

    Attributes:
      bodies: number of phantoms, with consecutive seeds.
      stances: number of postures and cameras of each.
      exposures: number of acquisitions of each stance, which differ in metal, beam and panel.
      geometry, preset, spine: of the simulation and of the phantoms.
    """

    bodies: int = 24
    stances: int = 9
    exposures: int = 12
    geometry: simulation.Geometry = simulation.Geometry(
        window=224, binning=5, aim_mm=50.0, vertebra_step_mm=1.0, rest_step_mm=2.0
    )
    preset: simulation.Preset = simulation.Preset(chance_hardware=0.85)
    spine: generate.PhantomConfig = generate.PhantomConfig()

    def __len__(self) -> int:
        return self.bodies * self.stances


@pair_store.named("metal.views/1")
def views(which: MetalSet, seed: int, index: int, archive: identity.Archive) -> dict[str, np.ndarray]:
    """The exposures of stance `index`, a function of (which, seed, index).

    Returns:
      images (E, V, S, S) float16, line integrals; metal and valid (E, V, S, S) bool.
    """
    number, own = divmod(index, which.stances)
    body = archive.keep(phantom_bodies.phantom_body, seed + number, which.spine)
    rng = np.random.default_rng([seed, number, own])
    stance = acquisition.stand(body, int(rng.choice(body.spine.labels)), rng, which.preset, which.geometry)
    samples = [acquisition.expose(stance, rng) for _ in range(which.exposures)]
    return {
        "images": np.stack([phantom_bodies.stored(s.measured) for s in samples]),
        "metal": np.stack([s.metal > METAL for s in samples]),
        "valid": np.stack([s.valid for s in samples]),
    }


def simulated(
    folder: pathlib.Path | str, which: MetalSet, seed: int, on_done: Callable[[int], Any] = lambda stances: None
) -> pair_store.Source:
    """The X-rays of a set, simulated where they are not there yet.

    Args:
      folder: of all stores, each in a folder named by its content; seed: of everything random.
      on_done: called with the number of stances in every finished shard.
    """
    processes = pair_store.usable_cores() if jax.default_backend() == "cpu" else 1
    return pair_store.write(
        pathlib.Path(folder) / identity.config_hash(which, seed),
        views,
        len(which),
        which,
        seed,
        processes=max(1, processes),
        shard_size=which.stances,
        context=identity.Archive({}),
        on_done=on_done,
    )
