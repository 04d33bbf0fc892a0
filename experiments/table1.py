"""Table 1 of the paper: `python -m experiments.table1 --cases=C.json --variants=easy,artic,real --workdir=W --out=T`.

Every system is prepared for every vertebra of the case file, and asked about every case. Without `--cases`, X-rays of a phantom
patient are simulated. A run that was stopped goes on where it was.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines import cases
from data_pipelines.io import files
from experiments import configs
from experiments import data_stages
from experiments.comparison import answers
from experiments.comparison import itk_peer
from experiments.comparison import pictures
from experiments.comparison import subjects
from experiments.comparison import systems
from experiments.comparison import tables
from experiments.comparison.answers import Table
from experiments.comparison.subjects import Sizes
from experiments.comparison.subjects import System
from experiments.comparison.systems import SYSTEMS
from experiments.reports import index_page
from experiments.reports.run_record import RunRecord
from experiments.runtime import cli
from experiments.runtime import shards
from experiments.runtime.shards import Shard

PHANTOM_LABELS, PHANTOM_SCENES = (20,), 2
"""VerSe number and number of acquisitions of the phantom patient's vertebra: one is enough to see the table."""
VARIANTS = {"quick": ("easy", "real"), "cpu": ("easy", "artic", "real"), "original": ("easy", "artic", "real")}
"""Variants of the X-rays that a preset asks about."""


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("cases", None, "Case file with true poses and points; default: a phantom patient's, simulated.")
    flags.DEFINE_list("variants", None, "Variants of the X-rays, such as easy,artic,real; default: the preset's.")
    flags.DEFINE_string("workdir", None, "Folder for what the systems are prepared with.", required=True)
    flags.DEFINE_string("out", None, "Folder for the answers, tables and pictures.", required=True)
    flags.DEFINE_list("systems", [], "Beginnings of the names of systems to run; default: all.")
    flags.DEFINE_string("itk_python", None, f"Python that has {itk_peer.PACKAGE}; default: its rows are left out.")
    flags.DEFINE_enum("preset", "cpu", sorted(subjects.PRESETS), "Sizes and numbers of steps.")
    flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)
    shards.define()


def phantom_cases(workdir: pathlib.Path, config: configs.Config) -> pathlib.Path:
    """The case file of the phantom patient, simulated where it is not there yet."""
    config = dataclasses.replace(config, patient_labels=PHANTOM_LABELS, eval_scenes=PHANTOM_SCENES)
    return data_stages.held_out_cases(config, workdir, data_stages.patient_scan(config, workdir))


def make_table(
    case_path: pathlib.Path | str,
    variants: Sequence[str],
    workdir: pathlib.Path | str,
    out: pathlib.Path | str,
    asked: Sequence[System] = SYSTEMS,
    sizes: Sizes = subjects.CPU,
    config: configs.Config = configs.BASE,
    base: pathlib.Path | str | None = None,
    shard: Shard = shards.ALL,
) -> str:
    """Asks systems about all cases, and writes `table.txt`, `table.md`, `table.json`, result files and pictures to `out`.

    Args:
      case_path: a case file with true poses and points; variants: of its X-rays.
      workdir: for what the systems are prepared with; asked: the systems.
      sizes: of these; config: of RadGS-Reg and of the data that networks are trained on, with the seed of everything random.
      base: folder of RadGS-Reg's base model; None takes the one that is shipped.
      shard: the part of the vertebrae that this process asks about, which then writes answers alone.
    Returns:
      the table as text; for a part, a line about it.
    Raises:
      InputError: unreadable cases or scans, X-rays without such a variant, or a scene without its true pose.
    """
    workdir, out, record = files.make_folder(workdir), pathlib.Path(out), RunRecord()
    case_file = cases.read(case_path)
    for scene in case_file.scenes.values():
        cases.truth(case_file, scene)
    table = Table(case_file, subjects.subjects(case_file, config, workdir, base), sizes, config.seed, out)
    mine = shard.of(table.subject_of)
    runs = [(s, v) for s in asked for v in variants if s.variants is None or v in s.variants]
    for system, variant in runs:
        answers.answer_all(table, system, variant, mine)
    if not shard.whole:
        answered = f"{len(mine)} of {len(table.subject_of)} vertebrae are answered"
        return f"{answered}; the same command without --shard writes the table"
    parts, values = [], {}
    for variant in variants:
        ran = [system for system, its in runs if its == variant]
        rows = [(system.kind, answers.row(table, system, variant)) for system in ran]
        values[variant] = [tables.as_values(row) for _, row in rows]
        for kind, ours, make in (
            (subjects.RECONSTRUCTION, systems.OURS_WITHHELD, tables.reconstruction),
            (subjects.REGISTRATION, systems.OURS, tables.registration),
        ):
            chosen = [row for its, row in rows if its == kind]
            if chosen:
                parts.append((f"{kind}, variant {variant}", *make(chosen, ours)))
        for system in ran:
            if system.kind == subjects.REGISTRATION:
                answers.write_results(table, system, variant)
        pictures.write(table, ran, variant)
    found = tables.write(out, "table", parts, values)
    _write_page(out, variants, parts, record)
    return found


def _write_page(out, variants, parts, record):
    """The page of the table and its pictures."""
    note = "The columns, and the paper's own rows, are explained in docs/table1.md. Ranks are by the honest scores."
    shown = {}
    for variant in variants:
        shown[out / f"volumes_{variant}.png"] = f"Slices of each reconstruction, one row a system, variant {variant}."
        shown[out / f"poses_{variant}.png"] = f"Outlines at each system's pose and at the true one, variant {variant}."
    sections = [index_page.table(title, head, cells, note) for title, head, cells in parts]
    sections.append(index_page.pictures("The first scene", shown))
    sections.append(index_page.links("Files", out, ("table.txt", "table.md", "table.json", "log.txt")))
    index_page.write(out, f"Table 1 on the same cases: {', '.join(variants)}", sections, record)


def main() -> None:
    """Runs `make_table` with the flags and prints the table.

    Raises:
      InputError: no system of such a name, no Python that has ITK's package, or as `make_table`.
    """
    given = flags.FLAGS
    asked = answers.chosen(given.systems, (*SYSTEMS, *itk_peer.systems(given.itk_python)))
    workdir, config = pathlib.Path(given.workdir), dataclasses.replace(configs.BASE, seed=given.seed)
    case_path = phantom_cases(workdir / "phantom", config) if given.cases is None else given.cases
    variants = given.variants or VARIANTS[given.preset]
    print(
        make_table(
            case_path, variants, workdir, given.out, asked, subjects.PRESETS[given.preset], config, shard=shards.given()
        )
    )


if __name__ == "__main__":
    cli.run(main, define_flags, log_in="out")
