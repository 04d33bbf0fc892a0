"""Simulates cases of known pose from a labelled CT: `python -m experiments.simulate --ct --mask --label=20,21 --out=C.json`.

What `experiments.study` and `experiments.calibrate` are run on, and what anything that reads case files can be scored with.
"""

import pathlib

from absl import flags

from data_pipelines import build
from data_pipelines import files
from data_pipelines import xray
from experiments import cli
from experiments import progress

CT = flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder).", required=True)
MASK = flags.DEFINE_string("mask", None, "Label map on the CT's grid.", required=True)
LABEL = flags.DEFINE_list("label", None, "VerSe numbers of the vertebrae.", required=True)
SUBJECT = flags.DEFINE_string("subject", None, "Name of the patient; default: the CT's file name.")
SCENES = flags.DEFINE_integer("scenes", 3, "Acquisitions of each vertebra.", lower_bound=1)
STARTS_MM = flags.DEFINE_list("starts_mm", ["0", "5", "10", "15", "20", "25"], "Edges of the bins of start errors.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)
POSTURE = flags.DEFINE_enum(
    "posture", "rigid", list(build.POSTURES), "How the body has moved: as one piece, or bent, every vertebra by itself."
)
PHOTONS = flags.DEFINE_float("photons", xray.Detector().photons, "Photons a pixel, of variant `real`.", lower_bound=1.0)
OUT = flags.DEFINE_string("out", None, "Case file to write; its X-rays go beside it.", required=True)


def main():
    """Writes the case file, which must not be there; raises as `cli.bins`, `cli.label_numbers` and `build.simulated_cases`."""
    starts_mm, labels = cli.bins("--starts_mm", STARTS_MM.value), cli.label_numbers(LABEL.value)
    out = pathlib.Path(OUT.value)
    if out.exists():
        files.fail(out, "case file", "one that is there", "a new file")
    subject = SUBJECT.value or pathlib.Path(CT.value).name.split(".")[0]
    with progress.bar(len(labels) * SCENES.value, "scenes") as bar:
        build.simulated_cases(
            out,
            [(subject, CT.value, MASK.value)],
            labels,
            SCENES.value,
            starts_mm,
            SEED.value,
            xray.Detector(photons=PHOTONS.value),
            posture=POSTURE.value,
            on_done=bar.update,
        )
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
