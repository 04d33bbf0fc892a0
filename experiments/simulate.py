"""Simulates cases of known pose from a labelled CT: `python -m experiments.simulate --ct --mask --label=20,21 --out=C.json`.

What `experiments.study` and `experiments.calibrate` are run on, and what anything that reads case files can be scored with.
"""

import pathlib

from absl import flags

from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick
from experiments.runtime import cli
from experiments.runtime import progress
from radgs_jax import errors


def define_flags():
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder).", required=True)
    flags.DEFINE_string("mask", None, "Label map on the CT's grid.", required=True)
    flags.DEFINE_list("label", None, "VerSe numbers of the vertebrae.", required=True)
    flags.DEFINE_string("subject", None, "Name of the patient; default: the CT's file name.")
    flags.DEFINE_integer("scenes", 3, "Acquisitions of each vertebra.", lower_bound=1)
    flags.DEFINE_list("starts_mm", ["0", "5", "10", "15", "20", "25"], "Edges of the bins of start errors.")
    flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)
    flags.DEFINE_enum(
        "posture",
        "rigid",
        list(case_files.POSTURES),
        "How the body has moved: as one piece, or bent, every vertebra by itself.",
    )
    flags.DEFINE_float("photons", quick.PanelFaults().photons, "Photons a pixel, of variant `real`.", lower_bound=1.0)
    flags.DEFINE_string("out", None, "Case file to write; its X-rays go beside it.", required=True)


def main():
    """Writes the case file, which must not be there; raises as `cli.bins`, `cli.label_numbers` and `case_files.simulated_cases`."""
    starts_mm, labels = cli.bins("--starts_mm", flags.FLAGS.starts_mm), cli.label_numbers(flags.FLAGS.label)
    out = pathlib.Path(flags.FLAGS.out)
    if out.exists():
        errors.fail(out, "case file", "one that is there", "a new file")
    subject = flags.FLAGS.subject or pathlib.Path(flags.FLAGS.ct).name.split(".")[0]
    with progress.bar(len(labels) * flags.FLAGS.scenes, "scenes") as bar:
        case_files.simulated_cases(
            out,
            [(subject, flags.FLAGS.ct, flags.FLAGS.mask)],
            labels,
            flags.FLAGS.scenes,
            starts_mm,
            flags.FLAGS.seed,
            quick.PanelFaults(photons=flags.FLAGS.photons),
            posture=flags.FLAGS.posture,
            on_done=bar.update,
        )
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
