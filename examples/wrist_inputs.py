"""Turns Autoscoper's wrist data into inputs of `experiments.register`: CTs and masks as NIfTI, cameras as JSON (docs/real.md).

`python examples/wrist_inputs.py DATA OUT` reads the folder DATA with the bones' TIFF stacks and the calibrations of both cameras.
"""

import pathlib
import sys

import numpy as np
from PIL import Image

from data_pipelines.io import files
from data_pipelines.io import nifti

BONES = {"radius": "rad", "ulna": "uln"}
VOXEL_MM = (0.396, 0.396, 0.625)
"""Spacing of column, row and slice (the data's README)."""
STORED_AT_0_HU = 1024
"""What the stacks add to HU; 0 is what was cut away (the data's README, which calls both an assumption)."""
AIR_HU = -1000


def read_stack(path: pathlib.Path) -> np.ndarray:
    """The pages of a TIFF as (column, row, slice)."""
    with Image.open(path) as image:
        pages = []
        for page in range(image.n_frames):
            image.seek(page)
            pages.append(np.asarray(image))
    return np.stack(pages).transpose(2, 1, 0)


def read_camera(path: pathlib.Path) -> dict:
    """An Autoscoper calibration as a view of cameras.json: headings, each followed by rows of numbers."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]

    def rows(heading, count):
        first = lines.index(heading) + 1
        return np.array([[float(word) for word in line.split(",")] for line in lines[first : first + count]])

    width, height = rows("image size", 1)[0].astype(int).tolist()
    E = np.eye(4)
    E[:3, :3], E[:3, 3] = rows("rotation", 3), rows("translation", 3)[:, 0]
    return {"K": rows("camera matrix", 3).tolist(), "E": E.tolist(), "height": height, "width": width}


def main(data: pathlib.Path, out: pathlib.Path) -> None:
    """Writes OUT/radius.nii.gz, radius_mask.nii.gz, the same of the ulna, and cameras.json."""
    ct_from_index = np.diag([*VOXEL_MM, 1.0])
    for name, short in BONES.items():
        stored = read_stack(data / f"{short}_dcm_cropped.tif").astype(np.int16)
        # Voxels of air all round, so that no bone touches the border of its scan but where it was cut.
        inside = np.pad(stored > 0, 4)
        hu = np.where(inside, np.pad(stored, 4) - STORED_AT_0_HU, AIR_HU).astype(np.int16)
        nifti.write_nifti(out / f"{name}.nii.gz", hu, ct_from_index)
        nifti.write_nifti(out / f"{name}_mask.nii.gz", inside.astype(np.uint8), ct_from_index)
    views = [read_camera(data / f"xr_calib_wrist_cam0{number}.txt") for number in (1, 2)]
    files.write_json(out / "cameras.json", views)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:3]))
