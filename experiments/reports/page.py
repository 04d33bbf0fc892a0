"""The page of a registered case."""

import html
import json
import math
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.spatial import transform

from experiments.reports import document
from experiments.reports import image_planes
from experiments.reports import pictures
from experiments.reports import verdicts
from experiments.reports.pictures import CloseUp
from experiments.reports.verdicts import Verdict
from radgs_jax import levels
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration.pipeline import Outcome
from radgs_jax.registration.prepared import Prepared

TEMPLATE = pathlib.Path(__file__).with_suffix(".html")
POINTS = 1500
"""Most points of a cloud in the drawing in space. Chosen by hand: half shows holes, twice is slower to turn."""
COLOURS = {"start": "orange", "estimate": "blue", "truth": "green", "reconstruction": "white"}
"""Colours of points, in words: those of `pictures.STYLES`, and `RECONSTRUCTION`."""
RECONSTRUCTION = "#f2f2f2"


def write(
    path: pathlib.Path | str,
    name: str,
    verdict: Verdict,
    prepared: Prepared,
    xrays: Sequence[XRay],
    poses: Mapping[str, np.ndarray],
    outcome: Outcome,
    near: Sequence[CloseUp],
) -> None:
    """Writes the page: verdict, X-rays to compare with the model, the vertebra in space, and the pose in several frames.

    Args:
      name: of the case.
      poses: world_from_ct (4, 4) of 'start', 'estimate' and possibly 'truth', mm.
      outcome: of the registration; near: `pictures.close_ups` of it.
    """
    level = levels.level_name(prepared.vertebra.label)
    clouds = _clouds(prepared, poses, outcome)
    lines = [part for part in (pictures.distances(name, prepared.vertebra, poses), verdict.why, verdict.advice) if part]
    colours = {pose: style["colors"] for pose, style in pictures.STYLES.items()} | {"reconstruction": RECONSTRUCTION}
    scene = _scene(prepared, xrays, poses, clouds, colours)
    filled = {
        "id": html.escape(name),
        "state": document.STATES[verdict.accepted],
        "headline": html.escape(f"{level}: {verdict.headline}"),
        "lines": "\n".join(f"<p>{html.escape(line[0].upper() + line[1:])}.</p>" for line in lines),
        "outlines": "".join(
            f'<label><input type="checkbox" data-outline="{pose}" checked> <span class="key {pose}">{pose}</span></label>'
            for pose in poses
        ),
        "views": "\n".join(map(_view, near, (view["name"] for view in scene["views"]))),
        "clouds": _legend(clouds),
        "pose": _pose(poses["estimate"], prepared),
        "scene": json.dumps(scene).replace("<", "\\u003c"),
    }
    document.write(path, f"{level} in {len(xrays)} X-rays", document.fill(TEMPLATE, filled))


def _legend(clouds):
    """What the points in space are, in words."""
    said = f"Points: {', '.join(f'{cloud} ({COLOURS[cloud]})' for cloud in clouds)}."
    return said if "reconstruction" in clouds else f"{said} With --reconstruct, also the network's reconstruction."


def _view(near, title):
    """A figure of an X-ray's close-up with the pictures that may cover it, and outlines; title: the view's name."""
    close, alone = near.xray, near.alone
    low, high = pictures.contrast(close.line_integrals, close.valid)
    height, width = close.line_integrals.shape
    images = [
        f'<img src="{_png(image, *limits)}" alt="{html.escape(f"{title}: {text}")}"{attribute}>'
        for image, limits, text, attribute in (
            (np.where(close.valid, close.line_integrals, low), (low, high), "the X-ray around the vertebra", ""),
            (near.model, (low, high), "the X-ray that the model predicts", ' data-picture="model"'),
            (
                alone["estimate"],
                (0.0, alone["estimate"].max()),
                "the CT's vertebra at the estimate",
                ' data-picture="vertebra"',
            ),
        )
    ]
    paths = [
        f'<path class="{pose}" d="{outline(alone[pose])}"/>' for pose in sorted(alone, key=list(pictures.STYLES).index)
    ]
    drawn = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{"".join(paths)}</svg>'
    caption = f"{title}, around the vertebra"
    return f'<figure><div class="stack">{"".join(images)}{drawn}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def _png(image, low, high):
    scaled = np.clip((np.asarray(image, np.float64) - low) / max(high - low, 1e-9), 0.0, 1.0)
    return document.data_url(Image.fromarray(np.uint8(np.round(255 * scaled))), "png", optimize=True)


def outline(image: np.ndarray) -> str:
    """SVG path of a vertebra's outline in its projection (H, W), in pixels from the image's corner; empty where there is none."""
    if not image.max() > pictures.OUTLINE:
        return ""
    axes = Figure().subplots()
    lines = axes.contour(image, levels=[pictures.OUTLINE]).allsegs[0]
    return "".join(f"M{' '.join(f'{u + 0.5:.1f},{v + 0.5:.1f}' for u, v in line)}" for line in lines if len(line) > 2)


def _sample(points):
    return points[:: max(1, math.ceil(len(points) / POINTS))]


def _clouds(prepared, poses, outcome):
    """World points, mm, by name."""
    points = _sample(prepared.vertebra.points)
    found = {pose: points @ T[:3, :3].T + T[:3, 3] for pose, T in poses.items()}
    if outcome.reconstructed is not None:
        means = np.asarray(outcome.reconstructed.gaussians.mean)
        found["reconstruction"] = _sample(means[np.asarray(outcome.reconstructed.gaussians.density) > 0])
    return found


def _scene(prepared, xrays, poses, clouds, colours):
    """What is drawn in space, mm."""
    centre = (poses["estimate"] @ prepared.vertebra.ct_from_box)[:3, 3]
    views, round_off = [], lambda points: np.round(points, 2).tolist()
    for xray in xrays:
        source = image_planes.source(xray.camera)
        plane = image_planes.world_from_pixel(xray.camera, centre)
        views.append(
            {
                "name": verdicts.view_name(xray, poses["start"]),
                "source": round_off(source),
                "corners": round_off(image_planes.corners(xray.camera, plane)),
            }
        )
    reach = max(float(np.linalg.norm(np.array(view["source"]) - centre)) for view in views)
    shown = [{"colour": colours[name], "points": round_off(points)} for name, points in clouds.items()]
    return {"centre": round_off(centre), "reach": reach, "views": views, "clouds": shown}


def _pose(world_from_ct, prepared):
    """Tables of the pose in several frames."""
    turn = transform.Rotation.from_matrix(world_from_ct[:3, :3])
    angles, vector = turn.as_euler("xyz", degrees=True), turn.as_rotvec(degrees=True)
    centre = (world_from_ct @ prepared.vertebra.ct_from_box)[:3, 3]
    moving = rigid_host.between_lps(world_from_ct)
    rows = (
        ("turn about the world's x, then y, then z, degrees", angles),
        ("the same as one turn: axis times angle, degrees", vector),
        ("shift of the CT's origin, mm", world_from_ct[:3, 3]),
        ("the vertebra's centre in the world, mm", centre),
    )
    table = "".join(
        f"<tr><th scope='row'>{text}</th>{''.join(f'<td class=number>{value:.3f}</td>' for value in values)}</tr>"
        for text, values in rows
    )
    matrices = (
        ("world_from_ct: moves points of the CT (RAS+, mm) into the C-arm's frame", world_from_ct),
        ("the same in LPS, as DICOM and ITK write points: moves points", moving),
        (
            "its inverse in LPS, as in pose.tfm: what ITK resamples the CT with, and 3D Slicer loads",
            np.linalg.inv(moving),
        ),
    )
    texts = "".join(
        f"<h4>{text}</h4><pre>{chr(10).join('  '.join(f'{value:14.8f}' for value in row) for row in matrix)}</pre>"
        for text, matrix in matrices
    )
    head = "<tr><td></td><th scope='col'>x</th><th scope='col'>y</th><th scope='col'>z</th></tr>"
    return f"<table>{head}{table}</table>{texts}"
