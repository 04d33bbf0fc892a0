"""DiffVox (Momeni et al. 2024, arXiv 2411.19224): a grid of voxels fitted to X-rays by gradient descent.

Each voxel is a parameter x with density softplus(x - 0.3). The loss is the mean absolute difference of line integrals plus total
variation, and Adam's rate follows one cycle. The shift of 0.3 is in the public code alone; the paper and the README have none.
The public code renders shuffled rays of about two million pixels a step, which is more than a few small X-rays have: here a step
has them all, and the number of steps, not of epochs, is kept. The densities start empty.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import losses
from radgs_jax.baselines import box

if TYPE_CHECKING:
    import optax

SHIFT = 0.3
"""Taken off a parameter before `box.softplus`, 1/mm: DiffVox's code. At half, the box starts with haze of 2.4e-3 1/mm; at twice,
twice as many steps pass before bone appears."""
SMOOTHNESS = 5.0
"""Weight of `losses.tv3d`, mm: DiffVox's 15, there of the mean over the three axes."""
RISE = 0.1
"""Share of the steps in which the rate rises: 5 of DiffVox's 50 epochs."""
FIRST, LAST = 1.0 / 25.0, 4e-6
"""Rate at the start and at the end relative to its peak: PyTorch's one cycle, which DiffVox uses as it is."""
MOMENTS = (0.95, 0.85)
"""Decay of Adam's first moment at the start and the end, and at the rate's peak: PyTorch's one cycle."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and steps; by default a scene takes a CPU about a quarter of a minute.

    Attributes:
      side: voxels along a side of the box; cluttered_side: that with a body, which needs memory and time of its own.
      step_mm: of samples along rays.
      steps: number of steps: DiffVox's 50 epochs of 7 steps.
      rate: Adam's, at its peak, 1/mm: DiffVox's.
      body: voxels around the box, or None where X-rays show the vertebra alone.
    """

    side: int = 96
    cluttered_side: int = 64
    step_mm: float = 1.0
    steps: int = 350
    rate: float = 0.01
    body: box.BodyConfig | None = None


QUICK = Config(steps=175)
"""Half the steps."""
ORIGINAL = Config(side=480, cluttered_side=480, step_mm=0.2)
"""About DiffVox's 501 voxels along a side and 500 samples a ray, five voxels to one of the result."""


def density(voxels: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Densities, 1/mm, of parameters; 1.2e-4 1/mm at 0, where they start."""
    return box.softplus(voxels - SHIFT)


def loss(params: Mapping[str, Any], config: Config, views: box.BoxViews) -> Float[jax.Array, ""]:
    """Mean absolute difference over valid pixels, plus total variations, of `box.parameters` of voxels."""
    volume = density(params["box"])
    around, penalty = box.surroundings(params, config.body, views)
    image = box.render(volume, box.box_grid(volume.shape[0]), views, config.step_mm) + around
    return box.masked_mean(jnp.abs(image - views.images), views.valid) + SMOOTHNESS * losses.tv3d(volume) + penalty


def optimiser(config: Config) -> "optax.GradientTransformation":
    """Adam with one cycle: the rate rises linearly for a tenth of the steps and falls linearly, its first moment the other way."""
    import optax

    rise = max(1, round(RISE * config.steps))

    def cycle(first, peak, last):
        up = optax.linear_schedule(first, peak, rise)
        return optax.join_schedules([up, optax.linear_schedule(peak, last, config.steps - rise)], [rise])

    rate = cycle(FIRST * config.rate, config.rate, LAST * config.rate)
    moment = cycle(MOMENTS[0], MOMENTS[1], MOMENTS[0])
    return optax.inject_hyperparams(optax.adam)(learning_rate=rate, b1=moment)


@functools.partial(jax.jit, static_argnames="config")
def _fit(config, views):
    # Not a number times zero is not a number, so that invalid pixels are emptied before anything is computed from them.
    views = views.replace(images=jnp.where(views.valid, views.images, 0.0))
    side = config.side if config.body is None else config.cluttered_side
    params = box.parameters(jnp.zeros((side,) * 3), config.body, views)
    tx = box.with_body(optimiser(config), config.body)
    steps = jnp.arange(config.steps)
    params, _, _ = box.descend(lambda params, _: loss(params, config, views), tx, params, tx.init(params), steps)
    return box.to_result(density(params["box"]))


def fit(config: Config, views: box.BoxViews, key: jax.Array) -> Float[jax.Array, "96 96 96"]:
    """Density of the box, 1/mm, in voxels of 1 mm. `key` is not used: nothing is drawn."""
    del key
    return _fit(config, views)
