"""The border of a collimated X-ray, found in the image: straight blades or a round diaphragm."""

import dataclasses

import numpy as np
import scipy

from radgs_jax.geometry import camera


@dataclasses.dataclass(frozen=True)
class Border:
    """kind: 'none', 'rectangle' (one to four straight borders) or 'circle'; mask: (H, W) bool, True inside.

    lines: (n, 3), a u + b v >= c inside, (a, b) a unit vector; circle: (u, v, radius) or None; pixels.
    """

    kind: str
    mask: np.ndarray
    lines: np.ndarray
    circle: tuple | None


_SEARCH_PX = 384  # the border is looked for on an image of about this size, then refined on the whole one
_TILT_DEG = 8.0
_STEP = 0.3  # logarithmic step from outside to inside that counts in full
_COHERENT = 0.6  # mean of the clipped step along a border
_DARKER = 1.5  # bright end of the inside over that of the outside
_STRAIGHT = 0.75  # share of a border's points within a pixel and a half of it
_BLACK = 12.0  # the same where structure does not matter: leaves let a little through
_FLAT = 0.25  # logarithmic structure that shadow may show
_FLOOR = 0.003  # of the bright level: below it, differences are noise


def find(image):
    """The `Border` of a collimated X-ray, straight or circular, on linear intensity (H, W) of any positive scale.

    A border is a line along an image side (turned by up to 8 degrees) or a circle, across which intensity rises inwards nearly all
    along, and beyond which it is dark and without structure. Anatomy fails one of these. Lines are found by summing the
    clipped logarithmic step over all lines (a Hough transform of the signed gradient), circles by RANSAC on the steps along rays;
    both are then fitted to the half-level crossings of the full image. Deterministic.
    """
    image = np.asarray(image, np.float32)
    height, width = image.shape
    nothing = Border("none", np.ones(image.shape, bool), np.zeros((0, 3)), None)
    factor = max(1, -(-max(height, width) // _SEARCH_PX))
    small = scipy.ndimage.gaussian_filter(camera.bin_image(image, factor), 0.7)
    bright = np.quantile(small, 0.99)
    if min(small.shape) < 32 or not bright > 0:
        return nothing
    # Where the detector only counts noise, its logarithm has steps of any size.
    dark = small <= np.quantile(small, 0.2)
    noise = 1.5 * np.median(np.abs(small - scipy.ndimage.median_filter(small, 5))[dark])
    log = np.log(np.clip(small, 0, bright) + max(_FLOOR * bright, 6.0 * noise))
    smooth = scipy.ndimage.gaussian_filter(image, 0.5 * factor)
    # A circle first: a part of one can pass for a line, four lines never for a circle.
    circle = _find_circle(log)
    circle = None if circle is None else _refine_circle(smooth, circle, factor)
    if circle is not None:
        v, u = np.ogrid[:height, :width]
        inside = (u - circle[0]) ** 2 + (v - circle[1]) ** 2 <= circle[2] ** 2
        return Border("circle", inside, np.zeros((0, 3)), circle)
    lines = _find_lines(log)
    lines = [_refine_line(smooth, line, [other for other in lines if other is not line], factor) for line in lines]
    lines = np.array([line for line in lines if line is not None]).reshape(-1, 3)
    return Border("rectangle", _inside_lines(image.shape, lines), lines, None) if len(lines) else nothing


def _inside_lines(shape, lines, margin=0.0):
    v, u = np.ogrid[: shape[0], : shape[1]]
    inside = np.ones(shape, bool)
    for a, b, c in lines:
        inside &= a * u + b * v >= c + margin
    return inside


def _sample(image, u, v):
    return scipy.ndimage.map_coordinates(image, [v, u], order=1, mode="nearest")


def _steps(log, u, v, normal):
    """Logarithmic step across points (inwards along `normal`), between the three pixels beyond the blur on either side."""
    offsets = np.array([1.5, 2.5, 3.5])[:, None]
    inner = _sample(log, u + offsets * normal[0], v + offsets * normal[1]).mean(0)
    outer = _sample(log, u - offsets * normal[0], v - offsets * normal[1]).mean(0)
    return inner - outer


def _find_lines(log):
    """Borders (a, b, c) in pixels of `log`, one a side at most."""
    candidates = []
    for side in range(4):
        lines = (_turn_back(*line, log.shape, side) for line in _left_borders(np.rot90(log, side)))
        candidates.append([line for line in lines if _dark_beyond(log, *_sides_of(log.shape, line))])
    chosen = [lines[0] if lines else None for lines in candidates]
    # A border must hold along its own segment only, which the others bound: better ones for each side in turn, then the weak
    # ones go, one by one, since without it another's segment grows.
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
    """Masks of what is not well beyond a line, and of what is well inside it."""
    return _inside_lines(shape, [line], -1.5), _inside_lines(shape, [line], 2.5)


def _turn_back(a, b, c, shape, side):
    """The line a u' + b v' >= c of np.rot90(image, side), in the pixels of the image of `shape`."""
    right, bottom = shape[1] - 1, shape[0] - 1
    if side == 1:  # u' = v, v' = right - u
        a, b, c = -b, a, c - b * right
    elif side == 2:  # u' = right - u, v' = bottom - v
        a, b, c = -a, -b, c - a * right - b * bottom
    elif side == 3:  # u' = bottom - v, v' = u
        a, b, c = b, -a, c - a * bottom
    return np.array([a, b, c])


def _left_borders(log, count=8):
    """The strongest left-hand borders (a, b, c), best first: local maxima of the clipped step summed along lines."""
    rows, columns = log.shape
    padded = np.pad(log, ((0, 0), (5, 5)), mode="edge")
    total = np.cumsum(np.pad(padded, ((0, 0), (1, 0))), 1)
    # The border before column c: columns c + 1 .. c + 3 against c - 4 .. c - 2.
    at = np.arange(columns) + 5
    step = (total[:, at + 4] - total[:, at + 1]) - (total[:, at - 1] - total[:, at - 4])
    step = np.clip(step / 3, -_STEP, 1)  # a larger step than scatter makes must win, but no single pixel
    slopes = np.tan(np.radians(np.linspace(-_TILT_DEG, _TILT_DEG, 33)))
    middle = 0.5 * (rows - 1)
    score = np.empty((len(slopes), columns))
    for k, slope in enumerate(slopes):
        column = np.arange(columns) + np.rint(slope * (np.arange(rows) - middle)).astype(int)[:, None]
        inside = (column >= 0) & (column < columns)
        score[k] = np.where(inside, np.take_along_axis(step, np.clip(column, 0, columns - 1), 1), 0).sum(0)
    # A field without the image's middle is none that anyone collimates.
    score[:, int(0.45 * columns) :] = 0
    peaks = np.argwhere((score == scipy.ndimage.maximum_filter(score, (9, 9))) & (score > 0.05 * rows))
    best = sorted(peaks.tolist(), key=lambda peak: -score[tuple(peak)])[:count]
    return [
        np.array([1.0, -slopes[k], column - 0.5 - slopes[k] * middle]) / np.hypot(1.0, slopes[k]) for k, column in best
    ]


def _dark_beyond(log, near_inside, well_inside):
    """Whether what lies beyond a border is dark, and black or without structure: scatter is smooth, anatomy is not."""
    outside = ~near_inside
    if outside.sum() < 0.5 * min(log.shape) or well_inside.sum() < 0.02 * log.size:
        return False
    drop = np.quantile(log[well_inside], 0.99) - np.quantile(log[outside], 0.9)
    if drop < np.log(_DARKER):
        return False
    if drop > np.log(_BLACK):
        return True
    fine, coarse = (_smooth_within(log, outside, sigma) for sigma in (1.5, 6.0))
    return np.quantile(np.abs(fine - coarse)[outside], 0.9) < _FLAT


def _smooth_within(image, mask, sigma):
    """Gaussian mean over the pixels of `mask` only."""
    weight = scipy.ndimage.gaussian_filter(mask.astype(np.float32), sigma, truncate=3)
    return scipy.ndimage.gaussian_filter(np.where(mask, image, 0), sigma, truncate=3) / np.maximum(weight, 1e-3)


def _segment(line, shape, others, step=1.0):
    """Points (u, v) of a line inside the image and inside the other borders."""
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
    """Mean step along a line's segment, each at most 1; 0 where the segment is short or not a step nearly all along."""
    u, v = _segment(line, log.shape, others)
    return _mean_step(_steps(log, u, v, line[:2])) if len(u) > 0.1 * min(log.shape) else 0.0


def _mean_step(steps):
    coherent = np.clip(steps / _STEP, -1, 1).mean() > _COHERENT and (steps > 0.1 * _STEP).mean() > 0.9
    # Scatter rises smoothly towards a border, which is itself a larger step than that.
    return float(np.clip(steps, -1, 1).mean()) if coherent else 0.0


def _crossings(image, u, v, normal, reach):
    """Distance along `normal` from each point to where the intensity passes half way from outside to inside; nan if it does not."""
    offsets = np.linspace(-reach, reach, int(4 * reach) + 1)
    profile = _sample(image, u + offsets[:, None] * normal[0], v + offsets[:, None] * normal[1])
    ends = max(2, len(offsets) // 6)
    low, high = profile[:ends].mean(0), profile[-ends:].mean(0)
    above = profile > 0.5 * (low + high)
    last = len(offsets) - 1 - np.argmax(~above[::-1], 0)  # the last sample below: the step nearest to the inside
    last = np.clip(last, 0, len(offsets) - 2)
    index = np.arange(profile.shape[1])
    p0, p1 = profile[last, index], profile[last + 1, index]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (0.5 * (low + high) - p0) / (p1 - p0)
    result = offsets[last] + np.clip(part, 0, 1) * (offsets[1] - offsets[0])
    return np.where((high > 1.15 * low) & above[-1] & ~above[0], result, np.nan)


def _on_full_image(line, factor):
    a, b, c = line
    return np.array([a, b, factor * c + 0.5 * (factor - 1) * (a + b)])


def _refine_line(image, line, others, factor):
    """A border of the small image fitted to the full one; None where its points do not lie on a line."""
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
            limit = max(1.5, 2.5 * np.median(residual[good]))
            good = np.nan_to_num(residual, nan=np.inf) <= limit
            if good.sum() < 10:
                return None
        turned = np.array([line[0] + slope * line[1], line[1] - slope * line[0], line[2] + offset])
        line = turned / np.hypot(turned[0], turned[1])
    seen = np.isfinite(distance)
    straight = (residual[seen] <= 1.5 * max(1.0, factor / 2)).mean()
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
    # Anatomy makes steps too: every maximum along a ray is a candidate, and the circle that most rays agree on is tried first.
    peaks = (steps > 0.3) & (steps == scipy.ndimage.maximum_filter1d(steps, 5, axis=1))
    ray = np.nonzero(peaks)[0]
    points = np.stack([u[peaks], v[peaks]], 1)
    if len(points) < 30:
        return None
    chosen = np.random.default_rng(0).choice(len(points), (1500, 3))
    circles = _circles_through(points[chosen])
    size = min(log.shape)
    off = np.abs(circles[:, :2] - centre).max(1)
    circles = circles[(circles[:, 2] > 0.2 * size) & (circles[:, 2] < size) & (off < 0.3 * size)]
    votes = [len(np.unique(ray[_near(points, circle, 1.5)])) for circle in circles]
    for index in np.argsort(votes)[::-1][:8]:
        if votes[index] < 20:
            break
        circle = _fit_circle(points[_near(points, circles[index], 1.5)])
        if _circle_holds(log, circle):
            return circle
    return None


def _near(points, circle, tolerance):
    return np.abs(np.hypot(points[:, 0] - circle[0], points[:, 1] - circle[1]) - circle[2]) < tolerance


def _circles_through(triples):
    """(N, 3) u, v, radius through triples of points (N, 3, 2); nan where they lie on a line."""
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


def _circle_holds(log, circle):
    u, v, normal = _arc(circle, log.shape, 4)
    if len(u) < 100:
        return False
    steps = _steps(log, u, v, normal)
    rows, columns = np.ogrid[: log.shape[0], : log.shape[1]]
    distance = np.hypot(columns - circle[0], rows - circle[1])
    dark = _dark_beyond(log, distance < circle[2] + 1.5, distance < circle[2] - 2.5)
    return dark and _mean_step(steps) > 0


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
            good = np.nan_to_num(residual, nan=np.inf) <= max(1.5, 2.5 * np.median(residual[good]))
    straight = (residual[seen] <= 1.5 * max(1.0, factor / 2)).mean()
    return tuple(float(n) for n in circle) if straight > _STRAIGHT else None
