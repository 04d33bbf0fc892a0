"""Files of every kind that the program reads, and how each is read, for tests that damage them."""

import dataclasses
import io
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import ct_files
import jax
import jax.numpy as jnp
import malformed_arrays
import malformed_xrays
import mutations
import numpy as np
import sealed_files
import tiny
import xray_files
from PIL import Image
from pydicom.uid import JPEG2000Lossless
from pydicom.uid import JPEGLosslessSV1
from pydicom.uid import RLELossless

from data_pipelines import cases
from data_pipelines.ct import centroid_files
from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from data_pipelines.io import files
from data_pipelines.io import nifti
from data_pipelines.io import pose_files
from data_pipelines.phantom import scan_files
from data_pipelines.xrays import radiograph
from data_pipelines.xrays import view_geometry
from experiments import configs
from experiments.localizers import localizer_files
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients import workdir as workdirs
from experiments.reports import case_folder
from experiments.training import checkpoint
from radgs_jax.models import radgs_reg
from radgs_jax.models import trained

RAW = {"values": "intensity", "air": 4000.0, "collimator": False}


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
      paths: the files to damage, one at a time.
      read: reads them all or the one that was damaged, and asserts that what it returns is possible.
      right: what `read` may return, where the files are sealed; or else None.
    """

    paths: list[pathlib.Path]
    read: Callable[[pathlib.Path], Any]
    right: tuple | None = None


def _affine(matrix):
    assert matrix.shape == (4, 4) and np.isfinite(matrix).all() and abs(np.linalg.det(matrix)) > 0


def _volume(array, affine):
    assert array.ndim == 3 and array.size and np.isfinite(array).all()
    _affine(affine)


def _camera(view):
    assert np.isfinite(view.intrinsics).all() and (view.intrinsics[:2] > 0).all() and view.height > 0 and view.width > 0
    _affine(view.camera_from_world)


def _xray(image):
    low, high = radiograph.LINE_INTEGRAL_RANGE
    line, valid = np.asarray(image.line_integrals), np.asarray(image.valid)
    assert (
        line.ndim == 2 and line.shape == valid.shape and valid.any() and valid.dtype == bool and np.isfinite(line).all()
    )
    if isinstance(image, radiograph.Radiograph):
        assert low <= line.min() and line.max() <= high
    if image.camera is not None:
        _camera(image.camera)


# The files.


def _drawn():
    """A scan of few values: bricks of bone in a body in air, 4 mm; (hu, labels, affine)."""
    hu, labels = np.full((25, 22, 30), -1000, np.int16), np.zeros((25, 22, 30), np.uint8)
    hu[3:22, 3:19] = 40
    for number, low in ((20, 20), (21, 12), (22, 4)):
        hu[8:17, 6:14, low : low + 6] = 300 + 40 * (number - 20)
        labels[8:17, 6:14, low : low + 6] = number
    return hu, labels, np.diag([4.0, 4.0, 4.0, 1.0])


def _scan(folder):
    hu, labels, affine = _drawn()
    for name, array in (("ct", hu), ("mask", labels)):
        for ending in ("nii", "nii.gz"):
            nifti.write_nifti(folder / f"{name}.{ending}", array, affine)


def _ct(folder):
    _scan(folder)

    def read(path):
        _volume(*scans.read_ct(path))
        scan = scans.read_scan(path, folder / "mask.nii.gz")
        assert set(scan.boxes) == {20, 21, 22} and scan.hu.dtype in (np.int16, np.float32)

    return Kind([folder / "ct.nii", folder / "ct.nii.gz"], read)


def _mask(folder):
    _scan(folder)

    def read(path):
        for label_map in ("lumbar:20-24", None):
            labels, affine = segmentation.read_labels(path, label_map)
            _volume(labels, affine)
            assert labels.dtype == np.uint8 and labels.any()
        assert scans.read_scan(folder / "ct.nii.gz", path).boxes

    return Kind([folder / "mask.nii", folder / "mask.nii.gz"], read)


def _mask_folder(folder):
    _, labels, affine = _drawn()
    for number in (20, 21, 22):
        nifti.write_nifti(folder / f"vertebrae_L{number - 19}.nii.gz", (labels == number).astype(np.uint8), affine)

    def read(path):
        labels, affine = segmentation.read_labels(folder)
        _volume(labels, affine)
        assert labels.any() and set(np.unique(labels)) <= {0, 20, 21, 22}

    return Kind(sorted(folder.iterdir()), read)


def _series(folder):
    ct_files.write_series(folder / "series", ct_files.slices())
    packed = ct_files.slices()
    for piece in packed:
        frame = ct_files.jpeg_lossless(np.frombuffer(piece.PixelData, np.uint16).reshape(piece.Rows, piece.Columns))
        piece.PixelData = xray_files.pydicom.encaps.encapsulate([frame])
        piece["PixelData"].VR = "OB"
        piece.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    ct_files.write_series(folder / "packed", packed)
    (folder / "frames").mkdir()
    ct_files.enhanced().save_as(folder / "frames" / "ct.dcm", enforce_file_format=True)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return Kind(paths, lambda path: _volume(*scans.read_ct(path if path.parent.name == "frames" else path.parent)))


def _dicom(folder):
    image = xray_files.pixels()
    (folder / "other.dcm").write_bytes(
        xray_files.dicom(PositionerPrimaryAngle=-80.0, PixelData=(image + 7 * image % 101).tobytes())
    )
    border = {"ShutterLeftVerticalEdge": 4, "ShutterRightVerticalEdge": 50, "ShutterUpperHorizontalEdge": 3}
    table = xray_files.pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], np.arange(4096, dtype="<u2").tobytes()
    table["LUTData"].VR, table.ModalityLUTType = "OW", "US"
    written = {
        "plain": xray_files.dicom(),
        "frames": xray_files.dicom(NumberOfFrames=3, PixelData=3 * image.tobytes()),
        "table": xray_files.dicom(ModalityLUTSequence=[table]),
        "shutter": xray_files.dicom(ShutterShape="RECTANGULAR", ShutterLowerHorizontalEdge=36, **border),
        "run_lengths": xray_files.encapsulated(RLELossless, malformed_xrays.rle(image)),
        "jpeg_2000": xray_files.encapsulated(JPEG2000Lossless, ct_files.jpeg_2000(image)),
        "jpeg": xray_files.encapsulated(JPEGLosslessSV1, ct_files.jpeg_lossless(image)),
    }
    for name, data in written.items():
        (folder / f"{name}.dcm").write_bytes(data)

    def read(path):
        frame = 1 if path.name == "frames.dcm" else None
        _xray(radiograph.read(path, None, dataclasses.replace(xray_files.XA, frame=frame)))
        if frame is None:
            views = radiograph.read_views([folder / "other.dcm", path], None, xray_files.XA)
            assert [_xray(view) for view in views] and all(view.camera is not None for view in views)

    return Kind([folder / f"{name}.dcm" for name in written], read)


def _picture(folder):
    image = xray_files.pixels()
    grey = (image // 16).astype(np.uint8)
    deep, page = Image.fromarray(image), {"save_all": True, "append_images": [Image.fromarray(image)]}
    written = {
        "deep.png": xray_files.png(image),
        "grey8.png": xray_files.png(grey),
        "colours8.png": xray_files.png(np.repeat(grey[..., None], 3, 2)),
        "plain.tif": xray_files.saved(deep, "TIFF"),
        "packed.tif": xray_files.saved(deep, "TIFF", compression="tiff_adobe_deflate"),
        "lzw.tif": xray_files.saved(deep, "TIFF", compression="tiff_lzw"),
        "pages.tif": xray_files.saved(deep, "TIFF", **page),
        "grey8.jpg": xray_files.saved(Image.fromarray(grey), "JPEG"),
    }
    for name, data in written.items():
        (folder / name).write_bytes(data)

    def read(path):
        options = {"bits": 8, "air": 250.0} if "8." in path.name else {}
        frame = 1 if path.name.startswith("pages") else None
        _xray(radiograph.read(path, None, radiograph.ReadOptions(**{**RAW, **options}, frame=frame)))

    return Kind([folder / name for name in written], read)


def _array(folder):
    image = xray_files.pixels()
    written = {
        "whole.npy": xray_files.npy(image),
        "real.npy": xray_files.npy(image.astype(">f8")),
        "frames.npy": xray_files.npy(np.stack([image] * 6)),
        "x.nii": xray_files.nifti(image.T[:, :, None]),
    }
    written["y.nii.gz"] = mutations.gzip.compress(written["x.nii"], mtime=0)
    for name, data in written.items():
        (folder / name).write_bytes(data)

    def read(path):
        frame = 3 if path.name.startswith("frames") else None
        _xray(radiograph.read(path, None, radiograph.ReadOptions(**RAW, frame=frame)))

    return Kind([folder / name for name in written], read)


def _case_document():
    document = malformed_arrays.case_document()
    document["scenes"][0].update(valid="valid.npz", views=2 * document["scenes"][0]["views"])
    document["volumes"]["v"]["points"] = [[1.0, 2.0, 3.0]] * 3
    return document


def _case_file(folder, damaged):
    line = np.linspace(0.5, 3, 64, dtype=np.float32) * np.ones((2, 64, 1), np.float32)
    files.write_npz(folder / "x.npz", full=line, real=line + 0.1)
    files.write_npz(folder / "valid.npz", full=line > 0.6, real=line > 0.6)
    files.write_json(folder / "cases.json", _case_document())

    def read(path):
        found = cases.read(folder / "cases.json")
        for case in found.cases:
            _affine(case.world_from_ct)
            scene = found.scenes[case.scene]
            for view in cases.read_xrays(scene, "full"):
                _xray(view)
            _affine(cases.truth(found, scene))
            assert cases.points(found, scene.volume).shape[1] == 3
            assert cases.NAME.fullmatch(case.name) and cases.NAME.fullmatch(scene.name)

    return Kind([folder / name for name in damaged], read)


def _calibration(folder):
    K, E, P = xray_files.projection()
    turned = E @ np.array([[0, 0, 1.0, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
    views = [{"P": P.tolist()}, {"K": K.tolist(), "E": turned.tolist(), "height": 80, "width": 112}]
    files.write_json(folder / "list.json", views)
    files.write_json(folder / "views.json", {"views": views})
    files.write_json(folder / "names.json", {"ap": views[0], "lat": views[1]})
    files.write_json(folder / "both.json", [{**views[0], "K": K.tolist(), "E": E.tolist()}, views[1]])
    (folder / "P.txt").write_text("\n".join(" ".join(map(str, row)) for row in P))
    (folder / "P.npy").write_bytes(xray_files.npy(P))

    def read(path):
        named = path.name == "names.json"
        if path.suffix == ".json" and not named:
            view_geometry.check_count(path, 2)
        for view in ("ap", "lat") if named else (0, 1) if path.suffix == ".json" else (None,):
            _camera(view_geometry.read_calibration(path, xray_files.SHAPE, view))

    return Kind(sorted(folder.iterdir()), read)


def _pose(folder):
    pose = np.linalg.inv(xray_files.projection()[1])
    files.write_json(folder / "T.json", pose.tolist())
    files.write_json(folder / "pose.json", {"world_from_ct": pose.tolist(), "accepted": True, "uncertainty_mm": 0.2})
    files.write_json(folder / "results.json", {"results": [{"id": "a", "T": pose.tolist()}]})
    (folder / "pose.tfm").write_text(case_folder.itk_transform(pose))
    return Kind(sorted(folder.iterdir()), lambda path: _affine(pose_files.read_pose(path)))


def _settings(folder):
    """Rules and centres in folders without checksums."""
    shutil.copy(models.base_folder() / workdirs.CALIBRATION, folder / workdirs.CALIBRATION)
    _scan(folder)
    scan = scans.read_scan(folder / "ct.nii.gz", folder / "mask.nii.gz")
    centres = [{"label": label, "X": 12.0, "Y": 9.5, "Z": z} for label, z in ((20, 23.0), (21, 15), (22, 7))]
    files.write_json(folder / "centres.json", [{"direction": ["R", "A", "S"]}, *centres])

    def read(path):
        if path.name == "centres.json":
            assert all(np.isfinite(centre).all() for centre in centroid_files.read_centroids(path, scan).values())
        else:
            rule = workdirs.read_rule(path)
            assert (rule is None) == (not path.exists())
            assert rule is None or rule.radius > 0 and min(rule.thresholds) >= workdirs.LEAST_CHANCE

    return Kind([folder / workdirs.CALIBRATION, folder / "centres.json"], read)


def _localizer(folder):
    localizer = localizer_files.read_localizer(models.base_folder() / "detector.npz")
    localizer_files.write_localizer(folder / "detector.npz", localizer, "alone")
    path = folder / "detector.npz"
    return Kind([path], sealed_files.read_localizer, (sealed_files.read_localizer(path),))


def _old_localizer(folder):
    """A localizer as older versions wrote it, without a checksum: only its header is damaged."""
    arrays = dict(np.load(models.base_folder() / "detector.npz"))
    header = {k: v for k, v in json.loads(str(arrays.pop("header"))).items() if k not in ("sha256", "arrays")}
    (folder / "header.json").write_text(json.dumps(header))

    def read(path):
        stream = io.BytesIO()
        np.savez(stream, header=np.array(path.read_text(errors="replace") if path.exists() else ""), **arrays)
        try:
            (folder / "detector.npz").write_bytes(stream.getvalue())
            found = localizer_files.read_localizer(folder / "detector.npz")
            assert all(np.isfinite(centre).all() and centre.shape == (3,) for centre in found.centres_ct.values())
        finally:
            (folder / "detector.npz").unlink()

    return Kind([folder / "header.json"], read)


def _folder_kind(folder, read):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return Kind(paths, lambda path: read(folder), (read(folder),))


def _base(folder):
    shutil.copytree(models.base_folder(), folder / "base")
    return _folder_kind(folder / "base", sealed_files.read_base)


def _tiny_model(folder):
    params = jax.device_get(jax.jit(lambda key: radgs_reg.init(tiny.MODEL, key))(jax.random.key(3)))
    shapes = {0: np.zeros(trained.MEAN_SHAPE, np.float16), 21: np.zeros(trained.MEAN_SHAPE, np.float16)}
    models.save_model(folder, trained.Model(params, tiny.MODEL, shapes), "untrained")


def _model(folder):
    _tiny_model(folder / "model")
    return _folder_kind(folder / "model", lambda place: models.model_hash(models.load_model(place)))


def _workdir(folder):
    subject, ct, mask = scan_files.phantoms(folder / "scans", [30005], tiny.config().phantom)[0]
    _tiny_model(folder / "base")
    rule = workdirs.read_rule(models.base_folder() / workdirs.CALIBRATION)
    target, config = workdirs.Target(subject, ct, mask, 21), tiny.config(refine=configs.DEMO.refine)
    preparing.prepare(config, folder / "workdir", [target], folder / "base", minutes=0, rule=rule)
    return _folder_kind(folder / "workdir", sealed_files.read_workdir(target))


def _checkpoints(folder):
    rng = np.random.default_rng(0)
    state = {"params": {f"w{i}": rng.normal(size=(40, 30)).astype(np.float32) for i in range(3)}, "count": np.int32(0)}
    for step in (7, 9):
        state = jax.tree.map(lambda leaf: leaf + 1, state)
        checkpoint.save_state(folder / "stage", step, jax.tree.map(jnp.asarray, state), {"step": step}, 2)
    like, right = jax.tree.map(jnp.asarray, state), []

    def read(path):
        step, found, place, skipped = checkpoint.load_state(folder / "stage", like)
        return step, sealed_files.fingerprint(found), str(place), skipped

    right.append(read(None))
    set_aside = (folder / "stage" / "step_9").rename(folder / "step_9")
    right.append(read(None))
    set_aside.rename(folder / "stage" / "step_9")
    return Kind(sorted(path for path in folder.rglob("*") if path.is_file()), read, tuple(right))


KINDS: dict[str, tuple[int, Callable[[pathlib.Path], Kind]]] = {
    "ct": (28, _ct),
    "mask": (28, _mask),
    "mask folder": (8, _mask_folder),
    "DICOM series": (30, _series),
    "DICOM X-ray": (46, _dicom),
    "picture": (36, _picture),
    "array": (26, _array),
    "X-rays of cases": (14, lambda folder: _case_file(folder, ["x.npz", "valid.npz"])),
    "case file": (20, lambda folder: _case_file(folder, ["cases.json"])),
    "cameras": (20, _calibration),
    "pose": (12, _pose),
    "settings": (8, _settings),
    "localizer": (4, _localizer),
    "old localizer": (6, _old_localizer),
    "base": (3, _base),
    "model": (4, _model),
    "workdir": (4, _workdir),
    "checkpoints": (3, _checkpoints),
}
"""How many files of each kind the quick tests damage, and what makes a `Kind` in a folder."""
