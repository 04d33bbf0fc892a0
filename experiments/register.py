"""Registers cases with a prepared workdir.

Many: `python -m experiments.register --cases=C.json --variant=full --workdir=W --out=OUT`. One pair of X-rays: `--ct --mask
--label=20,21 --workdir --xrays=ap.npy,lat.npy --cameras=cameras.json --out=OUT`, which finds the vertebrae by the workdir's
detector. With --init it starts from that pose; --points gives a vertebra's centre in each view, and the CT's own orientation
is taken.
"""

import functools
import pathlib
import shutil

from absl import flags

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import radiograph
from data_pipelines import scan as scans
from data_pipelines import segmentation
from experiments import cli
from experiments import configs
from experiments import patients
from experiments import progress
from experiments import registering

CASES = flags.DEFINE_string("cases", None, "Case file; all its cases are registered.")
VARIANT = flags.DEFINE_string("variant", "full", "Array of the X-ray files, with --cases.")
CT = flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder), instead of --cases.")
MASK = flags.DEFINE_string("mask", None, "Label map on the CT's grid, with --ct.")
LABELS = flags.DEFINE_enum(
    "labels", None, sorted(segmentation.LABEL_MAPS), "What numbers --mask holds; default: recognised, or refused."
)
LABEL = flags.DEFINE_list("label", None, "VerSe number of the vertebra, or several, with --ct.")
XRAYS = flags.DEFINE_list("xrays", None, "One DICOM, PNG, TIFF, NPY or NIfTI image per view, with --ct.")
VALUES = flags.DEFINE_enum(
    "values",
    None,
    radiograph.VALUES,
    "What their numbers are; default: what DICOM's tags say, line integrals elsewhere.",
)
CAMERAS = flags.DEFINE_string(
    "cameras", None, 'JSON list with {"P": 3x4} or {"K": 3x3, "E": 4x4} per view; default: DICOM\'s nominal geometry.'
)
INIT = flags.DEFINE_string("init", None, "JSON 4x4 start pose world_from_ct, with --ct; default: a detector finds it.")
POINTS = flags.DEFINE_string("points", None, "'u,v;u,v': the one vertebra's centre in each view, instead of --init.")
RAW = flags.DEFINE_bool("raw", False, "Short for --values=intensity.")
AIR = flags.DEFINE_float("air", None, "Number of the unattenuated beam; default: the brightest pixels.")
FLAT = flags.DEFINE_list("flat", None, "Image of the beam without a patient, one per view.")
LOG_SCALE = flags.DEFINE_float("log_scale", None, "Numbers per unit of ln(I), with --values=log.")
MIRRORED = flags.DEFINE_bool("mirrored", False, "X-rays and cameras show the mirror image of what the source sees.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder that `experiments.prepare` made.", required=True)
OUT = flags.DEFINE_string("out", None, "New folder for the results.", required=True)
PASSES = flags.DEFINE_integer("passes", configs.DEMO.passes, "Passes of the network.", lower_bound=1, upper_bound=50)
REFINE = flags.DEFINE_bool("refine", True, "Refine the network's pose against the X-rays themselves.")
PICTURES = flags.DEFINE_bool("pictures", True, "Write pictures, volumes and transforms per case, besides results.json.")


def _given(identity, load):
    """A case for each label of the flags, (id, target, views, images, valid, start, None), and what a detector found by id.

    load: gives the `patients.Prepared` of a target.
    """
    for flag in (MASK, LABEL, XRAYS):
        if not flag.value:
            files.fail("flags", f"--{flag.name}", "nothing", "a value, with --ct")
    if INIT.value and POINTS.value:
        files.fail("flags", "--init, --points", "both", "one of the two, or neither")
    labels = cli.label_numbers(LABEL.value)
    if POINTS.value and len(labels) > 1:
        files.fail("flags", "--points", f"{len(labels)} vertebrae", "one --label with it")
    ct = pathlib.Path(CT.value)
    targets = [patients.Target(ct.name, ct, pathlib.Path(MASK.value), label, LABELS.value) for label in labels]
    options = radiograph.Options(
        values=VALUES.value or ("intensity" if RAW.value else None),
        log_scale=LOG_SCALE.value,
        air=AIR.value,
        mirrored=MIRRORED.value,
    )
    measured = radiograph.read_views(XRAYS.value, CAMERAS.value, options, FLAT.value)
    views, images, valid = ([getattr(x, name) for x in measured] for name in ("view", "line_integrals", "valid"))
    rows, reports = [], {}
    for target in targets:
        name = "case" if len(targets) == 1 else scans.level_name(target.label)
        if INIT.value:
            start = cases.check_rigid(INIT.value, "T_init", files.read_json(INIT.value))
        else:
            vertebra = load(target).vertebra
            if POINTS.value:
                start, miss = registering.start_from_points(views, _pixels(len(views)), vertebra)
                print(f"start from --points: the rays miss each other by {miss:.2f} mm")
            else:
                start, reports[name] = _found(identity, target, measured, vertebra)
        rows.append((name, target, views, images, valid, start, None))
    return rows, reports


def _found(identity, target, measured, vertebra):
    """Start pose and report of the vertebra that a detector finds."""
    generic = cli.REPOSITORY / "base" / "detector.npz"
    detector, adapted = patients.load_detector(WORKDIR.value, target, identity, generic)
    if not adapted:
        print("warning: this detector is generic, and weaker: `experiments.prepare --detector` makes the patient's")
    start, located = registering.start_from_detector(detector, measured, vertebra)
    report, level = located.report, scans.level_name(target.label)
    apart = f"the views' rays pass {report['apart_mm'][level]:.1f} mm apart"
    print(f"start from the X-rays: {level} with probability {report['probability']:.3f}, {apart}")
    return start, {**report, "adapted": adapted, "start_world_from_ct": start.tolist()}


def _pixels(count):
    try:
        pixels = [[float(v) for v in pair.split(",")] for pair in POINTS.value.split(";")]
    except ValueError:
        pixels = []
    if len(pixels) != count or any(len(p) != 2 for p in pixels):
        files.fail("flags", "--points", repr(POINTS.value), f"{count} pairs 'u,v', separated by ';'")
    return pixels


def _listed():
    """Every case of the case file: (id, target, views, images, None, start, truth or None)."""
    case_file = cases.read(CASES.value)
    images = {name: cases.read_xrays(scene, VARIANT.value) for name, scene in case_file.scenes.items()}
    rows = []
    for case in case_file.cases:
        scene = case_file.scenes[case.scene]
        volume = case_file.volumes[scene.volume]
        target = patients.Target(volume.patient, volume.full_ct, volume.full_mask, volume.full_label)
        start, truth = case.world_from_ct, _truth_for_pictures(scene)
        rows.append((case.name, target, scene.views, images[scene.name], None, start, truth))
    return rows


def _truth_for_pictures(scene):
    # The truth, where a file has one, is drawn and nothing else; a file without it, or with rubbish in it, registers the same.
    try:
        return cases.check_rigid("", "", scene.world_from_ct)
    except files.InputError:
        return None


def main():
    """Registers what the flags name into the folder --out, which appears whole or not at all.

    Raises:
      InputError: flags that do not go together, a folder that is not new, unreadable input, a vertebra that was not prepared
        or is not found.
    """
    if bool(CASES.value) == bool(CT.value):
        files.fail("flags", "--cases, --ct", "both" if CT.value else "neither", "one of the two")
    if CASES.value and LABELS.value:
        files.fail("flags", "--labels", f"{LABELS.value!r} with --cases", "it with --ct only")
    out = pathlib.Path(OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        files.fail(out, "folder", "one that is not empty", "a new folder")
    identity = patients.Identity()
    load = functools.cache(lambda target: patients.load(WORKDIR.value, target, identity))
    rows, reports = (_listed(), {}) if CASES.value else _given(identity, load)
    for _, target, *_ in rows:  # whatever is wrong with one is found before the first is registered
        load(target)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    results, warm = [], set()
    with progress.bar(len(rows), "register") as bar:
        for name, target, views, images, valid, start, truth in rows:
            ready, shapes = load(target), (target, *(image.shape for image in images))
            if shapes not in warm:  # loading programs is no part of a case's time
                registering.warm_up(ready, views, images, valid, REFINE.value)
                warm.add(shapes)
            outcome = registering.register(ready, views, images, start, PASSES.value, valid, REFINE.value)
            results.append({"id": name, **registering.answer(outcome)})
            if PICTURES.value:
                registering.write(partial, name, outcome, ready, views, images, start, truth)
            bar.update()
    cases.write_results(
        partial / "results.json", registering.PROGRAM, VARIANT.value if CASES.value else "xrays", results
    )
    if reports:
        only = next(iter(reports.values()))
        files.write_json(partial / "detection.json", only if len(reports) == 1 else reports)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    print(f"registered {len(results)} case(s): {out / 'results.json'}")


if __name__ == "__main__":
    cli.run(main)
