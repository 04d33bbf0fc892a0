"""The vertebra localizer: trains it, adapts it to a patient, scores it, and finds vertebrae with it.

`python -m experiments.detect --do=generic --workdir=W` trains on phantoms. `--do=patient --ct=CT --mask=MASK --workdir=W`
adapts `--detector` to one patient's CT. `--do=score --detector=D --workdir=W` scores it on X-rays of new phantoms, or with
`--ct --mask` on new X-rays of that scan. `--do=find --detector=D --out=OUT.json` finds vertebrae, with `--cases=C.json
--variant=real` or with `--xrays=ap.npy,lat.npy --cameras=cameras.json --label=20`. A localizer is one file, `W/detector.npz`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.xrays import radiograph
from experiments.localizers import acquisitions
from experiments.localizers import localizer_files
from experiments.localizers import scoring
from experiments.localizers import training
from experiments.runtime import cli
from experiments.runtime import input_flags
from radgs_jax.errors import fail
from radgs_jax.localization import locate


def find_in_case_file(
    localizer: pathlib.Path | str, case_path: pathlib.Path | str, variant: str = "real"
) -> dict[str, dict[str, Any]]:
    """Finds the target vertebra of every scene of a case file, and prints one line per scene.

    Args:
      localizer: localizer file; case_path: case file; variant: array of its X-ray files.
    Returns:
      scene name -> the localizer's report, or {'error': the line that says why there is none}.
    Raises:
      InputError: unreadable files.
    """
    case_file = cases.read(case_path)
    found = scoring.find_in_cases(localizer, case_file, variant)
    errors_mm = scoring.centre_errors(case_file, found)
    for name, located in found.items():
        line = located if isinstance(located, str) else f"probability {located.report['probability']:.3f}"
        print(f"{name}: {line}" + (f", {errors_mm[name]:.1f} mm off" if name in errors_mm else ""))
    return {name: {"error": v} if isinstance(v, str) else v.report for name, v in found.items()}


def find_in_xrays(
    localizer: pathlib.Path | str,
    xrays: Sequence[pathlib.Path | str],
    label: int,
    cameras: pathlib.Path | str | None = None,
) -> dict[str, dict[str, Any]]:
    """Finds one vertebra in X-ray files.

    Args:
      localizer: localizer file; xrays: one image file per view; label: VerSe number.
      cameras: JSON file of the cameras; None takes DICOM's nominal geometry.
    Returns:
      {'xrays': the localizer's report}.
    Raises:
      InputError: unreadable files, or a vertebra that is not found.
    """
    measured = radiograph.read_views(xrays, cameras)
    return {"xrays": locate.locate(localizer_files.read_localizer(localizer), measured, label).report}


def score_localizer_file(
    localizer: pathlib.Path | str,
    workdir: pathlib.Path | str,
    bodies: int = 8,
    ct: pathlib.Path | str | None = None,
    mask: pathlib.Path | str | None = None,
    label_map: str | None = None,
) -> dict[str, float]:
    """Scores a localizer on simulated X-rays that it was not trained on: of new phantoms, or new ones of one scan.

    Args:
      localizer: localizer file; workdir: where the X-rays are kept.
      bodies: number of phantoms, 12 acquisitions of each; with a scan, a twelfth of its acquisitions.
      ct, mask, label_map: of the scan, as `scans.read_scan`; None for phantoms.
    Returns:
      the figures of `scoring.score_localizer`.
    Raises:
      InputError: unreadable files, or a scan without a complete vertebra.
    """
    model, config = localizer_files.read_localizer(localizer), training.PATIENT if ct else training.GENERIC
    scan = (ct, mask, label_map) if ct else ()
    return scoring.score_localizer(model, acquisitions.held_out_views(workdir, config, bodies, *scan))


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_enum(
        "do", None, ["generic", "patient", "score", "find"], "What to do with a localizer.", required=True
    )
    flags.DEFINE_string("workdir", None, "Folder for the localizer, or with --do=score for the X-rays it is scored on.")
    flags.DEFINE_string("detector", None, "Localizer file: the one to adapt, to score or to find with.")
    flags.DEFINE_string("ct", None, "CT, with --do=patient or --do=score.")
    flags.DEFINE_string("mask", None, "Label map on the CT's grid, with --ct.")
    input_flags.define_numbering()
    flags.DEFINE_integer(
        "bodies",
        8,
        "With --do=score: number of phantoms, 12 acquisitions of each; with --ct, a twelfth of the scan's acquisitions.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "steps", None, "Training steps; default: as many as the localizer's configuration says.", lower_bound=1
    )
    flags.DEFINE_string("cases", None, "Case file, with --do=find.")
    flags.DEFINE_string("variant", "real", "Array of the X-ray files to search, with --cases.")
    input_flags.define_xrays("--do=find")
    flags.DEFINE_integer("label", None, "VerSe number of the vertebra to find, with --xrays.")
    flags.DEFINE_string("out", None, "JSON file to write what was found to, with --do=find.")


def _need(*wanted):
    for name in wanted:
        if getattr(flags.FLAGS, name) is None:
            fail("flags", f"--{name}", "nothing", f"a value, with --do={flags.FLAGS.do}")


def _find(given):
    _need("out", "detector")
    if given.cases:
        return find_in_case_file(given.detector, given.cases, given.variant)
    _need("xrays", "label")
    return find_in_xrays(given.detector, given.xrays, given.label, given.cameras)


def main() -> None:
    """Does what --do says, and prints where the result is.

    Raises:
      InputError: a flag that is missing; as `training.make_patient_localizer`, `find_in_case_file` and `find_in_xrays`.
    """
    given = flags.FLAGS
    if given.do == "find":
        files.write_json(given.out, _find(given))
        return print(f"found: {given.out}")
    _need("workdir")
    if given.do == "score":
        _need("detector")
        if given.ct or given.mask:
            _need("ct", "mask")
        figures = score_localizer_file(given.detector, given.workdir, given.bodies, given.ct, given.mask, given.labels)
        for name, figure in figures.items():
            print(f"{name}: {figure:.4g}")
        return
    config = training.GENERIC if given.do == "generic" else training.PATIENT
    config = dataclasses.replace(config, steps=given.steps or config.steps)
    if given.do == "generic":
        path = training.make_generic_localizer(given.workdir, config)
    else:
        _need("ct", "mask", "detector")
        base = localizer_files.read_localizer(given.detector)
        path = training.make_patient_localizer(given.workdir, given.ct, given.mask, base, config, given.labels)
    print(f"made: {path}")


if __name__ == "__main__":
    cli.run(main, define_flags)
