"""The optimiser, its schedule, and the sharded update."""

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from radgs_jax.models.config import ModelConfig
from radgs_jax.training import objectives
from radgs_jax.training import sharding

if TYPE_CHECKING:
    import optax

TRAINED = {"rec": ("recm",), "reg": ("regm",), "joint": ("recm", "regm")}
"""Names of the parameter trees that each phase trains."""
MAX_GRADIENT = 1.0
"""Norm to which longer gradients are cut. Chosen by hand: smaller values slow training down, larger ones let a rare batch throw the
parameters off."""
WEIGHT_DECAY = 1e-4
"""Decay of the weights per step, as a fraction of the learning rate; optax's own default for AdamW."""
WARMUP_STEPS = 50
"""Number of steps over which the learning rate rises. Chosen by hand: with fewer, Adam's first and uncertain moments take
large steps."""


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a training step is made. The defaults suit a small network on one device.

    Attributes:
      parts: number of parts of a batch whose gradients are made one after the other and averaged, each with random numbers of its
        own: more take less memory.
      ema: decay of the moving average of the parameters that a phase ends with; 0 ends it with the last ones.
      bfloat16, remat: of the backbones in training, as in `backbones.make_backbone`.
    """

    parts: int = 1
    ema: float = 0.0
    bfloat16: bool = False
    remat: bool = False

    def in_training(self, config: ModelConfig) -> ModelConfig:
        """The model's configuration with the backbones' options; its parameters are the same."""
        chosen = tuple((name, True) for name in ("bfloat16", "remat") if getattr(self, name))
        with_options = lambda backbone: backbone and (backbone[0], (*backbone[1], *chosen))
        return dataclasses.replace(
            config, backbone_2d=with_options(config.backbone_2d), backbone_3d=with_options(config.backbone_3d)
        )


Params = dict[str, Any]
"""Parameter trees by the name of their network."""
State = dict[str, Any]
"""{'params': `Params`, 'opt_state': moments of the trained ones, 'ema': average of these where there is one}."""


def optimizer(weight_decay: float = WEIGHT_DECAY) -> "optax.GradientTransformation":
    """AdamW without its learning rate, which the update takes as an argument so that schedules never recompile."""
    import optax  # a tenth of a second, for training alone

    return optax.chain(
        optax.clip_by_global_norm(MAX_GRADIENT), optax.scale_by_adam(), optax.add_decayed_weights(weight_decay)
    )


def cosine(step: int, steps: int, peak: float, warmup: int = WARMUP_STEPS) -> float:
    """Learning rate: linear warm-up, then half a cosine to zero. On the host, since a device would answer after all its steps."""
    progress = min(1.0, step / max(1, steps))
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))


def state_of(params: Params, trained: Sequence[str], config: UpdateConfig = UpdateConfig()) -> State:
    """The first state; only the trees named in `trained` get optimiser moments."""
    free = {name: params[name] for name in trained}
    average = {"ema": jax.tree.map(jnp.copy, free)} if config.ema else {}
    return {"params": params, "opt_state": optimizer().init(free), **average}


def init_state(params: Params, phase: str, config: UpdateConfig = UpdateConfig()) -> State:
    """`state_of` one phase."""
    return state_of(params, TRAINED[phase], config)


def result_of(state: State) -> Params:
    """The parameters that a phase ends with."""
    return {**state["params"], **state.get("ema", {})}


def update_of(
    mesh: Mesh, objective: Callable, trained: Sequence[str], config: UpdateConfig = UpdateConfig()
) -> Callable:
    """The jitted update (state, key, learning_rate, batch) -> (state, metrics) on a mesh of `sharding.make_mesh`.

    The state lies as `sharding.made` makes it, the batch is split by examples. The compiler divides the work, so that the numbers,
    random ones included, are those of one device but for the order of sums. The state is donated. A batch whose gradient is not
    finite leaves the state as it was. The metrics are the loss, the norms of the gradient and of the trained parameters, the
    objective's scalars, and `skipped`: 1 for such a batch, else 0.

    Args:
      objective: (params, key, batch) -> scalar and a dict of scalars; trained: names in `params` that it is minimised over.
    """
    import optax

    tx = optimizer()

    def step(state, key, learning_rate, batch):
        batch = jax.lax.with_sharding_constraint(batch, sharding.of_batch(mesh))
        free = {name: state["params"][name] for name in trained}

        def of_part(number, part):
            def of_free(free):
                return objective({**state["params"], **free}, jax.random.fold_in(key, number), part)

            return jax.value_and_grad(of_free, has_aux=True)(free)

        # In use here, since operators split their batch over it.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (value, scalars), gradient = _mean_over_parts(of_part, batch, config.parts)
        norm = optax.global_norm(gradient)
        direction, opt_state = tx.update(gradient, state["opt_state"], free)
        good = jnp.isfinite(norm)
        stepped = jax.tree.map(lambda p, d: jnp.where(good, p - learning_rate * d, p), free, direction)
        opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), opt_state, state["opt_state"])
        new_state = {"params": {**state["params"], **stepped}, "opt_state": opt_state}
        if config.ema:
            new_state["ema"] = jax.tree.map(
                lambda old, new: jnp.where(good, config.ema * old + (1.0 - config.ema) * new, old),
                state["ema"],
                stepped,
            )
        new_state = jax.lax.with_sharding_constraint(new_state, sharding.of_state(new_state, mesh))
        norms = {"gradient_norm": norm, "parameter_norm": optax.global_norm(stepped)}
        return new_state, {"loss": value, **norms, **scalars, "skipped": (~good).astype(jnp.int32)}

    return jax.jit(step, donate_argnums=0)


def _mean_over_parts(of_part, batch, parts):
    """The mean of of_part(number, part of the batch), one part after the other."""
    if parts == 1:
        return of_part(0, batch)
    # Every part takes examples from every device.
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, of_part(*numbered)), None

    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of_part, 0, jax.tree.map(lambda a: a[0], split))
    )
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    return jax.tree.map(lambda a: a / parts, total)


@functools.cache
def make_update(
    mesh: Mesh,
    phase: str,
    config: ModelConfig,
    weights: objectives.LossConfig,
    strength: float,
    how: UpdateConfig = UpdateConfig(),
) -> Callable:
    """`update_of` one phase's `objectives.loss`."""
    config = how.in_training(config)
    objective = functools.partial(objectives.loss, phase=phase, config=config, weights=weights, strength=strength)
    return update_of(mesh, objective, TRAINED[phase], how)
