"""Pictures like the paper's figures 2 and 3: each system's reconstruction in three slices, and its pose in both X-rays."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from data_pipelines import cases
from experiments.comparison import answers
from experiments.comparison import subjects
from experiments.comparison.answers import Table
from experiments.comparison.subjects import System
from experiments.reports import pictures
from experiments.reports.plots import save
from radgs_jax import losses
from radgs_jax import metrics
from radgs_jax.geometry import resample

CELL = 1.7
"""Size of a slice or an X-ray in a figure, inches."""
SLICES = ("axial", "coronal", "sagittal")


def _slices(volume):
    """The three slices through the middle of (X, Y, Z) in RAS+ axes, with the patient's front or head upwards."""
    x, y, z = (n // 2 for n in volume.shape)
    return volume[:, :, z].T[::-1], volume[:, y].T[::-1], volume[x].T[::-1]


def _grid(rows, columns):
    figure = Figure(figsize=(1.9 + CELL * columns, 0.35 + CELL * rows), layout="constrained")
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False))
    for panel in axes.ravel():
        panel.set_xticks([])
        panel.set_yticks([])
    return figure, axes


def _title(axes, text):
    axes.set_ylabel(text.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)


def write(table: Table, systems: Sequence[System], variant: str) -> None:
    """Writes volumes_VARIANT.png and poses_VARIANT.png of the first scene and the first case to the table's folder.

    Every slice has the same grey scale, 0 to `losses.DENSITY_RANGE` 1/mm. True poses are drawn, too.
    """
    case_file = table.case_file
    scene = case_file.scenes[case_file.cases[0].scene]
    subject, truth = table.subject(scene.name), cases.truth(case_file, scene)
    found = {kind: {} for kind in answers.ARRAYS}
    for system in systems:
        first = answers.items(case_file, system)[0]
        found[system.kind][system.title] = answers.kept_answer(table, system, variant, first)
    if volumes := found[subjects.RECONSTRUCTION]:
        _volumes(table.out / f"volumes_{variant}.png", subject, truth, volumes)
    if kept := found[subjects.REGISTRATION]:
        poses = {title: answer["world_from_ct"] for title, answer in kept.items()}
        points = cases.points(case_file, scene.volume)
        _poses(table.out / f"poses_{variant}.png", subject, cases.read_xrays(scene, variant), truth, poses, points)


def _volumes(path, subject, truth, found):
    vertebra = subject.prepared.vertebra
    ct_from_grid, shape = resample.evaluation_grid(vertebra), resample.GRID_SHAPE
    shown = {"the CT": resample.resample(vertebra.density, vertebra.ct_from_index, ct_from_grid, shape)}
    for title, answer in found.items():
        ct_from_index = np.linalg.inv(truth) @ answer["world_from_index"]
        shown[title] = resample.resample(answer["density"].astype(np.float32), ct_from_index, ct_from_grid, shape)
    figure, axes = _grid(len(shown), len(SLICES))
    for row, (title, volume) in zip(axes, shown.items()):
        for panel, image in zip(row, _slices(volume)):
            panel.imshow(image, cmap="gray", vmin=0.0, vmax=losses.DENSITY_RANGE)
        _title(row[0], title)
    for panel, name in zip(axes[0], SLICES):
        panel.set_title(name, fontsize=8)
    save(figure, path)


def _poses(path, subject, xrays, truth, found, points):
    vertebra = subject.prepared.vertebra
    close = [pictures.close_up(xray, vertebra, truth)[0] for xray in xrays]
    drawn = lambda pose, view: pictures.render(vertebra.density, vertebra.ct_from_index, pose, view.camera)
    figure, axes = _grid(len(found), len(xrays))
    for row, (title, pose) in zip(axes, found.items()):
        for panel, view in zip(row, close):
            pictures.show(panel, view.line_integrals, view.valid, view.valid)
            for name, shown in (("truth", truth), ("estimate", pose)):
                image = drawn(shown, view)
                if np.ptp(image) > 0 and image.max() > pictures.OUTLINE:
                    panel.contour(image, levels=[pictures.OUTLINE], **pictures.STYLES[name])
        _title(row[0], f"{title}, {metrics.mtre(points, pose, truth):.2f} mm")
    save(figure, path)
