"""Training pairs: simulated X-rays of one vertebra with the truth, made from scans or read from cases, cached and resumable.

A shard holds the pairs of one vertebra of one patient. Pair i of a shard is a function of (seed, i) alone.
"""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import carm
from data_pipelines import cases
from data_pipelines import files
from data_pipelines import scan as scans
from data_pipelines import xray
from radgs_jax import camera
from radgs_jax import gaussians
from radgs_jax import training

FORMAT = "radgs-pairs/1"
MEAN_SHAPE = (56, 56, 48)
MEAN_SHAPE_MM = 2.0
"""Grid of mean shapes, in the vertebra's own frame."""


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """How pairs are simulated.

    window: pixels of the stored images, wider than the network's crop; binning: detector pixels to one; poses: vertebra
    poses for each rendering of the rest of the body (articulation makes them independent).
    """

    window: int = 112
    binning: int = 8
    poses: int = 2
    articulation: float = 1.15
    rest_spacing_mm: float = 2.6
    step_mm: float = 2.5
    vertebra_step_mm: float = 1.2


ARRAYS = ("rest", "excess", "vertebra", "intrinsics", "camera_from_world", "world_from_box")


def simulate(scan, whole, label, count, seed, config, gaussian_count, mask_path="mask"):
    """`count` pairs of one vertebra: dict of the ARRAYS, its cloud and its mean-shape density.

    `whole` is the scan's `scan.WholeBody` at config.rest_spacing_mm.

    Raises:
      InputError: the vertebra is absent or cut.
    """
    vertebra = scans.extract(scan, label, gaussian_count, mask_path)
    body = xray.Body(whole, vertebra)
    frame = vertebra.ct_from_box
    device = carm.CArm()
    size = (config.window, config.window)
    shard = {name: [] for name in ARRAYS}
    while len(shard["rest"]) < count:
        index = len(shard["rest"]) // config.poses
        rng = np.random.default_rng([seed, label, index])
        camera_from_world = carm.sample_views(rng, device)
        world_from_ct = carm.sample_world_from_ct(rng, frame[:3, 3])
        centre = world_from_ct[:3, :3] @ frame[:3, 3] + world_from_ct[:3, 3]
        # The window follows the vertebra; the crop of a start pose then moves inside it.
        intrinsics = np.stack(
            [_window(carm.intrinsics(device, config.binning), E, centre, config.window) for E in camera_from_world]
        )
        world_from_rest = carm.motion_about(centre, carm.sample_articulation(rng, config.articulation)) @ world_from_ct
        rest = body.render_rest(world_from_rest, intrinsics, camera_from_world, size, config.step_mm)
        for _ in range(config.poses):
            offset = carm.sample_articulation(rng, config.articulation)
            moved = carm.motion_about(centre, offset) @ world_from_ct
            excess, alone = body.render_vertebra(moved, intrinsics, camera_from_world, size, config.vertebra_step_mm)
            for name, value in zip(ARRAYS, (rest, excess, alone, intrinsics, camera_from_world, moved @ frame)):
                shard[name].append(value)
    return _finish({name: values[:count] for name, values in shard.items()}, vertebra)


def _window(intrinsics, camera_from_world, centre, size):
    """Intrinsics of a window of `size` pixels that shows a world point in its middle, at whole pixels of the detector."""
    p = camera_from_world[:3, :3] @ centre + camera_from_world[:3, 3]
    middle = intrinsics[:2] * p[:2] / p[2] + intrinsics[2:]
    moved = intrinsics.copy()
    moved[2:] -= np.rint(middle) - size // 2
    return moved


def mean_shape_grid():
    """box_from_index (4, 4) of the mean-shape grid."""
    affine = np.diag([MEAN_SHAPE_MM] * 3 + [1.0])
    affine[:3, 3] = -0.5 * MEAN_SHAPE_MM * (np.array(MEAN_SHAPE) - 1)
    return affine


def _finish(lists, vertebra):
    shard = {
        name: np.stack(values).astype(np.float16 if name in ARRAYS[:3] else np.float32)
        for name, values in lists.items()
    }
    density, density_grid = scans.block_average(vertebra.density, vertebra.ct_from_index, MEAN_SHAPE_MM)
    shard["shape"] = scans.resample(density, density_grid, vertebra.ct_from_box @ mean_shape_grid(), MEAN_SHAPE).astype(
        np.float16
    )
    shard["label"] = np.int32(vertebra.label)
    shard.update({f"cloud_{k}": v for k, v in gaussians.to_arrays(vertebra.cloud).items()})
    return shard


def from_cases(case_file, names, variant, config, gaussian_count, pixel_mm):
    """Pairs from real (or realistic) X-rays of known pose: one shard per volume among the scenes `names`.

    The measured X-ray stands as `rest` with no excess; the vertebra alone is the CT projected at the true pose, since no
    real X-ray shows it.
    """
    shards = {}
    for volume in case_file.volumes.values():
        members = [case_file.scenes[n] for n in names if case_file.scenes[n].volume == volume.name]
        if not members:
            continue
        scan = scans.read_scan(volume.full_ct, volume.full_mask, volume.patient)
        vertebra = scans.extract(scan, volume.full_label, gaussian_count, volume.full_mask)
        lists = {name: [] for name in ARRAYS}
        for scene in members:
            world_from_ct = cases.truth(case_file, scene)
            world_from_box = world_from_ct @ vertebra.ct_from_box
            images, intrinsics, extrinsics = binned_views(scene.views, cases.read_xrays(scene, variant), pixel_mm)
            centred, windows = [], []
            for image, k, E in zip(images, intrinsics, extrinsics):
                window = _window(k, E, world_from_box[:3, 3], config.window)
                corner = np.rint(k[2:] - window[2:]).astype(int)
                rows = np.clip(corner[1] + np.arange(config.window), 0, image.shape[0] - 1)
                columns = np.clip(corner[0] + np.arange(config.window), 0, image.shape[1] - 1)
                centred.append(image[rows][:, columns])
                windows.append(window)
            alone = xray.render(
                vertebra.density,
                vertebra.ct_from_index,
                world_from_ct,
                np.stack(windows),
                extrinsics,
                (config.window,) * 2,
                config.vertebra_step_mm,
                2,
            )
            measured = np.stack(centred)
            values = (measured, np.zeros_like(measured), alone, np.stack(windows), extrinsics, world_from_box)
            for name, value in zip(ARRAYS, values):
                lists[name].append(value)
        shards[volume.name] = _finish(lists, vertebra)
    return shards


def binned_views(views, images, pixel_mm):
    """Images averaged to about `pixel_mm` at the isocentre, with exact cameras: list of arrays, (V, 4) and (V, 4, 4)."""
    small, cameras = [], []
    for view, image in zip(views, images):
        factor = cases.binning(view, pixel_mm)
        small.append(camera.bin_image(image, factor))
        cameras.append(
            camera.bin(camera.Camera(view.intrinsics, view.camera_from_world, view.height, view.width), factor)
        )
    return small, np.stack([c.intrinsics for c in cameras]), np.stack([c.camera_from_world for c in cameras])


def save(path, shard):
    """Writes a shard, atomically."""
    files.write_npz(path, **shard)


def load(path):
    """Reads a shard.

    Raises:
      InputError: a damaged file.
    """
    cloud = [f"cloud_{k}" for k in ("format", "density", "mean", "scale", "quaternion")]
    return files.read_npz(path, *ARRAYS, "shape", "label", *cloud)


@dataclasses.dataclass(frozen=True)
class PairSet:
    """All pairs of some shards in memory: arrays (P, ...) of ARRAYS, shard (P,) and the shards' clouds (shards, N)."""

    arrays: dict
    shard: np.ndarray
    clouds: gaussians.Gaussians
    labels: np.ndarray

    def __len__(self):
        return len(self.shard)

    def batch(self, seed, step, size):
        """The training batch of one step: a function of (seed, step) alone, each epoch a new shuffle."""
        first = step * size
        chosen, epochs = [], {}
        for position in range(first, first + size):
            epoch, place = divmod(position, len(self))
            if epoch not in epochs:
                epochs[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
            chosen.append(epochs[epoch][place])
        chosen = np.array(chosen)
        values = {name: self.arrays[name][chosen].astype(np.float32) for name in ARRAYS}
        cloud = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[self.shard[chosen]]), self.clouds)
        return training.PairBatch(**{name: jnp.asarray(value) for name, value in values.items()}, cloud=cloud)


def gather(shards):
    """A `PairSet` of a list of shards, all with the same image and cloud sizes."""
    arrays = {name: np.concatenate([s[name] for s in shards]) for name in ARRAYS}
    owner = np.concatenate([np.full(len(s["rest"]), i) for i, s in enumerate(shards)])
    clouds = [
        gaussians.from_arrays({k: s[f"cloud_{k}"] for k in ("format", "density", "mean", "scale", "quaternion")})
        for s in shards
    ]
    stacked = jax.tree.map(lambda *a: np.stack([np.asarray(x) for x in a]), *clouds)
    return PairSet(arrays, owner, stacked, np.array([int(s["label"]) for s in shards]))


def mean_shapes(shards):
    """Mean density by VerSe label, and under key 0 that of all: dict label -> MEAN_SHAPE array, 1/mm, vertebra's frame."""
    by_label = {}
    for shard in shards:
        for key in (int(shard["label"]), 0):
            by_label.setdefault(key, []).append(shard["shape"].astype(np.float32))
    return {label: np.mean(shapes, 0).astype(np.float16) for label, shapes in by_label.items()}


def config_hash(*configs):
    """Short digest of frozen dataclasses and plain values, for cache keys and reuse checks."""
    plain = [dataclasses.asdict(c) if dataclasses.is_dataclass(c) else c for c in configs]
    return hashlib.sha256(json.dumps([FORMAT, plain], sort_keys=True, default=str).encode()).hexdigest()[:16]
