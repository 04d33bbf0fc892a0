"""Sizes and curvature of an adult spine from T9 to the sacrum, and how they vary."""

import dataclasses

import numpy as np

from data_pipelines.phantom import solids

SACRUM = 26
FIRST_LEVEL, T12, L1, L5 = 16, 19, 20, 24
FACET_GAP_MM = 1.6


@dataclasses.dataclass(frozen=True)
class _Level:
    """Mean size of one level in mm and degrees; `disc`, `facet_*` describe the joint with the level below."""

    width: float
    depth: float
    height: float
    wedge_deg: float
    canal_width: float
    canal_depth: float
    pedicle_width: float
    pedicle_height: float
    transverse: tuple
    spinous: tuple
    disc: float
    disc_deg: float
    facet_x: float
    facet_deg: float


# transverse: tip (x, behind the body, z). spinous: tip (behind the body, z), half height at root and tip.
# The row of T8 serves the vertebra that the upper border of the scan cuts. disc_deg: lumbar shares of a lordosis of 47
# degrees, rescaled to that of the patient.
_LEVELS = {
    15: _Level(29, 27, 20.5, -3, 17, 15.5, 5.5, 12.5, (30, 26, 8), (37, -31, 7.0, 4.0), 4.5, 0.0, 11.5, 78),
    16: _Level(30, 28, 21, -3, 17, 15.5, 6.0, 13.0, (29, 25, 8), (38, -28, 7.5, 4.5), 5.0, 0.0, 11.5, 77),
    17: _Level(32, 29, 22, -3, 17.5, 15.5, 6.5, 14.0, (28, 24, 8), (37, -23, 8.0, 5.0), 5.5, 0.0, 11.5, 75),
    18: _Level(35, 30, 23, -3, 18.5, 16, 7.5, 15.5, (25.5, 22, 7), (37, -18, 8.5, 6.0), 6.0, 0.0, 12.0, 70),
    19: _Level(39, 31, 25, -3, 21, 16.5, 8.0, 15.5, (23, 19, 5), (38, -14, 9.0, 7.5), 7.0, 1.0, 11.5, 22),
    20: _Level(42, 32, 26.5, -2, 22, 16.5, 8.0, 15.0, (35, 17, 5), (45, -12, 8.5, 9.0), 8.0, 4.0, 12.5, 26),
    21: _Level(44, 33, 27, 0, 22.5, 16, 8.5, 15.0, (40, 17, 4), (47, -12, 9.0, 10.0), 9.0, 5.5, 13.5, 31),
    22: _Level(46, 34, 27.5, 1.5, 23, 16, 10.0, 14.5, (46, 17, 3.5), (48, -12, 9.0, 10.0), 10.0, 7.0, 15.5, 38),
    23: _Level(48, 35, 27.5, 3, 24, 16.5, 12.0, 14.5, (43, 16, 4), (46, -11, 8.5, 9.0), 11.0, 8.5, 18.0, 45),
    24: _Level(50, 35, 27, 8, 26, 17, 15.0, 14.0, (44, 14, 6), (40, -9, 7.5, 7.5), 10.0, 11.0, 21.5, 52),
}
_SIZES = (
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


def draw_sizes(rng, config):
    """Level table of one patient, patient scale."""
    scale = 1 + config.size_variation * rng.uniform(-1, 1)
    aspect = {"width": rng.uniform(0.97, 1.03), "height": rng.uniform(0.97, 1.03), "depth": rng.uniform(0.97, 1.03)}
    table = {}
    for label in range(config.levels[0] - 1, L5 + 1):
        mean = _LEVELS[label]
        own = 1 + config.level_variation * rng.uniform(-1, 1)
        size = {name: getattr(mean, name) * scale * own * aspect.get(name, 1.0) for name in _SIZES}
        reach = scale * own * rng.uniform(0.94, 1.06)
        spinous = scale * own * rng.uniform(0.94, 1.06)
        table[label] = dataclasses.replace(
            mean,
            transverse=tuple(reach * v for v in mean.transverse),
            spinous=tuple(spinous * v for v in mean.spinous),
            **size,
        )
    return table, scale


def place_levels(rng, table):
    """Chain from the sacrum upwards: scan_from_sacrum, scan_from_disc and scan_from_vertebra by (upper) label."""
    lordosis = rng.uniform(30, 55)
    kyphosis = rng.uniform(0.6, 1.5)
    slope = 0.78 * lordosis + rng.uniform(-4, 4)
    bend, phase, turn = rng.uniform(-1.6, 1.6), rng.uniform(0, 2 * np.pi), rng.uniform(-1.2, 1.2)
    body_deg = sum(table[label].wedge_deg for label in range(L1, L5 + 1))
    disc_deg = sum(table[label].disc_deg for label in range(L1, L5 + 1))
    per_disc = (lordosis - body_deg) / disc_deg

    scan_from_sacrum = solids.rotation(1, rng.uniform(-1.5, 1.5)) @ solids.rotation(0, -slope)
    scan_from_disc, scan_from_vertebra = {}, {}
    scan_from_top = scan_from_sacrum
    for label in sorted(table, reverse=True):
        v = table[label]
        wave = np.sin(phase + 0.75 * (L5 - label))
        flex = v.disc_deg * per_disc + rng.uniform(-0.6, 0.6)
        if label <= T12:
            # The bodies are wedged for the mean kyphosis; the discs make up the patient's own.
            flex += (kyphosis - 1) * v.wedge_deg
        half = solids.rotation(0, flex / 2) @ solids.rotation(1, bend * wave / 2) @ solids.rotation(2, turn * wave / 2)
        scan_from_disc[label] = scan_from_top @ solids.translation(0, 0, v.disc / 2) @ half
        body_half = solids.translation(0, 0, v.height / 2)
        scan_from_vertebra[label] = (
            scan_from_disc[label]
            @ half
            @ solids.translation(0, 0, v.disc / 2)
            @ solids.rotation(0, v.wedge_deg / 2)
            @ body_half
        )
        scan_from_top = scan_from_vertebra[label] @ body_half @ solids.rotation(0, v.wedge_deg / 2)
    return scan_from_sacrum, scan_from_disc, scan_from_vertebra
