"""`python -m experiments.cameras`: what a user types, what is written, and one line for what cannot be."""

import json

import nominal_views
import numpy as np
import pytest

from data_pipelines.cameras.conventions import Options
from data_pipelines.io import camera_files
from data_pipelines.simulation import carm
from data_pipelines.xrays import radiograph
from data_pipelines.xrays import view_geometry
from experiments import cameras
from radgs_jax import errors
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay

SIDE = 96
TAGS = {
    "DistanceSourceToDetector": 1124.0,
    "DistanceSourceToPatient": 700.0,
    "ImagerPixelSpacing": [3.0, 3.0],
    "Rows": SIDE,
    "Columns": SIDE,
}


@pytest.fixture
def carm_file(tmp_path):
    """A C-arm by its tags: an AP and a lateral view."""
    views = [TAGS | {"PositionerPrimaryAngle": a, "PositionerSecondaryAngle": 0.0} for a in (180.0, -90.0)]
    path = tmp_path / "carm.json"
    path.write_text(json.dumps(views))
    return path


def read(path):
    """The cameras of a cameras.json, as `register` reads them."""
    return [view_geometry.read_calibration(path, (SIDE, SIDE), i) for i in range(2)]


def test_a_c_arm_by_numbers_becomes_cameras_and_a_picture(tmp_path, carm_file, run_command):
    rng, xrays = np.random.default_rng(0), []
    for i in range(2):
        xrays.append(tmp_path / f"{i}.npy")
        np.save(xrays[-1], rng.random((SIDE, SIDE)).astype(np.float32))
    drawn = f"--xrays={xrays[0]},{xrays[1]}"
    done = run_command("cameras", "--from=dicom", f"--files={carm_file}", drawn, f"--out={tmp_path / 'cameras.json'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:3] == [
        "view 1: source 700.0 mm from the isocentre, at the patient's front; in the image up is H, right is L",
        "view 2: source 700.0 mm from the isocentre, at the patient's left; in the image up is H, right is P",
        "views 1 and 2: 90.0 degrees apart, central rays 0.0 mm from each other",
    ]
    assert (tmp_path / "cameras.png").read_bytes().startswith(b"\x89PNG")
    for view, angle in zip(read(tmp_path / "cameras.json"), (0.0, 90.0)):
        np.testing.assert_allclose(view.camera_from_world, carm.extrinsics(angle, 0.0, 700.0), atol=1e-9)
        np.testing.assert_allclose(view.intrinsics, [1124 / 3, 1124 / 3, 47.5, 47.5])


@pytest.mark.parametrize(
    "convention, suffix, flags",
    [
        ("diffdrr", "json", {}),
        ("xvr", "json", {}),
        ("itk", "json", {}),
        ("dicom", "json", {}),
        ("matrices", "json", {"unit": "m", "E": "world_from_camera"}),
        ("rtk", "xml", {"rows": "up", "image_origin": "centred", "pixel_mm": (3.0, 3.0)}),
        ("plastimatch", "txt", {"pixel_mm": (3.0, 3.0)}),
    ],
)
def test_there_and_back_is_the_same_cameras(tmp_path, carm_file, convention, suffix, flags):
    first, last, options = tmp_path / "cameras.json", tmp_path / "again.json", Options(**flags)
    cameras.from_convention("dicom", [carm_file], first)
    out = [tmp_path / f"{i}.{suffix}" for i in range(2 if convention == "plastimatch" else 1)]
    cameras.to_convention(convention, first, out, options)
    cameras.from_convention(convention, out, last, options, sizes=[(SIDE, SIDE)])
    for a, b in zip(read(first), read(last), strict=True):
        np.testing.assert_allclose(a.intrinsics, b.intrinsics, rtol=1e-6)
        np.testing.assert_allclose(a.camera_from_world, b.camera_from_world, atol=1e-4)


def test_dicom_files_give_the_cameras_of_their_own_pixels(tmp_path):
    """XA images are stored as an observer sees them, mirrored, which must be said, as to `register`."""
    paths, shown = [], []
    for i, angles in enumerate(((-20.0, 6.0), (75.0, -9.0))):
        view = Camera(np.array([1124 / 3, 1124 / 3, 47.5, 47.5]), carm.extrinsics(*angles, 700.0), SIDE, SIDE)
        xray = XRay(np.tile(np.linspace(0, 3, SIDE), (SIDE, 1)), np.ones((SIDE, SIDE), bool), view)
        paths.append(tmp_path / f"{i}.dcm")
        paths[-1].write_bytes(nominal_views.xa(xray, np.random.default_rng(i), 0.0, 0.0))
        shown.append(view)
    with pytest.raises(errors.InputError, match="only one flag mends it: --mirrored if"):
        cameras.from_convention("dicom", paths, tmp_path / "cameras.json")
    cameras.from_convention("dicom", paths, tmp_path / "cameras.json", Options(mirrored=True), xrays=paths)
    for i, (path, wanted) in enumerate(zip(paths, shown)):
        found = view_geometry.read_calibration(tmp_path / "cameras.json", (SIDE, SIDE), i, mirrored=True)
        for view in (found, radiograph.read(path).camera):
            np.testing.assert_allclose(view.intrinsics, wanted.intrinsics, atol=1e-6)
            np.testing.assert_allclose(view.camera_from_world, wanted.camera_from_world, atol=1e-6)


def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, carm_file, run_command):
    cameras.from_convention("dicom", [carm_file], tmp_path / "right.json")
    views = json.loads((tmp_path / "right.json").read_text())
    for view in views:
        view["E"] = np.linalg.inv(view["E"]).tolist()
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(views))
    before = sorted(tmp_path.iterdir())
    done = run_command("cameras", "--from=matrices", f"--files={wrong}", f"--out={tmp_path / 'cameras.json'}")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    mend = "only one flag mends it: --E=world_from_camera if E is the inverse, the camera's pose in the world"
    assert done.stderr.startswith(f"error: {wrong}: view 1: E: found") and mend in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda c, t: cameras.from_convention("dicom", [c], c), "a file that is read"),
        (lambda c, t: cameras.from_convention("dicom", [t / "none.json"], t / "o.json"), "found nothing"),
        (lambda c, t: cameras.from_convention("xvr", [t / "result.pt"], t / "o.json"), "wanted a .json, .npy or .npz"),
        (lambda c, t: cameras.from_convention("dicom", [c], t / "o.json", xrays=[c]), "content"),
        (
            lambda c, t: cameras.from_convention("dicom", [c], t / "o.json", xrays=_image(t)),
            "1 images, wanted one for each",
        ),
        (lambda c, t: cameras.from_convention("dicom", [c], t / "o.json", xrays=_image(t) * 2), "those of its camera"),
        (lambda c, t: cameras.to_convention("rtk", _own(c, t), [t / "o.xml"]), "--image_origin"),
        (
            lambda c, t: cameras.to_convention("plastimatch", _own(c, t), [t / "o.txt"]),
            "--out: found 1 files, wanted 2",
        ),
        (
            lambda c, t: cameras.to_convention("rtk", _own(c, t), [t / "o.xml"], Options(image_origin="centred")),
            "wanted --rows=up",
        ),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, carm_file, call, said):
    with pytest.raises(errors.InputError, match=said):
        call(carm_file, tmp_path)
    assert not list(tmp_path.glob("o.*"))


def _image(folder):
    np.save(folder / "image.npy", np.random.default_rng(0).random((50, 96)))
    return [folder / "image.npy"]


def _own(carm_file, folder):
    cameras.from_convention("dicom", [carm_file], folder / "cameras.json")
    return folder / "cameras.json"


def test_flags_are_checked(tmp_path, carm_file, run_command):
    given = f"--files={carm_file}", f"--out={tmp_path / 'o.json'}"
    done = run_command("cameras", *given)
    assert (done.returncode, done.stderr) == (2, "error: flags: --from, --to: found neither, wanted one of the two\n")
    done = run_command("cameras", *given, "--from=dicom", "--size=9by9")
    line = "flags: --size: found '9by9', wanted HEIGHTxWIDTH in pixels, such as 976x976"
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")


def test_a_written_camera_is_one_of_ours(tmp_path, carm_file):
    for value in json.loads(_own(carm_file, tmp_path).read_text()):
        assert camera_files.read_camera("cameras.json", "views", value, (SIDE, SIDE)).width == SIDE
