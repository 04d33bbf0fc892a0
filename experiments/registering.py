"""Registers one case with a prepared vertebra, and writes everything a case leaves behind."""

import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import files
from data_pipelines import pairs
from data_pipelines import scan as scans
from experiments import detectors
from experiments import pictures
from radgs_jax import detection
from radgs_jax import gaussians
from radgs_jax import grid
from radgs_jax import training
from radgs_jax.models import recm

PROGRAM = "radgs_jax"
POSE_BLUR_MM = 1.0
"""Blur of a reported reconstruction: two views do not say more about where its edges are."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """world_from_ct: (4, 4) estimate, float64; trajectory: (passes + 1, 4, 4) world_from_ct; reconstruction: Gaussians in the
    world frame (effect branch); xrays, intrinsics, camera_from_world: the last crops; attention: (V, h, w); times in s."""

    world_from_ct: np.ndarray
    trajectory: np.ndarray
    reconstruction: gaussians.Gaussians
    xrays: np.ndarray
    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    attention: np.ndarray
    runtime_s: float
    cpu_s: float


def register(prepared, views, images, start_world_from_ct, passes, valid=None):
    """Registers one case: nothing enters but the prepared vertebra, X-rays, cameras and the start pose.

    Args:
      prepared: `patients.Prepared`; views: `cases.View`s; images: (H_v, W_v) line integrals; start_world_from_ct: (4, 4).
      valid: (H_v, W_v) bool, the pixels that count; None: all.
    Returns:
      `Outcome`.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    vertebra, config = prepared.vertebra, prepared.model.config
    valid = [np.ones(image.shape, bool) for image in images] if valid is None else valid
    small, inside, intrinsics, extrinsics = pairs.binned_views(views, images, valid, config.pixel_mm)
    start = start_world_from_ct @ vertebra.ct_from_box
    result = jax.device_get(
        training.register(
            prepared.model.params,
            config,
            [jnp.asarray(i, jnp.float32) for i in small],
            [jnp.asarray(i) for i in inside],
            jnp.asarray(intrinsics, jnp.float32),
            jnp.asarray(extrinsics, jnp.float32),
            jnp.asarray(start, jnp.float32),
            prepared.vertebra.cloud,
            passes,
        )
    )
    box_from_ct = np.linalg.inv(vertebra.ct_from_box)
    poses = [start_world_from_ct, *(_rigid(T) @ box_from_ct for T in result.trajectory[1:].astype(np.float64))]
    anchored = jax.tree.map(lambda a: a[0], result.reconstruction.effect)
    if config.head == "anchored":
        anchored = _carry_detail(anchored, vertebra.cloud, prepared.fine_cloud)
    reconstruction = jax.block_until_ready(gaussians.move(anchored, jnp.asarray(result.trajectory[-2])))
    runtime, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Outcome(
        poses[-1],
        np.stack(poses),
        reconstruction,
        result.xrays,
        result.intrinsics,
        extrinsics,
        result.reconstruction.attention[0].mean(-1),
        runtime,
        cpu,
    )


@jax.jit
def _carry_detail(reconstruction, anchors, fine):
    return gaussians.blur(recm.carry_detail(reconstruction, anchors, fine), POSE_BLUR_MM)


def _rigid(T):
    # float32 passes leave a rotation 1e-6 off; the nearest one goes into the files.
    u, _, vt = np.linalg.svd(T[:3, :3])
    T = T.copy()
    T[:3, :3] = u @ vt
    return T


def reconstruction_in_ct(outcome, world_from_ct, ct_from_index, shape):
    """The reconstructed density, 1/mm, carried to CT axes by the inverse of `world_from_ct` (4, 4).

    ct_from_index (4, 4), shape: the grid there that it is sampled on.
    """
    ct = gaussians.move(outcome.reconstruction, jnp.asarray(np.linalg.inv(world_from_ct), jnp.float32))
    # Centred first: CT coordinates of hundreds of mm would cost float32 its digits.
    middle = ct_from_index[:3, :3] @ (0.5 * (np.array(shape) - 1)) + ct_from_index[:3, 3]
    affine = np.array(ct_from_index)
    affine[:3, 3] -= middle
    ct = ct.replace(mean=ct.mean - jnp.asarray(middle, jnp.float32))
    return np.asarray(gaussians.voxelize(ct, grid.VoxelGrid(jnp.asarray(affine, jnp.float32), tuple(shape))))


def itk_transform(world_from_ct):
    """The pose (4, 4) as the text of an ITK transform (LPS) that 3D Slicer loads.

    ITK stores the map from the fixed frame (world) back to the moving one (CT); Slicer shows its inverse, which carries the CT
    into the C-arm's frame.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    T = lps @ np.linalg.inv(world_from_ct) @ lps
    numbers = " ".join(f"{v:.17g}" for v in [*T[:3, :3].ravel(), *T[:3, 3]])
    return (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: 0 0 0\n"
    )


def write(folder, name, outcome, prepared, views, images, start_world_from_ct, true_world_from_ct=None):
    """Writes a case's files into `folder`/`name`, made if need be: pose, ITK transform, volumes, Gaussians and the picture.

    Args:
      outcome: `Outcome`; prepared, views, images, start_world_from_ct: as in `register`.
      true_world_from_ct: (4, 4), to be drawn; None without one.
    """
    folder = pathlib.Path(folder) / name
    vertebra = prepared.vertebra
    files.write_json(
        folder / "pose.json",
        {
            "world_from_ct": outcome.world_from_ct.tolist(),
            "start_world_from_ct": np.asarray(start_world_from_ct).tolist(),
            "passes_world_from_ct": outcome.trajectory.tolist(),
            "units": "mm",
            "frames": "CT: RAS+ mm; world: the C-arm's",
        },
    )
    with files.replacing(folder / "pose.tfm") as temporary:
        temporary.write_text(itk_transform(outcome.world_from_ct))
    centre = outcome.world_from_ct[:3, :3] @ vertebra.ct_from_box[:3, 3] + outcome.world_from_ct[:3, 3]
    world_from_index = np.eye(4)
    world_from_index[:3, 3] = np.round(centre) - 0.5 * (np.array(scans.GRID_SHAPE) - 1)
    moved = scans.resample(
        vertebra.density, outcome.world_from_ct @ vertebra.ct_from_index, world_from_index, scans.GRID_SHAPE
    )
    files.write_nifti(folder / "ct_vertebra_in_world.nii.gz", moved, world_from_index)
    reconstruction = reconstruction_in_ct(outcome, np.eye(4), world_from_index, scans.GRID_SHAPE)
    files.write_nifti(folder / "reconstruction_in_world.nii.gz", reconstruction, world_from_index)
    files.write_npz(folder / "gaussians.npz", **gaussians.to_arrays(outcome.reconstruction))
    poses = {"start": start_world_from_ct, "estimate": outcome.world_from_ct}
    if true_world_from_ct is not None:
        poses["truth"] = true_world_from_ct
    pictures.registration(folder / "picture.png", name, views, images, vertebra, poses, outcome, reconstruction, moved)


def start_from_points(views, pixels, vertebra):
    """A start pose from the vertebra's centre clicked in every view, with the CT's own orientation.

    Args:
      views: `cases.View`s; pixels: one (u, v) per view; vertebra: `scan.Vertebra`.
    Returns:
      world_from_ct (4, 4) and the rms distance of the rays from their common point, mm.
    Raises:
      InputError: a single view, or rays that do not meet.
    """
    lines = [detection.rays(np.array([p]), v.intrinsics, v.camera_from_world) for v, p in zip(views, pixels)]
    sources, directions = np.stack([source for source, _ in lines]), np.concatenate([d for _, d in lines])
    try:
        centre, _ = detection.triangulate(sources, directions, np.ones(len(lines)))
    except ValueError:
        found = "a single view" if len(lines) == 1 else "rays that are parallel or meet in a source"
        files.fail("flags", "--points", found, "the vertebra's centre in views from two sides")
    away = centre - sources
    miss = away - (away * directions).sum(1, keepdims=True) * directions
    world_from_ct = np.eye(4)
    world_from_ct[:3, 3] = centre - vertebra.ct_from_box[:3, 3]
    return world_from_ct, float(np.sqrt((miss**2).sum(1).mean()))


def start_from_detector(detector, xrays, vertebra):
    """A start pose from the vertebra found in the X-rays.

    Args:
      detector: `detectors.Model`; xrays: `radiograph.Radiograph` of each view, with its camera; vertebra: `scan.Vertebra`.
    Returns:
      world_from_ct (4, 4) and `detectors.Located`.
    Raises:
      InputError: as `detectors.locate`.
    """
    images, views, valid = zip(*((x.line_integrals, x.view, x.valid) for x in xrays))
    located = detectors.locate(detector, images, views, vertebra.label, valid)
    return detectors.start_pose(detector, located, vertebra.label, vertebra.ct_from_box[:3, 3]), located
