"""The compiled functions of a registration, made by whatever compiler the caller hands in."""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax.models import radgs_reg
from radgs_jax.models.config import ModelConfig
from radgs_jax.registration import bodies
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import overview
from radgs_jax.registration import reconstruct

Compile = Callable[..., Callable]
"""`jax.jit`, or a function that takes the same function and `static_argnames` and also returns a callable with `lower`."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions.

    Attributes:
      network_pass: `network_pass`; refine_level: `gauss_newton.refine_level`; best_shifts: `overview.best_shifts`; cut,
        linearised: of `bodies`; move: `gaussians.move`; as_bone: `reconstruct.as_bone`.
    """

    network_pass: Callable
    refine_level: Callable
    best_shifts: Callable
    cut: Callable
    linearised: Callable
    move: Callable
    as_bone: Callable


@functools.cache
def programs_of(compile: Compile) -> Programs:
    """`Programs` of a compiler, made once for each compiler, so that nothing is traced twice."""
    return Programs(
        compile(network_pass, static_argnames="config"),
        compile(gauss_newton.refine_level, static_argnames=("level", "config")),
        compile(overview.best_shifts, static_argnames=("size", "depths", "config")),
        compile(bodies.cut, static_argnames="config"),
        compile(bodies.linearised, static_argnames="config"),
        compile(gaussians.move),
        compile(reconstruct.as_bone, static_argnames="registered"),
    )


def network_pass(
    params: dict[str, Any],
    images: Sequence[Float[Array, "_ _"]],
    valid: Sequence[Bool[Array, "_ _"]],
    intrinsics: Float[Array, "views 4"],
    camera_from_world: Float[Array, "views 4 4"],
    world_from_box: Float[Array, "4 4"],
    cloud: gaussians.Gaussians,
    config: ModelConfig,
) -> radgs_reg.Registration:
    """One pass of `radgs_reg.iterate`."""
    return radgs_reg.iterate(
        params, config, images, valid, intrinsics, camera_from_world, world_from_box, cloud, passes=1
    )
