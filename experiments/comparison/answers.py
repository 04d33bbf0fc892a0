"""Answers of the systems of Table 1 on a case file: made once, kept on disk, and scored."""

import dataclasses
import hashlib
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines import cases
from data_pipelines.io import files
from experiments.comparison import subjects
from experiments.comparison import tables
from experiments.comparison.subjects import Given
from experiments.comparison.subjects import Sizes
from experiments.comparison.subjects import Subject
from experiments.comparison.subjects import System
from experiments.patients.workdir import target_of
from experiments.runtime import compile_times
from experiments.runtime import progress
from radgs_jax import metrics
from radgs_jax.geometry import resample

DIGEST_CHARACTERS = 16
"""Length of the digest of a system's sizes: 64 bits."""


def slug(title: str) -> str:
    """A title as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def digest(system: System, sizes: Sizes, seed: int) -> str:
    """Of what a system's answers depend on besides the case."""
    values = [repr(getattr(sizes, name)) for name in system.uses]
    return hashlib.sha256(repr((system.title, values, seed)).encode()).hexdigest()[:DIGEST_CHARACTERS]


@dataclasses.dataclass(frozen=True)
class Item:
    """What one answer is about: a case, of which systems that reconstruct get the first of each scene."""

    name: str
    scene: str
    case: cases.Case


def items(case_file: cases.CaseFile, system: System) -> list[Item]:
    """What a system is asked, in file order."""
    found, seen = [], set()
    for case in case_file.cases:
        if system.kind == subjects.REGISTRATION:
            found.append(Item(case.name, case.scene, case))
        elif case.scene not in seen:
            seen.add(case.scene)
            found.append(Item(case.scene, case.scene, case))
    return found


def _paths(out, system, mark, variant, item):
    """Files of an answer, of its times and of its score."""
    folder = pathlib.Path(out) / "answers" / slug(system.title) / f"{variant}_{mark}"
    return folder / f"{item.name}.npz", folder / f"{item.name}_times.json", folder / f"{item.name}_score.json"


def _key(seed, system, variant, item):
    name = f"{system.title}/{variant}/{item.name}"
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def answer_all(
    case_file: cases.CaseFile,
    subject_of: dict[Any, Subject],
    system: System,
    variant: str,
    sizes: Sizes,
    seed: int,
    out: pathlib.Path,
) -> None:
    """Asks a system about all cases of a variant, as far as its answers are not there yet.

    Args:
      case_file: of which X-rays, cameras and start poses are used; subject_of: by target.
      sizes, seed: as in `System`; out: folder of the table.
    """
    mark = digest(system, sizes, seed)
    asked = items(case_file, system)
    missing = [item for item in asked if not _paths(out, system, mark, variant, item)[0].exists()]
    prepared: dict[str, Any] = {}
    with progress.bar(len(asked), f"{system.title}: {variant}", len(asked) - len(missing)) as bar:
        for item in missing:
            scene = case_file.scenes[item.scene]
            subject = subject_of[target_of(case_file.volumes[scene.volume])]
            if system.prepare is not None and scene.volume not in prepared:
                prepared[scene.volume], _ = system.prepare(subject, sizes, seed)
            given = Given(cases.read_xrays(scene, variant), variant, item.case.world_from_ct)
            key = _key(seed, system, variant, item)
            with compile_times.Stopwatch() as watch:
                found = system.answer(subject, given, prepared.get(scene.volume), sizes, key)
            path, times, _ = _paths(out, system, mark, variant, item)
            files.make_folder(path.parent)
            files.write_json(times, watch.times())
            if system.kind == subjects.REGISTRATION:
                files.write_npz(path, world_from_ct=np.asarray(found, np.float64))
            else:
                density, world_from_index = found
                arrays = {"density": np.asarray(density, np.float16), "world_from_index": world_from_index}
                files.write_npz(path, **arrays)
            bar.update()


def _volume_score(case_file, subject, item, answer):
    vertebra, truth = subject.prepared.vertebra, cases.truth(case_file, case_file.scenes[item.scene])
    ct_from_grid, shape = resample.evaluation_grid(vertebra), resample.GRID_SHAPE
    in_ct = lambda volume, affine, order=1: resample.resample(volume, affine, ct_from_grid, shape, order=order)
    estimate = in_ct(answer["density"].astype(np.float32), np.linalg.inv(truth) @ answer["world_from_index"])
    density = in_ct(vertebra.density, vertebra.ct_from_index)
    near = metrics.near(in_ct(vertebra.mask, vertebra.ct_from_index, 0) > 0.5)
    return metrics.reconstruction_scores(estimate, density, near)


def _pose_score(case_file, item, answer):
    scene = case_file.scenes[item.scene]
    points, truth = cases.points(case_file, scene.volume), cases.truth(case_file, scene)
    poses = {"start_mm": item.case.world_from_ct, "error_mm": answer["world_from_ct"]}
    return {name: metrics.mtre(points, pose, truth) for name, pose in poses.items()}


def row(
    case_file: cases.CaseFile,
    subject_of: dict[Any, Subject],
    system: System,
    variant: str,
    sizes: Sizes,
    seed: int,
    out: pathlib.Path,
) -> tables.Row:
    """The scores of a system's answers, which true poses enter here for the first time; arguments as `answer_all`."""
    mark, scores, times, asked = digest(system, sizes, seed), [], [], items(case_file, system)
    for item in asked:
        _, times_path, score_path = _paths(out, system, mark, variant, item)
        if not score_path.exists():
            answer = kept_answer(system, variant, item, sizes, seed, out)
            if system.kind == subjects.REGISTRATION:
                score = _pose_score(case_file, item, answer)
            else:
                volume = case_file.volumes[case_file.scenes[item.scene].volume]
                score = _volume_score(case_file, subject_of[target_of(volume)], item, answer)
            files.write_json(score_path, score)
        scores.append(files.read_json(score_path))
        times.append(files.read_json(times_path))
    used = [
        subject_of[target_of(case_file.volumes[name])] for name in {case_file.scenes[i.scene].volume for i in asked}
    ]
    costs = [system.prepare(subject, sizes, seed)[1] if system.prepare else subjects.Cost() for subject in used]
    return tables.Row(
        system.title,
        tuple(item.scene for item in asked),
        {name: np.array([score[name] for score in scores]) for name in scores[0]},
        np.array([one["runtime_s"] for one in times]),
        np.array([one["cpu_s"] for one in times]),
        float(np.mean([cost.cpu_s for cost in costs])),
        max(cost.parameters for cost in costs),
        system.paper,
    )


def write_results(
    case_file: cases.CaseFile, system: System, variant: str, sizes: Sizes, seed: int, out: pathlib.Path
) -> None:
    """A registering system's answers as a result file of the case format."""
    mark, results = digest(system, sizes, seed), []
    for item in items(case_file, system):
        _, times, _ = _paths(out, system, mark, variant, item)
        pose = kept_answer(system, variant, item, sizes, seed, out)["world_from_ct"]
        results.append({"id": item.name, "T": pose.tolist(), **files.read_json(times)})
    name = slug(system.title)
    cases.write_results(pathlib.Path(out) / f"results_{name}_{variant}.json", system.title, variant, results)


def kept_answer(
    system: System, variant: str, item: Item, sizes: Sizes, seed: int, out: pathlib.Path
) -> dict[str, np.ndarray]:
    """The answer of a system about one item, as it is kept: `world_from_ct`, or `density` and `world_from_index`."""
    names = ("world_from_ct",) if system.kind == subjects.REGISTRATION else ("density", "world_from_index")
    return files.read_npz(_paths(out, system, digest(system, sizes, seed), variant, item)[0], *names)


def chosen(titles: Sequence[str], known: Sequence[System]) -> list[System]:
    """The systems whose title starts with one of `titles`, without regard to case; all where none is given."""
    starts = [title.lower() for title in titles]
    return [one for one in known if not starts or any(one.title.lower().startswith(s) for s in starts)]
