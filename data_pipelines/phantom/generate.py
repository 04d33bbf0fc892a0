"""Procedural CT of a human spine from T9 to the sacrum, with vertebra labels in VerSe numbers.

Every bone is a signed distance field (mm, negative inside) on its own window of the scan grid: smooth unions of tapered
plates, and superellipse bodies. The bones are posed by a chain of rigid transforms that starts at the sacrum. Facet
joints are placed in the frame of the disc that they belong to, so both partners of a joint fit in any posture.

Frames: `patient` is RAS+ mm. `vertebra` has its origin at the centre of the vertebral body, x right, y anterior, z
along the body axis. `disc` is the same at the centre of the disc. All shapes are built in `scan`, which is parallel to
`patient` with its origin at the centre of the S1 endplate.
"""

import dataclasses

import numpy as np
import scipy

from data_pipelines.phantom import anatomy
from data_pipelines.phantom import solids
from data_pipelines.phantom.bones import make_ilium
from data_pipelines.phantom.bones import make_rib
from data_pipelines.phantom.bones import make_sacrum
from data_pipelines.phantom.bones import make_vertebra
from data_pipelines.phantom.trunk import Painter
from data_pipelines.phantom.trunk import soft_tissue
from data_pipelines.phantom.trunk import Trunk


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """Sampling and variation of a phantom.

    spacing_mm: voxel size (x, y, z).
    extent_mm: field of view (lateral, antero-posterior); its height follows from the spine.
    levels: labelled vertebrae in VerSe numbers, without gaps and ending at L5 (24); the first is T9 (16) or lower.
    size_variation: patient scale is 1 +- this; level_variation: size of each vertebra, 1 +- this.
    asymmetry: right against left lengths and positions of the processes, 1 +- this.
    noise_hu: standard deviation of the CT noise.
    """

    spacing_mm: tuple = (1.25, 1.25, 1.5)
    extent_mm: tuple = (330.0, 240.0)
    levels: tuple = tuple(range(anatomy.FIRST_LEVEL, anatomy.L5 + 1))
    size_variation: float = 0.08
    level_variation: float = 0.03
    asymmetry: float = 0.04
    noise_hu: float = 12.0


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A CT with its labels.

    hu: (X, Y, Z) int16. mask: (X, Y, Z) uint8, VerSe labels, 26 = sacrum, ribs and pelvis 0.
    affine: (4, 4) float64, patient RAS mm from voxel index.
    centroids: label -> (3,) RAS mm, slightly behind the centre of the body, as in VerSe.
    patient_from_vertebra: label -> (4, 4) float64 rigid.
    """

    hu: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    centroids: dict
    patient_from_vertebra: dict


def _check(config):
    levels = tuple(config.levels)
    if (
        not levels
        or levels != tuple(range(levels[0], anatomy.L5 + 1))
        or levels[0] < anatomy.FIRST_LEVEL
        or levels[0] > anatomy.L1
    ):
        raise ValueError(
            f"levels must run without gaps from {anatomy.FIRST_LEVEL}..{anatomy.L1} to {anatomy.L5}, got {levels}"
        )
    if len(config.spacing_mm) != 3 or min(config.spacing_mm) <= 0:
        raise ValueError(f"spacing_mm must be three positive numbers, got {config.spacing_mm}")
    if config.extent_mm[0] < 200 or config.extent_mm[1] < 160:
        raise ValueError(f"extent_mm must be at least (200, 160), got {config.extent_mm}")


def make_phantom(seed, config=PhantomConfig()):
    """Phantom of one patient, a pure function of (seed, config).

    The vertebra above the first level and the lower end of the sacrum may be cut by the field of view, as in a real
    scan; the vertebra above is not labelled. Raises ValueError for a config that makes no spine.
    """
    _check(config)
    rng = np.random.default_rng(seed)
    table, scale = anatomy.draw_sizes(rng, config)
    scan_from_sacrum, scan_from_disc, scan_from_vertebra = anatomy.place_levels(rng, table)
    labels = sorted(table, reverse=True)
    first = config.levels[0]

    # Line through the body centres, from the sacrum upwards, continued straight at both ends.
    spine = np.array(
        [
            solids.apply_affine(scan_from_sacrum, (0, 0, -60 * scale)),
            solids.apply_affine(scan_from_sacrum, (0, 0, -15 * scale)),
        ]
        + [scan_from_vertebra[label][:3, 3] for label in labels]
    )
    tips = np.array(
        [
            solids.apply_affine(scan_from_vertebra[label], (0, -v.depth / 2 - v.spinous[0], v.spinous[1]))
            for label, v in table.items()
        ]
    )
    top = solids.apply_affine(scan_from_vertebra[first], (0, 0, table[first].height / 2))[2] + 20 * scale
    spacing = np.asarray(config.spacing_mm, np.float64)
    heights = np.arange(-100 * scale, top, spacing[2])
    trunk = Trunk(rng, scale, config, spine, tips, heights)
    grid = []
    back, front = (trunk.centre_y - trunk.half_y).min(), (trunk.centre_y + trunk.half_y).max()
    for axis, middle in ((0, spine[:, 0].mean()), (1, 0.5 * (back + front))):
        count = int(round(config.extent_mm[axis] / spacing[axis]))
        grid.append(middle + (np.arange(count) - (count - 1) / 2) * spacing[axis])
    grid.append(heights)
    scan_origin = np.array([g[0] for g in grid])
    grid = [g.astype(np.float32) for g in grid]

    bones = {
        label: make_vertebra(rng, grid, label, table, scan_from_disc, scan_from_vertebra, config) for label in labels
    }
    bones[anatomy.SACRUM] = make_sacrum(grid, table, scale, scan_from_disc, scan_from_sacrum)
    # Texture of the marrow and, much weaker, of the surfaces.
    coarse = scipy.ndimage.gaussian_filter(rng.standard_normal((72, 64, 48)).astype(np.float32), 0.8, mode="wrap")
    coarse /= coarse.std()
    texture = {}
    for label, solid in bones.items():
        corner = rng.integers(0, 12, 3)
        steps = [s * d / 5.0 for s, d in zip(solid.f.shape, spacing)]
        cut = coarse[tuple(slice(c, c + int(np.ceil(n)) + 2) for c, n in zip(corner, steps))]
        zoom = [n / m for n, m in zip(solid.f.shape, cut.shape)]
        texture[label] = scipy.ndimage.zoom(cut, zoom, order=1)
        solid.f += 0.22 * texture[label]
    for upper, lower in zip(labels[1:] + [anatomy.L5], labels[:-1] + [anatomy.SACRUM]):
        solids.keep_apart(bones[upper], bones[lower], anatomy.FACET_GAP_MM)

    painter = Painter(grid)
    soft_tissue(rng, painter, trunk, table, scale, scan_from_vertebra, spine)
    for label in labels:
        v = table[label]
        disc = solids.Solid(grid, scan_from_disc[label][:3, 3] - 45, scan_from_disc[label][:3, 3] + 45)
        disc.body(scan_from_disc[label], 0.97 * v.width, 0.96 * v.depth, v.disc + 7, 0, 0.0)
        painter.bone(disc, 4.0, 95.0, 75.0)

    cortical = rng.uniform(760, 1080)
    density = rng.uniform(120, 250)
    loose = [
        solid
        for label in labels
        if label <= anatomy.T12
        for solid in make_rib(grid, label, table, scan_from_vertebra, trunk)
    ]
    loose += [make_ilium(grid, side, scale) for side in (1, -1)]
    for solid in loose:
        for bone in bones.values():
            solids.give_way(solid, bone, 1.5)
        painter.bone(solid, 1.2, 0.95 * cortical, density + 60)

    mask = np.zeros(painter.hu.shape, np.uint8)
    for label, solid in bones.items():
        marrow = density * rng.uniform(0.94, 1.06) + 22 * texture[label]
        shell = 1.0
        if label != anatomy.SACRUM:
            v = table[label]
            everywhere = np.full(3, 200.0)
            _, (_, y, _) = solid.in_frame(scan_from_vertebra[label], -everywhere, everywhere)
            arch = np.clip((-v.depth / 2 - y + 2) / 5, 0, 1)
            marrow = marrow + 130 * arch
            shell = 0.95 + 0.4 * arch
        painter.bone(solid, shell, cortical, marrow)
        if label == anatomy.SACRUM or label in config.levels:
            mask[solid.slices][solid.f < 0] = label

    noise = rng.standard_normal(painter.hu.shape, dtype=np.float32)
    painter.hu += np.float32(config.noise_hu) * noise
    np.clip(np.rint(painter.hu, out=painter.hu), -1024, 3071, out=painter.hu)

    origin = rng.uniform(40, 260, 3) * rng.choice([-1.0, 1.0], 3)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    patient_from_scan = solids.translation(*(origin - scan_origin))
    poses = {label: patient_from_scan @ scan_from_vertebra[label] for label in config.levels}
    centroids = {label: solids.apply_affine(pose, (0, -0.12 * table[label].depth, 0)) for label, pose in poses.items()}
    return Phantom(painter.hu.astype(np.int16), mask, affine, centroids, poses)
