"""How a command becomes one of the processes of jax's distributed runtime, and how all of them end together."""

import contextlib
import re
import signal
from collections.abc import Callable
from collections.abc import Iterator

import jax
from absl import flags

from data_pipelines.io import processes
from experiments.runtime import endings
from radgs_jax import errors
from radgs_jax.training import sharding
from radgs_jax.training.update import UpdateConfig

AUTO = "auto"
"""Value of --distributed that asks the launcher's environment: SLURM, Open MPI, a TPU's or Kubernetes' own."""
GRAMMAR = f"{AUTO}, or host:port,processes,process such as 10.0.0.1:9876,16,0"
MESH_GRAMMAR = "such as data:8,fsdp:2"
GONE = re.compile(r"gloo|nccl|coordination|heartbeat|connection (closed|reset)|unavailable", re.IGNORECASE)
"""What the messages of jax's runtime hold when another process has gone in the middle of a step."""
SHOWN_CHARACTERS = 160
"""Maximum length of jax's message in an error, so that it stays one line."""

# `--help` of a command lists these flags as its own.
flags.disclaim_key_flags()


def define() -> None:
    """Defines --distributed and the flags of a step."""
    flags.DEFINE_string("distributed", None, f"Join a distributed run: {GRAMMAR}; default: one process.")
    define_step()


def define_step() -> None:
    """Defines --mesh, --parts, --ema, --bfloat16 and --remat."""
    flags.DEFINE_list("mesh", [], f"Sizes of the device mesh's axes, {MESH_GRAMMAR}; default: all devices for data.")
    flags.DEFINE_integer("parts", 1, "Parts of a batch that are computed one after the other.", lower_bound=1)
    flags.DEFINE_float(
        "ema", 0.0, "Decay of the parameters' moving average; 0: none.", lower_bound=0.0, upper_bound=0.99999
    )
    flags.DEFINE_bool("bfloat16", False, "Compute the backbones in bfloat16, in training.")
    flags.DEFINE_bool("remat", False, "Compute the backbones once more for the gradient, to save memory.")


def update_config() -> UpdateConfig:
    """How the flags say that a step is made."""
    given = flags.FLAGS
    return UpdateConfig(given.parts, given.ema, given.bfloat16, given.remat)


def mesh_shape(devices: int | None = None) -> tuple[tuple[str, int], ...]:
    """The (axis, size) that --mesh names.

    Args:
      devices: their number; None takes jax's.
    Raises:
      InputError: another text, or a mesh of another number of devices.
    """
    found = [re.fullmatch(rf"({'|'.join(sharding.AXES)}):([1-9]\d{{0,5}})", text) for text in flags.FLAGS.mesh]
    if not all(found):
        errors.fail("flags", "--mesh", repr(",".join(flags.FLAGS.mesh)), MESH_GRAMMAR)
    shape = tuple((one[1], int(one[2])) for one in found if one)
    count = jax.device_count() if devices is None else devices
    try:
        sharding.axis_sizes(count, dict(shape))
    except ValueError:
        wanted = f"sizes whose product is the number of devices, {count}, or divides it where data is left out"
        errors.fail("flags", "--mesh", ",".join(flags.FLAGS.mesh), wanted)
    return shape


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that --distributed says; to be entered before jax's devices are used.

    Raises:
      InputError: another text, or nothing is there to join.
    """
    text = flags.FLAGS.distributed
    if text is None:
        yield
        return
    explicit = re.fullmatch(r"(\S+:\d+),(\d{1,6}),(\d{1,6})", text)
    if text != AUTO and not explicit:
        errors.fail("flags", "--distributed", repr(text), GRAMMAR)
    if explicit and not int(explicit[3]) < int(explicit[2]):
        errors.fail("flags", "--distributed", f"process {explicit[3]} of {explicit[2]}", "one counted from 0")
    given = (explicit[1], int(explicit[2]), int(explicit[3])) if explicit else ()
    try:
        jax.distributed.initialize(*given)
        jax.devices()  # now, since the processes wait for each other here for minutes only
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:SHOWN_CHARACTERS]
        wanted = (
            f"processes that can be joined; {AUTO} needs SLURM, Open MPI, a TPU or Kubernetes: elsewhere, host:port,n,i"
        )
        errors.fail("flags", "--distributed", f"{text!r}, and {reason}", wanted)
    try:
        yield
    except endings.Stopped:
        # All of them have stopped at the same step. After another error the runtime ends the rest, which misses this one.
        jax.distributed.shutdown()
        raise
    except jax.errors.JaxRuntimeError as error:
        if not (processes.several() and GONE.search(str(error))):
            raise
        # Not by an exception: at exit, jax's runtime would look for the process that is gone, and abort.
        endings.end_at_once("another process of the run: found it gone, wanted all; start all of them again to go on")
    jax.distributed.shutdown()


@contextlib.contextmanager
def asked_to_end() -> Iterator[Callable[[int], int | None]]:
    """Inside, a signal that asks for the end is only noted, so that work can be saved first.

    Of several processes SIGTERM may reach one; jax's runtime tells the others, and they agree on the step after which all end.

    Yields:
      a function from the number of a step, called at every step, to the number of the signal, or None to go on.
    Raises:
      Stopped: at the end, if there was one.
    """
    if not processes.several():
        with endings.held() as asked:
            yield lambda step: asked[0] if asked else None
        return
    from jax.experimental import multihost_utils

    # The runtime has its own handler of SIGTERM, and every process gets a terminal's Ctrl-C.
    yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
