"""Procedural CT of a human spine from T9 to the sacrum, with vertebra labels in VerSe numbers.

Every bone is a signed distance field on its own window of the scan grid: smooth unions of tapered plates and superellipse
bodies (`solids`, `bones`). A chain of rigid transforms from the sacrum upwards poses the bones (`anatomy`). A facet joint is
placed in the frame of its disc, so its two plates fit in any posture. Tissues are then blended into a volume of HU
(`painter`, `trunk`).

Frames: `patient` is RAS+ mm. `vertebra` has its origin at the centre of the vertebral body, x right, y anterior, z along the
body's axis; `disc` is the same at the centre of a disc. All shapes are built in `scan`, which is parallel to `patient` with
its origin at the centre of the S1 endplate.
"""

import dataclasses

import numpy as np
import scipy

from data_pipelines.phantom import anatomy
from data_pipelines.phantom import bones
from data_pipelines.phantom import solids
from data_pipelines.phantom import transforms
from data_pipelines.phantom.painter import Painter
from data_pipelines.phantom.trunk import soft_tissue
from data_pipelines.phantom.trunk import Trunk

TEXTURE_MM = 5.0
"""Length of the marrow's texture, mm; chosen by hand. It sets the size of the density variations seen in X-rays."""
ROUGHNESS_MM = 0.22
"""Displacement of bone surfaces per standard deviation of the texture, mm; chosen by hand. It is well below a voxel, so it
roughens surfaces without tearing thin processes apart."""


@dataclasses.dataclass(frozen=True)
class PhantomConfig:
    """Sampling and variation of a phantom.

    Attributes:
      spacing_mm: voxel size along x, y and z.
      extent_mm: lateral and antero-posterior field of view; its height follows from the spine.
      levels: VerSe numbers of the labelled vertebrae, without gaps and ending at L5 (24); the first is T9 (16) to L1 (20).
      size_variation: largest relative deviation of a patient's size from the mean.
      level_variation: largest relative deviation of one vertebra from the patient's size.
      asymmetry: largest relative deviation of the processes' lengths and positions, drawn for each side.
      noise_hu: standard deviation of the CT noise, HU.
    """

    spacing_mm: tuple[float, float, float] = (1.25, 1.25, 1.5)
    extent_mm: tuple[float, float] = (330.0, 240.0)
    levels: tuple[int, ...] = tuple(range(anatomy.FIRST_LEVEL, anatomy.L5 + 1))
    size_variation: float = 0.08
    level_variation: float = 0.03
    asymmetry: float = 0.04
    noise_hu: float = 12.0


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A CT with its labels.

    Attributes:
      hu: (X, Y, Z) int16.
      mask: (X, Y, Z) uint8, VerSe numbers; 26 is the sacrum, ribs and pelvis are 0.
      affine: (4, 4) float64, RAS+ mm from voxel index.
      centroids: (3,) RAS+ mm by VerSe number, slightly behind the centre of the body, as in VerSe.
      patient_from_vertebra: (4, 4) float64, rigid, by VerSe number.
    """

    hu: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    centroids: dict[int, np.ndarray]
    patient_from_vertebra: dict[int, np.ndarray]


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


def make_phantom(seed: int, config: PhantomConfig = PhantomConfig()) -> Phantom:
    """Makes the phantom of one patient, a pure function of (seed, config).

    The vertebra above the first level and the lower end of the sacrum may be cut by the field of view, as in a real scan; the
    vertebra above is not labelled.

    Raises:
      ValueError: a config that makes no spine.
    """
    _check(config)
    rng = np.random.default_rng(seed)
    first = config.levels[0]
    table, scale = anatomy.draw_sizes(rng, first, config.size_variation, config.level_variation)
    scan_from_sacrum, scan_from_disc, scan_from_vertebra = anatomy.place_levels(rng, table)
    labels = sorted(table, reverse=True)

    spine = _spine_line(scan_from_sacrum, [scan_from_vertebra[label] for label in labels], scale)
    tips = np.array(
        [
            transforms.apply_affine(scan_from_vertebra[label], (0, -v.depth / 2 - v.spinous[0], v.spinous[1]))
            for label, v in table.items()
        ]
    )
    top = transforms.apply_affine(scan_from_vertebra[first], (0, 0, table[first].height / 2))[2] + 20 * scale
    spacing = np.asarray(config.spacing_mm, np.float64)
    heights = np.arange(-100 * scale, top, spacing[2])
    trunk = Trunk(rng, scale, config.extent_mm, spine, tips, heights)
    grid, scan_origin = _scan_grid(config.extent_mm, spacing, trunk, spine)

    solids_of = {
        label: bones.make_vertebra(rng, grid, label, table, scan_from_disc, scan_from_vertebra, config.asymmetry)
        for label in labels
    }
    solids_of[anatomy.SACRUM] = bones.make_sacrum(grid, table, scale, scan_from_disc, scan_from_sacrum)
    texture = _roughen(rng, solids_of, spacing)
    for upper, lower in zip(labels[1:] + [anatomy.L5], labels[:-1] + [anatomy.SACRUM]):
        solids.keep_apart(solids_of[upper], solids_of[lower], anatomy.FACET_GAP_MM)

    painter = Painter(grid)
    soft_tissue(rng, painter, trunk, table, scale, scan_from_vertebra, spine)
    for label in labels:
        v = table[label]
        disc = solids.Solid(grid, scan_from_disc[label][:3, 3] - 45, scan_from_disc[label][:3, 3] + 45)
        disc.body(scan_from_disc[label], 0.97 * v.width, 0.96 * v.depth, v.disc + 7, 0, 0.0)
        painter.bone(disc, 4.0, 95.0, 75.0)

    # HU of the patient's cortical and cancellous bone.
    cortical = rng.uniform(760, 1080)
    density = rng.uniform(120, 250)
    unlabelled = [
        solid
        for label in labels
        if label <= anatomy.T12
        for solid in bones.make_ribs(grid, label, table, scan_from_vertebra, trunk)
    ]
    unlabelled += [bones.make_ilium(grid, side, scale) for side in (1, -1)]
    for solid in unlabelled:
        for bone in solids_of.values():
            solids.give_way(solid, bone, 1.5)
        painter.bone(solid, 1.2, 0.95 * cortical, density + 60)

    mask = np.zeros(painter.hu.shape, np.uint8)
    for label, solid in solids_of.items():
        marrow = density * rng.uniform(0.94, 1.06) + 22 * texture[label]
        shell = 1.0
        if label != anatomy.SACRUM:
            arch = _arch_share(solid, scan_from_vertebra[label], table[label])
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
    patient_from_scan = transforms.translation(*(origin - scan_origin))
    poses = {label: patient_from_scan @ scan_from_vertebra[label] for label in config.levels}
    centroids = {
        label: transforms.apply_affine(pose, (0, -0.12 * table[label].depth, 0)) for label, pose in poses.items()
    }
    return Phantom(painter.hu.astype(np.int16), mask, affine, centroids, poses)


def _spine_line(scan_from_sacrum, poses, scale):
    """Points (N, 3) along the vertebral bodies from the sacrum upwards, scan mm."""
    return np.array(
        [
            transforms.apply_affine(scan_from_sacrum, (0, 0, -60 * scale)),
            transforms.apply_affine(scan_from_sacrum, (0, 0, -15 * scale)),
        ]
        + [pose[:3, 3] for pose in poses]
    )


def _scan_grid(extent_mm, spacing, trunk, spine):
    """Coordinates (X,), (Y,), (Z,) float32 of the voxels, scan mm, and those of the first voxel (3,) in float64."""
    grid = []
    back, front = (trunk.centre_y - trunk.half_y).min(), (trunk.centre_y + trunk.half_y).max()
    for axis, middle in ((0, spine[:, 0].mean()), (1, 0.5 * (back + front))):
        count = int(round(extent_mm[axis] / spacing[axis]))
        grid.append(middle + (np.arange(count) - (count - 1) / 2) * spacing[axis])
    grid.append(trunk.heights)
    return [g.astype(np.float32) for g in grid], np.array([g[0] for g in grid])


def _roughen(rng, solids_of, spacing):
    """Draws a random texture for the marrow of each bone and displaces the bone's surface by a small share of it.

    Returns:
      The texture of each bone by label, on its solid's window, with a standard deviation of about 1.
    """
    coarse = scipy.ndimage.gaussian_filter(rng.standard_normal((72, 64, 48)).astype(np.float32), 0.8, mode="wrap")
    coarse /= coarse.std()
    texture = {}
    for label, solid in solids_of.items():
        corner = rng.integers(0, 12, 3)
        steps = [s * d / TEXTURE_MM for s, d in zip(solid.f.shape, spacing)]
        patch = coarse[tuple(slice(c, c + int(np.ceil(n)) + 2) for c, n in zip(corner, steps))]
        zoom = [n / m for n, m in zip(solid.f.shape, patch.shape)]
        texture[label] = scipy.ndimage.zoom(patch, zoom, order=1)
        solid.f += ROUGHNESS_MM * texture[label]
    return texture


def _arch_share(solid, scan_from_vertebra, size):
    """1 in the vertebral arch and 0 in the body, over the solid's window; denser bone with a thicker shell."""
    everywhere = np.full(3, 200.0)
    _, (_, y, _) = solid.in_frame(scan_from_vertebra, -everywhere, everywhere)
    return np.clip((-size.depth / 2 - y + 2) / 5, 0, 1)
