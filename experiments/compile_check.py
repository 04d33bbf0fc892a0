"""Compiles training steps for chips that need not be there: `python -m experiments.compile_check --target=8xh100`.

For each phase: the memory of a device, what it sends, the least time of a step, and how that would grow with the devices. A
configuration that does not fit, or whose operators gather a batch, ends with status 1, so that a job's script can ask first.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from data_pipelines.io import files
from experiments import configs
from experiments.runtime import cli
from experiments.runtime import cluster
from experiments.training import ahead
from experiments.training.ahead import Sizes
from kernels.tools import compile_check
from kernels.tools.chips import CHIPS
from kernels.tools.chips import TARGETS
from radgs_jax import errors
from radgs_jax.training import objectives

SCALES = (8, 64, 512)
"""Numbers of devices that weak scaling is told for."""
HEADER = "| phase | state GB | memory GB | of | products ms | bytes ms | kernels | sums MB | gathers MB | sends ms |"
SCALE_HEADER = "| phase | devices | sends ms | efficiency |"


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_enum("target", "8xh100", sorted(TARGETS), "Chips to compile for.")
    flags.DEFINE_enum("preset", "paper", sorted(configs.PRESETS), "Training configuration.")
    flags.DEFINE_list("phases", list(objectives.PHASES), "Phases whose steps are compiled.")
    flags.DEFINE_integer("batch", None, "Examples of each device; default: the preset's batch.", lower_bound=1)
    flags.DEFINE_integer(
        "crop_px", None, "Side of the network's X-rays, pixels; default: the preset's.", lower_bound=32
    )
    flags.DEFINE_integer("grid", None, "Side of its volumes, voxels; default: the preset's.", lower_bound=8)
    flags.DEFINE_string("wheels", None, "Folder with XLA's compiler for GPUs; default: the installed one.")
    flags.DEFINE_string("libtpu", None, "Folder with libtpu; default: the installed one.")
    flags.DEFINE_string("json", None, "File for the figures; default: none.")
    cluster.define_step()


def check(
    target: str, preset: str, sizes: Sizes, phases: Sequence[str], folders: Sequence[str]
) -> tuple[str, list[str], list[dict[str, Any]]]:
    """Compiles the phases' steps: the text of the tables, a line for each phase that is no good, and `ahead.compile_steps`."""
    chip, found = CHIPS[TARGETS[target].chip], ahead.compile_steps(target, preset, sizes, phases, folders)
    rows, scales, wrong = [HEADER, _rule(HEADER)], [SCALE_HEADER, _rule(SCALE_HEADER)], []
    for phase, compiled in zip(phases, found):
        if reason := _failure(chip, compiled, dict(sizes.mesh).get("fsdp", 1) > 1):
            wrong.append(f"{phase} on {target}: {reason}")
        if "error" in compiled:
            continue
        rows.append(_row(phase, compiled, chip, TARGETS[target].devices))
        if TARGETS[target].devices == 1:
            continue
        for count, (ms, efficiency) in zip(SCALES, ahead.scaled(compiled, chip, SCALES)):
            scales.append(f"| {phase} | {count} | {ms:.2f} | {100 * efficiency:.1f} % |")
    return "\n".join(rows + ["", *scales] * (len(scales) > 2)), wrong, found


def _rule(header):
    return "|" + "---|" * (header.count("|") - 1)


def _row(phase, compiled, chip, devices):
    floor, sent = ahead.floor_ms(chip, compiled), compiled["sent"]
    sums = sent.get("all-reduce", 0)
    cells = (
        phase,
        f"{compiled['state'] / 1e9:.2f}",
        f"{compiled['memory'] / 1e9:.2f}",
        f"{chip.memory / 1e9:.0f}",
        f"{floor['products']:.1f}",
        f"{floor['bytes']:.1f}",
        str(compiled["kernels"]),
        f"{sums / 1e6:.0f}",
        f"{(sum(sent.values()) - sums) / 1e6:.0f}",
        f"{ahead.sending_ms(chip, sent, devices):.2f}",
    )
    return f"| {' | '.join(cells)} |"


def _failure(chip, compiled, split):
    if "error" in compiled:
        return compiled["error"]
    if compiled["memory"] > chip.memory:
        return f"found {compiled['memory'] / 1e9:.1f} GB a device, wanted {chip.memory / 1e9:.1f} GB at most"
    # Split parameters are gathered for use. Whatever gathers clouds gathers all of a batch.
    gathered = sum(size for opcode, size in compiled["sent"].items() if opcode != "all-reduce")
    if gathered >= compiled["clouds"] and not split:
        return f"found {gathered / 1e6:.1f} MB gathered, wanted less than the batch's Gaussians, {compiled['clouds'] / 1e6:.1f} MB"
    return None


def main() -> None:
    """Runs `check` with the flags and prints the tables; ends with status 1 where a step does not compile or fit.

    Raises:
      InputError: flags that do not go together, or no compiler for the target.
    """
    given = flags.FLAGS
    for phase in given.phases:
        if phase not in objectives.PHASES:
            errors.fail("flags", "--phases", repr(phase), f"some of {', '.join(objectives.PHASES)}")
    if reason := compile_check.missing(CHIPS[TARGETS[given.target].chip].kind, given.wheels, given.libtpu):
        errors.fail("flags", "--target", f"{given.target}, for which there is no compiler: {reason}", "a compiler")
    mesh = cluster.mesh_shape(TARGETS[given.target].devices)
    folders = [folder for folder in (given.wheels, given.libtpu) if folder]
    sizes = Sizes(given.batch, given.crop_px, given.grid, mesh, cluster.update_config())
    text, wrong, found = check(given.target, given.preset, sizes, given.phases, folders)
    print(text)
    if given.json:
        files.write_json(pathlib.Path(given.json), dict(zip(given.phases, found)))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(int(bool(wrong)))


if __name__ == "__main__":
    cli.run(main, define_flags)
