"""Phantoms on disk, in the layout of VerSe."""

import concurrent.futures
import multiprocessing
import pathlib

import numpy as np

from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.phantom import generate
from data_pipelines.phantom import solids

ORIENTATIONS = ("RAS", "LPS", "PIR", "LAS")
"""Storage orders that phantoms are written in, in turn: everything downstream must cope with any."""


def scan_paths(folder, subject):
    """Paths (ct, mask) of a subject in the VerSe layout; nothing is opened."""
    return (
        pathlib.Path(folder) / f"sub-{subject}_ct.nii.gz",
        pathlib.Path(folder) / f"sub-{subject}_seg-vert_msk.nii.gz",
    )


def phantoms(folder, seeds, config, on_done=lambda: None):
    """Writes the phantoms that are not there yet, on all cores; returns [(subject, ct path, mask path)].

    The centroid JSON is written last, so its presence means that a subject is complete, of whatever config: names tell
    seeds only.

    Args:
      folder: made if need be; seeds: one a subject; config: `generate.PhantomConfig`; on_done: called after each subject.
    Raises:
      ValueError: a config that makes no spine.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
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
        # Spawned, not forked: the parent may hold jax's threads.
        context = multiprocessing.get_context("spawn")
        workers = min(len(jobs), multiprocessing.cpu_count())
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            for job in concurrent.futures.as_completed([pool.submit(make_and_write, *job) for job in jobs]):
                job.result()
                on_done()
    return [(subject, *scan_paths(folder, subject)) for subject in subjects]


def write_verse(phantom, folder, subject, axcodes="RAS"):
    """Write the VerSe files of a phantom, arrays stored along `axcodes`; returns {'ct', 'mask', 'centroids'} paths.

    The folder is made if missing. Raises ValueError if axcodes does not name each anatomical axis once.
    """
    import nibabel as nib

    axcodes = tuple(axcodes.upper())
    if len(axcodes) != 3 or sorted("RLAPSI".find(c) // 2 for c in axcodes) != [0, 1, 2]:
        raise ValueError(f"axcodes must name each anatomical axis once, as RAS or PIR do, got {axcodes}")
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(("R", "A", "S")), nib.orientations.axcodes2ornt(axcodes)
    )
    ras_from_stored = phantom.affine @ nib.orientations.inv_ornt_aff(turn, phantom.hu.shape)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "ct": folder / f"sub-{subject}_ct.nii.gz",
        "mask": folder / f"sub-{subject}_seg-vert_msk.nii.gz",
        "centroids": folder / f"sub-{subject}_seg-subreg_ctd.json",
    }
    for name, array in (("ct", phantom.hu), ("mask", phantom.mask)):
        nifti.write_nifti(paths[name], nib.orientations.apply_orientation(array, turn), ras_from_stored)
    write_centroids(paths["centroids"], phantom.centroids, ras_from_stored, axcodes)
    return paths


def write_centroids(path, points, ras_from_stored, axcodes):
    """Writes {label: (3,) RAS+ mm} as a VerSe centroid JSON, atomically: voxels of a label map, to a thousandth.

    Args:
      ras_from_stored: (4, 4) from that map's voxels, as they are stored along the three axis codes `axcodes`, to mm.
    Raises:
      ValueError: a point that is not finite.
    """
    stored_from_ras = np.linalg.inv(ras_from_stored)
    entries = [{"direction": list(axcodes)}]
    for label in sorted(points):
        voxel = solids.apply_affine(stored_from_ras, points[label])
        entries.append({"label": int(label), **{axis: round(float(c), 3) for axis, c in zip("XYZ", voxel)}})
    files.write_json(path, entries)


def make_and_write(seed, config, folder, subject, axcodes):
    """`make_phantom`, then `write_verse`: one job for a worker process, which then imports neither jax nor a network.

    Returns and raises what they do.
    """
    return write_verse(generate.make_phantom(seed, config), folder, subject, axcodes)
