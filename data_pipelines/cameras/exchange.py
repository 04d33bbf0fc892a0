"""Cameras of other programs to ours, checked, and back. `record_files` reads the files."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.cameras import checks
from data_pipelines.cameras import conventions
from data_pipelines.cameras import gantry_conventions
from data_pipelines.cameras import gantry_files
from data_pipelines.cameras import record_files
from data_pipelines.cameras.conventions import Options
from data_pipelines.cameras.conventions import Pinhole
from radgs_jax import errors

CONVENTIONS = tuple(record_files.READERS)
"""Names of the conventions."""
MEANINGS: Mapping[str, str] = {
    "--E=world_from_camera": "E is the inverse, the camera's pose in the world",
    "--E=camera_from_world": "the pose is the inverse, from the world to the camera",
    "--unit=mm": "the world is in mm",
    "--unit=m": "the world is in metres",
    "--unit=cm": "the world is in cm",
    "--K=mm": "K is in mm on the panel",
    "--pixels=middle": "K and P count pixels from the image's middle",
    "--camera_axes=opengl": "the camera looks along -z with +y up",
    "--rows=up": "v counts rows from below",
    "--mirrored": "the image is the mirror image of what the source sees",
    "--row_vectors": "matrices are transposed, for row vectors",
    "--orientation=AP": "the orientation is AP",
    "--orientation=PA": "the orientation is PA",
}
"""What each flag says, for errors."""


def alternatives(convention: str, options: Options, pitch: float) -> list[tuple[str, str, dict[str, Any]]]:
    """Flags that may mend cameras which cannot be right, what each says, and what it changes in the options.

    Args:
      pitch: mm, near that of a K that looks as if it were in mm, or 0.
    """
    changes: list[dict[str, Any]] = [] if convention == "dicom" else [{"unit": unit} for unit in ("mm", "cm", "m")]
    if convention == "matrices":
        changes += [{"pixels": "middle"}, {"E": "world_from_camera"}, {"camera_axes": "opengl"}, {"row_vectors": True}]
    if convention in ("diffdrr", "xvr"):
        changes += [{"E": "camera_from_world"}, {"orientation": "AP"}, {"orientation": "PA"}]
    elif convention != "dicom":
        changes.append({"rows": "up"})
    if not options.mirrored:
        changes.append({"mirrored": True})
    found = []
    for change in changes:
        ((name, value),) = change.items()
        flag = f"--{name}" if value is True else f"--{name}={value}"
        found.append((flag, MEANINGS[flag], change))
    if convention == "matrices" and options.pixel_mm is not None:
        found.append(("--K=mm", MEANINGS["--K=mm"], {"K": "mm"}))
    elif convention == "matrices" and pitch:
        meaning = f"{MEANINGS['--K=mm']}, and --pixel_mm its pitch, near {pitch:.3g}"
        found.append(("--K=mm", meaning, {"K": "mm", "pixel_mm": (pitch, pitch)}))
    return found


def convert(
    convention: str, records: Sequence[record_files.Record], options: Options, sizes: Sequence[tuple[int, int]] | None
) -> list[Pinhole]:
    """The cameras of `record_files.read`'s records, as they are said to be; nothing is checked of what they do to space.

    Args:
      sizes: (height, width) of all views or of each, where the files do not say it.
    Raises:
      InputError: a field is missing or malformed.
    """
    if sizes is not None and len(sizes) not in (1, len(records)):
        errors.fail("flags", "--size", f"{len(sizes)} sizes", f"one, or one for each of {len(records)} views")
    views = []
    for i, record in enumerate(records):
        size = None if sizes is None else sizes[i if len(sizes) > 1 else 0]
        if "file" in record.value:
            size = record.value["file"].pixels.shape
        size = record_files.size_of(record_files.xvr_detector(record) if convention == "xvr" else record, size)
        pitch = record_files.pitch_of(record, options)
        one = dataclasses.replace(options, pixel_mm=pitch)
        K, E = record_files.READERS[convention](record, size, one)
        views.append(Pinhole(K, E, *size, _known_pitch(convention, record, pitch)))
    return views


def _known_pitch(convention, record, pitch):
    """The pixel pitch (u, v), mm, that a convention's own fields give, or else `pitch`."""
    if convention in ("diffdrr", "xvr"):
        detector = record_files.xvr_detector(record).value if convention == "xvr" else record.value
        return float(detector["delx"]), float(detector.get("dely") or detector["delx"])
    if convention == "dicom":
        if "file" in record.value:
            return record.value["file"].geometry.pixel_mm
        return tuple(map(float, record.value["ImagerPixelSpacing"]))[::-1]
    return pitch


def cameras(
    convention: str,
    records: Sequence[record_files.Record],
    options: Options,
    sizes: Sequence[tuple[int, int]] | None = None,
    origin: Sequence[float] | str | None = None,
) -> list[Pinhole]:
    """The cameras of `record_files.read`'s records, which can be those of X-rays.

    Args:
      sizes: as in `convert`.
      origin: the point, RAS+ mm in the file's world, that becomes the world's origin; "rays": where the central rays meet.
    Raises:
      InputError: as `convert`; or the cameras can be those of no set-up, in which case the error names what would mend them.
    """

    def converted(given):
        views = convert(convention, records, given, sizes)
        return views if origin is None else _moved(views, origin)

    first = convert(convention, records, options, sizes)
    pitch = min(checks.pitch_of_mm(view, options.mirrored) for view in first)
    others = alternatives(convention, options, pitch)
    names = ", ".join(dict.fromkeys(str(record.path) for record in records))
    return checks.refuse(converted, options, others, names)


def _moved(views, origin):
    """The cameras with another origin of the world."""
    if isinstance(origin, str):
        origin = checks.meeting(views)
        if origin is None:
            errors.fail("flags", "--origin", "rays that are parallel", "views from two sides, or a point")
    shift = np.eye(4)
    shift[:3, 3] = origin
    return [dataclasses.replace(view, E=view.E @ shift) for view in views]


def written(convention: str, views: Sequence[Pinhole], options: Options) -> list[Any]:
    """The views in another program's convention: one value for JSON, one text for RTK's XML, or plastimatch's text for each view.

    Raises:
      InputError: the convention cannot say these cameras.
    """
    source = f"--to={convention}"
    if convention == "rtk":
        geometries = [gantry_conventions.to_rtk(source, view, options) for view in views]
        return [gantry_files.rtk_text(geometries)]
    if convention == "plastimatch":
        return [
            gantry_files.plastimatch_text(gantry_conventions.to_plastimatch(source, view, options)) for view in views
        ]
    return [[plain(_WRITERS[convention](source, view, options)) for view in views]]


def _matrices_json(source, view, options):
    return conventions.to_matrices(source, view, options) | {"height": view.height, "width": view.width}


def _xvr_json(source, view, options):
    found = conventions.to_diffdrr(source, view, options)
    names = ("sdd", "height", "width", "delx", "dely", "x0", "y0", "reverse_x_axis")
    detector = {name: found[name] for name in names}
    return {"detector": detector, "orientation": found["orientation"], "final_pose": found["pose"]}


_WRITERS: Mapping[str, Callable[[object, Pinhole, Options], dict[str, Any]]] = {
    "matrices": _matrices_json,
    "diffdrr": conventions.to_diffdrr,
    "xvr": _xvr_json,
    "itk": gantry_conventions.to_itk,
    "dicom": gantry_conventions.to_dicom,
}


def plain(value: Any) -> Any:
    """A value for JSON: arrays in it become lists."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def cameras_json(views: Sequence[Pinhole]) -> list[dict[str, Any]]:
    """The content of cameras.json, which `camera_files.read_camera` reads; mirrored cameras have a negative fx."""
    return [
        {"K": view.K.tolist(), "E": view.E.tolist(), "height": view.height, "width": view.width}
        | ({} if view.pixel_mm is None else {"pixel_mm": list(view.pixel_mm)})
        for view in views
    ]
