"""Cameras of X-rays: they point where the C-arm pointed, and a calibration replaces the tags."""

import numpy as np
import pytest
import xray_files
from xray_files import SHAPE

from data_pipelines.io import camera_files
from data_pipelines.simulation import carm
from data_pipelines.xrays import radiograph
from radgs_jax import errors


@pytest.mark.parametrize(
    "primary, secondary, orientation",
    [(0, 0, None), (25, -12, None), (-90, 5, None), (90, 0, None), (180, 0, None), (35, 20, ["L", "F"])]
    + [(0, 0, ["F", "L"]), (0, 0, ["R", "F"]), (10, 5, ["L", "H"]), (12, -8, ["H", "R"]), (180, 0, ["L", "F"])],
)
def test_a_bead_is_where_the_standard_puts_it(primary, secondary, orientation, tmp_path):
    """Independent of carm: source, bead and panel in patient axes, and the image as the tags describe it."""
    a, b = np.radians([primary, secondary])
    detector = np.array([-np.sin(a) * np.cos(b), np.cos(a) * np.cos(b), np.sin(b)])  # its direction in R, A, S
    bead = np.array([2.0, -1.5, 1.2])
    source = -700.0 * detector
    hit = source + (bead - source) * 1100.0 / ((bead - source) @ detector)
    offset = hit - 400.0 * detector
    up = np.array([np.sin(a) * np.sin(b), -np.cos(a) * np.sin(b), np.cos(b)])  # towards the head, in the panel
    aside = np.cross(up, detector)  # to the right, for an observer at the panel who faces the source
    across, down = aside, -up  # image axes as that observer sees them
    if orientation is not None:
        left = aside if abs(primary) < 90 else -aside
        axes = {"L": left, "R": -left, "F": -up, "H": up}
        across, down = (axes[word] for word in orientation)
    dv, du = 0.2, 0.3
    column = offset @ across / du + 0.5 * (SHAPE[1] - 1)
    row = offset @ down / dv + 0.5 * (SHAPE[0] - 1)
    image = xray_files.pixels()
    image[int(np.rint(row)), int(np.rint(column))] = 4000
    got = xray_files.read_dicom(
        tmp_path,
        PixelData=image.tobytes(),
        PositionerPrimaryAngle=float(primary),
        PositionerSecondaryAngle=float(secondary),
        PatientOrientation=orientation,
        ImagerPixelSpacing=[dv, du],
    )
    view = got.camera
    assert (view.height, view.width) == got.line_integrals.shape
    point = view.camera_from_world[:3, :3] @ bead + view.camera_from_world[:3, 3]
    pixel = view.intrinsics[:2] * point[:2] / point[2] + view.intrinsics[2:]
    np.testing.assert_allclose((got.file_from_image @ [*pixel, 1])[:2], [column, row], atol=1e-6)
    nearest = np.rint(pixel).astype(int)
    assert got.line_integrals[nearest[1], nearest[0]] == got.line_integrals.min()
    swapped = orientation in (["F", "L"], ["H", "R"])
    assert got.pixel_mm == ((dv, du) if swapped else (du, dv))
    assert (got.source_detector_mm, got.source_isocentre_mm) == (1100.0, 700.0)


def test_dicom_angles_are_opposite_to_the_carms(tmp_path):
    for dicom_angles, ours in (((180.0, 0.0), (0, 0)), ((-90.0, 0.0), (90, 0)), ((-170.0, 7.0), (10, -7))):
        view = xray_files.read_dicom(
            tmp_path, PositionerPrimaryAngle=dicom_angles[0], PositionerSecondaryAngle=dicom_angles[1]
        ).camera
        np.testing.assert_allclose(view.camera_from_world, carm.extrinsics(*ours, 700.0), atol=1e-12)


def test_without_full_geometry_there_is_no_camera(tmp_path):
    for tags in ({"ImagerPixelSpacing": None}, {"DistanceSourceToPatient": 0.0}, {"FieldOfViewRotation": 90.0}):
        got = xray_files.read_dicom(tmp_path, **tags)
        assert got.camera is None and got.origin["camera"].startswith("none: ")


def test_a_calibration_replaces_the_tags_and_may_have_any_form(tmp_path):
    K, E, P = xray_files.projection()
    big = np.array([[4, 0, 1.5], [0, 4, 1.5], [0, 0, 1.0]]) @ P  # of an image of four times the size
    forms = {
        "p.json": {"P": P.tolist()},
        "ke.json": {"K": K.tolist(), "E": E.tolist()},
        "views.json": {"views": [{"P": np.eye(3, 4).tolist()}, {"P": P.tolist()}]},
        "named.json": {"lat": {"P": P.tolist()}},
        "binned.json": {"P": big.tolist(), "height": 4 * SHAPE[0] + 3, "width": 4 * SHAPE[1]},
        "p.txt": "\n".join(" ".join(map(repr, row)) for row in (-1e-5 * P).tolist()).encode(),
    }
    np.save(tmp_path / "p.npy", P)
    for name in [*forms, "p.npy"]:
        path = xray_files.written(tmp_path, name, forms[name]) if name in forms else tmp_path / name
        options = radiograph.ReadOptions(air=xray_files.AIR, collimator=False, view=1 if name == "views.json" else None)
        got = xray_files.read_dicom(tmp_path, options, path)
        np.testing.assert_allclose(got.camera.intrinsics, [3600, 5400, 27, 19], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(got.camera.camera_from_world, E, atol=1e-8, err_msg=name)
        np.testing.assert_array_equal(got.file_from_image, np.eye(3))
    with pytest.raises(
        errors.InputError, match="views.json: ReadOptions.view: found None, wanted a whole number from 0 to 1"
    ):
        xray_files.read_dicom(tmp_path, xray_files.XA, tmp_path / "views.json")


def test_a_mirrored_image_is_turned_with_its_calibration(tmp_path):
    _, E, P = xray_files.projection()
    stored = np.array([[-1, 0, SHAPE[1] - 1], [0, 1, 0], [0, 0, 1.0]]) @ P
    path = xray_files.written(tmp_path, "p.json", {"P": stored.tolist()})
    with pytest.raises(errors.InputError, match="a mirrored camera"):
        xray_files.read_dicom(tmp_path, xray_files.XA, path)
    got = xray_files.read_dicom(
        tmp_path, radiograph.ReadOptions(air=xray_files.AIR, collimator=False, mirrored=True), path
    )
    np.testing.assert_allclose(got.camera.intrinsics, [3600, 5400, 27, 19], rtol=1e-9)
    np.testing.assert_allclose(got.line_integrals, xray_files.expected()[:, ::-1], atol=1e-5)
    pixel = P @ [5.0, -7.0, 3.0, 1.0]
    in_file = stored @ [5.0, -7.0, 3.0, 1.0]
    np.testing.assert_allclose(got.file_from_image @ (pixel / pixel[2]), in_file / in_file[2], atol=1e-9)


def test_a_calibration_of_swapped_axes_disagrees_with_the_pixel_aspect(tmp_path):
    K, E, _ = xray_files.projection()
    K[0, 0], K[1, 1] = K[1, 1], K[0, 0]
    path = xray_files.written(tmp_path, "k.json", {"K": K.tolist(), "E": E.tolist()})
    with pytest.raises(errors.InputError, match="fx / fy: found 1.5, wanted 0.6667"):
        xray_files.read_dicom(tmp_path, xray_files.XA, path)
    xray_files.read_dicom(tmp_path, xray_files.XA, path, ImagerPixelSpacing=None)
    with pytest.raises(errors.InputError, match="fx / fy"):
        xray_files.read_dicom(tmp_path, xray_files.XA, path, ImagerPixelSpacing=None, PixelAspectRatio=[2, 3])


def test_the_view_is_one_that_a_case_file_takes(tmp_path):
    view = xray_files.read_dicom(tmp_path).camera
    again = camera_files.read_camera("case", "views[0]", camera_files.camera_json(view, "AP"), SHAPE)
    np.testing.assert_allclose(again.camera_from_world, view.camera_from_world)
