"""Makers of training examples: pairs of X-rays with the truth, CT pairs, and the vertebrae that both show.

A pair is X-rays of one vertebra, simulated from a scan or measured at a known pose. A CT pair is a motion of the vertebra's
Gaussians. Each kind has a store of its own, which `build` writes. Scans are named by the digest of their files, wherever the
files are.
"""

import dataclasses

import numpy as np

from data_pipelines import cases
from data_pipelines import simulation
from data_pipelines.ct import extraction
from data_pipelines.pairs import codec
from data_pipelines.pairs import identity
from data_pipelines.pairs import pair_store
from data_pipelines.simulation import posture
from data_pipelines.simulation import quick
from radgs_jax import gaussians
from radgs_jax.geometry import resample
from radgs_jax.geometry.xray import bin_xray
from radgs_jax.models import trained

IMAGES = ("rest", "excess", "vertebra", "measured")
ARRAYS = (*IMAGES, "valid", "intrinsics", "camera_from_world", "world_from_box", "simulated")
"""Arrays of a pair, as in `radgs_jax.training.batches.PairBatch`; IMAGES are stored as float16. A pair also has `owner`, the
index of its vertebra."""
CLOUD = tuple(field.name for field in dataclasses.fields(gaussians.Gaussians))
"""Arrays of a vertebra's Gaussians."""


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """How pairs are made.

    Attributes:
      geometry: cameras and images, whose window is wider than the network's crop.
      preset: ranges of postures, beams and panels.
      poses: number of exposures of each posture, with the target at another pose in each. They share the rendering of the rest
        of the body, so more of them are faster and less varied. Chosen by hand.
      rest_mm, vertebra_mm: voxel sides of what is projected, chosen by hand; see `simulation.ArticulatedBody`.
      ct_turn_deg, ct_shift_mm: largest turn about and shift along each axis of a CT pair. The paper's are 20 degrees and 50 mm.
      ct_near: fraction of CT pairs whose two ranges are narrowed by a random factor, since only small motions remain after the
        first iterations. Chosen by hand; 0 trains on the full ranges alone.
    """

    geometry: simulation.Geometry = simulation.Geometry(window=112)
    preset: simulation.Preset = simulation.Preset()
    poses: int = 8
    rest_mm: float = 3.0
    vertebra_mm: float = 1.5
    ct_turn_deg: float = 20.0
    ct_shift_mm: float = 25.0
    ct_near: float = 0.7


@dataclasses.dataclass(frozen=True)
class Vertebrae:
    """A choice of vertebrae.

    Attributes:
      names: (digest of the scan, VerSe number) of each.
      gaussians: number of Gaussians of each.
    """

    names: tuple[tuple[str, int], ...]
    gaussians: int


@dataclasses.dataclass(frozen=True)
class OfEach:
    """Simulated pairs or CT pairs: `count` of each vertebra, ordered by vertebra."""

    vertebrae: Vertebrae
    count: int
    config: PairConfig

    def __len__(self) -> int:
        return self.count * len(self.vertebrae.names)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Pairs of measured X-rays of known pose, one of each scene.

    Attributes:
      vertebrae: that the scenes show.
      cases: digest of the case file.
      scenes: (name, index of its vertebra, digest of its X-rays) of each.
      variant: array of the X-ray files.
      pixel_mm: pixel size that X-rays are binned to, at the isocentre.
      config: how pairs are made.
    """

    vertebrae: Vertebrae
    cases: str
    scenes: tuple[tuple[str, int, str], ...]
    variant: str
    pixel_mm: float
    config: PairConfig

    def __len__(self) -> int:
        return len(self.scenes)


def _vertebra(archive, digest, label, count):
    return extraction.extract(archive.keep(identity.scan, digest), label, count, archive.scans[digest].name)


def _body(archive, digest, rest_mm, vertebra_mm):
    return simulation.ArticulatedBody(archive.keep(identity.scan, digest), rest_mm, vertebra_mm)


def _rng(which, seed, owner, *numbers):
    """The generator of a vertebra; it depends on the patient's index, so that two patients share no draws."""
    digest, label = which.vertebrae.names[owner]
    patients = list(dict.fromkeys(name for name, _ in which.vertebrae.names))
    return np.random.default_rng([seed, patients.index(digest), label, *numbers])


def _stance(archive, which, seed, owner, number):
    config, (digest, label) = which.config, which.vertebrae.names[owner]
    body = archive.keep(_body, digest, config.rest_mm, config.vertebra_mm)
    return simulation.stand(body, label, _rng(which, seed, owner, number), config.preset, config.geometry)


@pair_store.named("pairs.simulated/1", "data_pipelines.pairs.simulated")
def simulated(which: OfEach, seed: int, index: int, archive: identity.Archive) -> codec.Arrays:
    """Pair `index`: ARRAYS and owner, a function of (which, seed, index) and the content of the scans.

    Raises:
      InputError: an unreadable scan, an absent or cut vertebra.
    """
    owner, number = divmod(index, which.count)
    group, pose = divmod(number, which.config.poses)
    stance = archive.keep(_stance, which, seed, owner, group)
    sample = simulation.expose(stance, _rng(which, seed, owner, group, pose + 1))
    return _pair(owner, **{name: getattr(sample, name) for name in ARRAYS[:-1]}, simulated=True)


@pair_store.named("pairs.moved/1", "data_pipelines.pairs.moved")
def moved(which: OfEach, seed: int, index: int, archive: identity.Archive | None) -> codec.Arrays:
    """CT pair `index`: owner and motion (4, 4), which moves the CT to the pose that is to be found, box frame.

    Args:
      archive: unused.
    """
    owner, number = divmod(index, which.count)
    rng, config = _rng(which, seed, owner, number), which.config
    narrowed = rng.uniform() if rng.uniform() < config.ct_near else 1.0
    motion = posture.jitter(rng, np.zeros(3), narrowed * config.ct_turn_deg, narrowed * config.ct_shift_mm)
    return {"owner": np.int32(owner), "motion": motion.astype(np.float32)}


def _pair(owner, valid, simulated, **values):
    """A pair in the types in which it is stored."""
    typed = {name: np.asarray(v, np.float16 if name in IMAGES else np.float32) for name, v in values.items()}
    return {**typed, "valid": np.asarray(valid, bool), "simulated": np.bool_(simulated), "owner": np.int32(owner)}


def _window(intrinsics, camera_from_world, centre, size):
    """Intrinsics (4,) of a window of `size` pixels at whole pixels of the image, with a world point in its middle."""
    p = camera_from_world[:3, :3] @ centre + camera_from_world[:3, 3]
    middle = intrinsics[:2] * p[:2] / p[2] + intrinsics[2:]
    moved = intrinsics.copy()
    moved[2:] -= np.rint(middle) - size // 2
    return moved


@pair_store.named("pairs.measured/1", "data_pipelines.pairs.measured")
def measured(which: Measured, seed: int, index: int, archive: identity.Archive) -> codec.Arrays:
    """Pair `index`: ARRAYS and owner.

    No real X-ray shows the vertebra alone, so that `vertebra` is the CT projected at the true pose; `rest` and `excess` are 0.

    Args:
      seed: unused.
      archive: has the scenes.

    Raises:
      InputError: unreadable files, an absent or cut vertebra.
    """
    name, owner, _ = which.scenes[index]
    digest, label = which.vertebrae.names[owner]
    vertebra = archive.keep(_vertebra, digest, label, which.vertebrae.gaussians)
    (scene, world_from_ct), config = archive.scenes[name], which.config
    world_from_box = world_from_ct @ vertebra.ct_from_box
    binned = [bin_xray(seen, which.pixel_mm) for seen in cases.read_xrays(scene, which.variant)]
    images = [seen.line_integrals for seen in binned]
    intrinsics, extrinsics = (
        np.stack([getattr(seen.camera, name) for seen in binned]) for name in ("intrinsics", "camera_from_world")
    )
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
    alone = quick.render(vertebra.density, grid, world_from_ct, *cameras, size, step_mm, oversample=2)
    nothing = np.zeros_like(alone)
    images = dict(zip(IMAGES, (nothing, nothing, alone, np.stack(centred))))
    values = dict(zip(ARRAYS[5:8], (*cameras, world_from_box)))
    return _pair(owner, np.stack(inside), False, **images, **values)


@pair_store.named("pairs.vertebra/1", "data_pipelines.pairs.vertebra")
def vertebra_record(which: Vertebrae, seed: int, index: int, archive: identity.Archive) -> codec.Arrays:
    """Vertebra `index`: its label, its Gaussians (N,) in the box frame, and its density on the grid of mean shapes.

    Args:
      seed: unused.

    Raises:
      InputError: an unreadable scan, an absent or cut vertebra.
    """
    one = archive.keep(_vertebra, *which.names[index], which.gaussians)
    density, density_grid = resample.block_average(one.density, one.ct_from_index, trained.MEAN_SHAPE_MM)
    shape = resample.resample(density, density_grid, one.ct_from_box @ trained.mean_shape_grid(), trained.MEAN_SHAPE)
    cloud = {name: np.asarray(getattr(one.cloud, name), np.float32) for name in CLOUD}
    return {"label": np.int32(one.label), "shape": shape.astype(np.float16), **cloud}
