"""Simulates cases of known pose from a labelled CT: `python -m experiments.simulate --ct --mask --label=20,21 --out=C.json`.

`experiments.prepare`, `register`, `detect --do=find`, `calibrate` and `train --p2_cases` read such case files.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick
from experiments import configs
from experiments.runtime import cli
from experiments.runtime import progress
from radgs_jax import errors
from radgs_jax.geometry import distortion

MAX_CAMERA_ERROR = (50.0, 10.0)
"""Largest errors of cameras that are simulated, mm and degrees: far more than any C-arm that is in use."""


def simulate_cases(
    ct: pathlib.Path | str,
    mask: pathlib.Path | str,
    labels: Sequence[int],
    out: pathlib.Path | str,
    *,
    subject: str | None = None,
    scenes: int = 3,
    starts_mm: Sequence[tuple[float, float]] = configs.STARTS_MM,
    seed: int = 0,
    posture: str = "rigid",
    photons: float = quick.PanelFaults().photons,
    errors_of_input: case_files.InputErrors = case_files.InputErrors(),
) -> None:
    """Simulates X-rays of known pose and writes them as a case file.

    Args:
      ct: NIfTI file or DICOM folder.
      mask: label map on the CT's grid.
      labels: VerSe numbers of the vertebrae.
      out: case file to write; its X-rays go next to it.
      subject: name of the patient; None takes the CT's file name.
      scenes: number of acquisitions per vertebra.
      starts_mm: bins (low, high) of start errors, mTRE in mm; every acquisition gets one start from each.
      seed: of everything random.
      posture: one of `case_files.POSTURES`.
      photons: photons per pixel in the variant 'real'.
      errors_of_input: of what the case file says.
    Raises:
      InputError: `out` exists already, or unreadable input.
    """
    out = pathlib.Path(out)
    if out.exists():
        errors.fail(out, "case file", "one that is there", "a new file")
    subject = subject or pathlib.Path(ct).name.split(".")[0]
    with progress.Bar(len(labels) * scenes, "scenes") as bar:
        case_files.simulated_cases(
            out,
            [(subject, ct, mask)],
            labels,
            scenes,
            starts_mm,
            seed,
            quick.PanelFaults(photons=photons),
            posture=posture,
            errors=errors_of_input,
            on_done=bar.update,
        )


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("ct", None, "CT (NIfTI file or DICOM folder).", required=True)
    flags.DEFINE_string("mask", None, "Label map on the CT's grid.", required=True)
    flags.DEFINE_list("label", None, "VerSe numbers of the vertebrae.", required=True)
    flags.DEFINE_string("subject", None, "Name of the patient; default: the CT's file name.")
    flags.DEFINE_integer("scenes", 3, "Number of acquisitions of each vertebra.", lower_bound=1)
    flags.DEFINE_list(
        "starts_mm",
        ["0", "5", "10", "15", "20", "25"],
        "Edges of the bins of the starts' errors, mTRE in mm; each acquisition has a start in each bin.",
    )
    flags.DEFINE_integer("seed", 0, "Seed of everything random.", lower_bound=0)
    flags.DEFINE_enum(
        "posture",
        "rigid",
        list(case_files.POSTURES),
        "How the body has moved: as one piece, or bent, every vertebra by itself.",
    )
    flags.DEFINE_float("photons", quick.PanelFaults().photons, "Photons per pixel in variant `real`.", lower_bound=1.0)
    flags.DEFINE_float("mask_error_mm", 0.0, "How far the masks' borders are off at most, mm.", lower_bound=0.0)
    flags.DEFINE_list(
        "camera_error", ["0", "0"], "Root mean square errors of the cameras in the case file: mm, degrees."
    )
    flags.DEFINE_float(
        "distortion",
        0.0,
        "How far X-rays are stretched at their field's border, at most, relative to it.",
        0.0,
        distortion.MOST,
    )
    flags.DEFINE_string("out", None, "Case file to write; the X-ray files go next to it.", required=True)


def main() -> None:
    """Runs `simulate_cases` with the flags; raises as it, `cli.bins` and `cli.label_numbers`."""
    given = flags.FLAGS
    starts_mm, labels = cli.bins("--starts_mm", given.starts_mm), cli.label_numbers(given.label)
    simulate_cases(
        given.ct,
        given.mask,
        labels,
        given.out,
        subject=given.subject,
        scenes=given.scenes,
        starts_mm=starts_mm,
        seed=given.seed,
        posture=given.posture,
        photons=given.photons,
        errors_of_input=case_files.InputErrors(
            given.mask_error_mm,
            cli.mm_and_degrees("--camera_error", given.camera_error, MAX_CAMERA_ERROR),
            given.distortion,
        ),
    )
    print(f"wrote {pathlib.Path(given.out)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
