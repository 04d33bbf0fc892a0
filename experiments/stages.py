"""One data stage of training: RecM, RegM, joint, each with checkpoints, restart, progress and logs."""

import contextlib
import functools
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
    # Placed before the first step: a state that moves onto the mesh by itself would compile the update twice.
    state = sharding.replicate(training.init_state(jax.tree.map(jnp.copy, params), module), mesh)
    state = scheduled(
        folder,
        workdir,
        mesh,
        state,
        update,
        pair_set.batches(seed, batch, module),
        seed=seed,
        learning_rate=learning_rate,
        steps=steps,
        budget_s=budget_s,
        checkpoint_seconds=config.checkpoint_seconds,
        finish=functools.partial(_log_pictures, config) if module != "reg" else None,
    )
    return state["params"]


def scheduled(
    folder,
    log_folder,
    mesh,
    state,
    update,
    batches,
    *,
    seed,
    learning_rate,
    checkpoint_seconds,
    steps=None,
    budget_s=None,
    finish=None,
):
    """As `loop`, under a cosine, closing `batches`.

    Args:
      seed: of all steps; learning_rate: the cosine's peak; steps: used without a budget.
      budget_s: seconds, in which as many steps are taken as one that is timed leaves room for.
      finish: called with (log, steps, state, last batch), if not None; the others as in `loop`.
    """
    key = jax.random.key(seed)
    with contextlib.closing(batches):
        if budget_s is not None:
            start = batches.get_state()
            steps = _steps_for(folder, budget_s, lambda: _time_step(update, state, key, _split(next(batches), mesh)))
            batches.set_state(start)
        return loop(
            folder,
            log_folder,
            mesh,
            state,
            update,
            batches,
            key=key,
            rate=lambda step: training.cosine(step, steps, learning_rate, min(50, max(1, steps // 5))),
            steps=steps,
            checkpoint_seconds=checkpoint_seconds,
            finish=None if finish is None else lambda log, state, batch: finish(log, steps, state, batch),
        )


def loop(folder, log_folder, mesh, state, update, batches, *, key, rate, steps, checkpoint_seconds, finish=None):
    """Trains for `steps`, going on from the last checkpoint in `folder`, with a progress bar.

    Args:
      folder: of checkpoints; the stage has its name; log_folder: of TensorBoard logs.
      mesh: of `sharding`; state, update: of `training`.
      batches: an iterator whose place `get_state` tells and `set_state` restores; key: PRNG key of all steps.
      rate: step -> learning rate; finish: called with (log, state, last batch) after the last step, if not None.
    Returns:
      the state after the last step.
    """
    first, state, place = checkpoint.load_state(folder, state) or (0, state, batches.get_state())
    if first >= steps:
        return state
    batches.set_state(place)
    log, saved = progress.Log(log_folder, folder.name), time.monotonic()
    with progress.bar(steps, folder.name, first) as bar:
        for step in range(first, steps):
            batch, learning_rate = next(batches), np.float32(rate(step))
            state, metrics = update(state, jax.random.fold_in(key, step), learning_rate, _split(batch, mesh))
            if step % 10 == 9 or step == steps - 1:
                values = {k: float(v) for k, v in metrics.items()}
                log.scalars(step + 1, {**values, "learning_rate": learning_rate})
                shown = {k: f"{v:.3g}" for k, v in values.items() if k in ("loss", "points_mm", "pose_mm")}
                bar.set_postfix(shown, refresh=False)
            bar.update()
            if step == steps - 1 or time.monotonic() - saved > checkpoint_seconds:
                checkpoint.save_state(folder, step + 1, state, batches.get_state())
                saved = time.monotonic()
    if finish is not None:
        finish(log, state, batch)
    log.close()
    return state


def _split(batch, mesh):
    """A batch on the mesh: every process puts its own part on its own devices."""
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(split, a), batch)


def finished(workdir, name, module, steps):
    """True when a module stage's last checkpoint is that of its final step."""
    folder = pathlib.Path(workdir) / "checkpoints" / f"{name}_{module}"
    return checkpoint.latest(folder) == steps


@functools.partial(jax.jit, static_argnames="config")
def _render(recm_params, batch, config):
    example = training.make_example(jax.random.key(0), batch, config)
    effect = training.reconstruct(recm_params, config, example).effect
    return example.xrays[0, 0], example.target[0, 0], training.project(effect, example)[0, 0]


def _log_pictures(config, log, step, state, batch):
    images = _render(state["params"]["recm"], jax.tree.map(lambda a: a[:1], batch), config.model)
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
