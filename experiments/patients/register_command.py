"""What `experiments.register` does with its flags."""

import functools
import math
import pathlib
import sys

from absl import flags

from data_pipelines.io import files
from data_pipelines.xrays import radiograph
from experiments.patients import models
from experiments.patients import one_acquisition
from experiments.patients import registering
from experiments.patients import spines
from experiments.patients import starts
from experiments.patients import untrained
from experiments.patients import workdir as workdirs
from experiments.reports import run_record
from experiments.runtime import cli
from experiments.runtime import endings
from experiments.runtime import input_flags
from experiments.runtime import shards
from radgs_jax import errors
from radgs_jax.geometry import distortion
from radgs_jax.levels import level_name
from radgs_jax.registration.pipeline import RegisterOptions


def run() -> None:
    """Registers the cases that the flags of `experiments.register` name.

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


def _loader(digests):
    """A function from a target to its `Prepared`: of --workdir, or extracted from the CT."""
    if (workdir := flags.FLAGS.workdir) is not None:
        workdirs.read_manifest(workdir)
        return lambda target: workdirs.load(workdir, target, digests)
    return untrained.shipped_loader(digests if flags.FLAGS.cache else None)


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
    localized = bool(given.workdir) and "detector" in workdirs.read_manifest(given.workdir)
    start = one_acquisition.GivenStart(
        given.init,
        _pixels("points", len(xrays)) if given.points else None,
        _pixels("axis", len(xrays)) if given.axis else None,
    )
    every = given.label == [input_flags.ALL]
    localize = functools.partial(_found, digests) if localized else None
    return one_acquisition.rows(
        targets, xrays, load, start, given.cameras, localize, print, every, bool(given.distortion_sd)
    )


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
        mm, degrees = cli.mm_and_degrees("--camera_sd", given.camera_sd, one_acquisition.MAX_CAMERA_SD)
    elif given.refine:
        mm, degrees = one_acquisition.assumed_camera_sd(views)
    if given.distortion_sd > distortion.MOST:
        errors.fail("flags", "--distortion_sd", given.distortion_sd, f"a fraction of at most {distortion.MOST}")
    passes, camera_sd = given.passes or RegisterOptions.passes, (math.radians(degrees), mm)
    options = RegisterOptions(passes, given.refine, given.reconstruct, camera_sd, given.distortion_sd)
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
        sys.exit(endings.REFUSED)
