"""Trains the network that finds metal in X-rays: `python -m experiments.metal --workdir=W --out=W/metal.npz`.

The X-rays are simulated from phantoms. It ends with the scores on phantoms that were not trained on. `experiments.register` takes
the network from the base model's folder, `base/metal.npz`.
"""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import scipy
from absl import flags

from data_pipelines.io import files
from data_pipelines.io import locks
from data_pipelines.pairs import identity
from data_pipelines.pairs import pair_store
from data_pipelines.simulation import metal_views
from data_pipelines.simulation import panel
from experiments.patients import metal_files
from experiments.runtime import cli
from experiments.runtime import progress
from experiments.training import loop
from radgs_jax.models import metal

CHECKPOINT_SECONDS = 60.0
"""Minimum time between checkpoints, s, chosen by hand: work lost when stopped against time spent writing."""


@dataclasses.dataclass(frozen=True)
class MetalTraining:
    """How the network is trained. Chosen by hand: half an hour on two cores.

    Attributes:
      views: what is simulated; held_out: number of the last phantoms, which are not trained on.
      steps, batch: number of training steps, and of crops in each; crop_px: side of a crop, pixels.
      scale: largest change of a crop's scale, as a factor; learning_rate: peak of a cosine schedule; seed: of everything random.
    """

    views: metal_views.MetalSet = metal_views.MetalSet()
    held_out: int = 2
    steps: int = 2000
    batch: int = 16
    crop_px: int = 160
    scale: float = 1.4
    learning_rate: float = 3e-3
    seed: int = 50000


# Shares and ranges of changes that make crops unlike the simulator's, chosen by hand: more of each makes training longer.
TONED_SHARE, SMOOTH_SHARE, MARKED_SHARE, BLURRED_SHARE, NOISY_SHARE = 0.4, 0.5, 0.15, 0.3, 0.3
SMOOTH_PX = (2.0, 12.0)
"""Standard deviation of the blur of random shapes that stand for anatomy which phantoms lack, pixels."""


def _smooth_shapes(rng, size, scale):
    """Soft random tubes and discs (size, size), which are not metal, up to a few times `scale` high."""
    v, u = np.indices((size, size))
    total = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(1, 8)):
        a, b = rng.uniform(0, size, (2, 2))
        along = (b - a) / max(np.linalg.norm(b - a), 1.0)
        t = np.clip((u - a[0]) * along[0] + (v - a[1]) * along[1], 0, np.linalg.norm(b - a) * rng.integers(2))
        away = np.hypot(u - a[0] - t * along[0], v - a[1] - t * along[1])
        soft = rng.uniform(1.5, 6.0)
        total += rng.uniform(-2.0, 3.0) * scale / (1.0 + np.exp((away - rng.uniform(2.0, 25.0)) / soft))
    return (
        total + scale * scipy.ndimage.gaussian_filter(rng.normal(size=(size, size)), s := rng.uniform(*SMOOTH_PX)) * s
    )


def _marks(rng, image, metal_mask):
    """Burns letters, lines or a box into an image; they count as metal."""
    image, metal_mask = image.copy(), metal_mask.copy()
    value = rng.choice([image.min(), image.max(), image.max() + np.ptp(image)])
    for _ in range(rng.integers(1, 6)):
        v, u = rng.integers(0, len(image) - 12, 2)
        for _ in range(rng.integers(1, 5)):
            h, w = rng.integers(2, 4), rng.integers(4, 14)
            dv, du = rng.integers(0, 10, 2)
            block = (
                slice(v + dv, v + dv + (w if (flip := rng.integers(2)) else h)),
                slice(u + du, u + du + (h if flip else w)),
            )
            image[block], metal_mask[block] = value, True
    return image, metal_mask


def batch_of(
    source: pair_store.Source, count: int, rng: np.random.Generator, config: MetalTraining, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A training batch: images (B, S, S) float32, metal and valid (B, S, S) bool, at random places, angles and scales.

    Args:
      source: of `metal_views.simulated`, whose first `count` records are trained on; batch: number of crops, B.
    """
    rows, size, record = [], config.crop_px, {}
    for row in range(batch):
        if row % 4 == 0:  # several crops of one record, since reading one decompresses all of its exposures
            record = source[int(rng.integers(count))]
        exposure, view = rng.integers(record["images"].shape[0]), rng.integers(record["images"].shape[1])
        arrays = [record[name][exposure, view] for name in ("images", "metal", "valid")]
        angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-1, 1) * np.log(config.scale))
        matrix = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        matrix = matrix * np.array([1.0, rng.choice([-1.0, 1.0])])
        middle = 0.5 * (np.array(arrays[0].shape) - 1) + rng.uniform(-0.3, 0.3, 2) * len(arrays[0])
        start = middle - matrix @ np.full(2, 0.5 * (size - 1))
        image, mask, valid = (
            scipy.ndimage.affine_transform(a.astype(np.float32), matrix, start, (size, size), order=1, mode=mode)
            for a, mode in zip(arrays, ("nearest", "nearest", "constant"))
        )
        mask, valid = mask > 0.5, valid > 0.9
        inside = image[valid] if valid.any() else image
        scale_of = panel.picture_scale(inside)
        if rng.uniform() < SMOOTH_SHARE:
            image = image + _smooth_shapes(rng, size, scale_of)
        if rng.uniform() < BLURRED_SHARE:
            image = scipy.ndimage.gaussian_filter(image, rng.uniform(0.3, 1.2))
        if rng.uniform() < NOISY_SHARE:
            image = image + rng.uniform(0.0, 0.5) * scale_of * rng.normal(size=image.shape)
        if rng.uniform() < TONED_SHARE:
            image = panel.vendor_picture(image, scale_of, rng)
        if rng.uniform() < MARKED_SHARE:
            image, mask = _marks(rng, image, mask)
        rows.append((image, mask, valid))
    return tuple(np.stack(column).astype(kind) for column, kind in zip(zip(*rows), (np.float32, bool, bool)))


def _objective(params, key, batch, config):
    images, mask, valid = batch
    return metal.loss(metal.MetalNet(config).apply(params, images, valid), mask, valid), {}


def train_finder(
    workdir: pathlib.Path,
    train_config: MetalTraining = MetalTraining(),
    config: metal.MetalConfig = metal.MetalConfig(),
) -> tuple[metal.MetalFinder, dict[str, float]]:
    """Trains a finder on phantoms, going on from the last checkpoint in `workdir`.

    Returns:
      the finder, and over all valid pixels of the held-out phantoms: the share of metal that is found, the share of what is
      found that is metal, and the share of pixels without metal that is taken for it.
    """
    with progress.Bar(len(train_config.views), "X-rays with metal") as bar:
        source = metal_views.simulated(workdir / "views", train_config.views, train_config.seed, bar.update)
    cut = len(source) - train_config.held_out * train_config.views.stances
    name = identity.config_hash(train_config, config, source.digest())
    params = loop.train_network(
        workdir / "state" / name,
        workdir,
        "metal",
        metal.init(config, jax.random.key(train_config.seed)),
        functools.partial(_objective, config=config),
        lambda rng, size: batch_of(source, cut, rng, train_config, size),
        batch=train_config.batch,
        steps=train_config.steps,
        learning_rate=train_config.learning_rate,
        seed=train_config.seed,
        checkpoint_seconds=CHECKPOINT_SECONDS,
    )
    finder = metal.MetalFinder(params, config)
    return finder, _score(finder, (source[i] for i in range(cut, len(source))))


def _score(finder, records):
    program = jax.jit(metal.probability, static_argnames="config")
    hit = missed = false = clear = 0
    for record in records:
        images, mask, valid = (record[k].reshape(-1, *record[k].shape[2:]) for k in ("images", "metal", "valid"))
        found = np.asarray(program(finder.params, images.astype(np.float32), valid, config=finder.config))
        found = (found > metal.THRESHOLD) & valid
        mask = mask & valid
        hit, missed = hit + (found & mask).sum(), missed + (mask & ~found).sum()
        false, clear = false + (found & ~mask).sum(), clear + (valid & ~mask).sum()
    return {
        "found": hit / max(hit + missed, 1),
        "right": hit / max(hit + false, 1),
        "false": false / max(clear, 1),
    }


def define_flags() -> None:
    """Defines the command's flags; called once, by `cli.run`."""
    flags.DEFINE_string("workdir", None, "Folder for X-rays and checkpoints.", required=True)
    flags.DEFINE_string("out", None, "File to write the network to.", required=True)
    flags.DEFINE_integer("steps", MetalTraining().steps, "Number of training steps.", lower_bound=1)
    flags.DEFINE_integer(
        "bodies", MetalTraining().views.bodies, "Number of phantoms, the last two of which are held out.", 3
    )


def main() -> None:
    """Trains a finder and writes it."""
    given = flags.FLAGS
    workdir = pathlib.Path(given.workdir)
    views = dataclasses.replace(metal_views.MetalSet(), bodies=given.bodies)
    with locks.hold(files.make_folder(workdir) / locks.LOCK, workdir):
        finder, scores = train_finder(workdir, MetalTraining(views=views, steps=given.steps))
    metal_files.write_finder(given.out, finder, f"{given.bodies - 2} phantoms, {given.steps} steps")
    print("of held-out phantoms: " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in scores.items()))
    print(f"written: {given.out}")


if __name__ == "__main__":
    cli.run(main, define_flags)
