"""Two X-rays of one acquisition: not the same image, one patient, one table position, two cameras."""

import json

import dicom_forms
import numpy as np
import pytest
import xray_files

from data_pipelines.xrays import radiograph
from radgs_jax import errors

SHAPE = (160, 160)
OPTIONS = radiograph.ReadOptions(collimator=False)


def cameras(tmp_path, name="views.json", turn=np.pi / 2):
    """A calibration of two views from different sides."""
    K, E, _ = xray_files.projection()
    K[0, 0] = K[1, 1]
    K[:2, 2] = 79.5
    c, s = np.cos(turn), np.sin(turn)
    turned = E @ np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    return xray_files.written(tmp_path, name, [{"P": (K @ e[:3]).tolist()} for e in (E, turned)])


def acquired(tmp_path, first=None, second=None, nominal=False):
    """Reads two X-rays with changed tags."""
    paths = []
    for name, seed, angle, tags in (("ap", 0, 0.0, first), ("lat", 3, 90.0, second)):
        tags = {"ImagerPixelSpacing": [0.2, 0.2], "PositionerPrimaryAngle": angle, **(tags or {})}
        paths.append(
            dicom_forms.saved(tmp_path / f"{name}.dcm", dicom_forms.header(dicom_forms.body(SHAPE, seed=seed), **tags))
        )
    return radiograph.read_views(paths, None if nominal else cameras(tmp_path), OPTIONS)


FORMS = {
    "same": lambda image: image,
    "mirrored": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1],
    "turned by 180 degrees": lambda image: image[::-1, ::-1],
    "transposed": lambda image: image.T,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kinds", [("npy", "npy"), ("png", "npy"), ("png", "dcm"), ("dcm", "dcm")])
def test_the_same_image_twice_is_refused(form, kinds, tmp_path):
    image = dicom_forms.body(SHAPE)
    paths = []
    for index, kind in enumerate(kinds):
        shown = np.ascontiguousarray(FORMS[form](image)) if index else image
        path = tmp_path / f"{index}.{kind}"
        if kind == "npy":
            np.save(path, shown)
        elif kind == "png":
            path.write_bytes(xray_files.png(shown))
        else:
            dicom_forms.saved(path, dicom_forms.header(shown))
        paths.append(path)
    options = radiograph.ReadOptions(values="intensity", collimator=False)
    with pytest.raises(errors.InputError, match="1.*: pixels: found the same pixels as in .*0") as caught:
        radiograph.read_views(paths, cameras(tmp_path), options)
    assert form == "same" or form in str(caught.value)


@pytest.mark.parametrize("change", ["brighter", "inverted", "eight bits", "floats"])
def test_the_same_image_in_other_numbers_is_refused(change, tmp_path):
    image = dicom_forms.body(SHAPE).astype(np.float64)
    other = {
        "brighter": 1.5 * image + 20,
        "inverted": 9000 - image,
        "eight bits": image // 16 * 16,
        "floats": image / 7,
    }
    np.save(tmp_path / "a.npy", image)
    np.save(tmp_path / "b.npy", other[change][:, ::-1])
    options = radiograph.ReadOptions(values="intensity", collimator=False)
    with pytest.raises(
        errors.InputError, match=r"b.npy: pixels: found the same image as in .*\(mirrored\), with other numbers"
    ):
        radiograph.read_views([tmp_path / "a.npy", tmp_path / "b.npy"], cameras(tmp_path), options)


def test_two_exposures_that_look_alike_are_two(tmp_path):
    """The same body, with other noise and moved by two pixels."""
    image = dicom_forms.body((SHAPE[0], SHAPE[1] + 2)).astype(np.float64)
    rng = np.random.default_rng(1)
    np.save(tmp_path / "a.npy", rng.poisson(image[:, 2:]))
    np.save(tmp_path / "b.npy", rng.poisson(image[:, :-2]))
    options = radiograph.ReadOptions(values="intensity", collimator=False)
    assert len(radiograph.read_views([tmp_path / "a.npy", tmp_path / "b.npy"], cameras(tmp_path), options)) == 2


@pytest.mark.parametrize(
    "keyword, first, second",
    [("PatientID", "77123", "77124"), ("PatientName", "Doe^Jane", "Roe^Mary")]
    + [("PatientBirthDate", "19500101", "19510101"), ("PatientSex", "F", "M")],
)
def test_different_patients_are_refused_without_naming_them(keyword, first, second, tmp_path, caplog):
    with pytest.raises(
        errors.InputError, match=f"lat.dcm: {keyword}: found another than in .*ap.dcm: different patients"
    ) as caught:
        acquired(tmp_path, {keyword: first}, {keyword: second})
    for word in (first, second, "Jane", "Mary", "Doe", "Roe"):
        assert word not in str(caught.value).replace("different", "") and word not in caplog.text


@pytest.mark.parametrize(
    "first, second",
    [
        ("Doe^Jane", "DOE^JANE^^"),
        ("Doe^Jane", "doe  jane"),
        ("Doe^Jane", ""),
        (None, "Doe^Jane"),
        ("DOE^JANE", "DOE^JANE "),
    ],
)
def test_one_patient_may_be_written_in_several_ways(first, second, tmp_path):
    assert len(acquired(tmp_path, {"PatientName": first}, {"PatientName": second})) == 2


@pytest.mark.parametrize(
    "keyword, first, second, said",
    [
        ("StudyInstanceUID", "1.2.3", "1.2.4", "another study"),
        ("BodyPartExamined", "LSPINE", "CHEST", "'CHEST', and 'LSPINE' in"),
        ("Laterality", "L", "R", "'R', and 'L' in"),
        ("ImageLaterality", "L", "R", "'R', and 'L' in"),
    ],
)
def test_what_makes_one_acquisition_doubtful_is_said(keyword, first, second, said, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        assert len(acquired(tmp_path, {keyword: first}, {keyword: second})) == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"lat.dcm: {keyword}: found {said}" in line and "done: " in line and "\n" not in line and "1.2.4" not in line
    caplog.clear()
    acquired(tmp_path, {keyword: first}, {keyword: first})
    assert not caplog.records


def times(date, time):
    return {"AcquisitionDate": date, "AcquisitionTime": time}


@pytest.mark.parametrize(
    "first, second, hours",
    [
        (times("20260301", "101500"), times("20260301", "130000.5"), "2.8"),
        (times("20260301", "101500"), times("20260302", "101500"), "24.0"),
        ({"AcquisitionDateTime": "20260301101500.000000"}, {"AcquisitionDateTime": "20260301161500"}, "6.0"),
        (
            {"ContentDate": "20260301", "ContentTime": "0815"},
            {"ContentDate": "20260301", "ContentTime": "081600"},
            None,
        ),
        (times("20260301", "101500"), times("20260301", "102000"), None),
        (times("odd", "101500"), times("20260301", ""), None),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_hours_between_exposures_are_said(first, second, hours, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        acquired(tmp_path, first, second)
    lines = [record.getMessage() for record in caplog.records if record.name == "absl"]
    assert len(lines) == (hours is not None)
    if hours:
        assert f"lat.dcm: acquisition time: found {hours} hours from" in lines[0]


@pytest.mark.parametrize(
    "keyword, first, second, moved",
    [
        ("TableHeight", 850.0, 861.5, "11.5 mm"),
        ("TableTopLongitudinalPosition", -12.0, 20.0, "32.0 mm"),
        ("TableTopLateralPosition", 0.0, 5.0, "5.0 mm"),
        ("TableLateralIncrement", 0.0, 4.0, "4.0 mm"),
        ("TableAngle", 0.0, 3.0, "3.0 degrees"),
        ("TableHeight", 850.0, 851.0, None),
        ("TableAngle", 0.0, 0.5, None),
        ("TableHeight", None, 851.0, None),
    ],
)
def test_a_table_that_moved_is_refused_or_said(keyword, first, second, moved, tmp_path, caplog):
    """The C-arm's own geometry does not know it; a calibration may hold for the patient."""
    tags = {keyword: first}, {keyword: second}
    if moved is None:
        assert len(acquired(tmp_path, *tags, nominal=True)) == 2
        return
    with pytest.raises(
        errors.InputError, match=f"lat.dcm: {keyword}: found a table {moved} from where it is in .*ap.dcm"
    ):
        acquired(tmp_path, *tags, nominal=True)
    with caplog.at_level("WARNING"):
        assert len(acquired(tmp_path, *tags)) == 2
    assert f"lat.dcm: {keyword}: found a table {moved}" in caplog.text


def test_increments_of_a_moving_table_are_those_of_the_frame(tmp_path):
    runs = []
    for name, steps in (("a", [0.0, 1.0, 2.0]), ("b", [0.0, 8.0, 16.0])):
        frames = [dicom_forms.body(SHAPE, seed=len(runs) * 5 + k) for k in range(3)]
        tags = {
            "ImagerPixelSpacing": [0.2, 0.2],
            "PositionerPrimaryAngle": 90.0 * len(runs),
            "TableLongitudinalIncrement": steps,
        }
        runs.append(dicom_forms.saved(tmp_path / f"{name}.dcm", dicom_forms.header(frames, **tags)))
    assert len(radiograph.read_views(runs, None, OPTIONS, frames=[0, 0])) == 2
    with pytest.raises(errors.InputError, match="a table 15.0 mm"):
        radiograph.read_views(runs, None, OPTIONS, frames=[1, 2])


def test_one_camera_for_two_x_rays_is_refused(tmp_path):
    paths = []
    for seed in range(2):
        np.save(tmp_path / f"{seed}.npy", -np.log(dicom_forms.body(SHAPE, seed=3 * seed) / 4000.0).astype(np.float32))
        paths.append(tmp_path / f"{seed}.npy")
    first, second = (entry["P"] for entry in json.loads(cameras(tmp_path).read_text()))
    again = (-3.0 * np.array(first)).tolist()
    for name, value, found in (
        ("alone", {"P": first}, "found one camera for 2 X-rays"),
        ("matrix", first, "found one camera for 2 X-rays"),
        ("list", [{"P": first}], "views: found 1, wanted a list of 2"),
        ("views", {"views": [{"P": first}]}, "views: found 1, wanted a list of 2"),
        ("three", [{"P": first}] * 3, "views: found 3, wanted a list of 2"),
        ("named", {"ap": {"P": first}, "lat": {"P": second}}, "found cameras with names: ap, lat, wanted a list of 2"),
        ("equal", [{"P": first}, {"P": first}], "cameras: found one camera for .*0.npy and .*1.npy"),
        ("scaled", [{"P": first}, {"P": again}], "cameras: found one camera for .*0.npy and .*1.npy"),
    ):
        calibration = xray_files.written(tmp_path, f"{name}.json", value)
        with pytest.raises(errors.InputError, match=f"{name}.json: .*{found}") as caught:
            radiograph.read_views(paths, calibration)
        assert "\n" not in str(caught.value)
    assert len(radiograph.read_views(paths, cameras(tmp_path))) == 2
    same = {"ImagerPixelSpacing": [0.2, 0.2], "PositionerPrimaryAngle": 30.0}
    with pytest.raises(errors.InputError, match="geometry tags: cameras: found one camera for"):
        acquired(tmp_path, same, same, nominal=True)
