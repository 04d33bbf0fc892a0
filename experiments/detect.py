"""X-ray vertebra detection: makes a detector, adapts it to a patient, and finds vertebrae with it.

`python -m experiments.detect --do=generic --workdir=W` trains on phantoms. `--do=patient --ct=CT --mask=MASK --workdir=W`
adapts `--detector` to one patient's CT. `--do=score --detector=D --workdir=W` scores it on X-rays of phantoms that it has not
seen, with `--ct --mask` on new ones of that scan. `--do=find --detector=D --out=OUT.json` with `--cases=C.json --variant=real`, or
with `--xrays=ap.npy,lat.npy --cameras=cameras.json --label=20`, finds. A detector is one file, `W/detector.npz`.
"""

import dataclasses

from absl import flags

from data_pipelines import cases
from data_pipelines.ct import segmentation
from data_pipelines.io import files
from data_pipelines.xrays import radiograph
from experiments.localizers import acquisitions
from experiments.localizers import localizer_files
from experiments.localizers import scoring
from experiments.localizers import training
from experiments.runtime import cli
from radgs_jax.errors import fail
from radgs_jax.localization import locate


def define_flags():
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_enum("do", None, ["generic", "patient", "score", "find"], "What to do with a detector.", required=True)
    flags.DEFINE_string("workdir", None, "Folder of the detector that is made, or of the X-rays that one is scored on.")
    flags.DEFINE_string("detector", None, "Detector file to start from or use.")
    flags.DEFINE_string("ct", None, "CT, with --do=patient or score.")
    flags.DEFINE_string("mask", None, "Label map on the CT's grid, with --ct.")
    flags.DEFINE_enum(
        "labels", None, sorted(segmentation.LABEL_MAPS), "What numbers --mask holds; default: recognised, or refused."
    )
    flags.DEFINE_integer("bodies", 8, "Phantoms, or postures by the dozen, with --do=score.", lower_bound=1)
    flags.DEFINE_integer("steps", None, "Training steps; default: as configured.", lower_bound=1)
    flags.DEFINE_string("cases", None, "Case file, with --do=find.")
    flags.DEFINE_string("variant", "real", "Array of the X-ray files, with --cases.")
    flags.DEFINE_list("xrays", None, "One DICOM, PNG, TIFF, NPY or NIfTI image per view, with --do=find.")
    flags.DEFINE_string(
        "cameras",
        None,
        'JSON list with {"P": 3x4} or {"K": 3x3, "E": 4x4} per view; default: DICOM\'s nominal geometry.',
    )
    flags.DEFINE_integer("label", None, "VerSe number of the vertebra to find, with --xrays.")
    flags.DEFINE_string("out", None, "JSON file of what was found, with --do=find.")


def _need(*wanted):
    for name in wanted:
        if getattr(flags.FLAGS, name) is None:
            fail("flags", f"--{name}", "nothing", f"a value, with --do={flags.FLAGS.do}")


def _find():
    _need("out", "detector")
    if flags.FLAGS.cases:
        case_file = cases.read(flags.FLAGS.cases)
        found = scoring.find_in_cases(flags.FLAGS.detector, case_file, flags.FLAGS.variant)
        errors = scoring.centre_errors(case_file, found)
        for name, located in found.items():
            line = located if isinstance(located, str) else f"probability {located.report['probability']:.3f}"
            print(f"{name}: {line}" + (f", {errors[name]:.1f} mm off" if name in errors else ""))
        return {name: {"error": v} if isinstance(v, str) else v.report for name, v in found.items()}
    _need("xrays", "label")
    measured = radiograph.read_views(flags.FLAGS.xrays, flags.FLAGS.cameras)
    return {"xrays": locate.locate(localizer_files.load(flags.FLAGS.detector), measured, flags.FLAGS.label).report}


def _score():
    _need("detector")
    if flags.FLAGS.ct or flags.FLAGS.mask:
        _need("ct", "mask")
    model, config = localizer_files.load(flags.FLAGS.detector), training.PATIENT if flags.FLAGS.ct else training.GENERIC
    scan = (flags.FLAGS.ct, flags.FLAGS.mask, flags.FLAGS.labels) if flags.FLAGS.ct else ()
    return scoring.score(model, acquisitions.held_out_views(flags.FLAGS.workdir, config, flags.FLAGS.bodies, *scan))


def main():
    """Does what --do says, and prints where the result is.

    Raises:
      InputError: a flag that is missing, as `training.make_patient`, `scoring.find_in_cases` or `locate.locate`.
    """
    if flags.FLAGS.do == "find":
        files.write_json(flags.FLAGS.out, _find())
        return print(f"found: {flags.FLAGS.out}")
    _need("workdir")
    if flags.FLAGS.do == "score":
        for name, figure in _score().items():
            print(f"{name}: {figure:.4g}")
        return
    config = training.GENERIC if flags.FLAGS.do == "generic" else training.PATIENT
    config = dataclasses.replace(config, steps=flags.FLAGS.steps or config.steps)
    if flags.FLAGS.do == "generic":
        path = training.make_generic(flags.FLAGS.workdir, config)
    else:
        _need("ct", "mask", "detector")
        base = localizer_files.load(flags.FLAGS.detector)
        path = training.make_patient(
            flags.FLAGS.workdir, flags.FLAGS.ct, flags.FLAGS.mask, base, config, flags.FLAGS.labels
        )
    print(f"made: {path}")


if __name__ == "__main__":
    cli.run(main, define_flags)
