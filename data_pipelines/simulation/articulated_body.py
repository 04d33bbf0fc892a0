"""A scan divided into vertebrae that move independently and the rest of the body, which bends with the spine."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from data_pipelines.ct import whole_body
from data_pipelines.simulation import materials
from data_pipelines.simulation import posture
from kernels.drr import drr
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax import levels
from radgs_jax.geometry import resample

VERTEBRAE = levels.VERTEBRAE
"""VerSe numbers of movable vertebrae from head to feet; 28 is T13. The sacrum belongs to the rest of the body."""
MARGIN_MM = 16.0
"""Distance by which the warped volume exceeds the scan's cross-section on each side, mm. Tissue that a posture moves further
out is lost. Chosen by hand for the default `Preset`; twice that value costs memory and time, half of it may cut the skin."""
_SHAPE_STEP, _WINDOW_STEP, _SLICE_STEP = 8, 8, 32
"""Multiples that sizes of crops, windows (pixels) and numbers of slices are rounded up to, since each new shape is compiled
anew. Chosen by hand: twice these values mean fewer compilations and more empty voxels."""
_DIRECTIONS = np.stack(np.meshgrid(*[np.linspace(-1.0, 1.0, 5)] * 3)).reshape(3, -1)
"""(3, 125) directions in which a vertebra's outermost voxels are sought."""


class ArticulatedBody:
    """A scan divided into parts that move: each complete vertebra on a fine crop, everything else on a coarse grid.

    Muscle fills the place of the vertebrae in the rest of the body, and a vertebra is rendered as its excess over muscle. The
    sum is exact where a moved vertebra lies in muscle. Inside another bone the attenuations add up; inside lung, the muscle
    that the excess assumes is missing. Vertebrae that the scan's border cuts stay with the rest.

    Attributes:
      spine: the movable vertebrae.
      extents: for each of them (2, 3), the 1st and 99th percentile of its voxels' coordinates in its own frame, mm.
      ct_from_index: (4, 4) of the rest's grid.
    """

    def __init__(self, scan: scans.Scan, rest_mm: float = 3.0, vertebra_mm: float = 1.5) -> None:
        """Splits a scan.

        Args:
          rest_mm, vertebra_mm: largest voxel sides of the rest and of the vertebrae; the scan is averaged over blocks of whole
            voxels. Half the sides take eight times the memory; twice the sides blur thin processes.

        Raises:
          InputError: a scan without a complete vertebra.
        """
        whole = segmentation.complete_labels(scan.labels)
        labels = [label for label in VERTEBRAE if label in whole]
        if not labels:
            errors.fail(scan.patient, "labels", sorted(scan.boxes), "a complete vertebra among them")
        frames = np.stack([extraction.ct_from_box(scan, label) for label in labels])
        self.spine = posture.Spine(tuple(labels), frames)
        mu = attenuation.from_hounsfield(scan.hu)
        bone = materials.bone_from_hounsfield(scan.hu)
        fill = float(attenuation.from_hounsfield(np.array(whole_body.FILL_HU, np.float32)))
        crops, self.extents = [], []
        for label, frame in zip(labels, frames):
            box = tuple(slice(s.start - 1, s.stop + 1) for s in scan.boxes[label])
            mask = scan.labels[box] == label
            crop_from = resample.part_from_index(scan.ct_from_index, [s.start for s in box])
            parts = [
                resample.block_average(np.where(mask, a, 0), crop_from, vertebra_mm) for a in (mu[box], bone[box], 1)
            ]
            ct = np.argwhere(mask) @ crop_from[:3, :3].T + crop_from[:3, 3]
            self.extents.append(np.percentile((ct - frame[:3, 3]) @ frame[:3, :3], [1, 99], axis=0))
            outermost = ct[np.unique(np.argmax(ct @ _DIRECTIONS, axis=0))]
            crops.append(([volume.astype(np.float32) for volume, _ in parts], parts[0][1], outermost))
            mu[box][mask], bone[box][mask] = fill, 0.0
        self._crops = []
        for (alone, bony, filled), affine, outermost in crops:
            volumes = [alone - fill * filled, bony, alone]
            padded = [np.pad(v, [(0, -n % _SHAPE_STEP) for n in v.shape]) for v in volumes]
            self._crops.append((tuple(jnp.asarray(v) for v in padded), affine, outermost))
        (rest, self.ct_from_index), (rest_bone, _) = (_coarse(a, scan.ct_from_index, rest_mm) for a in (mu, bone))
        self._rest = jnp.asarray(rest), jnp.asarray(rest_bone)

    def render_rest(
        self,
        smooth: np.ndarray,
        world_from_ct: np.ndarray,
        intrinsics: np.ndarray,
        camera_from_world: np.ndarray,
        size: int,
        step_mm: float = 2.5,
    ) -> tuple[np.ndarray, ...]:
        """Line integrals at 70 keV of the rest of the body in a posture.

        Args:
          smooth: (K, 4, 4) motions of `posture.Posture`.
          world_from_ct: (4, 4).
          intrinsics: (V, 4) fx, fy, cx, cy in pixels.
          camera_from_world: (V, 4, 4).
          size: S, pixels along each side of an image.
          step_mm: sample distance along the rays.

        Returns:
          Two arrays (V, S, S): of all of the rest, and of its bone.

        Raises:
          ValueError: as `posture.pull_back`.
        """
        spacing = np.linalg.norm(self.ct_from_index[:3, :3], axis=0)
        margin = int(MARGIN_MM / spacing[:2].max())
        X, Y, _ = self._rest[0].shape
        first, count = self._slices_in_sight(world_from_ct, intrinsics, camera_from_world, size, margin)
        affines = posture.pull_back(self.spine, smooth, self.ct_from_index, first, count)
        volumes = posture.warp(self._rest, jnp.asarray(affines, jnp.float32), (X + 2 * margin, Y + 2 * margin), margin)
        ct_from_warped = resample.part_from_index(self.ct_from_index, [-margin, -margin, first])
        voxel_from_camera = np.linalg.inv(camera_from_world @ world_from_ct @ ct_from_warped)[:, :3]
        images = _project(volumes, *_float32(voxel_from_camera, intrinsics), size, step_mm, 1)
        return tuple(np.asarray(image) for image in images)

    def _slices_in_sight(self, world_from_ct, intrinsics, camera_from_world, size, margin):
        """Index of the first slice of the rest that the images' rays meet, and the number of slices, rounded up."""
        X, Y, Z = self._rest[0].shape
        u, v = np.meshgrid(*[np.linspace(-0.5, size - 0.5, 3)] * 2)
        low, high = [], []
        for k, E in zip(intrinsics, camera_from_world):
            index_from_camera = np.linalg.inv(E @ world_from_ct @ self.ct_from_index)
            d = np.stack([(u.ravel() - k[2]) / k[0], (v.ravel() - k[3]) / k[1], np.ones(9)], 1)
            depth = np.linspace(0.0, 2.0 * E[2, 3], 129)[1:, None, None]
            index = (depth * d) @ index_from_camera[:3, :3].T + index_from_camera[:3, 3]
            sides = (index[..., :2] > -margin - 1) & (index[..., :2] < [X + margin, Y + margin])
            place = index[..., 2][sides.all(-1)]
            if len(place):
                low.append(place.min())
                high.append(place.max())
        first = int(np.clip(math.floor(min(low, default=0)) - 2, 0, Z - 2))
        last = int(np.clip(math.ceil(max(high, default=0)) + 2, first + 2, Z))
        count = min(_round_up(last - first, _SLICE_STEP), Z)
        return min(first, Z - count), count

    def render_vertebra(
        self,
        label: int,
        world_from_ct: np.ndarray,
        intrinsics: np.ndarray,
        camera_from_world: np.ndarray,
        size: int,
        step_mm: float = 1.5,
        alone: bool = True,
    ) -> list[np.ndarray]:
        """Line integrals at 70 keV of one vertebra. Each pixel is the mean of four rays, as a panel integrates over pixels.

        Args:
          label: VerSe number.
          world_from_ct: (4, 4) for the vertebra, which differs from that of the rest where it has moved.
          intrinsics, camera_from_world, size, step_mm: as in `render_rest`.
          alone: also renders the vertebra as it is.

        Returns:
          Arrays (V, S, S): the excess over muscle, its bone, and with `alone` the vertebra.

        Raises:
          ValueError: a label whose vertebra is absent or incomplete.
        """
        volumes, ct_from_index, outermost = self._crops[self.spine.labels.index(label)]
        volumes = volumes if alone else volumes[:2]
        camera_from_ct = camera_from_world @ world_from_ct
        points = camera_from_ct[:, :3, :3] @ outermost.T + camera_from_ct[:, :3, 3:]
        uv = points[:, :2] / points[:, 2:] * intrinsics[:, :2, None] + intrinsics[:, 2:, None]
        # Interpolation reaches one voxel beyond the outermost voxels' centres, block averages half a voxel further.
        reach = 2.0 * np.linalg.norm(ct_from_index[:3, :3], axis=0).max() * intrinsics[:, 0] / points[:, 2].min(-1) + 1
        corner = np.floor(uv.min(-1) - reach[:, None]).astype(int)
        side = _round_up(np.ceil(uv.max(-1) + reach[:, None] - corner).max() + 1, _WINDOW_STEP)
        if side >= _round_up(size, _WINDOW_STEP):
            side, corner = _round_up(size, _WINDOW_STEP), np.zeros_like(corner)
        if (corner >= size).any(1).all() or (corner + side <= 0).any(1).all():
            return [np.zeros((len(intrinsics), size, size), np.float32) for _ in volumes]
        moved = np.array(intrinsics, np.float64)
        moved[:, 2:] -= corner
        index_from_camera = np.linalg.inv(camera_from_ct @ ct_from_index)[:, :3]
        windows = _project(volumes, *_float32(index_from_camera, moved), side, step_mm, 2)
        return [_place(np.asarray(window), corner, size) for window in windows]


def _place(windows, corners, size):
    """Inserts windows (V, side, side) at their corners (V, 2) into images (V, size, size) of zeros."""
    images = np.zeros((len(corners), size, size), np.float32)
    for image, window, (column, row) in zip(images, windows, corners):
        window = window[max(-row, 0) :, max(-column, 0) :]
        target = image[max(row, 0) :, max(column, 0) :][: window.shape[0], : window.shape[1]]
        target += window[: target.shape[0], : target.shape[1]]
    return images


def _float32(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def _round_up(n, step):
    return -(-int(n) // step) * step


def _coarse(array, ct_from_index, spacing_mm):
    """`whole_body.coarse_body` with a border of one voxel of air round its cross-section, and its affine."""
    array, affine, _ = whole_body.coarse_body(array, ct_from_index, spacing_mm)
    affine[:3, 3] -= affine[:3, :3] @ [1, 1, 0]
    return np.pad(array, ((1, 1), (1, 1), (0, 0))).astype(np.float32, copy=False), affine


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _project(volumes, voxel_from_camera, intrinsics, size, step_mm, oversample):
    """Line integrals (V, size, size) of each volume, each pixel the mean of oversample^2 rays."""
    scale = jnp.asarray([oversample] * 4, jnp.float32)
    fine = intrinsics * scale + 0.5 * (oversample - 1) * jnp.asarray([0.0, 0.0, 1.0, 1.0])
    side = size * oversample
    images = [drr(volume, voxel_from_camera, fine, side, side, step_mm=step_mm) for volume in volumes]
    return tuple(i.reshape(-1, size, oversample, size, oversample).mean((2, 4)) for i in images)
