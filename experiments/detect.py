"""X-ray vertebra detection: makes a detector, adapts it to a patient, and finds vertebrae with it.

`python -m experiments.detect --do=generic --workdir=W` trains on phantoms. `--do=patient --ct=CT --mask=MASK --workdir=W`
adapts `--detector` to one patient's CT. `--do=score --detector=D --workdir=W` scores it on X-rays of phantoms that it has not
seen, with `--ct --mask` on new ones of that scan. `--do=find --detector=D --out=OUT.json` with `--cases=C.json --variant=real`, or
with `--xrays=ap.npy,lat.npy --cameras=cameras.json --label=20`, finds. A detector is one file, `W/detector.npz`.
"""

import dataclasses

from absl import flags

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import radiograph
from data_pipelines import segmentation
from experiments import cli
from experiments import detectors

DO = flags.DEFINE_enum(
    "do", None, ["generic", "patient", "score", "find"], "What to do with a detector.", required=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the detector that is made, or of the X-rays that one is scored on."
)
DETECTOR = flags.DEFINE_string("detector", None, "Detector file to start from or use.")
CT = flags.DEFINE_string("ct", None, "CT, with --do=patient or score.")
MASK = flags.DEFINE_string("mask", None, "Label map on the CT's grid, with --ct.")
LABELS = flags.DEFINE_enum(
    "labels", None, sorted(segmentation.LABEL_MAPS), "What numbers --mask holds; default: recognised, or refused."
)
BODIES = flags.DEFINE_integer("bodies", 8, "Phantoms, or postures by the dozen, with --do=score.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "Training steps; default: as configured.", lower_bound=1)
CASES = flags.DEFINE_string("cases", None, "Case file, with --do=find.")
VARIANT = flags.DEFINE_string("variant", "real", "Array of the X-ray files, with --cases.")
XRAYS = flags.DEFINE_list("xrays", None, "One DICOM, PNG, TIFF, NPY or NIfTI image per view, with --do=find.")
CAMERAS = flags.DEFINE_string(
    "cameras", None, 'JSON list with {"P": 3x4} or {"K": 3x3, "E": 4x4} per view; default: DICOM\'s nominal geometry.'
)
LABEL = flags.DEFINE_integer("label", None, "VerSe number of the vertebra to find, with --xrays.")
OUT = flags.DEFINE_string("out", None, "JSON file of what was found, with --do=find.")


def _need(*wanted):
    for flag in wanted:
        if flag.value is None:
            files.fail("flags", f"--{flag.name}", "nothing", f"a value, with --do={DO.value}")


def _find():
    _need(OUT, DETECTOR)
    if CASES.value:
        case_file = cases.read(CASES.value)
        found = detectors.find_in_cases(DETECTOR.value, case_file, VARIANT.value)
        errors = detectors.centre_errors(case_file, found)
        for name, located in found.items():
            line = located if isinstance(located, str) else f"probability {located.report['probability']:.3f}"
            print(f"{name}: {line}" + (f", {errors[name]:.1f} mm off" if name in errors else ""))
        return {name: {"error": v} if isinstance(v, str) else v.report for name, v in found.items()}
    _need(XRAYS, LABEL)
    measured = radiograph.read_views(XRAYS.value, CAMERAS.value)
    images, views, valid = ([getattr(x, name) for x in measured] for name in ("line_integrals", "view", "valid"))
    return {"xrays": detectors.locate(detectors.load(DETECTOR.value), images, views, LABEL.value, valid).report}


def _score():
    _need(DETECTOR)
    if CT.value or MASK.value:
        _need(CT, MASK)
    model, config = detectors.load(DETECTOR.value), detectors.PATIENT if CT.value else detectors.GENERIC
    scan = (CT.value, MASK.value, LABELS.value) if CT.value else ()
    return detectors.score(model, detectors.held_out_views(WORKDIR.value, config, BODIES.value, *scan))


def main():
    """Does what --do says, and prints where the result is.

    Raises:
      InputError: a flag that is missing, as `detectors.make_patient`, `detectors.find_in_cases` or `detectors.locate`.
    """
    if DO.value == "find":
        files.write_json(OUT.value, _find())
        return print(f"found: {OUT.value}")
    _need(WORKDIR)
    if DO.value == "score":
        for name, figure in _score().items():
            print(f"{name}: {figure:.4g}")
        return
    config = detectors.GENERIC if DO.value == "generic" else detectors.PATIENT
    config = dataclasses.replace(config, steps=STEPS.value or config.steps)
    if DO.value == "generic":
        path = detectors.make_generic(WORKDIR.value, config)
    else:
        _need(CT, MASK, DETECTOR)
        base = detectors.load(DETECTOR.value)
        path = detectors.make_patient(WORKDIR.value, CT.value, MASK.value, base, config, LABELS.value)
    print(f"made: {path}")


if __name__ == "__main__":
    cli.run(main)
