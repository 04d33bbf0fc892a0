"""What is possible in one view, and what is usual: the table of geometry checks, and what they measure. numpy, float64.

`plausibility.check` uses it before a search.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import errors
from radgs_jax.geometry.camera import Camera
from radgs_jax.registration import confidence

PITCH_MM = (0.02, 0.7)
"""Pixel pitches, mm, that intrinsics in mm are recognised by: from micro-CT detectors to binned panels. Above, the
principal point would be so near the image's centre that calibrations differ as much; half of the lower end is no detector."""
SOURCE_DETECTOR_MM = (300.0, 3000.0)
"""Distances from source to detector, mm, that are recognised in intrinsics in mm. C-arms have 900 to 1300; half or twice the ends
is no X-ray set-up."""
SQUARE_TOLERANCE = 0.005
"""Relative difference of the pitches that the two axes of intrinsics in mm show. Chosen by hand: half misses rounded numbers, twice
takes more crops of an image for intrinsics in mm."""
CORNER = 0.05
"""Distance of a principal point from the pixel (0, 0), as a share of the image's sides, that shows intrinsics in mm about the
detector's centre. Chosen by hand: offsets of detectors are a few mm in hundreds; it refuses only what leaves the image, too."""
OTHER_SIZE, OTHER_FROM = 0.02, 1.4
"""A camera for another image size is recognised by two scales that agree to this relative difference, and differ from 1 by this
factor. Chosen by hand: principal points off the middle make such differences. Half the first or twice the second names fewer such
cameras; the other way round, unrelated mistakes are taken for them. Nothing is refused for it that lies inside its image."""
AREAS = 24
"""Areas along the smaller side at which noise is looked for, whose means leave the noise of an X-ray behind. Chosen by hand: half
has too few to judge, twice keeps more noise."""
LARGEST_AREA_PX = 16
"""Largest side of such an area, in pixels. Chosen by hand: half keeps more noise, twice blurs small X-rays."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What values a check lets pass.

    Attributes:
      unit: of the value.
      possible: (low, high); values outside are refused.
      usual: (low, high); values outside are said, where they are not refused.
      wanted: what an error asks for.
      why: the reason for the bounds, and what half or twice would do.
    """

    unit: str
    possible: tuple[float, float]
    usual: tuple[float, float]
    wanted: str
    why: str


ANY = (-math.inf, math.inf)
"""Bounds of a value that is not held to any."""

CHECKS = {
    "angle of view": Bounds(
        "degrees",
        (0.2, 50.0),
        (0.2, 40.0),
        "focal lengths in pixels: the distance from source to detector over the pixel pitch",
        "A C-arm's is 13 to 20, a 43 cm panel's 24 at 1 m, a long image's of 124 cm 38 at 1.8 m; 1000 mm taken for pixels give 54 "
        "in an image of 1024. A window round one vertebra has 1. Half of the upper end refuses panels, twice lets K in mm pass.",
    ),
    "fx / fy": Bounds(
        "",
        (1 / 3, 3.0),
        (0.98, 1.02),
        "two focal lengths that differ as a pixel's height and width do",
        "Pixels are square within 0.3 % in calibrations seen; binned along one axis they are 1 to 2. Half would refuse these.",
    ),
    "distance from the source": Bounds(
        "mm",
        (100.0, 5000.0),
        ANY,
        "100 to 5000 mm",
        "From the source to the vertebra: 600 to 900 in C-arms, 1000 in biplane rooms, 100 to 300 in bench-top scanners, 1800 to "
        "3000 in long images. In cm or m it is 0.7 to 90. Half takes cm for mm, twice refuses bench-top scanners.",
    ),
    "share in the image": Bounds(
        "",
        (1e-6, 1.0),
        (0.5, 1.0),
        "it there in part at least",
        "Share of the vertebra's surface inside the image's frame. A start of 25 mm off at the frame may show half; one that shows "
        "nothing cannot be compared with the image. Half of the usual bound says less, twice says it of every cut vertebra.",
    ),
    "outside the image": Bounds(
        "mm",
        (0.0, 40.0),
        ANY,
        "a start pose that is some centimetres off at most",
        "How far the vertebra's centre lies beyond the frame, at its depth. Searches reach 24 mm across the spine, and a level "
        "of them 10 to 15 mm more. Half refuses starts that can still succeed, twice searches where nothing is.",
    ),
    "size in the image": Bounds(
        "px",
        (8.0, math.inf),
        ANY,
        "8 pixels or more",
        "Side of the vertebra's box in the image. The coarsest level has 3 mm pixels, of which a vertebra has 10 to 30; the tests' "
        "images have 16 and more. Half of 8 pixels shows no edges to align.",
    ),
    "size against the image": Bounds(
        "times",
        (0.0, 3.0),
        (0.0, 1.0),
        "a bone of the image's size at most",
        "A close window may cut a vertebra or a long bone. Half refuses such, twice lets sources inside the patient pass.",
    ),
    "the same camera": Bounds(
        "px",
        (0.5, math.inf),
        ANY,
        "cameras of two sides",
        "Largest distance of the vertebra's points in two views of one image size. Half a pixel, or 0.05 degrees, is less than "
        "calibrations are good for. Half lets a rounded copy pass; twice is still far below any two views.",
    ),
    "the same image": Bounds(
        "",
        (1e-4, math.inf),
        ANY,
        "X-rays of two sides",
        "1 minus the correlation of two images. A copy has 0, one stored again in 8 bits up to 8e-5; simulated views have 7e-5 to "
        "3e-4 half a degree apart, 3e-3 and more at 5 degrees, and 0.2 at 45. Half misses coarse copies, twice changes little.",
    ),
    "contrast": Bounds(
        "",
        (0.02, 40.0),
        (0.2, 20.0),
        "line integrals, ln(air / intensity), of a body: they differ by 0.2 to 20 within an image",
        "Range of an image's line integrals, but for one pixel in a thousand at either end. Hands have 1, trunks 3 to 10; a "
        "16-bit detector tells 11 apart, and simulated X-rays without noise reach 20. Noise alone has below 0.02. Half or twice "
        "still refuses empty images, intensities of 8 bits or more, and numbers that are off by 1000.",
    ),
    "correlation of areas": Bounds(
        "",
        (0.3, math.inf),
        ANY,
        "an X-ray",
        "Of neighbouring areas of an image, along rows or columns. White noise of 500 areas has 0 +- 0.04, X-rays have more than "
        "0.9. Half or twice still parts them.",
    ),
    "angle between the views": Bounds(
        "degrees",
        ANY,
        (math.degrees(confidence.MIN_VIEW_ANGLE_RAD), 90.0),
        "views from two sides",
        "Such a pair is registered and never accepted: see `confidence.MIN_VIEW_ANGLE_RAD`.",
    ),
    "principal point": Bounds(
        "",
        ANY,
        (0.0, 1.0),
        "a principal point in pixels of this image",
        "Distance from the image's centre over half its side. Up to 0.15 in calibrations seen; a window cut out of an image may "
        "have more, so that it refuses nothing by itself (`impossible`). Half says it of such windows, twice of none of them.",
    ),
}
"""Each check: what is measured (the key), its bounds and their reason. All are set by hand from the set-ups that they name."""


@dataclasses.dataclass(frozen=True)
class View:
    """A camera in numpy.

    Attributes:
      k: (4,) fx, fy, cx, cy, pixels; E: (4, 4) camera_from_world, mm; size: (2,) width and height, pixels.
    """

    k: Float[np.ndarray, "4"]
    E: Float[np.ndarray, "4 4"]
    size: Float[np.ndarray, "2"]

    def project(
        self, points_world: Float[np.ndarray, "n 3"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n 2"]]:
        """Depths in mm, and pixels (u, v), which are nan behind the source."""
        camera = moved(self.E, points_world)
        depth = np.where(camera[:, 2] > 1e-6, camera[:, 2], np.nan)
        return camera[:, 2], camera[:, :2] / depth[:, None] * self.k[:2] + self.k[2:]


def view_of(camera: Camera) -> View:
    """The `View` of a camera."""
    k, E = (np.asarray(a, np.float64) for a in (camera.intrinsics, camera.camera_from_world))
    return View(k, E, np.array([camera.width, camera.height], np.float64))


def moved(T: Float[np.ndarray, "4 4"], points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Points, or one point, in the frame that T leads to."""
    return points @ T[:3, :3].T + T[:3, 3]


def pitch_of_mm(view: View) -> float:
    """The pixel pitch, mm, of intrinsics that look as if they were in mm; 0 if they do not."""
    low, high = SOURCE_DETECTOR_MM
    (u, v), (fx, fy) = 2 * view.k[2:] / (view.size - 1 + 1e-9), view.k[:2]
    if not low <= fx <= high or abs(fx / fy - 1) > SQUARE_TOLERANCE:
        return 0.0
    square = v > 0 and abs(u / v - 1) <= SQUARE_TOLERANCE and PITCH_MM[0] <= u <= PITCH_MM[1]
    return float(0.5 * (u + v)) if square else 0.0


def in_corner(view: View) -> bool:
    """Whether the principal point is near pixel (0, 0), as that of intrinsics in mm about the detector's centre is."""
    low, high = SOURCE_DETECTOR_MM
    return bool(low <= view.k[0] <= high and (np.abs(view.k[2:]) <= CORNER * view.size).all())


def other_size(view: View) -> float:
    """How many times as large as this image the one is whose middle the principal point is; 1 if none of another size is."""
    scale = (2 * view.k[2:] + 1) / view.size
    other = (
        (scale > 0).all() and abs(scale[0] / scale[1] - 1) < OTHER_SIZE and not 1 / OTHER_FROM < scale[0] < OTHER_FROM
    )
    return float(scale.mean()) if other else 1.0


def beyond_mm(view: View, point: Float[np.ndarray, "3"]) -> float:
    """How far beyond the image's frame, mm at its depth, a world point (3,) projects; nan behind the source."""
    depth, uv = view.project(point[None])
    beyond = uv[0] - np.clip(uv[0], -0.5, view.size - 0.5)
    return float(np.linalg.norm(beyond * depth[0] / view.k[:2]))


def distance_mm(view: View, point: Float[np.ndarray, "3"]) -> float:
    """From the source to a world point (3,), mm; negative behind the source."""
    place = moved(view.E, point)
    return math.copysign(float(np.linalg.norm(place)), place[2])


def measure(view: View, points: Float[np.ndarray, "n 3"], centre: Float[np.ndarray, "3"]) -> dict[str, float]:
    """The values of the checks of one view, of surface points (n, 3) and a centre (3,) in world mm."""
    _, uv = view.project(points)
    inside = ((uv >= -0.5) & (uv <= view.size - 0.5)).all(1)
    box = np.ptp(uv, axis=0) if np.isfinite(uv).all() else np.full(2, np.inf)
    return {
        "angle of view": math.degrees(2 * math.atan(0.5 * float(np.max(view.size / np.abs(view.k[:2]))))),
        "fx / fy": float(view.k[0] / view.k[1]),
        "distance from the source": distance_mm(view, centre),
        "share in the image": float(inside.mean()),
        "outside the image": beyond_mm(view, centre),
        "size in the image": float(box.max()),
        "size against the image": float((box / view.size).max()),
        "principal point": float(np.abs((view.k[2:] - 0.5 * (view.size - 1)) / (0.5 * view.size)).max()),
    }


def correlation_of_areas(
    line_integrals: Float[Array, "height width"], valid: Bool[Array, "height width"]
) -> float | None:
    """How alike neighbouring areas of an image are, along rows or columns, whichever are more; None where too few are valid."""
    side = max(1, min(LARGEST_AREA_PX, min(line_integrals.shape) // AREAS))
    height, width = (n // side for n in line_integrals.shape)
    pixels, weights = np.where(valid, line_integrals, 0.0), np.asarray(valid, np.float32)
    # Rows are added first: one pass over whole rows takes a third of the time of a sum over both axes.
    rows = (x[: height * side, : width * side].reshape(height, side, width * side).sum(1) for x in (pixels, weights))
    sums, counts = (row.reshape(height, width, side).sum(2) for row in rows)
    seen = counts > 0.5 * side * side
    means = sums / np.maximum(counts, 1)
    if seen.any():
        # A few odd pixels must not outweigh all others.
        means = np.clip(means, *np.quantile(means[seen], (0.02, 0.98)))
    found = []
    for first, second in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        both = seen[first] & seen[second]
        a, b = means[first][both], means[second][both]
        if a.size >= AREAS * AREAS // 2 and a.std() > 0 and b.std() > 0:
            found.append(float(np.corrcoef(a, b)[0, 1]))
    return max(found, default=None)


def refuse_noise(
    line_integrals: Float[Array, "height width"], valid: Bool[Array, "height width"], source: object, field: str
) -> None:
    """Raises an InputError of an image whose neighbouring areas have nothing in common; source, field: what the error names."""
    found = correlation_of_areas(line_integrals, valid)
    if found is not None and outside("correlation of areas", found, "possible"):
        shown = f"areas that have nothing in common with their neighbours (correlation {found:.2f}), as in noise"
        errors.fail(source, field, shown, CHECKS["correlation of areas"].wanted)


def outside(name: str, value: float, which: str) -> bool:
    """Whether a value is outside the bounds of the check `name`; which: "possible" or "usual"."""
    low, high = getattr(CHECKS[name], which)
    # Comparisons with nan are false, so that a value that is not a number is outside.
    return not low <= value <= high


def impossible(
    view: View, points: Float[np.ndarray, "n 3"], centre: Float[np.ndarray, "3"]
) -> tuple[str | None, dict[str, float]]:
    """The first check that a view does not pass, and the values of all; None for the name where it passes."""
    found = measure(view, points, centre)
    name = next((name for name, value in found.items() if outside(name, value, "possible")), None)
    if name is None:
        # A window cut out of an image may have any principal point, and shows the vertebra.
        whole = found["share in the image"] == 1.0
        half = not outside("share in the image", found["share in the image"], "usual")
        corner = in_corner(view) and not (whole and view.k[2:].any())
        if pitch_of_mm(view) or corner or (other_size(view) > 1.0 and not half):
            name = "principal point"
    return name, found


def fits(view: View, points: Float[np.ndarray, "n 3"], centre: Float[np.ndarray, "3"]) -> bool:
    """Whether a mended view passes every check, with the vertebra's centre in the image."""
    if outside("distance from the source", distance_mm(view, centre), "possible") or beyond_mm(view, centre) != 0.0:
        return False
    return impossible(view, points, centre)[0] is None
