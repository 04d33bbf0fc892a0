"""Whether cameras and start pose can be meant as they are: one line in place of a search that cannot succeed. numpy, milliseconds.

`view_checks.CHECKS` is the table of what is looked at. A value that no set-up of vertebrae or other bones has is refused, with the
numbers. Then the mistakes that users make (`CAMERA_MENDS`, `START_MENDS`) are undone one by one, and the one that makes every view
fit is named. What may be right is not refused, but said in a note. Nothing is corrected silently.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from jaxtyping import Real

from kernels.common.types import Array
from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry import triangulation
from radgs_jax.geometry.camera import Camera
from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import confidence
from radgs_jax.registration import view_checks
from radgs_jax.registration.prepared import Vertebra
from radgs_jax.registration.view_checks import View

SURFACE_POINTS = 200
"""Surface points of the vertebra that are projected. Chosen by hand: half still shows where it is, twice takes twice the time."""
IMAGE_SAMPLES = 2**16
"""Pixels of two images that are compared, at most. Chosen by hand: half or twice changes nothing but the time, about 1 ms."""
FAR_MM = 25.0
"""Distance, mm, from which on another reading of the start pose is named after a refusal. Chosen by hand: nearer ones are within
the search's reach, so that half names some that were searched, and twice misses some that were not."""
PANEL_MM = 300.0
"""Width of the detector that is assumed where intrinsics in mm do not show the pixel pitch; it only decides whether this
explanation is named, and half or twice leaves the vertebra in the image."""
MAX_BINNING = 16
"""Largest binning behind which a principal point of half the image's size is recognised; above, the half pixel is negligible."""


def _with(T, turn=None, shift=None):
    T = T.copy()
    T[:3, :3] = T[:3, :3] if turn is None else turn
    T[:3, 3] = T[:3, 3] if shift is None else shift
    return T


def _inverse(T):
    return _with(T, T[:3, :3].T, -T[:3, :3].T @ T[:3, 3])


_UNITS = ((1000.0, "metres"), (10.0, "centimetres"), (25.4, "inches"))

IN_LPS = "it in RAS (this looks like LPS: the signs of x and y of both frames changed)"
"""What an error asks for of the commonest mistake: a pose from ITK or DICOM coordinates."""

START_MENDS: tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...] = (
    *(
        (f"its translation times {f:g}, from {unit} to mm", lambda T, f=f: _with(T, shift=f * T[:3, 3]))
        for f, unit in _UNITS
    ),
    (IN_LPS, rigid_host.between_lps),
    ("its inverse (this looks like ct_from_world)", _inverse),
    (
        "the inverse in RAS (this looks like an ITK transform, LPS ct_from_world)",
        lambda T: rigid_host.between_lps(_inverse(T)),
    ),
    ("it for a CT in RAS (this looks like a CT in LPS)", lambda T: T @ rigid_host.LPS_FROM_RAS),
    (
        "it for a world with +y and +x turned round (this looks like a world in LPS)",
        lambda T: rigid_host.LPS_FROM_RAS @ T,
    ),
    ("its rotation transposed", lambda T: _with(T, T[:3, :3].T)),
)
"""Mistakes in a start pose: what an error asks for, and the pose (4, 4) that was meant. The first that fits is named."""


def _of_mm(view):
    return dataclasses.replace(view, k=view.k / pitch) if (pitch := view_checks.pitch_of_mm(view)) else None


def _of_mm_about_the_middle(view):
    if not view_checks.in_corner(view):
        return None
    pitch, middle = PANEL_MM / view.size[0], 0.5 * (view.size - 1)
    return dataclasses.replace(view, k=np.concatenate([view.k[:2] / pitch, middle + view.k[2:] / pitch]))


def _of_other_size(view):
    scale, shift = view_checks.other_size(view), np.array([0, 0, 0.5, 0.5])
    return dataclasses.replace(view, k=(view.k + shift) / scale - shift) if scale != 1.0 else None


CAMERA_MENDS: tuple[tuple[str, str, Callable[[View], View | None]], ...] = (
    *(
        (
            "E",
            f"its translation times {f:g}, from {unit} to mm",
            lambda v, f=f: dataclasses.replace(v, E=_with(v.E, shift=f * v.E[:3, 3])),
        )
        for f, unit in _UNITS
    ),
    ("E", "the inverse of E (this looks like world_from_camera)", lambda v: dataclasses.replace(v, E=_inverse(v.E))),
    (
        "E",
        "its translation over 1000, from micrometres to mm",
        lambda v: dataclasses.replace(v, E=_with(v.E, shift=1e-3 * v.E[:3, 3])),
    ),
    (
        "K",
        "K in pixels, 1000 times these numbers (they look like metres for mm)",
        lambda v: dataclasses.replace(v, k=1000.0 * v.k),
    ),
    (
        "K",
        "K in pixels of this image, these numbers over {pitch:.4g} (they look like mm at that pixel pitch, or like another "
        "image's)",
        _of_mm,
    ),
    (
        "K",
        "K in pixels, the focal lengths over the pixel pitch and the principal point counted from the first pixel (they look like "
        "mm about the detector's centre)",
        _of_mm_about_the_middle,
    ),
    (
        "K",
        "K of this image, or height and width of its own (about {scale:.3g} times as large) beside it",
        _of_other_size,
    ),
    ("K", "fx with fy and cx with cy exchanged", lambda v: dataclasses.replace(v, k=v.k[[1, 0, 3, 2]])),
    ("E", "the rotation of E transposed", lambda v: dataclasses.replace(v, E=_with(v.E, v.E[:3, :3].T))),
    (
        "E",
        "+y down and +z to the detector: rows 2 and 3 of E negated",
        lambda v: dataclasses.replace(v, E=np.diag([1, -1, -1, 1.0]) @ v.E),
    ),
)
"""Mistakes in a camera: the matrix, what an error asks for, and the view that was meant, or None where it cannot be that."""


def _diagnose(views, points, centre, start, name):
    """The likely mistake: (whether the start is meant, number of the view, matrix, what is wanted); None if none is found.

    The fewest mistakes win, then those of the start if the cameras see the isocentre, then the order of the tables. Two mistakes of
    the start that explain as much are both named. name: the check that failed.
    """
    start_first = name not in _OF_K
    start_first &= all(
        not view_checks.outside("outside the image", view_checks.beyond_mm(v, np.zeros(3)), "possible") for v in views
    )
    found = []
    for text, mend in (("", lambda T: T), *START_MENDS):
        T = mend(start)
        world, middle = view_checks.moved(T, points), view_checks.moved(T, centre)
        likely = [mend for view in views if (mend := next(_mends_of(view, world, middle), None)) is not None]
        # Of cameras that see the isocentre, one alone is hardly wrong where only the vertebra is not seen.
        partly = start_first and name in _OF_START and len({bool(matrix) for matrix, _ in likely}) > 1
        if len(likely) == len(views) and not partly:
            changes = {wanted for _, wanted in likely if wanted} | ({text} if text else set())
            found.append(((len(changes), bool(text) != start_first), text, likely))
    least = min((cost for cost, *_ in found), default=(3, True))
    if least[0] > 2:
        return None
    found = [(text, likely) for cost, text, likely in found if cost == least]
    text, likely = found[0]
    number = next((i for i, (matrix, _) in enumerate(likely) if matrix), None)
    if number is None:
        return True, 0, "", " or ".join(text for text, _ in found[:2])
    matrix, wanted = likely[number]
    wanted = wanted.format(pitch=view_checks.pitch_of_mm(views[number]), scale=view_checks.other_size(views[number]))
    return False, number, matrix, f"{wanted}, and of the start pose {text}" if text else wanted


def _mends_of(view, points, centre):
    """Mistakes (matrix, what is wanted) that explain why a view does not fit; ("", "") where it does."""
    if view_checks.fits(view, points, centre):
        yield "", ""
    for matrix, wanted, change in CAMERA_MENDS:
        if (changed := change(view)) is not None and view_checks.fits(changed, points, centre):
            yield matrix, wanted


def _where(number, view, centre):
    """Where a view sees the isocentre and the vertebra, in words."""
    depth, uv = view.project(np.stack([np.zeros(3), centre]))
    at = [f"({u:.0f}, {v:.0f}) px" if d > 0 else "a place behind the source" for d, (u, v) in zip(depth, uv)]
    distance = np.linalg.norm(view_checks.moved(view.E, centre))
    width, height = view.size
    return (
        f"in view {number + 1} the isocentre at {at[0]} and the vertebra at {at[1]}, {distance:.4g} mm from the source, of "
        f"{width:.0f} x {height:.0f} px"
    )


def _look_past(views):
    """How far, mm, the central rays of two views pass each other where no point is in both images; None where one is."""
    rays = [triangulation.rays(0.5 * (v.size[None] - 1), v.k, v.E) for v in views]
    for (a, (source_a, d_a)), (b, (source_b, d_b)) in itertools.combinations(enumerate(rays), 2):
        if np.linalg.norm(np.cross(d_a[0], d_b[0])) < confidence.MIN_SINE:
            continue
        apart = float(triangulation.ray_distance(source_a, d_a, source_b, d_b)[0, 0])
        along, *_ = np.linalg.lstsq(np.stack([d_a[0], -d_b[0]], 1), source_b - source_a, rcond=None)
        half = [abs(s) * np.linalg.norm(0.5 * views[i].size / views[i].k[:2]) for i, s in zip((a, b), along)]
        if apart > sum(half) or (along < 0).any():
            return a, b, apart, half
    return None


_OF_START = ("share in the image", "outside the image")
_OF_K = ("angle of view", "fx / fy", "principal point", "size in the image", "size against the image")


def _refuse(views, points, centre, start, number, name, value, cameras_from, start_from):
    """Raises the error of a view that did not pass the check `name` with a value."""
    bounds, view, error = view_checks.CHECKS[name], views[number], errors.BadGeometry
    likely = _diagnose(views, points, centre, start, name)
    if likely is not None and not likely[0]:
        number = likely[1]
        view = views[number]
    found = _where(number, view, view_checks.moved(start, centre))
    if name.startswith("size"):
        found = f"a vertebra of {value:.3g} {bounds.unit} ({name}), {found}"
    elif name in _OF_K:
        fx, fy, cx, cy = view.k
        width, height = view.size
        found = f"fx {fx:.6g}, fy {fy:.6g}, cx {cx:.6g}, cy {cy:.6g} for {width:.0f} x {height:.0f} pixels"
        found += f": {name} {value:.4g} {bounds.unit}".rstrip() if name != "principal point" else ""
    if likely is not None:
        of_start, _, matrix, wanted = likely
        source, where = (start_from, "world_from_ct") if of_start else (cameras_from, f"views[{number}].{matrix}")
        errors.fail(source, where, found, f"{wanted}, which would fit", error)
    if name in _OF_START:
        if (past := _look_past(views)) is not None:
            a, b, apart, half = past
            found = (
                f"central rays {apart:.4g} mm apart, in images that show {half[0]:.4g} and {half[1]:.4g} mm round them"
            )
            errors.fail(
                cameras_from, f"views {a + 1} and {b + 1}", found, "cameras of one world that see one place", error
            )
        errors.fail(start_from, "world_from_ct", found, bounds.wanted, error)
    errors.fail(cameras_from, f"views[{number}].{'K' if name in _OF_K else 'E'}", found, bounds.wanted, error)


def _copies(views, xrays, points, cameras_from):
    """Refuses a camera or an image that occurs twice."""
    for a, b in itertools.combinations(range(len(views)), 2):
        uv = [(views[i].project(points)[1] + 0.5) / views[i].size * views[a].size for i in (a, b)]
        apart = float(np.abs(uv[0] - uv[1]).max())
        alike = {
            "the same camera": (
                cameras_from,
                apart,
                f"cameras that show the vertebra within {apart:.2g} px of each other",
            ),
        }
        if (unlike := _unlike(xrays[a], xrays[b])) is not None:
            alike["the same image"] = ("X-rays", unlike, f"a correlation of {1 - unlike:.6f}")
        for name, (source, value, found) in alike.items():
            if view_checks.outside(name, value, "possible"):
                found, wanted = f"{found}: {name} twice".replace("the same", "one"), view_checks.CHECKS[name].wanted
                errors.fail(source, f"views {a + 1} and {b + 1}", found, wanted, errors.BadGeometry)


def _contrast(number, xray):
    """Refuses line integrals that no body has; returns notes about unusual ones. number: of the view, from 1."""
    image, valid = np.asarray(xray.line_integrals), np.asarray(xray.valid)
    step = math.ceil(math.sqrt(image.size / IMAGE_SAMPLES))
    image, valid = image[::step, ::step], valid[::step, ::step]
    if not valid.any():
        return []
    low, high = np.quantile(image[valid], [0.001, 0.999])
    bounds, found = view_checks.CHECKS["contrast"], f"line integrals from {low:.4g} to {high:.4g}"
    if view_checks.outside("contrast", float(high - low), "possible"):
        errors.fail("X-rays", f"view {number}", found, bounds.wanted, errors.BadGeometry)
    if view_checks.outside("contrast", float(high - low), "usual"):
        return [f"X-rays: view {number}: {found}, usually they differ by {bounds.usual[0]:g} to {bounds.usual[1]:g}"]
    return []


def _unlike(first, second):
    """1 minus the correlation of two X-rays of one size; None where they cannot be compared."""
    if first.line_integrals.shape != second.line_integrals.shape:
        return None
    step = math.ceil(math.sqrt(first.line_integrals.size / IMAGE_SAMPLES))
    images = [np.asarray(xray.line_integrals)[::step, ::step].astype(np.float64) for xray in (first, second)]
    counts = np.isfinite(images).all(0) & np.all([np.asarray(x.valid)[::step, ::step] for x in (first, second)], 0)
    a, b = (image[counts] - image[counts].mean() for image in images) if counts.any() else (np.zeros(0),) * 2
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(1.0 - a @ b / scale) if scale > 0 else None


def _half_pixel(view):
    """Pixels by which a principal point of half the image's size, binned or not, is off the image's middle; 0 for others."""
    off = view.k[2:] - 0.5 * (view.size - 1)
    for factor in range(1, MAX_BINNING + 1):
        if np.abs(off - 0.5 / factor).max() < 1e-4:
            return 0.5 / factor
    return 0.0


def half_pixel_error(cameras: Sequence[Camera], point: Real[Array, "3"]) -> float:
    """How far off, mm, a pose may be whose cameras have a principal point of exactly half the image's size; 0 where none has.

    Pixel centres are integers here, so the middle of a W x H image is ((W - 1) / 2, (H - 1) / 2). Who means the middle and writes
    (W / 2, H / 2) moves each view by half a pixel along u and v, which moves the pose by half a pixel along three axes. Whether it
    is meant cannot be seen, so `confidence.judge` adds it to the radius.

    Args:
      point: the vertebra's centre, world mm.
    """
    views = [view_checks.view_of(camera) for camera in cameras]
    off = [_half_pixel(v) * abs(v.project(np.asarray(point, np.float64)[None])[0][0]) / v.k[0] for v in views]
    return math.sqrt(3.0) * float(max(off, default=0.0))


def hint(vertebra: Vertebra, xrays: Sequence[XRay], start: Float[Array, "4 4"]) -> str:
    """For a pose that was refused after the search: what the start pose may have been meant as, in a line; empty if nothing fits.

    A start in LPS may lie in every image all the same, where only the search shows that it is wrong. Other mistakes are named if
    the start shows a part of the vertebra alone. Arguments as in `check`.
    """
    views, start = [view_checks.view_of(xray.camera) for xray in xrays], np.asarray(start, np.float64)
    points, centre = _surface(vertebra)
    world, middle = view_checks.moved(start, points), view_checks.moved(start, centre)
    whole = all(view_checks.measure(view, world, middle)["share in the image"] == 1.0 for view in views)
    for text, mend in START_MENDS:
        T = mend(start)
        away = float(np.linalg.norm(view_checks.moved(T, centre) - middle))
        world = view_checks.moved(T, points), view_checks.moved(T, centre)
        if (text == IN_LPS or not whole) and away > FAR_MM and all(view_checks.fits(view, *world) for view in views):
            return f"start pose: every image would show {text} as well, {away:.0f} mm away"
    return ""


def least_share(vertebra: Vertebra, xrays: Sequence[XRay], start: Float[Array, "4 4"]) -> float:
    """Smallest share, 0 to 1, of the vertebra's surface inside the frame of an X-ray; arguments as in `check`."""
    points, centre = (view_checks.moved(np.asarray(start, np.float64), p) for p in _surface(vertebra))
    views = [view_checks.view_of(xray.camera) for xray in xrays]
    return min(view_checks.measure(view, points, centre)["share in the image"] for view in views)


def _surface(vertebra):
    """Some of the vertebra's surface points (n, 3), and its centre (3,), CT mm."""
    step = max(1, len(vertebra.points) // SURFACE_POINTS)
    return vertebra.points[::step].astype(np.float64), vertebra.ct_from_box[:3, 3].astype(np.float64)


def check(
    vertebra: Vertebra,
    xrays: Sequence[XRay],
    start: Float[Array, "4 4"],
    cameras_from: object = "cameras",
    start_from: object = "start pose",
) -> tuple[str, ...]:
    """Checks the geometry of a case before anything is searched for; `view_checks.CHECKS` says what, and why.

    Args:
      xrays: one or more views; start: world_from_ct, mm, rigid.
      cameras_from, start_from: what an error names as their source, such as files.

    Returns:
      Notes, each of one line: what is unusual and yet may be right.

    Raises:
      BadGeometry: cameras, X-rays or a start pose that cannot be meant. The line has the numbers and, where one mistake explains
        them all, the mend.
    """
    views, start = [view_checks.view_of(xray.camera) for xray in xrays], np.asarray(start, np.float64)
    points, centre = _surface(vertebra)
    world, middle, notes = view_checks.moved(start, points), view_checks.moved(start, centre), []
    for number, (view, xray) in enumerate(zip(views, xrays), 1):
        name, found = view_checks.impossible(view, world, middle)
        if name is not None:
            _refuse(views, points, centre, start, number - 1, name, found[name], cameras_from, start_from)
        for what, value in found.items():
            if view_checks.outside(what, value, "usual"):
                low, high = view_checks.CHECKS[what].usual
                said = f"{what} is {value:.3g} {view_checks.CHECKS[what].unit}".strip()
                source = start_from if what in _OF_START else cameras_from
                notes.append(f"{source}: view {number}: {said}, usual {low:.3g} to {high:.3g}")
        if _half_pixel(view):
            off_mm = half_pixel_error([xray.camera], middle)
            notes.append(
                f"{cameras_from}: view {number}: the principal point is half the image's size; if its middle is meant, that is "
                f"(W - 1) / 2, (H - 1) / 2, and poses are up to {off_mm:.2f} mm off; the radius covers that"
            )
    for number, xray in enumerate(xrays, 1):
        notes += _contrast(number, xray)
        view_checks.refuse_noise(xray.line_integrals, np.asarray(xray.valid), "X-rays", f"view {number}")
    _copies(views, xrays, world, cameras_from)
    angle = confidence.view_angle(np.stack([view.E for view in views]), middle)
    if angle is None:
        notes.append("X-rays: a single view, of which no pose is accepted")
    elif view_checks.outside("angle between the views", math.degrees(angle), "usual"):
        least = math.degrees(confidence.MIN_VIEW_ANGLE_RAD)
        notes.append(
            f"{cameras_from}: the views are {math.degrees(angle):.1f} degrees apart at the vertebra (0 and 180 are one direction); "
            f"below {least:.0f} no pose is accepted"
        )
    return tuple(notes)
