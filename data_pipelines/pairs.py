"""Training pairs: X-rays of one vertebra with the truth, simulated from scans or measured at known poses, and their batches.

Pairs and the vertebrae that they show lie in two `pair_store`s (`build` writes them). Both are named by content: a scan is
the digest of its files, wherever they lie.
"""

import dataclasses
import functools
import hashlib
import json

import jax
import numpy as np

from data_pipelines import carm
from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pair_store
from data_pipelines import scan as scans
from data_pipelines import xray
from radgs_jax import camera
from radgs_jax import gaussians
from radgs_jax import training

FORMAT = "radgs-pairs/1"
MEAN_SHAPE = (56, 56, 48)
MEAN_SHAPE_MM = 2.0
"""Grid of mean shapes, in the vertebra's own frame."""
ARRAYS = ("rest", "excess", "vertebra", "intrinsics", "camera_from_world", "world_from_box")
"""Of a pair, as `training.PairBatch` has them; the images are stored as float16. Its `owner` is the vertebra's number."""
CLOUD = tuple(field.name for field in dataclasses.fields(gaussians.Gaussians))


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


@dataclasses.dataclass(frozen=True)
class Vertebrae:
    """Which vertebrae: ((digest of the scan, VerSe number), ...), each as `gaussians` Gaussians."""

    names: tuple
    gaussians: int


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Pairs simulated from scans: `count` of each vertebra, one vertebra after the other."""

    vertebrae: Vertebrae
    count: int
    config: PairConfig

    def __len__(self):
        return self.count * len(self.vertebrae.names)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Pairs of real (or realistic) X-rays of known pose, one of each scene.

    cases: digest of the case file; scenes: ((name, number of its vertebra, digest of its X-rays), ...); variant: which array of
    the X-ray files; pixel_mm: what X-rays are binned to, at the isocentre.
    """

    vertebrae: Vertebrae
    cases: str
    scenes: tuple
    variant: str
    pixel_mm: float
    config: PairConfig

    def __len__(self):
        return len(self.scenes)


class Archive:
    """Where the files lie that sets of pairs name by content.

    What neighbouring examples share stays: of each thing made from scans, the last one. Other processes are sent the file
    names only.
    """

    def __init__(self, scans, scenes=None):
        """scans: {digest: (patient, ct path, mask path)}; scenes: {name: (`cases.Scene`, world_from_ct)}."""
        self.scans, self.scenes, self._kept = scans, scenes, {}

    def __reduce__(self):
        return Archive, (self.scans, self.scenes)

    def keep(self, make, *key):
        """make(self, *key), or what the last call with the same arguments gave."""
        if self._kept.get(make, (None, None))[0] != key:
            self._kept.pop(make, None)  # first, or two scans would be in memory
            self._kept[make] = (key, make(self, *key))
        return self._kept[make][1]


def scan_digest(ct_path, mask_path, digest=files.sha256):
    """What a scan is called wherever its files lie; `digest` gives a file's.

    Raises:
      InputError: a missing file.
    """
    return config_hash("scan", [digest(ct_path), digest(mask_path)])


def _scan(archive, digest):
    patient, ct, mask = archive.scans[digest]
    return scans.read_scan(ct, mask, patient)


def _whole(archive, digest, spacing_mm):
    return scans.WholeBody(archive.keep(_scan, digest), spacing_mm)


def _vertebra(archive, digest, label, count):
    return scans.extract(archive.keep(_scan, digest), label, count, archive.scans[digest][2])


def _body(archive, digest, label, count, spacing_mm):
    return xray.Body(archive.keep(_whole, digest, spacing_mm), archive.keep(_vertebra, digest, label, count))


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A body, cameras, its rest as they see it (V, S, S), and poses [(4, 4)] of the vertebra in front of that."""

    body: xray.Body
    intrinsics: np.ndarray
    camera_from_world: np.ndarray
    rest: np.ndarray
    world_from_ct: list


def _setting(archive, which, seed, owner, number):
    config = which.config
    digest, label = which.vertebrae.names[owner]
    body = archive.keep(_body, digest, label, which.vertebrae.gaussians, config.rest_spacing_mm)
    # The patient's number keeps two patients from sharing random draws.
    patients = list(dict.fromkeys(name for name, _ in which.vertebrae.names))
    rng = np.random.default_rng([seed, patients.index(digest), label, number])
    device, middle = carm.CArm(), body.vertebra.ct_from_box[:3, 3]
    camera_from_world = carm.sample_views(rng, device)
    world_from_ct = carm.sample_world_from_ct(rng, middle)
    centre = world_from_ct[:3, :3] @ middle + world_from_ct[:3, 3]
    # The window follows the vertebra; the crop of a start pose then moves inside it.
    detector = carm.intrinsics(device, config.binning)
    intrinsics = np.stack([_window(detector, E, centre, config.window) for E in camera_from_world])
    world_from_rest = carm.motion_about(centre, carm.sample_articulation(rng, config.articulation)) @ world_from_ct
    offsets = [carm.sample_articulation(rng, config.articulation) for _ in range(config.poses)]
    size = (config.window, config.window)
    rest = body.render_rest(world_from_rest, intrinsics, camera_from_world, size, config.step_mm)
    poses = [carm.motion_about(centre, offset) @ world_from_ct for offset in offsets]
    return _Setting(body, intrinsics, camera_from_world, rest, poses)


def simulated(which, seed, index, archive):
    """Pair `index` of a `Simulated`, a function of (which, seed, index) and of what the scans hold: ARRAYS and owner.

    Raises:
      InputError: an unreadable scan, an absent or cut vertebra.
    """
    config = which.config
    owner, number = divmod(index, which.count)
    setting = archive.keep(_setting, which, seed, owner, number // config.poses)
    world_from_ct = setting.world_from_ct[number % config.poses]
    cameras, size = (setting.intrinsics, setting.camera_from_world), (config.window, config.window)
    excess, alone = setting.body.render_vertebra(world_from_ct, *cameras, size, config.vertebra_step_mm)
    return _pair(owner, setting.rest, excess, alone, *cameras, world_from_ct @ setting.body.vertebra.ct_from_box)


def _pair(owner, *values):
    typed = {name: np.asarray(v, np.float16 if name in ARRAYS[:3] else np.float32) for name, v in zip(ARRAYS, values)}
    return {**typed, "owner": np.int32(owner)}


def _window(intrinsics, camera_from_world, centre, size):
    """Intrinsics of a window of `size` pixels that shows a world point in its middle, at whole pixels of the detector."""
    p = camera_from_world[:3, :3] @ centre + camera_from_world[:3, 3]
    middle = intrinsics[:2] * p[:2] / p[2] + intrinsics[2:]
    moved = intrinsics.copy()
    moved[2:] -= np.rint(middle) - size // 2
    return moved


def measured(which, seed, index, archive):
    """Pair `index` of a `Measured`: ARRAYS and owner.

    The measured X-ray stands as `rest` with no excess; the vertebra alone is the CT projected at the true pose, since no
    real X-ray shows it.

    Args:
      seed: nothing here is random; archive: the `Archive`, with scenes.
    Raises:
      InputError: unreadable files, an absent or cut vertebra.
    """
    name, owner, _ = which.scenes[index]
    digest, label = which.vertebrae.names[owner]
    vertebra = archive.keep(_vertebra, digest, label, which.vertebrae.gaussians)
    (scene, world_from_ct), config = archive.scenes[name], which.config
    world_from_box = world_from_ct @ vertebra.ct_from_box
    images, intrinsics, extrinsics = binned_views(scene.views, cases.read_xrays(scene, which.variant), which.pixel_mm)
    centred, windows = [], []
    for image, k, E in zip(images, intrinsics, extrinsics):
        window = _window(k, E, world_from_box[:3, 3], config.window)
        corner = np.rint(k[2:] - window[2:]).astype(int)
        rows = np.clip(corner[1] + np.arange(config.window), 0, image.shape[0] - 1)
        columns = np.clip(corner[0] + np.arange(config.window), 0, image.shape[1] - 1)
        centred.append(image[rows][:, columns])
        windows.append(window)
    cameras, size = (np.stack(windows), extrinsics), (config.window, config.window)
    grid, step_mm = vertebra.ct_from_index, config.vertebra_step_mm
    alone = xray.render(vertebra.density, grid, world_from_ct, *cameras, size, step_mm, oversample=2)
    return _pair(owner, np.stack(centred), np.zeros_like(alone), alone, *cameras, world_from_box)


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


def mean_shape_grid():
    """box_from_index (4, 4) of the mean-shape grid."""
    affine = np.diag([MEAN_SHAPE_MM] * 3 + [1.0])
    affine[:3, 3] = -0.5 * MEAN_SHAPE_MM * (np.array(MEAN_SHAPE) - 1)
    return affine


def vertebra(which, seed, index, archive):
    """Vertebra `index` of a `Vertebrae`: its label, its Gaussians (N,) in the box frame, its density on the mean-shape grid.

    Args:
      seed: nothing here is random; archive: the `Archive`.
    Raises:
      InputError: an unreadable scan, an absent or cut vertebra.
    """
    one = archive.keep(_vertebra, *which.names[index], which.gaussians)
    density, density_grid = scans.block_average(one.density, one.ct_from_index, MEAN_SHAPE_MM)
    shape = scans.resample(density, density_grid, one.ct_from_box @ mean_shape_grid(), MEAN_SHAPE)
    cloud = {name: np.asarray(getattr(one.cloud, name), np.float32) for name in CLOUD}
    return {"label": np.int32(one.label), "shape": shape.astype(np.float16), **cloud}


class Batches(pair_store.Loader):
    """Endless `training.PairBatch`es in numpy, this process's part of each, as `pair_store.Loader` deals them out."""

    def __init__(self, pair_set, seed, batch):
        super().__init__(pair_set.source, seed, batch, jax.process_index(), jax.process_count())
        self._clouds = pair_set.clouds

    def __next__(self):
        values = super().__next__()
        arrays = {name: values[name].astype(np.float32) for name in ARRAYS}
        return training.PairBatch(**arrays, cloud=jax.tree.map(lambda a: a[values["owner"]], self._clouds))


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs on disk: `pair_store.Source`s of the pairs and of the vertebrae that they show."""

    source: pair_store.Source
    vertebrae: pair_store.Source

    def __len__(self):
        return len(self.source)

    @functools.cached_property
    def clouds(self):
        """The vertebrae's Gaussians (vertebrae, N), box frame."""
        records = [self.vertebrae[index] for index in range(len(self.vertebrae))]
        return gaussians.Gaussians(**{name: np.stack([record[name] for record in records]) for name in CLOUD})

    def batches(self, seed, batch):
        """`Batches` of `batch` pairs over all processes; close them when done."""
        return Batches(self, seed, batch)

    def mean_shapes(self):
        """Mean density by VerSe label, and under key 0 that of all: {label: MEAN_SHAPE array}, 1/mm, vertebra's frame."""
        by_label = {}
        for index in range(len(self.vertebrae)):
            record = self.vertebrae[index]
            for key in (int(record["label"]), 0):
                by_label.setdefault(key, []).append(record["shape"].astype(np.float32))
        return {label: np.mean(shapes, 0).astype(np.float16) for label, shapes in by_label.items()}


def config_hash(*configs):
    """Short digest of frozen dataclasses and plain values, for cache keys and reuse checks."""
    plain = [dataclasses.asdict(c) if dataclasses.is_dataclass(c) else c for c in configs]
    return hashlib.sha256(json.dumps([FORMAT, plain], sort_keys=True, default=str).encode()).hexdigest()[:16]
