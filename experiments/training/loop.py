"""One data stage of training: its phases (RecM, RegM, joint), with checkpoints, restart, progress bar and logs."""

import contextlib
import functools
import json
import pathlib
import time
import zlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.io import processes
from data_pipelines.pairs.batches import PairSet
from experiments import configs
from experiments.runtime import cluster
from experiments.runtime import endings
from experiments.runtime import progress
from experiments.training import checkpoint
from radgs_jax import errors
from radgs_jax.training import examples
from radgs_jax.training import objectives
from radgs_jax.training import sharding
from radgs_jax.training.update import cosine
from radgs_jax.training.update import init_state
from radgs_jax.training.update import make_update
from radgs_jax.training.update import result_of
from radgs_jax.training.update import state_of
from radgs_jax.training.update import update_of

try:
    import resource
except ImportError:  # not on Windows
    resource = None

LOG_STEPS = 10
"""Number of steps between scalars and between checks for skipped steps. Both wait for the device: half of it waits twice as
often, twice of it notices a diverged run that much later. Chosen by hand."""
SKIPPED_IN_A_ROW = 10
"""Number of consecutive skipped steps that ends a run, chosen by hand. If every fourth batch were bad independently, one step in
a million would begin such a row (with 5: one in a thousand). A bad state never recovers, because a skipped step changes
nothing; 20 would only report it later."""
TIMED_STEPS = 4
"""Number of steps timed for a budget, of which the first compiles; chosen by hand. More take longer, fewer are less steady."""
WARMUP_STEPS = 50
"""Maximum number of warm-up steps of the learning rate; short phases warm up over a fifth of their steps. Chosen by hand: more
delay the peak, fewer make the first steps larger."""


class DivergedError(errors.RunError):
    """A training run whose gradients stay non-finite. Its text is one line that says how to repeat the steps."""


class BatchStream(Protocol):
    """Endless batches with a place that can be saved and restored."""

    def __next__(self) -> Any:
        """The next batch, a pytree of arrays."""

    def get_state(self) -> Any:
        """The place of the next batch, as plain JSON values."""

    def set_state(self, place: Any) -> None:
        """Continues at a place."""


class Batches:
    """Endless batches `make(rng)`; batch n is a function of (seed, n), so a place is n."""

    def __init__(self, make: Callable[[np.random.Generator], Any], seed: int) -> None:
        self._make, self._seed, self._step = make, seed, 0

    def __next__(self) -> Any:
        self._step += 1
        return self._make(np.random.default_rng([self._seed, self._step - 1]))

    def get_state(self) -> int:
        """The place of the next batch."""
        return self._step

    def set_state(self, place: int) -> None:
        """Continues at a place."""
        self._step = place


def run_phases(
    config: configs.Config,
    workdir: pathlib.Path | str,
    name: str,
    pair_set: PairSet,
    params: dict[str, Any],
    steps: Sequence[int],
    learning_rate: float,
    phases: Sequence[str] = objectives.PHASES,
    budget_s: float | None = None,
) -> dict[str, Any]:
    """Trains phases of one data stage, continuing from the last checkpoint.

    Args:
      workdir: folder of checkpoints and logs.
      name: of the data stage.
      pair_set: training pairs.
      params: parameters to start from.
      steps: number of steps of (rec, reg, joint).
      learning_rate: peak of each phase's schedule.
      phases: phases to run, in order.
      budget_s: training time in s, of which `steps` are shares; None takes `steps` as they are. The numbers of steps are
        measured once and kept on disk, so a restart follows the same schedule.
    Returns:
      the trained parameters, on the host.
    Raises:
      ValueError: as `sharding.make_mesh`.
      DivergedError: as `run_steps`.
    """
    mesh = sharding.make_mesh(shape=dict(config.mesh))
    unit = mesh.size * config.update.parts
    batch = -(-config.batch // unit) * unit
    for phase in phases:
        share = steps[objectives.PHASES.index(phase)]
        params = _train_phase(
            config,
            pathlib.Path(workdir),
            name,
            phase,
            mesh,
            batch,
            pair_set,
            params,
            share,
            learning_rate,
            None if budget_s is None else budget_s * share / sum(steps),
        )
    return params


def _train_phase(config, workdir, name, phase, mesh, batch, pair_set, params, steps, learning_rate, budget_s):
    stage = f"{name}_{phase}"
    folder = workdir / "checkpoints" / stage
    # Each phase has its own random stream, independent of what ran before it.
    seed = zlib.crc32(f"{config.seed} {stage}".encode())
    update = make_update(mesh, phase, config.model, config.losses, 1.0, config.update)
    state = sharding.made(mesh, functools.partial(init_state, phase=phase, config=config.update), params)
    state = scheduled(
        folder,
        workdir,
        mesh,
        state,
        update,
        pair_set.batches(seed, batch, phase),
        seed=seed,
        learning_rate=learning_rate,
        steps=steps,
        budget_s=budget_s,
        checkpoint_seconds=config.checkpoint_seconds,
        trace_steps=config.trace_steps,
        finish=functools.partial(_log_pictures, config, mesh) if phase != "reg" else None,
    )
    return sharding.gathered(result_of(state), mesh)


def scheduled(
    folder: pathlib.Path,
    log_folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
    state: Any,
    update: Callable,
    batches: BatchStream,
    *,
    seed: int,
    learning_rate: float,
    checkpoint_seconds: float,
    steps: int | None = None,
    budget_s: float | None = None,
    trace_steps: int = 0,
    finish: Callable[[progress.Log, int, Any, Any], None] | None = None,
) -> Any:
    """`run_steps` with a cosine schedule and, if asked for, a time budget; closes `batches`.

    Args:
      folder, log_folder, mesh, state, update, checkpoint_seconds, trace_steps: as in `run_steps`.
      batches: as in `run_steps`, with `close`.
      seed: of all steps.
      learning_rate: peak of the schedule.
      steps: number of steps without a budget.
      budget_s: training time in s; timed steps give the number of steps that fit.
      finish: called with (log, steps, state, last batch) after the last step.
    Returns:
      the state after the last step.
    Raises:
      DivergedError: as `run_steps`.
    """
    key = jax.random.key(seed)
    with contextlib.closing(batches):
        if budget_s is not None:
            start = batches.get_state()
            steps = _steps_for(folder, budget_s, lambda: _time_step(update, state, key, next(batches), mesh))
            batches.set_state(start)
        return run_steps(
            folder,
            log_folder,
            mesh,
            state,
            update,
            batches,
            key=key,
            rate=lambda step: cosine(step, steps, learning_rate, min(WARMUP_STEPS, max(1, steps // 5))),
            steps=steps,
            checkpoint_seconds=checkpoint_seconds,
            trace_steps=trace_steps,
            finish=None if finish is None else lambda log, state, batch: finish(log, steps, state, batch),
        )


def run_steps(
    folder: pathlib.Path,
    log_folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
    state: Any,
    update: Callable,
    batches: BatchStream,
    *,
    key: jax.Array,
    rate: Callable[[int], float],
    steps: int,
    checkpoint_seconds: float,
    trace_steps: int = 0,
    finish: Callable[[progress.Log, Any, Any], None] | None = None,
) -> Any:
    """Trains for a number of steps, continuing from the last checkpoint in `folder`, with a progress bar.

    Args:
      folder: of checkpoints; its name is the stage's.
      log_folder: of TensorBoard logs.
      mesh: of `sharding.make_mesh`.
      state, update: as `update.state_of` and `update.update_of` return them.
      batches: the training batches.
      key: PRNG key of all steps.
      rate: step -> learning rate.
      steps: number of steps, those before the checkpoint included.
      checkpoint_seconds: minimum time between checkpoints, s.
      trace_steps: how many steps jax's profiler records beside the TensorBoard log, after the first, which compiles.
      finish: called with (log, state, last batch) after the last step.
    Returns:
      the state after the last step.
    Raises:
      DivergedError: SKIPPED_IN_A_ROW consecutive steps whose gradient is not finite. The last checkpoint is older than these, so
        the same call repeats them.
      InputError: another process trains in `folder`, no checkpoint is as it was written, or none can be written.
      Stopped: a signal asked for the end; the state after the step that ran then is saved. A second signal does not wait for it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.first_holds(files.make_folder(folder) / locks.LOCK, folder))
        first, state, place, skipped = checkpoint.load_state(folder, state) or (0, state, batches.get_state(), 0)
        if first >= steps:
            return state
        batches.set_state(place)
        key, skips, pace = _key_on(mesh, key), _Skips(skipped), _Pace()
        saved = time.monotonic()
        log = stack.enter_context(contextlib.closing(progress.Log(log_folder, folder.name)))
        with cluster.asked_to_end() as asked, progress.Bar(steps, folder.name, first) as bar:
            traced = progress.Trace(log_folder, folder.name, first + 1, first + 1 + trace_steps)
            stack.enter_context(contextlib.closing(traced))
            for step in range(first, steps):
                traced.before(step, state)
                place, learning_rate = batches.get_state(), np.float32(rate(step))
                batch = pace.next_of(batches)
                step_key = jax.random.fold_in(key, _whole(np.uint32(step), mesh))
                state, metrics = update(state, step_key, _whole(learning_rate, mesh), _split(batch, mesh))
                skips.add(step, place, metrics.pop("skipped"))
                last, logged, ending = step == steps - 1, step % LOG_STEPS == LOG_STEPS - 1, asked(step)
                saving = last or ending or processes.all_due(logged, time.monotonic() - saved > checkpoint_seconds)
                if saving or logged:
                    skips.read()
                if last or logged or skips.full:
                    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                    counts = {"learning_rate": learning_rate, "skipped": skips.count}
                    log.scalars(step + 1, {**values, **counts, **pace.read()})
                    shown = {k: f"{v:.3g}" for k, v in values.items() if k in ("loss", "points_mm", "pose_mm")}
                    bar.set_postfix({**shown, **({"skipped": skips.count} if skips.count else {})}, refresh=False)
                bar.update()
                skips.check(folder, key, batches)
                # Not within a row of skipped steps: the state is unchanged, and a restart must repeat the whole row.
                if kept := last or (saving and not skips.row):
                    checkpoint.save_state(folder, step + 1, state, batches.get_state(), skips.count)
                    saved = time.monotonic()
                if ending:
                    # Not looked for on disk where it was just saved: the first process may still be renaming it.
                    reached = step + 1 if kept else checkpoint.latest(folder) or 0
                    raise endings.Stopped(ending, f"{folder}: saved up to step {reached}; run again to go on")
        if finish is not None:
            finish(log, state, batch)
    return state


def train_network(
    folder: pathlib.Path,
    log_folder: pathlib.Path,
    name: str,
    params: Any,
    objective: Callable,
    make_batch: Callable[[np.random.Generator, int], Any],
    *,
    batch: int,
    steps: int,
    learning_rate: float,
    seed: int,
    checkpoint_seconds: float,
) -> Any:
    """Trains one network under a cosine schedule, continuing from the last checkpoint in `folder`.

    Args:
      folder, log_folder, checkpoint_seconds: as in `run_steps`.
      name: of the parameters in checkpoints; params: the initial ones, which are copied.
      objective: (params, key, batch) -> scalar and a dict of scalars.
      make_batch: (random generator, number of examples) -> a batch.
      batch: number of examples, which is rounded up to a multiple of the devices; steps: number of steps.
      learning_rate: peak of the schedule; seed: of everything random.
    Returns:
      the trained parameters, on the host.
    Raises:
      DivergedError, InputError, Stopped: as `run_steps`.
    """
    mesh = sharding.make_mesh()
    size = -(-batch // mesh.size) * mesh.size
    state = run_steps(
        folder,
        log_folder,
        mesh,
        sharding.made(mesh, lambda params: state_of({name: params}, (name,)), params),
        update_of(mesh, lambda params, key, batch: objective(params[name], key, batch), (name,)),
        Batches(lambda rng: make_batch(rng, size), seed),
        key=jax.random.key(seed),
        rate=lambda step: cosine(step, steps, learning_rate),
        steps=steps,
        checkpoint_seconds=checkpoint_seconds,
    )
    return sharding.gathered(state["params"][name], mesh)


class _Pace:
    """How fast examples come, and how much of the time is spent in waiting for them."""

    def __init__(self):
        self._start, self._examples, self._waited = time.monotonic(), 0, 0.0

    def next_of(self, batches):
        """The next batch."""
        asked = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - asked
        self._examples += len(jax.tree.leaves(batch)[0]) * jax.process_count()
        return batch

    def read(self):
        """Figures since the last time: examples_per_s, waiting_share, and memory_gb, the most in use, where it is known."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        found = {"examples_per_s": self._examples / elapsed, "waiting_share": self._waited / elapsed}
        self.__init__()
        most = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if most is None and resource is not None:
            # A CPU's device has no figures of its own; Linux counts in units of 1024 bytes.
            most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return found if most is None else {**found, "memory_gb": most / 1e9}


class _Skips:
    """Counts skipped steps, and waits for the device in `read` only.

    Attributes:
      count: number of skipped steps.
      row: the skipped steps that end what has been read, without a gap, as (step, place of its batch).
      full: the first row of SKIPPED_IN_A_ROW steps; None without one.
    """

    def __init__(self, count):
        self.count, self.row, self.full, self._unread = count, [], None, []

    def add(self, step, place, skipped):
        """Adds a step, whose batch was at `place`; skipped: 0 or 1, on the device."""
        self._unread.append((step, place, skipped))

    def read(self):
        """Updates the counts; waits for the device."""
        found = jax.device_get([skipped for _, _, skipped in self._unread])
        for (step, place, _), skipped in zip(self._unread, found):
            self.count += int(skipped)
            self.row = [*self.row, (step, place)] if skipped else []
            if len(self.row) == SKIPPED_IN_A_ROW:
                self.full = self.full or self.row
        self._unread = []

    def check(self, folder, key, batches):
        """Raises DivergedError if there is a full row, and keeps its first batch; folder: of the stage; key: of all steps."""
        if not self.full:
            return
        (first, place), (last, _) = self.full[0], self.full[-1]
        batches.set_state(place)
        kept = folder / (
            f"batch_of_step_{first}.npz" if processes.is_first() else f"batch_of_step_{first}_{jax.process_index()}.npz"
        )
        leaves = jax.tree_util.tree_flatten_with_path(next(batches))[0]
        files.write_npz(kept, **{jax.tree_util.keystr(path).strip(".") or "batch": leaf for path, leaf in leaves})
        before = checkpoint.latest(folder)
        numbers = jax.device_get(jax.random.key_data(key)).tolist()
        raise DivergedError(
            f"{folder}: steps {first} to {last}, counted from 0: found {SKIPPED_IN_A_ROW} gradients in a row that are not"
            f" finite, wanted finite ones; to meet them again run the same command, which goes on from"
            f" {'the start' if before is None else f'step_{before}'}: step {first} takes its batch at"
            f" {json.dumps(place)}, kept as {kept.name}, and its key from"
            f" jax.random.fold_in(jax.random.wrap_key_data({numbers}), {first})"
        )


def _whole(value, mesh):
    """Copies a number or array of the host to every device of the mesh; left to jit, the copy would delay the step."""
    return jax.make_array_from_process_local_data(sharding.whole(mesh), np.asarray(value), np.shape(value))


def _key_on(mesh, key):
    data = jax.device_get(jax.random.key_data(key))
    return jax.random.wrap_key_data(_whole(data, mesh), impl=jax.random.key_impl(key))


def _split(batch, mesh):
    """Shards a batch over the mesh; every process places its own part on its own devices."""
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding.of_batch(mesh), a), batch)


def finished(workdir: pathlib.Path | str, name: str, phase: str, steps: int) -> bool:
    """Whether the last checkpoint of a phase is that of its final step.

    Args:
      workdir: as in `run_phases`; name: of the data stage; phase: one of `objectives.PHASES`; steps: number of its steps.
    """
    folder = pathlib.Path(workdir) / "checkpoints" / f"{name}_{phase}"
    return checkpoint.latest(folder) == steps


@functools.partial(jax.jit, static_argnames="config")
def _render(recm_params, batch, config):
    example = examples.make_example(jax.random.key(0), batch, config)
    effect = objectives.reconstruct(recm_params, config, example).effect
    return example.xrays[0, 0], example.target[0, 0], objectives.project(effect, example)[0, 0]


def _log_pictures(config, mesh, log, step, state, batch):
    params = sharding.gathered(state["params"]["recm"], mesh)
    if not processes.is_first():
        return
    images = _render(params, jax.tree.map(lambda a: a[:1], batch), config.model)
    for name, image in zip(("X-ray", "vertebra alone", "reconstruction"), map(np.asarray, images), strict=True):
        log.image(step, f"first example, first view/{name}", np.clip(image / max(float(image.max()), 1e-6), 0, 1))


def _time_step(update, state, key, batch, mesh):
    # The update donates its state, so each probe works on a copy. Arguments are placed as in `run_steps`, which would otherwise
    # compile again.
    key, rate, batch = _key_on(mesh, key), _whole(np.float32(0.0), mesh), _split(batch, mesh)
    times = []
    for _ in range(TIMED_STEPS):
        probe = jax.tree.map(jnp.copy, state)
        start = time.monotonic()
        jax.block_until_ready(update(probe, key, rate, batch))
        times.append(time.monotonic() - start)
    return float(np.median(times[1:])), times[0]


def _steps_for(folder, budget_s, measure):
    plan = folder / "plan.json"
    if processes.agreed(plan.exists()):
        return int(files.read_json(plan)["steps"])
    seconds, compile_s = measure()
    steps = processes.agreed(max(1, int((budget_s - compile_s) / seconds)))
    processes.first_does(lambda: files.write_json(plan, {"steps": steps, "step_s": seconds, "budget_s": budget_s}))
    return steps
