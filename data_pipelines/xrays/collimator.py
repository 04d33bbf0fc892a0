"""Finds the border of a collimated X-ray in the image: straight blades or a round diaphragm."""

import dataclasses
import functools

import numpy as np
import scipy

from data_pipelines.xrays import surroundings
from data_pipelines.xrays import turned_borders
from radgs_jax.geometry import camera

PENUMBRA_PX = 2
"""Width in pixels along the collimator's border that is not valid, since its shadow is not sharp. Chosen by hand: half may keep
shadow, twice loses image."""


@dataclasses.dataclass(frozen=True)
class Border:
    """The border of the exposed field, in pixels.

    Attributes:
      kind: 'none', 'rectangle' (one to four straight borders), 'circle' or 'convex' (a shape without lines or circle).
      mask: (H, W) bool, True inside.
      lines: (n, 3), a u + b v >= c inside, with (a, b) a unit vector.
      circle: (u, v, radius), or None.
    """

    kind: str
    mask: np.ndarray
    lines: np.ndarray
    circle: tuple[float, float, float] | None


# All constants below are chosen by hand; test_collimator.py checks them on simulated fields. "Pixels" in them are those of
# the search image, and steps and structure are differences of the natural logarithm of intensity.
_SEARCH_PX = 384
"""Larger side of the search image, at most, in pixels; the border is refined on the full image. Half loses weak borders to
averaging, twice takes four times as long."""
_LINE_SEARCH_PX = 256
"""The same for line integrals, of which many are read at once. Half misses weak borders, twice takes four times as long."""
_BLACKEST = 40.0
"""Line integral of a pixel without any signal: exp(-40) is nothing in float32. Half is nothing as well, twice overflows."""
_TILT_DEG = 8.0
"""Largest rotation of a straight border against the image side. Half misses rotated collimators, twice fits oblique anatomy."""
_CANDIDATES = 8
"""Number of straight borders, and of circles, that are tested. Half may miss the border behind anatomy, twice doubles the time."""
_MAX_BORDER = 0.45
"""A straight border's distance from its side is below this fraction of the image, since a field contains the image's middle."""
_MIN_SCORE = 0.05
"""Lowest mean step over the length of the image for a candidate. Half adds candidates, twice misses short or weak borders."""
_STEP = 0.3
"""A step of this size counts in full. Half accepts steps within anatomy, twice misses borders behind strong scatter."""
_PEAK = 0.3
"""A step along a ray is a point of a circle if it is above this fraction of _STEP. Half adds points of anatomy, twice loses weak
borders."""
_COHERENT = 0.6
"""Lowest mean along a border of its steps, each divided by _STEP and clipped to 1. Half accepts anatomy; 1 is the maximum."""
_RISING = 0.9
"""Fraction of a border's points with an inward step above a tenth of _STEP. Half accepts anatomy; 1 is the maximum."""
_WINDOW, _NESTED = 3, 0.95
"""Lines of a window within a circle, and the largest share of the circle that it has. Fewer lines take anatomy in a round field for
its border, and so does a share of half."""
_MIN_SEGMENT = 0.1
"""Shortest border as a fraction of the smaller image side. Half accepts edges of small structures, twice misses corners."""
_MIN_INSIDE = 0.02
"""Smallest field as a fraction of the image. Half accepts very small fields, twice misses strongly collimated ones."""
_DARKER = 1.5
"""Lowest ratio of the bright ends inside and outside (quantiles 0.99 and 0.9). Nearer to 1 accepts anatomy, twice misses borders
behind strong scatter."""
_SHADOW = 0.25
"""Quantile of the intensity inside that the median outside must not exceed. Twice takes more of a table's edge beside a body for a
border, half misses borders beside strong scatter."""
_BLACK = 12.0
"""Ratio above which structure outside is allowed, since blades transmit a little. Half accepts dense anatomy, twice refuses borders
whose shadow shows anatomy."""
_NOISE_PIXELS = 2000
"""Number of pixels that the noise is measured at. Half is still within 5 %, twice takes twice the time."""
_FLAT = 0.25
"""Largest structure of the shadow: quantile 0.9 of the difference of Gaussian means over _FINE_PX and _COARSE_PX. Half refuses
noisy shadows, twice accepts anatomy."""
_FINE_PX, _COARSE_PX = 1.5, 6.0
"""Standard deviations in pixels of these means: noise is averaged by both, and scatter is smooth at either scale."""
_FLOOR = 0.003
"""Intensity, as a fraction of the bright level, that is added before the logarithm. Half shows noise as steps, twice hides borders
of strongly attenuated fields."""
_NOISE_FLOOR = 6.0
"""Standard deviations of the noise that are added as well. Half shows noise as steps, twice hides borders of dim fields."""
_CONTRAST = 1.15
"""Lowest ratio of intensity inside to outside for a crossing of the half level. Nearer to 1 fits noise, higher drops points."""
_NEAR_PX = 1.5
"""Largest distance in pixels between a border and the points that are counted for it. Half loses points to noise, twice counts
points of other edges."""
_OUTLIER = 2.5
"""Points further from a fit than this multiple of the median distance are dropped. Half drops good points, twice keeps outliers."""
_STRAIGHT = 0.75
"""Fraction of a border's points that must be within _NEAR_PX of the fit. Half accepts curved anatomy; 1 is the maximum."""
_CIRCLE_TRIALS = 1500
"""Number of random triples of points in the search for circles (RANSAC). Half misses some circles, twice takes twice the time."""
_CIRCLE_RADIUS = (0.2, 1.0)
"""Smallest and largest radius of a circle as a fraction of the smaller image side."""
_CIRCLE_OFFSET = 0.3
"""Largest offset of its centre from the image's, as the same fraction. Half misses decentred fields, twice accepts anatomy."""
_MIN_RAYS = 20
"""Smallest number of the 180 rays that agree on a circle. Half tests more circles, twice misses partly visible ones."""


def of_line_integrals(image: np.ndarray) -> np.ndarray:
    """The valid pixels (H, W) bool of line integrals: inside the collimator, without its penumbra; all True if there is none.

    Args:
      image: (H, W) line integrals -ln(I / I0); pixels that are not finite count as black.
    """
    return without_penumbra(find_in_line_integrals(image))


def without_penumbra(border: Border) -> np.ndarray:
    """The pixels (H, W) bool that are further than PENUMBRA_PX inside a border."""
    if border.kind == "none":
        return border.mask
    return scipy.ndimage.binary_erosion(border.mask, iterations=PENUMBRA_PX, border_value=1)


def find_in_line_integrals(image: np.ndarray) -> Border:
    """Finds the border of a collimated X-ray that is given as line integrals. Deterministic.

    What lies outside may be constant (also 0, where a program filled it), black, noise, or scatter: the first two are told
    from the field by their numbers and may leave any convex shape, the last ones as `find` does.

    Args:
      image: (H, W) line integrals -ln(I / I0); pixels that are not finite count as black.
    """
    image = np.asarray(image, np.float32)
    image = np.clip(np.where(np.isfinite(image), image, _BLACKEST), -_BLACKEST, _BLACKEST)
    for search in (surroundings.field_in_constant, surroundings.field_in_black):
        field = search(image)
        if field is not None:
            return Border("convex", field, np.zeros((0, 3)), None)
    return find(np.exp(-image), _LINE_SEARCH_PX, turned=True)


def find(image: np.ndarray, search_px: int = _SEARCH_PX, turned: bool = False) -> Border:
    """Finds the border of a collimated X-ray, straight or circular. Deterministic.

    A border is a line along an image side (rotated by at most _TILT_DEG) or a circle. Intensity rises inwards along nearly
    all of it, and the area outside is dark and without structure. Anatomy fails one of these conditions. Lines are found by
    summing the clipped logarithmic step over all lines (a Hough transform of the signed gradient), circles by RANSAC on steps
    along rays. Both are then fitted to the half-level crossings in the full image.

    Args:
      image: (H, W) linear intensity on any positive scale.
      search_px: larger side of the search image, at most, in pixels.
      turned: also search for straight borders at any angle.
    """
    image = np.asarray(image, np.float32)
    height, width = image.shape
    nothing = Border("none", np.ones(image.shape, bool), np.zeros((0, 3)), None)
    factor = max(1, -(-max(height, width) // search_px))
    small = scipy.ndimage.gaussian_filter(camera.bin_image(image, factor), 0.7)
    bright = np.quantile(small, 0.99)
    if min(small.shape) < 32 or not bright > 0:
        return nothing
    # Without signal, the logarithm of the noise has steps of any size.
    noise = _dark_noise(small)
    log = np.log(np.clip(small, 0, bright) + max(_FLOOR * bright, _NOISE_FLOOR * noise))
    smooth = functools.cache(lambda: scipy.ndimage.gaussian_filter(image, 0.5 * factor))
    circle = _find_circle(log)
    circle = None if circle is None else _refine_circle(smooth(), circle, factor)
    found = nothing
    if circle is not None:
        v, u = np.ogrid[:height, :width]
        inside = (u - circle[0]) ** 2 + (v - circle[1]) ** 2 <= circle[2] ** 2
        found = Border("circle", inside, np.zeros((0, 3)), circle)
    # Part of a circle can pass for a line. So lines count only where there is no circle, or well within it: then the circle is that
    # of scatter round the field.
    for candidates in (_upright_candidates, turned_borders.candidates) if turned else (_upright_candidates,):
        lines = _find_lines(log, candidates(log, _CANDIDATES))
        lines = [_refine_line(smooth(), line, [o for o in lines if o is not line], factor) for line in lines]
        lines = np.array([line for line in lines if line is not None]).reshape(-1, 3)
        inside = _inside_lines(image.shape, lines)
        within = (
            len(lines) >= _WINDOW and not (inside & ~found.mask).any() and inside.mean() < _NESTED * found.mask.mean()
        )
        better = within if found.circle is not None else len(lines) > len(found.lines)
        if better and _is_shadow(image, inside, factor):
            found = Border("rectangle", inside, lines, None)
    return found


def _is_shadow(image, inside, factor):
    """Whether most of what lies outside is darker than nearly all that lies inside, as no table or blanket beside a body is."""
    image, inside = image[::factor, ::factor], inside[::factor, ::factor]
    if inside.all() or not inside.any():
        return False
    return np.median(image[~inside]) <= np.quantile(image[inside], _SHADOW)


def _dark_noise(small):
    """Standard deviation of the noise in the dark fifth of an image, from _NOISE_PIXELS deviations from medians of 5 x 5."""
    padded = np.pad(small, 2, mode="reflect")
    at = np.flatnonzero(small <= np.quantile(small, 0.2))
    v, u = np.divmod(at[:: max(1, len(at) // _NOISE_PIXELS)], small.shape[1])
    around = np.stack([padded[v + dv, u + du] for dv in range(5) for du in range(5)])
    return 1.5 * np.median(np.abs(around[12] - np.median(around, 0)))


def _inside_lines(shape, lines, margin=0.0):
    v, u = np.ogrid[: shape[0], : shape[1]]
    inside = np.ones(shape, bool)
    for a, b, c in lines:
        inside &= a * u + b * v >= c + margin
    return inside


def _sample(image, u, v):
    return scipy.ndimage.map_coordinates(image, [v, u], order=1, mode="nearest")


def _steps(log, u, v, normal):
    """Logarithmic step at points, inwards along `normal`: difference of the means over three pixels on either side of the blur."""
    offsets = np.array([1.5, 2.5, 3.5])[:, None]
    inner = _sample(log, u + offsets * normal[0], v + offsets * normal[1]).mean(0)
    outer = _sample(log, u - offsets * normal[0], v - offsets * normal[1]).mean(0)
    return inner - outer


def _upright_candidates(log, count):
    """For each image side, up to `count` straight borders (a, b, c) along it, best first."""
    return [
        [_turn_back(*line, log.shape, side) for line in _left_borders(np.rot90(log, side), count)] for side in range(4)
    ]


def _find_lines(log, candidates):
    """Straight borders (a, b, c) in pixels of `log`, at most one of the candidates for each side."""
    candidates = [[line for line in lines if _dark_beyond(log, *_sides_of(log.shape, line))] for lines in candidates]
    chosen = [lines[0] if lines else None for lines in candidates]
    # A border is judged along its segment, which ends at the other borders. So the best candidate is chosen for each side in turn.
    # Then weak borders are removed one by one, since removing one lengthens the segments of the others.
    for _ in range(2):
        for side, lines in enumerate(candidates):
            others = [line for k, line in enumerate(chosen) if k != side and line is not None]
            scores = [_coherence(log, line, others) for line in lines]
            chosen[side] = lines[int(np.argmax(scores))] if lines else None
    while True:
        kept = [line for line in chosen if line is not None]
        scores = [_coherence(log, line, [other for other in kept if other is not line]) for line in kept]
        if not kept or min(scores) > 0:
            return kept
        weakest = kept[int(np.argmin(scores))]
        chosen = [line for line in kept if line is not weakest]


def _sides_of(shape, line):
    """Masks of the pixels inside a line with a margin outwards, and with a margin inwards, which exclude the blur."""
    a, b, c = line.astype(np.float32)
    distance = a * np.arange(shape[1], dtype=np.float32) + (b * np.arange(shape[0], dtype=np.float32) - c)[:, None]
    return distance >= -1.5, distance >= 2.5


def _turn_back(a, b, c, shape, side):
    """The line a u' + b v' >= c in pixels of np.rot90(image, side), converted to pixels of the image, which has `shape`."""
    right, bottom = shape[1] - 1, shape[0] - 1
    if side == 1:  # u' = v, v' = right - u
        a, b, c = -b, a, c - b * right
    elif side == 2:  # u' = right - u, v' = bottom - v
        a, b, c = -a, -b, c - a * right - b * bottom
    elif side == 3:  # u' = bottom - v, v' = u
        a, b, c = b, -a, c - a * bottom
    return np.array([a, b, c])


def _left_borders(log, count):
    """The strongest borders (a, b, c) on the left, best first: local maxima of the clipped step summed along lines."""
    rows, columns = log.shape
    padded = np.pad(log, ((0, 0), (5, 5)), mode="edge")
    total = np.cumsum(np.pad(padded, ((0, 0), (1, 0))), 1)
    # Step at the border to the left of column c: mean of columns c + 1 .. c + 3 minus that of c - 4 .. c - 2.
    at = np.arange(columns) + 5
    step = (total[:, at + 4] - total[:, at + 1]) - (total[:, at - 1] - total[:, at - 4])
    step = np.clip(step / 3, -_STEP, 1)  # more than scatter makes, but no single pixel dominates
    slopes = np.tan(np.radians(np.linspace(-_TILT_DEG, _TILT_DEG, 33)))
    middle = 0.5 * (rows - 1)
    # Rows are shifted against each other, with zeros beyond the image.
    beyond, most = int(slopes[-1] * rows) + 1, int(_MAX_BORDER * columns)
    padded = np.pad(step, ((0, 0), (beyond, beyond))).ravel()
    begin = np.arange(rows) * (columns + 2 * beyond) + beyond
    score = np.zeros((len(slopes), columns))
    for k, slope in enumerate(slopes):
        shifted = begin + np.rint(slope * (np.arange(rows) - middle)).astype(int)
        score[k, :most] = padded[shifted[:, None] + np.arange(most)].sum(0)
    peaks = np.argwhere((score == scipy.ndimage.maximum_filter(score, (9, 9))) & (score > _MIN_SCORE * rows))
    best = sorted(peaks.tolist(), key=lambda peak: -score[tuple(peak)])[:count]
    return [
        np.array([1.0, -slopes[k], column - 0.5 - slopes[k] * middle]) / np.hypot(1.0, slopes[k]) for k, column in best
    ]


def _dark_beyond(log, near_inside, well_inside):
    """Whether the area outside a border is dark, and either black or without structure. Scatter is smooth, anatomy is not."""
    outside = ~near_inside
    if outside.sum() < 0.5 * min(log.shape) or well_inside.sum() < _MIN_INSIDE * log.size:
        return False
    drop = np.quantile(log[well_inside][::3], 0.99) - np.quantile(log[outside][::3], 0.9)
    if drop < np.log(_DARKER):
        return False
    if drop > np.log(_BLACK):
        return True
    rows, columns = (slice(at.min(), at.max() + 1) for at in (outside.any(1).nonzero()[0], outside.any(0).nonzero()[0]))
    log, outside = log[rows, columns], outside[rows, columns]
    fine, coarse = (_smooth_within(log, outside, sigma) for sigma in (_FINE_PX, _COARSE_PX))
    return np.quantile(np.abs(fine - coarse)[outside], 0.9) < _FLAT


def _smooth_within(image, mask, sigma):
    """Gaussian mean over the pixels inside `mask`."""
    weight = scipy.ndimage.gaussian_filter(mask.astype(np.float32), sigma, truncate=3, mode="constant")
    total = scipy.ndimage.gaussian_filter(np.where(mask, image, 0), sigma, truncate=3, mode="constant")
    return total / np.maximum(weight, 1e-3)


def _segment(line, shape, others, step=1.0):
    """Points (u, v) of a line that are inside the image and inside the other borders, `step` pixels apart."""
    a, b, c = line
    reach = np.arange(-np.hypot(*shape), np.hypot(*shape), step)
    foot = np.array([a * c, b * c])
    middle = np.array([0.5 * (shape[1] - 1), 0.5 * (shape[0] - 1)])
    along = np.array([-b, a])
    start = foot + along * (along @ (middle - foot))
    u, v = start[0] + reach * along[0], start[1] + reach * along[1]
    keep = (u >= 0) & (u <= shape[1] - 1) & (v >= 0) & (v <= shape[0] - 1)
    for a, b, c in others:
        keep &= a * u + b * v >= c + 4.0
    return u[keep], v[keep]


def _coherence(log, line, others):
    """Mean step along the segment of a line, see `_mean_step`; 0 if the segment is too short."""
    u, v = _segment(line, log.shape, others)
    return _mean_step(_steps(log, u, v, line[:2])) if len(u) > _MIN_SEGMENT * min(log.shape) else 0.0


def _mean_step(steps):
    """Mean of the steps along a border, each clipped to 1; 0 if they are not those of a border."""
    coherent = np.clip(steps / _STEP, -1, 1).mean() > _COHERENT and (steps > 0.1 * _STEP).mean() > _RISING
    # Not clipped to _STEP: the border is a larger step than the smooth rise of scatter towards it.
    return float(np.clip(steps, -1, 1).mean()) if coherent else 0.0


def _crossings(image, u, v, normal, reach):
    """Distance along `normal` from each point to the half level between intensity outside and inside; nan if it is not crossed."""
    offsets = np.linspace(-reach, reach, int(4 * reach) + 1)
    profile = _sample(image, u + offsets[:, None] * normal[0], v + offsets[:, None] * normal[1])
    ends = max(2, len(offsets) // 6)
    low, high = profile[:ends].mean(0), profile[-ends:].mean(0)
    above = profile > 0.5 * (low + high)
    last = len(offsets) - 1 - np.argmax(~above[::-1], 0)  # the crossing nearest to the inside
    last = np.clip(last, 0, len(offsets) - 2)
    index = np.arange(profile.shape[1])
    p0, p1 = profile[last, index], profile[last + 1, index]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (0.5 * (low + high) - p0) / (p1 - p0)
    result = offsets[last] + np.clip(part, 0, 1) * (offsets[1] - offsets[0])
    return np.where((high > _CONTRAST * low) & above[-1] & ~above[0], result, np.nan)


def _on_full_image(line, factor):
    a, b, c = line
    return np.array([a, b, factor * c + 0.5 * (factor - 1) * (a + b)])


def _refine_line(image, line, others, factor):
    """A border of the search image, fitted to the full image; None if its points are not on a line."""
    line, *others = (_on_full_image(each, factor) for each in (line, *others))
    for reach in (4.0 * factor + 4, 2.0 * factor + 4):
        u, v = _segment(line, image.shape, others, max(1.0, factor / 2))
        distance = _crossings(image, u, v, line[:2], reach)
        good = np.isfinite(distance)
        if good.sum() < 10:
            return None
        along = u * -line[1] + v * line[0]
        for _ in range(6):
            slope, offset = np.polyfit(along[good], distance[good], 1)
            residual = np.abs(distance - offset - slope * along)
            limit = max(_NEAR_PX, _OUTLIER * np.median(residual[good]))
            good = np.nan_to_num(residual, nan=np.inf) <= limit
            if good.sum() < 10:
                return None
        turned = np.array([line[0] + slope * line[1], line[1] - slope * line[0], line[2] + offset])
        line = turned / np.hypot(turned[0], turned[1])
    seen = np.isfinite(distance)
    straight = (residual[seen] <= _NEAR_PX * max(1.0, factor / 2)).mean()
    return line if straight > _STRAIGHT else None


def _find_circle(log):
    """(u, v, radius) of a circular border in pixels of `log`, or None."""
    height, width = log.shape
    centre = np.array([0.5 * (width - 1), 0.5 * (height - 1)])
    angles = np.radians(np.arange(0, 360, 2.0))[:, None]
    radii = np.arange(0.15 * min(log.shape), 0.5 * np.hypot(height, width))
    u, v = centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles)
    normal = -np.stack([np.cos(angles) + 0 * u, np.sin(angles) + 0 * u]).reshape(2, -1)
    steps = np.clip(_steps(log, u.ravel(), v.ravel(), normal) / _STEP, -1, 1).reshape(u.shape)
    steps[(u < 3) | (u > width - 4) | (v < 3) | (v > height - 4)] = 0
    # Anatomy makes steps too. Every maximum along a ray is a candidate, and the circle with most rays is tried first.
    peaks = (steps > _PEAK) & (steps == scipy.ndimage.maximum_filter1d(steps, 5, axis=1))
    ray = np.nonzero(peaks)[0]
    points = np.stack([u[peaks], v[peaks]], 1)
    if len(points) < 30:
        return None
    chosen = np.random.default_rng(0).choice(len(points), (_CIRCLE_TRIALS, 3))
    circles = _circles_through(points[chosen])
    size = min(log.shape)
    off = np.abs(circles[:, :2] - centre).max(1)
    smallest, largest = _CIRCLE_RADIUS
    radius = circles[:, 2]
    circles = circles[(radius > smallest * size) & (radius < largest * size) & (off < _CIRCLE_OFFSET * size)]
    votes = _votes(points.astype(np.float32), ray, circles.astype(np.float32))
    holding = []
    for index in np.argsort(votes)[::-1][:_CANDIDATES]:
        if votes[index] < _MIN_RAYS:
            break
        circle = _fit_circle(points[_near(points, circles[index], _NEAR_PX)])
        step = _circle_step(log, circle)
        if step > 0:
            holding.append((step, tuple(circle)))
    # Scatter round the field ends in a circle, too, but with a smaller step.
    return np.array(max(holding)[1]) if holding else None


def _votes(points, ray, circles):
    """Number of rays with a point near each circle. `ray`, the ray of each point, ascends."""
    first = np.flatnonzero(np.r_[True, ray[1:] != ray[:-1]])
    distance = np.hypot(points[:, 0] - circles[:, :1], points[:, 1] - circles[:, 1:2])
    near = np.abs(distance - circles[:, 2:]) < _NEAR_PX
    return np.logical_or.reduceat(near, first, axis=1).sum(1) if len(circles) else np.zeros(0, int)


def _near(points, circle, tolerance):
    return np.abs(np.hypot(points[:, 0] - circle[0], points[:, 1] - circle[1]) - circle[2]) < tolerance


def _circles_through(triples):
    """(N, 3) u, v, radius of the circles through triples of points (N, 3, 2); nan if they are on a line."""
    a, b, c = (triples[:, k] for k in range(3))
    squares = [(p**2).sum(1) for p in (a, b, c)]
    with np.errstate(divide="ignore", invalid="ignore"):
        twice = 2 * (a[:, 0] * (b - c)[:, 1] + b[:, 0] * (c - a)[:, 1] + c[:, 0] * (a - b)[:, 1])
        u = (squares[0] * (b - c)[:, 1] + squares[1] * (c - a)[:, 1] + squares[2] * (a - b)[:, 1]) / twice
        v = (squares[0] * (c - b)[:, 0] + squares[1] * (a - c)[:, 0] + squares[2] * (b - a)[:, 0]) / twice
        return np.stack([u, v, np.hypot(a[:, 0] - u, a[:, 1] - v)], 1)


def _fit_circle(points):
    """Least-squares circle (Kasa): 2 u u0 + 2 v v0 + (r^2 - u0^2 - v0^2) = u^2 + v^2."""
    u0, v0, rest = np.linalg.lstsq(np.c_[2 * points, np.ones(len(points))], (points**2).sum(1), rcond=None)[0]
    return np.array([u0, v0, np.sqrt(max(rest + u0**2 + v0**2, 0.0))])


def _arc(circle, shape, margin, count=720):
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    normal = -np.stack([np.cos(angles), np.sin(angles)])
    u, v = circle[0] - circle[2] * normal[0], circle[1] - circle[2] * normal[1]
    keep = (u >= margin) & (u <= shape[1] - 1 - margin) & (v >= margin) & (v <= shape[0] - 1 - margin)
    return u[keep], v[keep], normal[:, keep]


def _circle_step(log, circle):
    """Mean step along a circle, see `_mean_step`; 0 if it is not the border of a field."""
    u, v, normal = _arc(circle, log.shape, 4)
    if len(u) < 100:
        return 0.0
    step = _mean_step(_steps(log, u, v, normal))
    if step <= 0:
        return 0.0
    rows, columns = np.ogrid[: log.shape[0], : log.shape[1]]
    distance = np.hypot(columns - circle[0], rows - circle[1])
    dark = _dark_beyond(log, distance < circle[2] + 1.5, distance < circle[2] - 2.5)
    return step if dark else 0.0


def _refine_circle(image, circle, factor):
    shift = 0.5 * (factor - 1)
    circle = np.array([factor * circle[0] + shift, factor * circle[1] + shift, factor * circle[2]])
    for reach in (4.0 * factor + 4, 2.0 * factor + 4):
        u, v, normal = _arc(circle, image.shape, 2)
        distance = _crossings(image, u, v, normal, reach)
        seen = np.isfinite(distance)
        if seen.sum() < 50:
            return None
        good = seen & (np.abs(distance - np.median(distance[seen])) < max(3.0, 0.5 * reach))
        for _ in range(4):
            points = np.stack([u + distance * normal[0], v + distance * normal[1]], 1)
            circle = _fit_circle(points[good])
            residual = np.abs(np.hypot(*(points - circle[:2]).T) - circle[2])
            good = np.nan_to_num(residual, nan=np.inf) <= max(_NEAR_PX, _OUTLIER * np.median(residual[good]))
    straight = (residual[seen] <= _NEAR_PX * max(1.0, factor / 2)).mean()
    return tuple(float(n) for n in circle) if straight > _STRAIGHT else None
