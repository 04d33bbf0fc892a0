"""Implants (screws, rods and wires) as chains of capsules, rendered by the exact chord lengths of rays.

Sizes and positions were chosen by hand: screws are 4.4 to 6.8 mm thick, rods 4.8 to 6.4 mm, wires 1 to 2.4 mm.
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


def draw_implants(
    rng: np.random.Generator, world_from_box: np.ndarray, extents: np.ndarray, target: int
) -> list[Implant]:
    """Draws implants near a vertebra: pedicle screws with rods, wires, or both.

    Args:
      world_from_box: (K, 4, 4) poses of the vertebrae from head to feet.
      extents: (K, 2, 3) lowest and highest coordinates of each vertebra in its own frame, mm.
      target: index of the vertebra.
    """
    implants = []
    kind = rng.integers(3)
    if kind != 1:
        levels = int(rng.integers(1, 5))
        first = int(np.clip(target - rng.integers(0, levels + 1), 0, len(extents) - 1))
        chosen = range(first, min(first + levels, len(extents)))
        for side in (-1.0, 1.0) if rng.uniform() < 0.8 else (rng.choice([-1.0, 1.0]),):
            heads = []
            for level in chosen:
                screw, head = _screw(rng, world_from_box[level], extents[level], side)
                implants += [screw, head]
                heads.append(head.points[1])
            if len(heads) > 1 and rng.uniform() < 0.8:
                heads = np.array(heads)
                over = [heads[0] + _unit(heads[0] - heads[1]) * 10.0, heads[-1] + _unit(heads[-1] - heads[-2]) * 10.0]
                implants.append(Implant(np.concatenate([over[:1], heads, over[1:]]), rng.uniform(2.4, 3.2)))
    if kind != 0:
        centre = world_from_box[target, :3, 3]
        for _ in range(rng.integers(1, 4)):
            middle, along = centre + rng.uniform(-50.0, 50.0, 3), _unit(rng.normal(size=3))
            half = 0.5 * rng.uniform(60.0, 180.0)
            implants.append(Implant(np.stack([middle - half * along, middle + half * along]), rng.uniform(0.5, 1.2)))
    return implants


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
