"""One data stage of training: RecM, RegM, joint, each with checkpoints, restart, progress and logs."""

import contextlib
import functools
import json
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.io import files
from experiments.runtime import progress
from experiments.training import checkpoint
from radgs_jax import errors
from radgs_jax.training import examples
from radgs_jax.training import objectives
from radgs_jax.training import sharding
from radgs_jax.training.update import cosine
from radgs_jax.training.update import init_state
from radgs_jax.training.update import make_update

LOG_STEPS = 10
"""Scalars are written, and skipped steps looked for, after so many: to ask the device more often would be to wait for it."""
SKIPPED_IN_A_ROW = 10
"""Skipped steps that end a run. Batches that are bad one by one make no such row: were it every fourth, one in a million steps
would begin one. A state that is bad itself never leaves it, since a skipped step changes nothing."""


class DivergedError(errors.RunError):
    """Training that does not go on by itself. Its text is one line, with what repeats the steps."""


def run(config, workdir, name, pair_set, params, steps, learning_rate, modules=objectives.MODULES, budget_s=None):
    """Trains the module stages of one data stage, going on from the last checkpoint where there is one.

    Args:
      config: `configs.Config`; workdir: where checkpoints and logs go; name: the data stage's name.
      pair_set: `batches.PairSet`; params: what the stage starts from.
      steps: steps of (rec, reg, joint); learning_rate: peak of each module's cosine.
      modules: which module stages to run, in order.
      budget_s: if given, `steps` are shares of this many seconds; the step counts are fixed once measured and kept on disk, so
        a restart follows the same schedule.
    Returns:
      the trained parameters.
    Raises:
      DivergedError: as `loop`.
    """
    mesh = sharding.make_mesh()
    batch = -(-config.batch // mesh.size) * mesh.size
    for module in modules:
        share = steps[objectives.MODULES.index(module)]
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
    update = make_update(mesh, module, config.model, config.losses, 1.0)
    # Placed before the first step: a state that moves onto the mesh by itself would compile the update twice.
    state = sharding.replicate(init_state(jax.tree.map(jnp.copy, params), module), mesh)
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
            steps = _steps_for(folder, budget_s, lambda: _time_step(update, state, key, next(batches), mesh))
            batches.set_state(start)
        return loop(
            folder,
            log_folder,
            mesh,
            state,
            update,
            batches,
            key=key,
            rate=lambda step: cosine(step, steps, learning_rate, min(50, max(1, steps // 5))),
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
    Raises:
      DivergedError: SKIPPED_IN_A_ROW steps in a row whose gradient is not finite. The last checkpoint is from before them,
        so that the same call meets them again.
    """
    first, state, place, skipped = checkpoint.load_state(folder, state) or (0, state, batches.get_state(), 0)
    if first >= steps:
        return state
    batches.set_state(place)
    key, skips = _key_on(mesh, key), _Skips(skipped)
    saved = time.monotonic()
    with contextlib.closing(progress.Log(log_folder, folder.name)) as log:
        with progress.bar(steps, folder.name, first) as bar:
            for step in range(first, steps):
                place, batch, learning_rate = batches.get_state(), next(batches), np.float32(rate(step))
                step_key = jax.random.fold_in(key, _whole(np.uint32(step), mesh))
                state, metrics = update(state, step_key, _whole(learning_rate, mesh), _split(batch, mesh))
                skips.add(step, place, metrics.pop("skipped"))
                last, logged = step == steps - 1, step % LOG_STEPS == LOG_STEPS - 1
                saving = last or time.monotonic() - saved > checkpoint_seconds
                if saving or logged:
                    skips.read()
                if last or logged or skips.full:
                    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                    log.scalars(step + 1, {**values, "learning_rate": learning_rate, "skipped": skips.count})
                    shown = {k: f"{v:.3g}" for k, v in values.items() if k in ("loss", "points_mm", "pose_mm")}
                    bar.set_postfix({**shown, **({"skipped": skips.count} if skips.count else {})}, refresh=False)
                bar.update()
                skips.check(folder, key)
                # Not in the midst of a row of skipped steps: there is nothing new, and whoever goes on is to meet the whole row.
                if last or saving and not skips.row:
                    checkpoint.save_state(folder, step + 1, state, batches.get_state(), skips.count)
                    saved = time.monotonic()
        if finish is not None:
            finish(log, state, batch)
    return state


class _Skips:
    """Counts steps whose update was skipped, without waiting for any of them before it is told to.

    count: how many so far; row: those at the end of what has been read, one after the other, as (step, place of its batch);
    full: the first row of SKIPPED_IN_A_ROW, or None.
    """

    def __init__(self, count):
        self.count, self.row, self.full, self._unread = count, [], None, []

    def add(self, step, place, skipped):
        """Takes note of a step, whose batch was at `place`; skipped: 0 or 1, on the device."""
        self._unread.append((step, place, skipped))

    def read(self):
        """Brings the counts up to date: waits for the device."""
        found = jax.device_get([skipped for _, _, skipped in self._unread])
        for (step, place, _), skipped in zip(self._unread, found):
            self.count += int(skipped)
            self.row = [*self.row, (step, place)] if skipped else []
            if len(self.row) == SKIPPED_IN_A_ROW:
                self.full = self.full or self.row
        self._unread = []

    def check(self, folder, key):
        """Raises DivergedError where there was a full row; folder: of the stage; key: of all steps."""
        if not self.full:
            return
        (first, place), (last, _) = self.full[0], self.full[-1]
        before = checkpoint.latest(folder)
        numbers = jax.device_get(jax.random.key_data(key)).tolist()
        raise DivergedError(
            f"{folder}: steps {first} to {last}, counted from 0: found {SKIPPED_IN_A_ROW} gradients in a row that are not"
            f" finite, wanted finite ones; to meet them again run the same command, which goes on from"
            f" {'the start' if before is None else f'step_{before}'}: step {first} takes its batch at"
            f" {json.dumps(place)} and its key from jax.random.fold_in(jax.random.wrap_key_data({numbers}), {first})"
        )


def _whole(value, mesh):
    """A number or an array of the host's, whole on every device of the mesh: what jit would move by itself holds up the step."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.make_array_from_process_local_data(whole, np.asarray(value), np.shape(value))


def _key_on(mesh, key):
    data = jax.device_get(jax.random.key_data(key))
    return jax.random.wrap_key_data(_whole(data, mesh), impl=jax.random.key_impl(key))


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
    example = examples.make_example(jax.random.key(0), batch, config)
    effect = objectives.reconstruct(recm_params, config, example).effect
    return example.xrays[0, 0], example.target[0, 0], objectives.project(effect, example)[0, 0]


def _log_pictures(config, log, step, state, batch):
    images = _render(state["params"]["recm"], jax.tree.map(lambda a: a[:1], batch), config.model)
    log.image(
        step,
        "xray_target_effect",
        np.concatenate([np.clip(i / max(float(i.max()), 1e-6), 0, 1) for i in map(np.asarray, images)], 1),
    )


def _time_step(update, state, key, batch, mesh):
    # The state is donated, so the probe works on copies; the first call compiles. Placed as in `loop`, which would else compile
    # once more.
    key, rate, batch = _key_on(mesh, key), _whole(np.float32(0.0), mesh), _split(batch, mesh)
    times = []
    for _ in range(4):
        probe = jax.tree.map(jnp.copy, state)
        start = time.monotonic()
        jax.block_until_ready(update(probe, key, rate, batch))
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
