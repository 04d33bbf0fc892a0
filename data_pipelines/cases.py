"""Case and result files: `biplanar-vertebra-cases/1`, read with checks, and `biplanar-vertebra-results/1`, written."""

import collections.abc
import dataclasses
import math
import pathlib
import re
import typing

import numpy as np

from data_pipelines.io import camera_files
from data_pipelines.io import files
from data_pipelines.xrays import collimator
from radgs_jax import errors
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay

CASES_FORMAT = "biplanar-vertebra-cases/1"
RESULTS_FORMAT = "biplanar-vertebra-results/1"
VARIANTS = ("easy", "full", "artic", "real")
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
"""Names of volumes, scenes and cases (the case format). They become names of files, so nothing else is taken."""


@dataclasses.dataclass(frozen=True)
class Volume:
    """The vertebra that a case registers: all that `prepare` may read of a case file.

    Attributes:
      name: its key in the file.
      patient: an identifier.
      full_ct, full_mask: the whole scan and its label map.
      full_label: VerSe number of the vertebra.
    """

    name: str
    patient: str
    full_ct: pathlib.Path
    full_mask: pathlib.Path
    full_label: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """One acquisition.

    Attributes:
      name: its id in the file.
      volume: name of its `Volume`.
      cameras: one `Camera` for each view.
      xrays: npz file of its X-rays.
      valid: npz file of the pixels that count, or None: then a collimator is looked for.
      world_from_ct: the true pose as it is in the file, unchecked, or None; for training and scoring only.
    """

    name: str
    volume: str
    cameras: tuple[Camera, ...]
    xrays: pathlib.Path
    valid: pathlib.Path | None
    world_from_ct: list | None


@dataclasses.dataclass(frozen=True)
class Case:
    """One start pose, world_from_ct (4, 4) in mm, of the scene with the id `scene`."""

    name: str
    scene: str
    world_from_ct: np.ndarray


@dataclasses.dataclass(frozen=True)
class CaseFile:
    """A case file.

    Attributes:
      path: the JSON file.
      volumes, scenes: by name.
      cases: in file order.
      raw: the JSON value, for scoring only.
    """

    path: pathlib.Path
    volumes: dict[str, Volume]
    scenes: dict[str, Scene]
    cases: list[Case]
    raw: dict


def _get(path, where, mapping, key, kind):
    if not isinstance(mapping, dict):
        errors.fail(path, where, type(mapping).__name__, "an object")
    if key not in mapping:
        errors.fail(path, f"{where}.{key}", "nothing", f"a {kind.__name__}")
    value = mapping[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        errors.fail(path, f"{where}.{key}", repr(value)[:60], f"a {kind.__name__}")
    return value


def _name(path, where, name):
    if not NAME.fullmatch(name) or name in (".", ".."):
        wanted = "a name of up to 100 letters, digits, dots, underscores and hyphens"
        errors.fail(path, where, repr(name)[:60], wanted)
    return name


def read(path: pathlib.Path | str) -> CaseFile:
    """Reads a case file. The files that it names are read later, and true poses are checked by `truth`.

    Raises:
      InputError: the JSON is unreadable or of another format, a field is missing or mistyped, a volume or scene does not
        exist, an id occurs twice or is not a `NAME`, a camera is malformed, or a start pose is not rigid.
    """
    path = pathlib.Path(path)
    raw = files.read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != CASES_FORMAT:
        errors.fail(
            path, "format", repr(raw.get("format") if isinstance(raw, dict) else type(raw).__name__), repr(CASES_FORMAT)
        )
    volumes, scenes, cases = {}, {}, []
    for name, value in _get(path, "file", raw, "volumes", dict).items():
        _name(path, "volumes", name)
        where = f"volumes.{name}"
        full_ct = path.parent / _get(path, where, value, "full_ct", str)
        volumes[name] = Volume(
            name,
            _get(path, where, value, "patient", str) if "patient" in value else full_ct.name,
            full_ct,
            path.parent / _get(path, where, value, "full_mask", str),
            _get(path, where, value, "full_label", int),
        )
    for index, value in enumerate(_get(path, "file", raw, "scenes", list)):
        where = f"scenes[{index}]"
        name = _name(path, f"{where}.id", _get(path, where, value, "id", str))
        volume = _get(path, where, value, "volume", str)
        if name in scenes:
            errors.fail(path, f"{where}.id", f"{name!r} a second time", "each id once")
        if volume not in volumes:
            errors.fail(path, f"{where}.volume", repr(volume), f"one of {sorted(volumes)}")
        views = tuple(
            camera_files.read_camera(path, f"{where}.views[{i}]", v)
            for i, v in enumerate(_get(path, where, value, "views", list))
        )
        if not views:
            errors.fail(path, f"{where}.views", "none", "one view or more")
        xrays = path.parent / _get(path, where, value, "xrays", str)
        valid = path.parent / _get(path, where, value, "valid", str) if "valid" in value else None
        scenes[name] = Scene(name, volume, views, xrays, valid, value.get("T_gt"))
    names = set()
    for index, value in enumerate(_get(path, "file", raw, "cases", list)):
        where = f"cases[{index}]"
        name = _name(path, f"{where}.id", _get(path, where, value, "id", str))
        scene = _get(path, where, value, "scene", str)
        if name in names:
            errors.fail(path, f"{where}.id", f"{name!r} a second time", "each id once")
        names.add(name)
        if scene not in scenes:
            errors.fail(path, f"{where}.scene", repr(scene), "the id of a scene")
        cases.append(Case(name, scene, camera_files.check_rigid(path, f"{where}.T_init", value.get("T_init"))))
    return CaseFile(path, volumes, scenes, cases, raw)


def truth(case_file: CaseFile, scene: Scene) -> np.ndarray:
    """True world_from_ct (4, 4) in mm of a scene, for training on real cases and for scoring.

    Raises:
      InputError: the file has none, or it is not rigid.
    """
    return camera_files.check_rigid(case_file.path, f"scene {scene.name}: T_gt", scene.world_from_ct)


def points(case_file: CaseFile, name: str) -> np.ndarray:
    """Surface points (N, 3) of the volume `name` in CT mm, for scoring.

    Raises:
      InputError: the file has none, or they are not a list of points.
    """
    value, where = case_file.raw["volumes"][name].get("points"), f"volumes.{name}.points"
    if not isinstance(value, list) or not value:
        errors.fail(case_file.path, where, repr(value)[:60], "a list of points [x, y, z]")
    return camera_files.check_matrix(case_file.path, where, value, (len(value), 3))


def check_image(path: pathlib.Path | str, where: str, image: np.ndarray, camera: Camera) -> np.ndarray:
    """An image of line integrals (H, W) as float32; `path` and `where` name the file and field in errors.

    Raises:
      InputError: the shape is not the camera's, or values are not numbers or not finite.
    """
    if image.dtype.kind not in "iuf":
        errors.fail(path, where, image.dtype, "real numbers")
    if image.shape != (camera.height, camera.width):
        errors.fail(path, f"{where}: shape", image.shape, f"{(camera.height, camera.width)} as its view says")
    bad = np.count_nonzero(~np.isfinite(image))
    if bad:
        errors.fail(path, where, f"{bad} pixels that are not finite", "finite line integrals")
    return image.astype(np.float32)


def read_xrays(scene: Scene, variant: str) -> list[XRay]:
    """The X-rays of one scene, one for each view, float32.

    Args:
      scene: the acquisition. Without a file of valid pixels, those inside the collimator are, if a border is found, or else all.
      variant: name of the array in its files.

    Raises:
      InputError: a file or array is missing, the number of views or a shape is wrong, pixels are not finite, or none is valid.
    """
    stack = _read_stack(scene, scene.xrays, variant)
    images = [
        check_image(scene.xrays, f"'{variant}'[{i}]", image, camera)
        for i, (image, camera) in enumerate(zip(stack, scene.cameras))
    ]
    if scene.valid is None:
        masks = [collimator.of_line_integrals(image) for image in images]
    else:
        masks = _read_stack(scene, scene.valid, variant)
        for i, (mask, camera) in enumerate(zip(masks, scene.cameras)):
            if mask.dtype != bool or mask.shape != (camera.height, camera.width) or not mask.any():
                found = f"{mask.dtype} {mask.shape}, {np.count_nonzero(mask)} of them set"
                wanted = f"bool {(camera.height, camera.width)}, some of them set"
                errors.fail(scene.valid, f"'{variant}'[{i}]", found, wanted)
    return [XRay(*view) for view in zip(images, masks, scene.cameras)]


def _read_stack(scene, path, variant):
    stack = files.read_npz(path, variant)[variant]
    if stack.ndim != 3 or len(stack) != len(scene.cameras):
        errors.fail(path, f"'{variant}': shape", stack.shape, f"({len(scene.cameras)}, height, width)")
    return stack


def write_results(
    path: pathlib.Path | str,
    program: str,
    variant: str,
    results: collections.abc.Sequence[dict[str, typing.Any]],
    failures: collections.abc.Sequence[dict[str, str]] = (),
) -> None:
    """Writes a result file, atomically.

    Args:
      path: the file to write.
      program: name of the program that made the results.
      variant: name of the array of X-rays.
      results: dicts with id, T (world_from_ct, 4x4 lists), runtime_s, cpu_s and optionally accepted, uncertainty_mm,
        covariance.
      failures: dicts with id and reason, of cases that could not be registered.

    Raises:
      ValueError: a pose or another number is not finite. Nothing is written then.
    """
    for result in results:
        if not all(math.isfinite(v) for row in result["T"] for v in row):
            raise ValueError(f"{result['id']}: the pose is not finite")
    document = {"format": RESULTS_FORMAT, "program": program, "variant": variant, "results": results}
    files.write_json(path, document | ({"failures": list(failures)} if failures else {}))
