"""Vertebra detectors: made on simulated X-rays, adapted to a patient, kept as one file, and used on calibrated X-rays."""

import dataclasses
import functools
import hashlib
import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from data_pipelines import cases
from data_pipelines import files
from data_pipelines import pair_store
from data_pipelines import pairs
from data_pipelines import phantom
from data_pipelines import scan as scans
from data_pipelines import simulator
from data_pipelines.simulator import detector as faults
from experiments import progress
from experiments import stages
from radgs_jax import detection
from radgs_jax import sharding
from radgs_jax import training
from radgs_jax.models import detector

FORMAT = "radgs-detector/1"
CHECKPOINT_SECONDS = 60.0
ARRAYS = ("clean", "measured", "valid", "intrinsics", "camera_from_world", "centroids", "in_sight")
GEOMETRY = simulator.Geometry(window=160, binning=8)
"""Wider than a training crop, so that crops can be anywhere in it."""
HELD_OUT = 1_000_000
"""What seeds of held-out acquisitions are above those of training, which has fewer bodies."""
RIGHT_MM = 12.0
"""A centre that is farther off is another vertebra's: half the height of a small one with its disc."""
BODIES_A_SHARD = 6
"""Of a patient: a process reads the scan again for each shard. A phantom is a shard of its own."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Acquisitions simulated (as `Views`; those of the last `held_out` bodies calibrate the chain), and `steps` of `batch`
    crops of `crop_px` at a cosine `learning_rate`; seed: of all of it.

    Crops are turned by up to `turn_deg` and scaled by up to the share `scale`, which makes patients of other sizes.
    """

    bodies: int = 36
    held_out: int = 4
    count: int = 12
    steps: int = 1000
    batch: int = 16
    crop_px: int = 128
    turn_deg: float = 6.0
    scale: float = 0.1
    learning_rate: float = 2e-3
    seed: int = 20000


GENERIC = TrainConfig()
PATIENT = TrainConfig(bodies=24, held_out=2, turn_deg=3.0, scale=0.02, steps=1200)


@dataclasses.dataclass(frozen=True)
class Model:
    """A detector: parameters, their configuration, and the chain of its levels.

    centres_ct: VerSe number -> (3,) CT mm, of the patient whom it was adapted to; empty for a generic one.
    """

    params: dict
    config: detector.DetectorConfig
    chain: detection.Chain
    centres_ct: dict = dataclasses.field(default_factory=dict)

    @property
    def levels(self):
        """VerSe numbers that it answers with, head to feet."""
        return tuple(n for n, trained in zip(self.config.levels, self.chain.trained) if trained)


@dataclasses.dataclass(frozen=True)
class Views:
    """Which acquisitions: `count` of each of `bodies`, one body after the other.

    scan: digest of one patient's scan, who is every body; None: bodies are phantoms `spine` of seeds that count up.
    """

    scan: str | None
    bodies: int
    count: int
    geometry: simulator.Geometry = GEOMETRY
    preset: simulator.Preset = simulator.Preset()
    spine: phantom.PhantomConfig = phantom.PhantomConfig()

    def __len__(self):
        return self.bodies * self.count


def _phantom(archive, seed, config):
    made = phantom.make_phantom(seed, config)
    return simulator.Body(scans.Scan(f"phantom{seed}", made.hu.astype(np.float32), made.mask, made.affine))


def _patient(archive, digest):
    return simulator.Body(pairs.scan(archive, digest))


@pair_store.named("localizers.acquisition/1", "experiments.detectors.acquisition")
def acquisition(which, seed, index, archive):
    """Acquisition `index` of `Views`, a function of (which, seed, index) and of what the scan holds.

    Its target, which the cameras aim at, is any of the body's vertebrae.

    Args:
      archive: `pairs.Archive`.
    Returns:
      dict of clean, measured (V, S, S) float16, line integrals; valid (V, S, S) bool; intrinsics (V, 4);
      camera_from_world (V, 4, 4); centroids (V, 29, 2) pixels; in_sight (V, 29) bool; known (29,) bool, labels whose truth
      is told; target, its label; world_from_box (4, 4), its pose.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra.
    """
    number, own = divmod(index, which.count)
    if which.scan is None:
        body, stream = archive.keep(_phantom, seed + number, which.spine), [seed + number, own]
    else:
        body, stream = archive.keep(_patient, which.scan), [seed, number, own]
    rng = np.random.default_rng(stream)
    target = int(rng.choice(body.spine.labels))
    sample = simulator.simulate(body, target, rng, which.preset, which.geometry)
    images = {"clean": sample.rest + sample.excess, "measured": sample.measured}
    return {
        **{name: np.clip(image, -30.0, 60.0).astype(np.float16) for name, image in images.items()},
        **{name: getattr(sample, name) for name in ARRAYS[2:]},
        "known": np.isin(np.arange(simulator.assembly.LABELS), body.spine.labels),
        "target": np.int32(target),
        "world_from_box": sample.world_from_box,
    }


def simulated_views(folder, which, seed, archive, on_done=lambda acquisitions: None):
    """The `pair_store.Source` of `Views`, made where it is not there yet.

    Args:
      folder: where such stores lie, each in a folder named by its content; seed: of everything random.
      archive: `pairs.Archive` that knows where the scan lies.
      on_done: called with the number of acquisitions of every shard that is there.
    Raises:
      InputError: as `acquisition`; a damaged store.
    """
    # One process for two cores, since rendering is parallel in itself; an accelerator that renders is not shared.
    processes = pair_store.usable_cores() // 2 if jax.default_backend() == "cpu" else 1
    return pair_store.write(
        pathlib.Path(folder) / pairs.config_hash(which, seed),
        acquisition,
        len(which),
        which,
        seed,
        processes=max(1, processes),
        shard_size=which.count * (1 if which.scan is None else BODIES_A_SHARD),
        context=archive,
        on_done=on_done,
    )


def gather(acquisitions):
    """One pool of the X-rays of all acquisitions: dict of `ARRAYS` (N, ...) and `known` (N, 29)."""
    acquisitions = list(acquisitions)
    pool = {name: np.concatenate([a[name] for a in acquisitions]) for name in ARRAYS}
    return {**pool, "known": np.concatenate([np.tile(a["known"], (len(a["valid"]), 1)) for a in acquisitions])}


def batch_of(pool, levels, rng, config, size):
    """A training batch: crops at random places, turned and scaled a little, of clean and of measured X-rays, with their truth.

    Args:
      pool: as `gather` gives; levels: VerSe numbers of the detector; config: `TrainConfig`; size: B.
    Returns:
      (images, valid (B, S, S), beam (B, 3), centres (B, K, 2), seen, known (B, K)).
    """
    levels, crop_px = list(levels), config.crop_px
    rows = []
    for index in rng.integers(len(pool["valid"]), size=size):
        clean = rng.uniform() < 0.3
        image = pool["clean" if clean else "measured"][index].astype(np.float32)
        valid = np.ones(image.shape, bool) if clean else pool["valid"][index]
        # Pixel (row, column) of the pool's image = matrix @ pixel of the crop + start.
        angle, scale = np.radians(config.turn_deg * rng.uniform(-1.0, 1.0)), 1.0 + config.scale * rng.uniform(-1.0, 1.0)
        matrix = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        room = 0.5 * max(image.shape[0] - crop_px, 0)
        place = 0.5 * (np.array(image.shape) - 1) + rng.uniform(-room, room, 2)
        start = place - matrix @ np.full(2, 0.5 * (crop_px - 1))
        inside = scipy.ndimage.affine_transform(valid.astype(np.float32), matrix, start, (crop_px,) * 2, order=1) > 0.9
        image = scipy.ndimage.affine_transform(image, matrix, start, (crop_px,) * 2, order=1, mode="nearest")
        image = _spoil(image, rng)
        if rng.uniform() < 0.2:
            inside &= faults.collimator(image.shape, rng.uniform(0.2, 0.8), rng, 1.0) > 0.5
        uv = np.linalg.solve(matrix, pool["centroids"][index][:, ::-1].T - start[:, None]).T[:, ::-1]
        pixel = np.rint(uv).astype(int)
        seen = pool["in_sight"][index] & (pixel >= 0).all(1) & (pixel < crop_px).all(1)
        covered = seen & ~inside[tuple(np.clip(pixel[:, ::-1], 0, crop_px - 1).T)]
        known = pool["known"][index] & ~covered
        beam = pool["camera_from_world"][index][2, :3]
        rows.append((image, inside, beam, uv[levels], seen[levels], known[levels]))
    types = (np.float32, bool, np.float32, np.float32, bool, bool)
    return tuple(np.stack(column).astype(kind) for column, kind in zip(zip(*rows), types))


def _spoil(image, rng):
    """What a detector may do beyond the simulated: another contrast curve, shading, blur and noise."""
    image = image / (1.0 + rng.uniform(0.0, 0.1) * np.maximum(image, 0.0))
    shade = scipy.ndimage.zoom(
        rng.normal(size=(3, 3)), np.array(image.shape) / 3, order=1, grid_mode=True, mode="nearest"
    )
    image = image + rng.uniform(0.0, 0.2) * shade
    if rng.uniform() < 0.3:
        image = scipy.ndimage.gaussian_filter(image, rng.uniform(0.3, 1.0))
    return image + rng.uniform(0.0, 0.05) * rng.normal(size=image.shape)


class _Crops:
    """Endless `batch_of`s: batch n is a function of (seed, n), so that its place is n."""

    def __init__(self, pool, levels, config, size):
        self._make, self._seed, self._step = (lambda rng: batch_of(pool, levels, rng, config, size)), config.seed, 0

    def __next__(self):
        self._step += 1
        return self._make(np.random.default_rng([self._seed, self._step - 1]))

    def get_state(self):
        return self._step

    def set_state(self, place):
        self._step = place


def _objective(params, key, batch, config):
    images, valid, beam, centres, seen, known = batch
    prediction = detector.Detector(config).apply(params["detector"], images, valid, beam)
    return detector.loss(prediction, detector.target(centres, seen, images.shape[1:]), known), {}


def train(pool, folder, config, train_config, params=None):
    """Trains a detector on a pool, going on from the last checkpoint in `folder`; returns its parameters.

    Args:
      params: what to start from; None: fresh parameters.
    """
    mesh = sharding.make_mesh()
    size = -(-train_config.batch // mesh.size) * mesh.size
    key = jax.random.key(train_config.seed)
    params = detector.init(config, key) if params is None else params
    state = training.state_of({"detector": jax.tree.map(jnp.array, params)}, ("detector",))
    state = stages.loop(
        pathlib.Path(folder) / "detector",
        pathlib.Path(folder),
        mesh,
        sharding.replicate(state, mesh),
        training.update_of(mesh, functools.partial(_objective, config=config), ("detector",)),
        _Crops(pool, config.levels, train_config, size),
        key=key,
        rate=lambda step: training.cosine(step, train_config.steps, train_config.learning_rate),
        steps=train_config.steps,
        checkpoint_seconds=CHECKPOINT_SECONDS,
    )
    return jax.device_get(state["params"]["detector"])


@functools.partial(jax.jit, static_argnums=1)
def _apply(params, config, images, valid, beam):
    return detector.Detector(config).apply(params, images, valid, beam)


def calibrate(params, config, pool, held_out, train_config, images=48, prior=None):
    """The `detection.Chain` of a detector: spacings from `pool`, weight and link that suit crops of `held_out` best.

    The best gives the true cells and absences the largest log-probability in the chain's marginals.

    Args:
      prior: the chain whose spacings stand where no neighbouring levels of `pool` are in sight together.
    """
    levels, pixel_mm = list(config.levels), config.pixel_mm
    known = pool["known"][:, levels]
    trained = known.any(0)
    seen = pool["in_sight"][:, levels] & known
    if prior is not None and not (seen[:, 1:] & seen[:, :-1]).any():
        spacing, spread = prior.spacing_mm, prior.spread_mm
    else:
        spacing, spread = detection.fit_spacing(pool["centroids"][:, levels], seen, pixel_mm)
    batch = batch_of(held_out, levels, np.random.default_rng(train_config.seed), train_config, images)
    prediction = jax.device_get(_apply(params, config, *batch[:3]))
    truth = jax.device_get(detector.target(*batch[3:5], batch[0].shape[1:]))
    best = None
    for weight in (0.25, 0.35, 0.5, 0.7, 1.0):
        for link in (0.0, 2.0, 4.0):
            chain = detection.Chain(spacing, spread, weight, link, trained)
            value = np.mean([_likelihood(prediction, truth, batch[5], chain, i, pixel_mm) for i in range(images)])
            if best is None or value > best[0]:
                best = value, chain
    return best[1]


def _likelihood(prediction, truth, known, chain, i, pixel_mm):
    lattice = detection.Lattice(prediction.cells[i], prediction.absent[i], chain, detector.STRIDE * pixel_mm)
    cells, absent, _ = lattice.marginals()
    told = known[i][chain.trained]
    score = (truth.cells[i][chain.trained] * np.log(cells + 1e-9)).sum((1, 2))
    score += truth.absent[i][chain.trained] * np.log(absent + 1e-9)
    return score[told].sum()


def save(path, model, note):
    """Writes a detector as one npz, atomically; `note` says what it was made from."""
    params = flax.traverse_util.flatten_dict(model.params, sep=".")
    chain = dataclasses.asdict(model.chain)
    centres = {str(label): np.asarray(centre).tolist() for label, centre in model.centres_ct.items()}
    config = dataclasses.asdict(model.config)
    header = json.dumps({"format": FORMAT, "note": note, "config": config, "centres_ct": centres})
    files.write_npz(path, header=np.array(header), **{f"chain.{k}": v for k, v in chain.items()}, **params)


def load(path):
    """Reads a detector.

    Raises:
      InputError: a file that is not a detector, one of another format, or whose parameters are not those of its configuration.
    """
    text = str(files.read_npz(path, "header")["header"])
    try:
        header = json.loads(text)
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in header["config"].items()}
        config, form = detector.DetectorConfig(**fields), header["format"]
        centres = {int(k): np.array(v, np.float64).reshape(3) for k, v in header["centres_ct"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        files.fail(path, "header", repr(error)[:80], "a detector's header")
    if form != FORMAT:
        files.fail(path, "format", repr(form), repr(FORMAT))
    like = flax.traverse_util.flatten_dict(jax.eval_shape(lambda: detector.init(config, jax.random.key(0))), sep=".")
    arrays = files.read_npz(path, *like)
    for name, leaf in like.items():
        if arrays[name].shape != leaf.shape or not np.isfinite(arrays[name]).all():
            files.fail(path, name, f"shape {arrays[name].shape} or values not finite", f"finite {leaf.shape}")
    names = [field.name for field in dataclasses.fields(detection.Chain)]
    chain = files.read_npz(path, *(f"chain.{name}" for name in names))
    values = {name: chain[f"chain.{name}"] for name in names}
    values |= {name: float(values[name]) for name in ("weight", "link")}
    return Model(flax.traverse_util.unflatten_dict(arrays, sep="."), config, detection.Chain(**values), centres)


def look(model, image, valid, intrinsics, camera_from_world):
    """What a detector finds in one X-ray: `detection.Upright` and the `detection.Found` in it.

    Args:
      image, valid: (H, W), line integrals up to scale and offset; intrinsics (4,), camera_from_world (4, 4).
    Raises:
      InputError: a beam along the patient.
    """
    try:
        view = detection.upright(image, valid, intrinsics, camera_from_world, model.config.pixel_mm)
    except ValueError as error:
        files.fail("X-rays", "camera", error, "views from the front and the side")
    beam = view.camera_from_world[None, 2, :3].astype(np.float32)
    prediction = jax.device_get(_apply(model.params, model.config, view.image[None], view.valid[None], beam))
    step_mm = detector.STRIDE * model.config.pixel_mm
    return view, detection.decode(prediction.cells[0], prediction.absent[0], model.chain, step_mm)


@dataclasses.dataclass(frozen=True)
class Located:
    """centre (3,): a vertebra's centre, world mm; covariance (3, 3) mm^2; report: a plain dict, as `write_json` takes it.

    centres: VerSe number -> (3,), of every level that two views show.
    """

    centre: np.ndarray
    covariance: np.ndarray
    report: dict
    centres: dict


def locate(model, images, views, label, valid=None):
    """Finds one vertebra in two X-rays or more of one patient.

    Args:
      images: (H_v, W_v) line integrals; views: `cases.View`s; label: VerSe number; valid: (H_v, W_v) bool, None: all.
    Returns:
      `Located`. Its report has, for each view, the levels found (level, u, v in the view's pixels, confidence); `shifts`,
      by how many levels each view's own answer had to move for the views to agree; `probability` of that numbering;
      `apart_mm`, by level, how far the views' rays pass each other, and `own_apart_mm`, before the move.
    Raises:
      InputError: a level that the detector was not trained on, that is not found in two views, or whose rays pass
        each other by more than `detection.APART_MM`; one camera given twice.
    """
    name = scans.level_name(label)
    if label not in model.levels:
        wanted = f"one of {scans.level_name(model.levels[0])} to {scans.level_name(model.levels[-1])}"
        files.fail("detector", "label", name, wanted)
    valid = [np.ones(image.shape, bool) for image in images] if valid is None else valid
    seen = [look(model, i, m, v.intrinsics, v.camera_from_world) for i, m, v in zip(images, valid, views)]
    found = [f for _, f in seen]
    cameras = [u.intrinsics for u, _ in seen], [u.camera_from_world for u, _ in seen]
    try:
        together = detection.agree(found, *cameras)
    except ValueError:
        files.fail(
            "X-rays", "cameras", "rays that are parallel or meet in a source", "views from the front and the side"
        )
    level = model.levels.index(label)
    if together is None or level not in together.centres:
        listed = [", ".join(scans.level_name(model.levels[n]) for n in f.levels) or "nothing" for f in found]
        files.fail("X-rays", name, "; ".join(listed), "that level in two views")
    if together.apart_mm[level] > detection.APART_MM:
        files.fail("X-rays", name, f"rays that pass {together.apart_mm[level]:.0f} mm apart", "one point in all views")
    names = {n: scans.level_name(model.levels[n]) for n in range(len(model.levels))}
    report = {
        "level": name,
        "centre_mm": together.centres[level].tolist(),
        "covariance_mm2": together.covariances[level].tolist(),
        "probability": together.probability,
        "shifts": list(together.shifts),
        "mixed_up": len(set(together.shifts)) > 1,
        "apart_mm": {names[n]: d for n, d in together.apart_mm.items()},
        "own_apart_mm": {names[n]: d for n, d in together.own_apart_mm.items()},
        "centres_mm": {names[n]: c.tolist() for n, c in together.centres.items()},
        "views": [
            [
                {"level": names[int(n)], "uv": (u.matrix @ uv + u.offset).tolist(), "confidence": float(c)}
                for n, uv, c in zip(f.levels, f.uv, f.confidence)
            ]
            for u, f in seen
        ],
    }
    centres = {model.levels[n]: centre for n, centre in together.centres.items()}
    return Located(together.centres[level], together.covariances[level], report, centres)


def start_pose(model, located, label, centre_ct):
    """A first pose world_from_ct (4, 4) of a vertebra that was found.

    With a detector adapted to the patient as `detection.start_pose`; a generic one knows no neighbours in the CT, so that its
    axes stay the world's.

    Args:
      centre_ct: (3,) CT mm, the centroid of the vertebra's mask (the origin of `Vertebra.ct_from_box`).
    """
    return detection.start_pose(located.centres, {**model.centres_ct, label: np.asarray(centre_ct)}, label)


def make_generic(workdir, config=GENERIC, detector_config=detector.DetectorConfig()):
    """Trains a detector on phantoms; writes `workdir`/detector.npz and returns its path."""
    which, start = Views(None, config.bodies, config.count), Model(None, detector_config, None)
    return _make(workdir, which, pairs.Archive({}), config, start, f"{config.bodies} phantoms")


def make_patient(workdir, ct, mask, base, config=PATIENT, label_map=None):
    """Adapts a detector to X-rays simulated from a patient's scan; writes `workdir`/detector.npz and returns its path.

    Args:
      ct, mask, label_map: as `scan.read_scan`; base: the `Model` to start from.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra; nothing is written then.
    """
    digest = pairs.scan_digest(ct, mask, label_map)
    archive = pairs.Archive({digest: (str(ct), ct, mask, label_map)})
    spine = archive.keep(_patient, digest).spine
    start = dataclasses.replace(base, centres_ct=dict(zip(spine.labels, spine.centres)))
    which = Views(digest, config.bodies, config.count)
    return _make(workdir, which, archive, config, start, "one patient")


def patient_recipe(path, config=PATIENT):
    """Digest of what a patient's detector is made of besides the scan: the detector in file `path`, and how it is adapted."""
    return pairs.config_hash(files.sha256(path), config, Views(None, config.bodies, config.count))


def _make(workdir, which, archive, config, start, note):
    """Trains from the `Model` `start`, whose parameters may be None, on `Views`, and writes what comes of it."""
    folder = pathlib.Path(workdir) / "detector"
    with progress.bar(len(which), "X-rays") as bar:
        source = simulated_views(folder / "views", which, config.seed, archive, bar.update)
    cut = len(which) - config.held_out * config.count
    pool, held_out = (gather(source[i] for i in part) for part in (range(cut), range(cut, len(which))))
    # A state is gone on with only where all is the same that it was made from.
    leaves = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(start.params))
    name = pairs.config_hash(config, start.config, source.identity(), hashlib.sha256(leaves).hexdigest())
    params = train(pool, folder / "state" / name, start.config, config, start.params)
    chain = calibrate(params, start.config, pool, held_out, config, prior=start.chain)
    path = folder.with_name("detector.npz")
    save(path, dataclasses.replace(start, params=params, chain=chain), note)
    return path


def held_out_views(workdir, config, bodies, ct=None, mask=None, label_map=None):
    """Acquisitions that no training with `config` has seen: of other phantoms, or of one scan in other postures.

    Returns:
      `pair_store.Source` of `config.count` acquisitions of each of `bodies`, kept in `workdir`.
    Raises:
      InputError: an unreadable scan, or one without a complete vertebra.
    """
    digest, places = None, {}
    if ct is not None:
        digest = pairs.scan_digest(ct, mask, label_map)
        places[digest] = (str(ct), ct, mask, label_map)
    which = Views(digest, bodies, config.count)
    with progress.bar(len(which), "X-rays") as bar:
        folder = pathlib.Path(workdir) / "detector" / "held_out"
        return simulated_views(folder, which, config.seed + HELD_OUT, pairs.Archive(places), bar.update)


def score(model, acquisitions):
    """How well a detector does where the truth is known, as a dict of figures.

    Of single views: `levels` told, in sight and not covered; `level_right`, the share whose reported place is nearer to the
    true one than to another level's (missed ones are wrong); `centre_mm`, median distance at the isocentre from a reported
    place to the nearest true centre. Of pairs: `targets`; `target_right`, the share within `RIGHT_MM`; `target_mm`,
    median distance of the triangulated centre, inf where there is none; `refused`, the share without an answer;
    `sure_and_wrong`, the share that is not right with a probability above 0.9.

    Args:
      acquisitions: iterable of what `acquisition` gives.
    """
    right, near, targets = [], [], []
    for a in acquisitions:
        images, size = a["measured"].astype(np.float32), a["measured"].shape[-1]
        cameras = (
            [k.astype(np.float64) for k in a["intrinsics"]],
            [E.astype(np.float64) for E in a["camera_from_world"]],
        )
        for v, (k, E) in enumerate(zip(*cameras)):
            upright, found = look(model, images[v], a["valid"][v], k, E)
            uv = found.uv @ upright.matrix.T + upright.offset
            reported = {model.levels[n]: p for n, p in zip(found.levels, uv)}
            truth = {n: a["centroids"][v, n] for n in model.levels if a["known"][n]}
            mm = E[2, 3] / k[0]
            for level, p in truth.items():
                column, row = np.clip(np.rint(p).astype(int), 0, size - 1)
                if a["in_sight"][v, level] and a["valid"][v, row, column]:
                    q = reported.get(level)
                    right.append(q is not None and level == min(truth, key=lambda n: np.linalg.norm(truth[n] - q)))
            near += [mm * min(np.linalg.norm(q - p) for p in truth.values()) for q in reported.values()]
        views = [cases.View(k, E, size, size) for k, E in zip(*cameras)]
        try:
            found = locate(model, images, views, int(a["target"]), a["valid"])
            miss = np.linalg.norm(found.centre - a["world_from_box"][:3, 3])
            targets.append((miss, found.report["probability"]))
        except files.InputError:
            targets.append((np.inf, 0.0))
    miss, probability = np.array(targets).T
    return {
        "levels": len(right),
        "level_right": float(np.mean(right)),
        "centre_mm": float(np.median(near)),
        "targets": len(miss),
        "target_right": float(np.mean(miss < RIGHT_MM)),
        "target_mm": float(np.median(miss)),
        "refused": float(np.mean(np.isinf(miss))),
        "sure_and_wrong": float(np.mean((miss >= RIGHT_MM) & (probability > 0.9))),
    }


def find_in_cases(path, case_file, variant):
    """Finds the target vertebra of every scene of a case file.

    Args:
      path: detector file; case_file: `cases.CaseFile`; variant: array of the X-ray files.
    Returns:
      scene name -> `Located`, or the one line that says why there is none.
    Raises:
      InputError: unreadable files.
    """
    model, found = load(path), {}
    for scene in case_file.scenes.values():
        label, images = case_file.volumes[scene.volume].full_label, cases.read_xrays(scene, variant)
        try:
            found[scene.name] = locate(model, images, scene.views, label)
        except files.InputError as error:
            found[scene.name] = str(error)
    return found


def centre_errors(case_file, found):
    """Scene -> distance in mm from the true centre (inf where nothing was found); scenes without a truth are left out.

    Raises:
      InputError: a pose or a centre that is none.
    """
    errors = {}
    for name, located in found.items():
        scene = case_file.scenes[name]
        centre = case_file.raw["volumes"][scene.volume].get("centre")
        if centre is None or scene.world_from_ct is None:
            continue
        centre = cases.check_matrix(case_file.path, f"volumes.{scene.volume}.centre", centre, (3,))
        T = cases.truth(case_file, scene)
        truth = T[:3, :3] @ centre + T[:3, 3]
        errors[name] = np.inf if isinstance(located, str) else float(np.linalg.norm(located.centre - truth))
    return errors
