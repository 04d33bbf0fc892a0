"""Contact sheets: what a scan, a simulation, a case file, measured X-rays or a store of pairs look like.

    python -m data_pipelines.show --scan=CT --mask=MASK [--labels=20,21] --output=SHEET.png
    python -m data_pipelines.show --scan=CT --mask=MASK [--labels=20,21] --simulated=6 [--seed=0] --output=SHEET.png
    python -m data_pipelines.show --cases=CASES.json [--variant=real] --output=SHEET.png
    python -m data_pipelines.show --xrays=A.dcm,B.png [--values=intensity] --output=SHEET.png
    python -m data_pipelines.show --pairs=STORE [--count=6] --output=SHEET.png

Scans: slices through every complete vertebra with its mask's outline. Simulated: the clean X-ray with the centroids' labels,
and what the detector gives. Cases: the X-rays, beside the whole scan projected at the true pose. X-rays: line integrals,
what does not count in red. Pairs: the X-ray, and the vertebra alone.
"""

import sys

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pair_store
from data_pipelines import radiograph
from data_pipelines import scan as scans
from data_pipelines import segmentation
from data_pipelines import simulator
from data_pipelines import xray
from kernels import bench
from radgs_jax import attenuation

TILE_INCHES = 2.4
BODY_MM = 2.0
"""Voxels of the scan that is projected beside a case's X-rays."""


def _sheet(rows):
    """A figure of rows of (title, draw), `draw(axes)` filling one tile."""
    columns = max(map(len, rows))
    figure = Figure(figsize=(TILE_INCHES * columns, (TILE_INCHES + 0.2) * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for tiles, row in zip(axes, rows):
        for tile in tiles:
            tile.set_axis_off()
        for tile, (title, draw) in zip(tiles, row):
            tile.set_title(title, fontsize=7)
            draw(tile)
    return figure


def _grey(image, valid=None, outline=None, extent=None):
    seen = image if valid is None or not valid.any() else image[valid]
    low, high = np.percentile(seen, [0.5, 99.5])

    def draw(axes):
        axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), extent=extent)
        if valid is not None and not valid.all():
            axes.imshow(np.where(valid, np.nan, 1.0), cmap="autumn", alpha=0.35, vmin=0, vmax=2)
        if outline is not None and outline.max() > 0.5:
            axes.contour(outline, levels=[0.5], colors="#35c4e8", linewidths=0.8)

    return draw


def of_scan(scan, labels):
    """Sagittal, coronal and axial slices through each vertebra's middle, its mask outlined.

    Args:
      scan: `scan.Scan`; labels: VerSe numbers of complete vertebrae.
    Returns:
      a matplotlib Figure.
    Raises:
      InputError: a vertebra that is absent or cut.
    """
    rows = []
    for label in labels:
        cube = scans.vertebra_cube(scan, label)
        middle = np.rint(np.average(np.argwhere(cube.occupancy > 0.5), axis=0)).astype(int)
        row = []
        for axis, name in enumerate(("sagittal", "coronal", "axial")):
            # As radiologists look: head or front up, the front or the patient's right on the left.
            hu, mask = (np.take(a, middle[axis], axis).T[::-1, ::-1] for a in (cube.hu, cube.occupancy))
            row.append((f"{scans.level_name(label)} {name}", _grey(np.clip(hu, -200, 1000), outline=mask)))
        rows.append(row)
    return _sheet(rows)


def of_simulation(body, labels, count, seed):
    """`count` acquisitions: for each view the clean line integrals with level names, and what the detector gives.

    Args:
      body: `simulator.Body`; labels: VerSe numbers of the targets, taken in turn.
    """
    rows = []
    for index in range(count):
        label = labels[index % len(labels)]
        sample = simulator.simulate(body, label, np.random.default_rng([seed, label, index]))
        row = []
        for view in range(len(sample.rest)):
            row.append((f"{scans.level_name(label)} view {view + 1}, clean", _named(sample, view)))
            row.append((f"seed {seed}, {index}: measured", _grey(sample.measured[view], sample.valid[view])))
        rows.append(row)
    return _sheet(rows)


def _named(sample, view):
    grey = _grey(sample.rest[view] + sample.excess[view])

    def draw(axes):
        grey(axes)
        for label in np.flatnonzero(sample.in_sight[view]):
            u, v = sample.centroids[view, label]
            axes.text(u, v, scans.level_name(label), color="#ffd84a", fontsize=5, ha="center", va="center")

    return draw


def of_cases(case_file, variant):
    """Every scene's X-rays, each beside the scan projected at the true pose.

    Raises:
      InputError: unreadable arrays or scans, or a scene without its true pose.
    """
    rows, projected = [], {}
    for scene in case_file.scenes.values():
        volume = case_file.volumes[scene.volume]
        if volume.full_ct not in projected:
            scan = scans.read_scan(volume.full_ct, volume.full_mask, volume.patient)
            mu = attenuation.from_hounsfield(scan.hu)
            projected[volume.full_ct] = scans.block_average(mu, scan.ct_from_index, BODY_MM)
        mu, ct_from_index = projected[volume.full_ct]
        row = []
        for number, (view, image) in enumerate(zip(scene.views, cases.read_xrays(scene, variant)), 1):
            geometry = view.intrinsics[None], view.camera_from_world[None], image.shape
            ours = xray.render(mu, ct_from_index, cases.truth(case_file, scene), *geometry, BODY_MM)[0]
            row += [
                (f"{scene.name} view {number}, {variant}", _grey(image)),
                ("the scan at the true pose", _grey(ours)),
            ]
        rows.append(row)
    return _sheet(rows)


def of_xrays(paths, options):
    """Measured X-rays as they are read; `options` as `radiograph.read` takes them."""
    row = []
    for path in paths:
        read = radiograph.read(path, None, options)
        row.append(
            (f"{path}\n{read.origin['values']}, {read.origin['collimator']}", _grey(read.line_integrals, read.valid))
        )
    return _sheet([row[i : i + 4] for i in range(0, len(row), 4)])


def of_pairs(source, count):
    """Evenly spaced pairs of a store: for each view the measured X-ray, what does not count in red, and the vertebra alone."""
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
MASK = flags.DEFINE_string("mask", None, "Its label map.", flag_values=FLAGS)
LABELS = flags.DEFINE_list("labels", None, "VerSe numbers; default: all complete vertebrae.", flag_values=FLAGS)
SIMULATED = flags.DEFINE_integer("simulated", 0, "Show so many simulations.", lower_bound=0, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "Of the simulations.", lower_bound=0, flag_values=FLAGS)
CASES = flags.DEFINE_string("cases", None, "Case file.", flag_values=FLAGS)
VARIANT = flags.DEFINE_enum("variant", "full", cases.VARIANTS, "Array of its X-rays.", flag_values=FLAGS)
XRAYS = flags.DEFINE_list("xrays", None, "Measured X-rays.", flag_values=FLAGS)
VALUES = flags.DEFINE_enum("values", None, radiograph.VALUES, "What their numbers are.", flag_values=FLAGS)
PAIRS = flags.DEFINE_string("pairs", None, "Folder of a store of pairs.", flag_values=FLAGS)
COUNT = flags.DEFINE_integer("count", 6, "Pairs to show.", lower_bound=1, flag_values=FLAGS)
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
    if LABELS.value is not None and not all(label.isdecimal() for label in LABELS.value):
        raise flags.Error(f"--labels={','.join(LABELS.value)}, wanted VerSe numbers")


def _figure():
    if CASES.value is not None:
        return of_cases(cases.read(CASES.value), VARIANT.value)
    if XRAYS.value is not None:
        return of_xrays(XRAYS.value, radiograph.Options(values=VALUES.value))
    if PAIRS.value is not None:
        return of_pairs(pair_store.open(PAIRS.value), COUNT.value)
    scan = scans.read_scan(SCAN.value, MASK.value)
    labels = [int(label) for label in LABELS.value or segmentation.complete_labels(scan.labels)]
    if not labels:
        files.fail(MASK.value, "labels", sorted(scan.boxes), "a complete vertebra")
    if not SIMULATED.value:
        return of_scan(scan, labels)
    body = simulator.Body(scan)
    labels = labels if LABELS.value else list(body.spine.labels)
    return of_simulation(body, labels, SIMULATED.value, SEED.value)


def main():
    """Reads the flags and writes the sheet; bad flags or input end the program with one line and status 2."""
    if not bench.read_flags(FLAGS, HELP, __doc__, _check):
        return
    try:
        figure = _figure()
    except files.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with files.replacing(OUTPUT.value) as temporary:
        figure.savefig(temporary, dpi=110, facecolor="white")
    print(OUTPUT.value)


if __name__ == "__main__":
    main()
