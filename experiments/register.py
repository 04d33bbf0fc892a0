"""Registers cases with a prepared workdir.

A case file: `python -m experiments.register --cases=C.json --variant=full --workdir=W --out=OUT`. One acquisition: `--ct --mask
--label=20,21 --workdir --xrays=ap.npy,lat.npy --cameras=cameras.json --out=OUT`. The start pose is found by the workdir's
localizer, read from --init, or made of --points (a vertebra's centre in each view) and the CT's own orientation. The function
behind this command is `register_rows`.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from data_pipelines import cases
from data_pipelines.ct import segmentation
from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.xrays import radiograph
from experiments.patients import models
from experiments.patients import starts
from experiments.patients import workdir as workdirs
from experiments.patients.workdir import Target
from experiments.reports import case_folder
from experiments.runtime import cli
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from experiments.runtime.kept_programs import Stopwatch
from radgs_jax import errors
from radgs_jax.geometry.xray import XRay
from radgs_jax.levels import level_name
from radgs_jax.registration import pipeline
from radgs_jax.registration.pipeline import RegisterOptions
from radgs_jax.registration.prepared import Prepared


@dataclasses.dataclass(frozen=True)
class Row:
    """One case to register.

    Attributes:
      name: its id in results.
      target: the vertebra.
      xrays: views of one acquisition.
      start: (4, 4) world_from_ct, mm.
      truth: (4, 4) world_from_ct, mm, used in pictures only; None if unknown.
    """

    name: str
    target: Target
    xrays: Sequence[XRay]
    start: np.ndarray
    truth: np.ndarray | None = None


def rows_of_cases(path: str | pathlib.Path, variant: str) -> list[Row]:
    """Every case of a case file.

    Args:
      path: case file; variant: array of its X-ray files.
    Raises:
      InputError: as `cases.read` and `cases.read_xrays`.
    """
    case_file = cases.read(path)
    xrays = {name: cases.read_xrays(scene, variant) for name, scene in case_file.scenes.items()}
    rows = []
    for case in case_file.cases:
        scene = case_file.scenes[case.scene]
        volume = case_file.volumes[scene.volume]
        target = Target(volume.patient, volume.full_ct, volume.full_mask, volume.full_label)
        rows.append(Row(case.name, target, xrays[scene.name], case.world_from_ct, _truth_for_pictures(scene)))
    return rows


def _truth_for_pictures(scene):
    # The true pose is optional and only drawn, so a missing or malformed one must not stop the registration.
    try:
        return camera_files.check_rigid("", "", scene.world_from_ct)
    except errors.InputError:
        return None


def register_rows(
    rows: Sequence[Row],
    load: Callable[[Target], Prepared],
    out: str | pathlib.Path,
    options: RegisterOptions = RegisterOptions(),
    variant: str = "xrays",
    pictures: bool = True,
    extra_files: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Registers cases into the folder `out`, which is written completely or not at all.

    Args:
      load: returns the `Prepared` of a target; called for every row before the first case is registered, so that unusable
        input is found early. It should cache its results.
      out: a new or empty folder.
      variant: name of the X-rays' variant in results.json.
      pictures: also write each case's pictures, volumes and transforms.
      extra_files: further JSON files to write: file name -> content.
    Returns:
      the results, as in results.json.
    Raises:
      InputError: a folder that is not empty; as `load`.
    """
    out = pathlib.Path(out)
    _check_new(out)
    for row in rows:
        load(row.target)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    results, warm = [], set()
    with progress.bar(len(rows), "register") as bar:
        for row in rows:
            prepared = load(row.target)
            shapes = (row.target, *(x.line_integrals.shape for x in row.xrays))
            if shapes not in warm:
                pipeline.warm_up(prepared, row.xrays, options, kept)
                warm.add(shapes)
            with Stopwatch() as watch:
                outcome = pipeline.register(prepared, row.xrays, row.start, options, kept)
            results.append({"id": row.name, **case_folder.answer(outcome), **watch.times()})
            if pictures:
                case_folder.write(partial, row.name, outcome, prepared, row.xrays, row.start, row.truth)
            bar.update()
    cases.write_results(partial / "results.json", case_folder.PROGRAM, variant, results)
    for name, value in (extra_files or {}).items():
        files.write_json(partial / name, value)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return results


def _check_new(out):
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        errors.fail(out, "folder", "one that is not empty", "a new folder")


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("cases", None, "Case file; all its cases are registered.")
    flags.DEFINE_string("variant", "full", "Array of the X-ray files, with --cases.")
    flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder), instead of --cases.")
    flags.DEFINE_string("mask", None, "Label map on the CT's grid, with --ct.")
    flags.DEFINE_enum(
        "labels", None, sorted(segmentation.LABEL_MAPS), "What numbers --mask holds; default: recognised, or refused."
    )
    flags.DEFINE_list("label", None, "VerSe number of the vertebra, or several, with --ct.")
    flags.DEFINE_list("xrays", None, "One DICOM, PNG, TIFF, NPY or NIfTI image per view, with --ct.")
    flags.DEFINE_enum(
        "values",
        None,
        radiograph.VALUES,
        "What their numbers are; default: what DICOM's tags say, line integrals elsewhere.",
    )
    flags.DEFINE_integer("sign", None, "1: larger numbers are more X-rays; -1: fewer; default: DICOM's tag, else 1.")
    flags.DEFINE_integer(
        "bits",
        None,
        "Bits of a stored number; default: DICOM's BitsStored. Needed for inverted intensities in other files.",
        lower_bound=radiograph.BITS_RANGE[0],
        upper_bound=radiograph.BITS_RANGE[1],
    )
    flags.DEFINE_string(
        "cameras",
        None,
        'JSON list with {"P": 3x4} or {"K": 3x3, "E": 4x4} per view; default: DICOM\'s nominal geometry.',
    )
    flags.DEFINE_string("init", None, "JSON 4x4 start pose world_from_ct, with --ct; default: a localizer finds it.")
    flags.DEFINE_string("points", None, "'u,v;u,v': the one vertebra's centre in each view, instead of --init.")
    flags.DEFINE_bool("raw", False, "Short for --values=intensity.")
    flags.DEFINE_float(
        "air",
        None,
        "Number of the unattenuated beam, rescaled and turned round as DICOM says; default: the brightest pixels.",
    )
    flags.DEFINE_list("flat", None, "Image of the beam without a patient, one per view.")
    flags.DEFINE_float("log_scale", None, "Numbers per unit of ln(I), with --values=log.")
    flags.DEFINE_bool("mirrored", False, "X-rays and cameras show the mirror image of what the source sees.")
    flags.DEFINE_string("workdir", None, "Folder that `experiments.prepare` made.", required=True)
    flags.DEFINE_string("out", None, "New folder for the results.", required=True)
    flags.DEFINE_integer("passes", RegisterOptions().passes, "Passes of the network.", lower_bound=1, upper_bound=50)
    flags.DEFINE_bool("refine", True, "Refine the network's pose against the X-rays themselves.")
    flags.DEFINE_bool("pictures", True, "Write pictures, volumes and transforms per case, besides results.json.")


def _given(identity, load):
    """A `Row` for each label of the flags, and the localizer's reports: row name -> report."""
    given = flags.FLAGS
    for name in ("mask", "label", "xrays"):
        if not getattr(given, name):
            errors.fail("flags", f"--{name}", "nothing", "a value, with --ct")
    if given.init and given.points:
        errors.fail("flags", "--init, --points", "both", "one of the two, or neither")
    labels = cli.label_numbers(given.label)
    if given.points and len(labels) > 1:
        errors.fail("flags", "--points", f"{len(labels)} vertebrae", "one --label with it")
    ct = pathlib.Path(given.ct)
    targets = [Target(ct.name, ct, pathlib.Path(given.mask), label, given.labels) for label in labels]
    options = radiograph.ReadOptions(
        values=given["values"].value or ("intensity" if given.raw else None),
        sign=given.sign,
        bits=given.bits,
        log_scale=given.log_scale,
        air=given.air,
        mirrored=given.mirrored,
    )
    xrays = radiograph.read_views(given.xrays, given.cameras, options, given.flat)
    rows, reports = [], {}
    for target in targets:
        name = "case" if len(targets) == 1 else level_name(target.label)
        if given.init:
            start = camera_files.check_rigid(given.init, "T_init", files.read_json(given.init))
        else:
            vertebra = load(target).vertebra
            if given.points:
                start, miss = starts.start_from_points([x.camera for x in xrays], _pixels(len(xrays)), vertebra)
                print(f"start from --points: the rays miss each other by {miss:.2f} mm")
            else:
                start, reports[name] = _found(identity, target, xrays, vertebra)
        rows.append(Row(name, target, xrays, start))
    return rows, reports


def _found(identity, target, xrays, vertebra):
    """Start pose and report of the vertebra that a localizer finds."""
    generic = models.base_folder() / "detector.npz"
    localizer, adapted = workdirs.load_localizer(flags.FLAGS.workdir, target, identity, generic)
    if not adapted:
        print(
            "warning: this localizer is generic, and weaker: `experiments.prepare --detector` adapts it to the patient"
        )
    start, located = starts.start_from_localizer(localizer, xrays, vertebra)
    report, level = located.report, level_name(target.label)
    apart = f"the views' rays pass {report['apart_mm'][level]:.1f} mm apart"
    print(f"start from the X-rays: {level} with probability {report['probability']:.3f}, {apart}")
    return start, {**report, "adapted": adapted, "start_world_from_ct": start.tolist()}


def _pixels(count):
    given = flags.FLAGS.points
    try:
        pixels = [[float(v) for v in pair.split(",")] for pair in given.split(";")]
    except ValueError:
        pixels = []
    if len(pixels) != count or any(len(p) != 2 for p in pixels):
        errors.fail("flags", "--points", repr(given), f"{count} pairs 'u,v', separated by ';'")
    return pixels


def main() -> None:
    """Registers the cases that the flags name.

    Raises:
      InputError: flags that do not go together, a folder that is not new, unreadable input, a vertebra that was not prepared
        or is not found.
    """
    given = flags.FLAGS
    if bool(given.cases) == bool(given.ct):
        errors.fail("flags", "--cases, --ct", "both" if given.ct else "neither", "one of the two")
    if given.cases and given.labels:
        errors.fail("flags", "--labels", f"{given.labels!r} with --cases", "it with --ct only")
    out = pathlib.Path(given.out)
    _check_new(out)
    identity = workdirs.Identity()
    load = functools.cache(lambda target: workdirs.load(given.workdir, target, identity))
    rows, reports = (rows_of_cases(given.cases, given.variant), {}) if given.cases else _given(identity, load)
    extra_files = {}
    if reports:
        extra_files["detection.json"] = next(iter(reports.values())) if len(reports) == 1 else reports
    options = RegisterOptions(given.passes, given.refine)
    variant = given.variant if given.cases else "xrays"
    results = register_rows(rows, load, out, options, variant, given.pictures, extra_files)
    print(f"registered {len(results)} case(s): {out / 'results.json'}")


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags)


if __name__ == "__main__":
    command()
