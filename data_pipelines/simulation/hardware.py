"""Implants and instruments as chains of capsules, rendered by the exact chord lengths of rays.

Sizes and positions were chosen by hand: screws are 4.4 to 6.8 mm thick, rods 4.8 to 6.4 mm, wires 0.8 to 2.4 mm, bars of cages 2 to
4 mm, blades of retractors 1.6 to 3 mm.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

OVERSAMPLE = 3
"""Rays along each side of a pixel. A wire is about as wide as a pixel, which a single ray would miss or overstate; half of this
value does so, twice it takes four times the time."""


@dataclasses.dataclass(frozen=True)
class Implant:
    """A chain of capsules.

    Attributes:
      points: (P, 3) ends of the capsules' axes, world mm; P >= 2.
      radius_mm: of all capsules.
    """

    points: np.ndarray
    radius_mm: float


def _screw(rng, world_from_box, extents, side):
    """A pedicle screw and its head: from an entry lateral to the lamina towards the midline in the front half of the body."""
    low, high = extents
    depth, width = high[1] - low[1], high[0] - low[0]
    entry = np.array([side * (0.24 * width + rng.uniform(-2, 2)), low[1] + 0.38 * depth, rng.uniform(-2, 5)])
    tip = np.array([side * rng.uniform(4, 9), low[1] + rng.uniform(0.78, 0.92) * depth, rng.uniform(-4, 6)])
    back = entry - _unit(tip - entry) * 9.0
    world = [world_from_box[:3, :3] @ p + world_from_box[:3, 3] for p in (entry, tip, back)]
    head = Implant(np.stack([world[0], world[2]]), rng.uniform(4.5, 6.0))
    return Implant(np.stack([world[0], world[1]]), rng.uniform(2.2, 3.4)), head


def _unit(vector):
    return vector / np.linalg.norm(vector)


def draw_implants(
    rng: np.random.Generator, world_from_box: np.ndarray, extents: np.ndarray, target: int
) -> list[Implant]:
    """Draws what an operating room adds to a picture of a vertebra: one or two of KINDS.

    Args:
      world_from_box: (K, 4, 4) poses of the vertebrae from head to feet.
      extents: (K, 2, 3) lowest and highest coordinates of each vertebra in its own frame, mm.
      target: index of the vertebra.
    """
    chances = np.array(list(KINDS.values()))
    count = 1 + int(rng.uniform() < CHANCE_SECOND_KIND)
    chosen = rng.choice(len(KINDS), count, replace=False, p=chances / chances.sum())
    return [implant for kind in sorted(chosen) for implant in list(KINDS)[kind](rng, world_from_box, extents, target)]


def _fixation(rng, world_from_box, extents, target):
    """Pedicle screws in one to six vertebrae at or near the target, most with rods."""
    implants, count = [], int(rng.integers(1, 7))
    first = int(np.clip(target - rng.integers(-1, count + 1), 0, len(extents) - 1))
    chosen = range(first, min(first + count, len(extents)))
    for side in (-1.0, 1.0) if rng.uniform() < 0.8 else (rng.choice([-1.0, 1.0]),):
        heads = []
        for level in chosen:
            screw, head = _screw(rng, world_from_box[level], extents[level], side)
            implants += [screw, head]
            heads.append(head.points[1])
        if rng.uniform() < 0.8:
            heads = np.array(heads)
            # A rod of a single screw lies along the spine; others run from head to head. Both stick out.
            ends = (
                heads[[0, -1]]
                if len(heads) > 1
                else heads + 20.0 * np.array([[1.0], [-1.0]]) * world_from_box[first, :3, 2]
            )
            over = _unit(ends[0] - ends[1]) * rng.uniform(5.0, 20.0)
            inner = heads if len(heads) > 1 else ends
            implants.append(Implant(np.concatenate([[ends[0] + over], inner, [ends[1] - over]]), rng.uniform(2.4, 3.2)))
    return implants


def _guide_wires(rng, world_from_box, extents, target):
    """Kirschner wires through pedicles of the target or a neighbour, which stick out of the back."""
    wires = []
    for _ in range(rng.integers(1, 4)):
        level = int(np.clip(target + rng.integers(-1, 2), 0, len(extents) - 1))
        screw, head = _screw(rng, world_from_box[level], extents[level], rng.choice([-1.0, 1.0]))
        entry, tip = screw.points
        out = entry + _unit(entry - tip) * rng.uniform(50.0, 150.0)
        wires.append(Implant(np.stack([out, tip]), rng.uniform(0.5, 1.2)))
    return wires


def _loose_wires(rng, world_from_box, extents, target):
    """Wires and leads that lie anywhere near, straight or bent, some with an electrode at one end."""
    centre, found = world_from_box[target, :3, 3], []
    for _ in range(rng.integers(1, 5)):
        point, along = centre + rng.uniform(-60.0, 60.0, 3), _unit(rng.normal(size=3))
        points, length = [point], rng.uniform(60.0, 200.0)
        for _ in range(rng.integers(1, 5)):
            points.append(points[-1] + 0.3 * length * along)
            along = _unit(along + 0.5 * rng.normal(size=3))
        found.append(Implant(np.array(points), rng.uniform(0.4, 1.2)))
        if rng.uniform() < 0.3:
            found.append(Implant(np.stack([point, point + 2.0]), rng.uniform(3.0, 6.0)))
    return found


def _cage(rng, world_from_box, extents, target):
    """A frame in a disc space next to the target, as cages between two vertebrae are."""
    below = bool(rng.integers(2))
    low, high = extents[target]
    z = (low[2] - rng.uniform(2, 6)) if below else (high[2] + rng.uniform(-2, 2))
    half = np.array([rng.uniform(8, 14), rng.uniform(4, 7)])
    middle = np.array([rng.uniform(-6, 6), high[1] - 0.3 * (high[1] - low[1])])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]]) * half + middle
    ring = np.column_stack([corners, np.full(5, z)])
    T = world_from_box[target]
    return [Implant((ring + [0, 0, up]) @ T[:3, :3].T + T[:3, 3], rng.uniform(1.0, 2.0)) for up in (-3.0, 3.0)]


def _retractor(rng, world_from_box, extents, target):
    """Two blades behind the spine on its sides, each a row of parallel bars."""
    low, high = extents[target]
    T, blades, radius = world_from_box[target], [], rng.uniform(0.8, 1.5)
    length, width = rng.uniform(50.0, 100.0), rng.uniform(15.0, 30.0)
    for side in (-1.0, 1.0):
        x, z = side * rng.uniform(15.0, 35.0), rng.uniform(-15.0, 15.0)
        front = low[1] + rng.uniform(-5.0, 15.0)
        for along in np.arange(-0.5 * width, 0.5 * width, 2.0 * radius):
            ends = np.array([[x, front, z + along], [x + side * 10.0, front - length, z + along]])
            blades.append(Implant(ends @ T[:3, :3].T + T[:3, 3], radius))
    return blades


def _clips(rng, world_from_box, extents, target):
    """Clips and staples: short thin pieces within some centimetres."""
    centre = world_from_box[target, :3, 3]
    starts = centre + rng.uniform(-50.0, 50.0, (rng.integers(3, 15), 3))
    return [
        Implant(np.stack([p, p + rng.uniform(4.0, 12.0) * _unit(rng.normal(size=3))]), rng.uniform(0.4, 1.0))
        for p in starts
    ]


KINDS = {_fixation: 4.0, _guide_wires: 1.0, _loose_wires: 1.5, _cage: 1.0, _retractor: 1.0, _clips: 1.0}
"""What may be in a picture, and how often relative to each other. Chosen by hand: screws and rods are the commonest, and twice or
half of a weight matters little since each kind has hundreds of training pairs."""
CHANCE_SECOND_KIND = 0.4
"""Probability that a picture has a second kind. Chosen by hand."""


def chords(
    implants: Sequence[Implant], intrinsics: np.ndarray, camera_from_world: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Length of metal along the rays, averaged over each pixel.

    Neighbouring capsules of one chain overlap at their joint, where the metal counts once. Separate implants add up.

    Args:
      intrinsics: (V, 4) fx, fy, cx, cy in pixels.
      camera_from_world: (V, 4, 4).
      height, width: of the images, pixels.

    Returns:
      (V, height, width) float32, mm.
    """
    images = np.zeros((len(intrinsics), height, width), np.float32)
    for image, k, E in zip(images, intrinsics, camera_from_world):
        for implant in implants:
            points = implant.points @ E[:3, :3].T + E[:3, 3]
            previous = None
            for a, b in zip(points, points[1:]):
                window = _window(np.stack([a, b]), implant.radius_mm, k, height, width)
                if window is not None:
                    near, far = _through(a, b, implant.radius_mm, _rays(k, window))
                    length = np.maximum(far - near, 0.0)
                    if previous is not None:
                        near_before, far_before = _through(*previous, implant.radius_mm, _rays(k, window))
                        length -= np.maximum(np.minimum(far, far_before) - np.maximum(near, near_before), 0.0)
                    rows, columns = window
                    blocks = length.reshape(rows.stop - rows.start, OVERSAMPLE, -1, OVERSAMPLE)
                    image[window] += blocks.mean((1, 3))
                previous = a, b
    return images


def _window(points, radius, k, height, width):
    """Rows and columns, as slices, of the pixels that a capsule may touch; None if there are none or if it is near the source."""
    if points[:, 2].min() <= 2.0 * radius:
        return None
    # On the axis a ball's image extends f r / (z - r) beyond its centre at most, and a little further off the axis.
    uv = points[:, :2] / points[:, 2:] * k[:2] + k[2:]
    reach = 1.5 * k[:2] * radius / (points[:, 2:] - radius) + 1.0
    low = np.floor((uv - reach).min(0)).astype(int)
    high = np.ceil((uv + reach).max(0)).astype(int) + 1
    rows = slice(max(low[1], 0), min(high[1], height))
    columns = slice(max(low[0], 0), min(high[0], width))
    return (rows, columns) if rows.stop > rows.start and columns.stop > columns.start else None


def _rays(k, window):
    """Unit directions (rows * OVERSAMPLE, columns * OVERSAMPLE, 3) of the rays through a window's pixels."""
    v, u = ((np.arange(part.start * OVERSAMPLE, part.stop * OVERSAMPLE) + 0.5) / OVERSAMPLE - 0.5 for part in window)
    d = np.stack(np.broadcast_arrays((u - k[2]) / k[0], ((v - k[3]) / k[1])[:, None], 1.0), -1)
    return d / np.linalg.norm(d, axis=-1, keepdims=True)


def _through(a, b, radius, rays):
    """Distances (...) at which rays (..., 3) from the origin enter and leave a capsule; 1 and 0 where they miss it.

    A capsule is convex and the union of a cylinder and two balls, so its chord runs from the first entry into one of them to
    the last exit.
    """
    pieces = [_ball(a, radius, rays), _ball(b, radius, rays), _cylinder(a, b, radius, rays)]
    near = np.min([np.where(i < o, i, np.inf) for i, o in pieces], 0)
    far = np.max([np.where(i < o, o, -np.inf) for i, o in pieces], 0)
    missed = near > far
    return np.where(missed, 1.0, near), np.where(missed, 0.0, far)


def _ball(centre, radius, rays):
    """Distances at which rays enter and leave a ball; both are that of the nearest point where they miss it."""
    middle = rays @ centre
    half = np.sqrt(np.maximum(radius**2 - (centre @ centre - middle**2), 0.0))
    return middle - half, middle + half


def _cylinder(a, b, radius, rays):
    """Distances at which rays enter and leave a cylinder with flat ends at a and b; an exit of -inf where they miss it."""
    axis = _unit(b - a)
    along = rays @ axis
    across, start = rays - along[..., None] * axis, a - (a @ axis) * axis
    square = np.maximum(np.sum(across**2, -1), 1e-12)
    middle = across @ start / square
    half2 = radius**2 / square - np.maximum(start @ start / square - middle**2, 0.0)
    half = np.sqrt(np.maximum(half2, 0.0))
    safe = np.where(np.abs(along) < 1e-9, 1e-9, along)
    ends = np.sort([(a @ axis) / safe, (b @ axis) / safe], 0)
    return np.maximum(middle - half, ends[0]), np.where(half2 > 0, np.minimum(middle + half, ends[1]), -np.inf)
