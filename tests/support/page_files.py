"""The files that a user of the page has: a phantom's CT and mask, two X-rays of it, and their cameras."""

import pathlib
import sys

import numpy as np

from data_pipelines import cases
from data_pipelines.io import files
from data_pipelines.phantom import scan_files
from data_pipelines.phantom.generate import PhantomConfig
from data_pipelines.simulation import case_files
from data_pipelines.simulation import quick

LABEL, VARIANT = 22, "real"
PHANTOM = PhantomConfig(spacing_mm=(1.5, 1.5, 2.0), levels=(20, 21, 22, 23, 24))


def write(folder, seed=31000):
    """Writes ct.nii.gz, mask.nii.gz, ap.npy, lateral.npy, cameras.json and bad.json; the centre of LABEL (u, v) in each view."""
    folder = pathlib.Path(folder)
    (subject,) = scan_files.phantoms(folder / "made" / "patient", [seed], PHANTOM)
    path = case_files.simulated_cases(
        folder / "made" / "cases.json", [subject], [LABEL], 1, [(10.0, 20.0)], seed, quick.PanelFaults(), (VARIANT,)
    )
    case_file = cases.read(path)
    (scene,) = case_file.scenes.values()
    volume = case_file.volumes[scene.volume]
    for source, name in ((volume.full_ct, "ct.nii.gz"), (volume.full_mask, "mask.nii.gz")):
        (folder / name).write_bytes(pathlib.Path(source).read_bytes())
    return folder, write_views(folder, case_file, scene, VARIANT)


def write_views(folder, case_file, scene, variant):
    """Writes the X-rays and cameras of a scene, and a JSON file that is none; the vertebra's centre (u, v) in each view."""
    for name, xray in zip(("ap.npy", "lateral.npy"), cases.read_xrays(scene, variant)):
        np.save(folder / name, np.asarray(xray.line_integrals, np.float32))
    cameras, centres = [], []
    centre = cases.truth(case_file, scene) @ [*cases.points(case_file, scene.volume).mean(0), 1.0]
    for view in scene.cameras:
        fx, fy, cx, cy = map(float, view.intrinsics)
        K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        cameras.append({"K": K.tolist(), "E": np.asarray(view.camera_from_world, float).tolist()})
        seen = K @ (np.asarray(view.camera_from_world, float) @ centre)[:3]
        centres.append((seen[:2] / seen[2]).tolist())
    files.write_json(folder / "cameras.json", cameras)
    (folder / "bad.json").write_text("{")
    return centres


if __name__ == "__main__":
    print(write(sys.argv[1])[1])
