"""What a study measures: conditions that X-rays are simulated and registered under, methods beside ours, tables.

What has been registered stays on disk, so that a study that was stopped goes on.
"""

import copy
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from data_pipelines import build
from data_pipelines import carm
from data_pipelines import cases
from data_pipelines import files
from data_pipelines import scan as scans
from data_pipelines import xray
from experiments import checkpoint
from experiments import configs
from experiments import evaluate
from experiments import patients
from experiments import progress
from experiments import registering
from experiments import stages
from radgs_jax import gaussians
from radgs_jax import metrics
from radgs_jax import sharding
from radgs_jax import training
from radgs_jax.baselines import plain
from radgs_jax.baselines import refiners

OVERLAP_GAUSSIANS, OVERLAP_BLUR_MM = 256, 2.0
FAR_MM = ((25, 30), (30, 40), (40, 50))


@dataclasses.dataclass(frozen=True)
class Condition:
    """One point of a sweep: what its scenes are made with, and what registering is given.

    group, name: where it stands in the tables; variant: of the X-rays; articulation, detector, posture: as
    `build.simulated_cases`; shift_mm, turn_deg: how far each camera is off; mask: one of MASKS; views: those that are used.
    starts_mm: bins of start errors; every_start: each scene from all of them, or in turn from one.
    """

    group: str
    name: str
    variant: str = "artic"
    articulation: float = 1.0
    detector: xray.Detector = xray.Detector()
    posture: str = "rigid"
    shift_mm: float = 0.0
    turn_deg: float = 0.0
    mask: str = "as it is"
    views: tuple = (0, 1)
    starts_mm: tuple = configs.STARTS_MM
    every_start: bool = False


def sweeps():
    """The `Condition`s of every sweep."""
    usual = xray.Detector()
    made = [Condition("articulation", f"{s:g}", articulation=s) for s in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)]
    made += [
        Condition("photons a pixel", f"{p:g}", "real", detector=dataclasses.replace(usual, photons=p))
        for p in (1e3, 3e3, 1e4, 1e5, 1e6)
    ]
    strengths = ("hardening", "scatter", "blur_px", "gain_ramp", "air")
    for s in (0.0, 0.5, 1.0, 2.0, 3.0):
        stronger = {name: s * getattr(usual, name) for name in strengths}
        made.append(Condition("detector strength", f"{s:g}", "real", detector=dataclasses.replace(usual, **stronger)))
    made += [Condition("cameras off, mm", f"{s:g}", "real", shift_mm=s) for s in (0.0, 0.5, 1.0, 2.0, 3.0)]
    made += [Condition("cameras off, degrees", f"{a:g}", "real", turn_deg=a) for a in (0.0, 0.2, 0.5, 1.0)]
    made += [Condition("mask", mask, "real", mask=mask) for mask in MASKS]
    made += [
        Condition("views", text, "real", views=v) for text, v in (("AP", (0,)), ("lateral", (1,)), ("both", (0, 1)))
    ]
    made += [Condition("spine bent", v, v, posture="bent") for v in ("artic", "real")]
    return made


def _eroded(mask, size_mm, spacing_mm):
    return scipy.ndimage.distance_transform_edt(mask, spacing_mm) > size_mm


def _dilated(mask, size_mm, spacing_mm):
    return scipy.ndimage.distance_transform_edt(~mask, spacing_mm) <= size_mm


def _coarse(mask, size_mm, spacing_mm):
    steps = np.maximum(1, np.round(size_mm / spacing_mm).astype(int))
    index = [np.minimum(np.arange(n) // s * s + s // 2, n - 1) for n, s in zip(mask.shape, steps)]
    return mask[np.ix_(*index)]


MASKS = {
    "as it is": None,
    "eroded 1 mm": (_eroded, 1.0),
    "dilated 1 mm": (_dilated, 1.0),
    "dilated 2 mm": (_dilated, 2.0),
    "spacing 3 mm": (_coarse, 3.0),
}


def with_mask(scan, label, kind):
    """A `scan.Scan` whose mask of one vertebra is another of MASKS; other vertebrae keep theirs."""
    if MASKS[kind] is None:
        return scan
    change, size_mm = MASKS[kind]
    region = tuple(slice(max(0, s.start - 8), s.stop + 8) for s in scan.boxes[label])
    labels = scan.labels.copy()
    part = labels[region]
    spacing_mm = np.linalg.norm(scan.ct_from_index[:3, :3], axis=0)
    changed = change(part == label, size_mm, spacing_mm)
    changed &= (part == label) | (part == 0)
    labels[region] = np.where(changed, label, np.where(part == label, 0, part))
    return dataclasses.replace(scan, labels=labels)


def cameras_off(views, shift_mm, turn_deg, rng):
    """`cases.View`s of cameras that are not where they are said to be: each moved about its source in a random direction."""
    moved = []
    for view in views:
        turn, shift = (d / np.linalg.norm(d) for d in rng.normal(size=(2, 3)))
        motion = carm.matrix(np.radians(turn_deg) * turn, shift_mm * shift)
        moved.append(dataclasses.replace(view, camera_from_world=motion @ view.camera_from_world))
    return moved


class Patient:
    """A prepared patient: one `patients.Prepared` a vertebra, by label, and the scan, read once."""

    def __init__(self, ct, mask, labels, workdir):
        """Reads all; raises as `patients.load`."""
        self.ct, self.mask, self.labels = pathlib.Path(ct), pathlib.Path(mask), labels
        self.workdir, self.identity = pathlib.Path(workdir), patients.Identity()
        self.subject = (self.ct.name.split(".")[0], self.ct, self.mask)
        self.prepared = {label: patients.load(workdir, self.target(label), self.identity) for label in labels}
        self.scan = scans.read_scan(self.ct, self.mask, self.subject[0])
        self._masked = {}

    def target(self, label):
        """The `patients.Target` of a label."""
        return patients.Target(self.subject[0], self.ct, self.mask, label)

    def with_mask(self, label, kind):
        """The `patients.Prepared` of a label as if its mask had been another of MASKS."""
        if MASKS[kind] is None:
            return self.prepared[label]
        if (label, kind) not in self._masked:
            usual = self.prepared[label]
            scan = with_mask(self.scan, label, kind)
            whole = scans.WholeBody(scan, scans.BODY_MM)
            made = patients.unprepared(usual.model, scan, whole, label, self.mask, usual.refine, usual.calibration)
            self._masked[label, kind] = made
        return self._masked[label, kind]


def _scenes(patient, condition, count, seed, out):
    """The `cases.CaseFile` of a condition, made in a folder of its own below `out`."""
    folder = f"{condition.posture}_{condition.articulation:g}_" + "_".join(
        f"{getattr(condition.detector, f.name):g}" for f in dataclasses.fields(xray.Detector)
    )
    folder += f"_{count}_{seed}_" + "_".join(f"{low:g}-{high:g}" for low, high in condition.starts_mm)
    folder += "_of_" + "-".join(map(str, patient.labels))
    with progress.bar(len(patient.labels) * count, f"scenes: {condition.group} {condition.name}") as bar:
        path = build.simulated_cases(
            out / "cases" / folder / "cases.json",
            [patient.subject],
            patient.labels,
            count,
            condition.starts_mm,
            seed,
            condition.detector,
            ("artic", "real"),
            condition.posture,
            condition.articulation,
            on_done=bar.update,
        )
    return cases.read(path)


def _chosen(case_file, condition):
    """The cases of a condition: all, or one of each scene from bins in turn."""
    if condition.every_start:
        return list(case_file.cases)
    by_scene = {}
    for case in case_file.cases:
        by_scene.setdefault(case.scene, []).append(case)
    return [listed[number % len(listed)] for number, listed in enumerate(by_scene.values())]


def _row(case, scene, points, truth, outcome, passes):
    errors = [metrics.mtre(points, T, truth) for T in outcome.trajectory]
    judged = outcome.confidence
    return {
        "case": case.name,
        "scene": scene.name,
        "start_mm": errors[0],
        "network_mm": errors[passes],
        "error_mm": errors[-1],
        "accepted": None if judged is None else judged.accepted,
        "uncertainty_mm": None if judged is None else judged.uncertainty_mm,
        "runtime_s": outcome.runtime_s,
        "cpu_s": outcome.cpu_s,
    }


def _given(patient, condition, label, scene, seed):
    """What registering is given under a condition but for the start: `patients.Prepared`, `cases.View`s, line integrals."""
    images = cases.read_xrays(scene, condition.variant)
    views = cameras_off(scene.views, condition.shift_mm, condition.turn_deg, np.random.default_rng(seed))
    prepared = patient.with_mask(label, condition.mask)
    return prepared, *([a[i] for i in condition.views] for a in (views, images))


def run(patient, condition, count, seed, out, passes):
    """Registers a condition's cases, unless it was done: a list of dicts, kept in `out`/rows."""
    kept = out / "rows" / condition.group.replace(" ", "_") / f"{condition.name.replace(' ', '_')}.json"
    if kept.exists():
        return files.read_json(kept)
    case_file = _scenes(patient, condition, count, seed, out)
    rows, warm = [], False
    chosen = _chosen(case_file, condition)
    with progress.bar(len(chosen), f"{condition.group}: {condition.name}") as bar:
        for number, case in enumerate(chosen):
            scene = case_file.scenes[case.scene]
            volume = case_file.volumes[scene.volume]
            given = *_given(patient, condition, volume.full_label, scene, [seed, number, 99]), case.world_from_ct
            for _ in range(1 if warm else 2):  # the first one compiles
                outcome = registering.register(*given, passes)
            warm = True
            points = cases.points(case_file, scene.volume)
            rows.append(_row(case, scene, points, cases.truth(case_file, scene), outcome, passes))
            bar.update()
    files.write_json(kept, rows)
    return rows


def train_plain(patient, config, minutes, out, seed):
    """The plain 2D network, trained on the pairs that the patient was prepared with, for so many minutes: its parameters."""
    targets = [patient.target(label) for label in patient.labels]
    model_config = patient.prepared[patient.labels[0]].model.config
    folder = patient.workdir / patient.identity.scan(targets[0])
    pair_set = patients.pairs_of(config, folder, targets, model_config.gaussians)
    mesh, shape = sharding.make_mesh(), plain.PlainConfig()
    params = jax.jit(lambda key: plain.init(shape, model_config, key))(jax.random.key(seed))
    state = sharding.replicate(training.state_of(params, ("plain",)), mesh)
    update, batches = plain.make_update(mesh, shape, model_config), pair_set.batches(seed, config.batch)
    state = stages.scheduled(
        out / "checkpoints" / "plain",
        out,
        mesh,
        state,
        update,
        batches,
        seed=seed,
        learning_rate=config.p3.learning_rate,
        budget_s=60.0 * minutes,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    return state["params"]


def compare(patient, params, condition, count, seed, out, passes):
    """Errors of every method on the same cases: {method: list of mm}, kept in `out`/methods_VARIANT.json.

    Args:
      params: of the plain network, None for none.
    """
    kept = out / f"methods_{condition.variant}{'' if params is None else '_plain'}.json"
    if kept.exists():
        return files.read_json(kept)
    case_file = _scenes(patient, condition, count, seed, out)
    chosen, found = list(case_file.cases), {}
    with progress.bar(len(chosen), f"methods: {condition.variant}") as bar:
        for case in chosen:
            scene = case_file.scenes[case.scene]
            prepared = patient.prepared[case_file.volumes[scene.volume].full_label]
            images = cases.read_xrays(scene, condition.variant)
            points, truth = cases.points(case_file, scene.volume), cases.truth(case_file, scene)
            box_from_ct = np.linalg.inv(prepared.vertebra.ct_from_box)
            start = case.world_from_ct @ prepared.vertebra.ct_from_box
            outcome = registering.register(prepared, scene.views, images, case.world_from_ct, passes)
            poses = {
                "start pose": case.world_from_ct,
                "network": outcome.trajectory[passes],
                "ours": outcome.world_from_ct,
            }
            valid = [np.ones(image.shape, bool) for image in images]
            arguments = prepared, scene.views, images, valid
            for name, pose in _otherwise_refined(*arguments, case.world_from_ct, passes).items():
                poses[f"network, {name}"] = pose @ box_from_ct
            alone, _ = registering.refine_until_trusted(*arguments, start, start)
            poses["refinement without a network"] = alone.world_from_box @ box_from_ct
            if params is not None:
                estimate = _plain_pose(params, prepared, scene.views, images, valid, start, passes)
                poses["plain 2D network"] = estimate @ box_from_ct
                refined, _ = registering.refine_until_trusted(*arguments, estimate, start)
                poses["plain 2D network, our refinement"] = refined.world_from_box @ box_from_ct
            for name, pose in poses.items():
                found.setdefault(name, []).append(metrics.mtre(points, np.asarray(pose, np.float64), truth))
            bar.update()
    files.write_json(kept, found)
    return found


def reconstructions(patient, count, seed, out, passes):
    """Text of the scores of the reconstructions and of the attention on the 'real' X-rays that methods are compared on."""
    kept = out / "reconstructions.txt"
    if not kept.exists():
        case_file = _scenes(patient, Condition("methods", "real", "real"), count, seed, out)
        found = evaluate.evaluate(case_file, "real", lambda volume: patient.prepared[volume.full_label], passes)
        with files.replacing(kept) as temporary:
            temporary.write_text(evaluate.table(found, "real"))
    return kept.read_text()


def _otherwise_refined(prepared, views, images, valid, start_world_from_ct, passes):
    """{method: world_from_box} of the network's pose, refined by the methods of `refiners`."""
    network = registering.register(prepared, views, images, start_world_from_ct, passes, valid, refine=False)
    start = jnp.asarray(network.world_from_ct @ prepared.vertebra.ct_from_box, jnp.float32)
    cameras = jnp.asarray(network.camera_from_world, jnp.float32)
    intrinsics, size = jnp.asarray(network.intrinsics), network.xrays.shape[-1]
    clouds = gaussians.views(network.reconstruction, len(views))
    clean = gaussians.project(clouds, cameras, intrinsics, size, size)
    pose = refiners.to_clean_image(prepared.bare, clean, intrinsics, cameras, start)
    poses = {"then the clean image": pose}
    raw = pose
    for pixel_mm, pixels in ((1.5, 64), (0.75, 112)):
        seen = registering.at_resolution(views, images, valid, pixel_mm)
        raw = refiners.to_raw_gradients(prepared.bare, seen, cameras, raw, pixels)
    poses["then that and raw gradients"] = raw
    # One for one, and blurred alike: overlap is to compare places, not detail.
    few = [
        gaussians.blur(
            jax.tree.map(lambda a: a[:: patients.FINE_GAUSSIANS // OVERLAP_GAUSSIANS], cloud), OVERLAP_BLUR_MM
        )
        for cloud in (prepared.fine_cloud, network.reconstruction)
    ]
    poses["then overlap in 3D"] = refiners.to_gaussians(*few, start)
    return {name: np.asarray(pose, np.float64) for name, pose in poses.items()}


def _plain_pose(params, prepared, views, images, valid, start, passes):
    config = prepared.model.config
    seen = registering.at_resolution(views, images, valid, config.pixel_mm)
    cameras = jnp.asarray(np.stack([view.camera_from_world for view in views]), jnp.float32)
    first = jnp.asarray(start, jnp.float32)
    shape = plain.PlainConfig()
    poses = plain.register(params, shape, config, seen, cameras, first, prepared.vertebra.cloud, passes)
    return np.asarray(poses[-1], np.float64)


def prepared_for(patient, config, minutes, base, out):
    """The first vertebra's `Patient` after so many minutes of training; 0 is the base itself."""
    label = patient.labels[0]
    usual = patient.prepared[label]
    if minutes == 0:
        few, model = copy.copy(patient), checkpoint.load_model(base)
        few.labels, few.prepared = [label], {label: dataclasses.replace(usual, model=model)}
        return few
    folder = out / "minutes" / f"{minutes:g}"
    patients.prepare(config, folder, [patient.target(label)], base, minutes, calibration=usual.calibration)
    return Patient(patient.ct, patient.mask, [label], folder)


def wilson(successes, count, z=1.96):
    """95 % interval (low, high) of a share, after Wilson (1927)."""
    share, scale = successes / count, 1.0 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return middle - half, middle + half


def median_interval(rows, seed=0, draws=2000):
    """95 % interval (low, high) of the median error, scenes drawn with replacement: a scene's starts are no independent cases."""
    by_scene = {}
    for row in rows:
        by_scene.setdefault(row["scene"], []).append(row["error_mm"])
    scenes, rng = list(by_scene.values()), np.random.default_rng(seed)
    medians = [
        np.median(np.concatenate([scenes[i] for i in rng.integers(0, len(scenes), len(scenes))])) for _ in range(draws)
    ]
    return np.percentile(medians, 2.5), np.percentile(medians, 97.5)


HEADER = (
    f"{'':>34} {'n':>4} {'median mm':>10} {'p90 mm':>8} {'network':>8} {'< 2 mm':>8} {'95 % of it':>14} "
    f"{'wrong, accepted':>16} {'right, refused':>15} {'radius holds':>13}"
)


def line(name, rows):
    """One line of a table: rows of `run`."""
    error = np.array([r["error_mm"] for r in rows])
    right = error < metrics.SUCCESS_MM
    accepted = np.array([r["accepted"] is not False for r in rows])
    low, high = wilson(right.sum(), len(rows))
    text = (
        f"{name:>34} {len(rows):4d} {np.median(error):10.2f} {np.percentile(error, 90):8.2f} "
        f"{np.median([r['network_mm'] for r in rows]):8.2f} {100 * right.mean():6.1f} % {100 * low:6.1f}-{100 * high:5.1f} % "
        f"{(accepted & ~right).sum():16d} {(~accepted & right).sum():15d}"
    )
    if any(r["uncertainty_mm"] is None for r in rows):
        return text
    radius = np.array([r["uncertainty_mm"] for r in rows])
    inside = f"{100 * np.mean((error <= radius)[right]):11.1f} %" if right.any() else f"{'-':>13}"
    return f"{text} {inside}"


def by_start(rows, edges):
    """Lines of rows by their start errors' bins, then all, then the interval of the median."""
    lines = []
    for low, high in edges:
        inside = [r for r in rows if low <= r["start_mm"] < high]
        if inside:
            lines.append(line(f"start {low:g}-{high:g} mm", inside))
    low, high = median_interval(rows)
    count = len({r["scene"] for r in rows})
    return [*lines, line("all", rows), f"{count} scenes; 95 % interval of the median: {low:.3f} to {high:.3f} mm"]


def methods(found):
    """Lines of a table of what `compare` returns."""
    lines = [f"{'':>36} {'n':>4} {'median mm':>10} {'p90 mm':>8} {'< 2 mm':>8}"]
    for name, error in found.items():
        right = np.mean(np.array(error) < metrics.SUCCESS_MM)
        lines.append(
            f"{name:>36} {len(error):4d} {np.median(error):10.2f} {np.percentile(error, 90):8.2f} {100 * right:6.1f} %"
        )
    return lines


def failures(patient, results, counts, seed, out, passes, most=4):
    """Pictures of the worst cases of {condition: rows}, `counts` their scenes, in `out`/failures."""
    worst = [(row["error_mm"], condition, row["case"]) for condition, rows in results.items() for row in rows]
    worst.sort(key=lambda entry: -entry[0])
    for error, condition, name in worst[:most]:
        folder = out / "failures" / f"{error:.1f}mm_{condition.group}_{condition.name}".replace(" ", "_")
        if folder.exists() or error < metrics.SUCCESS_MM:
            continue
        case_file = _scenes(patient, condition, counts[condition], seed, out)
        numbered = {case.name: (i, case) for i, case in enumerate(_chosen(case_file, condition))}
        number, case = numbered[name]
        scene = case_file.scenes[case.scene]
        label, start = case_file.volumes[scene.volume].full_label, case.world_from_ct
        given = _given(patient, condition, label, scene, [seed, number, 99])
        outcome = registering.register(*given, start, passes)
        registering.write(folder, name, outcome, *given, start, cases.truth(case_file, scene))
