"""Conditions of a study, under which X-rays are simulated and registered.

Results stay on disk, so a study that was stopped continues.
"""

import copy
import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from jaxtyping import Real

from data_pipelines import cases
from data_pipelines.ct import scans
from data_pipelines.io import files
from data_pipelines.simulation import carm
from data_pipelines.simulation import case_files
from data_pipelines.simulation import crude_masks
from data_pipelines.simulation import quick
from experiments import configs
from experiments.patients import models
from experiments.patients import preparing
from experiments.patients import starts
from experiments.patients.untrained import prepare_untrained
from experiments.patients.workdir import load
from experiments.patients.workdir import ScanDigests
from experiments.patients.workdir import Target
from experiments.reports import case_folder
from experiments.reports import verdicts
from experiments.runtime import progress
from experiments.runtime.kept_programs import kept
from experiments.runtime.kept_programs import Stopwatch
from kernels.common.types import Array
from radgs_jax import metrics
from radgs_jax.geometry import rigid_host
from radgs_jax.registration import pipeline
from radgs_jax.registration.prepared import Prepared

FAR_STARTS_MM = ((25, 30), (30, 40), (40, 50))
"""Bins (low, high) of start errors beyond those of training, mTRE in mm."""
CAMERA_STREAM = 99
"""Last element of the seed of the camera errors, which separates them from other random draws."""
APART_DEG = (0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 90.0)
"""Angles between two views that are tried, degrees."""
LOST = (150.0, 20.0)
"""Largest shift, mm, and turn, degrees, of the guess where there is no start pose."""
LOST_STREAM = 98
"""As `CAMERA_STREAM`, of these guesses."""
EVERYTHING = "all faults at random"
"""The group with every fault drawn at random: posture, beam, panel, collimators, metal, pictures, masks and cameras."""
N_FAILURES = 4
"""Maximum number of failures that are drawn. Chosen by hand: each takes a registration and a picture."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """One point of a sweep: how its scenes are simulated, and how the input of the registration differs from the truth.

    Attributes:
      group, name: its table and its row there.
      variant: array of the X-ray files.
      articulation, detector, posture: as in `case_files.simulated_cases`; detector: faults of the X-ray panel.
      shift_mm, turn_deg: error of every camera.
      mask: one of MASKS.
      errors, apart_deg: as in `case_files.simulated_cases`.
      camera_sd: what the registration is told of the cameras' errors, mm and degrees.
      views: indices of the views that are used.
      starts_mm: bins (low, high) of start errors.
      every_start: whether each scene is registered from all bins, or from one bin in turn.
      lost: whether the start is found by the body, from a guess that is off by up to LOST, in place of those.
    """

    group: str
    name: str
    variant: str = "artic"
    articulation: float = 1.0
    detector: quick.PanelFaults = quick.PanelFaults()
    posture: str = "rigid"
    shift_mm: float = 0.0
    turn_deg: float = 0.0
    mask: str = "as it is"
    errors: case_files.InputErrors = case_files.InputErrors()
    apart_deg: float | None = None
    camera_sd: tuple[float, float] = (0.0, 0.0)
    views: tuple[int, ...] = (0, 1)
    starts_mm: tuple[tuple[float, float], ...] = configs.STARTS_MM
    every_start: bool = False
    lost: bool = False

    def options(self, passes: int) -> pipeline.RegisterOptions:
        """What its registrations are asked for, with a number of passes of the network."""
        mm, degrees = self.camera_sd
        return pipeline.RegisterOptions(passes, reconstruct=True, camera_sd=(math.radians(degrees), mm))


def sweeps() -> list[Condition]:
    """The conditions of all sweeps."""
    usual = quick.PanelFaults()
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
    made += [Condition("degrees between views", f"{a:g}", "real", apart_deg=a) for a in APART_DEG]
    sd = (0.5, 0.1)
    wrong = case_files.InputErrors(mask_mm=1.5, camera_sd=sd)
    everything = Condition(EVERYTHING, "everything", "real", posture="bent", errors=wrong, camera_sd=sd)
    without = [Condition("", v, v) for v in ("artic", "real")] + [everything]
    made += [dataclasses.replace(one, group="without a start pose", lost=True) for one in without]
    return [*made, everything]


MASKS = {
    "as it is": None,
    "eroded 1 mm": functools.partial(crude_masks.eroded, size_mm=1.0),
    "dilated 1 mm": functools.partial(crude_masks.dilated, size_mm=1.0),
    "dilated 2 mm": functools.partial(crude_masks.dilated, size_mm=2.0),
    "spacing 3 mm": functools.partial(crude_masks.coarse, size_mm=3.0),
}
"""Name -> how the mask is changed; None leaves it."""


def scan_with_mask(scan: scans.Scan, label: int, kind: str) -> scans.Scan:
    """A scan whose mask of one vertebra is changed; other vertebrae keep theirs.

    Args:
      label: VerSe number; kind: one of MASKS.
    """
    change = MASKS[kind]
    return scan if change is None else crude_masks.changed(scan, label, change)


class Patient:
    """A prepared patient, read once.

    Attributes:
      ct, mask: paths of the scan; labels: VerSe numbers of the vertebrae.
      workdir: where they were prepared; digests: caches the files' digests.
      subject: (name, ct, mask), as `case_files.simulated_cases` takes it.
      prepared: label -> `Prepared`; scan: the `scans.Scan`.
    """

    def __init__(
        self, ct: pathlib.Path | str, mask: pathlib.Path | str, labels: Sequence[int], workdir: pathlib.Path | str
    ) -> None:
        """Reads the scan and the workdir; raises as `workdir.load`."""
        self.ct, self.mask, self.labels = pathlib.Path(ct), pathlib.Path(mask), labels
        self.workdir, self.digests = pathlib.Path(workdir), ScanDigests()
        self.subject = (self.ct.name.split(".")[0], self.ct, self.mask)
        self.prepared = {label: load(workdir, self.target(label), self.digests) for label in labels}
        self.scan = scans.read_scan(self.ct, self.mask, self.subject[0])
        self._masked = {}

    def target(self, label: int) -> Target:
        """The target of a label."""
        return Target(self.subject[0], self.ct, self.mask, label)

    def with_mask_of(self, volume: cases.Volume) -> Prepared:
        """The vertebra of a volume of a case file as if it had been prepared with that file's own mask."""
        label, usual = volume.full_label, self.prepared[volume.full_label]
        if volume.full_mask.resolve() == self.mask.resolve():
            return usual
        read = lambda: scans.read_scan(self.ct, volume.full_mask, self.subject[0])
        return self._prepared_again(label, volume.full_mask, read, volume.full_mask)

    def with_mask(self, label: int, kind: str) -> Prepared:
        """The vertebra of a label as if it had been prepared with a changed mask, one of MASKS."""
        if MASKS[kind] is None:
            return self.prepared[label]
        return self._prepared_again(label, kind, lambda: scan_with_mask(self.scan, label, kind), self.mask)

    def _prepared_again(self, label, name, scan_of, mask_path):
        """The vertebra prepared from another scan, once for each `name` of it."""
        if (label, name) not in self._masked:
            usual = self.prepared[label]
            self._masked[label, name] = prepare_untrained(
                usual.model, scan_of(), label, usual.rule, usual.refine, usual.search, mask_path=mask_path
            )
        return self._masked[label, name]


def scenes_name(patient: Patient, condition: Condition, count: int, seed: int) -> str:
    """Name of the folder of a condition's scenes; other conditions with the same scenes have it, too. Arguments as `scenes_of`."""
    name = f"{condition.posture}_{condition.articulation:g}_" + "_".join(
        f"{getattr(condition.detector, f.name):g}" for f in dataclasses.fields(quick.PanelFaults)
    )
    name += f"_{count}_{seed}_" + "_".join(f"{low:g}-{high:g}" for low, high in condition.starts_mm)
    if condition.errors != case_files.InputErrors() or condition.apart_deg is not None:
        name += f"_{condition.errors.mask_mm:g}_{condition.errors.camera_sd}_{condition.apart_deg}".replace(" ", "")
    return name + "_of_" + "-".join(map(str, patient.labels))


def scenes_of(patient: Patient, condition: Condition, count: int, seed: int, out: pathlib.Path) -> cases.CaseFile:
    """The cases of a condition, simulated in a folder of their own in `out` where they are not there yet.

    Args:
      count: number of acquisitions per vertebra; seed: of everything random.
    """
    folder = scenes_name(patient, condition, count, seed)
    with progress.Bar(len(patient.labels) * count, f"scenes: {condition.group} {condition.name}") as bar:
        path = case_files.simulated_cases(
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
            condition.errors,
            condition.apart_deg,
            on_done=bar.update,
        )
    return cases.read(path)


def _chosen(case_file, condition):
    """The cases of a condition: all, or one per scene, with the start bins in turn."""
    if condition.every_start:
        return list(case_file.cases)
    by_scene = {}
    for case in case_file.cases:
        by_scene.setdefault(case.scene, []).append(case)
    return [listed[number % len(listed)] for number, listed in enumerate(by_scene.values())]


def chi_square(
    covariance: Float[np.ndarray, "6 6"], pose: Real[np.ndarray, "4 4"], truth: Real[np.ndarray, "4 4"], centre: Array
) -> float:
    """Square of a pose's error in units of its covariance: of 6 degrees of freedom where that is right.

    Args:
      covariance: of the twist about the vertebra's centre in world axes, rad and mm; centre: of the vertebra, CT mm.
    """
    place = truth[:3, :3] @ centre + truth[:3, 3]
    twist = rigid_host.twist_about(place, pose @ np.linalg.inv(truth))
    return float(twist @ np.linalg.solve(covariance, twist))


def _row(case, scene, points, truth, outcome, times, passes, metal, centre):
    errors = [metrics.mtre(points, T, truth) for T in outcome.trajectory]
    judged = outcome.confidence
    pose = np.asarray(outcome.world_from_ct, np.float64)
    return {
        "case": case.name,
        "scene": scene.name,
        "start_mm": errors[0],
        "network_mm": errors[passes],
        "error_mm": errors[-1],
        "accepted": None if judged is None else judged.accepted,
        "uncertainty_mm": None if judged is None else judged.uncertainty_mm,
        "chi_square": None if judged is None else chi_square(judged.covariance, pose, truth, centre),
        "metal": metal,
        **times,
    }


def _given(patient, condition, volume, scene, seed):
    """The input of a registration under a condition, except for the start: a `Prepared` and a list of `XRay`."""
    xrays = cases.read_xrays(scene, condition.variant)
    off = carm.cameras_off(
        [x.camera.camera_from_world for x in xrays], condition.shift_mm, condition.turn_deg, np.random.default_rng(seed)
    )
    xrays = [dataclasses.replace(x, camera=x.camera.replace(camera_from_world=E)) for x, E in zip(xrays, off)]
    label, changed = volume.full_label, MASKS[condition.mask] is not None
    prepared = patient.with_mask(label, condition.mask) if changed else patient.with_mask_of(volume)
    return prepared, [xrays[i] for i in condition.views]


def lost_guess(truth: Float[np.ndarray, "4 4"], centre: Array, seed: Sequence[int]) -> Float[np.ndarray, "4 4"]:
    """A pose that is off by up to `LOST`; truth: world_from_ct, mm; centre: of the vertebra, CT mm."""
    rng, (reach_mm, reach_deg) = np.random.default_rng(seed), LOST
    axes = rng.normal(size=(2, 3))
    turn, shift = axes / np.linalg.norm(axes, axis=1, keepdims=True) * rng.uniform(size=(2, 1))
    twist = np.concatenate([math.radians(reach_deg) * turn, reach_mm * shift])
    return rigid_host.motion_about(truth[:3, :3] @ centre + truth[:3, 3], twist) @ truth


def register_condition(
    patient: Patient, condition: Condition, count: int, seed: int, out: pathlib.Path, passes: int
) -> list[dict[str, Any]]:
    """Registers the cases of a condition, unless their results are there already.

    Args:
      count, seed: as in `scenes_of`; out: folder of the study; passes: number of the network's passes.
    Returns:
      a dict per case with its errors, verdict and times, kept in `out`/rows.
    """
    path = out / "rows" / condition.group.replace(" ", "_") / f"{condition.name.replace(' ', '_')}.json"
    if path.exists():
        return files.read_json(path)
    case_file = scenes_of(patient, condition, count, seed, out)
    rows, options = [], condition.options(passes)
    metal = {one["id"]: one.get("metal", False) for one in case_file.raw["scenes"]}
    chosen = _chosen(case_file, condition)
    with progress.Bar(len(chosen), f"{condition.group}: {condition.name}") as bar:
        for number, case in enumerate(chosen):
            scene = case_file.scenes[case.scene]
            volume = case_file.volumes[scene.volume]
            given = _given(patient, condition, volume, scene, [seed, number, CAMERA_STREAM])
            points, truth = cases.points(case_file, scene.volume), cases.truth(case_file, scene)
            centre, start = given[0].vertebra.ct_from_box[:3, 3], case.world_from_ct
            if condition.lost:
                start = lost_guess(truth, centre, [seed, number, LOST_STREAM])
            with Stopwatch() as watch:
                if condition.lost:
                    found = starts.find_body(given[0], pipeline.without_metal(*given, kept), start, kept)
                    start = start if found is None else found[0]
                outcome = pipeline.register(*given, start, options, kept)
            shows_metal = metal.get(scene.name, False)
            rows.append(_row(case, scene, points, truth, outcome, watch.times(), passes, shows_metal, centre))
            bar.update()
    files.write_json(path, rows)
    return rows


def prepared_for(
    patient: Patient, config: configs.Config, minutes: float, base: pathlib.Path, out: pathlib.Path
) -> Patient:
    """The patient's first vertebra alone, prepared anew with limited training.

    Args:
      config: of the training; minutes: training time; 0 takes the base model itself.
      base: folder of the base model; out: folder of the study.
    """
    label = patient.labels[0]
    usual = patient.prepared[label]
    if minutes == 0:
        few, model = copy.copy(patient), models.load_model(base)
        few.labels, few.prepared = [label], {label: dataclasses.replace(usual, model=model)}
        return few
    folder = out / "minutes" / f"{minutes:g}"
    preparing.prepare(config, folder, [patient.target(label)], base, minutes, rule=usual.rule)
    return Patient(patient.ct, patient.mask, [label], folder)


def failures(
    patient: Patient,
    results: Mapping[Condition, Sequence[Mapping[str, Any]]],
    counts: Mapping[Condition, int],
    seed: int,
    out: pathlib.Path,
    passes: int,
    most: int = N_FAILURES,
) -> None:
    """Writes pictures of the worst failures to `out`/failures.

    Args:
      results: condition -> rows of `register_condition`.
      counts: condition -> number of acquisitions per vertebra.
      seed, out, passes: as in `register_condition`.
      most: maximum number of failures.
    """
    worst = [(row["error_mm"], condition, row["case"]) for condition, rows in results.items() for row in rows]
    worst.sort(key=lambda entry: -entry[0])
    for error, condition, name in worst[:most]:
        folder = out / "failures" / f"{error:.1f}mm_{condition.group}_{condition.name}".replace(" ", "_")
        if folder.exists() or error < metrics.SUCCESS_MM:
            continue
        case_file = scenes_of(patient, condition, counts[condition], seed, out)
        numbered = {case.name: (i, case) for i, case in enumerate(_chosen(case_file, condition))}
        number, case = numbered[name]
        scene = case_file.scenes[case.scene]
        volume, start = case_file.volumes[scene.volume], case.world_from_ct
        given = _given(patient, condition, volume, scene, [seed, number, CAMERA_STREAM])
        outcome = pipeline.register(*given, start, condition.options(passes), kept)
        said = verdicts.verdict(outcome, *given)
        case_folder.write(folder, name, outcome, *given, start, said, cases.truth(case_file, scene))
