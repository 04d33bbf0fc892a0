"""Contact sheets of a scan, simulations, a case file, localized levels, measured X-rays or a store of pairs.

    python -m data_pipelines.show --scan=CT --mask=MASK [--label=20,21] --output=SHEET.png
    python -m data_pipelines.show --scan=CT --mask=MASK [--label=20,21] --simulated=6 [--seed=0] --output=SHEET.png
    python -m data_pipelines.show --cases=CASES.json [--variant=real] [--found=FOUND.json] --output=SHEET.png
    python -m data_pipelines.show --xrays=A.dcm,B.png [--values=intensity] --output=SHEET.png
    python -m data_pipelines.show --pairs=STORE [--count=6] --output=SHEET.png

A scan: slices through every complete vertebra with the outline of its mask. Simulations: the clean X-ray with the levels at
their centroids, and the measured one. A case file: each X-ray (measured ones: `--variant=real`) next to the whole scan
projected at the true pose; or with --found, the output of `experiments.detect --do=find`, the X-rays with levels and their
confidence. X-rays: the numbers in the file next to the line integrals. Pairs: the X-ray next to the vertebra alone. Pixels that
are not valid are red.
"""

import collections.abc
import dataclasses
import pathlib
import textwrap
import typing

import numpy as np
from absl import flags
from matplotlib import patheffects
from matplotlib.figure import Figure

from data_pipelines import cases
from data_pipelines import simulation
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from data_pipelines.io import files
from data_pipelines.pairs import pair_store
from data_pipelines.simulation import quick
from data_pipelines.xrays import radiograph
from kernels.tools import program
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax.geometry import resample
from radgs_jax.levels import level_name

TILE_INCHES = 2.4
"""Side of a tile in inches, which is 264 pixels at SHEET_DPI. Chosen by hand: half hides thin edges, twice makes large files."""
SHEET_DPI = 110
"""Dots per inch of a sheet. Chosen by hand, as TILE_INCHES."""
PROJECTED_MM = 2.0
"""Largest voxel side in mm of a scan that is projected next to X-rays. Chosen by hand: half takes eight times the voxels, twice
blurs vertebrae."""
GREY_PERCENTILES = (0.5, 99.5)
"""Percentiles of an image that are black and white. Chosen by hand: nearer to 0 and 100 follows noise, further clips bone."""
HU_WINDOW = (-200, 1000)
"""HU range of slices: fat to dense bone. Chosen by hand: half clips cortical bone, twice greys the marrow."""


def _sheet(rows):
    """A figure of rows of tiles (title, draw); `draw(axes)` fills one tile."""
    columns = max(map(len, rows))
    figure = Figure(figsize=(TILE_INCHES * columns, (TILE_INCHES + 0.2) * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for tiles, row in zip(axes, rows):
        for tile in tiles:
            tile.set_axis_off()
        for tile, (title, draw) in zip(tiles, row):
            tile.set_title(title, fontsize=7, parse_math=False)
            draw(tile)
    return figure


def _grey(image, valid=None, outline=None):
    """Draws an image (H, W) with the pixels that are not valid in red, and a mask's outline."""
    seen = image if valid is None or not valid.any() else image[valid]
    low, high = np.percentile(seen, GREY_PERCENTILES)

    def draw(axes):
        axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        if valid is not None and not valid.all():
            axes.imshow(np.where(valid, np.nan, 1.0), cmap="autumn", alpha=0.35, vmin=0, vmax=2)
        if outline is not None and outline.max() > 0.5:
            axes.contour(outline, levels=[0.5], colors="#35c4e8", linewidths=0.8)

    return draw


def of_scan(scan: scans.Scan, labels: collections.abc.Iterable[int]) -> Figure:
    """Sagittal, coronal and axial slices through the centre of each vertebra, with the outline of its mask.

    Args:
      scan: a scan.
      labels: VerSe numbers of complete vertebrae.

    Raises:
      InputError: a vertebra is absent or cut.
    """
    rows = []
    for label in labels:
        cube = extraction.vertebra_cube(scan, label)
        middle = np.rint(np.average(np.argwhere(cube.occupancy > 0.5), axis=0)).astype(int)
        row = []
        for axis, name in enumerate(("sagittal", "coronal", "axial")):
            # The radiological view: head or front up, and front or the patient's right side on the left.
            hu, mask = (np.take(a, middle[axis], axis).T[::-1, ::-1] for a in (cube.hu, cube.occupancy))
            row.append((f"{level_name(label)} {name}", _grey(np.clip(hu, *HU_WINDOW), outline=mask)))
        rows.append(row)
    return _sheet(rows)


def of_simulation(
    body: simulation.ArticulatedBody, labels: collections.abc.Sequence[int], count: int, seed: int
) -> Figure:
    """Simulated acquisitions: for each view, the clean line integrals with level names, and the measured X-ray.

    Args:
      body: the body to simulate.
      labels: VerSe numbers of the targets, used in turn.
      count: number of acquisitions.
      seed: seed of all random draws.

    Raises:
      InputError: the body has no complete vertebra of a label.
    """
    rows = []
    for index in range(count):
        label = labels[index % len(labels)]
        sample = simulation.simulate(body, label, np.random.default_rng([seed, label, index]))
        row = []
        for view in range(len(sample.rest)):
            shown = np.flatnonzero(sample.in_sight[view])
            marks = [(*sample.centroids[view, n], level_name(int(n))) for n in shown]
            clean = _grey(sample.rest[view] + sample.excess[view])
            row.append((f"{level_name(label)} view {view + 1}, clean", _marked(clean, marks)))
            row.append((f"seed {seed}, {index}: measured", _grey(sample.measured[view], sample.valid[view])))
        rows.append(row)
    return _sheet(rows)


def _marked(grey, marks):
    """Draws `grey` with words at pixels; marks are (u, v, word)."""
    # Bone is as bright as the words, so they have a dark outline.
    edge = [patheffects.withStroke(linewidth=1.5, foreground="black")]
    style = {"color": "#ffd84a", "fontsize": 6, "ha": "center", "va": "center", "path_effects": edge}

    def draw(axes):
        grey(axes)
        for u, v, word in marks:
            axes.text(u, v, word, clip_on=True, parse_math=False, **style)

    return draw


def of_cases(case_file: cases.CaseFile, variant: str) -> Figure:
    """The X-rays of every scene, each next to the scan projected at the true pose.

    Args:
      case_file: a case file.
      variant: name of the array in its X-ray files.

    Raises:
      InputError: an array or scan is unreadable, or a scene has no true pose.
    """
    rows, projected = [], {}
    for scene in case_file.scenes.values():
        volume = case_file.volumes[scene.volume]
        if volume.full_ct not in projected:
            scan = scans.read_scan(volume.full_ct, volume.full_mask, volume.patient)
            mu = attenuation.from_hounsfield(scan.hu)
            projected[volume.full_ct] = resample.block_average(mu, scan.ct_from_index, PROJECTED_MM)
        mu, ct_from_index = projected[volume.full_ct]
        row = []
        for number, xray in enumerate(cases.read_xrays(scene, variant), 1):
            camera, image = xray.camera, xray.line_integrals
            geometry = camera.intrinsics[None], camera.camera_from_world[None], image.shape
            ours = quick.render(mu, ct_from_index, cases.truth(case_file, scene), *geometry, PROJECTED_MM)[0]
            row += [
                (f"{scene.name} view {number}, {variant}", _grey(image)),
                ("the scan at the true pose", _grey(ours)),
            ]
        rows.append(row)
    return _sheet(rows)


def read_found(path: pathlib.Path | str, case_file: cases.CaseFile) -> dict[str, dict[str, typing.Any]]:
    """Reads the output of `experiments.detect --do=find` for a case file: a report for each scene.

    A report has either `error`, a line of text, or `views`: a list for each view of the levels in it, which have `level`, `uv`
    in pixels and `confidence`.

    Raises:
      InputError: the JSON is unreadable, a scene has no report, or a report is of another form.
    """
    reports = files.read_json(path)
    if not isinstance(reports, dict):
        errors.fail(path, "content", type(reports).__name__, "an object with a report for each scene")
    for name, scene in case_file.scenes.items():
        report = reports.get(name, "nothing")
        if not isinstance(report, dict):
            errors.fail(path, name, repr(report)[:60], "a report, an object")
        if "error" in report:
            if not isinstance(report["error"], str):
                errors.fail(path, f"{name}.error", repr(report["error"])[:60], "a line of text")
            continue
        views = report.get("views", "nothing")
        if not isinstance(views, list) or len(views) != len(scene.cameras):
            found = f"{len(views)} views" if isinstance(views, list) else repr(views)[:60]
            errors.fail(path, f"{name}.views", found, f"a list for each of {len(scene.cameras)} views")
        for number, view in enumerate(views):
            if not isinstance(view, list) or not all(map(_is_level, view)):
                wanted = "a list of objects with level, a name, uv, two numbers, and confidence, a number"
                errors.fail(path, f"{name}.views[{number}]", repr(view)[:60], wanted)
    return reports


def _is_level(value):
    if not isinstance(value, dict) or not isinstance(value.get("level"), str) or not isinstance(value.get("uv"), list):
        return False
    numbers = [*value["uv"], value.get("confidence")]
    return len(numbers) == 3 and all(type(number) in (int, float) for number in numbers)


def of_found(
    case_file: cases.CaseFile, variant: str, reports: collections.abc.Mapping[str, dict[str, typing.Any]]
) -> Figure:
    """The X-rays of every scene with the levels that the localizer found, and its confidence in percent.

    Args:
      case_file: a case file.
      variant: name of the array in its X-ray files.
      reports: as `read_found` returns them.

    Raises:
      InputError: an array is unreadable.
    """
    rows = []
    for name, scene in case_file.scenes.items():
        row, error = [], reports[name].get("error", "")
        for number, xray in enumerate(cases.read_xrays(scene, variant)):
            levels = [] if error else reports[name]["views"][number]
            marks = [(*entry["uv"], f"{entry['level']} {100 * entry['confidence']:.0f}") for entry in levels]
            title = [f"{name} view {number + 1}, {variant}", *textwrap.wrap(error, 44)]
            row.append(("\n".join(title), _marked(_grey(xray.line_integrals), marks)))
        rows.append(row)
    return _sheet(rows)


def of_xrays(paths: collections.abc.Iterable[pathlib.Path | str], options: radiograph.ReadOptions) -> Figure:
    """Measured X-rays: for each, the numbers in its file, and the line integrals read from it.

    Args:
      paths: files of X-rays.
      options: options of all of them; what the numbers are has `register`'s default.

    Raises:
      InputError: as `radiograph.read`.
    """
    row = []
    for path in paths:
        values = radiograph.assumed_values(path, options)
        read = radiograph.read(path, None, dataclasses.replace(options, values=values))
        # Turn the file's pixels like the image.
        v, u = np.indices(read.line_integrals.shape)
        u, v, _ = np.rint(np.einsum("ij,jvu->ivu", read.file_from_image, [u, v, np.ones_like(u)])).astype(int)
        stored = radiograph.read_stored(path, options.frame)[v, u]
        said = f"line integrals, {read.origin['values']}, {read.origin['collimator']}"
        row += [
            (f"{path}\nas stored", _grey(stored, np.isfinite(stored))),
            (f"{path}\n{said}", _grey(read.line_integrals, read.valid)),
        ]
    return _sheet([row[i : i + 4] for i in range(0, len(row), 4)])


def of_pairs(source: pair_store.Source, count: int) -> Figure:
    """Evenly spaced pairs of a store: for each view, the measured X-ray and the vertebra alone.

    Args:
      source: simulated or measured pairs.
      count: maximum number of pairs.
    """
    rows = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        pair = source[int(index)]
        row = []
        for view in range(len(pair["measured"])):
            seen, alone = (pair[name][view].astype(np.float32) for name in ("measured", "vertebra"))
            row += [(f"pair {index} view {view + 1}", _grey(seen, pair["valid"][view])), ("vertebra", _grey(alone))]
        rows.append(row)
    return _sheet(rows)


FLAGS = flags.FlagValues()
SCAN = flags.DEFINE_string("scan", None, "CT: NIfTI file or DICOM folder.", flag_values=FLAGS)
MASK = flags.DEFINE_string("mask", None, "Label map on the scan's grid.", flag_values=FLAGS)
LABEL = flags.DEFINE_list(
    "label", None, "VerSe numbers of the vertebrae to show; default: all complete ones.", flag_values=FLAGS
)
SIMULATED = flags.DEFINE_integer(
    "simulated", 0, "Simulated acquisitions to show, instead of slices.", lower_bound=0, flag_values=FLAGS
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the simulations.", lower_bound=0, flag_values=FLAGS)
CASES = flags.DEFINE_string("cases", None, "Case file.", flag_values=FLAGS)
FOUND = flags.DEFINE_string("found", None, "Output of experiments.detect --do=find, for --cases.", flag_values=FLAGS)
VARIANT = flags.DEFINE_enum(
    "variant", "full", cases.VARIANTS, "Array of the X-ray files to show, with --cases.", flag_values=FLAGS
)
XRAYS = flags.DEFINE_list("xrays", None, "Files of measured X-rays.", flag_values=FLAGS)
VALUES = flags.DEFINE_enum(
    "values",
    None,
    radiograph.VALUES,
    "What the X-rays' numbers are; default: what DICOM's tags say, line integrals elsewhere.",
    flag_values=FLAGS,
)
PAIRS = flags.DEFINE_string("pairs", None, "Folder of a store of pairs.", flag_values=FLAGS)
COUNT = flags.DEFINE_integer("count", 6, "Maximum number of pairs to show.", lower_bound=1, flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "PNG to write.", flag_values=FLAGS)
HELP = flags.DEFINE_bool("help", False, "Show this help.", short_name="?", flag_values=FLAGS)


def _check():
    given = [flag.name for flag in (SCAN, CASES, XRAYS, PAIRS) if flag.value is not None]
    if len(given) != 1:
        raise flags.Error(f"found {given or 'nothing'} to show, wanted one of --scan, --cases, --xrays, --pairs")
    if OUTPUT.value is None or not OUTPUT.value.endswith(".png"):
        raise flags.Error(f"--output={OUTPUT.value}, wanted a name that ends in .png")
    if (SCAN.value is None) != (MASK.value is None):
        raise flags.Error("--scan and --mask go together")
    if FOUND.value is not None and CASES.value is None:
        raise flags.Error("--found goes with --cases")
    if LABEL.value is not None and not all(label.isdecimal() for label in LABEL.value):
        raise flags.Error(f"--label={','.join(LABEL.value)}, wanted VerSe numbers")


def _figure():
    if CASES.value is not None:
        case_file = cases.read(CASES.value)
        if FOUND.value is None:
            return of_cases(case_file, VARIANT.value)
        return of_found(case_file, VARIANT.value, read_found(FOUND.value, case_file))
    if XRAYS.value is not None:
        return of_xrays(XRAYS.value, radiograph.ReadOptions(values=VALUES.value))
    if PAIRS.value is not None:
        source = pair_store.open(PAIRS.value)
        if not {"measured", "valid", "vertebra"} <= source[0].keys():
            errors.fail(PAIRS.value, "examples", sorted(source[0]), "pairs, with measured, valid and vertebra")
        return of_pairs(source, COUNT.value)
    scan = scans.read_scan(SCAN.value, MASK.value)
    labels = [int(label) for label in LABEL.value or segmentation.complete_labels(scan.labels)]
    if not labels:
        errors.fail(MASK.value, "labels", sorted(scan.boxes), "a complete vertebra")
    if not SIMULATED.value:
        return of_scan(scan, labels)
    body = simulation.ArticulatedBody(scan)
    labels = labels if LABEL.value else list(body.spine.labels)
    return of_simulation(body, labels, SIMULATED.value, SEED.value)


def main() -> None:
    """Reads the flags and writes the sheet. Bad flags or input end the program with one line and status 2."""
    if not program.read_flags(FLAGS, HELP, __doc__, _check):
        return
    try:
        figure = _figure()
    except errors.InputError as error:
        program.stop(error)
    with files.replacing(OUTPUT.value) as temporary:
        figure.savefig(temporary, dpi=SHEET_DPI, facecolor="white")
    print(OUTPUT.value)


if __name__ == "__main__":
    main()
