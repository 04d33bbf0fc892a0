"""Registers vertebrae of a CT in X-rays.

A case file: `python -m experiments.register --cases=C.json --variant=full --out=OUT`. One acquisition: `--ct --mask --label=20,21
--xrays=ap.npy,lat.npy --cameras=cameras.json --out=OUT`. The network is the shipped one, or with `--workdir=W` that of a prepared
workdir, where nothing is read from the CT. The start pose is read from --init, made of --points (a vertebra's centre in each view)
and the CT's own orientation, found by the workdir's localizer where it has one, or else by looking for the whole body. The function
behind this command is `experiments.patients.registering.register_rows`. The exit status is 0 if every case was registered, 1 if
some could not be, 2 if none could, and with --strict 3 if a pose was refused.
"""

import functools
import math
import pathlib
import sys

from absl import flags
from absl import logging

from data_pipelines.io import files
from data_pipelines.io import pose_files
from data_pipelines.xrays import radiograph
from data_pipelines.xrays import view_geometry
from experiments.patients import models
from experiments.patients import registering
from experiments.patients import spines
from experiments.patients import starts
from experiments.patients import untrained
from experiments.patients import workdir as workdirs
from experiments.patients.registering import Row
from experiments.reports import run_record
from experiments.runtime import cli
from experiments.runtime import input_flags
from experiments.runtime import shards
from experiments.runtime.kept_programs import kept
from radgs_jax import errors
from radgs_jax import levels
from radgs_jax.geometry import distortion
from radgs_jax.levels import FIRST_BONE
from radgs_jax.levels import level_name
from radgs_jax.registration import plausibility
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.pipeline import RegisterOptions

MAX_CAMERA_MM, MAX_CAMERA_DEG = 20.0, 5.0
"""Largest errors of cameras that can be stated. Chosen by hand: beyond, the first refinement finds nothing to correct them by."""
BESIDE = 3
"""Levels to each side that the surroundings of a vertebra hold (`whole_body.PART_REACH_MM`). Without a start pose, the body is
looked for so that all of --label are in some surroundings: half takes twice as long, twice leaves gaps."""
LEAST_SHARE = 0.5
"""Share of a vertebra that each X-ray shows, for --label=all. Chosen by hand: half registers vertebrae that are cut; twice leaves
out all that touch the frame."""
STRICT_STATUS = 3
"""Exit status where --strict is given and a pose is refused."""


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("cases", None, "Case file; all its cases are registered.")
    flags.DEFINE_string("variant", "full", "Array of the X-ray files to register, with --cases.")
    input_flags.define_scan()
    input_flags.define_xrays("--ct")
    flags.DEFINE_enum(
        "values",
        None,
        radiograph.VALUES,
        "What the X-rays' numbers are; default: what DICOM's tags say, line integrals elsewhere.",
    )
    flags.DEFINE_integer("sign", None, "1: a larger number means more X-rays; -1: fewer; default: DICOM's tag, else 1.")
    flags.DEFINE_integer(
        "bits",
        None,
        "Bits of a stored number; default: DICOM's BitsStored. Needed for inverted intensities in other files.",
        lower_bound=radiograph.BITS_RANGE[0],
        upper_bound=radiograph.BITS_RANGE[1],
    )
    flags.DEFINE_string(
        "init",
        None,
        "Start pose world_from_ct: a 4x4 matrix in JSON, or an earlier pose.json or pose.tfm; default: a localizer finds it.",
    )
    flags.DEFINE_string("points", None, "'u,v;u,v': the vertebra's centre in each view, in pixels, instead of --init.")
    flags.DEFINE_string(
        "axis",
        None,
        "'u,v;u,v': a second point in each view, on the bone's axis towards the CT's top; with --points. All turns are tried.",
    )
    flags.DEFINE_bool("raw", False, "Short for --values=intensity.")
    flags.DEFINE_float(
        "air",
        None,
        "Pixel value where the beam passes nothing, after DICOM's rescaling and inversion; default: the brightest pixels.",
    )
    flags.DEFINE_list("flat", None, "One image per view of the beam without a patient.")
    flags.DEFINE_float("log_scale", None, "How much a stored number grows when ln(I) grows by 1, with --values=log.")
    flags.DEFINE_list("dark", None, "One image per view of the panel without a beam, for intensities.")
    flags.DEFINE_float(
        "saturation", None, "Stored number of a saturated pixel; default: the end of the range of --bits."
    )
    flags.DEFINE_list(
        "frame", None, "Number of the frame, from 0, in files with several: one for all views, or one per view."
    )
    flags.DEFINE_bool("collimator", True, "Search for the collimator's border where the file gives none.")
    flags.DEFINE_bool("mirrored", False, "The X-rays and cameras show the mirror image of what the source sees.")
    flags.DEFINE_string(
        "workdir", None, "Folder that `experiments.prepare` made; default: the CT is read, with the shipped network."
    )
    flags.DEFINE_bool("cache", True, "Keep what is extracted from the CT in the user's cache, and take it from there.")
    flags.DEFINE_string("out", None, "New folder for the results.", required=True)
    flags.DEFINE_integer("passes", RegisterOptions().passes, "Passes of the network.", lower_bound=1, upper_bound=50)
    flags.DEFINE_bool(
        "reconstruct", False, "Also reconstruct the vertebra with the network, at the pose that was found."
    )
    flags.DEFINE_bool("refine", True, "Refine the network's pose against the X-rays themselves.")
    flags.DEFINE_list(
        "camera_sd",
        None,
        "How far the cameras are off, mm and degrees (root mean square), such as 1.0,0.3: they are then corrected; default: not at "
        f"all, and {','.join(f'{v:g}' for v in view_geometry.NOMINAL_SD)} where they are DICOM's nominal ones.",
    )
    flags.DEFINE_float(
        "distortion_sd",
        0.0,
        "How far the X-rays are stretched at their field's border, as a fraction of its radius, such as 0.03 of an image "
        "intensifier: this is then fitted.",
        lower_bound=0.0,
        upper_bound=distortion.MOST,
    )
    flags.DEFINE_bool("together", False, "Also refine the trusted vertebrae of --label together, into spine.json.")
    flags.DEFINE_bool("strict", False, f"End with status {STRICT_STATUS} if a pose is refused.")
    flags.DEFINE_bool(
        "resume", False, "Go on with the cases that a stopped run with the same flags has left unfinished."
    )
    shards.define()
    flags.DEFINE_bool("pictures", True, "Also write each case's picture, volumes and transform, not only results.json.")
    flags.DEFINE_bool("slicer", False, "Also write each case's scene for 3D Slicer, with the CT.")


def _loader(digests):
    """A function from a target to its `Prepared`: of --workdir, or extracted from the CT."""
    if (workdir := flags.FLAGS.workdir) is not None:
        workdirs.read_manifest(workdir)
        return lambda target: workdirs.load(workdir, target, digests)
    base, refine = models.base_folder(), RefineConfig()
    rule = workdirs.base_rule(base, refine)
    return untrained.untrained_loader(models.load_model(base), refine, rule, digests if flags.FLAGS.cache else None)


def _in_view(row, load, otherwise):
    """Whether every X-ray shows most of a row's vertebra at its start pose; `otherwise` says what follows if not."""
    shown = plausibility.least_share(load(row.target).vertebra, row.xrays, row.start) >= LEAST_SHARE
    if not shown:
        logging.warning("%s: an X-ray shows less than half of it%s", level_name(row.target.label), otherwise)
    return shown


def _looked_for(targets):
    """Targets whose surroundings hold all of them: few, and as far apart as that allows."""
    place = lambda target: levels.ORDER.index(target.label)
    left, chosen = sorted(targets, key=place), []
    while left:
        chosen.append([target for target in left if place(target) <= place(left[0]) + BESIDE][-1])
        left = [target for target in left if place(target) > place(chosen[-1]) + BESIDE]
    return chosen


def _given(digests, load):
    """A `Row` for each label of the flags, and the localizer's reports: row name -> report."""
    given = flags.FLAGS
    targets = input_flags.targets()
    if not given.xrays:
        errors.fail("flags", "--xrays", "nothing", "one file per view, with --ct")
    if given.init and given.points:
        errors.fail("flags", "--init, --points", "both", "one of the two, or neither")
    if given.axis and not given.points:
        errors.fail("flags", "--axis", "no --points", "the bone's centre with it")
    if given.points and len(targets) > 1:
        errors.fail("flags", "--points", f"{len(targets)} vertebrae", "one --label with it")
    options = radiograph.ReadOptions(
        values=given["values"].value or ("intensity" if given.raw else None),
        sign=given.sign,
        bits=given.bits,
        log_scale=given.log_scale,
        air=given.air,
        saturation=given.saturation,
        collimator=given.collimator,
        mirrored=given.mirrored,
    )
    xrays = radiograph.read_views(given.xrays, given.cameras, options, given.flat, given.dark, _frames())
    if not given.distortion_sd and any(x.origin["collimator"] == "circle found" for x in xrays):
        logging.warning(
            "X-rays: a round field; if it is an image intensifier's, fit its distortion: --distortion_sd=0.03"
        )
    rows, reports = [], {}
    localized = bool(given.workdir) and "detector" in workdirs.read_manifest(given.workdir)
    by_body = not (given.init or given.points or localized)
    if by_body:
        if targets[0].label > FIRST_BONE:
            errors.fail("flags", "--init, --points", "neither", "one of them, for a bone beyond the spine")
        found, reports["body"] = starts.start_from_body([load(t) for t in _looked_for(targets)], xrays, kept)
        print(f"start from the whole body in the X-rays: fit {reports['body']['fit']:.2f} of {len(xrays)}")
    for target in targets:
        name = "case" if len(targets) == 1 else level_name(target.label)
        if given.init:
            start = pose_files.read_pose(given.init)
        elif by_body:
            start = found
        else:
            vertebra = load(target).vertebra
            if given.points:
                centre = _pixels("points", len(xrays))
                if given.axis:
                    start, miss = starts.start_from_axis(xrays, centre, _pixels("axis", len(xrays)), load(target), kept)
                else:
                    start, miss = starts.start_from_points([x.camera for x in xrays], centre, vertebra)
                print(f"start from --points: the rays miss each other by {miss:.2f} mm")
            else:
                start, reports[name] = _found(digests, target, xrays, vertebra)
        made_from = "--points" if given.points else "the localizer" if localized else "the body"
        sources = given.cameras or "cameras", given.init or made_from
        rows.append(Row(name, target, xrays, start, None, *sources, start_found=not (given.init or given.points)))
    if given.label == [input_flags.ALL]:
        rows = [row for row in rows if _in_view(row, load, ": left out")]
        if not rows:
            errors.fail("flags", "--label", "all, of which no X-ray shows one", "a start pose in the X-rays' field")
    elif by_body:
        for row in rows:
            _in_view(row, load, " where the body was found")
    return rows, reports


def _found(digests, target, xrays, vertebra):
    """Start pose and report of the vertebra that a localizer finds."""
    localizer, adapted = workdirs.load_localizer(
        flags.FLAGS.workdir, target, digests, models.base_folder() / "detector.npz"
    )
    try:
        start, located = starts.start_from_localizer(localizer, xrays, vertebra)
    except errors.InputError as error:
        raise errors.InputError(f"{error}; or a start pose by --init or --points") from error
    report, level = located.report, level_name(target.label)
    apart = f"the views' rays pass {report['apart_mm'][level]:.1f} mm apart"
    print(f"start from the X-rays: {level} with probability {report['probability']:.3f}, {apart}")
    return start, {**report, "adapted": adapted, "start_world_from_ct": start.tolist()}


def _frames():
    """The numbers in --frame, or None."""
    given = flags.FLAGS.frame
    if given is not None and not all(text.isdecimal() for text in given):
        errors.fail("flags", "--frame", ",".join(given), "a frame's number from 0, or one per view")
    return given and [int(text) for text in given]


def _options(rows):
    """What the flags ask for; --camera_sd has a default for the cameras of `rows`."""
    given, mm, degrees = flags.FLAGS, 0.0, 0.0
    views = [] if callable(rows[0].xrays) else rows[0].xrays
    if given.camera_sd is not None:
        mm, degrees = cli.mm_and_degrees("--camera_sd", given.camera_sd, (MAX_CAMERA_MM, MAX_CAMERA_DEG))
    elif given.refine and any(view.origin["camera"] == view_geometry.NOMINAL for view in views):
        mm, degrees = view_geometry.NOMINAL_SD
        logging.warning("cameras: DICOM's nominal ones, taken to be off by about %g mm and %g degrees", mm, degrees)
    options = RegisterOptions(
        given.passes, given.refine, given.reconstruct, (math.radians(degrees), mm), given.distortion_sd
    )
    if options.corrects and not given.refine:
        flag = "--camera_sd" if any(options.camera_sd) else "--distortion_sd"
        errors.fail("flags", flag, "--norefine", "the refinement, which corrects views")
    return options


def _pixels(flag, count):
    """The (u, v) of each view in a flag."""
    given = flags.FLAGS[flag].value
    try:
        pixels = [[float(v) for v in pair.split(",")] for pair in given.split(";")]
    except ValueError:
        pixels = []
    if len(pixels) != count or any(len(p) != 2 for p in pixels):
        errors.fail("flags", f"--{flag}", repr(given), f"{count} pairs 'u,v', separated by ';'")
    return pixels


def _digests(digests):
    """Digests of everything that the flags name, for run.json."""
    given = flags.FLAGS
    lists = {name: getattr(given, name) or [] for name in ("xrays", "flat", "dark")}
    single = {name: getattr(given, name) for name in ("cases", "cameras", "init") if getattr(given, name)}
    found = {name: [files.sha256(path) for path in paths] for name, paths in lists.items() if paths}
    found |= {name: files.sha256(path) for name, path in single.items()}
    found["workdir" if given.workdir else "base"] = files.sha256(
        pathlib.Path(given.workdir or models.base_folder()) / "manifest.json"
    )
    if given.ct:
        found["scan"] = digests.of(input_flags.targets()[0])
    return found


def main() -> None:
    """Registers the cases that the flags name.

    Raises:
      InputError: flags that do not go together, a folder that is not new, unreadable input, a vertebra that was not prepared
        or is not found.
      RunError: some of the cases could not be registered.
    """
    given, record = flags.FLAGS, run_record.RunRecord()
    if bool(given.cases) == bool(given.ct):
        errors.fail("flags", "--cases, --ct", "both" if given.ct else "neither", "one of the two")
    for name in ("labels", "label", "bone", "mask", "xrays", "cameras", "init", "points"):
        if given.cases and getattr(given, name):
            errors.fail("flags", f"--{name}", f"{getattr(given, name)!r} with --cases", "it with --ct only")
    out = pathlib.Path(given.out)
    files.check_new(out)
    shard = shards.given()
    if given.ct and not shard.whole:
        errors.fail("flags", "--shard", f"{shard} with --ct", "it with --cases only")
    digests = workdirs.ScanDigests()
    load = functools.cache(_loader(digests))
    if given.cases:
        rows, reports = registering.rows_of_cases(given.cases, given.variant), {}
    else:
        rows, reports = _given(digests, load)
    inputs = _digests(digests)
    extra_files = {}
    if reports:
        extra_files["detection.json"] = next(iter(reports.values())) if len(reports) == 1 else reports
    options = _options(rows)
    variant = given.variant if given.cases else "xrays"
    if given.together:
        if not given.refine:
            errors.fail("flags", "--together", "--norefine", "the refinement")
        if given.cases or len(rows) < spines.MIN_VERTEBRAE:
            errors.fail(
                "flags", "--together", f"{len(rows)} vertebra(e) of --label", "two or more, with --ct and --xrays"
            )
        extra_files["spine.json"] = lambda results: spines.spine(rows, load, results, options)
    # The last one, so that it has all warnings.
    extra_files["run.json"] = lambda results: record.finish(inputs, cli.warnings_said())
    done = registering.register_rows(
        rows, load, out, options, variant, given.pictures, extra_files, given.resume, inputs, print, shard, given.slicer
    )
    _conclude(done, given.strict)


def _conclude(done, strict):
    """Prints what all cases came to.

    Raises:
      RunError: some of the cases could not be registered.
    """
    out = done.out
    judged = [result["accepted"] for result in done.results if "accepted" in result]
    counts = f"{sum(judged)} accepted, {len(judged) - sum(judged)} refused" if judged else "not judged"
    if done.failures:
        counts += f", {len(done.failures)} failed"
    print(f"registered {len(done.results)} case(s), {counts}: {out / 'results.json'}")
    trusted = sum(result.get("trusted", False) and not result["accepted"] for result in done.results)
    if trusted:
        where = out / "spine.json" if (out / "spine.json").exists() else "--together with two or more vertebrae"
        print(f"{trusted} refused for the cameras alone, usable relative to each other: {where}")
    elif judged and not any(judged):
        print(
            "no pose may be used: check the label, the start, the cameras, that X-rays and CT are of one patient, and that "
            "none is mirrored (--mirrored)"
        )
    if done.failures:
        raise errors.RunError(
            f"{out / 'results.json'}: {len(done.failures)} case(s) could not be registered: 'failures' says why"
        )
    if strict and not all(judged):
        sys.exit(STRICT_STATUS)


def command() -> None:
    """Runs the command; the console script calls this."""
    cli.run(main, define_flags, log_in="out")


if __name__ == "__main__":
    command()
