"""The training step, compiled for chips that need not be there: what it takes on each, and how its communication grows."""

import dataclasses
import math
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from experiments import configs
from kernels.tools import compiler_output
from kernels.tools import compilers
from kernels.tools import lowering
from kernels.tools.chips import Chip
from kernels.tools.chips import CHIPS
from kernels.tools.chips import TARGETS
from radgs_jax import gaussians
from radgs_jax.models import radgs_reg
from radgs_jax.training import objectives
from radgs_jax.training import sharding
from radgs_jax.training.batches import CtBatch
from radgs_jax.training.batches import PairBatch
from radgs_jax.training.update import init_state
from radgs_jax.training.update import make_update
from radgs_jax.training.update import UpdateConfig

VIEWS = 2
LIMIT_S = 7200.0
"""For all steps of a target; several times what the largest take on two cores."""
GPU_FLAGS = "--xla_gpu_enable_triton_gemm=false"
"""XLA chooses between its own matrix products and cuBLAS by timing them; without a GPU it takes its own, and fails on some."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What of a configuration is changed for a compilation; None leaves it as it is.

    Attributes:
      batch: number of examples per device; crop_px: side of the network's X-rays; grid: side of its volumes.
      mesh: as `configs.Config.mesh`, over the target's devices.
      update: how a step is made.
    """

    batch: int | None = None
    crop_px: int | None = None
    grid: int | None = None
    mesh: tuple[tuple[str, int], ...] = ()
    update: UpdateConfig = UpdateConfig()

    def of(self, config: configs.Config) -> configs.Config:
        """The configuration with these sizes. The crop and the volume show as many mm as before."""
        model = config.model
        crop, grid = self.crop_px or model.crop_px, self.grid or model.grid
        model = dataclasses.replace(
            model,
            crop_px=crop,
            pixel_mm=model.pixel_mm * model.crop_px / crop,
            grid=grid,
            voxel_mm=model.voxel_mm * model.grid / grid,
        )
        # Pairs are stored in windows that are wider than the crop by as much as before.
        geometry = config.pairs.geometry
        window = math.ceil(geometry.window * crop / config.model.crop_px)
        pairs = dataclasses.replace(config.pairs, geometry=dataclasses.replace(geometry, window=window))
        return dataclasses.replace(config, model=model, pairs=pairs, mesh=self.mesh, update=self.update)


def abstract_step(
    config: configs.Config, phase: str, mesh: jax.sharding.Mesh, batch: int
) -> tuple[Any, tuple[Any, ...]]:
    """The update of a phase, and its arguments as shapes with shardings; batch: number of examples over all devices."""
    whole = sharding.whole(mesh)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    params = jax.eval_shape(lambda key: radgs_reg.init(config.model, key), jax.random.key(0))
    state = jax.eval_shape(lambda params: init_state(params, phase, config.update), params)
    state = jax.tree.map(place, state, sharding.of_state(state, mesh))
    key, rate = jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((), jnp.float32)
    examples = jax.eval_shape(lambda: _examples(config, phase, batch))
    examples = jax.tree.map(lambda leaf: place(leaf, sharding.of_batch(mesh)), examples)
    step = make_update(mesh, phase, config.model, config.losses, 1.0, config.update)
    return step, (state, place(key, whole), place(rate, whole), examples)


def _examples(config, phase, batch):
    count, side = config.model.gaussians, config.pairs.geometry.window
    cloud = gaussians.uniform_cloud(math.ceil(count ** (1 / 3)), 1.0, 0.02)
    cloud = jax.tree.map(lambda a: jnp.broadcast_to(a[:count], (batch, *a[:count].shape)), cloud)
    motion = jnp.zeros((batch, 4, 4))
    if phase == "reg":
        return CtBatch(motion, cloud)
    image = jnp.zeros((batch, VIEWS, side, side), jnp.float16)
    cameras = jnp.zeros((batch, VIEWS, 4)), jnp.zeros((batch, VIEWS, 4, 4))
    return PairBatch(*[image] * 4, image > 0, *cameras, motion, jnp.zeros(batch, bool), cloud)


def matrix_flops(jaxpr: core.Jaxpr) -> dict[str, float]:
    """Operations of the convolutions and matrix products in a jaxpr at any depth, by the type of their operands.

    A multiply-add counts as two. A transposed convolution counts without the zeros that it is spread by.
    """
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else (value,):
                inner = part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
                if isinstance(inner, core.Jaxpr):
                    found.update({kind: times * count for kind, count in matrix_flops(inner).items()})
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            left, right = (cast(Any, variable.aval) for variable in equation.invars[:2])
            size = math.prod(cast(Any, equation.outvars[0].aval).shape)
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                each = math.prod(left.shape[axis] for axis in contracted)
            else:
                out_axis = equation.params["dimension_numbers"].rhs_spec[0]
                each = math.prod(right.shape) // right.shape[out_axis] / math.prod(equation.params["lhs_dilation"])
            found[str(left.dtype)] += 2.0 * size * each
    return dict(found)


def work() -> None:
    """The process of `compile_steps`."""
    lowering.take_jobs(_compile)


def _compile(target, chip, topology, job):
    given = job["sizes"]
    sizes = Sizes(**{**given, "mesh": tuple(map(tuple, given["mesh"])), "update": UpdateConfig(**given["update"])})
    config = sizes.of(configs.PRESETS[job["preset"]])
    mesh = sharding.make_mesh(topology.devices, dict(config.mesh))
    step, arguments = abstract_step(config, job["phase"], mesh, job["batch"])
    traced = step.trace(*arguments)
    compiled = traced.lower(lowering_platforms=(lowering.PLATFORMS[chip.kind],)).compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    state = memory.argument_size_in_bytes
    return {
        "state": state,
        # Donated arguments are overwritten by the results.
        "memory": state + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "collectives": compiler_output.parse_collectives(hlo),
        "sent": compiler_output.collective_bytes(hlo),
        "moved": compiler_output.moved_bytes(hlo),
        "flops": {kind: count / target.devices for kind, count in matrix_flops(traced.jaxpr.jaxpr).items()},
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(arguments[0]["params"])),
        "kernels": len(compiler_output.parse_pallas_calls(hlo)),
        "clouds": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[3].cloud)),
    }


def compile_steps(
    target: str,
    preset: str,
    sizes: Sizes = Sizes(),
    phases: Sequence[str] = objectives.PHASES,
    folders: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Compiles the steps of a preset's phases for a target.

    Args:
      target: name in `chips.TARGETS`; preset: name in `configs.PRESETS`; sizes: what is changed in it.
      folders: with XLA's compilers, besides the installed ones.
    Returns:
      A dict per phase, of one device: bytes of its `state` (arguments), of all `memory`, `sent` by each kind of collective
      operation, and `moved` (`compiler_output.moved_bytes`); `flops` of matrix products by type; the numbers of `collectives`, of
      `parameters` of all devices, and of `kernels` launched; and bytes of the `clouds` of a whole batch. Or `error` alone.
    """
    devices, chip = TARGETS[target].devices, CHIPS[TARGETS[target].chip]
    each = configs.PRESETS[preset].batch if sizes.batch is None else sizes.batch
    shared = {"preset": preset, "sizes": dataclasses.asdict(sizes), "batch": each * devices}
    flags = ["--xla_force_host_platform_device_count=2"]  # with several devices, operators split a batch
    if chip.kind == "gpu":
        flags += [GPU_FLAGS, f"--xla_gpu_cuda_data_dir={compilers.find_cuda(folders)}"]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [{**shared, "phase": phase} for phase in phases]
        where = [os.path.abspath(path) for path in folders]
        return lowering.give_jobs(
            target, jobs, "experiments.training.ahead.work", where, folder, " ".join(flags), LIMIT_S
        )


def floor_ms(chip: Chip, compiled: dict[str, Any]) -> dict[str, float]:
    """The least time of a step by each of a chip's limits, ms: matrix products at their peak, and bytes moved at the bandwidth."""
    products = sum(count / chip.matrix[kind] for kind, count in compiled["flops"].items())
    return {"products": 1e3 * products, "bytes": 1e3 * compiled["moved"] / chip.bandwidth}


def sending_ms(chip: Chip, sent: dict[str, int], devices: int) -> float:
    """Time of a step's collective operations as rings over a number of devices, ms, if nothing is computed meanwhile.

    A sum takes 2 (n - 1) / n of its bytes over the slowest link, others (n - 1) / n (Patarasuk and Yuan, J. Parallel Distrib.
    Comput. 69, 2009). More than `Chip.linked` devices sum first over their links, then each its share over the network.
    """
    inside, outside = min(devices, chip.linked), math.ceil(devices / chip.linked)
    seconds = 0.0
    for opcode, size in sent.items():
        passes = 2.0 if opcode == "all-reduce" else 1.0
        seconds += passes * size * (1.0 - 1.0 / inside) / chip.link if chip.link else 0.0
        seconds += passes * size / inside * (1.0 - 1.0 / outside) / chip.network
    return 1e3 * seconds


def scaled(compiled: dict[str, Any], chip: Chip, devices: Sequence[int]) -> np.ndarray:
    """(devices, 2): time of the collective operations, ms, and the efficiency of weak scaling if nothing hides them."""
    step = max(floor_ms(chip, compiled).values())
    times = np.array([sending_ms(chip, compiled["sent"], count) for count in devices])
    return np.stack([times, step / (step + times)], -1)
