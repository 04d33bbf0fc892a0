"""What the training loop adds to its steps, and how long it waits for data, with the demo's sizes. Slow; wants a quiet machine."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from data_pipelines.pairs import build
from data_pipelines.pairs import identity
from data_pipelines.phantom import scan_files
from experiments import configs
from experiments.runtime import progress
from experiments.training import loop
from radgs_jax.models import radgs_reg
from radgs_jax.training import sharding
from radgs_jax.training.update import init_state
from radgs_jax.training.update import make_update

ROUNDS, STEPS, BLOCK = 3, 60, loop.LOG_STEPS


@pytest.mark.slow
def test_the_loop_adds_little_to_its_steps_and_hardly_waits(tmp_path, monkeypatch):
    config = dataclasses.replace(configs.DEMO, p1_patients=1)
    (subject,) = scan_files.phantoms(tmp_path / "scans", [0], config.phantom)
    vertebrae = [(identity.FileScan(*subject), config.labels[0])]
    pairs = build.simulated_pairs(tmp_path / "pairs", vertebrae, 40, 0, config.pairs, config.model.gaussians, 4)
    params = jax.jit(lambda key: radgs_reg.init(config.model, key))(jax.random.key(0))
    mesh, logged = sharding.make_mesh(), []
    update = make_update(mesh, "rec", config.model, config.losses, 1.0)
    fresh = lambda: sharding.made(mesh, lambda params: init_state(params, "rec"), params)
    monkeypatch.setattr(progress.Log, "scalars", lambda _, step, values: logged.append((step, values)))

    def bare():
        """Median time of a step on one batch that lies on the device."""
        batches = pairs.batches(0, config.batch)
        batch, key = loop._split(next(batches), mesh), loop._key_on(mesh, jax.random.key(0))
        batches.close()
        rate, state, times = loop._whole(np.float32(1e-4), mesh), fresh(), []
        for _ in range(STEPS // BLOCK):
            start = time.monotonic()
            for _ in range(BLOCK):
                state, metrics = update(state, key, rate, batch)
            jax.block_until_ready(metrics)
            times.append((time.monotonic() - start) / BLOCK)
        return np.median(times[1:])

    def looped(folder):
        """The same of the loop, with what it says itself, and its share of waiting."""
        logged.clear()
        batches = pairs.batches(0, config.batch)
        shared = {"key": jax.random.key(0), "rate": lambda step: 1e-4, "steps": STEPS, "checkpoint_seconds": 1e9}
        loop.run_steps(folder, tmp_path, mesh, fresh(), update, batches, **shared)
        batches.close()
        later = [values for step, values in logged if step > BLOCK]
        return [np.median([v[name] for v in later]) for name in ("examples_per_s", "waiting_share")]

    bare(), looped(tmp_path / "warm")
    ratios, waits = [], []
    for number in range(ROUNDS):
        step_s, (rate, waiting) = bare(), looped(tmp_path / f"run_{number}")
        ratios.append(config.batch / rate / step_s)
        waits.append(waiting)
        print(f"step {1e3 * step_s:.1f} ms; loop {100 * (ratios[-1] - 1):.1f} % more, {100 * waiting:.2f} % in waiting")
    assert np.median(ratios) < 1.03 and np.median(waits) < 0.02
