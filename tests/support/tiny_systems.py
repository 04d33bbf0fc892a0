"""The smallest sizes with which each system of Table 1 still runs, and training that is not compiled."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.comparison import subjects
from radgs_jax.baselines import ddgs
from radgs_jax.baselines import diffpose
from radgs_jax.baselines import diffvox
from radgs_jax.baselines import gr_car
from radgs_jax.baselines import r2_gaussian
from radgs_jax.baselines import sax_nerf
from radgs_jax.baselines import ts_sar
from radgs_jax.training import update

SIZES = subjects.Sizes(
    diffvox.Config(side=16, cluttered_side=12, step_mm=8.0, steps=3),
    sax_nerf.Config(levels=2, table=8, width=4, heads=2, samples=8, windows=1, rays=8, steps=2),
    gr_car.Config(
        gaussians=40, capacity=60, side=16, steps=2, interval=1, densify=1, crop_px=32, pixel_mm=3.0, widths=(8, 16)
    ),
    r2_gaussian.Config(gaussians=40, capacity=60, steps=2, interval=1, densify=(0, 2)),
    diffpose.Config(width=4, crop_px=32, step_mm=6.0, steps=2, batch=2, refine_steps=2, patch_px=5),
    ddgs.Config(surface=20, inside=20, steps=2, listed=16, crop_px=32, pixel_mm=3.0, pose_steps=2),
    ts_sar.Config(side=2, levels=(4, 8, 8), blocks=(0, 0, 0), channels=8, width=8, heads=2, layers=1, steps=2, batch=2),
    plain_steps=2,
    pairs=2,
    phantoms=1,
    predictor_steps=2,
    ours_minutes=0.0,
)
"""Two steps of everything."""


def traced(networks: Sequence[str]) -> Callable[..., Any]:
    """In place of `update.update_of`: its step leaves these networks as they are, and their loss is traced but not compiled."""
    update_of = update.update_of

    def make(mesh, objective, trees):
        if trees[0] not in networks:
            return update_of(mesh, objective, trees)

        def step(state, key, learning_rate, batch):
            value, parts = jax.eval_shape(objective, state["params"], key, batch)
            assert value.shape == ()
            return state, {**{name: np.zeros(()) for name in ("loss", *parts)}, "skipped": np.zeros((), np.int32)}

        return step

    return make
