"""One data stage of training: RecM, RegM, joint, each with checkpoints, restart, progress and logs."""

import contextlib
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import files
from experiments import checkpoint
from experiments import progress
from radgs_jax import sharding
from radgs_jax import training


def run(config, workdir, name, pair_set, params, steps, learning_rate, modules=training.MODULES, budget_s=None):
    """Trains the module stages of one data stage, going on from the last checkpoint where there is one.

    Args:
      config: `configs.Config`; workdir: where checkpoints and logs go; name: the data stage's name.
      pair_set: `pairs.PairSet`; params: what the stage starts from.
      steps: steps of (rec, reg, joint); learning_rate: peak of each module's cosine.
      modules: which module stages to run, in order.
      budget_s: if given, `steps` are shares of this many seconds; the step counts are fixed once measured and kept on disk, so
        a restart follows the same schedule.
    Returns:
      the trained parameters.
    """
    mesh = sharding.make_mesh()
    batch = -(-config.batch // mesh.size) * mesh.size
    for module in modules:
        share = steps[training.MODULES.index(module)]
        params = _module(
            config,
            pathlib.Path(workdir),
            name,
            module,
            mesh,
            batch,
            pair_set,
            params,
            share,
            learning_rate,
            None if budget_s is None else budget_s * share / sum(steps),
        )
    return params


def _module(config, workdir, name, module, mesh, batch, pair_set, params, steps, learning_rate, budget_s):
    stage = f"{name}_{module}"
    folder = workdir / "checkpoints" / stage
    # Each stage has its own random stream, whatever ran before it.
    seed = zlib.crc32(f"{config.seed} {stage}".encode())
    update = training.make_update(mesh, module, config.model, config.losses, 1.0)
    key = jax.random.key(seed)
    # Placed before the first step: a state that moves onto the mesh by itself would compile the update twice.
    state = sharding.replicate(training.init_state(jax.tree.map(jnp.copy, params), module), mesh)
    with contextlib.closing(pair_set.batches(seed, batch, module)) as batches:
        start = batches.get_state()
        if budget_s is not None:
            probe = lambda: _time_step(update, state, key, _split(next(batches), mesh))
            steps = _steps_for(folder, budget_s, probe)
        first, state, place = checkpoint.load_state(folder, state) or (0, state, start)
        if first >= steps:
            return state["params"]
        batches.set_state(place)
        log = progress.Log(workdir, stage)
        saved = time.monotonic()
        with progress.bar(steps, stage, first) as bar:
            for step in range(first, steps):
                rate = np.float32(training.cosine(step, steps, learning_rate, min(50, max(1, steps // 5))))
                pair_batch = next(batches)
                state, metrics = update(state, jax.random.fold_in(key, step), rate, _split(pair_batch, mesh))
                if step % 10 == 9 or step == steps - 1:
                    values = {k: float(v) for k, v in metrics.items()}
                    log.scalars(step + 1, {**values, "learning_rate": rate})
                    bar.set_postfix(
                        {k: f"{v:.3g}" for k, v in values.items() if k in ("loss", "points_mm", "pose_mm")},
                        refresh=False,
                    )
                bar.update()
                if step == steps - 1 or time.monotonic() - saved > config.checkpoint_seconds:
                    checkpoint.save_state(folder, step + 1, state, batches.get_state())
                    saved = time.monotonic()
    if module != "reg":
        _log_pictures(log, steps, config, state["params"], pair_batch)
    log.close()
    return state["params"]


def _split(batch, mesh):
    """A batch on the mesh: every process puts its own part on its own devices."""
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(split, a), batch)


def finished(workdir, name, module, steps):
    """True when a module stage's last checkpoint is that of its final step."""
    folder = pathlib.Path(workdir) / "checkpoints" / f"{name}_{module}"
    return checkpoint.latest(folder) == steps


def _log_pictures(log, step, config, params, batch):
    @jax.jit
    def render(params, batch):
        example = training.make_example(jax.random.key(0), batch, config.model)
        effect = training.reconstruct(params["recm"], config.model, example).effect
        return example.xrays[0, 0], example.target[0, 0], training.project(effect, example)[0, 0]

    images = render(params, jax.tree.map(lambda a: a[:1], batch))
    log.image(
        step,
        "xray_target_effect",
        np.concatenate([np.clip(i / max(float(i.max()), 1e-6), 0, 1) for i in map(np.asarray, images)], 1),
    )


def _time_step(update, state, key, batch):
    # The state is donated, so the probe works on copies; the first call compiles.
    times = []
    for _ in range(4):
        probe = jax.tree.map(jnp.copy, state)
        start = time.monotonic()
        jax.block_until_ready(update(probe, key, np.float32(0.0), batch))
        times.append(time.monotonic() - start)
    return float(np.median(times[1:])), times[0]


def _steps_for(folder, budget_s, measure):
    plan = folder / "plan.json"
    if plan.exists():
        return int(files.read_json(plan)["steps"])
    seconds, compile_s = measure()
    steps = max(1, int((budget_s - compile_s) / seconds))
    files.write_json(plan, {"steps": steps, "step_s": seconds, "budget_s": budget_s})
    return steps
