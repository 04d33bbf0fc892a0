"""Scores of a localizer on X-rays that it has not seen."""

import pathlib
from collections.abc import Iterable
from collections.abc import Mapping

import numpy as np

from data_pipelines import cases
from data_pipelines.io import camera_files
from experiments.localizers import localizer_files
from radgs_jax.errors import InputError
from radgs_jax.geometry import camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.localization import locate

RIGHT_MM = 12.0
"""Maximum error of a right centre, mm: half the height of a small vertebra with its disc; beyond it another
vertebra is nearer."""
SURE = 0.9
"""Probability above which an answer counts as sure. Chosen by hand: a lower value counts more wrong answers as sure."""


def score_localizer(model: locate.Localizer, acquisitions: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Scores a localizer on acquisitions whose truth is known.

    Args:
      acquisitions: as `acquisitions.acquisition` returns them.
    Returns:
      of single views:
        levels: number of levels that are known, in sight and not covered.
        level_right: fraction of them whose reported place is nearer to its true place than to another level's; a level that is not
          reported counts as wrong.
        centre_mm: median distance, at the isocentre, from a reported place to the nearest true centre.
      of acquisitions:
        targets: number of acquisitions.
        target_right: fraction of targets within `RIGHT_MM`.
        target_mm: median distance from the triangulated to the true centre; infinite where nothing is found.
        refused: fraction without an answer.
        sure_and_wrong: fraction of wrong answers with a probability above `SURE`.
    """
    right, near, targets = [], [], []
    for a in acquisitions:
        images, size = a["measured"].astype(np.float32), a["measured"].shape[-1]
        cameras = (
            [k.astype(np.float64) for k in a["intrinsics"]],
            [E.astype(np.float64) for E in a["camera_from_world"]],
        )
        for v, (k, E) in enumerate(zip(*cameras)):
            upright, found = locate.look(model, images[v], a["valid"][v], k, E)
            uv = found.uv @ upright.matrix.T + upright.offset
            reported = {model.levels[n]: p for n, p in zip(found.levels, uv)}
            truth = {n: a["centroids"][v, n] for n in model.levels if a["known"][n]}
            mm = E[2, 3] / k[0]
            for level, p in truth.items():
                column, row = np.clip(np.rint(p).astype(int), 0, size - 1)
                if a["in_sight"][v, level] and a["valid"][v, row, column]:
                    q = reported.get(level)
                    right.append(q is not None and level == min(truth, key=lambda n: np.linalg.norm(truth[n] - q)))
            near += [mm * min(np.linalg.norm(q - p) for p in truth.values()) for q in reported.values()]
        views = [camera.Camera(k, E, size, size) for k, E in zip(*cameras)]
        xrays = [XRay(*each) for each in zip(images, a["valid"], views)]
        try:
            found = locate.locate(model, xrays, int(a["target"]))
            miss = np.linalg.norm(found.centre - a["world_from_box"][:3, 3])
            targets.append((miss, found.report["probability"]))
        except InputError:
            targets.append((np.inf, 0.0))
    miss, probability = np.array(targets).T
    return {
        "levels": len(right),
        "level_right": float(np.mean(right)),
        "centre_mm": float(np.median(near)),
        "targets": len(miss),
        "target_right": float(np.mean(miss < RIGHT_MM)),
        "target_mm": float(np.median(miss)),
        "refused": float(np.mean(np.isinf(miss))),
        "sure_and_wrong": float(np.mean((miss >= RIGHT_MM) & (probability > SURE))),
    }


def find_in_cases(path: pathlib.Path | str, case_file: cases.CaseFile, variant: str) -> dict[str, locate.Located | str]:
    """Finds the target vertebra of every scene of a case file.

    Args:
      path: localizer file; variant: array of the X-ray files.
    Returns:
      scene name -> what was found, or one line that says why nothing was.
    Raises:
      InputError: unreadable files.
    """
    model, found = localizer_files.read_localizer(path), {}
    for scene in case_file.scenes.values():
        label, xrays = case_file.volumes[scene.volume].full_label, cases.read_xrays(scene, variant)
        try:
            found[scene.name] = locate.locate(model, xrays, label)
        except InputError as error:
            found[scene.name] = str(error)
    return found


def centre_errors(case_file: cases.CaseFile, found: Mapping[str, locate.Located | str]) -> dict[str, float]:
    """Scene name -> distance in mm from the found to the true centre, infinite where nothing was found.

    Scenes without a known truth are left out.

    Args:
      found: as `find_in_cases` returns.
    Raises:
      InputError: a malformed pose or centre.
    """
    errors_mm = {}
    for name, located in found.items():
        scene = case_file.scenes[name]
        centre = case_file.raw["volumes"][scene.volume].get("centre")
        if centre is None or scene.world_from_ct is None:
            continue
        centre = camera_files.check_matrix(case_file.path, f"volumes.{scene.volume}.centre", centre, (3,))
        T = cases.truth(case_file, scene)
        truth = T[:3, :3] @ centre + T[:3, 3]
        errors_mm[name] = np.inf if isinstance(located, str) else float(np.linalg.norm(located.centre - truth))
    return errors_mm
