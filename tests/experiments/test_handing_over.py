"""What a registration hands over to other programs: a scene for 3D Slicer and a DICOM registration, read independently."""

import collections
import dataclasses
import datetime
import re
import zipfile
from xml.etree import ElementTree

import ct_files
import nibabel
import numpy as np
import pydicom
import pytest
import xray_files

from data_pipelines.xrays.radiograph import Radiograph
from experiments.patients import registering
from experiments.reports import dicom_registration
from experiments.reports import surfaces
from experiments.reports.verdicts import Verdict
from radgs_jax import errors
from radgs_jax.registration.pipeline import RegisterOptions

QUICK = RegisterOptions(passes=1)
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
NOW = datetime.datetime(2026, 3, 4, 5, 6, 7)
ACCEPTED = Verdict(True, "accepted, within 0.3 mm")


def _moved(T, points):
    return points @ T[:3, :3].T + T[:3, 3]


class _Scene:
    """A scene as Slicer reads it: nodes by name, each with its file and the transform above it."""

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        assert self.archive.testzip() is None
        (self.mrml,) = [name for name in self.archive.namelist() if name.endswith(".mrml")]
        self.nodes = list(ElementTree.fromstring(self.archive.read(self.mrml)))
        self.by_id = {node.get("id"): node for node in self.nodes}
        assert len(self.by_id) == len(self.nodes)

    def named(self, tag):
        return {node.get("name"): node for node in self.nodes if node.tag == tag}

    def referred(self, node):
        pairs = (pair.split(":") for pair in (node.get("references") or "").split(";") if pair)
        return {role: self.by_id[name] for role, name in pairs}

    def file(self, node):
        folder = self.mrml.rpartition("/")[0]
        return self.archive.read(f"{folder}/{self.referred(node)['storage'].get('fileName')}")

    def world_from_node(self, node):
        above = self.referred(node).get("transform")
        return (
            np.eye(4) if above is None else np.array(above.get("matrixTransformToParent").split(), float).reshape(4, 4)
        )

    def volume(self, node):
        """(array, RAS from index) of the file, which must agree with the node."""
        header, _, data = self.file(node).partition(b"\n\n")
        fields = dict(line.split(": ") for line in header.decode().splitlines()[1:])
        assert (
            header.startswith(b"NRRD000")
            and fields["space"] == "left-posterior-superior"
            and fields["encoding"] == "raw"
        )
        vectors = [
            np.array(v.split(","), float)
            for v in re.findall(r"\((.*?)\)", fields["space directions"] + fields["space origin"])
        ]
        lps = np.eye(4)
        lps[:3] = np.stack(vectors, 1)
        kind = {"short": "<i2", "float": "<f4"}[fields["type"]]
        array = np.frombuffer(data, kind).reshape([int(n) for n in fields["sizes"].split()], order="F")
        spacing, origin, axes = (
            np.array(node.get(name).split(), float) for name in ("spacing", "origin", "ijkToRASDirections")
        )
        ras = np.eye(4)
        ras[:3, :3], ras[:3, 3] = axes.reshape(3, 3) * spacing, origin
        np.testing.assert_allclose(FLIP @ lps, ras, atol=1e-9)
        return array, ras

    def mesh(self, node):
        """(points, cells, numbers at the points or None) of a legacy VTK file, whose axes must be RAS."""
        data = self.file(node)
        title = data.split(b"\n", 2)[1]
        assert b"SPACE=RAS" in title and self.referred(node)["storage"].get("coordinateSystem") == "RAS"
        at = data.index(b"POINTS ")
        line, _, rest = data[at:].partition(b"\n")
        count = int(line.split()[1])
        points = np.frombuffer(rest, ">f4", 3 * count).reshape(-1, 3).astype(np.float64)
        line, _, rest = rest[12 * count + 1 :].partition(b"\n")
        cells, size = int(line.split()[1]), int(line.split()[2])
        listed = np.frombuffer(rest, ">i4", size).reshape(cells, -1)
        assert (listed[:, 0] == listed.shape[1] - 1).all() and listed[:, 1:].max() < count
        rest = rest[4 * size + 1 :]
        if not rest:
            return points, listed[:, 1:], None
        assert rest.startswith(b"POINT_DATA %d\nSCALARS" % count)
        return points, listed[:, 1:], np.frombuffer(rest.split(b"default\n", 1)[1], ">f4", count)


def _off_ray(camera, pixel, point):
    """Distance of a world point from the ray of a pixel (u, v), mm."""
    world_from_camera = np.linalg.inv(np.asarray(camera.camera_from_world, np.float64))
    k = np.asarray(camera.intrinsics, np.float64)
    ray = world_from_camera[:3, :3] @ [*((np.array(pixel) - k[2:]) / k[:2]), 1.0]
    away = point - world_from_camera[:3, 3]
    return np.linalg.norm(np.cross(ray / np.linalg.norm(ray), away))


def test_a_scene_has_the_ct_the_vertebra_and_the_xrays_where_the_pose_says(ready, rows, tmp_path):
    prepared, row = ready("refusing"), rows[0]
    done = registering.register_rows([row], lambda _: prepared, tmp_path / "out", QUICK, pictures=False, scenes=True)
    world_from_ct, vertebra = np.array(done.results[0]["T"]), prepared.vertebra
    assert [path.name for path in (tmp_path / "out" / row.name).iterdir()] == ["scene.mrb"]
    scene = _Scene(tmp_path / "out" / row.name / "scene.mrb")
    for node in scene.nodes:
        if scene.referred(node).get("storage") is not None:
            assert scene.file(node)
    volumes, models = scene.named("Volume"), scene.named("Model")

    # The CT is the file's, and its voxels move to where the pose puts them.
    source = nibabel.as_closest_canonical(nibabel.load(row.target.ct))
    hu, ct_from_index = scene.volume(volumes["CT"])
    np.testing.assert_allclose(ct_from_index, source.affine, atol=1e-9)
    assert np.array_equal(hu, source.get_fdata())
    np.testing.assert_array_equal(scene.world_from_node(volumes["CT"]), world_from_ct)
    assert scene.referred(volumes["CT"])["transform"].get("name") == "pose"

    # Surfaces enclose the vertebra's voxels, at each pose.
    first, last = (end(np.argwhere(vertebra.mask), 0) for end in (np.min, np.max))
    for pose, T in (("estimate", world_from_ct), ("start", row.start)):
        points, triangles, _ = scene.mesh(models[f"L2 {pose}"])
        shown = _moved(scene.world_from_node(models[f"L2 {pose}"]), points)
        voxels = _moved(np.linalg.inv(T @ vertebra.ct_from_index), shown)
        assert (np.abs(voxels.min(0) - (first - 0.25)) < 0.26).all() and (
            np.abs(voxels.max(0) - (last + 0.25)) < 0.26
        ).all()
        assert triangles.shape[1] == 3

    # Each pixel lies on its ray, behind the vertebra, as a voxel and as a vertex.
    for xray, name in zip(row.xrays(), ("X-ray 1, AP", "X-ray 2, lateral")):
        image, world_from_pixel = scene.volume(volumes[name])
        np.testing.assert_array_equal(image[:, :, 0], np.asarray(xray.line_integrals, np.float32).T)
        last = np.array(image.shape[:2]) - 1
        points, quads, numbers = scene.mesh(models[f"{name}, plane"])
        grid, shown = points.reshape(*image.shape[1::-1], 3), numbers.reshape(image.shape[1::-1])
        for pixel in ((0, 0), (last[0], 0), (0, last[1]), last, last // 2):
            assert _off_ray(xray.camera, pixel, _moved(world_from_pixel, np.array([*pixel, 0.0]))) < 1e-3
            assert _off_ray(xray.camera, pixel, grid[pixel[1], pixel[0]]) < 1e-3
            assert shown[pixel[1], pixel[0]] == image[pixel[0], pixel[1], 0]
        assert len(quads) == last.prod() and scene.referred(volumes[name]).keys() == {"display", "storage"}
        cone, edges, _ = scene.mesh(models[f"{name}, source and cone"])
        centre = _moved(world_from_ct, vertebra.ct_from_box[:3, 3])
        E = np.asarray(xray.camera.camera_from_world)
        np.testing.assert_allclose(_moved(E, cone[0]), 0.0, atol=1e-3)
        assert (_moved(E, cone[1:])[:, 2] > _moved(E, centre)[2]).all() and edges.shape == (8, 2)


def test_a_masks_surface_is_closed_near_it_and_seen_from_outside():
    """A ball in voxels that are not cubes, in mirrored axes as well, and a plate of one voxel, which stays."""
    index = np.stack(np.meshgrid(*map(np.arange, (25, 33, 17)), indexing="ij"), -1)
    for mirror in (1.0, -1.0):
        frame_from_index = np.diag([mirror * 0.8, 0.6, 1.2, 1.0])
        centre, radius = _moved(frame_from_index, np.array([12.2, 15.9, 8.1])), 8.0
        mask = np.linalg.norm(_moved(frame_from_index, index) - centre, axis=-1) < radius
        vertices, triangles = surfaces.surface(mask, frame_from_index)
        distances = np.linalg.norm(vertices - centre, axis=1) - radius
        assert abs(distances.mean()) < 0.15 and np.abs(distances).max() < 0.6
        edges = collections.Counter(map(tuple, np.concatenate([triangles[:, [i, (i + 1) % 3]] for i in range(3)])))
        assert set(edges.values()) == {1} and all((b, a) in edges for a, b in edges)
        a, b, c = np.moveaxis(vertices[triangles] - centre, 1, 0)
        assert np.einsum("ni,ni->n", a, np.cross(b, c)).sum() / 6 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.05)
    plate = np.zeros((9, 9, 9), bool)
    plate[4, 2:7, 2:7] = True
    vertices, _ = surfaces.surface(plate, np.eye(4))
    assert np.ptp(vertices[:, 0]) > 0.3 and np.ptp(vertices[:, 1]) > 3.9


@pytest.fixture
def dicom_case(rows, tmp_path):
    """The first case, with a CT and X-rays in DICOM: (row, headers of the CT, headers of the X-rays)."""
    ct = ct_files.slices()
    for header in ct:
        header.StudyInstanceUID, header.PatientName, header.PatientAge = "1.2.3.4", "Doe^J", "044Y"
        header.StudyDate, header.OtherPatientIDs = "20260102", "secret"
        with pydicom.config.disable_value_validation():
            header.StudyID = "longer than the standard allows"
    ct_files.write_series(tmp_path / "ct", ct)
    views, seen = [], []
    for number, xray in enumerate(rows[0].xrays()):
        path = tmp_path / f"{number}.dcm"
        uids = {
            "StudyInstanceUID": "1.2.3.5",
            "SeriesInstanceUID": "1.2.3.5.1",
            "SOPInstanceUID": f"1.2.3.5.1.{number + 1}",
        }
        path.write_bytes(xray_files.dicom(PatientID="p", FrameOfReferenceUID="1.2.3.6", **uids))
        seen.append(pydicom.dcmread(path))
        parts = xray.line_integrals, xray.valid, xray.camera
        views.append(Radiograph(*parts, None, None, None, np.eye(3), {"file": str(path)}))
    target = dataclasses.replace(rows[0].target, ct=tmp_path / "ct")
    return dataclasses.replace(rows[0], target=target, xrays=views), ct, seen


def _matrix(item):
    ((registration,), (matrix,)) = item.MatrixRegistrationSequence, item.MatrixRegistrationSequence[0].MatrixSequence
    assert (
        matrix.FrameOfReferenceTransformationMatrixType == "RIGID"
        and len(registration.RegistrationTypeCodeSequence) == 1
    )
    return np.array(matrix.FrameOfReferenceTransformationMatrix, float).reshape(4, 4)


def test_a_dicom_registration_moves_points_of_the_ct_into_the_c_arms_frame(ready, dicom_case, tmp_path):
    row, ct, seen = dicom_case
    done = registering.register_rows([row], lambda _: ready("accepting"), tmp_path / "out", QUICK)
    written = pydicom.dcmread(tmp_path / "out" / row.name / "registration.dcm")
    assert written.SOPClassUID == pydicom.uid.SpatialRegistrationStorage and written.Modality == "REG"
    world, of_ct = written.RegistrationSequence
    assert of_ct.FrameOfReferenceUID == ct[0].FrameOfReferenceUID and len(of_ct.ReferencedImageSequence) == len(ct)
    assert world.FrameOfReferenceUID == written.FrameOfReferenceUID != seen[0].FrameOfReferenceUID
    np.testing.assert_array_equal(_matrix(world), np.eye(4))
    # A point of the CT in LPS, as DICOM writes places, goes where world_from_ct puts it, in LPS of the C-arm.
    point = np.array([-31.0, 47.0, -285.0, 1.0])
    wanted = FLIP @ np.array(done.results[0]["T"]) @ FLIP @ point
    np.testing.assert_allclose(_matrix(of_ct) @ point, wanted, atol=1e-6)
    # The CT's patient and study, and no more of the patient; the X-rays are in another study.
    assert (written.PatientName, written.PatientID, written.StudyInstanceUID) == ("Doe^J", "p", "1.2.3.4")
    assert written.StudyID == ct[0].StudyID and "PatientAge" not in written and "OtherPatientIDs" not in written
    (series,) = written.ReferencedSeriesSequence
    assert {i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence} == {d.SOPInstanceUID for d in ct}
    (other,) = written.StudiesContainingOtherReferencedInstancesSequence
    instances = other.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert other.StudyInstanceUID == "1.2.3.5" and len(instances) == 2
    # What the standard requires, empty where nothing is known (types 1 and 2 of PS3.3 A.39.1).
    for name in (
        "PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName SeriesNumber"
        " PositionReferenceIndicator Manufacturer ContentDate ContentTime InstanceNumber ContentLabel ContentDescription"
        " ContentCreatorName SeriesInstanceUID SOPInstanceUID"
    ).split():
        assert name in written, name
    assert written.ContentDescription.startswith("L2: accepted, within 0.")


def test_vertebrae_of_the_same_xrays_share_the_c_arms_frame_and_other_cameras_have_another(dicom_case):
    row, ct, seen = dicom_case
    made = lambda views, pose: dicom_registration.registration(ct, seen, views, pose, "L1", NOW).FrameOfReferenceUID
    other = dataclasses.replace(row.xrays[0].camera, intrinsics=row.xrays[0].camera.intrinsics + 1.0)
    moved = [dataclasses.replace(row.xrays[0], camera=other), row.xrays[1]]
    assert made(row.xrays, np.eye(4)) == made(row.xrays, row.start) != made(moved, row.start)


def test_no_dicom_registration_without_dicom_on_both_sides_or_of_a_refused_pose(dicom_case, rows, tmp_path):
    row, path = dicom_case[0], tmp_path / "registration.dcm"
    write = lambda ct, xrays, said: dicom_registration.write(path, ct, xrays, row.start, "L2", said)
    assert not write(rows[0].target.ct, row.xrays, ACCEPTED)
    assert not write(row.target.ct, rows[0].xrays(), ACCEPTED)
    assert not write(row.target.ct, row.xrays, Verdict(False, "REFUSED"))
    assert not path.exists()
    assert write(row.target.ct, row.xrays, Verdict(None, "NOT JUDGED")) and path.exists()


def test_what_a_registration_needs_of_the_ct_is_said_where_it_is_missing(dicom_case, tmp_path, caplog):
    row, ct, seen = dicom_case
    seen[0].PatientID = "another"
    with pytest.raises(errors.InputError, match="PatientID: found another than in the X-rays"):
        dicom_registration.registration(ct, seen, row.xrays, row.start, "L2", NOW)
    for header in ct:
        del header.FrameOfReferenceUID
    ct_files.write_series(tmp_path / "bare", ct)
    arguments = tmp_path / "bare", row.xrays, row.start, "L2", ACCEPTED
    assert not dicom_registration.write(tmp_path / "no.dcm", *arguments)
    assert "FrameOfReferenceUID: found nothing" in caplog.text and not (tmp_path / "no.dcm").exists()
