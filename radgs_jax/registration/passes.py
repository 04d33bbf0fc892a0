"""Passes of the network: each crops the X-rays at a pose, reconstructs the vertebra, and moves the pose."""

import jax
import numpy as np
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax.gaussians import Gaussians
from radgs_jax.models import radgs_reg
from radgs_jax.models.trained import Model
from radgs_jax.registration.programs import Programs
from radgs_jax.registration.pyramid import Pyramid


def run_network(
    programs: Programs, model: Model, seen: Pyramid, world_from_box: Float[Array, "4 4"], cloud: Gaussians, passes: int
) -> radgs_reg.Registration:
    """`radgs_reg.iterate` on the host: one compiled pass, called `passes` times.

    Args:
      seen: a pyramid of one level, at the model's resolution; world_from_box: start pose, mm; cloud: Gaussians (N,) of the CT's
        vertebra, box frame.
    Returns:
      `Registration` in numpy.
    """
    (level,) = seen.levels
    views = level.images, level.valid, level.intrinsics, seen.camera_from_world
    trajectory = [np.asarray(world_from_box, np.float32)]
    for _ in range(passes):
        found = programs.network_pass(model.params, *views, trajectory[-1], cloud, config=model.config)
        trajectory.append(np.asarray(found.world_from_box))
    return jax.device_get(found).replace(trajectory=np.stack(trajectory))
