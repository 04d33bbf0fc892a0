"""Sizes and curvature of an adult spine from T9 to the sacrum, and their random variation between patients.

All sizes and ranges in this module were chosen by hand. `tests/data_pipelines/phantom` checks what matters of the result:
volumes of the vertebrae, an open canal, concave endplates.
"""

import dataclasses

import numpy as np

from data_pipelines.phantom import transforms

SACRUM = 26
FIRST_LEVEL, T12, L1, L5 = 16, 19, 20, 24
"""VerSe numbers. FIRST_LEVEL (T9) is the highest level that a phantom may label."""
FACET_GAP_MM = 1.6
"""Joint space between the facets of neighbouring vertebrae, mm, chosen by hand. Half of it is less than a voxel of the
default spacing, so bones would touch in the mask; twice is wider than a healthy joint."""


@dataclasses.dataclass(frozen=True)
class LevelSize:
    """Size of one vertebra and of the disc and facet joints below it, in mm and degrees.

    Attributes:
      width, depth, height: of the vertebral body.
      wedge_deg: angle between its endplates, positive where the front is higher (lordosis).
      transverse: tip of the transverse process: x, distance behind the body, z.
      spinous: tip of the spinous process: distance behind the body, z; then its half height at the root and at the tip.
      disc: height of the disc.
      disc_deg: the disc's share of a lordosis of 47 degrees, rescaled to that of the patient.
      facet_x: distance of a facet joint from the midline.
      facet_deg: angle of the facet joint's normal from the lateral direction.
    """

    width: float
    depth: float
    height: float
    wedge_deg: float
    canal_width: float
    canal_depth: float
    pedicle_width: float
    pedicle_height: float
    transverse: tuple[float, float, float]
    spinous: tuple[float, float, float, float]
    disc: float
    disc_deg: float
    facet_x: float
    facet_deg: float


# Means by VerSe number. T8 (15) is the vertebra that the upper border of a scan from T9 may cut.
_LEVELS = {
    15: LevelSize(29, 27, 20.5, -3, 17, 15.5, 5.5, 12.5, (30, 26, 8), (37, -31, 7.0, 4.0), 4.5, 0.0, 11.5, 78),
    16: LevelSize(30, 28, 21, -3, 17, 15.5, 6.0, 13.0, (29, 25, 8), (38, -28, 7.5, 4.5), 5.0, 0.0, 11.5, 77),
    17: LevelSize(32, 29, 22, -3, 17.5, 15.5, 6.5, 14.0, (28, 24, 8), (37, -23, 8.0, 5.0), 5.5, 0.0, 11.5, 75),
    18: LevelSize(35, 30, 23, -3, 18.5, 16, 7.5, 15.5, (25.5, 22, 7), (37, -18, 8.5, 6.0), 6.0, 0.0, 12.0, 70),
    19: LevelSize(39, 31, 25, -3, 21, 16.5, 8.0, 15.5, (23, 19, 5), (38, -14, 9.0, 7.5), 7.0, 1.0, 11.5, 22),
    20: LevelSize(42, 32, 26.5, -2, 22, 16.5, 8.0, 15.0, (35, 17, 5), (45, -12, 8.5, 9.0), 8.0, 4.0, 12.5, 26),
    21: LevelSize(44, 33, 27, 0, 22.5, 16, 8.5, 15.0, (40, 17, 4), (47, -12, 9.0, 10.0), 9.0, 5.5, 13.5, 31),
    22: LevelSize(46, 34, 27.5, 1.5, 23, 16, 10.0, 14.5, (46, 17, 3.5), (48, -12, 9.0, 10.0), 10.0, 7.0, 15.5, 38),
    23: LevelSize(48, 35, 27.5, 3, 24, 16.5, 12.0, 14.5, (43, 16, 4), (46, -11, 8.5, 9.0), 11.0, 8.5, 18.0, 45),
    24: LevelSize(50, 35, 27, 8, 26, 17, 15.0, 14.0, (44, 14, 6), (40, -9, 7.5, 7.5), 10.0, 11.0, 21.5, 52),
}
# Fields that vary with the patient's and the level's scale; the processes are scaled separately, the angles not at all.
_SCALED = (
    "width",
    "depth",
    "height",
    "canal_width",
    "canal_depth",
    "pedicle_width",
    "pedicle_height",
    "disc",
    "facet_x",
)


def draw_sizes(
    rng: np.random.Generator, first_level: int, size_variation: float, level_variation: float
) -> tuple[dict[int, LevelSize], float]:
    """Draws the sizes of one patient.

    Args:
      first_level: VerSe number of the first labelled vertebra; the table starts one level above it.
      size_variation: largest relative deviation of the patient's size from the mean.
      level_variation: largest relative deviation of one vertebra from the patient's size.

    Returns:
      The sizes by VerSe number, and the scale of the patient (1 is the mean).
    """
    scale = 1 + size_variation * rng.uniform(-1, 1)
    aspect = {"width": rng.uniform(0.97, 1.03), "height": rng.uniform(0.97, 1.03), "depth": rng.uniform(0.97, 1.03)}
    table = {}
    for label in range(first_level - 1, L5 + 1):
        mean = _LEVELS[label]
        own = 1 + level_variation * rng.uniform(-1, 1)
        size = {name: getattr(mean, name) * scale * own * aspect.get(name, 1.0) for name in _SCALED}
        reach = scale * own * rng.uniform(0.94, 1.06)
        spinous = scale * own * rng.uniform(0.94, 1.06)
        table[label] = dataclasses.replace(
            mean,
            transverse=tuple(reach * v for v in mean.transverse),
            spinous=tuple(spinous * v for v in mean.spinous),
            **size,
        )
    return table, scale


def place_levels(
    rng: np.random.Generator, table: dict[int, LevelSize]
) -> tuple[np.ndarray, dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Draws a posture and stacks the levels on the sacrum, from L5 upwards.

    Args:
      table: sizes of `draw_sizes`.

    Returns:
      scan_from_sacrum: (4, 4).
      scan_from_disc: (4, 4) of each disc, by the VerSe number of the vertebra above it.
      scan_from_vertebra: (4, 4) by VerSe number.
    """
    # Lordosis and sacral slope in degrees; kyphosis is a factor on the wedges of the thoracic bodies.
    lordosis = rng.uniform(30, 55)
    kyphosis = rng.uniform(0.6, 1.5)
    slope = 0.78 * lordosis + rng.uniform(-4, 4)
    bend, phase, turn = rng.uniform(-1.6, 1.6), rng.uniform(0, 2 * np.pi), rng.uniform(-1.2, 1.2)
    body_deg = sum(table[label].wedge_deg for label in range(L1, L5 + 1))
    disc_deg = sum(table[label].disc_deg for label in range(L1, L5 + 1))
    per_disc = (lordosis - body_deg) / disc_deg

    scan_from_sacrum = transforms.rotation(1, rng.uniform(-1.5, 1.5)) @ transforms.rotation(0, -slope)
    scan_from_disc, scan_from_vertebra = {}, {}
    scan_from_top = scan_from_sacrum
    for label in sorted(table, reverse=True):
        v = table[label]
        wave = np.sin(phase + 0.75 * (L5 - label))
        flex = v.disc_deg * per_disc + rng.uniform(-0.6, 0.6)
        if label <= T12:
            # The bodies are wedged for the mean kyphosis; the discs add the patient's deviation from it.
            flex += (kyphosis - 1) * v.wedge_deg
        half = (
            transforms.rotation(0, flex / 2)
            @ transforms.rotation(1, bend * wave / 2)
            @ transforms.rotation(2, turn * wave / 2)
        )
        scan_from_disc[label] = scan_from_top @ transforms.translation(0, 0, v.disc / 2) @ half
        body_half = transforms.translation(0, 0, v.height / 2)
        scan_from_vertebra[label] = (
            scan_from_disc[label]
            @ half
            @ transforms.translation(0, 0, v.disc / 2)
            @ transforms.rotation(0, v.wedge_deg / 2)
            @ body_half
        )
        scan_from_top = scan_from_vertebra[label] @ body_half @ transforms.rotation(0, v.wedge_deg / 2)
    return scan_from_sacrum, scan_from_disc, scan_from_vertebra
