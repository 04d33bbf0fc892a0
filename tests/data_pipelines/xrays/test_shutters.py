"""Tags of collimator and shutter: what leaves next to nothing, lies outside, or contradicts the image."""

import dicom_forms
import numpy as np
import pytest
import xray_files

from data_pipelines.xrays import radiograph
from radgs_jax import errors

SHAPE = (300, 400)
OPTIONS = radiograph.ReadOptions(air=4000.0)


def edges(left, right, upper, lower, noun="Collimator"):
    return {
        f"{noun}Shape": "RECTANGULAR",
        f"{noun}LeftVerticalEdge": left,
        f"{noun}RightVerticalEdge": right,
        f"{noun}UpperHorizontalEdge": upper,
        f"{noun}LowerHorizontalEdge": lower,
    }


def circle(row, column, radius, noun="Shutter"):
    return {f"{noun}Shape": "CIRCULAR", f"CenterOfCircular{noun}": [row, column], f"RadiusOfCircular{noun}": radius}


def read(tmp_path, image, **tags):
    return radiograph.read(dicom_forms.saved(tmp_path / "xray.dcm", dicom_forms.header(image, **tags)), None, OPTIONS)


@pytest.mark.parametrize(
    "tags, share",
    [
        (edges(100, 160, 100, 139), "2.03%"),
        (edges(100, 110, 100, 110), "0.10%"),
        (circle(150, 200, 20), "1.05%"),
        (circle(2000, 2000, 300), "0.00%"),
        (edges(500, 800, 400, 700), "0.00%"),
        ({**edges(1, 200, 1, 300), **circle(150, 300, 90)}, "0.00%"),
        ({"ShutterShape": "POLYGONAL", "VerticesOfThePolygonalShutter": [10, 10, 10, 40, 40, 40]}, "0.3.%"),
    ],
)
def test_tags_that_leave_next_to_nothing_are_refused_with_the_share(tags, share, tmp_path):
    with pytest.raises(errors.InputError, match=rf"Shape .*: found {share} of the image left open, wanted 3% or more"):
        read(tmp_path, dicom_forms.body(SHAPE), **tags)


def test_a_small_field_is_said(tmp_path, caplog):
    image = np.full(SHAPE, 3, np.uint16)
    image[100:200, 150:270] = dicom_forms.body((100, 120))
    with caplog.at_level("WARNING"):
        got = read(tmp_path, image, **edges(151, 270, 101, 200))
    assert got.valid.sum() == 100 * 120
    assert [record.getMessage().split("xray.dcm: ")[1] for record in caplog.records] == [
        "CollimatorShape RECTANGULAR: found 10.0% of the image left open, done: only these pixels count",
        "pixels: found 10.0% usable: inside the collimator (DICOM tags), with signal and not saturated, "
        "done: only these count",
    ]


def test_edges_far_outside_are_said_and_open_blades_are_not(tmp_path, caplog):
    image = dicom_forms.body(SHAPE)
    with caplog.at_level("WARNING"):
        read(tmp_path, image, **edges(0, 401, -3, 301))
    assert not caplog.records
    with caplog.at_level("WARNING"):
        read(tmp_path, image, **edges(1, 800, 1, 600))
    assert "edges at 800, 600 in an image of 300 x 400" in caplog.text


def test_tags_that_contradict_the_image_are_said(tmp_path, caplog):
    v, u = np.mgrid[: SHAPE[0], : SHAPE[1]]
    field = (u > 60) & (u < 200) & (v > 40) & (v < 260)
    image = np.where(field, dicom_forms.body(SHAPE), 2).astype(np.uint16)
    with caplog.at_level("WARNING"):
        read(tmp_path, image, **edges(62, 200, 42, 260))
    assert "bright" not in caplog.text
    for number, tags in enumerate((edges(201, 340, 42, 260), edges(140, 340, 42, 260), circle(150, 300, 100))):
        caplog.clear()
        with caplog.at_level("WARNING"):
            try:
                read(tmp_path, image, **tags)
            except errors.InputError as error:
                assert "usable of" in str(error) or "none with signal" in str(error), number
        assert "of the bright pixels outside the field of the tags" in caplog.text, number


def test_a_shutter_that_trims_the_border_is_not_said(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        got = read(tmp_path, dicom_forms.body(SHAPE), **edges(20, 381, 15, 286, "Shutter"))
    assert not caplog.records and got.origin["collimator"] == "DICOM tags"
    assert got.origin["valid_share"] == pytest.approx(0.82, abs=0.01)


def test_tags_are_turned_with_the_image(tmp_path):
    image = dicom_forms.body(SHAPE)
    path = dicom_forms.saved(tmp_path / "xray.dcm", dicom_forms.header(image, **edges(1, 150, 1, 300)))
    plain = radiograph.read(path, None, OPTIONS)
    _, _, P = xray_files.projection()
    K = np.array([[-1, 0, SHAPE[1] - 1], [0, 1, 0], [0, 0, 1.0]])
    calibration = xray_files.written(tmp_path, "p.json", {"P": (K @ P).tolist()})
    dataset = dicom_forms.header(image, ImagerPixelSpacing=None, **edges(1, 150, 1, 300))
    path = dicom_forms.saved(tmp_path / "bare.dcm", dataset)
    mirrored = radiograph.read(path, calibration, radiograph.ReadOptions(air=4000.0, mirrored=True))
    assert plain.valid[:, 250:].all() and not plain.valid[:, :250].any()  # shown as one who faces the patient sees it
    np.testing.assert_array_equal(mirrored.valid, plain.valid)
