"""The compiled functions of a registration, made by whatever compiler the caller hands in."""

import dataclasses
import functools
from collections.abc import Callable

from radgs_jax import gaussians
from radgs_jax.models import radgs_reg
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import reconstruct

Compile = Callable[..., Callable]
"""`jax.jit`, or what takes the same function and `static_argnames` and returns a callable that has `lower`, too."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """network_pass, refine, move, as_bone: compiled `radgs_reg.iterate` of one pass, `gauss_newton.refine`, `gaussians.move`
    and `reconstruct.as_bone`."""

    network_pass: Callable
    refine: Callable
    move: Callable
    as_bone: Callable


@functools.cache
def programs_of(compile: Compile) -> Programs:
    """`Programs` of a compiler, made once for each, so that nothing is traced twice."""
    return Programs(
        compile(network_pass, static_argnames="config"),
        compile(gauss_newton.refine, static_argnames="config"),
        compile(gaussians.move),
        compile(reconstruct.as_bone, static_argnames="registered"),
    )


def network_pass(params, images, valid, intrinsics, camera_from_world, world_from_box, cloud, config):
    """One pass of `radgs_reg.iterate`."""
    return radgs_reg.iterate(
        params, config, images, valid, intrinsics, camera_from_world, world_from_box, cloud, passes=1
    )
