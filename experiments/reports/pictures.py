"""The picture of a registration: whether the pose may be used, and X-rays in which a wrong pose is seen at a glance."""

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping
from collections.abc import Sequence

import matplotlib
import numpy as np
import scipy
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data_pipelines.simulation import quick
from experiments.reports import verdicts
from experiments.reports.plots import save
from experiments.reports.verdicts import Verdict
from kernels.common.types import Array
from radgs_jax import levels
from radgs_jax import metrics
from radgs_jax.geometry import camera
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration.pipeline import Outcome
from radgs_jax.registration.pipeline import parts_in
from radgs_jax.registration.pipeline import Reconstructed
from radgs_jax.registration.prepared import Prepared
from radgs_jax.registration.prepared import Vertebra

STYLES = {
    "start": {"colors": "#e8a33d", "linestyles": "--", "linewidths": 1.3},
    "truth": {"colors": "#7bd150", "linestyles": "-", "linewidths": 3.2},
    "estimate": {"colors": "#1fa8ff", "linestyles": "-", "linewidths": 1.3},
}
"""How outlines are drawn, the first one first."""
METAL = "#d6336c"
"""Colour of pixels that were taken for metal and left out."""
BANNERS = {True: "#1d7a3a", False: "#b3261e", None: "#6b6b6b"}
PIXELS = 380
"""Fewest pixels along the shorter side of a drawn X-ray. Chosen by hand: resolution of the picture against time to draw it."""
MARGIN_MM = 22.0
"""What a close-up shows around the vertebra, mm at its depth. Chosen by hand: half hides the neighbours' end plates, by which a
reader counts; twice makes the vertebra small."""
SQUARE_MM = 9.0
"""Side of the checkerboard's squares, mm at the vertebra's depth. Chosen by hand: about a third of a vertebra, so that its borders
cross several squares; at half the X-ray is hard to recognise, at twice few borders are crossed."""
LOCAL_MM = 12.0
"""Standard deviation, mm, of the blur below which X-ray and model are compared. Chosen by hand: at half pedicles fade, at twice
scatter and gain ramps show as squares."""
STEP_MM = 1.5
"""Sample distance of rendered X-rays, mm. Chosen by hand: half of it takes twice as long."""
OUTLINE = 0.06
"""Line integral at which a vertebra's outline is drawn. Chosen by hand: lower values follow thin bone, higher ones lose it."""
BAR_MM = 20.0
"""Length of the scale bar, mm at the vertebra's depth."""
ALONG = 0.5
"""Shortest part of a patient axis in the image, relative to its length, that gets letters at the border."""
BONE = 0.06
"""Attenuation that is drawn white, 1/mm: the upper end of the range that reconstructions are scored in (docs/accuracy.md)."""


@dataclasses.dataclass(frozen=True)
class CloseUp:
    """An X-ray around the vertebra, as the picture and the page draw it.

    Attributes:
      xray: that part, binned; corner: its first column and row in the whole X-ray, and the binning (3,).
      model: (h, w) line integrals that the model predicts there, as `predicted`.
      alone: name of a pose -> (h, w) line integrals of the vertebra alone.
    """

    xray: XRay
    corner: Int[np.ndarray, "3"]
    model: Float[np.ndarray, "h w"]
    alone: Mapping[str, np.ndarray]


def registration_picture(
    path: pathlib.Path | str,
    name: str,
    verdict: Verdict,
    prepared: Prepared,
    xrays: Sequence[XRay],
    poses: Mapping[str, np.ndarray],
    outcome: Outcome,
    near: Sequence[CloseUp],
) -> None:
    """A PNG with the verdict as a banner and a row for each X-ray: the whole, a close-up with outlines, and a checkerboard.

    Metal, which was left out, is coloured. In the checkerboard every other square is the X-ray that the model predicts, so that
    borders of bone break where the pose is wrong. Letters at the border are the patient's right, left, anterior, posterior, head
    and foot directions.

    Args:
      name: of the case.
      poses: world_from_ct (4, 4) of 'start', 'estimate' and possibly 'truth', mm.
      outcome: of the registration; near: `close_ups` of it.
    """
    vertebra = prepared.vertebra
    said = "; ".join(part for part in (verdict.why, verdict.advice) if part)
    lines = [distances(name, vertebra, poses), *textwrap.wrap(said, 170)]
    high = 0.7 + 0.2 * max(3, len(lines))
    figure = Figure(figsize=(15.5, high + 5.1 * len(xrays)), layout="constrained")
    banner, body = figure.subfigures(2, 1, height_ratios=[high, 5.1 * len(xrays)])
    _banner(
        banner, high, f"{levels.level_name(vertebra.label)}  {verdict.headline[0].upper()}{verdict.headline[1:]}", lines
    )
    banner.set_facecolor(BANNERS[verdict.accepted])
    rows = np.atleast_1d(body.subfigures(len(xrays), 1))
    for row, xray, counted, seen_near in zip(rows, xrays, outcome.counted, near):
        whole, close, mixed = row.subplots(1, 3)
        row.suptitle(verdicts.view_name(xray, poses["start"]), fontsize=13, fontweight="bold", x=0.012, ha="left")
        left_out = XRay(np.asarray(xray.valid) & ~counted, xray.valid, xray.camera)
        small, seen, valid = _binned(xray.line_integrals, xray.valid, xray.camera)
        metal = _binned(left_out.line_integrals, xray.valid, xray.camera)[0]
        near_metal = close_up(left_out, vertebra, poses["estimate"])[0].line_integrals
        _mark(whole, metal)
        _mark(close, near_metal)
        cut = seen_near.xray
        show(whole, small, valid, metal == 0)
        show(close, cut.line_integrals, cut.valid, near_metal == 0)
        show(mixed, *_checkerboard(seen_near, poses["estimate"], vertebra), near_metal == 0)
        for axes, view, alone in ((whole, seen, _alone(vertebra, poses, seen)), (close, cut.camera, seen_near.alone)):
            # The estimate is drawn last and thinner, so that a truth below it still shows.
            for pose_name in sorted(poses, key=list(STYLES).index):
                if alone[pose_name].max() > OUTLINE:
                    axes.contour(alone[pose_name], levels=[OUTLINE], **STYLES[pose_name])
            _letters(axes, view, poses["start"], poses["estimate"], vertebra)
            _scale_bar(axes, view, poses["estimate"], vertebra)
        ratio, corner = xray.camera.height / seen.height, seen_near.corner
        side = cut.camera.width * corner[2] / ratio, cut.camera.height * corner[2] / ratio
        whole.add_patch(Rectangle((corner[0] / ratio, corner[1] / ratio), *side, fill=False, ec="white", lw=1))
        for axes, title in ((whole, "the X-ray"), (close, "close-up"), (mixed, "X-ray and model in turn")):
            axes.set_title(title, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    handles = []
    for pose_name in poses:
        style = {name.removesuffix("s"): value for name, value in STYLES[pose_name].items()}
        handles.append(matplotlib.lines.Line2D([], [], label=pose_name, **style))
    if any((np.asarray(xray.valid) & ~counted).any() for xray, counted in zip(xrays, outcome.counted)):
        handles.append(Rectangle((0, 0), 1, 1, color=METAL, alpha=0.45, label="taken for metal, left out"))
    body.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=11, frameon=False, borderaxespad=0.0)
    save(figure, path)


def _banner(figure, high, headline, lines):
    """Writes a headline and the lines below it, white, into a strip `high` inches high."""
    figure.text(0.012, 1 - 0.26 / high, headline, color="white", fontsize=21, fontweight="bold", va="center")
    figure.text(0.012, 1 - 0.6 / high, "\n".join(lines), color="white", fontsize=11, va="top", linespacing=1.35)


def _binned(image, valid, view: Camera):
    """An X-ray of about PIXELS pixels, its camera, and its valid pixels."""
    factor = max(1, min(view.height, view.width) // PIXELS)
    counts = camera.bin_image(np.asarray(valid, np.float32), factor)
    return camera.bin_image(np.asarray(image), factor), camera.bin(view, factor), counts > 0.5


def contrast(image: Float[np.ndarray, "h w"], shown: Bool[np.ndarray, "h w"]) -> tuple[float, float]:
    """The values that are drawn black and white, from the pixels `shown`, or from all where there are none."""
    low, high = np.percentile(image[shown] if shown.any() else image, [1.0, 99.5])
    return low, high


def distances(name: str, vertebra: Vertebra, poses: Mapping[str, np.ndarray]) -> str:
    """A line: the case, how far its estimate is from the start, and from the truth where that is among the poses, mTRE in mm."""
    moved = metrics.mtre(vertebra.points, poses["start"], poses["estimate"])
    line = f"{'' if name == 'case' else f'case {name}; '}moved {moved:.1f} mm from the start pose"
    if "truth" in poses:
        line += f"; {metrics.mtre(vertebra.points, poses['estimate'], poses['truth']):.2f} mm from the true pose"
    return line


def show(
    axes: Axes, image: Float[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"], bone: Bool[np.ndarray, "h w"]
) -> None:
    """Draws an image (H, W) of valid pixels; its contrast is that of the pixels without metal, `bone`."""
    low, high = contrast(image, valid & bone if (valid & bone).any() else valid)
    axes.imshow(
        np.where(valid, image, low),
        cmap="gray",
        vmin=low,
        vmax=high if high > low else low + 1.0,
        interpolation="bilinear",
    )
    # What is drawn on top must not move the image's frame.
    axes.autoscale(False)


def _mark(axes: Axes, left_out):
    """Colours what was taken for metal, a share (H, W) of each pixel."""
    colour = np.zeros((*np.shape(left_out), 4))
    colour[..., :3] = matplotlib.colors.to_rgb(METAL)
    colour[..., 3] = 0.45 * np.asarray(left_out)
    axes.imshow(colour, zorder=1.5)


def _centre(vertebra, world_from_ct):
    return (world_from_ct @ vertebra.ct_from_box)[:3, 3]


def _pixels_per_mm(view, world_from_ct, vertebra):
    return view.intrinsics[0] / (view.camera_from_world @ [*_centre(vertebra, world_from_ct), 1.0])[2]


def close_up(
    xray: XRay, vertebra: Vertebra, world_from_ct: Float[np.ndarray, "4 4"]
) -> tuple[XRay, Int[np.ndarray, "3"]]:
    """The X-ray around a vertebra, binned; and its first column and row in the X-ray and the binning (3,)."""
    view = xray.camera
    points = vertebra.points @ world_from_ct[:3, :3].T + world_from_ct[:3, 3]
    uv = np.asarray(camera.project(view, points), np.float64)
    margin = MARGIN_MM * _pixels_per_mm(view, world_from_ct, vertebra)
    low, high = uv.min(0) - margin, uv.max(0) + margin
    # A square, and inside the image, even if the vertebra is not.
    side = min(max(high - low), view.width, view.height)
    first = np.clip(np.round((low + high - side) / 2), 0, np.array([view.width, view.height]) - side).astype(int)
    count = max(8, int(side))
    cut = np.s_[first[1] : first[1] + count, first[0] : first[0] + count]
    image, valid = np.asarray(xray.line_integrals)[cut], np.asarray(xray.valid)[cut]
    moved = Camera(view.intrinsics - np.array([0, 0, *first]), view.camera_from_world, *image.shape)
    small, seen, inside = _binned(image, valid, moved)
    return XRay(small, inside, seen), np.array([*first, moved.height // seen.height])


def render(
    volume: Float[Array, "x y z"],
    ct_from_index: Float[Array, "4 4"],
    world_from_ct: Float[np.ndarray, "4 4"],
    view: Camera,
) -> Float[np.ndarray, "h w"]:
    """Line integrals of a volume at a pose, as one camera sees it."""
    matrices = view.intrinsics[None], view.camera_from_world[None]
    return quick.render(
        np.asarray(volume), np.asarray(ct_from_index), world_from_ct, *matrices, (view.height, view.width), STEP_MM
    )[0]


def _alone(vertebra, poses, view):
    """The vertebra's line integrals (H, W) at each pose, by the pose's name."""
    return {pose: render(vertebra.density, vertebra.ct_from_index, T, view) for pose, T in poses.items()}


def close_ups(
    prepared: Prepared, xrays: Sequence[XRay], poses: Mapping[str, np.ndarray], outcome: Outcome
) -> list[CloseUp]:
    """A `CloseUp` of each X-ray, around the vertebra at the estimate.

    Args:
      poses: world_from_ct (4, 4) of 'estimate' and others, mm; outcome: of the registration.
    """
    found = []
    for xray in xrays:
        close, corner = close_up(xray, prepared.vertebra, poses["estimate"])
        model = predicted(close, prepared, xrays, poses["estimate"], outcome)
        found.append(CloseUp(close, corner, model, _alone(prepared.vertebra, poses, close.camera)))
    return found


def predicted(
    close: XRay, prepared: Prepared, xrays: Sequence[XRay], world_from_ct: Float[np.ndarray, "4 4"], outcome: Outcome
) -> Float[np.ndarray, "h w"]:
    """A close-up as the model predicts it, with what is smooth over `LOCAL_MM` from the X-ray.

    Args:
      close: of one of `xrays`, by `close_up`; outcome: of the registration.
    """
    vertebra, refined = prepared.vertebra, outcome.refined
    parts = parts_in(prepared, xrays)
    world_from_box = world_from_ct @ vertebra.ct_from_box
    model = render(parts.excess, parts.box_from_excess, world_from_box, close.camera)
    rest = world_from_box if refined is None else np.asarray(refined.world_from_rest, np.float64)
    model = model + render(parts.rest, parts.box_from_rest, rest, close.camera)
    scale = _pixels_per_mm(close.camera, world_from_ct, vertebra)
    image, valid = close.line_integrals, close.valid
    smooth = LOCAL_MM * scale
    detail, fine = _detail(image, valid, smooth), _detail(model, valid, smooth)
    gain = np.sum(detail * fine) / max(np.sum(fine * fine), 1e-12)
    # A model that does not fit has no or a negative gain; it is shown as strong as the X-ray, so that it is seen not to fit.
    strength = np.std(detail[valid]) / max(np.std(fine[valid]), 1e-12) if valid.any() else 1.0
    return (image - detail) + max(gain, 0.5 * strength) * fine


def _checkerboard(near, world_from_ct, vertebra):
    """A `CloseUp` with every other square from the model, and its valid pixels."""
    cut = near.xray
    side = max(2, round(SQUARE_MM * _pixels_per_mm(cut.camera, world_from_ct, vertebra)))
    v, u = np.indices(cut.line_integrals.shape)
    return np.where((v // side + u // side) % 2 == 1, near.model, cut.line_integrals), cut.valid


def _detail(image, valid, sigma):
    """An image without what is smooth over `sigma` pixels; invalid pixels are 0 and enter no average."""
    weight = scipy.ndimage.gaussian_filter(valid.astype(np.float64), sigma)
    smooth = scipy.ndimage.gaussian_filter(np.where(valid, image, 0.0).astype(np.float64), sigma) / np.maximum(
        weight, 1e-6
    )
    return np.where(valid, image - smooth, 0.0)


def _letters(axes, view, start, estimate, vertebra):
    """Letters of the patient's directions at the image's border; the start's rotation is good enough for them."""
    middle = np.array([view.width - 1.0, view.height - 1.0]) / 2
    camera_from_ct = view.camera_from_world[:3, :3] @ start[:3, :3]
    for axis, pair in enumerate(("RL", "AP", "HF")):
        across = camera_from_ct[:2, axis]
        if np.linalg.norm(across) < ALONG:
            continue
        for letter, sign in zip(pair, (1.0, -1.0)):
            along = sign * across / np.linalg.norm(across)
            reach = np.min(0.94 * middle / np.maximum(np.abs(along), 1e-9))
            place = middle + reach * along
            axes.text(
                *place, letter, color="white", fontsize=12, fontweight="bold", ha="center", va="center", bbox=_BOX
            )


_BOX = {"facecolor": "black", "alpha": 0.45, "pad": 1.5, "lw": 0}


def _scale_bar(axes, view, estimate, vertebra):
    length = BAR_MM * _pixels_per_mm(view, estimate, vertebra)
    left, low = 0.04 * view.width, 0.965 * view.height
    axes.plot([left, left + length], [low, low], color="white", lw=3, solid_capstyle="butt")
    axes.text(left, low - 0.012 * view.height, f"{BAR_MM:g} mm", color="white", fontsize=9, va="bottom", bbox=_BOX)


def network_picture(
    path: pathlib.Path | str, name: str, seen: Reconstructed, reconstruction: np.ndarray, moved_ct: np.ndarray
) -> None:
    """A PNG of what the network saw and made: its crops with the attention on them, and slices of the reconstruction and the CT.

    Args:
      name: of the case.
      reconstruction, moved_ct: (X, Y, Z) on one grid in world axes, 1/mm.
    """
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    figure.suptitle(
        f"{name}: the network's crops with its attention (CAL), and the reconstruction beside the CT at the found pose"
    )
    top, bottom = figure.subfigures(2, 1)
    crops = np.atleast_1d(top.subplots(1, len(seen.crops)))
    for index, (axes, window, attention) in enumerate(zip(crops, seen.crops, seen.attention), 1):
        _overlaid(axes, window, attention)
        axes.set_title(f"view {index}", fontsize=9)
    slices = bottom.subplots(1, 6)
    for axis, plane in enumerate(("sagittal", "coronal", "axial")):
        for j, (volume, label) in enumerate(((reconstruction, "reconstruction"), (moved_ct, "CT"))):
            middle = np.take(volume, volume.shape[axis] // 2, axis)
            slices[2 * axis + j].imshow(middle.T, cmap="gray", origin="lower", vmin=0, vmax=BONE)
            slices[2 * axis + j].set_title(f"{plane}: {label}", fontsize=9)
    for axes in (*crops, *slices):
        axes.set_xticks([])
        axes.set_yticks([])
    save(figure, path)


def _overlaid(axes, window, values, **limits):
    """Draws a crop with a map of values over it, and returns the map's image."""
    axes.imshow(window, cmap="gray")
    height, width = window.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    return axes.imshow(values, cmap="inferno", alpha=0.55, extent=extent, interpolation="bilinear", **limits)


def attention_picture(
    path: pathlib.Path | str,
    crops: Float[np.ndarray, "crops height width"],
    activity: Mapping[str, Float[np.ndarray, "crops cells_v cells_u"]],
) -> None:
    """A PNG of what networks look at: a row for each crop, a column for each network, and one colour scale.

    Args:
      activity: name of a network -> its activity, which is drawn relative to its mean over the crop.
    """
    relative = {name: values / values.mean((1, 2), keepdims=True) for name, values in activity.items()}
    most = float(np.percentile(np.concatenate([values.ravel() for values in relative.values()]), 99.5))
    shape = len(crops), 1 + len(relative)
    figure = Figure(figsize=(2.4 * shape[1] + 0.8, 2.3 * shape[0] + 0.4), layout="constrained")
    axes = np.asarray(figure.subplots(*shape, squeeze=False))
    for panel in axes.ravel():
        panel.set_xticks([])
        panel.set_yticks([])
    for row, window in zip(axes, crops):
        row[0].imshow(window, cmap="gray")
    axes[0, 0].set_title("the X-ray", fontsize=9)
    drawn = None
    for column, (name, values) in zip(axes.T[1:], relative.items()):
        column[0].set_title(textwrap.fill(name, 24), fontsize=9)
        for panel, window, value in zip(column, crops, values):
            drawn = _overlaid(panel, window, value, vmin=0.0, vmax=most)
    if drawn is not None:
        figure.colorbar(drawn, ax=axes, shrink=0.5, label="activity, relative to its mean over the crop")
    save(figure, path)
