"""Training pairs: X-rays of one vertebra with the truth, simulated from scans or measured at known poses, and their batches.

Pairs, CT pairs and the vertebrae that both show lie in three `pair_store`s (`build` writes them), named by content: a scan is
the digest of its files, wherever they lie.
"""

import dataclasses
import functools

import jax
import numpy as np

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pair_store
from data_pipelines import scan as scans
from data_pipelines import simulator
from data_pipelines import xray
from data_pipelines.simulator import posture
from radgs_jax import camera
from radgs_jax import gaussians
from radgs_jax import training

FORMAT = "radgs-pairs/2"
MEAN_SHAPE = (56, 56, 48)
MEAN_SHAPE_MM = 2.0
"""Grid of mean shapes, in the vertebra's own frame."""
IMAGES = ("rest", "excess", "vertebra", "measured")
ARRAYS = (*IMAGES, "valid", "intrinsics", "camera_from_world", "world_from_box", "simulated")
"""Of a pair, as `training.PairBatch` has them; IMAGES are stored as float16. Its `owner` is the vertebra's number."""
CLOUD = tuple(field.name for field in dataclasses.fields(gaussians.Gaussians))


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """How pairs are made.

    geometry: cameras and images, whose window is wider than the network's crop; preset: postures, beams and detectors.
    poses: exposures of each posture, the target elsewhere in each; rest_mm, vertebra_mm: voxels of what is projected.
    ct_turn_deg, ct_shift_mm: largest turn about and shift along each axis of a CT pair; ct_near: share of CT pairs whose
    ranges are both narrowed by a random factor, since what iterations leave over is small.
    """

    geometry: simulator.Geometry = simulator.Geometry(window=112)
    preset: simulator.Preset = simulator.Preset()
    poses: int = 8
    rest_mm: float = 3.0
    vertebra_mm: float = 1.5
    ct_turn_deg: float = 20.0
    ct_shift_mm: float = 25.0
    ct_near: float = 0.7


@dataclasses.dataclass(frozen=True)
class Vertebrae:
    """Which vertebrae: ((digest of the scan, VerSe number), ...), each as `gaussians` Gaussians."""

    names: tuple
    gaussians: int


@dataclasses.dataclass(frozen=True)
class OfEach:
    """Simulated pairs or CT pairs: `count` of each vertebra, one vertebra after the other."""

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
        """scans: {digest: (patient, ct path, mask path, label map or None)}; scenes: {name: (`cases.Scene`, world_from_ct)}."""
        self.scans, self.scenes, self._kept = scans, scenes, {}

    def __reduce__(self):
        return Archive, (self.scans, self.scenes)

    def keep(self, make, *key):
        """make(self, *key), or what the last call with the same arguments gave."""
        if self._kept.get(make, (None, None))[0] != key:
            self._kept.pop(make, None)  # first, or two scans would be in memory
            self._kept[make] = (key, make(self, *key))
        return self._kept[make][1]


def scan_digest(ct_path, mask_path, label_map=None, digest=files.sha256):
    """What a scan is called wherever its files lie; read with another `label_map` it is another one. `digest` gives a file's.

    Raises:
      InputError: a missing file.
    """
    return config_hash("scan", [digest(ct_path), digest(mask_path), *([label_map] if label_map else [])])


def scan(archive, digest):
    """The `scan.Scan` of that digest in an `Archive`.

    Raises:
      InputError: unreadable files.
    """
    patient, ct, mask, label_map = archive.scans[digest]
    return scans.read_scan(ct, mask, patient, label_map)


def _vertebra(archive, digest, label, count):
    return scans.extract(archive.keep(scan, digest), label, count, archive.scans[digest][2])


def _body(archive, digest, rest_mm, vertebra_mm):
    return simulator.Body(archive.keep(scan, digest), rest_mm, vertebra_mm)


def _rng(which, seed, owner, *numbers):
    """The generator of a vertebra's random things; the patient's number keeps two patients from sharing draws."""
    digest, label = which.vertebrae.names[owner]
    patients = list(dict.fromkeys(name for name, _ in which.vertebrae.names))
    return np.random.default_rng([seed, patients.index(digest), label, *numbers])


def _stance(archive, which, seed, owner, number):
    config, (digest, label) = which.config, which.vertebrae.names[owner]
    body = archive.keep(_body, digest, config.rest_mm, config.vertebra_mm)
    return simulator.stand(body, label, _rng(which, seed, owner, number), config.preset, config.geometry)


@pair_store.named("pairs.simulated/1", "data_pipelines.pairs.simulated")
def simulated(which, seed, index, archive):
    """Pair `index` of an `OfEach`, a function of (which, seed, index) and of what the scans hold: ARRAYS and owner.

    Raises:
      InputError: an unreadable scan, an absent or cut vertebra.
    """
    owner, number = divmod(index, which.count)
    group, pose = divmod(number, which.config.poses)
    stance = archive.keep(_stance, which, seed, owner, group)
    sample = simulator.expose(stance, _rng(which, seed, owner, group, pose + 1))
    return _pair(owner, **{name: getattr(sample, name) for name in ARRAYS[:-1]}, simulated=True)


@pair_store.named("pairs.moved/1", "data_pipelines.pairs.moved")
def moved(which, seed, index, archive):
    """CT pair `index` of an `OfEach`: owner and motion (4, 4), which carries the CT to the pose that is to be found, box frame.

    Args:
      archive: the `Archive`; a motion needs none of it.
    """
    owner, number = divmod(index, which.count)
    rng, config = _rng(which, seed, owner, number), which.config
    narrowed = rng.uniform() if rng.uniform() < config.ct_near else 1.0
    motion = posture.jitter(rng, np.zeros(3), narrowed * config.ct_turn_deg, narrowed * config.ct_shift_mm)
    return {"owner": np.int32(owner), "motion": motion.astype(np.float32)}


def _pair(owner, valid, simulated, **values):
    typed = {name: np.asarray(v, np.float16 if name in IMAGES else np.float32) for name, v in values.items()}
    return {**typed, "valid": np.asarray(valid, bool), "simulated": np.bool_(simulated), "owner": np.int32(owner)}


def _window(intrinsics, camera_from_world, centre, size):
    """Intrinsics of a window of `size` pixels that shows a world point in its middle, at whole pixels of the detector."""
    p = camera_from_world[:3, :3] @ centre + camera_from_world[:3, 3]
    middle = intrinsics[:2] * p[:2] / p[2] + intrinsics[2:]
    moved = intrinsics.copy()
    moved[2:] -= np.rint(middle) - size // 2
    return moved


@pair_store.named("pairs.measured/1", "data_pipelines.pairs.measured")
def measured(which, seed, index, archive):
    """Pair `index` of a `Measured`: ARRAYS and owner.

    The vertebra alone is the CT projected at the true pose, since no real X-ray shows it; `rest` and `excess` are 0.

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
    images = cases.read_xrays(scene, which.variant)
    everywhere = [np.ones(image.shape, bool) for image in images]
    images, _, intrinsics, extrinsics = binned_views(scene.views, images, everywhere, which.pixel_mm)
    centred, inside, windows = [], [], []
    side = config.geometry.window
    for image, k, E in zip(images, intrinsics, extrinsics):
        window = _window(k, E, world_from_box[:3, 3], side)
        corner = np.rint(k[2:] - window[2:]).astype(int)
        rows, columns = corner[1] + np.arange(side), corner[0] + np.arange(side)
        height, width = image.shape
        centred.append(image[np.clip(rows, 0, height - 1)][:, np.clip(columns, 0, width - 1)])
        inside.append(((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width)))
        windows.append(window)
    cameras, step_mm = (np.stack(windows), extrinsics), config.geometry.vertebra_step_mm
    grid, size = vertebra.ct_from_index, (side, side)
    alone = xray.render(vertebra.density, grid, world_from_ct, *cameras, size, step_mm, oversample=2)
    nothing = np.zeros_like(alone)
    images = dict(zip(IMAGES, (nothing, nothing, alone, np.stack(centred))))
    values = dict(zip(ARRAYS[5:8], (*cameras, world_from_box)))
    return _pair(owner, np.stack(inside), False, **images, **values)


def binned_views(views, images, valid, pixel_mm):
    """Images averaged to about `pixel_mm` at the isocentre, with exact cameras.

    Args:
      views: V `cases.View`s; images, valid: V arrays (H_v, W_v), line integrals and bool.
    Returns:
      list of images (h_v, w_v), list of where every averaged pixel is valid (bool, as the images), intrinsics (V, 4) of the
      images, camera_from_world (V, 4, 4).
    """
    small, inside, cameras = [], [], []
    for view, image, mask in zip(views, images, valid):
        factor = cases.binning(view, pixel_mm)
        small.append(camera.bin_image(image, factor))
        inside.append(camera.bin_image(mask.astype(np.float32), factor) == 1.0)
        cameras.append(
            camera.bin(camera.Camera(view.intrinsics, view.camera_from_world, view.height, view.width), factor)
        )
    return small, inside, np.stack([c.intrinsics for c in cameras]), np.stack([c.camera_from_world for c in cameras])


def mean_shape_grid():
    """box_from_index (4, 4), mm, of the mean-shape grid, whose middle is the origin of the vertebra's frame."""
    affine = np.diag([MEAN_SHAPE_MM] * 3 + [1.0])
    affine[:3, 3] = -0.5 * MEAN_SHAPE_MM * (np.array(MEAN_SHAPE) - 1)
    return affine


@pair_store.named("pairs.vertebra/1", "data_pipelines.pairs.vertebra")
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
    """Endless batches in numpy, this process's part of each, as `pair_store.Loader` deals them out."""

    def __init__(self, source, clouds, seed, batch):
        """source: of pairs or of CT pairs; clouds: their vertebrae's Gaussians (vertebrae, N)."""
        super().__init__(source, seed, batch, jax.process_index(), jax.process_count())
        self._clouds = clouds

    def __next__(self):
        """A `training.PairBatch` or a `training.CtBatch`."""
        values = super().__next__()
        cloud = jax.tree.map(lambda a: a[values["owner"]], self._clouds)
        if "motion" in values:
            return training.CtBatch(values["motion"], cloud)
        arrays = {name: values[name].astype(np.float32 if name in IMAGES else values[name].dtype) for name in ARRAYS}
        return training.PairBatch(**arrays, cloud=cloud)


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs on disk: `pair_store.Source`s of the pairs, of the CT pairs, and of the vertebrae that both show."""

    source: pair_store.Source
    moved: pair_store.Source
    vertebrae: pair_store.Source

    def __len__(self):
        return len(self.source)

    @functools.cached_property
    def clouds(self):
        """The vertebrae's Gaussians (vertebrae, N), box frame."""
        records = [self.vertebrae[index] for index in range(len(self.vertebrae))]
        return gaussians.Gaussians(**{name: np.stack([record[name] for record in records]) for name in CLOUD})

    def batches(self, seed, batch, module="rec"):
        """`Batches` of `batch` pairs over all processes, of CT pairs for the module stage 'reg'; close them when done.

        Args:
          seed: of the shuffles; module: 'rec', 'reg' or 'joint'.
        Raises:
          ValueError: a batch that does not divide by jax's processes.
        """
        return Batches(self.moved if module == "reg" else self.source, self.clouds, seed, batch)

    def mean_shapes(self):
        """Mean density by VerSe label, and under key 0 that of all: {label: MEAN_SHAPE array}, 1/mm, vertebra's frame."""
        by_label = {}
        for index in range(len(self.vertebrae)):
            record = self.vertebrae[index]
            for key in (int(record["label"]), 0):
                by_label.setdefault(key, []).append(record["shape"].astype(np.float32))
        return {label: np.mean(shapes, 0).astype(np.float16) for label, shapes in by_label.items()}


def config_hash(*configs):
    """Short digest of frozen dataclasses and plain values, for cache keys and reuse checks; raises as `pair_store.config_hash`."""
    return pair_store.config_hash(
        [dataclasses.asdict(c) if dataclasses.is_dataclass(c) else c for c in configs], FORMAT
    )
