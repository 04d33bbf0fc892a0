"""Home tests of Table 1's systems: `python -m experiments.home_tests --workdir=W --out=T`.

Each system is tested where its authors used it, on a vertebra of the phantom patient. A run that was stopped goes on where it was.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.simulation import case_files
from experiments import configs
from experiments import data_stages
from experiments import table1
from experiments.comparison import answers
from experiments.comparison import at_home
from experiments.comparison import home_report
from experiments.comparison import subjects
from experiments.comparison.answers import Table
from experiments.comparison.subjects import Sizes
from experiments.comparison.subjects import System
from experiments.comparison.systems import SYSTEMS
from experiments.comparison.tables import write
from experiments.reports import plots
from experiments.runtime import cli
from experiments.runtime import progress

TITLES = (*at_home.RECONSTRUCTING, *at_home.REGISTERING, *at_home.DRAWING, at_home.TS_SAR)
TESTED = tuple(system for system in SYSTEMS if system.title in TITLES)
"""The systems that have a home test."""
SCENES, STARTS_MM = 4, ((1.0, 2.0), (2.0, 3.0), (3.0, 4.0))
"""Acquisitions that are registered, and bins of the start poses of each, mTRE in mm."""


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string(
        "workdir", None, "Folder for what the systems are prepared with; the table's will do.", required=True
    )
    flags.DEFINE_string("out", None, "Folder for the results, tables and the plot.", required=True)
    flags.DEFINE_list("systems", [], "Beginnings of the names of systems to test; default: all.")
    flags.DEFINE_enum("preset", "cpu", sorted(subjects.PRESETS), "Sizes and numbers of steps.")
    flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)


def rigid_cases(workdir: pathlib.Path, config: configs.Config, scenes: int = SCENES) -> pathlib.Path:
    """The case file of the table's phantom patient as a body that has moved as one, made where it is not there yet."""
    patient = data_stages.patient_scan(config, workdir)
    path = workdir / f"home_{config.seed}" / "cases.json"
    with progress.Bar(scenes, "X-rays of a rigid body") as bar:
        return case_files.simulated_cases(
            path,
            [patient],
            table1.PHANTOM_LABELS,
            scenes,
            STARTS_MM,
            config.seed + at_home.OTHER_SEED,
            config.detector,
            (at_home.VARIANT,),
            on_done=bar.update,
        )


def run_home_tests(
    case_path: pathlib.Path | str,
    workdir: pathlib.Path | str,
    out: pathlib.Path | str,
    asked: Sequence[System] = TESTED,
    sizes: Sizes = subjects.CPU,
    config: configs.Config = configs.BASE,
    base: pathlib.Path | str | None = None,
    views: Sequence[int] = at_home.VIEWS,
) -> str:
    """Tests systems, and writes `home.txt`, `home.md`, `home.json` and `views.png` to `out`.

    Args:
      case_path: cases of a vertebra in a body that has moved as one, as of `rigid_cases`.
      workdir, asked, sizes, config, base: as in `table1.make_table`.
      views: numbers of X-rays that a vertebra is reconstructed from, in ascending order.
    Returns:
      the tables as text.
    Raises:
      InputError: unreadable cases or scans.
    """
    workdir, out, case_file = files.make_folder(workdir), files.make_folder(out), cases.read(case_path)
    subject_of = subjects.subjects(case_file, config, workdir, base)
    table, (subject,) = Table(case_file, subject_of, sizes, config.seed, out), subject_of.values()
    tests = [test for system in asked for test in at_home.tests_of(system, table, subject, views)]
    found: dict[str, dict[str, dict[str, at_home.Result]]] = {part: {} for part in at_home.PARTS}
    with progress.Bar(len(tests), "home tests") as bar:
        for test in tests:
            of_system = found[test.part].setdefault(test.system.title, {})
            of_system[test.name] = at_home.kept(out, test, config.seed)
            bar.update()
    parts, values = home_report.report({part: results for part, results in found.items() if results})
    if reconstructed := found["reconstruction"]:
        psnr = {title: [one["psnr_honest"] for one in named.values()] for title, named in reconstructed.items()}
        plots.views_plot(out / "views.png", views, psnr, home_report.LEAST_DB)
    return write(out, "home", parts, values)


def main() -> None:
    """Runs `run_home_tests` with the flags and prints the tables.

    Raises:
      InputError: no system of such a name, or as `run_home_tests`.
    """
    given = flags.FLAGS
    asked = answers.chosen(given.systems, TESTED)
    workdir, config = pathlib.Path(given.workdir), dataclasses.replace(configs.BASE, seed=given.seed)
    case_path = rigid_cases(workdir / "phantom", config)
    print(run_home_tests(case_path, workdir, given.out, asked, subjects.PRESETS[given.preset], config))


if __name__ == "__main__":
    cli.run(main, define_flags, log_in="out")
