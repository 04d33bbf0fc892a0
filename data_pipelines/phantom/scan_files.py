"""Phantoms on disk: CT, label map and centroids of each subject in the layout of VerSe."""

import concurrent.futures
import os
import pathlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.io import workers
from data_pipelines.phantom import generate
from data_pipelines.phantom import transforms

ORIENTATIONS = ("RAS", "LPS", "PIR", "LAS")
"""Storage orders of the arrays; subjects use them in turn, so that readers meet several."""


def scan_paths(folder: pathlib.Path | str, subject: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Paths of a subject's CT and mask in the VerSe layout; nothing is opened."""
    return (
        pathlib.Path(folder) / f"sub-{subject}_ct.nii.gz",
        pathlib.Path(folder) / f"sub-{subject}_seg-vert_msk.nii.gz",
    )


def phantoms(
    folder: pathlib.Path | str,
    seeds: Iterable[int],
    config: generate.PhantomConfig,
    on_done: Callable[[], object] = lambda: None,
) -> list[tuple[str, pathlib.Path, pathlib.Path]]:
    """Writes the phantoms that are missing from a folder, on all cores.

    The centroid JSON is written last, so a subject that has one is complete. Names contain only the seed: phantoms of another
    config in the same folder are kept and not replaced.

    Args:
      folder: created if missing.
      seeds: one per subject.
      on_done: called after each subject.

    Returns:
      (subject, CT path, mask path) of each seed.

    Raises:
      ValueError: a config that makes no spine.
    """
    folder = files.make_folder(folder)
    subjects = {f"phantom{seed:05d}": seed for seed in seeds}
    missing = {s: seed for s, seed in subjects.items() if not (folder / f"sub-{s}_seg-subreg_ctd.json").exists()}
    for _ in range(len(subjects) - len(missing)):
        on_done()
    jobs = [(seed, config, folder, s, ORIENTATIONS[seed % len(ORIENTATIONS)]) for s, seed in missing.items()]
    if len(jobs) <= 2:
        for job in jobs:
            make_and_write(*job)
            on_done()
    else:
        with workers.pool(min(len(jobs), os.cpu_count() or 1)) as pool:
            for job in concurrent.futures.as_completed([pool.submit(make_and_write, *job) for job in jobs]):
                job.result()
                on_done()
    return [(subject, *scan_paths(folder, subject)) for subject in subjects]


def write_verse(
    phantom: generate.Phantom, folder: pathlib.Path | str, subject: str, axcodes: str = "RAS"
) -> dict[str, pathlib.Path]:
    """Writes the VerSe files of a phantom.

    Args:
      folder: created if missing.
      axcodes: directions in which the stored axes run, such as 'PIR'.

    Returns:
      Paths of 'ct', 'mask' and 'centroids'.

    Raises:
      ValueError: axis codes that do not name each anatomical axis once.
    """
    import nibabel as nib

    axcodes = tuple(axcodes.upper())
    if len(axcodes) != 3 or sorted("RLAPSI".find(c) // 2 for c in axcodes) != [0, 1, 2]:
        raise ValueError(f"axcodes must name each anatomical axis once, as RAS or PIR do, got {axcodes}")
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(("R", "A", "S")), nib.orientations.axcodes2ornt(axcodes)
    )
    ras_from_stored = phantom.affine @ nib.orientations.inv_ornt_aff(turn, phantom.hu.shape)
    folder = files.make_folder(folder)
    paths = {
        "ct": folder / f"sub-{subject}_ct.nii.gz",
        "mask": folder / f"sub-{subject}_seg-vert_msk.nii.gz",
        "centroids": folder / f"sub-{subject}_seg-subreg_ctd.json",
    }
    for name, array in (("ct", phantom.hu), ("mask", phantom.mask)):
        nifti.write_nifti(paths[name], nib.orientations.apply_orientation(array, turn), ras_from_stored)
    write_centroids(paths["centroids"], phantom.centroids, ras_from_stored, axcodes)
    return paths


def write_centroids(
    path: pathlib.Path | str, points: Mapping[int, np.ndarray], ras_from_stored: np.ndarray, axcodes: Sequence[str]
) -> None:
    """Writes centroids as a VerSe JSON file, atomically: voxel coordinates of a label map to a thousandth.

    Args:
      points: (3,) RAS+ mm by VerSe number.
      ras_from_stored: (4, 4) from the label map's voxels, as stored, to mm.
      axcodes: directions in which the label map's stored axes run.

    Raises:
      ValueError: a point that is not finite.
    """
    stored_from_ras = np.linalg.inv(ras_from_stored)
    entries = [{"direction": list(axcodes)}]
    for label in sorted(points):
        voxel = transforms.apply_affine(stored_from_ras, points[label])
        entries.append({"label": int(label), **{axis: round(float(c), 3) for axis, c in zip("XYZ", voxel)}})
    files.write_json(path, entries)


def make_and_write(
    seed: int, config: generate.PhantomConfig, folder: pathlib.Path | str, subject: str, axcodes: str
) -> dict[str, pathlib.Path]:
    """Makes and writes one phantom; returns and raises as `generate.make_phantom` and `write_verse` do.

    It is one job of a worker process, in a module that imports neither jax nor a network, which keeps workers quick to start.
    """
    return write_verse(generate.make_phantom(seed, config), folder, subject, axcodes)
