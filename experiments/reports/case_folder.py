"""The files of a registered case: pose, ITK transform, volumes, Gaussians, picture, scene for 3D Slicer."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.io import files
from data_pipelines.io import nifti
from experiments.reports.verdicts import Verdict
from radgs_jax import gaussians
from radgs_jax.geometry import resample
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay
from radgs_jax.levels import level_name
from radgs_jax.registration import joint
from radgs_jax.registration import pipeline
from radgs_jax.registration import reconstruct
from radgs_jax.registration.joint import Together
from radgs_jax.registration.pipeline import Outcome
from radgs_jax.registration.prepared import Prepared

PROGRAM = "radgs_jax"
"""Name of the program in result files."""


def answer(outcome: Outcome) -> dict[str, Any]:
    """An outcome as an entry of a result file, without the case's id and the times.

    A pose that is not accepted has neither a radius nor a covariance: both describe poses that are right.
    """
    found = {"T": outcome.world_from_ct.tolist()}
    if outcome.confidence is not None:
        judged = outcome.confidence
        found |= {"accepted": judged.accepted, "chance": float(judged.chance)}
        found |= {"uncertainty_mm": None, "covariance": None}
        if judged.trusted:
            found |= {"uncertainty_mm": judged.uncertainty_mm, "covariance": judged.covariance.tolist()}
    if (together := outcome.together) is not None:
        if (judged := outcome.confidence) is not None:
            found["trusted"] = judged.trusted
        found["as_calibrated"] = outcome.as_calibrated.tolist()
        found |= corrections(together, joint.covariance(together))
    return found


def corrections(together: Together, covariance: np.ndarray) -> dict[str, Any]:
    """What the views were corrected by, as entries of a result file; covariance: (N, N) of all parameters."""
    of_cameras = together.of_cameras
    found = {
        "camera_motions": together.motions.tolist(),
        "camera_covariance": covariance[of_cameras, of_cameras].tolist(),
    }
    return found | ({"distortions": together.distortions.tolist()} if together.distortions.any() else {})


def itk_transform(world_from_ct: np.ndarray) -> str:
    """The pose (4, 4), mm, as the text of an ITK transform (LPS) that 3D Slicer loads.

    ITK stores the map from the fixed frame (world) to the moving one (CT); Slicer shows its inverse, which moves the CT into the
    C-arm's frame.
    """
    T = rigid_host.between_lps(np.linalg.inv(world_from_ct))
    numbers = " ".join(f"{v:.17g}" for v in [*T[:3, :3].ravel(), *T[:3, 3]])
    return (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
    )


def write(
    folder: pathlib.Path | str,
    name: str,
    outcome: Outcome,
    prepared: Prepared,
    xrays: Sequence[XRay],
    start_world_from_ct: np.ndarray,
    said: Verdict,
    true_world_from_ct: np.ndarray | None = None,
) -> None:
    """Writes a case's files to `folder`/`name`: pose, ITK transform, volumes, Gaussians and pictures.

    Args:
      outcome: result of `pipeline.register`.
      prepared, xrays, start_world_from_ct: the arguments of that call; pictures show the X-rays as they were corrected.
      true_world_from_ct: (4, 4), mm, drawn in the picture; None if unknown.
      said: on the outcome.
    """
    # Imported here because matplotlib takes half a second, which a registration without pictures saves.
    from experiments.reports import page
    from experiments.reports import pictures

    folder = pathlib.Path(folder) / name
    vertebra = prepared.vertebra
    files.write_json(
        folder / "pose.json",
        {
            "world_from_ct": outcome.world_from_ct.tolist(),
            "world_from_ct_lps": rigid_host.between_lps(outcome.world_from_ct).tolist(),
            "ct_from_world_lps": rigid_host.between_lps(np.linalg.inv(outcome.world_from_ct)).tolist(),
            "start_world_from_ct": np.asarray(start_world_from_ct).tolist(),
            "passes_world_from_ct": outcome.trajectory.tolist(),
            **{k: v for k, v in answer(outcome).items() if k != "T"},
            "verdict": said.line(level_name(vertebra.label)),
            "units": "mm",
            "frames": "CT: RAS+, or LPS+ where the name says so; world: the C-arm's",
        },
    )
    with files.replacing(folder / "pose.tfm") as temporary:
        temporary.write_text(itk_transform(outcome.world_from_ct))
    centre = (outcome.world_from_ct @ vertebra.ct_from_box)[:3, 3]
    world_from_index = np.eye(4)
    world_from_index[:3, 3] = np.round(centre) - 0.5 * (np.array(resample.GRID_SHAPE) - 1)
    moved = resample.resample(
        vertebra.density, outcome.world_from_ct @ vertebra.ct_from_index, world_from_index, resample.GRID_SHAPE
    )
    nifti.write_nifti(folder / "ct_vertebra_in_world.nii.gz", moved, world_from_index)
    poses = _poses(outcome, start_world_from_ct, true_world_from_ct)
    if outcome.together is not None:
        xrays = pipeline.corrected(xrays, outcome.together)
    near = pictures.close_ups(prepared, xrays, poses, outcome)
    pictures.registration_picture(folder / "picture.png", name, said, prepared, xrays, poses, outcome, near)
    page.write(folder / "report.html", name, said, prepared, xrays, poses, outcome, near)
    if (seen := outcome.reconstructed) is not None:
        reconstruction = reconstruct.in_ct(seen.gaussians, np.eye(4), world_from_index, resample.GRID_SHAPE)
        nifti.write_nifti(folder / "reconstruction_in_world.nii.gz", reconstruction, world_from_index)
        files.write_npz(folder / "gaussians.npz", **gaussians.to_arrays(seen.gaussians))
        pictures.network_picture(folder / "network.png", name, seen, reconstruction, moved)


def write_scene(
    path: pathlib.Path | str,
    ct: np.ndarray,
    ct_from_index: np.ndarray,
    outcome: Outcome,
    prepared: Prepared,
    xrays: Sequence[XRay],
    start_world_from_ct: np.ndarray,
    true_world_from_ct: np.ndarray | None = None,
) -> None:
    """Writes a case's scene for 3D Slicer (`slicer.write`).

    Args:
      path: the file, which ends with .mrb.
      ct, ct_from_index: HU and affine (4, 4), as from `scans.read_ct`.
      outcome, prepared, xrays, start_world_from_ct, true_world_from_ct: as for `write`.
    """
    from experiments.reports import slicer  # here, as in `write`

    if outcome.together is not None:
        xrays = pipeline.corrected(xrays, outcome.together)
    poses = _poses(outcome, start_world_from_ct, true_world_from_ct)
    slicer.write(path, ct, ct_from_index, prepared.vertebra, xrays, poses)


def _poses(outcome, start_world_from_ct, true_world_from_ct):
    """The poses that are drawn, by name."""
    poses = {"start": start_world_from_ct, "estimate": outcome.world_from_ct}
    return poses if true_world_from_ct is None else poses | {"truth": true_world_from_ct}
